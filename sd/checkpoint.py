"""Read and write tensors and metadata: safetensors, torch pickles, diffusers folders; atomic files; hashes.

Reading maps the file: tensors are views of the map (copy on write), so nothing is read before it is used and a model
that takes them as they are needs no second copy. What a file is, is told by its content, never by its name.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import secrets
import shutil
import struct
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_TEMPORARY = ".sd-tmp"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A file that cannot be read: the message names it and says what it seems to be."""


class TensorFile(dict):
    """Name -> tensor of one file, with what else was in it.

    `metadata`: the strings of a safetensors header. `scalars`: numbers, booleans and strings that lay among the tensors
    of a pickle. `ignored`: name -> type of everything else that was left out (optimizer states, callbacks, ...).
    """

    def __init__(self, path: str | Path, tensors: dict[str, Tensor], metadata=None, scalars=None, ignored=None):
        super().__init__(tensors)
        self.path = Path(path)
        self.metadata: dict[str, str] = metadata or {}
        self.scalars: dict[str, int | float | bool | str] = scalars or {}
        self.ignored: dict[str, str] = ignored or {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, without reading a tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.items()}


def read_tensors(path: str | Path) -> TensorFile:
    """Map a safetensors file or a torch pickle (.ckpt, .pt, .bin, .pth; zip or old style).

    The tensors may be written to: the file does not change. Old-style pickles are read into memory. A `state_dict`
    level is unwrapped, one level of nested dicts becomes "outer.inner", a list of tensors gets the names "0", "1", ...
    Raises CheckpointError.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind in ("torch zip", "pickle"):
        return _read_pickle(path, is_zip=kind == "torch zip")
    raise CheckpointError(f"{path}: not a checkpoint, it seems to be {kind}")


# What the readers of a damaged pickle or zip archive raise.
_DAMAGE = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError,
           AssertionError, OverflowError, struct.error, OSError, ImportError, zipfile.BadZipFile)

# What people hand over by mistake, by its first bytes.
_MAGIC = [
    (b"\x89PNG", "a PNG picture"), (b"\xff\xd8\xff", "a JPEG picture"), (b"GIF8", "a GIF picture"),
    (b"RIFF", "a WebP picture or a sound file"), (b"\x1f\x8b", "a gzip archive"), (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"), (b"\x89HDF", "an HDF5 file (Keras)"), (b"GGUF", "a GGUF file"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "a git-lfs pointer: the file itself was not downloaded (git lfs pull)"),
]


def sniff(path: str | Path) -> str:
    """What a file is, by its first bytes: "safetensors", "torch zip", "pickle", or a phrase such as "a PNG picture".

    Raises CheckpointError for a file that is missing, empty, a folder, or a damaged safetensors file.
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
    if head[4:9] == b"\0\0\0\0{":  # before all magic numbers: a header of 640 bytes makes the file start like a pickle
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
    except _DAMAGE:
        raise CheckpointError(f"{path}: truncated or damaged torch file or zip archive: "
                              "its table of contents cannot be read") from None
    if not any(m.filename.endswith("/data.pkl") for m in members):
        first = members[0].filename if members else "nothing"
        return f"a zip archive that torch did not write (it holds {first!r})"
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        return "a torch file that was packed again with compression (unpack it and zip it without)"
    return "torch zip"


