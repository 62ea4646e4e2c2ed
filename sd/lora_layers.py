"""Layers that carry LoRA adapters. Each is its base layer, with the same keys, plus adapters by name.

Every layer here is linear in (weight, bias), so an adapter that changes them by (ΔW, Δb) adds op(x, ΔW, Δb) to the
output, whatever its kind. With nothing active a layer computes op(x, weight, bias) and nothing else.

Legend: B images, rows of a network call (2B with guidance), R rank, ΣR the ranks of all active adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from urllib.parse import quote, unquote

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from sd.lora_variants import Adapter, LayerShape, LowRank, at_least_fp32, project_up


class LoRAError(ValueError):
    """A LoRA that cannot be attached or used as asked; the message names it and what is there."""


@dataclass(frozen=True)
class ActiveSet:
    """Which adapters are on: name -> one multiplier, or one for each image of the batch; and the image of each row."""

    multipliers: dict[str, float | tuple[float, ...]]
    rows: tuple[int, ...] | None = None

    def only(self, names) -> ActiveSet:
        """The part of it that concerns a layer with these adapters, in an order that does not depend on loading."""
        return ActiveSet({n: self.multipliers[n] for n in sorted(self.multipliers) if n in names}, self.rows)

    def times(self, factors: Mapping[str, float]) -> ActiveSet:
        """Every multiplier times its adapter's factor; what has the factor 0 is not on at all."""
        return ActiveSet({n: tuple(v * factors[n] for v in m) if isinstance(m, tuple) else m * factors[n]
                          for n, m in self.multipliers.items() if factors[n]}, self.rows)

    def fingerprint(self) -> int:
        """63 bits that differ where the sets do; Python's own hash is the same for -1.0 and -2.0."""
        digest = blake2b(repr((self.multipliers, self.rows)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    @property
    def per_image(self) -> bool:
        return any(isinstance(m, tuple) for m in self.multipliers.values())

    def table(self) -> Tensor:
        """Multipliers as [names] or, where images differ, [rows, names], fp32."""
        if not self.per_image:
            return torch.tensor(list(self.multipliers.values()))
        images = max(len(m) for m in self.multipliers.values() if isinstance(m, tuple))
        table = torch.tensor([m if isinstance(m, tuple) else (m,) * images for m in self.multipliers.values()]).T
        return table if self.rows is None else table[list(self.rows)]


NOTHING = ActiveSet({})


class LoRALayer:
    """Mixin of the layers below. `adapters`: escaped name -> Adapter; `active` is written through `set_active` only.

    `active` holds the user's multipliers, `effective` those times the adapters' block multipliers: the layer computes with
    these alone.
    """

    adapters: nn.ModuleDict

    def init_lora(self, plain: type[nn.Module] | None = None) -> None:
        """Give the layer its (empty) LoRA state; `plain` is the class that a converted foreign layer goes back to."""
        self.adapters = nn.ModuleDict()  # empty, so it adds no keys: base checkpoints load with strict=True
        self.lora_enabled = True
        self.plain_class = plain
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)
        self._merged_state = self._fused = None
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
        return self.weight.dequantize() if self.is_quantized else self.weight

    def base_weight(self) -> Tensor:
        return at_least_fp32(self.plain_weight())

    def base_bias(self) -> Tensor | None:
        return None if self.bias is None else at_least_fp32(self.bias)

    def base_forward(self, x: Tensor) -> Tensor:
        return self.weight(x, self) if self.is_quantized else self.op(x, self.weight, self.bias)

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
        for attribute in ("active", "effective", "lora_enabled", "plain_class", "_on", "_is_on", "_key", "_fused",
                          "_merged_state", "_merged_on"):
            del self.__dict__[attribute]
        del self.adapters, self.merged_weight, self.merged_bias

    def set_active(self, active: ActiveSet) -> None:
        self.active = active.only(self.adapter_names)
        self.effective = self.active.times({name: self.adapter(name).block_multiplier for name in self.multipliers})
        self._on = [self.adapter(name) for name in self.effective.multipliers]  # what forward needs of it, found once
        self._key = self.effective.fingerprint()
        # Compiled code is guarded by these bools alone, so that values change without recompiling.
        self._is_on = bool(self._on)
        self._merged_on = self._merged_state is not None and self._merged_state[0] == self._key
        if self._fused is not None and self._fused.state[0][0] != self._key:
            self._fused = None

    # ---- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if not (self._is_on and self.lora_enabled):
            return self.base_forward(x)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._sources()) \
                or self.training and any(adapter.drops for adapter in self._on):
            return self._trained_forward(x)
        if self.is_merged():
            return self.op(x, self.merged_weight, self.bias if self.merged_bias is None else self.merged_bias)
        return self._fused_forward(x)

    def _trained_forward(self, x: Tensor) -> Tensor:
        self._fused = self._merged_state = None  # an optimizer may write next, and fused ones raise no version counter
        self._merged_on = False
        out, fingerprint = self.base_forward(x), torch.tensor(self._key)
        for adapter, multiplier in zip(self._on, self._columns(out)):
            if self.is_quantized and (adapter.of_weight or adapter.magnitude is not None):  # it would keep the whole weight
                change = torch.utils.checkpoint.checkpoint(adapter, x, self, use_reentrant=False)
            else:
                change = adapter(x, self)
            out = out + _SameActiveSet.apply(change, fingerprint) * multiplier
        return out

    def _fused_forward(self, x: Tensor) -> Tensor:
        """base + up((down x) · m): one pair of products for any number of low-rank adapters and any routing."""
        fused, out = self._fused_for(self.compute_dtype(x)), self.base_forward(x)
        if fused.rows is not None:
            self._check_rows(fused.rows, out)
        if fused.down is not None:
            h = self.op(x, fused.down, None) if x.is_floating_point() else F.embedding(x, fused.down)
            if fused.multipliers is not None:
                axis = 1 if fused.up.dim() > 2 else h.dim() - 1  # the axis of the ranks: channels of a convolution
                h = h * fused.multipliers.view([n if i in (0, axis) else 1 for i, n in enumerate(h.shape)])
            if fused.up.dim() == 2:  # product and sum in one pass over the output
                out = torch.addmm(out.reshape(-1, out.shape[-1]), h.reshape(-1, h.shape[-1]), fused.up.T).view(out.shape)
            else:
                out = out + project_up(h, fused.up, self.lora_shape().groups)
            if fused.bias is not None:
                spatial = fused.up.dim() - 2
                bias = fused.bias.view(*fused.bias.shape, *(1,) * spatial)
                if fused.rows is not None and not spatial:  # [rows, 1..., out]
                    bias = bias.unflatten(0, (-1, *(1,) * (out.dim() - 2)))
                out = out + bias
        for weight, bias, column in fused.deltas:
            change = self.op(x, weight, bias)
            out = out + (change if column is None else change * column.view(-1, *(1,) * (out.dim() - 1)))
        return out

    def _fused_for(self, dtype: torch.dtype) -> _Fused:
        if self._fused is None or not (torch.compiler.is_compiling() or self._fused.state == (self._state(), dtype)):
            self._fused = _fuse(self, dtype)
        return self._fused

    def _columns(self, out: Tensor) -> list[float | Tensor]:
        """One multiplier for each active adapter: a number, or a column that broadcasts over the rows of `out`."""
        if not self.effective.per_image:
            return list(self.effective.multipliers.values())
        table = self.effective.table().to(out)
        self._check_rows(len(table), out)
        return [column.view(-1, *(1,) * (out.dim() - 1)) for column in table.T]

    @staticmethod
    def _check_rows(rows: int, out: Tensor) -> None:
        if rows != out.shape[0]:
            raise LoRAError(f"multipliers are given for {rows} rows, but the layer got {out.shape[0]} rows; "
                            f"say with use_rows() which image each row belongs to")

    def _state(self) -> tuple:
        """Differs whenever fused or merged weights would: another active set, a write to an adapter or to the base."""
        versions = [(p.data_ptr(), object() if p.grad is not None or p.is_inference() else p._version)
                    for p in self._sources()]  # a new object equals nothing: between backward and step nothing is kept
        return self._key, versions, [(adapter.alpha, adapter.rank) for adapter in self._on]

    def _sources(self) -> list[Tensor]:
        """All that the output is made of: the base and the active adapters."""
        tensors = [p for adapter in self._on for p in adapter._parameters.values()]
        weight = self.weight.buffers() if self.is_quantized else [self.weight]
        return [p for p in (*tensors, *weight, self.bias) if p is not None]

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
        self._fused = None
        self.unmerge()

    def _apply(self, fn, recurse=True):
        self.drop_derived()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.drop_derived()
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        state = self.__dict__ | {"_fused": None, "_merged_state": None, "_merged_on": False}
        state["_buffers"] = state["_buffers"] | {"merged_weight": None, "merged_bias": None}
        return state


