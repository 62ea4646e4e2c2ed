"""Merge several LoRAs into one: Σ wᵢ ΔWᵢ exactly, its best low-rank approximation, or TIES, DARE and magnitude pruning.

All methods work on the weight changes ΔW = alpha / R · up · down, or are exactly equal to that; factors are never summed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd.adapters.adapter import at_least_fp32
from sd.adapters.kinds import KINDS, needs_base
from sd.adapters.weights import AdapterWeights, LayerShape, LoRAError, LoRAFormatError
from sd.files.tensors import keep_sources
from sd.lora_files.block_weights import block_multipliers
from sd.lora_files.header import lora_metadata
from sd.lora_files.write import write_lora
from sd.tools.base import load_base, load_lora_file
from sd.tools.decompose import (
    Approximation,
    RankRule,
    Report,
    alpha_and_rank,
    approximate,
    flat_factors,
    lora_weights,
    named_seed,
    product_norm,
    store,
    svd_of_product,
)

METHODS = ("concat", "svd", "full", "ties", "dare", "magnitude")


class Part(NamedTuple):
    """One file's adapter for one module."""

    file: int  # index of the file
    weight: float
    adapter: AdapterWeights

    @property
    def changes_weight(self) -> bool:
        return bool(self.adapter.tensors.keys() - {"diff_b"})

    @property
    def plain(self) -> str | None:
        """The kind, if ΔW needs neither the base weight nor the layer's shape; else None."""
        return self.adapter.kind if self.adapter.kind in ("lora", "full") and "magnitude" not in self.adapter.tensors else None

    def __str__(self) -> str:
        return self.adapter.kind + (" with a magnitude (DoRA)" if "magnitude" in self.adapter.tensors else "")


def merge_loras(states: Sequence[Mapping[str, AdapterWeights]], weights: Sequence[float | Mapping[str, float]],
                method: str = "concat", *, rank: int | None = None, density: float = 0.5, seed: int = 0,
                shapes: Mapping[str, LayerShape] | None = None, base_weight: Callable[[str], Tensor] | None = None,
                randomized: bool = False) -> tuple[dict[str, AdapterWeights], Report]:
    """One LoRA for Σ wᵢ ΔWᵢ, in fp32 (fp64 if the inputs are), and a report with the error of each module.

    concat: exact, a LoRA of rank ΣR; differences and biases are summed. svd: the best approximation of `rank`. full: exact,
    as differences. ties (Yadav et al. 2023), dare (Yu et al. 2024; drawn from `seed`) and magnitude keep the fraction
    `density` of each file's ΔW values; the sum is approximated at `rank`, or kept as differences if that is None, and
    biases are treated like weights. A weight is a number or {path: number}; it may be negative, and 0 leaves the file or
    module out. `shapes`: path -> LayerShape; not needed by concat, nor by svd of plain LoRAs. `base_weight`: path -> W,
    called only for kinds and DoRA magnitudes that depend on it. The report's error is relative to the same method without
    a rank. Raises LoRAError for a module that the method cannot merge, with its kinds and the methods that can.
    """
    _check(method, rank, density)
    if len(states) != len(weights):
        raise LoRAError(f"{len(states)} LoRAs are given, but {len(weights)} weights")
    parts: dict[str, list[Part]] = {}
    for i, (state, weight) in enumerate(zip(states, weights)):
        for path, adapter in state.items():
            w = float(weight[path] if isinstance(weight, Mapping) else weight)
            if not math.isfinite(w):
                raise LoRAError(f"a weight of the merge is {w}; a finite number is needed")
            if w:
                parts.setdefault(path, []).append(Part(i, w, adapter))
    if not parts:
        raise LoRAError("there is nothing to merge: " + ("every weight is 0" if any(states) else "no LoRA is given"))
    shapes = shapes or {}
    order = {path: i for i, path in enumerate(shapes)}
    merged: dict[str, AdapterWeights] = {}
    report = Report()
    for path in sorted(parts, key=lambda path: order.get(path, len(order))):
        module = _Module(path, method, rank, density, seed, shapes.get(path), base_weight, randomized)
        merged[path], row = module.merge(parts[path])
        if row is not None:
            report.modules[path] = row
    return merged, report


