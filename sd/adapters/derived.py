"""The adapters of one layer that are on, as one pair of products: base + up((down x) · m).

Legend: A adapters, R rank, ΣR the ranks of all, g groups of a convolution.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd.adapters.adapter import Adapter
from sd.adapters.low_rank import LowRank, project_up
from sd.adapters.weights import LoRAError


@dataclass
class Fused:
    """A layer's low-rank adapters together, in compute dtype, and what the others change."""

    state: tuple  # of the layer when it was made
    rows: int | None  # of the call that it is for, where images differ
    down: Tensor | None = None  # [ΣR, ...]; for embeddings [num, ΣR]
    up: Tensor | None = None  # [out, ΣR/g, ...], alpha / R folded in, and the multipliers too where all images share them
    bias: Tensor | None = None  # Σ mᵢ Δbᵢ of the low-rank ones, [out] or, where images differ, [rows, out]
    multipliers: Tensor | None = None  # [rows, ΣR] where images differ
    index: Tensor | None = None  # [rows], the one adapter of each row: then down [A, R, in], up [A, out, R], multipliers [rows]
    deltas: list[tuple[Tensor, Tensor | None, float | Tensor]] = field(default_factory=list)  # ΔW, Δb, multipliers

    def add_to(self, out: Tensor, x: Tensor, layer) -> Tensor:
        """out + what the adapters add to layer(x)."""
        if self.rows is not None:
            out, x = self._by_row(out), self._by_row(x)
        if self.index is not None:
            down, up = self.down[self.index], self.up[self.index] * self.multipliers[:, None, None]
            h = torch.bmm(x.reshape(self.rows, -1, x.shape[-1]), down.mT)
            out = torch.baddbmm(out.reshape(self.rows, -1, out.shape[-1]), h, up.mT).view(out.shape)
        elif self.down is not None:
            h = layer.op(x, self.down, None)
            if self.multipliers is not None:
                axis = 1 if self.up.dim() > 2 else h.dim() - 1  # the axis of the ranks: channels of a convolution
                h = h * self.multipliers.view([n if i in (0, axis) else 1 for i, n in enumerate(h.shape)])
            if self.up.dim() == 2:  # product and sum in one pass over the output
                out = torch.addmm(out.reshape(-1, out.shape[-1]), h.reshape(-1, h.shape[-1]), self.up.T).view(out.shape)
            else:
                out = out + project_up(h, self.up, layer.lora_shape().groups)
        if self.bias is not None:
            spatial = max(self.up.dim() - 2, 0) if self.index is None else 0
            bias = self.bias.view(*self.bias.shape, *(1,) * spatial)
            if self.rows is not None and not spatial:  # [rows, 1..., out]
                bias = bias.unflatten(0, (-1, *(1,) * (out.dim() - 2)))
            out = out + bias
        for weight, bias, multiplier in self.deltas:
            out = out + times(layer.op(x, weight, bias), multiplier)
        return out

    def _by_row(self, t: Tensor) -> Tensor:
        """One row for each multiplier. A single one, such as the positions [1, T] of a table, is that of all."""
        if t.shape[0] == self.rows:
            return t
        if t.shape[0] != 1:
            raise LoRAError(f"multipliers are given for {self.rows} rows, but the layer got {t.shape[0]} rows; "
                            f"say with use_rows() which image each row belongs to")
        return t.expand(self.rows, *t.shape[1:])


def is_pair(adapter: Adapter) -> bool:
    """Whether all that the adapter does to a weight is the product of its two factors."""
    return isinstance(adapter, LowRank) and adapter.magnitude is None


def times(change: Tensor, multiplier: float | Tensor) -> Tensor:
    """change · multiplier, which is a number or one for each row."""
    if isinstance(multiplier, Tensor):
        return change * multiplier.to(change.dtype).view(-1, *(1,) * (change.dim() - 1))
    return change if multiplier == 1.0 else change * multiplier


def fuse(layer, weighted: list[tuple[Adapter, float | Tensor]], dtype: torch.dtype, state: tuple = ()) -> Fused:
    """What these adapters of the layer do, each with its multiplier (one number, or fp32 [rows]); differentiable."""
    per_image, groups = layer.effective.per_image, layer.lora_shape().groups
    wide = torch.promote_types(dtype, torch.float32)
    fused = Fused(state, len(weighted[0][1]) if per_image else None)
    pairs = [(adapter, m) for adapter, m in weighted if is_pair(adapter)]
    for adapter, m in weighted:
        if not is_pair(adapter):
            delta, bias = adapter.effective_delta(layer.base_weight()), adapter.bias_delta(layer.base_bias())
            if not per_image:  # folded in while all is fp32
                delta, bias, m = delta * m, None if bias is None else bias * m, 1.0
            fused.deltas.append((delta.to(dtype), None if bias is None else bias.to(dtype), m))
    if not pairs:
        return fused
    downs = [adapter.whole_down(wide) for adapter, _ in pairs]
    ups = [adapter.whole_up(wide) * (adapter.scale if per_image else adapter.scale * m) for adapter, m in pairs]
    table = torch.stack([m for _, m in pairs], dim=1).to(dtype) if per_image else None  # [rows, A]
    routes = layer.effective.routes if len(pairs) == len(weighted) > 1 else None
    if routes is not None and layer.routable and len({up.shape[1] for up in ups}) == 1:
        fused.index = torch.tensor(routes, device=table.device)
        fused.down, fused.up, fused.multipliers = torch.stack(downs).to(dtype), torch.stack(ups).to(dtype), table.sum(dim=1)
    else:  # groups keep their ranks: [g, R/g, ...]
        fused.down = torch.cat([down.unflatten(0, (groups, -1)) for down in downs], dim=1).flatten(0, 1).to(dtype)
        fused.up = torch.cat(ups, dim=1).to(dtype)
        if per_image:
            columns = [table[:, i, None, None].expand(-1, groups, up.shape[1]) for i, up in enumerate(ups)]
            fused.multipliers = torch.cat(columns, dim=2).flatten(1)
    biases = [(adapter.bias_delta(layer.base_bias()), m) for adapter, m in pairs]
    biases = [m[:, None] * bias if per_image else m * bias for bias, m in biases if bias is not None]
    fused.bias = sum(biases).to(dtype) if biases else None
    if layer.lora_shape().embedding:
        fused.down = fused.down.T if torch.is_grad_enabled() else fused.down.T.contiguous()  # made once, looked up often
    return fused


@contextmanager
def exact():
    """Derived weights are made once and used everywhere: outside inference mode, autograd and autocast."""
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda", "mps"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