def _read_safetensors(path: Path) -> TensorFile:
    # The format: 8 bytes of header length, a JSON header, the bytes of all tensors without gaps.
    # from_file keeps no file descriptor open (hundreds of LoRAs may be mapped) and is copy on write
    storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
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
    part = storage[begin:end]  # a storage of its own: a deepcopy or torch.save of the tensor copies its bytes only
    if begin % dtype.itemsize:  # old files do not pad their header
        part = part.clone()
    return torch.empty(0, dtype=dtype).set_(part, 0, shape)


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when its turn to be written comes, and forgotten when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def written_order(tensors: Mapping[str, Tensor | Lazy]) -> list[str]:
    """Wide dtypes first, so that every tensor is aligned to its own size; the safetensors library sorts the same way."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor | Lazy], metadata: dict[str, str] | None = None) -> None:
    """Write tensors and metadata (strings) as one safetensors file that replaces `path` at once or not at all.

    One tensor at a time is made, and made contiguous on the CPU; shared tensors are written once for each name. The same
    input gives the same bytes. Raises TypeError for anything but tensors and strings, OSError (disk full) with the old
    file untouched, and what a Lazy raises.
    """
    metadata = metadata or {}
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"{path}: metadata must be strings, {key!r} is {value!r}")
    _check_tensors(path, tensors, Lazy)
    names = written_order(tensors)
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"{path}: {name!r} is {tensor.dtype}; allowed: {', '.join(map(str, DTYPE_NAMES))}")
        begin, end = end, end + prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % 64)  # the first tensor starts on a cache line
    if len(text) > MAX_HEADER:
        raise ValueError(f"{path}: names and metadata take {len(text):,} bytes; allowed: {MAX_HEADER:,}")
    remove_stale_temporaries(Path(path).parent)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_raw(tensors[name], f"{path}: {name!r}"))  # a temporary: two tensors are never there at once


def _raw(tensor: Tensor | Lazy, what: str) -> memoryview:
    if isinstance(tensor, Lazy):
        lazy, tensor = tensor, tensor.make()
        if (tensor.shape, tensor.dtype) != (lazy.shape, lazy.dtype):
            raise ValueError(f"{what} was made with shape {list(tensor.shape)} and {tensor.dtype}, its header says "
                             f"{list(lazy.shape)} and {lazy.dtype}")
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(plain.view(torch.uint8).numpy()) if plain.numel() else memoryview(b"")


def write_pt(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write a flat dict of tensors with torch.save, which replaces `path` at once or not at all.

    torch.load(weights_only=True) reads it. A view is saved without the rest of its storage. Raises as
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
            if isinstance(error.__context__, OSError):  # a full disk; torch puts "unexpected pos" in its place
                raise error.__context__ from None
            raise


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors, or a torch pickle without metadata (and a warning) for a path that ends in `.pt`."""
    if Path(path).suffix.lower() != ".pt":
        return write_safetensors(path, tensors, metadata)
    warnings.warn(f"{path}: a .pt file holds no metadata; .safetensors would keep it", stacklevel=2)
    write_pt(path, tensors)


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: by the extremes, without a temporary of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)  # NaN is passed on
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _check_tensors(path: str | Path, tensors: Mapping[str, Tensor | Lazy], lazy: type | tuple = ()) -> None:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise TypeError(f"{path}: {name!r} cannot be the name of a tensor")
        if isinstance(tensor, lazy):
            continue
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type == "meta":
            raise TypeError(f"{path}: {name!r} must be a dense tensor with data, not {_type_name(tensor)}")


