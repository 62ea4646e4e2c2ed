"""The other kinds of adapter (LyCORIS, Yeh et al. 2024), and the table of all.

Legend: R rank, `in`, `out` widths of the weight as it is stored (of a grouped convolution in/g), k the kernel's size,
n blocks of b rows. W and ΔW are taken as matrices [out, in·k] where a formula says so.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from sd.adapters.adapter import Adapter, rebuild, size_of, uniform
from sd.adapters.low_rank import Full, LowRank
from sd.adapters.weights import AdapterWeights, LayerShape, LoRAFormatError
from sd.errors import SDError


def _check_rank(kind: str, rank: int) -> None:
    if not (isinstance(rank, int) and rank >= 1):
        raise SDError(f"rank {rank} does not go with kind {kind!r}; allowed: whole numbers from 1")


class LoHa(Adapter):
    """Hadamard product of two low ranks (FedPara, Hyeon-Woo et al. 2022): ΔW = alpha / R · (w1_a w1_b) ⊙ (w2_a w2_b).

    w*_a [out, R], w*_b [R, in·k]. `tucker` gives convolutions of k > 1 a core for each half: t1, t2 [R, R, *k],
    w*_a [R, out], w*_b [R, in].
    """

    kind = "loha"
    options = ("tucker",)
    takes_dora = low_rank = True

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
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> LoHa:
        return cls(shape, size_of(weights, "w1_b"), weights.alpha, tucker="t1" in weights.tensors)


def factorization(n: int, factor: int = -1) -> tuple[int, int]:
    """(a, b) with a · b = n and a <= b, as near to a square as a <= factor allows (-1: any); LyCORIS' rule."""
    if factor > 0 and n % factor == 0:
        return min(factor, n // factor), max(factor, n // factor)
    a = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0 and (factor < 0 or d <= max(factor, 1)))
    return a, n // a


class Kron(NamedTuple):
    """Form of a Kronecker product: w1 is [rows, columns], and each factor is whole or itself of low rank."""

    rows: int
    columns: int
    whole1: bool
    whole2: bool
    tucker: bool


class LoKr(Adapter):
    """Kronecker product (KronA, Edalati et al. 2022; LyCORIS): ΔW = scale · w1 ⊗ w2, w1 [a, c], w2 [out/a, in/c, *k].

    Either factor may be of low rank: w1_a [a, R], w1_b [R, c]; w2_a [out/a, R], w2_b [R, in/c·k], or with a Tucker core
    t2 [R, R, *k]: w2_a [R, out/a], w2_b [R, in/c]. scale = alpha / R; 1 where both are whole. `factor` bounds a and c; w1
    is of low rank only with `decompose_both`, w2 wherever R is below half of its larger side.
    """

    kind = "lokr"
    options = ("factor", "decompose_both", "tucker")
    takes_dora = True

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, *, factor: int = -1,
                 decompose_both: bool = False, tucker: bool = False, form: Kron | None = None, **dropouts):
        super().__init__(shape, **dropouts)
        _check_rank(self.kind, rank)
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
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> LoKr:
        whole1, whole2 = ("w1" in weights.tensors, "w2" in weights.tensors)
        rows, columns = (size_of(weights, "w1" if whole1 else "w1_a"), size_of(weights, "w1" if whole1 else "w1_b", 1))
        rank = 1 if whole1 and whole2 else size_of(weights, "w1_b" if whole2 else "w2_b")
        return cls(shape, rank, weights.alpha, form=Kron(rows, columns, whole1, whole2, "t2" in weights.tensors))


