"""The active adapters of one layer as one pair of products: base + up((down x) · m).

Legend: A adapters, R rank, ΣR the ranks of all, g groups of a convolution; rows of a network call, each belonging to one image.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sd.adapters.adapter import Adapter
from sd.adapters.low_rank import LowRank, project_up
from sd.adapters.weights import LoRAError


@dataclass
class Shared:
    """Low ranks with the same multipliers for every row."""

    down: Tensor  # [ΣR, ...]; for embeddings [num, ΣR]
    up: Tensor  # [out, ΣR/g, ...], alpha / R and the multipliers folded in
    bias: Tensor | None  # Σ mᵢ Δbᵢ, [out]

    def add_to(self, out: Tensor, x: Tensor, layer) -> Tensor:
        out = _add_up(out, layer.op(x, self.down, None), self.up, layer)
        return out if self.bias is None else out + self.bias.view(-1, *(1,) * (self.up.dim() - 2))


@dataclass
class Mixed:
    """Low ranks, mixed differently for each row."""

    down: Tensor  # as in Shared
    up: Tensor  # [out, ΣR/g, ...], alpha / R folded in
    multipliers: Tensor  # [rows, ΣR]
    bias: Tensor | None  # [rows, out]

    def add_to(self, out: Tensor, x: Tensor, layer) -> Tensor:
        h = layer.op(x, self.down, None)
        axis = 1 if self.up.dim() > 2 else h.dim() - 1  # the axis of the ranks: channels of a convolution
        h = h * self.multipliers.view([n if i in (0, axis) else 1 for i, n in enumerate(h.shape)])
        out = _add_up(out, h, self.up, layer)
        if self.bias is None:
            return out
        spatial = self.up.dim() - 2
        return out + (self.bias.view(*self.bias.shape, *(1,) * spatial) if spatial else _by_row(self.bias, out))


@dataclass
class Routed:
    """Low ranks of equal size, at most one per row: each row is multiplied by its own alone."""

    down: Tensor  # [A, R, in]
    up: Tensor  # [A, out, R], alpha / R folded in
    index: Tensor  # [rows], which adapter
    multipliers: Tensor  # [rows]
    bias: Tensor | None  # [rows, out]

    def add_to(self, out: Tensor, x: Tensor, layer) -> Tensor:
        rows = len(self.index)
        down, up = self.down[self.index], self.up[self.index] * self.multipliers[:, None, None]
        h = torch.bmm(x.reshape(rows, -1, x.shape[-1]), down.mT)
        out = torch.baddbmm(out.reshape(rows, -1, out.shape[-1]), h, up.mT).view(out.shape)
        return out if self.bias is None else out + _by_row(self.bias, out)


@dataclass
class Delta:
    """The change of any other adapter, as a full weight."""

    weight: Tensor  # ΔW
    bias: Tensor | None  # Δb
    multiplier: float | Tensor  # [rows] in compute dtype where images differ; else 1, the multiplier being folded in

    def add_to(self, out: Tensor, x: Tensor, layer) -> Tensor:
        return out + times(layer.op(x, self.weight, self.bias), self.multiplier)


@dataclass
class Fused:
    """All active adapters, in compute dtype."""

    parts: list[Shared | Mixed | Routed | Delta]
    rows: int | None  # that a call must have, where images differ

    def add_to(self, out: Tensor, x: Tensor, layer) -> Tensor:
        """Return out + what the adapters add to layer(x)."""
        if self.rows is not None:
            out, x = _expanded(out, self.rows), _expanded(x, self.rows)
        for part in self.parts:
            out = part.add_to(out, x, layer)
        return out

    def tensors(self) -> list[Tensor]:
        return [value for part in self.parts for value in vars(part).values() if isinstance(value, Tensor)]

    @property
    def structure(self) -> Hashable:
        """All but the values: two of equal structure run the same kernels, and fit into each other's tensors."""
        return self.rows, tuple((type(part), *map(_form, vars(part).values())) for part in self.parts)

    def empty_like(self) -> Fused:
        """The same structure in new tensors without values."""
        def empty(part: Any):
            return replace(part, **{k: torch.empty_like(v) for k, v in vars(part).items() if isinstance(v, Tensor)})
        return Fused([empty(part) for part in self.parts], self.rows)


def _form(value) -> Hashable:
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value


