"""Kinds of adapter: each is one weight change ΔW for one layer, behind `Adapter.delta`.

Legend: R rank, `in`, `out` widths, k kernel, g groups. W is the base weight in its own layout: Linear [out, in],
ConvNd [out, in/g, *k], Embedding [num, dim], norms [C].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.lora_formats import AdapterWeights, LoRAFormatError


class LayerShape(NamedTuple):
    """What an adapter must know of its layer, and nothing more."""

    weight: tuple[int, ...]
    groups: int = 1
    embedding: bool = False

    @property
    def fan_in(self) -> int:
        return self.weight[0] if self.embedding else math.prod(self.weight[1:])

    @property
    def fan_out(self) -> int:
        return self.weight[1] if self.embedding else self.weight[0]


class Adapter(nn.Module):
    """One weight change for one layer; knows no names, multipliers or other adapters."""

    kind: str
    scale = 1.0  # alpha / rank, where a kind has them

    def __init__(self, *, dropout: float = 0.0, rank_dropout: float = 0.0, module_dropout: float = 0.0):
        super().__init__()
        for what, p in (("dropout", dropout), ("rank_dropout", rank_dropout), ("module_dropout", module_dropout)):
            if not 0.0 <= p < 1.0:
                raise ValueError(f"{what} is {p}; allowed: 0 <= {what} < 1")
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.magnitude: nn.Parameter | None = None
        self.from_file = False  # loaded adapters are not what get_lora_parameters() trains by default

    @property
    def drops(self) -> bool:
        """Whether some dropout is at work: in training mode only, with and without gradients, as nn.Dropout."""
        return self.training and bool(self.dropout or self.rank_dropout or self.module_dropout)

    def delta(self, W: Tensor) -> Tensor:
        """ΔW, scale alpha / rank included, in the shape and dtype of W: the base weight in fp32 (of an fp64 model, fp64)."""
        raise NotImplementedError

    def bias_delta(self, b: Tensor | None) -> Tensor | None:
        """Δb in fp32, or None where the kind leaves the bias alone."""
        return None

    def start_magnitude(self, W: Tensor, *, output_axis: bool = True) -> None:
        """Make this a DoRA adapter (Liu et al. 2024): a trained norm for each output row of W, or each input column."""
        if self.rank_dropout:
            raise ValueError("rank_dropout does not go with DoRA: its norm belongs to the whole of ΔW")
        keep = int(output_axis == getattr(self, "embedding", False))  # Embedding is [num, dim]: its output axis is the last
        shape = [n if i == keep else 1 for i, n in enumerate(W.shape)]
        self.magnitude = nn.Parameter(norm_like(W, shape).detach())

    def effective_delta(self, W: Tensor) -> Tensor:
        """W' - W. With magnitude m, W' = m (W + ΔW) / ‖W + ΔW‖ (DoRA, eq. 5); the norm is a constant in training (4.3)."""
        delta = self.delta(W)
        if self.magnitude is None:
            return delta
        norm = norm_like(W + delta, self.magnitude.shape).detach()
        s = self.magnitude / norm.where(norm > 0, 1.0)
        s = s.where(norm > 0, 1.0)  # a row of zeros has no direction to scale
        return W * s + delta * s - W  # in this order it is exactly 0 while ΔW = 0, since then s = 1

    def add_to(self, total: Tensor, W: Tensor, multiplier: float, out: Tensor | None = None) -> Tensor:
        """total + multiplier · (W' - W) in fp32, as a new tensor or in `out`, which total may be but W may not."""
        return total + multiplier * self.effective_delta(W)

    def forward(self, x: Tensor, layer) -> Tensor:
        """What the adapter adds to `layer(x)` at multiplier 1. Exact for every kind: layers are linear in (weight, bias)."""
        dtype = layer.compute_dtype(x)
        delta = self.effective_delta(layer.base_weight())
        bias = self.bias_delta(layer.base_bias())
        out = layer.op(self.drop(x), delta.to(dtype), None if bias is None else bias.to(dtype))
        return self.drop_module(out)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on the layer's input, in training only."""
        return F.dropout(x, self.dropout, self.training) if self.dropout and x.is_floating_point() else x

    def drop_module(self, change: Tensor) -> Tensor:
        """Skip the whole adapter with probability `module_dropout`, in training only."""
        if self.training and self.module_dropout:
            return change * (torch.rand((), device=change.device) >= self.module_dropout)
        return change

    def _apply(self, fn, recurse=True):
        """Adapters follow their layer's device but stay fp32 when the model becomes half: they are cast at use."""
        def keep_dtype(t):
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)
        return super()._apply(keep_dtype, recurse)

    def weights(self) -> AdapterWeights:
        """Everything that a file must hold, detached."""
        raise NotImplementedError

    @classmethod
    def from_weights(cls, weights: AdapterWeights, shape: LayerShape) -> Adapter:
        """Inverse of `weights`. Raises LoRAFormatError when the tensors do not fit the layer."""
        raise NotImplementedError

    def _take_magnitude(self, weights: AdapterWeights, shape: LayerShape) -> Adapter:
        m, dims = weights.tensors.get("magnitude"), len(shape.weight)
        if m is not None:
            m = m.reshape(*m.shape, *(1,) * (dims - m.dim()))  # that of a 1x1 convolution may be [out, 1]
            axes = [i for i, n in enumerate(m.shape) if n != 1]
            if m.dim() > dims or len(axes) > 1 or any(i > 1 or m.shape[i] != shape.weight[i] for i in axes):
                raise LoRAFormatError(f"its magnitude has shape {list(m.shape)}, the layer's weight {list(shape.weight)}")
            self.magnitude = nn.Parameter(_own(m))
        return self

    def _magnitude_tensors(self) -> dict[str, Tensor]:
        return {} if self.magnitude is None else {"magnitude": self.magnitude.detach()}


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Half precision to fp32, in which changes are summed; fp64 stays what it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _own(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True)  # a file may be mapped; an adapter outlives it


