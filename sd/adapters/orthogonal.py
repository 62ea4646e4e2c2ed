"""Kinds of adapter that multiply W by an orthogonal matrix: OFT and BOFT from the left, HRA from the right.

Legend: `out` rows of the weight in n blocks of b, m stages; R reflections. Formulas treat W as a matrix
[out, in·k].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn as nn
from torch import Tensor

from sd.adapters.adapter import MODIFIERS, Adapter, check_kind_rank, flag_of, size_of, uniform
from sd.adapters.lycoris import factorization
from sd.adapters.weights import AdapterWeights, LayerShape
from sd.errors import SDError


class OFT(Adapter):
    """Orthogonal finetuning (Qiu et al. 2023, as LyCORIS): rotates each block k of b output rows, W'_k = rescale · R_kᵀ W_k.

    blocks [n, b, b]: Q = blocks - blocksᵀ, R = (I + Q)(I - Q)⁻¹ (Cayley). alpha > 0 is not a scale but a bound: Q is
    shortened to a norm, over all blocks, of at most alpha · out. `rotation` [n, b, b] (old files) is R itself.
    A new adapter's blocks have at most `rank` rows; `rescaled` adds rescale [out, 1...].
    """

    kind = "oft"
    of_weight = True
    options = ("rescaled",)
    bounded = True
    keys = {"oft_blocks": "blocks", "oft_diag": "rotation", "rescale": "rescale"}
    held_by = {"comfyui": ("blocks", "rescale", *MODIFIERS)}
    lycoris_name = "diag-oft"
    no_alpha = 0.0  # no bound
    rotation: nn.Parameter | None
    blocks: Any  # a parameter where `rotation` is None

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, *, rescaled: bool = False,
                 sizes: tuple[int, ...] | None = None, rotation: bool = False, **dropouts):
        super().__init__(shape, **dropouts)
        check_kind_rank(self.kind, rank)
        self.alpha = None if alpha is None else float(alpha)
        out = shape.weight[0]
        zeros = nn.Parameter(torch.zeros(sizes or self.new_sizes(out, rank)))
        self.blocks, self.rotation = (None, zeros) if rotation else (zeros, None)
        self.rescale = nn.Parameter(torch.ones(out, *(1,) * (len(shape.weight) - 1))) if rescaled else None

    @staticmethod
    def new_sizes(out: int, rank: int) -> tuple[int, ...]:
        b, n = factorization(out, rank)
        if b < 2:
            raise SDError(f"rank {rank} divides its {out} rows into blocks of {b}, which cannot rotate; choose another rank")
        return n, b, b

    def turns(self, dtype: torch.dtype) -> Tensor:
        """R - I for every block; exactly 0 where Q is 0."""
        if self.rotation is not None:
            return self.rotation.to(dtype) - torch.eye(self.rotation.shape[-1], dtype=dtype, device=self.rotation.device)
        blocks = self.blocks.to(dtype)
        Q = blocks - blocks.mT
        if self.alpha is not None and self.alpha > 0:
            limit = self.alpha * Q.shape[-3] * Q.shape[-1]
            Q = Q * (limit / torch.linalg.vector_norm(Q).clamp(min=limit))
        return torch.linalg.solve(torch.eye(Q.shape[-1], dtype=dtype, device=Q.device) - Q, 2 * Q)

    def turned(self, W: Tensor) -> Tensor:
        """The change that rotating makes to the matrix W [out, in·k]."""
        turns = self.turns(W.dtype)
        return (turns.mT @ W.unflatten(0, turns.shape[:2])).flatten(0, 1)

    def delta(self, W: Tensor) -> Tensor:
        change = self.turned(W.flatten(1)).reshape(W.shape)
        if self.rescale is None:
            return change
        rescale = self.rescale.to(W.dtype)
        return rescale * change + (rescale - 1) * W

    def why_not_trained(self) -> str | None:
        if self.rotation is None:
            return None
        return "is stored as rotations (oft_diag), which would not stay orthogonal in training; allowed: oft_blocks"

    @classmethod
    def kind_of(cls, tensors: Mapping[str, Tensor]) -> str:
        return "boft" if "blocks" in tensors and tensors["blocks"].dim() == 4 else "oft"

    @classmethod
    def missing(cls, tensors: Mapping[str, Tensor]) -> list[str]:
        return [] if {"blocks", "rotation"} & tensors.keys() else ["blocks"]

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        rotation = "rotation" in weights.tensors
        name = "rotation" if rotation else "blocks"
        n, b = size_of(weights, name), size_of(weights, name, 1)
        if n * b != shape.weight[0]:
            raise SDError(f"{name} has shape {list(weights.tensors[name].shape)}, but {n} blocks of {b} are not the "
                             f"{shape.weight[0]} rows of the layer's weight {list(shape.weight)}")
        return cls(shape, b, weights.alpha, rescaled="rescale" in weights.tensors, sizes=(n, b, b), rotation=rotation)


class BOFT(OFT):
    """OFT in butterfly stages (Liu et al. 2023, as LyCORIS): stage i rotates rows 2ⁱ·b/2 apart, by R instead of Rᵀ.

    blocks [m, n, b, b], b even. A new adapter has b <= `rank`, n a power of 2, and all 1 + log₂ n stages.
    """

    kind = "boft"
    lycoris_name = "boft"

    @staticmethod
    def new_sizes(out: int, rank: int) -> tuple[int, ...]:
        fits = [b for b in range(2, out + 1, 2) if out % b == 0 and (out // b).bit_count() == 1]
        if not fits or min(fits) > rank:
            raise SDError(f"rank {rank} does not divide its {out} rows into 2, 4, 8, ... blocks of an even number of rows; "
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
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        m, n, b = (size_of(weights, "blocks", axis) for axis in range(3))
        if n * b != shape.weight[0] or b % 2 or n % 2 ** (m - 1):
            raise SDError(f"blocks has shape {list(weights.tensors['blocks'].shape)}, but {m} stages of {n} blocks of {b} "
                             f"do not turn the {shape.weight[0]} rows of the layer's weight {list(shape.weight)}")
        return cls(shape, b, weights.alpha, rescaled="rescale" in weights.tensors, sizes=(m, n, b, b))


class HRA(Adapter):
    """Householder reflections (Yuan et al. 2024, as PEFT): W' = W H₁ ⋯ H_R, H_i = I - 2 u_i u_iᵀ / ‖u_i‖².

    u [in·k, R]. With `apply_GS` the columns are made orthonormal first (Gram-Schmidt), so that W' = W (I - 2 U Uᵀ). A new
    adapter starts with equal pairs, whose reflections cancel, so its R is even; Gram-Schmidt is for loaded adapters only.
    """

    kind = "hra"
    of_weight = True
    flags = ("apply_GS",)
    keys = {"hra_u": "u", "hra_apply_GS": "apply_GS"}
    needed = ("u", "apply_GS")
    peft_type = "HRA"
    peft_fields = {"apply_GS": "hra_apply_GS"}

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, *, apply_GS: bool | None = None, **dropouts):
        super().__init__(shape, **dropouts)
        check_kind_rank(self.kind, rank)
        if apply_GS is None and rank % 2:
            raise SDError(f"rank {rank} does not go with kind {self.kind!r}, whose reflections start in pairs that cancel; "
                          f"allowed: even numbers from 2")
        self.apply_GS = bool(apply_GS)
        pairs = uniform(torch.empty(shape.fan_in, -(-rank // 2)))
        self.u = nn.Parameter(pairs.repeat_interleave(2, dim=1)[:, :rank].clone())

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A, B [in·k, R] of the product of all reflections, I + A Bᵀ (the WY form of Bischof and Van Loan 1987)."""
        u = self.u.to(dtype)
        if self.apply_GS:
            Q = torch.linalg.qr(u).Q
            return -2 * Q, Q
        A = B = u[:, :0]
        for vectors in (u / torch.linalg.vector_norm(u, dim=0)).split(2, dim=1):
            X, Y = _reflections(vectors)
            A, B = torch.cat([A, X], 1), torch.cat([B + Y @ (X.T @ B), Y], 1)
        return A, B

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.factors(W.dtype)
        return (W.flatten(1) @ A @ B.T).reshape(W.shape)

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        rank = size_of(weights, "u", 1)
        orthonormal = flag_of(weights, "apply_GS", "whether its columns are made orthonormal; PEFT has it in the config")
        adapter, u = cls(shape, rank, apply_GS=orthonormal), weights.tensors["u"]
        if rank > shape.fan_in:
            raise SDError(f"u has shape {list(u.shape)}, more columns than the layer's weight {list(shape.weight)} has inputs")
        if not torch.linalg.vector_norm(u.float(), dim=0).all():
            raise SDError("u has a column of zeros, which has no direction")
        return adapter


def _reflections(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """X, Y of the product I + X Yᵀ of one or two reflections; `vectors` [in·k, 1 or 2] have length 1.

    With d = v - u and s = ‖d‖², H_u H_v = I + 2 (u (d - s v)ᵀ - d vᵀ): exactly I where u = v, without rounding errors.
    """
    u, v = vectors[:, :1], vectors[:, 1:]
    if not v.shape[1]:
        return -2 * u, u
    d = v - u
    return 2 * torch.cat([u, -d], 1), torch.cat([d - d.square().sum() * v, v], 1)
