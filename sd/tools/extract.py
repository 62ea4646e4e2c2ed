"""Extract a LoRA from two checkpoints: the changes of fine-tuning, at low rank, or exactly for layers without a rank.

Every difference is extracted: no threshold on the size of a change, no component skipped in silence, nothing clamped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from sd.adapters.adapter import at_least_fp32
from sd.adapters.switch import adapter_names
from sd.adapters.targets import named_layers
from sd.adapters.weights import AdapterWeights, LoRAError
from sd.files.tensors import keep_sources
from sd.lora_files.header import lora_metadata
from sd.lora_files.modules import modules_of
from sd.lora_files.write import write_lora
from sd.model_loader import BASE_HASH, model_path, preload_models_from_standard_weights
from sd.models import Models
from sd.tools.decompose import Approximation, RankRule, Report, approximate, named_seed, store

VAE = ("encoder.", "decoder.")


class Layer(NamedTuple):
    """One module in both models."""

    path: str
    base: Tensor
    tuned: Tensor
    base_bias: Tensor | None = None
    tuned_bias: Tensor | None = None
    embedding: bool = False


@dataclass
class ExtractReport(Report):
    """`rounding`: the share of the difference, and so of the error, that is rounding to the tuned file's dtype."""

    equal: int = 0  # modules without any difference
    left_out: list[str] = field(default_factory=list)  # modules of the VAE that differ but were not requested

    def __str__(self) -> str:
        vae = f"; {len(self.left_out)} modules of the VAE differ and are left out" if self.left_out else ""
        return (f"{super().__str__()}, the tuned weights' own rounding {self.rounding:.2e} of the difference; "
                f"{self.equal} modules are equal{vae}")


def extract(layers: Iterable[Layer], rule: RankRule, *, conv_rule: RankRule | None = None, randomized: bool = False,
            seed: int = 0) -> tuple[dict[str, AdapterWeights], ExtractReport]:
    """The differences tuned - base, taken in fp32 or fp64: by `rule` at low rank for matrices and kernels (by `conv_rule`
    for kernels larger than 1x1), exactly for norms and biases.

    Raises LoRAError for shapes that differ and values that are not finite.
    """
    state: dict[str, AdapterWeights] = {}
    report = ExtractReport()
    for layer in layers:
        D, bias = _difference(layer.path, layer.base, layer.tuned), None
        if layer.base_bias is not None or layer.tuned_bias is not None:
            bias = _difference(f"{layer.path} (bias)", layer.base_bias, layer.tuned_bias)
        extra: dict[str, Any] = {} if bias is None else {"diff_b": bias}
        if D is None and bias is None:
            report.equal += 1
        elif D is None:
            state[layer.path] = AdapterWeights("full", extra)
            report.modules[layer.path] = Approximation(None, 0.0, 0.0)
        else:
            kernel = D.dim() > 2 and max(D.shape[2:]) > 1
            by = conv_rule if kernel and conv_rule is not None else rule
            adapter, row = _adapter(D, layer, by, extra, randomized, named_seed(seed, layer.path))
            state[layer.path] = adapter
            report.modules[layer.path] = row._replace(rounding=rounding_norm(layer.tuned) / row.norm)
    return state, report


def _difference(what: str, base: Tensor | None, tuned: Tensor | None) -> Tensor | None:
    """tuned - base; None if no value differs."""
    if base is None or tuned is None or base.shape != tuned.shape:
        shapes = ["absent" if t is None else str(list(t.shape)) for t in (base, tuned)]
        raise LoRAError(f"{what} is {shapes[0]} in the base and {shapes[1]} in the tuned model")
    D = at_least_fp32(tuned) - at_least_fp32(base)
    if not torch.isfinite(D).all():
        raise LoRAError(f"{what}: the difference holds values that are not finite (NaN or infinity)")
    return D if D.any() else None


def _adapter(D: Tensor, layer: Layer, rule: RankRule, extra: Mapping[str, Any], randomized: bool,
             seed: int) -> tuple[AdapterWeights, Approximation]:
    if D.dim() == 1:  # a norm
        return AdapterWeights("full", {"diff": D, **extra}), Approximation(None, float(D.double().norm()), 0.0)
    return approximate(D, rule, embedding=layer.embedding, randomized=randomized, seed=seed, **extra)