class _Inert:
    """Stands for a class or function that a published file names and nobody needs: holds nothing, does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _Parameters(dict):
    """Stands for a torch.nn.ParameterDict, as which the first embeddings were saved: its parameters and nothing else."""

    def __setstate__(self, state):
        self.update(state.get("_parameters") or {})


_STANDINS = {"torch.nn.modules.container.ParameterDict": _Parameters}
_INERT = re.compile(r"pytorch_lightning\.[\w.]+|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)"
                    r"|numpy\.(dtype|ndarray|dtypes\.\w+)")
_SAFE = re.compile(r"collections\.OrderedDict|_codecs\.encode|(builtins|__builtin__)\.set"
                   r"|torch\.nn\.parameter\.Parameter|torch\.(\w+Storage|Size|device|u?int\d+|b?float\d\w*|bool|complex\d+)"
                   r"|torch\.storage\.(Untyped|Typed)Storage|torch\.serialization\._get_layout"
                   r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)")
def _read_pickle(path: Path, is_zip: bool) -> TensorFile:
    names: set[str] = set()
    damage = content = None
    try:
        _collect_globals(path, is_zip, names)
    except (*_DAMAGE, MemoryError) as error:  # a damaged length may ask for any amount of memory
        damage = error
    refused = sorted(name for name in names if not _INERT.fullmatch(name) and not _SAFE.fullmatch(name)
                     and name not in _STANDINS)
    if refused:
        raise CheckpointError(f"{path}: refused, because its pickle asks for {', '.join(refused[:5])}: "
                              "only tensors are loaded, code never is")
    stubs = [(_STANDINS.get(name, _Inert), name) for name in sorted(names) if _INERT.fullmatch(name) or name in _STANDINS]
    mapped = is_zip and path.suffix != ".safetensors"  # torch.load goes by that name; an open file it takes as it is
    try:
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore", UserWarning)  # torch's remark on pickle protocols other than 2
            content = damage or torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except _DAMAGE as error:
        damage = error
    if damage:
        reason = (str(damage).strip() or type(damage).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: truncated or damaged torch file, or a pickle that torch did not write "
                              f"({reason[:100]})")
    return _sort_content(path, content)


def _collect_globals(path: Path, is_zip: bool, names: set[str]) -> None:
    # A list for the message and for the stubs; what is executed is decided by torch's weights_only unpickler alone.
    with open(path, "rb") as file:
        pickles = 5  # magic number, protocol, system, content, storage keys
        if is_zip:
            archive = zipfile.ZipFile(file)
            member = next(m for m in archive.infolist() if m.filename.endswith("/data.pkl"))
            file, pickles = io.BytesIO(archive.read(member)), 1
        strings: list[str] = []
        for _ in range(pickles):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    names.add(argument.replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings = [*strings[-1:], argument]


def _sort_content(path: Path, content) -> TensorFile:
    """Tensors, scalars and the rest of an unpickled object: a dict, a dict of dicts, or a list of tensors."""
    if isinstance(content, Tensor):
        content = {"0": content}
    if isinstance(content, (list, tuple)):
        content = {str(i): value for i, value in enumerate(content)}
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {_type_name(content)}, not a dict of tensors")
    tensors, scalars, ignored = {}, {}, {}
    if isinstance(content.get("state_dict"), dict):
        ignored = {str(key): _type_name(value) for key, value in content.items() if key != "state_dict"}
        content = content["state_dict"]
    for key, value in content.items():
        if isinstance(value, dict) and _is_state_dict(value):
            leaves = [(f"{key}.{name}", leaf) for name, leaf in value.items()]
        else:
            leaves = [(str(key), value)]
        for name, leaf in leaves:
            if isinstance(leaf, Tensor):
                tensors[name] = leaf.detach()
            elif isinstance(leaf, (bool, int, float, str)):
                scalars[name] = leaf
            else:
                ignored[name] = _type_name(leaf)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors, only {', '.join([*scalars, *ignored][:8]) or 'nothing'}")
    return TensorFile(path, tensors, None, scalars, ignored)


def _is_state_dict(value: dict) -> bool:
    leaves = value.values()
    return all(isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves) \
        and any(isinstance(leaf, Tensor) for leaf in leaves)


def _type_name(value) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor on {value.device}"
    return "an object that is not loaded" if isinstance(value, _Inert) or value is _Inert else type(value).__name__


@dataclass(frozen=True)
class Folder:
    """A diffusers folder.

    `configs`: "model_index.json", "unet/config.json", ... -> content. `components`: "unet", "vae", ... -> tensors.
    """

    path: Path
    configs: dict[str, dict]
    components: dict[str, TensorFile]


_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers, transformers today, transformers before


def read_folder(path: str | Path, components: tuple[str, ...] = ("unet", "vae", "text_encoder"),
                variant: str | None = None) -> Folder:
    """Map the weights of a diffusers folder and parse its configs; names of tensors are left as they are.

    The plain files are taken, safetensors before .bin, sharded or not; with `variant` ("fp16") the files of that name
    where a component has them. Without plain files a component's only variant is taken. A folder without
    model_index.json that itself holds weights (a VAE alone) is the component "". Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_dir():
        state = "is a file, a diffusers folder is needed here" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {state}")
    configs = {}
    for file in sorted([*path.glob("model_index.json"), *path.glob("*config.json"), *path.glob("*/*config.json")]):
        configs[file.relative_to(path).as_posix()] = read_json(file)
    found, variants = {}, set()
    for name in components if "model_index.json" in configs else ("", *components):
        files = _weight_files(path / name)
        variants |= {key for key in files if key}
        chosen = variant if variant in files else None
        if None not in files and chosen is None and files:
            if len(files) > 1 or variant is not None:
                raise CheckpointError(f"{path / name}: has only the variants {', '.join(map(repr, sorted(files)))}; "
                                      f"variant= is {variant!r}")
            chosen = next(iter(files))
        if files:
            found[name] = _read_weights(path / name, files[chosen])
    if not found:
        raise CheckpointError(f"{path}: not a diffusers folder: no weights in it, nor in {', '.join(components)}")
    if variant is not None and variant not in variants:
        raise CheckpointError(f"{path}: no component has the variant {variant!r}; there are "
                              f"{', '.join(map(repr, sorted(variants))) or 'none'}")
    return Folder(path, configs, found)


