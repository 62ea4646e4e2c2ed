"""The tensors of one file as a dict, and tensors that are computed when they are written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd.errors import SDError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(SDError):
    """A file that cannot be read or written; the message names it and says why."""


class TensorFile(dict):
    """Name -> tensor of one file, and the file's other contents.

    `metadata`: the strings of a safetensors header. `scalars`: numbers, booleans and strings among the tensors of a
    pickle. `ignored`: name -> type of everything that was left out (optimizer states, callbacks, ...).
    """

    def __init__(self, path: str | os.PathLike, tensors: dict[str, Tensor], metadata=None, scalars=None, ignored=None):
        super().__init__(tensors)
        self.path = Path(path)
        self.metadata: dict[str, str] = metadata or {}
        self.scalars: dict[str, int | float | bool | str] = scalars or {}
        self.ignored: dict[str, str] = ignored or {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without reading a tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.items()}


@dataclass(frozen=True)
class Lazy:
    """A tensor that is computed when it is to be written, and dropped afterwards."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, found from min and max without a temporary of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)  # NaN propagates
    return math.isfinite(low.item()) and math.isfinite(high.item())
