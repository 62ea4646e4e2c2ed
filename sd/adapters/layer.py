"""A layer that carries LoRA adapters: its base layer, with the same keys, plus adapters by name.

Every layer here is linear in (weight, bias), so an adapter that changes them by (ΔW, Δb) adds op(x, ΔW, Δb) to the
output, whatever its kind. With nothing active a layer computes op(x, weight, bias) and nothing else.

Legend: B images, rows of a network call (2B with guidance), R rank, ΣR the ranks of all active adapters.
"""

from __future__ import annotations

import math
from functools import lru_cache
from urllib.parse import quote, unquote

import torch.nn as nn
import torch.utils.checkpoint
from torch import Tensor

from sd.adapters.active import NOTHING, ActiveSet
from sd.adapters.adapter import Adapter, at_least_fp32
from sd.adapters.derived import Fused, exact, fuse, is_pair, times
from sd.adapters.weights import LayerShape, LoRAError

SETS_KEPT = 8


class LoRALayer:
    """Mixin of the layers below. `adapters`: escaped name -> Adapter; `active` is written through `set_active` only.

    `active` holds the user's multipliers, `effective` those times the adapters' block multipliers: the layer computes with
    these alone.
    """

    adapters: nn.ModuleDict
    routable = False  # whether x is [rows, ..., in] and the layer one product, so that each row can have factors of its own

    def init_lora(self, plain: type[nn.Module] | None = None) -> None:
        """Give the layer its (empty) LoRA state; `plain` is the class that a converted foreign layer goes back to."""
        self.adapters = nn.ModuleDict()  # empty, so it adds no keys: base checkpoints load with strict=True
        self.lora_enabled = True
        self.plain_class = plain
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)
        self._merged_state = self._fused = None
        self._kept: dict[int, Fused] = {}  # those of the last sets that were on, since tasks come back
        self.set_active(NOTHING)

    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's operation with other parameters; also used with `down` factors, whose output width is the rank."""
        raise NotImplementedError

    # The only ways in which adapters see the base. Where it is quantised, a small module (sd/quant.py) stands for the
    # tensor `weight`, with its shape, dtype and device; every other use of the weight's values is made of these.
    @property
    def is_quantized(self) -> bool:
        return not isinstance(self.weight, Tensor)

    def plain_weight(self) -> Tensor:
        """The weight as adapters see it, and `op` takes it: output rows first (but in an embedding)."""
        return self.weight.dequantize() if self.is_quantized else self.weight

    def base_weight(self) -> Tensor:
        return at_least_fp32(self.plain_weight())

    def base_bias(self) -> Tensor | None:
        return None if self.bias is None else at_least_fp32(self.bias)

    def base_forward(self, x: Tensor) -> Tensor:
        return self.weight(x, self) if self.is_quantized else self.op(x, self.weight, self.bias)

    def base_tensors(self) -> list[Tensor | None]:
        """The parameters, or quantised parts, that the base is made of."""
        return [*(self.weight.buffers() if self.is_quantized else [self.weight]), self.bias]

    def set_base(self, weight: Tensor, bias: Tensor | None) -> None:
        """Give the base a weight, as adapters see it, and a bias unless None: new parameters, so what was tied to the old
        ones stays what it was."""
        like = self.weight
        self.weight = nn.Parameter(weight.to(like.dtype), requires_grad=like.requires_grad)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(like.dtype), requires_grad=like.requires_grad)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype if x.is_floating_point() else self.weight.dtype

    def lora_shape(self) -> LayerShape:
        return LayerShape(tuple(self.weight.shape))

    @property
    def multipliers(self) -> dict[str, float | tuple[float, ...]]:
        return self.active.multipliers

    @property
    def adapter_names(self) -> list[str]:
        return [_name(key) for key in self.adapters]

    def adapter(self, name: str) -> Adapter:
        return self.adapters[_key(name)]

    def add_adapter(self, name: str, adapter: Adapter, multiplier: float = 1.0) -> None:
        self.drop_derived()
        self.adapters[_key(name)] = adapter.to(self.weight.device).train(self.training)
        self.set_active(ActiveSet(self.multipliers | {name: float(multiplier)}, self.active.rows))

    def set_block_multiplier(self, name: str, value: float) -> None:
        """Factor of the user's multiplier of one adapter in this layer alone (block weights); at 0 the layer is its base."""
        if not math.isfinite(value):
            raise LoRAError(f"the block multiplier of {name!r} is {value}; a finite number is needed")
        self.drop_derived()
        self.adapter(name).block_multiplier = float(value)
        self.set_active(self.active)

    def remove_adapter(self, name: str) -> None:
        """Take the adapter off; a converted foreign layer that has no other becomes what it was."""
        self.drop_derived()
        del self.adapters[_key(name)]
        self.set_active(self.active)
        if not self.adapters and self.plain_class is not None and not self.is_quantized:
            self.to_plain()

    def to_plain(self) -> None:
        """Undo the conversion of a foreign layer."""
        self.__class__ = self.plain_class
        for attribute in ("active", "effective", "lora_enabled", "plain_class", "_on", "_is_on", "_key", "_fused", "_kept",
                          "_merged_state", "_merged_on"):
            del self.__dict__[attribute]
        del self.adapters, self.merged_weight, self.merged_bias

    def set_active(self, active: ActiveSet) -> None:
        active = active.only(self.adapter_names)
        effective = active.times({name: self.adapter(name).block_multiplier for name in active.multipliers})
        on, key = [self.adapter(name) for name in effective.multipliers], effective.fingerprint
        # Written past nn.Module, which looks at each value for parameters: this is done for every layer at every call.
        self.__dict__.update(active=active, effective=effective, _on=on, _key=key)
        # Compiled code is guarded by these bools alone, so that values change without recompiling.
        self.__dict__.update(_is_on=bool(on), _merged_on=self._merged_state is not None and self._merged_state[0] == key)
        fused = self._kept.get(key)
        self.__dict__["_fused"] = fused if fused is not None and fused.state[0] == self._state() else None

    # ---- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if not (self._is_on and self.lora_enabled):
            return self.base_forward(x)
        if self._is_trained():
            return self._trained_forward(x)
        if self.is_merged():
            return self.op(x, self.merged_weight, self.bias if self.merged_bias is None else self.merged_bias)
        return self._fused_forward(x)

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self._sources()) \
            or self.training and any(adapter.drops for adapter in self._on)

    def _trained_forward(self, x: Tensor) -> Tensor:
        self.drop_fused()  # an optimizer may write next, and fused ones raise no version counter
        self._merged_state, self._merged_on = None, False
        out, pairs = self.base_forward(x), []
        for adapter, multiplier in self._weighted():
            if is_pair(adapter) and not adapter.drops:
                pairs.append((adapter, multiplier))
                continue
            if self.is_quantized and (adapter.of_weight or adapter.magnitude is not None):  # it would keep the whole weight
                change = torch.utils.checkpoint.checkpoint(adapter, x, self, use_reentrant=False)
            else:
                change = adapter(x, self)
            out = out + times(change, multiplier)
        if pairs:
            out = fuse(self, pairs, self.compute_dtype(x)).add_to(out, x, self)
        return _SameActiveSet.apply(out, torch.tensor(self._key))

    def _fused_forward(self, x: Tensor) -> Tensor:
        """base + up((down x) · m): one pair of products for any number of low-rank adapters and any routing."""
        return self._fused_for(self.compute_dtype(x)).add_to(self.base_forward(x), x, self)

    def prepare(self) -> None:
        """Make what inference with the present active set needs, so that code compiled as one graph finds it made."""
        if self._is_on and self.lora_enabled and not self._is_trained() and not self.is_merged():
            self._fused_for(self.weight.dtype)

    def _fused_for(self, dtype: torch.dtype) -> Fused:
        if self._fused is None or not (torch.compiler.is_compiling() or self._fused.state == (self._state(), dtype)):
            with exact():
                self._fused = fuse(self, self._weighted(), dtype, (self._state(), dtype))
            self._kept[self._key] = self._fused
            if len(self._kept) > SETS_KEPT:
                del self._kept[next(iter(self._kept))]
        return self._fused

    def _weighted(self) -> list[tuple[Adapter, float | Tensor]]:
        """The active adapters, each with its multiplier: a number, or where images differ one for each row, fp32."""
        if not self.effective.per_image:
            return list(zip(self._on, self.effective.multipliers.values()))
        return list(zip(self._on, self.effective.table().to(self.weight.device).T))

    def _state(self) -> tuple:
        """Differs whenever fused or merged weights would: another active set, a write to an adapter or to the base."""
        versions = [(p.data_ptr(), object() if p.grad is not None or p.is_inference() else p._version)
                    for p in self._sources()]  # a new object equals nothing: between backward and step nothing is kept
        return self._key, versions, [(adapter.alpha, adapter.rank) for adapter in self._on]

    def _sources(self) -> list[Tensor]:
        """All that the output is made of: the base and the active adapters."""
        tensors = [p for adapter in self._on for p in adapter._parameters.values()]
        return [p for p in (*tensors, *self.base_tensors()) if p is not None]

    # ---- merging: `weight` is never written; the merged weight is a buffer beside it -----------------------------------

    def is_merged(self) -> bool:
        """Whether the merged weight is that of the present active set."""
        if self.merged_weight is None or not self._merged_on:
            return False
        return torch.compiler.is_compiling() or self._merged_state == self._state()

    def merge(self) -> None:
        """Write round(W + Σ mᵢ ΔWᵢ) into the merged buffer, in place once it exists: a stable address for graphs."""
        if self.effective.per_image:
            raise LoRAError("multipliers that differ from image to image cannot be merged into one weight")
        if self.is_merged():
            return
        with exact():
            if self.merged_weight is None:
                self.merged_weight = torch.empty_like(self.plain_weight(), requires_grad=False)
            self._merged_state, self._merged_on = None, False  # until it is written whole
            direct = self.weight.dtype.itemsize >= 4 and self.merged_weight.is_contiguous()  # no rounding, so no copy
            weight, bias = self.merged_sum(out=self.merged_weight if direct else None)
            if weight is not self.merged_weight:
                self.merged_weight.copy_(weight)
            self.merged_bias = None if bias is None else bias.to(self.weight.dtype)
            self._merged_state, self._merged_on = self._state(), True

    def merged_sum(self, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + Σ mᵢ ΔWᵢ and, where an adapter changes the bias, b + Σ mᵢ Δbᵢ: summed in fp32, in order of names.

        `out` may be used for the first; which tensor it is, is what is returned.
        """
        base, bias = self.base_weight(), None
        total = base
        for adapter, multiplier in zip(self._on, self.effective.multipliers.values()):
            delta_b = adapter.bias_delta(self.base_bias())
            total = adapter.add_to(total, base, multiplier, out)
            if delta_b is not None:
                bias = (self.base_bias() if bias is None else bias) + multiplier * delta_b
        return total, bias

    def unmerge(self) -> None:
        self.merged_weight = self.merged_bias = self._merged_state = None
        self._merged_on = False

    # ---- moves, dtype changes, loading and copies drop what is derived ------------------------------------------------

    def drop_derived(self) -> None:
        self.drop_fused()
        self.unmerge()

    def drop_fused(self) -> None:
        self._fused = None
        self._kept.clear()

    def _apply(self, fn, recurse=True):
        self.drop_derived()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.drop_derived()
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        state = self.__dict__ | {"_fused": None, "_kept": {}, "_merged_state": None, "_merged_on": False}
        state["_buffers"] = state["_buffers"] | {"merged_weight": None, "merged_bias": None}
        return state


class _SameActiveSet(torch.autograd.Function):
    """Identity that refuses, in backward, an active set other than the forward's.

    With activation checkpointing the saved tensors are those of the recomputation, while attributes stay those of the
    forward: a set that changed in between would give wrong gradients in silence.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(change, fingerprint):
        return change.view_as(change)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.fingerprint = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        (recomputed,) = ctx.saved_tensors
        if not torch.equal(recomputed, ctx.fingerprint):
            raise LoRAError("the active LoRA set changed between the forward and its recomputation for the backward; "
                            "use sd.lora.checkpoint, or keep the backward inside the same use_adapters()")
        return grad, None


@lru_cache(maxsize=4096)
def _key(name: str) -> str:
    """Adapter names are free text; module names may not hold dots, be empty, or equal an attribute such as `train`."""
    return "_" + quote(name, safe="").replace(".", "%2E")


@lru_cache(maxsize=4096)
def _name(key: str) -> str:
    return unquote(key[1:])