def _check(method: str, rank: int | None, density: float) -> None:
    if method not in METHODS:
        raise LoRAError(f"the method of merging is {method!r}; allowed: {', '.join(METHODS)}")
    if method == "svd" and rank is None:
        raise LoRAError("the method svd needs a rank; without one, concat is exact")
    if method in ("concat", "full") and rank is not None:
        raise LoRAError(f"the method {method} is exact and takes no rank, given: {rank}; the method svd does")
    if rank is not None:
        RankRule(rank)  # checks it
    if not 0 < density <= 1:
        raise LoRAError(f"density is {density}; allowed: 0 < density <= 1")


@dataclass(frozen=True)
class _Module:
    """Merges one module."""

    path: str
    method: str
    rank: int | None
    density: float
    seed: int
    layer: LayerShape | None
    base_weight: Callable[[str], Tensor] | None
    randomized: bool

    def merge(self, parts: list[Part]) -> tuple[AdapterWeights, Approximation | None]:
        """The merged adapter and its row of the report; None where only a bias changes."""
        biases = [(p, at_least_fp32(p.adapter.tensors["diff_b"])) for p in parts if "diff_b" in p.adapter.tensors]
        extra: dict[str, Any] = {"diff_b": self.combine(biases, "bias")} if biases else {}
        parts = [p for p in parts if p.changes_weight]
        if not parts:
            return AdapterWeights("full", extra), None
        kinds = {p.plain for p in parts}
        if self.method in ("concat", "svd") and kinds == {"lora"}:
            return self.factors(parts, extra)
        if self.method == "concat" and kinds != {"full"}:
            if len(parts) == 1 and parts[0].weight == 1:  # a single LoRA of any kind is kept as it is
                adapter = parts[0].adapter
                row = Approximation(adapter.rank, 0.0, 0.0, adapter.rank)
                return replace(adapter, tensors={**adapter.tensors, **extra}), row
            raise LoRAError(f"{self.path}: concat cannot add {' and '.join(sorted({str(p) for p in parts}))}; "
                            f"the method full can, exactly, and the method svd with a rank")
        D = self.combine([(p, self.delta(p)) for p in parts], "weight")
        if self.rank is None or D.dim() == 1:
            norm = float(torch.linalg.vector_norm(D, dtype=torch.float64))
            return AdapterWeights("full", {"diff": D, **extra}), Approximation(None, norm, 0.0)
        if self.shape.groups > 1:
            raise self.grouped(self.shape.groups)
        return approximate(D, RankRule(rank=self.rank), embedding=self.shape.embedding, randomized=self.randomized,
                           seed=named_seed(self.seed, self.path), **extra)

    def factors(self, parts: list[Part], extra: dict[str, Any]) -> tuple[AdapterWeights, Approximation]:
        """Plain LoRAs stacked: [w₁ s₁ up₁, w₂ s₂ up₂, ...] · [down₁; down₂; ...] is Σ wᵢ ΔWᵢ, for any ranks."""
        ups, downs, inners = [], [], []
        for p in parts:
            up, down, inner = by_group(p.adapter, self.path)
            alpha, R = alpha_and_rank(p.adapter)
            ups.append(up * (p.weight * alpha / R))
            downs.append(down)
            inners.append(inner)
        layer = self.layer and (self.layer.weight[::-1] if self.layer.embedding else self.layer.weight)
        inner = self.common([(up.shape[0], *inner) for up, inner in zip(ups, inners)], layer)[1:]
        groups = {len(down) for down in downs}
        if len(groups) > 1:
            raise LoRAError(f"{self.path}: LoRAs of {' and '.join(map(str, sorted(groups)))} groups meet; they are for "
                            f"different models")
        up, down = torch.cat(ups, 1), torch.cat(downs, 1)  # stacked within each group
        rank = len(down) * down.shape[1]
        if len(down) > 1:
            if self.method == "svd":
                raise self.grouped(len(down))
            ones, norms = (1,) * (len(inner) - 1), map(product_norm, up.chunk(len(down)), down)
            tensors = {"down": down.reshape(rank, *inner), "up": up.reshape(*up.shape, *ones), **extra}
            return AdapterWeights("lora", tensors, alpha=rank), Approximation(rank, math.hypot(*norms), 0.0, rank)
        down = down[0]
        if self.method == "concat":
            return lora_weights(up, down, inner, **extra), Approximation(rank, product_norm(up, down), 0.0, rank)
        found = svd_of_product(up, down, RankRule(rank=self.rank))
        row = Approximation(found.down.shape[0], found.norm, found.error, rank)
        return lora_weights(found.up, found.down, inner, **extra), row

    def grouped(self, groups: int) -> LoRAError:
        return LoRAError(f"{self.path}: no rank is chosen for a convolution of {groups} groups; the methods concat and full "
                         f"are exact, and the others do without a rank")

    @property
    def shape(self) -> LayerShape:
        if self.layer is None:
            raise LoRAError(f"{self.path}: the method {self.method} needs the shape of the layer: pass shapes=")
        return self.layer

    def common(self, shapes: list[tuple[int, ...]], layer: tuple[int, ...] | None) -> tuple[int, ...]:
        """The one shape of all changes, the layer's; a 1x1 convolution may be stored as [a, b] or as [a, b, 1, 1]."""
        all_shapes = shapes if layer is None else [*shapes, layer]
        found = {shape[:2] if set(shape[2:]) == {1} else shape for shape in all_shapes}
        if len(found) > 1:
            raise LoRAError(f"{self.path}: changes of the shapes {' and '.join(str(list(s)) for s in sorted(found))} meet; "
                            f"the files, or a file and the base, are for different models")
        return max(shapes, key=len) if layer is None else layer

    def delta(self, part: Part) -> Tensor:
        """ΔW in the layer's orientation, fp32 or fp64."""
        adapter, tensors = part.adapter, part.adapter.tensors
        if part.plain == "full":
            return at_least_fp32(tensors["diff"])
        if part.plain == "lora" and self.shape.groups == 1:
            up, down, inner = flat_factors(adapter, self.path)
            alpha, rank = alpha_and_rank(adapter)
            D = (up @ down) * (alpha / rank)
            return D.T if self.shape.embedding else D.view(-1, *inner)
        W = torch.zeros(()).expand(self.shape.weight)
        if needs_base(adapter):
            if self.base_weight is None:
                raise LoRAError(f"{self.path}: the ΔW of {part} depends on the base weight: name the checkpoint "
                                f"(--model, base=; base_weight= of merge_loras)")
            W = at_least_fp32(self.base_weight(self.path))
        try:
            built = KINDS[adapter.kind].from_weights(adapter, self.shape)
        except LoRAFormatError as error:
            raise LoRAError(f"{self.path}: {error}") from None
        with torch.no_grad():
            return built.effective_delta(W)

    def combine(self, changes: list[tuple[Part, Tensor]], what: str) -> Tensor:
        """Σ wᵢ ΔWᵢ, each ΔW pruned first as the method says."""
        layer = self.layer.weight if self.layer and what == "weight" else None
        shape = self.common([tuple(D.shape) for _, D in changes], layer)
        changes = [(p, D.reshape(shape)) for p, D in changes]
        if self.method == "ties":
            return ties([D for _, D in changes], [p.weight for p, _ in changes], self.density)
        total = torch.zeros_like(changes[0][1])
        for p, D in changes:
            if self.method == "magnitude":
                D = keep_largest(D, self.density)
            elif self.method == "dare":
                D = D * dare_mask(D.shape, self.density, self.seed, p.file, self.path, what) / self.density
            total = total + p.weight * D
        return total