def _expanded(t: Tensor, rows: int) -> Tensor:
    """`t` with one row for each multiplier; a single row, such as the positions [1, T] of a table, is repeated."""
    if t.shape[0] == rows:
        return t
    if t.shape[0] != 1:
        raise LoRAError(f"multipliers are given for {rows} rows, but the layer got {t.shape[0]} rows; "
                        f"say with use_rows() which image each row belongs to")
    return t.expand(rows, *t.shape[1:])


def _add_up(out: Tensor, h: Tensor, up: Tensor, layer) -> Tensor:
    if up.dim() == 2:  # product and sum in one pass over the output
        return torch.addmm(out.reshape(-1, out.shape[-1]), h.reshape(-1, h.shape[-1]), up.T).view(out.shape)
    return out + project_up(h, up, layer.lora_shape().groups)


def _by_row(bias: Tensor, out: Tensor) -> Tensor:
    """[rows, out] -> [rows, 1..., out], for an output [rows, ..., out]."""
    return bias.unflatten(0, (-1, *(1,) * (out.dim() - 2)))


def is_pair(adapter: Adapter) -> TypeGuard[LowRank]:
    """Whether the adapter changes the weight by the product of two factors alone."""
    return isinstance(adapter, LowRank) and adapter.magnitude is None


def times(change: Tensor, multiplier: float | Tensor) -> Tensor:
    """Return change · multiplier, which is one number or one per row."""
    if isinstance(multiplier, Tensor):
        return change * multiplier.to(change.dtype).view(-1, *(1,) * (change.dim() - 1))
    return change if multiplier == 1.0 else change * multiplier


def fuse(layer, weighted: Sequence[tuple[Adapter, Any]], dtype: torch.dtype) -> Fused:
    """Fuse adapters of the layer, each with its multiplier (one number, or fp32 [rows]); differentiable."""
    pairs = [(adapter, m) for adapter, m in weighted if is_pair(adapter)]
    parts: list[Shared | Mixed | Routed | Delta] = [_pairs(layer, pairs, dtype)] if pairs else []
    parts += [_delta(layer, adapter, m, dtype) for adapter, m in weighted if not is_pair(adapter)]
    return Fused(parts, len(weighted[0][1]) if layer.effective.per_image else None)


def _delta(layer, adapter: Adapter, m: Any, dtype: torch.dtype) -> Delta:
    delta, bias = adapter.effective_delta(layer.base_weight()), adapter.bias_delta(layer.base_bias())
    if layer.effective.per_image:
        m = m.to(dtype)
    else:  # folded in while everything is fp32
        delta, bias, m = delta * m, None if bias is None else bias * m, 1.0
    return Delta(delta.to(dtype), None if bias is None else bias.to(dtype), m)


def _pairs(layer, pairs: list[tuple[LowRank, Any]], dtype: torch.dtype) -> Shared | Mixed | Routed:
    per_image, groups = layer.effective.per_image, layer.lora_shape().groups
    wide = torch.promote_types(dtype, torch.float32)
    downs = [adapter.whole_down(wide) for adapter, _ in pairs]
    ups = [adapter.whole_up(wide) * (adapter.scale if per_image else adapter.scale * m) for adapter, m in pairs]
    changes = [(adapter.bias_delta(layer.base_bias()), m) for adapter, m in pairs]
    biases: list[Any] = [m[:, None] * change if per_image else m * change for change, m in changes if change is not None]
    bias = sum(biases).to(dtype) if biases else None
    table = torch.stack([m for _, m in pairs], dim=1).to(dtype) if per_image else None  # [rows, A]
    routes = layer.effective.routes if len(pairs) == len(layer.effective.multipliers) > 1 else None
    if table is not None and routes is not None and layer.routable and len({up.shape[1] for up in ups}) == 1:
        return Routed(torch.stack(downs).to(dtype), torch.stack(ups).to(dtype), torch.tensor(routes, device=table.device),
                      table.sum(dim=1), bias)
    # Each group keeps its ranks: [g, R/g, ...]
    down = torch.cat([down.unflatten(0, (groups, -1)) for down in downs], dim=1).flatten(0, 1).to(dtype)
    up = torch.cat(ups, dim=1).to(dtype)
    if layer.lora_shape().embedding:
        down = down.T if torch.is_grad_enabled() else down.T.contiguous()  # made once, looked up often
    if table is None:
        return Shared(down, up, bias)
    columns = [table[:, i, None, None].expand(-1, groups, up.shape[1]) for i, up in enumerate(ups)]
    return Mixed(down, up, torch.cat(columns, dim=2).flatten(1), bias)
