"""A layer that can carry LoRA adapters: the base layer, with unchanged keys, plus adapters by name.

Every layer here is linear in (weight, bias), so an adapter that changes them by (ΔW, Δb) adds op(x, ΔW, Δb) to the
output, whatever its kind. With nothing active, a layer computes just op(x, weight, bias).

Legend: B images, rows of a network call (2B with guidance), R rank, ΣR the ranks of all active adapters.
"""

from __future__ import annotations

import math
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch.nn as nn
import torch.utils.checkpoint
from torch import Tensor

from sd.adapters.active import NOTHING, ActiveSet
from sd.adapters.adapter import Adapter, at_least_fp32
from sd.adapters.derived import Derived
from sd.adapters.fused import fuse, is_pair, times
from sd.adapters.weights import LayerShape, LoRAError
from sd.escape import as_key, from_key

MERGED = ("merged_weight", "merged_bias")  # buffers that are left out of state dicts and copies


if TYPE_CHECKING:  # at run time nn.Module comes from the layer that the mixin is combined with
    Base = nn.Module
else:
    Base = object


class LoRALayer(Base):
    """Mixin for layers that can carry adapters. It adds exactly these fields to a layer:"""

    adapters: nn.ModuleDict  # escaped name -> Adapter
    plain_class: type[nn.Module] | None  # the class that a converted foreign layer returns to
    lora_enabled: bool  # False hides the active set
    active: ActiveSet  # the user's multipliers for this layer's adapters; written by `set_active` only
    effective: ActiveSet  # those times the block multipliers: what the layer computes with
    derived: Derived  # fused weights, the state of the merged ones, and when they are stale
    merged_weight: Tensor | None  # allocated once and rewritten in place: graphs and compiled code keep its address
    merged_bias: Tensor | None
    if TYPE_CHECKING:  # the host layer's own: a Parameter, or in a quantised base a QuantizedWeight
        weight: Any
        bias: Any

    routable = False  # whether x is [rows, ..., in] and the layer one product, so that each row can have its own factors

    def init_lora(self, plain: type[nn.Module] | None = None) -> None:
        """Give the layer its (empty) LoRA state; `plain` is the class that a converted foreign layer returns to."""
        self.adapters = nn.ModuleDict()  # empty, so it adds no keys: base checkpoints load with strict=True
        self.plain_class = plain
        self.lora_enabled = True
        self.derived = Derived()
        for name in MERGED:
            self.register_buffer(name, None, persistent=False)
        self.set_active(NOTHING)

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's operation. `weight` may also be a LoRA `down`, in which case the output width is the rank."""
        raise NotImplementedError

    # Adapters read and write the base through these methods alone. In a quantised base a small module (quant.py) takes the
    # place of the tensor `weight`, with the same shape, dtype and device.
    @property
    def is_quantized(self) -> bool:
        return not isinstance(self.weight, Tensor)

    def plain_weight(self) -> Tensor:
        """The weight as adapters see it and `op` takes it: output rows first (except in an embedding)."""
        return self.weight.dequantize() if self.is_quantized else self.weight

    def base_weight(self) -> Tensor:
        return at_least_fp32(self.plain_weight())

    def base_bias(self) -> Tensor | None:
        return None if self.bias is None else at_least_fp32(self.bias)

    def base_forward(self, x: Tensor) -> Tensor:
        return self.weight(x, self) if self.is_quantized else self.product(x, self.weight, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`op`, for inference by a packed copy of the weight where the layer keeps one."""
        packed = self.derived.packed
        return self.op(x, weight, bias) if packed is None or torch.is_grad_enabled() else packed(x, self, weight, bias)

    def base_tensors(self) -> list[Tensor | None]:
        """The parameters, or quantised parts, of the base."""
        return [*(self.weight.buffers() if self.is_quantized else [self.weight]), self.bias]

    def set_base(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replace the base's weight, as adapters see it, and its bias unless None, by new parameters: modules tied to the old
        ones do not change."""
        like = self.weight
        self.weight = nn.Parameter(weight.to(like.dtype), requires_grad=like.requires_grad)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(like.dtype), requires_grad=like.requires_grad)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype if x.is_floating_point() else self.weight.dtype

    def lora_shape(self: Any) -> LayerShape:
        """Also called with plain layers that are yet to be converted."""
        return LayerShape(tuple(self.weight.shape))

    @property
    def multipliers(self) -> dict[str, float | tuple[float, ...]]:
        return self.active.multipliers

    @property
    def adapter_names(self) -> list[str]:
        return [_from_key(key) for key in self.adapters]

    def has_adapter(self, name: str) -> bool:
        return isinstance(name, str) and _as_key(name) in self.adapters

    def adapter(self, name: str) -> Adapter:
        return self.adapters[_as_key(name)]  # type: ignore[return-value]  # any nn.Module, to torch

    def add_adapter(self, name: str, adapter: Adapter, multiplier: float = 1.0) -> None:
        self.drop_derived()
        self.adapters[_as_key(name)] = adapter.to(self.weight.device).train(self.training)
        self.set_active(ActiveSet(self.multipliers | {name: float(multiplier)}, self.active.rows))

    def set_block_multiplier(self, name: str, value: float) -> None:
        """Scale the user's multiplier of one adapter in this layer alone (block weights); at 0 the adapter is off here."""
        if not math.isfinite(value):
            raise LoRAError(f"the block multiplier of {name!r} is {value}; a finite number is needed")
        self.drop_derived()
        self.adapter(name).block_multiplier = float(value)
        self.set_active(self.active)

    def remove_adapter(self, name: str) -> None:
        """Remove the adapter; a converted foreign layer becomes plain again when it was the last."""
        self.drop_derived()
        del self.adapters[_as_key(name)]
        self.set_active(self.active)
        if not self.adapters and self.plain_class is not None and not self.is_quantized:
            self.to_plain()

    def attached(self) -> LoRALayer:
        """The layer to put adapters on, which is the one that the model calls: this one."""
        return self

    def to_plain(self) -> None:
        """Undo the conversion of a foreign layer."""
        self.__class__ = self.plain_class  # type: ignore[assignment]  # no longer a LoRALayer
        for field in LoRALayer.__annotations__:
            delattr(self, field)

    def set_active(self, active: ActiveSet) -> None:
        active = active.only(filter(self.has_adapter, active.multipliers))  # few are active, and many may be loaded
        adapters = {name: self.adapter(name) for name in active.multipliers}
        effective = active.times({name: adapter.block_multiplier for name, adapter in adapters.items()})
        # Bypass nn.Module.__setattr__ (slow): this runs for every layer at every call.
        self.__dict__.update(active=active, effective=effective)
        self.derived.follow(self, [adapters[name] for name in effective.multipliers])

    # ---- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_on:
            return self.base_forward(x)
        return self._trained_forward(x) if self._is_trained() else self.derived.forward(x, self)

    @property
    def is_on(self) -> bool:
        """Whether the layer computes anything but its base."""
        return self.derived.any_on and self.lora_enabled

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.sources()) \
            or self.training and any(adapter.drops for adapter in self.derived.on)

    def _trained_forward(self, x: Tensor) -> Tensor:
        """base + what each adapter adds; low ranks without dropout are one pair of products."""
        self.derived.drop()  # an optimizer may write next, and fused ones do not raise version counters
        out, pairs = self.base_forward(x), []
        for adapter, multiplier in self.weighted():
            if is_pair(adapter) and not adapter.drops:
                pairs.append((adapter, multiplier))
                continue
            if self.is_quantized and (adapter.of_weight or adapter.magnitude is not None):  # else it saves a whole weight
                change = torch.utils.checkpoint.checkpoint(adapter, x, self, use_reentrant=False)
            else:
                change = adapter(x, self)
            out = out + times(change, multiplier)
        if pairs:
            out = fuse(self, pairs, self.compute_dtype(x)).add_to(out, x, self)
        return _SameActiveSet.apply(out, self.effective.mark)

    def prepare(self) -> None:
        """Fuse the present active set for inference, so that code compiled as one graph need not."""
        if self.is_on and not self._is_trained() and not self.is_merged():
            self.derived.fused(self, self.weight.dtype)

    def hold(self) -> list[Tensor] | None:
        """For a graph of the forward: fix, and return, what it reads beside the base; None where adapters are trained."""
        if not self.is_on:
            return []
        if self._is_trained() or any(p.requires_grad or p.grad is not None or p.is_inference() for p in self.sources()):
            return None
        return self.derived.hold(self, self.weight.dtype)

    def weighted(self) -> list[tuple[Adapter, Any]]:
        """The active adapters, each with its multiplier: a number, or fp32 [rows] where images differ."""
        if not self.effective.per_image:
            return list(zip(self.derived.on, self.effective.multipliers.values()))
        return list(zip(self.derived.on, self.effective.table().to(self.weight.device).T))

    def sources(self) -> list[Tensor]:
        """All tensors of the base and of the active adapters."""
        tensors = [p for adapter in self.derived.on for p in adapter._parameters.values()]
        return [p for p in (*tensors, *self.base_tensors()) if p is not None]

    # ---- merging: `weight` is never written; the merged weight is a buffer beside it -----------------------------------

    def is_merged(self) -> bool:
        """Whether the merged weight matches the present active set."""
        return self.derived.is_merged(self)

    def merge(self) -> None:
        """Compute the merged weight of the present active set. Raises LoRAError if multipliers differ by image."""
        if self.effective.per_image:
            raise LoRAError("multipliers that differ from image to image cannot be merged into one weight")
        self.derived.merge(self)

    def merged_sum(self, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + Σ mᵢ ΔWᵢ and, where an adapter changes the bias, b + Σ mᵢ Δbᵢ: summed in fp32, in order of names.

        The first may be written into `out`, but need not be: use what is returned.
        """
        base, bias = self.base_weight(), None
        total = base
        multiplier: Any  # a number, since images share it
        for adapter, multiplier in zip(self.derived.on, self.effective.multipliers.values()):
            delta_b = adapter.bias_delta(self.base_bias())
            total = adapter.add_to(total, base, multiplier, out)
            if delta_b is not None:
                so_far = self.base_bias() if bias is None else bias
                assert so_far is not None  # attaching refuses a change of a bias that the layer lacks
                bias = so_far + multiplier * delta_b
        return total, bias

    def unmerge(self) -> None:
        """Free the merged weight."""
        self.derived.drop_merged()
        if self.merged_weight is not None:
            self.derived.packed = None  # it may be a copy of the merged weight, whose memory it keeps
        self.merged_weight = self.merged_bias = None

    # ---- moves, dtype changes, loading and copies invalidate derived weights -------------------------------------------

    def drop_derived(self) -> None:
        self.derived.drop()
        self.unmerge()

    def _apply(self, fn, recurse=True):
        self.drop_derived()
        self.derived.free()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.drop_derived()
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        derived = copy(self.derived)
        derived.free()
        derived.changes = 0  # a copy has not been called, and is the same however often its original was
        return self.__dict__ | {"derived": derived, "_buffers": self._buffers | dict.fromkeys(MERGED)}


class _SameActiveSet(torch.autograd.Function):
    """Identity whose backward refuses an active set other than the forward's.

    With activation checkpointing, saved tensors come from the recomputation and attributes from the forward: a set that
    changed in between would silently give wrong gradients.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(change, mark):
        return change.view_as(change)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.mark = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        (recomputed,) = ctx.saved_tensors
        if recomputed is not ctx.mark and not torch.equal(recomputed, ctx.mark):  # a recomputation, or a hook, has a copy
            raise LoRAError("the active LoRA set changed between the forward and its recomputation for the backward; "
                            "use sd.lora.checkpoint, or keep the backward inside the same use_adapters()")
        return grad, None


@lru_cache(maxsize=4096)
def _as_key(name: str) -> str:
    return as_key(name, nn.ModuleDict())


_from_key = lru_cache(maxsize=4096)(from_key)