def _weight_files(folder: Path) -> dict[str | None, str]:
    """Variant (None: plain) -> the weight file or the shard index to read."""
    files: dict[str | None, str] = {}
    present = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    for kind in ("safetensors", "bin"):
        for stem in _STEMS:
            # x.safetensors, x.fp16.safetensors, and indexes x.safetensors.index.json, x.safetensors.index.fp16.json
            single = re.compile(rf"{stem}(?:\.(?P<variant>[\w-]+))?\.{kind}")
            index = re.compile(rf"{stem}\.{kind}\.index(?:\.(?P<variant>[\w-]+))?\.json")
            for pattern in (single, index):
                for name in present:
                    match = pattern.fullmatch(name)
                    if match and "-of-" not in name:
                        files.setdefault(match["variant"], name)
    return files


def _read_weights(folder: Path, name: str) -> TensorFile:
    if not name.endswith(".json"):
        return read_tensors(folder / name)
    index = read_json(folder / name).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) and v == os.path.basename(v) for v in index.values()):
        raise CheckpointError(f"{folder / name}: its weight_map does not name files of this folder")
    merged = TensorFile(folder / name, {})
    for shard in sorted(set(index.values())):
        part = read_tensors(folder / shard)
        merged.update(part)
        merged.metadata.update(part.metadata)
    missing = [key for key in index if key not in merged]
    if missing:
        raise CheckpointError(f"{folder / name}: {len(missing)} of {len(index)} tensors are not in the shards, "
                              f"first: {missing[0]!r}")
    return merged


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not a {type(content).__name__}")
    return content


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and leaves no trace when the block raises.

    At every moment `path` is the old file or the new one, also after a power cut. A symbolic link stays and its target
    is replaced. An OSError names the file.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}{_TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):  # a read-only disk refuses this too, and the first error is the one to tell
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise
    if os.name == "posix":  # the new name itself must reach the disk
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep_sources(out: str | Path, *sources: str | Path) -> None:
    """Raises CheckpointError for an `out` that is one of the files to read, or a folder with one of them in it."""
    target = Path(os.path.realpath(out))
    for path in sources:
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise CheckpointError(f"{out}: is read by this and would be lost; name another file to write")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends, and leaves no trace when the block raises.

    A symbolic link stays and its target is replaced. Killed between its two renames, it leaves the folder that was there
    whole beside it, at `former_folder(path)`.
    """
    path, old = Path(os.path.realpath(path)), former_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(glob.escape(f".{path.name}.") + "*.new"):  # what killed saves left
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new"))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def former_folder(path: str | Path) -> Path:
    """Where a folder lies while another takes its place."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.old")


def remove_stale_temporaries(folder: str | Path) -> None:
    """Delete what killed writers left in a folder: temporaries that nobody has written to for an hour."""
    for file in Path(folder).glob(f".*{_TEMPORARY}"):
        try:
            if time.time() - file.stat().st_mtime > 3600:
                file.unlink()
        except FileNotFoundError:  # another process was first
            pass


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