class LoRALinear(LoRALayer, nn.Linear):
    """nn.Linear that can carry adapters; with rank > 0 it starts with one that is named "default"."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, rank: int = 0, alpha: float = 1.0,
                 dropout: float = 0.0):
        super().__init__(in_features, out_features, bias)
        self.init_lora()
        if rank:
            check_rank(rank, self.lora_shape(), "LoRALinear")
            self.add_adapter("default", LowRank(self.lora_shape(), rank, alpha, dropout=dropout))

    def op(self, x, weight, bias):
        return F.linear(x, weight, bias)


class _LoRAConv(LoRALayer):
    def lora_shape(self):
        return LayerShape(tuple(self.weight.shape), groups=self.groups)

    def op(self, x, weight, bias):
        return self._conv_forward(x, weight, bias)  # torch's own: padding modes included


class LoRAConv1d(_LoRAConv, nn.Conv1d):
    pass


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    pass


class LoRAConv3d(_LoRAConv, nn.Conv3d):
    pass


class LoRAEmbedding(LoRALayer, nn.Embedding):
    bias = None

    def lora_shape(self):
        return LayerShape(tuple(self.weight.shape), embedding=True)

    def op(self, x, weight, bias):
        return F.embedding(x, weight, self.padding_idx)


class LoRAGroupNorm(LoRALayer, nn.GroupNorm):
    def op(self, x, weight, bias):
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class LoRALayerNorm(LoRALayer, nn.LayerNorm):
    def op(self, x, weight, bias):
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


LORA_CLASSES: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear, nn.Conv1d: LoRAConv1d, nn.Conv2d: LoRAConv2d, nn.Conv3d: LoRAConv3d,
    nn.Embedding: LoRAEmbedding, nn.GroupNorm: LoRAGroupNorm, nn.LayerNorm: LoRALayerNorm,
}


@contextmanager
def exact():
    """Derived weights are made once and used everywhere: outside inference mode, autograd and autocast."""
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda", "mps"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def as_lora_layer(layer: nn.Module, path: str = "layer") -> LoRALayer:
    """Convert a plain layer in place: its class changes; identity, ties, hooks and keys stay. Raises LoRAError."""
    if not isinstance(layer, LoRALayer):
        plain = type(layer)
        layer.__class__ = lora_class(layer, path)
        layer.init_lora(plain)
    return layer


def shape_of(layer: nn.Module, path: str = "layer") -> LayerShape:
    """The LayerShape of a layer that may still be a plain one. Raises LoRAError for what has no LoRA form."""
    return lora_class(layer, path).lora_shape(layer)


def lora_class(layer: nn.Module, path: str) -> type[LoRALayer]:
    """The class with which a layer carries adapters. Raises LoRAError, and changes nothing, where there is none."""
    if isinstance(layer, LoRALayer):
        return type(layer)
    if type(layer) not in LORA_CLASSES:  # exact types: a subclass may compute something else
        raise LoRAError(f"{path} is a {type(layer).__name__}, which has no LoRA form; "
                        f"those that have: {', '.join(c.__name__ for c in LORA_CLASSES)}")
    if "forward" in vars(layer):
        raise LoRAError(f"{path} has a forward of its own, put there by a hook such as that of offloading, which would bypass "
                        f"the LoRA; remove the hook first")
    if layer.weight is None:
        raise LoRAError(f"{path} has no weight to adapt (affine parameters are off)")
    if getattr(layer, "max_norm", None) is not None:
        raise LoRAError(f"{path} is an Embedding with max_norm, which writes to its base weight on every look-up")
    return LORA_CLASSES[type(layer)]


def check_rank(rank: int, shape: LayerShape, path: str) -> None:
    limit = min(shape.fan_in, shape.fan_out)
    if not (isinstance(rank, int) and 1 <= rank <= limit):
        raise LoRAError(f"rank {rank} does not fit {path}, which maps {shape.fan_in} to {shape.fan_out} values; "
                        f"allowed: 1 to {limit}")


@dataclass
class _Fused:
    """A layer's active adapters in compute dtype, ready for inference."""

    state: tuple
    down: Tensor | None  # [ΣR, ...]; for embeddings [num, ΣR]
    up: Tensor | None  # [out, ΣR/g, ...], alpha / R folded in, and the multipliers too where all images share them
    bias: Tensor | None  # Σ mᵢ Δbᵢ of the low-rank ones, [out] or, where images differ, [rows, out]
    multipliers: Tensor | None  # [rows, ΣR] where images differ
    deltas: list[tuple[Tensor, Tensor | None, Tensor | None]]  # kinds that are not low-rank: ΔW, Δb, multipliers [rows]
    rows: int | None  # of the call that it is for, where images differ


