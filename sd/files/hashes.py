"""Hashes by which programs know files and tensors."""

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


def model_hash(path: str | Path) -> str:
    """First 10 hex digits of the file's SHA-256, as other programs show it; cached by path, size and time."""
    return _sha256(Path(path), 0)[:10]


def old_model_hash(path: str | Path) -> str:
    """8 hex digits of the SHA-256 of 64 KiB from the first MiB on, by which programs of 2022 named a checkpoint."""
    with open(path, "rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def lora_hash(path: str | Path) -> str:
    """First 12 hex digits of the SHA-256 of the bytes after the safetensors header (of the whole file for other kinds).

    A change of metadata leaves it as it is. Cached by path, size and time.
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
    """SHA-256, in hex, of texts (UTF-8) and of the bytes of tensors, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            found.update(part.encode())
        elif part.numel():
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def headed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Parts for `digest` by which a tensor differs from others with the same bytes: name, shape, dtype, and the tensor."""
    return f"{name}{tuple(tensor.shape)}{tensor.dtype}", tensor


def tensor_bytes_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of the bytes that `write_safetensors` writes after the header."""
    return digest(tensors[name] for name in written_order(tensors))


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of names, shapes, dtypes and values, in the order of the names."""
    return digest(part for name in sorted(tensors) for part in headed(name, tensors[name]))
