"""Kinds of adapter that LyCORIS (Yeh et al. 2024) brought to diffusion models: products, sums and factors of rows.

Legend: R rank, `in`, `out` widths of the stored weight (in/g for a grouped convolution), k kernel size. Formulas treat W
and ΔW as matrices [out, in·k].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn as nn
from torch import Tensor

from sd.adapters.adapter import MODIFIERS, Adapter, check_kind_rank, flag_of, rebuild, size_of, uniform
from sd.adapters.weights import AdapterWeights, LayerShape
from sd.errors import SDError


class LoHa(Adapter):
    """Hadamard product of two low ranks (FedPara, Hyeon-Woo et al. 2022): ΔW = alpha / R · (w1_a w1_b) ⊙ (w2_a w2_b).

    w*_a [out, R], w*_b [R, in·k]. `tucker` gives convolutions of k > 1 a core for each half: t1, t2 [R, R, *k],
    w*_a [R, out], w*_b [R, in].
    """

    kind = "loha"
    options = ("tucker",)
    takes_dora = low_rank = True
    scaled = adds = is_product = True
    keys = {f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    needed, cores = ("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2")
    held_by = {"comfyui": (*keys.values(), *MODIFIERS)}
    lycoris_name = "loha"
    peft_type = "LOHA"

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, *, tucker: bool = False, **dropouts):
        super().__init__(shape, **dropouts)
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        tucker = tucker and shape.has_kernel
        out, inner, *kernel = shape.weight
        a, b = ((rank, out), (rank, inner)) if tucker else ((out, rank), (rank, shape.fan_in))
        self.w1_a, self.w1_b = nn.Parameter(torch.randn(a) * 0.1), nn.Parameter(torch.randn(b))
        self.w2_a, self.w2_b = nn.Parameter(torch.zeros(a)), nn.Parameter(torch.randn(b))
        self.t1, self.t2 = (nn.Parameter(torch.randn(rank, rank, *kernel) * 0.1) if tucker else None for _ in range(2))

    def delta(self, W: Tensor) -> Tensor:
        halves = (rebuild(self.w1_a, self.w1_b, self.t1, W.dtype), rebuild(self.w2_a, self.w2_b, self.t2, W.dtype))
        return (halves[0] * halves[1] * self.scale).reshape(W.shape)

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        return tensors["w1_b"].shape[0] if "w1_b" in tensors else None

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        return cls(shape, size_of(weights, "w1_b"), weights.alpha, tucker="t1" in weights.tensors)


def factorization(n: int, factor: int = -1) -> tuple[int, int]:
    """(a, b) with a · b = n and a <= b, as close to each other as a <= factor allows (-1: any); the rule of LyCORIS."""
    if factor > 0 and n % factor == 0:
        return min(factor, n // factor), max(factor, n // factor)
    a = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0 and (factor < 0 or d <= max(factor, 1)))
    return a, n // a


class Kron(NamedTuple):
    """Form of a Kronecker product: w1 is [rows, columns], and each factor is full (`whole`) or low-rank."""

    rows: int
    columns: int
    whole1: bool
    whole2: bool
    tucker: bool


class LoKr(Adapter):
    """Kronecker product (KronA, Edalati et al. 2022; LyCORIS): ΔW = scale · w1 ⊗ w2, w1 [a, c], w2 [out/a, in/c, *k].

    Either factor may be low-rank: w1_a [a, R], w1_b [R, c]; w2_a [out/a, R], w2_b [R, in/c·k], or with a Tucker core
    t2 [R, R, *k]: w2_a [R, out/a], w2_b [R, in/c]. scale = alpha / R; 1 where both are full. `factor` bounds a and c; w1
    is low-rank only with `decompose_both`, w2 wherever R is below half of its larger side.
    """

    kind = "lokr"
    options = ("factor", "decompose_both", "tucker")
    takes_dora = True
    scaled = adds = is_product = True
    keys = {f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    cores = ("t2",)
    held_by = {"comfyui": (*keys.values(), *MODIFIERS)}
    lycoris_name = "lokr"
    no_alpha = 1.0  # a scale of 1, where both factors are full
    peft_type = "LOKR"
    w1_a: Any  # these two are parameters where w1 is None
    w1_b: Any
    w2_a: Any  # and these where w2 is
    w2_b: Any

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, *, factor: int = -1,
                 decompose_both: bool = False, tucker: bool = False, form: Kron | None = None, **dropouts):
        super().__init__(shape, **dropouts)
        check_kind_rank(self.kind, rank)
        out, inner, *kernel = shape.weight
        if form is None:
            (a, b), (c, d) = factorization(out, factor), factorization(inner, factor)
            form = Kron(a, c, not (decompose_both and 2 * rank < max(a, c)), 2 * rank >= max(b, d), tucker and shape.has_kernel)
        a, c = form.rows, form.columns
        if out % a or inner % c:
            raise SDError(f"w1 has shape {[a, c]}, which does not divide the layer's weight {list(shape.weight)}")
        b, d, whole = out // a, inner // c, form.whole1 and form.whole2
        self.rank, self.alpha = (None, None) if whole else (rank, float(rank if alpha is None else alpha))
        self.w1 = self.w1_a = self.w1_b = self.w2 = self.w2_a = self.w2_b = self.t2 = None
        if form.whole1:
            self.w1 = nn.Parameter(uniform(torch.empty(a, c)))
        else:
            self.w1_a, self.w1_b = (nn.Parameter(uniform(torch.empty(size))) for size in ((a, rank), (rank, c)))
        if form.whole2:
            self.w2 = nn.Parameter(torch.zeros(b, d, *kernel))
            return
        if form.tucker:
            self.t2 = nn.Parameter(uniform(torch.empty(rank, rank, *kernel)))
        self.w2_a = nn.Parameter(uniform(torch.empty((rank, b) if form.tucker else (b, rank))))
        self.w2_b = nn.Parameter(torch.zeros(rank, d if form.tucker else d * math.prod(kernel)))

    def delta(self, W: Tensor) -> Tensor:
        w1 = rebuild(self.w1_a, self.w1_b, None, W.dtype) if self.w1 is None else self.w1.to(W.dtype)
        w2 = rebuild(self.w2_a, self.w2_b, self.t2, W.dtype) if self.w2 is None else self.w2.to(W.dtype)
        (a, c), kernel = w1.shape, W.shape[2:]
        w2 = w2.reshape(W.shape[0] // a, W.shape[1] // c, *kernel)
        return torch.kron(w1.reshape(a, c, *(1,) * len(kernel)), w2.contiguous()) * self.scale

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        return next((tensors[name].shape[0] for name in ("w1_b", "w2_b") if name in tensors), None)

    @classmethod
    def missing(cls, tensors: Mapping[str, Tensor]) -> list[str]:
        return [w for w in ("w1", "w2") if w not in tensors and not {f"{w}_a", f"{w}_b"} <= tensors.keys()]

    @classmethod
    def multiplied(cls, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        return {**tensors, "w1": tensors["w1"].float() * factor}

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        whole1, whole2 = ("w1" in weights.tensors, "w2" in weights.tensors)
        rows, columns = (size_of(weights, "w1" if whole1 else "w1_a"), size_of(weights, "w1" if whole1 else "w1_b", 1))
        rank = 1 if whole1 and whole2 else size_of(weights, "w1_b" if whole2 else "w2_b")
        return cls(shape, rank, weights.alpha, form=Kron(rows, columns, whole1, whole2, "t2" in weights.tensors))


class IA3(Adapter):
    """A factor for each row, or each input column, of W (Liu et al. 2022; as LyCORIS stores it, minus 1): ΔW = W · weight.

    weight: Linear [out] or [in], ConvNd [1, out, 1...] or [1, in, 1...]. It has no rank and no alpha.
    """

    kind = "ia3"
    of_weight = True
    options = flags = ("on_input",)
    sized = False
    is_product = True
    keys = {"on_input": "on_input", "weight": "weight"}
    needed = ("weight", "on_input")
    only_beside = {"weight": "on_input"}
    lycoris_name = "ia3"

    def __init__(self, shape: LayerShape, rank: int = 0, alpha: float | None = None, *, on_input: bool = False, **dropouts):
        super().__init__(shape, **dropouts)
        self.on_input, kernel = bool(on_input), shape.weight[2:]
        n = shape.weight[self.on_input]
        self.weight = nn.Parameter(torch.zeros(1, n, *(1,) * len(kernel)) if kernel else torch.zeros(n))

    def delta(self, W: Tensor) -> Tensor:
        return W * self.weight.to(W.dtype).reshape([-1 if axis == self.on_input else 1 for axis in range(W.dim())])

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        return cls(shape, on_input=flag_of(weights, "on_input", "whether its weight is for rows or input columns"))


class GLoRA(Adapter):
    """Generalized LoRA (Chavan et al. 2023), weight part: ΔW = alpha / R · (W a1 a2 + b1 b2); a1 a2 is 1x1 for a kernel.

    a1 [in, R], a2 [R, in], b1 [out, R], b2 [R, in, *k]; with a core bm [R, R, *k]: b2 [R, in, 1...]. Older files have
    a1 [R, in], a2 [in, R], b1 [R, in·k], b2 [out, R] for ΔW = alpha / R · (W a2 a1 + b2 b1). The lengths of a1 and b1 tell
    the two apart, even on a square layer; only if in = out = R do both fit, and the present form is assumed.
    """

    kind = "glora"
    of_weight = True
    low_rank = True
    scaled = adds = True
    keys = {f"{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")}
    needed, cores = ("a1", "a2", "b1", "b2"), ("bm",)
    held_by = {"comfyui": (*needed, *MODIFIERS)}
    lycoris_name = "glora"

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, *, tucker: bool = False, **dropouts):
        super().__init__(shape, **dropouts)
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        out, inner, *kernel = shape.weight
        ones = (1,) * len(kernel)
        self.a1, self.b1 = (nn.Parameter(uniform(torch.empty(n, rank, *ones))) for n in (inner, out))
        self.a2 = nn.Parameter(torch.zeros(rank, inner, *ones))
        self.b2 = nn.Parameter(torch.zeros(rank, inner, *(ones if tucker else kernel)))
        self.bm = nn.Parameter(uniform(torch.empty(rank, rank, *kernel))) if tucker else None

    def delta(self, W: Tensor) -> Tensor:
        a1, a2 = (a.to(W.dtype).flatten(1) for a in (self.a1, self.a2))
        b1, b2 = self.b1.flatten(1), self.b2.flatten(1)
        b = rebuild(b1 if self.bm is None else b1.T, b2, self.bm, W.dtype)
        return (torch.einsum("oi...,ir,rj->oj...", W, a1, a2) + b.reshape(W.shape)) * self.scale

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        return min(tensors["a2"].shape[:2])  # in both orientations

    @classmethod
    def from_weights(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        rows = {name: size_of(weights, name) for name in ("a1", "a2", "b1", "b2")}
        wanted = shape.weight[1:2] + shape.weight[:1]
        if (rows["a1"], rows["b1"]) != wanted == (rows["a2"], rows["b2"]):
            names = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
            weights = replace(weights, tensors={names.get(name, name): t for name, t in weights.tensors.items()})
        return super().from_weights(weights, shape)

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        tucker = "bm" in weights.tensors
        if tucker and len(shape.weight) < 3:
            raise SDError(f"bm is a core for convolutions, the layer's weight is {list(shape.weight)}")
        return cls(shape, size_of(weights, "a2"), weights.alpha, tucker=tucker)