def rounding_norm(W: Tensor) -> float:
    """The expected norm of the error of rounding W to its dtype: ulp / √12 for each value."""
    info = torch.finfo(W.dtype)
    exponent = torch.frexp(at_least_fp32(W).abs().clamp(min=info.smallest_normal)).exponent - 1
    ulp = info.eps * torch.exp2(exponent.double())  # 2^exponent <= |w| < 2^(exponent + 1)
    return float(ulp.norm()) / 12 ** 0.5


# ---- files -----------------------------------------------------------------------------------------------------------

def extract_lora(base: str | os.PathLike | None, tuned: str | os.PathLike, out: str | os.PathLike, *, rank: int | None = None,
                 conv_rank: int | None = None, threshold: float | None = None, ratio: float | None = None,
                 cumulative: float | None = None, frobenius: float | None = None, vae: bool = False, randomized: bool = False,
                 seed: int = 0, format: str = "kohya", dtype: torch.dtype | None = None,
                 metadata: Mapping[str, str] | None = None, progress: bool = True) -> ExtractReport:
    """Write the LoRA that turns the checkpoint `base` (None: the model that ships) into `tuned`: UNet, text encoder, and
    on request the VAE.

    `rank`: of every layer, or with another rule of `RankRule` the upper limit; `conv_rank`: the same for kernels larger
    than 1x1. Both files stay mapped. `dtype` None: fp32. Raises LoRAError for models with different configs, LoRAs inside
    either, and models that do not differ.
    """
    rules = {"ratio": ratio, "threshold": threshold, "cumulative": cumulative, "frobenius": frobenius}
    rule, conv_rule = _rule(rank, rules), None if conv_rank is None else _rule(conv_rank, rules)
    paths = [model_path(base), Path(tuned)]
    keep_sources(out, *paths)
    models = [preload_models_from_standard_weights(path, "cpu", dtype="stored") for path in paths]
    _check(*models)
    layers = list(layers_of(*models))
    of_vae = [layer for layer in layers if layer.path.startswith(VAE)]
    wanted = layers if vae else [layer for layer in layers if not layer.path.startswith(VAE)]
    state, report = extract(tqdm(wanted, desc="extract", unit="layer", disable=None if progress else True), rule,
                            conv_rule=conv_rule, randomized=randomized, seed=seed)
    report.left_out = [] if vae else [layer.path for layer in of_vae if _differs(layer)]
    if not state:
        vae_only = f"; {len(report.left_out)} modules of the VAE do (vae=True extracts them)" if report.left_out else ""
        raise LoRAError(f"{tuned}: there is nothing to extract: no weight differs from {paths[0]}{vae_only}")
    state = store(state, dtype, report)
    header = lora_metadata(state, models[0].config) | {"ss_sd_model_name": paths[0].name}
    if models[0].model_hash is not None:
        header[BASE_HASH] = models[0].model_hash
    write_lora(out, state, modules_of(models[0]), format=format, metadata=header | dict(metadata or {}))
    return report


def _rule(rank: int | None, rules: Mapping[str, float | None]) -> RankRule:
    bounded = any(value is not None for value in rules.values())
    return RankRule(None if bounded else rank, max_rank=rank if bounded else None, **rules)


def _check(base: Models, tuned: Models) -> None:
    for models in (base, tuned):
        if adapter_names(models):
            raise LoRAError(f"{models.source}: has the LoRAs {', '.join(map(repr, adapter_names(models)))} inside, which are "
                            f"no part of its weights; extract them, or merge them into a checkpoint first")
    for field_ in fields(base.config):
        ours, theirs = (getattr(models.config, field_.name) for models in (base, tuned))
        if ours != theirs and field_.name not in ("name", "image_size"):
            raise LoRAError(f"{base.source} and {tuned.source} are different models, which have no difference: their "
                            f"{field_.name} is {ours} and {theirs}")


def layers_of(base: Models, tuned: Models) -> Iterator[Layer]:
    """Every layer of two models with the same config, in order."""
    other: dict[str, Any] = dict(named_layers(tuned))
    for path, layer in named_layers(base):
        weight: Tensor | None = getattr(layer, "weight", None)
        if weight is not None:
            biases = (getattr(layer, "bias", None), getattr(other[path], "bias", None))
            yield Layer(path, weight, other[path].weight, *biases, isinstance(layer, nn.Embedding))


def _differs(layer: Layer) -> bool:
    pairs = (layer.base, layer.tuned), (layer.base_bias, layer.tuned_bias)
    return any(a is not None and b is not None and bool((at_least_fp32(a) != at_least_fp32(b)).any()) for a, b in pairs)
