"""Hashes that identify files and tensors, ours and those of other programs."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sd.files.tensors import sniff, written_order

_hashes: dict[tuple, str] = {}


def model_hash(path: str | os.PathLike) -> str:
    """First 10 hex digits of the file's SHA-256, as other programs show it. Cached by path, size and mtime."""
    return _sha256(Path(path), 0)[:10]


def old_model_hash(path: str | os.PathLike) -> str:
    """First 8 hex digits of the SHA-256 of the 64 KiB at offset 1 MiB, by which programs of 2022 identified a checkpoint."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def lora_hash(path: str | os.PathLike) -> str:
    """First 12 hex digits of the SHA-256 of the bytes after the safetensors header (of the whole file in other formats).

    Independent of the metadata. Cached by path, size and mtime.
    """
    path, start = Path(path), 0
    if sniff(path) == "safetensors":
        with open(path, "rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
    return _sha256(path, start)[:12]


def _sha256(path: Path, start: int) -> str:
    sniff(path)
    stat = path.stat()
    key = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, start)
    if key not in _hashes:
        with open(path, "rb") as file:
            file.seek(start)
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def digest(parts: Iterable[str | Tensor]) -> str:
    """SHA-256, in hex, of strings (as UTF-8) and the bytes of tensors, concatenated."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode())
        elif part.numel():
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def headed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Parts for `digest` that tell tensors with the same bytes apart: name, shape and dtype, then the tensor."""
    return f"{name}{tuple(tensor.shape)}{tensor.dtype}", tensor


def tensor_bytes_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of the bytes after the header of the file that `write_safetensors` would write."""
    return digest(tensors[name] for name in written_order(tensors))


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of names, shapes, dtypes and values, sorted by name."""
    return digest(part for name in sorted(tensors) for part in headed(name, tensors[name]))