class IA3(Adapter):
    """A factor for each row, or each input column, of W (Liu et al. 2022, as LyCORIS: less 1): ΔW = W · weight.

    weight: Linear [out] or [in], ConvNd [1, out, 1...] or [1, in, 1...]. It has no rank and no alpha.
    """

    kind = "ia3"
    of_weight = True
    options = flags = ("on_input",)

    def __init__(self, shape: LayerShape, rank: int = 0, alpha: float | None = None, *, on_input: bool = False, **dropouts):
        super().__init__(shape, **dropouts)
        self.on_input, kernel = bool(on_input), shape.weight[2:]
        n = shape.weight[self.on_input]
        self.weight = nn.Parameter(torch.zeros(1, n, *(1,) * len(kernel)) if kernel else torch.zeros(n))

    def delta(self, W: Tensor) -> Tensor:
        return W * self.weight.to(W.dtype).reshape([-1 if axis == self.on_input else 1 for axis in range(W.dim())])

    def weights(self) -> AdapterWeights:
        weights = super().weights()
        weights.tensors["on_input"] = torch.tensor(self.on_input)
        return weights

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> IA3:
        flag = weights.tensors.get("on_input")
        if flag is None or flag.numel() != 1:
            raise LoRAFormatError("it has no on_input of one value, which says what its weight is for: rows or input columns")
        return cls(shape, on_input=bool(flag))


class GLoRA(Adapter):
    """Generalized LoRA (Chavan et al. 2023), weight part: ΔW = alpha / R · (W a1 a2 + b1 b2); of a kernel, a1 a2 is 1x1.

    a1 [in, R], a2 [R, in], b1 [out, R], b2 [R, in, *k]; with a core bm [R, R, *k]: b2 [R, in, 1...]. Older files hold
    a1 [R, in], a2 [in, R], b1 [R, in·k], b2 [out, R] for ΔW = alpha / R · (W a2 a1 + b2 b1). The lengths of a1 and b1 tell
    them apart, on a square layer too; only where in = out = R both fit, and today's is meant.
    """

    kind = "glora"
    of_weight = True
    low_rank = True

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
    def from_weights(cls, weights: AdapterWeights, shape: LayerShape) -> GLoRA:
        rows = {name: size_of(weights, name) for name in ("a1", "a2", "b1", "b2")}
        wanted = shape.weight[1:2] + shape.weight[:1]
        if (rows["a1"], rows["b1"]) != wanted == (rows["a2"], rows["b2"]):
            names = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
            weights = replace(weights, tensors={names.get(name, name): t for name, t in weights.tensors.items()})
        return super().from_weights(weights, shape)

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> GLoRA:
        tucker = "bm" in weights.tensors
        if tucker and len(shape.weight) < 3:
            raise SDError(f"bm is a core for convolutions, the layer's weight is {list(shape.weight)}")
        return cls(shape, size_of(weights, "a2"), weights.alpha, tucker=tucker)


