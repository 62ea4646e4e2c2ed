"""The two simplest kinds of adapter: LowRank (LoRA, with DoRA as a modifier) and Full.

Legend: as in adapter.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.adapters.adapter import MODIFIERS, Adapter, size_of, uniform
from sd.adapters.weights import AdapterWeights, LayerShape
from sd.errors import SDError


class LowRank(Adapter):
    """LoRA (Hu et al. 2021): ΔW = alpha / R · up · down.

    Linear: down [R, in], up [out, R]. ConvNd: down [R, in/g, *k] with the layer's stride, padding and groups,
    up [out, R/g, 1...]. Embedding: down [R, num], up [dim, R], ΔW = (up · down)ᵀ. `tucker` gives convolutions of k > 1
    a core: down [R, in, 1...], mid [R, R, *k], ΔW = alpha / R · Σ_nm mid_nm up_n down_m (Tucker / CP, as LyCORIS).
    After `start_at`: ΔW = alpha / R · (up · down - start_up · start_down).
    """

    kind = "lora"
    rank: int
    alpha: float
    options = ("tucker",)
    fits_embeddings = drops_ranks = takes_dora = low_rank = True
    scaled = adds = is_product = True
    keys = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"}
    needed, cores = ("down", "up"), ("mid",)
    held_by = dict.fromkeys(("diffusers", "peft", "comfyui"), (*keys.values(), *MODIFIERS))
    lycoris_name = "locon"
    peft_type, peft_alpha = "LORA", "lora_alpha"

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, *, tucker: bool = False, **dropouts):
        super().__init__(shape, **dropouts)
        self.groups = shape.groups
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        if rank % shape.groups:
            raise SDError(f"rank {rank} is not a multiple of the convolution's {shape.groups} groups")
        tucker = tucker and shape.has_kernel
        if tucker and shape.groups > 1:
            raise SDError(f"a Tucker core does not go with a convolution of {shape.groups} groups")
        ones = (1,) * (len(shape.weight) - 2)
        inner = (shape.weight[0],) if shape.embedding else shape.weight[1:]
        self.down = nn.Parameter(torch.empty(rank, *((inner[0], *ones) if tucker else inner)))
        self.up = nn.Parameter(torch.zeros(shape.fan_out, rank // shape.groups, *ones))
        self.mid = nn.Parameter(uniform(torch.empty(rank, rank, *inner[1:]))) if tucker else None
        for name in ("start_up", "start_down"):
            self.register_buffer(name, None)
        if shape.embedding:  # zeros on the token side, so that unseen tokens never change
            nn.init.zeros_(self.down)
            nn.init.normal_(self.up, std=1 / math.sqrt(rank))
        else:
            uniform(self.down)

    @torch.no_grad()
    def start_at(self, up: Tensor, down: Tensor) -> None:
        """Train from up [out, R] and down [R, in·k] without a change at the start: frozen copies are subtracted.

        With the principal components of W this is PiSSA (Meng et al. 2024), but W stays as it is instead of becoming the
        residual W - start_up · start_down. Raises SDError for a grouped convolution or a Tucker core.
        """
        if self.groups > 1 or self.mid is not None:
            raise SDError("a start other than 0 does not go with a grouped convolution or a Tucker core")
        self.up.copy_(up.reshape(self.up.shape))
        self.down.copy_(down.reshape(self.down.shape))
        self.start_up, self.start_down = self.up.detach().clone(), self.down.detach().clone()

    # With a frozen start, up · down - start_up · start_down is written as one product of rank 2R. Its factors contain the
    # differences, so that it is exactly 0 at the start and half precision rounds the change, not the principal components.
    def whole_up(self, dtype: torch.dtype) -> Tensor:
        """`up` for inference, [out, R/g, 1...]; with a frozen start [out, 2R, 1...]."""
        if self.start_up is None:
            return self.up.to(dtype)
        return torch.cat([self.up - self.start_up, self.start_up], 1).to(dtype)

    def whole_down(self, dtype: torch.dtype) -> Tensor:
        """`down` times the Tucker core, [R, in/g, *k], which makes it a plain LoRA; with a frozen start [2R, ...]."""
        if self.start_down is not None:
            return torch.cat([self.down, self.down - self.start_down]).to(dtype)
        if self.mid is None:
            return self.down.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return torch.einsum("nm...,mj->nj...", self.mid.to(wide), self.down.to(wide).flatten(1)).to(dtype)

    def delta(self, W: Tensor) -> Tensor:
        g, up = self.groups, self.whole_up(W.dtype)
        r = up.shape[1]
        down = self.whole_down(W.dtype).reshape(g, r, -1)
        up = up.reshape(g, -1, r)
        product = torch.bmm(up, down).flatten(0, 1) * self.scale  # [out, in/g * k]
        return product.T if self.embedding else product.reshape(W.shape)

    def add_to(self, total: Tensor, W: Tensor, multiplier: float, out: Tensor | None = None) -> Tensor:
        if self.magnitude is not None or self.embedding or self.groups > 1:
            return super().add_to(total, W, multiplier, out)
        up, down = self.whole_up(W.dtype).flatten(1), self.whole_down(W.dtype).flatten(1)  # one fused product, no ΔW in memory
        flat = None if out is None else out.view(total.flatten(1).shape)
        product = torch.addmm(total.flatten(1), up, down, alpha=multiplier * self.scale, out=flat)
        return product.view(W.shape) if out is None else out

    def forward(self, x: Tensor, layer) -> Tensor:
        if self.magnitude is not None:
            return super().forward(x, layer)
        dtype = layer.compute_dtype(x)
        if self.embedding:
            h = layer.op(x, self.whole_down(dtype).T, None)
            if self.dropout and self.training:  # dropout of a one-hot input drops whole tokens
                h = h * F.dropout(torch.ones_like(h[..., :1]), self.dropout)
        else:
            h = layer.op(self.drop(x), self.whole_down(dtype), None)
        if self.training and self.rank_dropout:
            h = h * self._rank_mask(h)
        up = (self.whole_up(self.up.dtype) * self.scale).to(dtype)
        bias = self.bias_delta(layer.base_bias())
        return self.drop_module(project_up(h, up, self.groups, None if bias is None else bias.to(dtype)))

    def _rank_mask(self, h: Tensor) -> Tensor:
        axis = 1 if self.up.dim() > 2 else h.dim() - 1
        shape = [n if i == 0 else self.rank if i == axis else 1 for i, n in enumerate(h.shape)]
        mask = F.dropout(torch.ones(shape, dtype=h.dtype, device=h.device), self.rank_dropout)
        return mask if self.start_up is None else torch.cat([mask, mask], axis)

    def weights(self) -> AdapterWeights:
        """With a frozen start, a LoRA of rank 2R, which any program can apply."""
        weights = super().weights()
        if self.start_up is not None:
            dtype = self.up.dtype
            weights.tensors |= {"down": self.whole_down(dtype).detach(), "up": self.whole_up(dtype).detach()}
            weights.alpha = self.alpha * 2
        return weights

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        return tensors["down"].shape[0] if "down" in tensors else None

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        return cls(shape, size_of(weights, "down"), weights.alpha, tucker="mid" in weights.tensors)


def project_up(h: Tensor, up: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
    """Map rank space to the output: h [..., R] for linear layers and embeddings, [B, R, *spatial] for convolutions."""
    if up.dim() == 2:
        return F.linear(h, up, bias)
    conv = (F.conv1d, F.conv2d, F.conv3d)[up.dim() - 3]
    return conv(h, up, bias, groups=groups)


class Full(Adapter):
    """A full-rank change: ΔW itself; a file may contain Δb alone. The only kind that fits norms."""

    kind = "full"
    fits_norms = fits_embeddings = takes_dora = True
    sized = False
    is_product = True
    keys = {"diff": "diff", "w_norm": "diff"}
    held_by = {"comfyui": ("diff", "diff_b")}
    lycoris_name = "full"

    def __init__(self, shape: LayerShape, rank: int = 0, alpha: float | None = None, **dropouts):
        super().__init__(shape, **dropouts)
        self.diff: nn.Parameter | None = nn.Parameter(torch.zeros(shape.weight))

    def delta(self, W: Tensor) -> Tensor:
        return torch.zeros_like(W) if self.diff is None else self.diff.to(W.dtype)

    @classmethod
    def spelling(cls, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        norm = "diff" in tensors and tensors["diff"].dim() == 1  # LyCORIS has separate names for norms
        return {"diff": "w_norm", "diff_b": "b_norm"} if norm else {"diff": "diff"}

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        adapter = cls(shape)
        if "diff" not in weights.tensors and "diff_b" in weights.tensors:
            adapter.diff = None
        return adapter
