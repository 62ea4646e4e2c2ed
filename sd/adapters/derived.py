"""The fused and merged weights that a layer caches, and when they are stale."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd.adapters.adapter import Adapter
from sd.adapters.fused import Fused, fuse

SETS_KEPT = 8
STRUCTURES_KEPT = 4


class Stamp(NamedTuple):
    """What derived weights were made from. Any write to an adapter or to the base changes the stamp."""

    fingerprint: int  # of the active set
    versions: list[tuple[int, int]] | None  # address and version counter of each tensor; None: not settled
    scales: list[tuple[float | None, int | None]]  # alpha and rank of each adapter

    @classmethod
    def of(cls, layer) -> Stamp:
        tensors = layer.sources()
        # Not settled between backward and step: a fused optimizer writes without a new version. Inference tensors have none.
        versions = [(p.data_ptr(), p._version) for p in tensors if p.grad is None and not p.is_inference()]
        scales = [(adapter.alpha, adapter.rank) for adapter in layer.derived.on]
        return cls(layer.effective.fingerprint, versions if len(versions) == len(tensors) else None, scales)

    @property
    def settled(self) -> bool:
        """False while a gradient awaits its step: nothing derived is cached then."""
        return self.versions is not None

    def still_valid(self, layer) -> bool:
        return self.settled and self == Stamp.of(layer)


class Kept(NamedTuple):
    """Fused weights in one compute dtype, and what they were made from."""

    fused: Fused
    dtype: torch.dtype
    stamp: Stamp


class Derived:
    """Everything computed from a layer's base, adapters and active set.

    Methods take the layer: a reference to it would be a cycle that only the garbage collector frees.
    The two bools are plain attributes because compiled code guards on them alone: names and values of the active set
    change without recompiling.
    """

    def __init__(self) -> None:
        self.on: list[Adapter] = []  # the active adapters, in order of names
        self.any_on = False
        self.kept: dict[int, Kept] = {}  # fused weights of the last sets, by fingerprint, since tasks recur
        self.present: Kept | None = None  # those of the present set
        self.fixed: dict[Hashable, Fused] = {}  # by structure, the tensors that `hold` has them copied into
        self.merged: Stamp | None = None  # of the layer's merged buffers
        self.merged_on = False  # whether they were made for the present set
        self.packed: Any = None  # (x, layer, weight, bias) -> layer.op, for inference on the CPU (sd/packed.py)
        self.changes = 0  # of what the forward reads, but for values written into adapters

    def follow(self, layer, on: list[Adapter]) -> None:
        """Switch to the layer's present active set, whose adapters are `on`."""
        self.on, self.any_on, self.changes = on, bool(on), self.changes + 1
        fingerprint = layer.effective.fingerprint
        self.merged_on = self.merged is not None and self.merged.fingerprint == fingerprint
        kept = self.kept.get(fingerprint)
        self.present = kept if kept is not None and kept.stamp.still_valid(layer) else None

    def drop(self) -> None:
        """Invalidate everything. The merged buffers and those of `hold` stay allocated, to be rewritten in place."""
        self.present, self.kept, self.packed = None, {}, None
        self.drop_merged()

    def free(self) -> None:
        """Invalidate everything, and free the buffers of `hold` too."""
        self.drop()
        self.fixed = {}

    def drop_merged(self) -> None:
        self.merged, self.merged_on, self.changes = None, False, self.changes + 1

    def forward(self, x: Tensor, layer) -> Tensor:
        """Compute layer(x) with the active adapters, for inference: by the merged weight, or base + fused."""
        if self.is_merged(layer):
            return layer.product(x, layer.merged_weight, layer.bias if layer.merged_bias is None else layer.merged_bias)
        return self.fused(layer, layer.compute_dtype(x)).add_to(layer.base_forward(x), x, layer)

    def fused(self, layer, dtype: torch.dtype) -> Fused:
        """The active adapters fused, made at the first call with the present set."""
        kept = self.present
        if kept is None or not (torch.compiler.is_compiling() or kept.dtype == dtype and kept.stamp.still_valid(layer)):
            stamp = Stamp.of(layer)
            with exact():
                kept = Kept(fuse(layer, layer.weighted(), dtype), dtype, stamp)
            self.present = self.kept[layer.effective.fingerprint] = kept
            if len(self.kept) > SETS_KEPT:
                del self.kept[next(iter(self.kept))]
        return kept.fused

    def hold(self, layer, dtype: torch.dtype) -> list[Tensor]:
        """Let the forward read the present set from fixed tensors, which are returned: merged, or those of its structure.

        A graph of the forward then serves every set of this structure, whatever its values.
        """
        if self.is_merged(layer):
            return [t for t in (layer.merged_weight, layer.merged_bias) if t is not None]
        made = self.fused(layer, dtype)
        fixed = self.fixed.pop(made.structure, None)
        if fixed is None:
            with exact():
                fixed = made.empty_like()
        self.fixed[made.structure] = fixed  # the latest is the last
        if len(self.fixed) > STRUCTURES_KEPT:
            del self.fixed[next(iter(self.fixed))]
        tensors = fixed.tensors()
        if fixed is not made:
            assert self.present is not None
            with exact():
                if tensors:
                    torch._foreach_copy_(tensors, made.tensors())
            self.present = self.present._replace(fused=fixed)
        return tensors

    def is_merged(self, layer) -> bool:
        """Whether the merged buffers are those of the present set."""
        if layer.merged_weight is None or not self.merged_on:
            return False
        return torch.compiler.is_compiling() or self.merged is not None and self.merged.still_valid(layer)

    def merge(self, layer) -> None:
        """Write round(W + Σ mᵢ ΔWᵢ) into the merged buffer, in place once it exists: a stable address for graphs."""
        if self.is_merged(layer):
            return
        with exact():
            if layer.merged_weight is None:
                layer.merged_weight = torch.empty_like(layer.plain_weight(), requires_grad=False)
            self.drop_merged()  # until it is completely written
            direct = layer.weight.dtype.itemsize >= 4 and layer.merged_weight.is_contiguous()  # nothing to round, so no copy
            weight, bias = layer.merged_sum(out=layer.merged_weight if direct else None)
            if weight is not layer.merged_weight:
                layer.merged_weight.copy_(weight)
            if bias is None or layer.merged_bias is None:
                layer.merged_bias = None if bias is None else bias.to(layer.weight.dtype)
            else:
                layer.merged_bias.copy_(bias)
            self.merged, self.merged_on = Stamp.of(layer), True


@contextmanager
def exact():
    """Leave inference mode, autograd and autocast: derived weights are made once and used inside any of them."""
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda", "mps"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