def by_group(weights: AdapterWeights, path: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Like `flat_factors`, but also for grouped convolutions: up [out, R/g], down [g, R/g, in/g·k], (in/g, *k)."""
    up, down = (at_least_fp32(weights.tensors[name]) for name in ("up", "down"))
    if down.dim() < 3 or "mid" in weights.tensors or up.shape[1] == down.shape[0] or down.shape[0] % up.shape[1]:
        up, down, inner = flat_factors(weights, path)
        return up, down[None], inner
    return up.flatten(1), down.flatten(1).unflatten(0, (-1, up.shape[1])), tuple(down.shape[1:])


def keep_largest(D: Tensor, density: float) -> Tensor:
    """D with only the fraction `density` of its values that is largest in |D| (at least one), the others set to 0."""
    kept = D.abs().flatten().topk(max(1, int(density * D.numel()))).indices
    mask = torch.zeros(D.numel(), dtype=torch.bool, device=D.device).index_fill_(0, kept, True)
    return D.where(mask.view(D.shape), 0.0)


def dare_mask(shape: Sequence[int], density: float, seed: int, *names) -> Tensor:
    """Which values DARE keeps: each with probability `density`, reproducible by seed, file and module."""
    generator = torch.Generator().manual_seed(named_seed(seed, *names))
    return torch.rand(tuple(shape), generator=generator) < density


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES (Yadav et al. 2023): trim to `density`, elect each value's sign by the sum, average the values that agree.

    The electing sum is unweighted, as in PEFT; a negative weight flips the sign of its ΔW first.
    """
    turned = torch.stack([keep_largest(D, density) * math.copysign(1, w) for D, w in zip(deltas, weights)])
    sign = torch.where(turned.sum(0) >= 0, 1.0, -1.0)
    agree = turned.sign() == sign
    scaled = turned * torch.tensor([abs(w) for w in weights], dtype=turned.dtype).view(-1, *(1,) * (turned.dim() - 1))
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


# ---- files -----------------------------------------------------------------------------------------------------------

def merge_lora_files(loras: Mapping[str | os.PathLike, float], out: str | os.PathLike, *, method: str = "concat",
                     rank: int | None = None, density: float = 0.5, seed: int = 0, randomized: bool = False,
                     base: str | os.PathLike | None = None, block_weights: Mapping | None = None, skip: str | None = None,
                     format: str = "kohya", dtype: torch.dtype | None = None) -> Report:
    """`merge_loras` on files of any program, {file: weight}, written as one LoRA; `dtype` None: fp32.

    `base`: the checkpoint, needed for kinds whose ΔW depends on its weights. `block_weights`: file -> block weights
    (`sd.lora_files.block_weights`), which multiply the file's weight. Raises as `merge_loras` and `read_lora` do.
    """
    _check(method, rank, density)  # before anything is read
    keep_sources(out, *loras)
    if stray := [path for path in block_weights or {} if path not in loras]:
        raise LoRAError(f"block weights are given for {os.fspath(stray[0])!r}, which is not among the LoRAs to merge")
    model = None if base is None else load_base(base)
    states, weights, headers, skipped = [], [], [], 0
    for path, weight in loras.items():
        file, model = load_lora_file(path, model, skip=skip)  # without a base, the first file decides it
        blocks = block_multipliers((block_weights or {}).get(path), model.modules)
        states.append(file.state)
        headers.append(file.metadata)
        skipped += len(file.skipped)
        weights.append({module: weight * (1.0 if blocks is None else blocks.of(module)) for module in file.state})
    state, report = merge_loras(states, weights, method, rank=rank, density=density, seed=seed, randomized=randomized,
                                shapes=None if model is None else model.layers,
                                base_weight=None if base is None or model is None else model.weight)
    assert model is not None  # merge_loras refuses to merge nothing
    report.skipped = None if skip is None else skipped
    state = store(state, dtype, report)
    names = [(Path(path).name, float(weight)) for path, weight in loras.items()]
    made: dict[str, Any] = {"method": method, "weights": names} | ({} if rank is None else {"rank": rank})
    made |= {"density": density} if method in ("ties", "dare", "magnitude") else {}
    made |= {"seed": seed} if method == "dare" else {}
    metadata = shared_metadata(headers) | lora_metadata(state, model.config) | {
        "modelspec.merged_from": ", ".join(name for name, _ in names), "sdlora.merged": json.dumps(made)}
    write_lora(out, state, model.modules, format=format, metadata=metadata)
    return report


def shared_metadata(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Metadata that holds for the merged LoRA: of one file, all; of several, base and licence if equal, all trigger words."""
    first = headers[0]
    if len(headers) == 1:
        return {key: value for key, value in first.items() if not key.startswith("ss_network_")}
    facts = ("ss_sd_", "ss_new_sd_", "ss_vae", "ss_v2", "ss_clip_skip", "ss_base_", "modelspec.license", "modelspec.author",
             "license")
    kept = {key: value for key, value in first.items() if key.startswith(facts) and all(h.get(key) == value for h in headers)}
    words = [word.strip() for h in headers for word in h.get("modelspec.trigger_phrase", "").split(",") if word.strip()]
    return kept | ({"modelspec.trigger_phrase": ", ".join(dict.fromkeys(words))} if words else {})
