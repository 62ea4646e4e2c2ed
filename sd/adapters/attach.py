"""Attach adapters to whole models, remove them by name, and read their weights.

`models` below is an nn.Module (a whole model, or one network) or the Models that a loader returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn

from sd.adapters.adapter import Adapter
from sd.adapters.kinds import KINDS
from sd.adapters.layers import as_lora_layer, check_rank, shape_of
from sd.adapters.low_rank import Full
from sd.adapters.switch import adapter_names, check_known, exclusive, names_on, set_lora_enabled, use_adapters
from sd.adapters.targets import NORMS, adaptable_layers, components, find_targets, lora_layers, refuse_bypassed
from sd.adapters.torch_attention import HOSTS, convert_hosts
from sd.adapters.weights import AdapterWeights, LoRAError, LoRAFormatError
from sd.errors import SDError

# ---- adding and removing ---------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # adapters that are attached in inference mode can be trained too
def apply_lora_to_model(models, rank: int | Mapping[str, int] = 4, alpha: float | Mapping[str, float] = 1.0,
                        dropout: float = 0.0, target_modules=None, name: str = "default", *, kind: str = "lora",
                        dora: bool = False, rank_dropout: float = 0.0, module_dropout: float = 0.0, **options):
    """Attach a new, trainable adapter to every target layer, active at multiplier 1; outputs stay bit-identical.

    Kind "lora" is ΔW = alpha / rank · up · down, with up = 0 at the start; the other kinds and their options (such as
    `tucker` or `factor`) are in KINDS. Norms, which have no low rank, get a full difference. For oft and boft, `rank`
    bounds the rows of a block and `alpha` the change; ia3 and full ignore both. Either may be a table {path: value} with
    a value for every target; a layer of rank 0 gets no adapter. `dora` adds a trained magnitude.
    Returns `models`. Raises LoRAError, before anything changes, for a name in use, a rank below 1 or above
    min(in, out) of a layer, a target that matches nothing, or a layer without a LoRA form or without one of this kind.
    """
    _check_name(name)
    targets = find_targets(models, target_modules)
    if kind not in KINDS:
        raise LoRAError(f"adapter kind {kind!r} is unknown; allowed: {', '.join(KINDS)}")
    if dora and not KINDS[kind].takes_dora:
        having = ", ".join(k for k in KINDS if KINDS[k].takes_dora)
        raise LoRAError(f"dora does not go with kind {kind!r}; allowed: {having}")
    unknown = [option for option in options if option not in KINDS[kind].options]
    if unknown:
        raise LoRAError(f"kind {kind!r} has no option {unknown[0]!r}; it has {', '.join(KINDS[kind].options) or 'none'}")
    ranks, alphas = _by_path(rank, targets), _by_path(alpha, targets)
    targets = {path: layer for path, layer in targets.items() if not isinstance(rank, Mapping) or ranks[path] != 0}
    if name in adapter_names(models):
        raise LoRAError(f"an adapter named {name!r} already exists; remove_lora it first, or choose another name")
    _refuse_bypassed(models, targets)
    new: dict[str, Adapter] = {}
    make: Callable[..., Adapter] = KINDS[kind]
    for path, layer in targets.items():
        norm, shape = isinstance(layer, NORMS), shape_of(layer, path)
        if KINDS[kind].low_rank and not norm:
            check_rank(ranks[path], shape, path)
        if not _is_finite(alphas[path]):
            raise LoRAError(f"alpha is {alphas[path]!r}; a finite number is needed")
        try:
            if norm:  # without rank_dropout: it has no ranks
                new[path] = Full(shape, dropout=dropout, module_dropout=module_dropout)
            else:
                new[path] = make(shape, ranks[path], alphas[path], dropout=dropout, rank_dropout=rank_dropout,
                                 module_dropout=module_dropout, **options)
        except SDError as error:
            raise LoRAError(f"{path}: {error}") from None
    for path, adapter in new.items():
        if dora and not isinstance(targets[path], NORMS):
            adapter.start_magnitude(as_lora_layer(targets[path], path).base_weight())
    attach_adapters(models, targets, new, name, 1.0)
    return models


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise LoRAError(f"the name of an adapter is {name!r}; a string is needed")


def _by_path(value, paths: Iterable[str]) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else dict.fromkeys(paths, value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def attach_adapters(models, layers: Mapping[str, nn.Module], adapters: Mapping[str, Adapter], name: str,
                    multiplier: float) -> None:
    """Attach adapters to the layers of the same paths as `name`, active, replacing any adapter of that name."""
    _check_name(name)
    with exclusive(models), torch.inference_mode(False):
        before = lora_layers(models).values()
        enabled = all(layer.lora_enabled for layer in before)
        if any(layer.has_adapter(name) for layer in before):
            remove_lora(models, name)
        for path, adapter in adapters.items():
            as_lora_layer(layers[path], path).add_adapter(name, adapter, multiplier)
        for network in components(models).values():
            convert_hosts(network)
        set_lora_enabled(models, enabled)  # also on layers that had no adapter when LoRA was switched


def _refuse_bypassed(models, targets: Iterable[str]) -> None:
    def without_lora(module: nn.Module) -> bool:  # such as a class derived from torch's attention
        return isinstance(module, tuple(HOSTS)) and type(module) not in (*HOSTS, *HOSTS.values())
    refuse_bypassed(models, targets, without_lora, "LoRA on it would be ignored")


def remove_lora(models, name: str | None = None) -> None:
    """Remove an adapter (None: all); base weights were never changed. Converted foreign layers become plain again."""
    with exclusive(models):
        layers = lora_layers(models).values()
        if name is not None:
            check_known(layers, [name])
        for layer in layers:
            for known in layer.adapter_names if name is None else [name]:
                if layer.has_adapter(known):
                    layer.remove_adapter(known)
        for network in components(models).values():
            convert_hosts(network)
        reports = getattr(models, "lora_reports", {})
        for gone in list(reports) if name is None else [name]:
            reports.pop(gone, None)


def get_lora_parameters(models, name: str | None = None) -> list[nn.Parameter]:
    """Parameters of one adapter; None: of all that were created here rather than loaded from files."""
    layers = lora_layers(models).values()
    if name is not None:
        check_known(layers, [name])
    adapters = [(n, layer.adapter(n)) for layer in layers for n in layer.adapter_names]
    return [p for n, a in adapters if (n == name if name is not None else not a.from_file) for p in a.parameters()]


def unreached_layers(models, run: Callable[[], object]) -> list[str]:
    """Adapted layers that `run()`, a probe forward with all adapters on, does not call: their LoRA is silently ignored."""
    layers, reached = lora_layers(models), set()
    hooks = [layer.register_forward_pre_hook(lambda module, args, path=path: reached.add(path))
             for path, layer in layers.items()]
    try:
        with use_adapters(models, dict.fromkeys(adapter_names(models), 1.0)):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path in layers if path not in reached]


# ---- weights of adapters ---------------------------------------------------------------------------------------------


def lora_state(models, name: str | None = None) -> dict[str, AdapterWeights]:
    """{canonical module path: weights} of one adapter; None: the only one."""
    layers = lora_layers(models)
    names = names_on(layers.values())
    if name is None:
        if len(names) != 1:
            raise LoRAError(f"name the adapter to save; loaded: {', '.join(map(repr, names)) or 'none'}")
        name = names[0]
    check_known(layers.values(), [name])
    return {path: layer.adapter(name).weights() for path, layer in layers.items() if layer.has_adapter(name)}


@torch.inference_mode(False)
def attach_state(models, state: Mapping[str, AdapterWeights], name: str, multiplier: float = 1.0,
                 where: str = "the LoRA") -> None:
    """Attach loaded weights as `name`, active, replacing any adapter of that name. Raises before anything changes."""
    if not math.isfinite(multiplier):
        raise LoRAError(f"the multiplier of {name!r} is {multiplier}; a finite number is needed")
    by_path = adaptable_layers(models)
    _refuse_bypassed(models, {path: by_path[path] for path in state})
    new, misfits = {}, []
    for path, weights in state.items():
        try:
            new[path] = loaded_adapter(weights, by_path[path], path)
        except SDError as error:
            misfits.append(f"{path}: {error}")
    if misfits:
        raise LoRAFormatError(f"{where}: {len(misfits)} of {len(state)} LoRA modules do not fit this model, "
                              f"first: {misfits[0]}")
    attach_adapters(models, by_path, new, name, multiplier)


def loaded_adapter(weights: AdapterWeights, layer: nn.Module, path: str) -> Adapter:
    """Build a frozen adapter for the layer. Raises SDError, such as LoRAFormatError, if the weights do not fit it."""
    shape = shape_of(layer, path)
    adapter = KINDS[weights.kind].from_weights(weights, shape)
    bias = getattr(layer, "bias", None)
    if bias is None and adapter.bias_delta(bias) is not None:
        raise LoRAFormatError("it changes a bias that the layer does not have")
    adapter.from_file = True
    return adapter.requires_grad_(False)
