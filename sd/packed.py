"""Weights in oneDNN's own order, for inference on the CPU: a plain weight is put into that order again in every call.

The operators are torch's own, made for its compiler, and private. All of them are here, behind a check that they compute what
`F.linear` and `F.conv2d` do; where they do not, layers stay as they are.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.adapters.layer import LoRALayer
from sd.adapters.layers import LoRAConv2d, LoRALinear, as_lora_layer
from sd.adapters.targets import named_layers
from sd.adapters.walk import walk
from sd.adapters.weights import LoRAError
from sd.cpu import tuned

ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # allowed against fp64, in units of the largest value
EXTRA = 0.2  # of a network's bytes: how much more memory packed copies may take
SMALL = 2**28  # bytes that a network's copies may take in any case


def pack(network: nn.Module) -> None:
    """Let the layers of a network on the CPU keep packed copies of their frozen weights, made at the next call.

    Plain layers become LoRA layers without adapters, which compute the same. A copy costs no memory where the weight lies in a
    mapped file, whose pages are given back; other copies are limited to a fifth of the network's size, first layers
    first. A copy is made again when the weight, or the shape of the input, changes; a write through `.data`, which has no
    version, is noticed here if it changes one of a few values. Results differ from unpacked ones in the last bits. Does
    nothing where the operators are missing, or tuning is off (sd/cpu.py).
    """
    if not tuned():
        return
    left = max(SMALL, EXTRA * sum(p.nbytes for p in network.parameters()))
    mapped = _mapped_files()
    for layer in _packable(network):
        weight, packed = layer.weight, layer.derived.packed
        if not any(start <= weight.data_ptr() < end for start, end in mapped):
            left -= weight.nbytes
        if left >= 0 and (packed is None or packed.is_stale()):
            layer.derived.packed = Packed()


def unpack(models) -> None:
    """Undo `pack` in a network, or in all networks of a model."""
    for _, layer in list(named_layers(models)):
        if isinstance(layer, LoRALayer):
            layer.derived.packed = None
            if layer.plain_class is not None and not layer.adapters and not layer.is_quantized:
                layer.to_plain()


class Packed:
    """The packed copy of a layer's weight, for inputs of one shape."""

    def __init__(self) -> None:
        self.key: tuple | None = None  # of what `weight` was made from and for
        self.weight: Tensor | None = None
        self.some: tuple[Tensor, Tensor] | None = None  # of the plain weight's values: a view and a copy

    def __call__(self, x: Tensor, layer, weight: Tensor, bias: Tensor | None) -> Tensor:
        """layer.op(x, weight, bias)."""
        if (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or x.dtype != weight.dtype
                or weight.is_inference() or x.numel() == 0):
            return layer.op(x, weight, bias)
        key = (x.shape, weight.data_ptr(), weight._version)
        product: Any = linear if isinstance(layer, nn.Linear) else convolution
        if key != self.key:
            self.key = self.weight = None  # free it before the next is made
            self.weight, self.key, some = product.pack(weight, x, layer), key, _some(weight)
            self.some = some, some.clone()
            give_pages_back(weight)
        return product(x, self.weight, bias, layer)

    def is_stale(self) -> bool:
        """Whether values of the weight changed without a new version."""
        return self.some is not None and not torch.equal(*self.some)


def _some(weight: Tensor, count: int = 16) -> Tensor:
    """A view of a few values of a dense tensor."""
    return weight.detach().as_strided((min(count, weight.numel()),), (max(1, weight.numel() // count),))


# ---- the private operators --------------------------------------------------------------------------------------------

class _Linear:
    @staticmethod
    def pack(weight: Tensor, x: Tensor, layer) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, layer) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class _Convolution:
    @staticmethod
    def pack(weight: Tensor, x: Tensor, layer) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, layer.padding, layer.stride, layer.dilation, layer.groups,
                                                            list(x.shape))

    def __call__(self, x: Tensor, packed: Tensor, bias: Tensor | None, layer) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, layer.padding, layer.stride, layer.dilation,
                                                       layer.groups, "none", [], "")


linear, convolution = _Linear(), _Convolution()


@lru_cache
def works(dtype: torch.dtype) -> bool:
    """Whether the operators exist for a dtype and compute, against fp64, what they should."""
    if dtype not in ERRORS or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    layer = nn.Conv2d(16, 32, 3, padding=1, device="meta")
    cases: list[tuple[Any, ...]] = [
        (linear, random(2, 7, 64), random(32, 64), random(32), F.linear),
        (convolution, random(2, 16, 8, 8), random(32, 16, 3, 3), random(32), partial(F.conv2d, padding=1))]
    try:
        with torch.no_grad():
            for product, x, weight, bias, formula in cases:
                exact = formula(x.double(), weight.double(), bias.double())
                found = product(x, product.pack(weight, x, layer), bias, layer)
                if not (found - exact).abs().max() <= ERRORS[dtype] * exact.abs().max():  # also catches NaN
                    return False
    except (AttributeError, RuntimeError, TypeError):  # missing, or with other arguments
        return False
    return True


def _packable(network: nn.Module) -> Iterator[LoRALayer]:
    """The layers that the operators can compute, as LoRA layers. Layers with hooks or a quantised weight are left alone."""
    for name, module in list(walk(network)):
        if type(module) not in (nn.Linear, nn.Conv2d, LoRALinear, LoRAConv2d) or not _is_frozen_on_cpu(module.weight):
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)
                                              or module.in_channels < 16):
            continue  # few channels: nothing to gain, and a plain conv_in hands its memory format to what follows
        with suppress(LoRAError):
            yield as_lora_layer(module, name)


def _is_frozen_on_cpu(weight) -> bool:
    return isinstance(weight, Tensor) and weight.device.type == "cpu" and not weight.requires_grad and works(weight.dtype)


# ---- memory -----------------------------------------------------------------------------------------------------------

def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped files (proc(5)); none where the system does not say."""
    try:
        with open("/proc/self/maps") as file:
            lines = [line.split() for line in file]
    except OSError:
        return []
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if line[4] != "0"]  # type: ignore[misc]


def give_pages_back(weight: Tensor) -> None:
    """Let go of the memory of a weight that lies in a mapped file and was never written: a read brings it back."""
    page = mmap.PAGESIZE
    first, last = -(-weight.data_ptr() // page), (weight.data_ptr() + weight.nbytes) // page
    if last > first and _are_of_a_file(first, last):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page), 4)  # MADV_DONTNEED


def _are_of_a_file(first: int, last: int) -> bool:
    """Whether all pages from `first` to before `last` that are in memory are unwritten pages of a file (kernel: pagemap)."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            entries = np.frombuffer(os.pread(file.fileno(), 8 * (last - first), 8 * first), dtype=np.uint64)
    except OSError:
        return False
    present, swapped, of_file = (entries >> np.uint64(bit) & np.uint64(1) == 1 for bit in (63, 62, 61))
    return len(entries) == last - first and not swapped.any() and bool((of_file | ~present).all())