def norm_like(W: Tensor, shape) -> Tensor:
    """L2 norm of W over every axis that has length 1 in `shape`."""
    axes = [i for i, n in enumerate(shape) if n == 1]
    return torch.linalg.vector_norm(W, dim=axes, keepdim=True) if axes else W.abs()


class LowRank(Adapter):
    """LoRA (Hu et al. 2021): ΔW = alpha / R · up · down.

    Linear: down [R, in], up [out, R]. ConvNd: down [R, in/g, *k] with the layer's stride, padding and groups,
    up [out, R/g, 1...]. Embedding: down [R, num], up [dim, R], ΔW = (up · down)ᵀ.
    """

    kind = "lora"

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, **dropouts):
        super().__init__(**dropouts)
        self.groups, self.embedding = shape.groups, shape.embedding
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        if rank % shape.groups:
            raise ValueError(f"rank {rank} is not a multiple of the convolution's {shape.groups} groups")
        ones = (1,) * (len(shape.weight) - 2)
        inner = (shape.weight[0],) if shape.embedding else shape.weight[1:]
        self.down = nn.Parameter(torch.empty(rank, *inner))
        self.up = nn.Parameter(torch.zeros(shape.fan_out, rank // shape.groups, *ones))
        if self.down.is_meta:  # from_weights brings the values
            return
        if shape.embedding:  # zero on the side of the tokens, so that tokens never seen never change
            nn.init.zeros_(self.down)
            nn.init.normal_(self.up, std=1 / math.sqrt(rank))
        else:
            bound = 1 / math.sqrt(shape.fan_in)
            nn.init.uniform_(self.down, -bound, bound)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self, W: Tensor) -> Tensor:
        g, r = self.groups, self.rank // self.groups
        down = self.down.to(W.dtype).reshape(g, r, -1)
        up = self.up.to(W.dtype).reshape(g, -1, r)
        product = torch.bmm(up, down).flatten(0, 1) * self.scale  # [out, in/g * k]
        return product.T if self.embedding else product.reshape(W.shape)

    def add_to(self, total: Tensor, W: Tensor, multiplier: float, out: Tensor | None = None) -> Tensor:
        if self.magnitude is not None or self.embedding or self.groups > 1:
            return super().add_to(total, W, multiplier, out)
        up, down = self.up.to(W.dtype).flatten(1), self.down.to(W.dtype).flatten(1)  # one fused product, no ΔW in memory
        flat = None if out is None else out.view(total.flatten(1).shape)
        product = torch.addmm(total.flatten(1), up, down, alpha=multiplier * self.scale, out=flat)
        return product.view(W.shape) if out is None else out

    def forward(self, x: Tensor, layer) -> Tensor:
        if self.magnitude is not None:
            return super().forward(x, layer)
        dtype = layer.compute_dtype(x)
        if self.embedding:
            h = layer.op(x, self.down.T.to(dtype), None)
            if self.dropout and self.training:  # dropout of a one-hot input drops whole tokens
                h = h * F.dropout(torch.ones_like(h[..., :1]), self.dropout)
        else:
            h = layer.op(self.drop(x), self.down.to(dtype), None)
        if self.training and self.rank_dropout:
            h = h * self._rank_mask(h)
        up = (self.up * self.scale).to(dtype)
        return self.drop_module(project_up(h, up, self.groups))

    def _rank_mask(self, h: Tensor) -> Tensor:
        axis = 1 if self.up.dim() > 2 else h.dim() - 1
        shape = [n if i in (0, axis) else 1 for i, n in enumerate(h.shape)]
        return F.dropout(torch.ones(shape, dtype=h.dtype, device=h.device), self.rank_dropout)

    def weights(self) -> AdapterWeights:
        tensors = {"down": self.down.detach(), "up": self.up.detach(), **self._magnitude_tensors()}
        return AdapterWeights(self.kind, tensors, alpha=self.alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, shape: LayerShape) -> LowRank:
        down, up = weights.tensors["down"], weights.tensors["up"]
        rank = down.shape[0]
        with torch.device("meta"):
            adapter = cls(shape, rank, weights.alpha)
        fits = {}
        for name, given in (("down", down), ("up", up)):
            want = getattr(adapter, name).shape
            # Writers disagree whether a 1x1 convolution and its factors are [a, b] or [a, b, 1, 1].
            if given.numel() != want.numel() or [n for n in given.shape if n > 1] != [n for n in want if n > 1]:
                raise LoRAFormatError(f"{name} has shape {list(given.shape)}, the layer's weight {list(shape.weight)} "
                                      f"wants {list(want)}")
            fits[name] = given.reshape(want)
        adapter.down, adapter.up = (nn.Parameter(_own(fits[n])) for n in ("down", "up"))
        return adapter._take_magnitude(weights, shape)


def project_up(h: Tensor, up: Tensor, groups: int) -> Tensor:
    """Rank space to output: h [..., R] for linear layers and embeddings, [B, R, *spatial] for convolutions."""
    if up.dim() == 2:
        return F.linear(h, up)
    conv = (F.conv1d, F.conv2d, F.conv3d)[up.dim() - 3]
    return conv(h, up, groups=groups)


class Full(Adapter):
    """A full-rank change: ΔW and Δb themselves. The only kind that fits norms."""

    kind = "full"

    def __init__(self, shape: LayerShape, rank: int = 0, alpha: float | None = None, bias_shape=None, **dropouts):
        super().__init__(**dropouts)
        self.diff = nn.Parameter(torch.zeros(shape.weight))
        self.diff_b = None if bias_shape is None else nn.Parameter(torch.zeros(bias_shape))

    def delta(self, W: Tensor) -> Tensor:
        return at_least_fp32(self.diff)

    def bias_delta(self, b: Tensor | None) -> Tensor | None:
        return None if self.diff_b is None else at_least_fp32(self.diff_b)

    def weights(self) -> AdapterWeights:
        tensors = {"diff": self.diff.detach(), **self._magnitude_tensors()}
        if self.diff_b is not None:
            tensors["diff_b"] = self.diff_b.detach()
        return AdapterWeights(self.kind, tensors, alpha=None)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, shape: LayerShape) -> Full:
        diff, bias = weights.tensors["diff"], weights.tensors.get("diff_b")
        if tuple(diff.shape) != tuple(shape.weight):
            raise LoRAFormatError(f"diff has shape {list(diff.shape)}, the layer's weight is {list(shape.weight)}")
        if bias is not None and tuple(bias.shape) != (shape.fan_out,):
            raise LoRAFormatError(f"diff_b has shape {list(bias.shape)}, the layer's bias has {shape.fan_out} values")
        adapter = cls(LayerShape((0,)))
        adapter.diff = nn.Parameter(_own(diff))
        adapter.diff_b = None if bias is None else nn.Parameter(_own(bias))
        return adapter._take_magnitude(weights, shape)


KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (LowRank, Full)}