class OFT(Adapter):
    """Orthogonal finetuning (Qiu et al. 2023, as LyCORIS): each block k of b output rows is turned, W'_k = rescale · R_kᵀ W_k.

    blocks [n, b, b]: Q = blocks - blocksᵀ, R = (I + Q)(I - Q)⁻¹ (Cayley). alpha > 0 is no scale but the constraint: Q is
    shortened to a norm, over all blocks, of at most alpha · out. `rotation` [n, b, b] (old files) holds R itself.
    A new adapter's blocks have at most `rank` rows; `rescaled` adds rescale [out, 1...].
    """

    kind = "oft"
    of_weight = True
    options = ("rescaled",)

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, *, rescaled: bool = False,
                 sizes: tuple[int, ...] | None = None, rotation: bool = False, **dropouts):
        super().__init__(shape, **dropouts)
        _check_rank(self.kind, rank)
        self.alpha = None if alpha is None else float(alpha)
        out = shape.weight[0]
        zeros = nn.Parameter(torch.zeros(sizes or self.new_sizes(out, rank)))
        self.blocks, self.rotation = (None, zeros) if rotation else (zeros, None)
        self.rescale = nn.Parameter(torch.ones(out, *(1,) * (len(shape.weight) - 1))) if rescaled else None

    @staticmethod
    def new_sizes(out: int, rank: int) -> tuple[int, ...]:
        b, n = factorization(out, rank)
        if b < 2:
            raise SDError(f"rank {rank} cuts its {out} rows into blocks of {b}, which cannot turn; choose another rank")
        return n, b, b

    def turns(self, dtype: torch.dtype) -> Tensor:
        """R - I of every block; exactly 0 where Q is."""
        if self.rotation is not None:
            return self.rotation.to(dtype) - torch.eye(self.rotation.shape[-1], dtype=dtype, device=self.rotation.device)
        blocks = self.blocks.to(dtype)
        Q = blocks - blocks.mT
        if self.alpha is not None and self.alpha > 0:
            limit = self.alpha * Q.shape[-3] * Q.shape[-1]
            Q = Q * (limit / torch.linalg.vector_norm(Q).clamp(min=limit))
        return torch.linalg.solve(torch.eye(Q.shape[-1], dtype=dtype, device=Q.device) - Q, 2 * Q)

    def turned(self, W: Tensor) -> Tensor:
        """What turning adds to the matrix W [out, in·k]."""
        turns = self.turns(W.dtype)
        return (turns.mT @ W.unflatten(0, turns.shape[:2])).flatten(0, 1)

    def delta(self, W: Tensor) -> Tensor:
        change = self.turned(W.flatten(1)).reshape(W.shape)
        if self.rescale is None:
            return change
        rescale = self.rescale.to(W.dtype)
        return rescale * change + (rescale - 1) * W

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> OFT:
        rotation = "rotation" in weights.tensors
        name = "rotation" if rotation else "blocks"
        n, b = size_of(weights, name), size_of(weights, name, 1)
        if n * b != shape.weight[0]:
            raise SDError(f"{name} has shape {list(weights.tensors[name].shape)}, but {n} blocks of {b} are not the "
                             f"{shape.weight[0]} rows of the layer's weight {list(shape.weight)}")
        return cls(shape, b, weights.alpha, rescaled="rescale" in weights.tensors, sizes=(n, b, b), rotation=rotation)


class BOFT(OFT):
    """OFT in butterfly stages (Liu et al. 2023, as LyCORIS): stage i turns rows that lie 2ⁱ·b/2 apart, by R and not Rᵀ.

    blocks [m, n, b, b], b even. A new adapter has b of at most `rank`, n a power of 2, and all 1 + log₂ n stages.
    """

    kind = "boft"

    @staticmethod
    def new_sizes(out: int, rank: int) -> tuple[int, ...]:
        fits = [b for b in range(2, out + 1, 2) if out % b == 0 and (out // b).bit_count() == 1]
        if not fits or min(fits) > rank:
            raise SDError(f"rank {rank} does not cut its {out} rows into 2, 4, 8, ... blocks of an even number of rows; "
                             f"allowed: {f'from {min(fits)}' if fits else 'none, choose another kind'}")
        b = max(b for b in fits if b <= rank)
        return (out // b).bit_length(), out // b, b, b

    def turned(self, W: Tensor) -> Tensor:
        turns, change = self.turns(W.dtype), torch.zeros_like(W)
        b = turns.shape[-1]
        for i, stage in enumerate(turns):
            apart = 2**i * b // 2
            x = (W + change).unflatten(0, (-1, 2, apart)).transpose(1, 2).reshape(-1, b, W.shape[1])
            change = change + (stage @ x).reshape(-1, apart, 2, W.shape[1]).transpose(1, 2).flatten(0, 2)
        return change

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> BOFT:
        m, n, b = (size_of(weights, "blocks", axis) for axis in range(3))
        if n * b != shape.weight[0] or b % 2 or n % 2 ** (m - 1):
            raise SDError(f"blocks has shape {list(weights.tensors['blocks'].shape)}, but {m} stages of {n} blocks of {b} "
                             f"do not turn the {shape.weight[0]} rows of the layer's weight {list(shape.weight)}")
        return cls(shape, b, weights.alpha, rescaled="rescale" in weights.tensors, sizes=(m, n, b, b))


KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (LowRank, Full, LoHa, LoKr, IA3, GLoRA, OFT, BOFT)}


def needs_base(weights: AdapterWeights) -> bool:
    """Whether what these weights do to a layer depends on the layer's own: some kinds, and all with a magnitude (DoRA)."""
    return KINDS[weights.kind].of_weight or "magnitude" in weights.tensors
