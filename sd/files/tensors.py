"""Files of tensors: detects the format, reads safetensors and pickles, writes safetensors and .pt.

Files are mapped (copy on write) and tensors are views of the map: nothing is read before it is used, and a model that
takes the tensors as they are needs no second copy. The format is detected from the content, never from the name.
"""

from __future__ import annotations

import json
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from sd.errors import SDError
from sd.files.atomic import atomic_write, remove_stale_temporaries
from sd.files.pickles import DAMAGE, read_pickle, type_name
from sd.files.tensor_file import DTYPE_NAMES, DTYPES, CheckpointError, Lazy, TensorFile

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def read_tensors(path: str | os.PathLike) -> TensorFile:
    """Map a safetensors file or a torch pickle (.ckpt, .pt, .bin, .pth; zip or old style).

    Writing to the tensors does not change the file. Old-style pickles are read into memory. A `state_dict` level is
    unwrapped, one level of nested dicts becomes "outer.inner", the tensors of a list are named "0", "1", ...
    Raises CheckpointError.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind in ("torch zip", "pickle"):
        return read_pickle(path, is_zip=kind == "torch zip")
    raise CheckpointError(f"{path}: holds no tensors, it seems to be {kind}")


# Files that people pass by mistake, by their first bytes.
_MAGIC = [
    (b"\x89PNG", "a PNG picture"), (b"\xff\xd8\xff", "a JPEG picture"), (b"GIF8", "a GIF picture"),
    (b"RIFF", "a WebP picture or a sound file"), (b"\x1f\x8b", "a gzip archive"), (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"), (b"\x89HDF", "an HDF5 file (Keras)"), (b"GGUF", "a GGUF file"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "a git-lfs pointer: the file itself was not downloaded (git lfs pull)"),
]


def sniff(path: str | os.PathLike) -> str:
    """Detect a file's format from its first bytes: "safetensors", "torch zip", "pickle", or a phrase: "a PNG picture".

    Raises CheckpointError if the file is missing, empty, a folder, or a damaged safetensors file.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, a file is needed here")
    try:
        with open(path, "rb") as file:
            head, size = file.read(512), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
    if size == 0:
        raise CheckpointError(f"{path}: is empty (0 bytes)")
    if head[4:9] == b"\0\0\0\0{":  # before the magic numbers: with a header of 640 bytes the file starts like a pickle
        length = struct.unpack("<Q", head[:8])[0]
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: damaged safetensors file: its header claims {length:,} bytes, "
                                  f"the limit is {MAX_HEADER:,}")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated safetensors file: its header alone needs {8 + length:,} bytes, "
                                  f"the file has {size:,}")
        return "safetensors"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if not head.strip(b"\0"):
        return "nothing but zeros (a download that broke off?)"
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n").lower()
    if text.startswith(("<!doctype", "<html", "<?xml")):
        return "a web page (a download that needed a login?)"
    if text and not re.search(r"[^\s\x20-\x7e\xa0-\U0010ffff]", text) and len(text.encode()) > 0.9 * len(head.strip()):
        return "a text file"
    return "a file of an unknown kind"


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except DAMAGE:
        raise CheckpointError(f"{path}: truncated or damaged torch file or zip archive: "
                              "its table of contents cannot be read") from None
    if not any(m.filename.endswith("/data.pkl") for m in members):
        first = members[0].filename if members else "nothing"
        return f"a zip archive that torch did not write (it holds {first!r})"
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        return "a torch file that was packed again with compression (unpack it and zip it without)"
    return "torch zip"


def _read_safetensors(path: Path) -> TensorFile:
    # The format: 8 bytes of header length, a JSON header, then the bytes of all tensors without gaps.
    # from_file keeps no file descriptor open (hundreds of LoRAs may be mapped) and is copy on write.
    storage = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), False, path.stat().st_size))
    length = struct.unpack("<Q", _bytes(storage, 0, 8))[0]
    try:
        header = json.loads(_bytes(storage, 8, 8 + length))
        metadata = header.pop("__metadata__", None) or {}
        metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        entries = []
        for name, entry in header.items():
            begin, stop = entry["data_offsets"]
            entries.append((begin, stop, name, str(entry["dtype"]), tuple(entry["shape"])))
        entries.sort()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file: its header cannot be read ({error})") from None
    tensors, end = {}, 0
    for begin, stop, name, dtype_name, shape in entries:
        if dtype_name not in DTYPES:
            raise CheckpointError(f"{path}: {name!r} has the dtype {dtype_name!r}; known: {', '.join(DTYPES)}")
        dtype = DTYPES[dtype_name]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)) \
                or begin != end or stop - begin != prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{path}: damaged safetensors file: {name!r} of shape {list(shape)} and dtype "
                                  f"{dtype_name} cannot lie at bytes {begin} to {stop} (the last one ends at {end})")
        end = stop
        tensors[name] = (dtype, shape, 8 + length + begin, 8 + length + stop)
    if end != len(storage) - 8 - length:
        state = "truncated" if end > len(storage) - 8 - length else "damaged"
        raise CheckpointError(f"{path}: {state} safetensors file: its header promises {end:,} bytes of tensors, "
                              f"{len(storage) - 8 - length:,} are there")
    return TensorFile(path, {name: _view(storage, *where) for name, where in tensors.items()}, metadata)