def _fuse(layer: LoRALayer, dtype: torch.dtype) -> _Fused:
    shape, per_image, table = layer.lora_shape(), layer.effective.per_image, layer.effective.table()
    fused = _Fused((layer._state(), dtype), None, None, None, None, [], len(table) if per_image else None)
    # Shared multipliers are folded in while all is fp32; one for each row must stay outside.
    shared = [1.0] * len(layer._on) if per_image else list(layer.effective.multipliers.values())
    wide = torch.promote_types(dtype, torch.float32)
    if per_image:
        table = table.to(device=layer.weight.device, dtype=dtype)
    with exact():
        downs, ups, columns, biases = [], [], [], []
        for adapter, m, column in zip(layer._on, shared, table.T if per_image else [None] * len(shared)):
            bias = adapter.bias_delta(layer.base_bias())
            bias = None if bias is None else bias * m
            if isinstance(adapter, LowRank) and adapter.magnitude is None:
                down = adapter.whole_down(wide)
                downs.append(down.unflatten(0, (shape.groups, -1)))  # [g, R/g, ...]: groups keep their ranks
                ups.append(adapter.whole_up(wide) * (adapter.scale * m))
                if per_image:
                    columns.append(column[:, None, None].expand(-1, shape.groups, ups[-1].shape[1]))
                if bias is not None:
                    biases.append(bias if column is None else column[:, None] * bias)
            else:
                fused.deltas.append(((adapter.effective_delta(layer.base_weight()) * m).to(dtype),
                                     None if bias is None else bias.to(dtype), column))
        if downs:
            down = torch.cat(downs, dim=1).flatten(0, 1).to(dtype)
            fused.down = down.T.contiguous() if shape.embedding else down
            fused.up = torch.cat(ups, dim=1).to(dtype)
            fused.multipliers = torch.cat(columns, dim=2).flatten(1) if per_image else None
        if biases:
            fused.bias = sum(biases).to(dtype)
    return fused


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
