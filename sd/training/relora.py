"""ReLoRA (Lialin et al. 2023): every N steps the LoRA's change is moved into a frozen one, and the LoRA is restarted.

The result is a sum of low-rank changes. The base is never written, so that it can be quantised: the moved changes are in a
second adapter, `<name>.merged`, a full fp32 difference on each layer, until `fold` combines the two.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sd.adapters.adapter import Adapter, at_least_fp32
from sd.adapters.attach import attach_state, lora_state, remove_lora
from sd.adapters.derived import exact
from sd.adapters.layer import LoRALayer
from sd.adapters.low_rank import Full
from sd.adapters.targets import lora_layers
from sd.adapters.weights import AdapterWeights
from sd.tools.decompose import RankRule, Report, approximate
from sd.training.dataset.randomness import seed_of
from sd.training.errors import TrainError
from sd.training.rules import kinds_with


def merged_name(name: str) -> str:
    """Name of the adapter with the moved changes."""
    return f"{name}.merged"


def adapters_in_training(config) -> list[str]:
    """Names of the adapters that make up the trained change: the LoRA and, with ReLoRA, the moved changes."""
    if config.train != "lora":
        return []
    return [config.name, merged_name(config.name)] if config.relora_every else [config.name]


def attach_merged(name: str, adapters: dict[str, Adapter], layers: dict[str, LoRALayer]) -> None:
    """Add a frozen difference of 0 beside each trained adapter. Raises TrainError for an adapter that cannot be restarted."""
    for path, adapter in adapters.items():
        if not (adapter.adds or isinstance(adapter, Full)) or adapter.magnitude is not None:
            what = "a magnitude (DoRA)" if adapter.magnitude is not None else f"kind {adapter.kind!r}"
            raise TrainError(f"relora_every does not go with {what} (on {path}); allowed: {', '.join(kinds_with('adds'))}")
    for path, adapter in adapters.items():
        merged = Full(layers[path].lora_shape())
        if adapter.diff_b is not None:
            merged.diff_b = nn.Parameter(torch.zeros_like(adapter.diff_b))
        layers[path].add_adapter(merged_name(name), merged.requires_grad_(False))


def restart(step: int, config, models, optimizer: torch.optim.Optimizer) -> None:
    """Before steps N, 2N, ..: move the change, reinitialise the LoRA to a change of 0, and drop the optimizer's moments.

    The output does not change, up to fp32 rounding. The n-th restart is a pure function of (seed, n).
    """
    if not config.relora_every or step == 0 or step % config.relora_every:
        return
    torch.manual_seed(seed_of(config.seed, "init", step // config.relora_every))  # number 0 is the initialisation
    with exact():
        for layer, adapter, merged in _pairs(config, models):
            change, bias = _sum(layer, adapter, merged)
            for moved, total in ((merged.diff, change), (merged.diff_b, bias)):
                if moved is not None and total is not None:
                    moved.copy_(total)
            adapter.restart(layer.lora_shape())
            for p in adapter.parameters():
                optimizer.state.pop(p, None)  # every optimizer in OPTIMIZERS_THAT_FORGET creates it again


def rewarm_factor(step: int, config) -> float:
    """Another factor of the learning rate: a linear warm-up of `relora_warmup` steps after each restart.

    With a cosine schedule this gives the paper's jagged cosine (section 3).
    """
    if not config.relora_every or step < config.relora_every:
        return 1.0
    return min(1.0, (step % config.relora_every + 1) / max(1, min(config.relora_warmup, config.relora_every)))


def fold(config, models) -> None:
    """Combine LoRA and moved changes into one adapter: a full difference or its truncated SVD, as `relora_save` says."""
    if not config.relora_every:
        return
    state, report = lora_state(models, config.name), Report()
    paths = {id(layer): path for path, layer in lora_layers(models).items()}
    with exact():
        for layer, adapter, merged in _pairs(config, models):
            change, bias = _sum(layer, adapter, merged)
            path = paths[id(layer)]
            more: dict[str, Any] = {} if bias is None else {"diff_b": bias}
            if config.relora_save == "full" or change.dim() < 2:
                state[path] = AdapterWeights("full", {"diff": change, **more})
            else:
                rank = config.relora_rank or adapter.rank * (1 + (config.steps - 1) // config.relora_every)
                state[path], report.modules[path] = approximate(change, RankRule(rank), embedding=adapter.embedding, **more)
    remove_lora(models, merged_name(config.name))
    attach_state(models, state, config.name)
    for layer in lora_layers(models).values():
        if config.name in layer.adapter_names:
            layer.adapter(config.name).requires_grad_(True).from_file = False  # as after any training
    if report.modules:
        logging.getLogger("sd").info("ReLoRA as a LoRA: %s", report)


def _pairs(config, models) -> Iterator[tuple[LoRALayer, Adapter, Full]]:
    name = merged_name(config.name)
    for layer in lora_layers(models).values():
        if name in layer.adapter_names:
            merged = layer.adapter(name)
            assert isinstance(merged, Full)  # see attach_merged
            yield layer, layer.adapter(config.name), merged


def _sum(layer: LoRALayer, adapter: Adapter, merged: Full) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The total change of the weight, and of the bias."""
    W = layer.base_weight()
    assert merged.diff is not None
    change, bias = adapter.add_to(merged.diff.to(W.dtype), W, 1.0), adapter.bias_delta(layer.base_bias())
    if bias is None:
        return change, None
    assert merged.diff_b is not None  # attach_merged adds one beside each bias of a LoRA
    return change, bias + at_least_fp32(merged.diff_b)