def _bytes(storage: torch.UntypedStorage, begin: int, end: int) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(storage[begin:end]).numpy().tobytes()


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...], begin: int, end: int) -> Tensor:
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    part = storage[begin:end]  # its own storage: deepcopy or torch.save of the tensor copies these bytes only
    if begin % dtype.itemsize:  # old files do not pad their header
        part = part.clone()
    return torch.empty(0, dtype=dtype).set_(part, 0, shape)  # type: ignore[call-overload]  # the stubs demand a stride


def written_order(tensors: Mapping[str, Tensor | Lazy]) -> list[str]:
    """Names in file order: wide dtypes first, so that every tensor is aligned. The safetensors library sorts the same way."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, Tensor | Lazy],
                      metadata: dict[str, str] | None = None) -> None:
    """Write tensors and metadata (strings) as one safetensors file, atomically.

    Tensors are computed and moved to the CPU one at a time; a shared tensor is written once for each name. The same input
    gives the same bytes. Raises TypeError for anything but tensors and strings, OSError (disk full), and whatever a Lazy
    raises; the old file is then untouched.
    """
    metadata = metadata or {}
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"{path}: metadata must be strings, {key!r} is {value!r}")
    _check_tensors(path, tensors, Lazy)
    names = written_order(tensors)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"{path}: {name!r} is {tensor.dtype}; allowed: {', '.join(map(str, DTYPE_NAMES))}")
        begin, end = end, end + prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % 64)  # the first tensor starts on a cache line
    if len(text) > MAX_HEADER:
        raise SDError(f"{path}: names and metadata take {len(text):,} bytes; allowed: {MAX_HEADER:,}")
    remove_stale_temporaries(Path(path).parent)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_raw(tensors[name], f"{path}: {name!r}"))  # not kept in a variable: one tensor at a time in memory


def _raw(tensor: Tensor | Lazy, what: str) -> memoryview:
    if isinstance(tensor, Lazy):
        lazy, tensor = tensor, tensor.make()
        if (tensor.shape, tensor.dtype) != (lazy.shape, lazy.dtype):
            raise SDError(f"{what} was made with shape {list(tensor.shape)} and {tensor.dtype}, its header says "
                          f"{list(lazy.shape)} and {lazy.dtype}")
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")


def write_pt(path: str | os.PathLike, tensors: dict[str, Tensor]) -> None:
    """Write a flat dict of tensors with torch.save, atomically.

    torch.load(weights_only=True) reads it. Views are saved without the rest of their storage. Raises as
    write_safetensors does.
    """
    _check_tensors(path, tensors)
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        small = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.dtype.itemsize
        plain[name] = tensor if small else tensor.clone(memory_format=torch.contiguous_format)
    remove_stale_temporaries(Path(path).parent)
    with atomic_write(path) as file:
        try:
            torch.save(plain, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which torch reports as "unexpected pos"
                raise error.__context__ from None
            raise


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors, or, for a path ending in `.pt`, a torch pickle without metadata, with a warning."""
    if Path(path).suffix.lower() != ".pt":
        return write_safetensors(path, tensors, metadata)
    warnings.warn(f"{path}: a .pt file holds no metadata; .safetensors would keep it", stacklevel=2)
    write_pt(path, tensors)


def keep_sources(out: str | os.PathLike, *sources: str | os.PathLike) -> None:
    """Raises CheckpointError if `out` is one of the files to read, or a folder that contains one."""
    target = Path(os.path.realpath(out))
    for path in sources:
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise CheckpointError(f"{out}: is read by this and would be lost; name another file to write")


def _check_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor | Lazy], lazy: type | tuple = ()) -> None:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(f"{path}: {name!r} cannot be the name of a tensor")
        if isinstance(tensor, lazy):
            continue
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise TypeError(f"{path}: {name!r} must be a dense tensor with data, not {type_name(tensor)}")
