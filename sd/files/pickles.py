"""Reads torch pickles without running code: names are vetted before torch sees them, and torch loads weights only."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from sd.files.tensor_file import CheckpointError, TensorFile

# Whatever reading a damaged pickle or zip archive may raise.
DAMAGE = (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError,
          AssertionError, OverflowError, struct.error, OSError, ImportError, zipfile.BadZipFile)


def read_pickle(path: Path, is_zip: bool) -> TensorFile:
    """Read the tensors of a torch.save file, mapped if it is a zip.

    Raises CheckpointError if it is damaged, asks for code, or holds no tensors.
    """
    names: set[str] = set()
    damage: BaseException | None = None
    content = None
    try:
        _collect_globals(path, is_zip, names)
    except (*DAMAGE, MemoryError) as error:  # a damaged length may ask for any amount of memory
        damage = error
    refused = sorted(name for name in names if not _INERT.fullmatch(name) and not _SAFE.fullmatch(name)
                     and name not in _STANDINS)
    if refused:
        raise CheckpointError(f"{path}: refused, because its pickle asks for {', '.join(refused[:5])}: "
                              "only tensors are loaded, code never is")
    stubs: list[Callable | tuple[Callable, str]] = [
        (_STANDINS.get(name, _Inert), name) for name in sorted(names) if _INERT.fullmatch(name) or name in _STANDINS]
    mapped = is_zip and path.suffix != ".safetensors"  # torch.load trusts that suffix; an open file has none
    try:
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols other than 2
            content = damage or torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except DAMAGE as error:
        damage = error
    if damage:
        reason = (str(damage).strip() or type(damage).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: truncated or damaged torch file, or a pickle that torch did not write "
                              f"({reason[:100]})")
    return _sort_content(path, content)


def type_name(value) -> str:
    """The type of a value that is not loaded, for messages."""
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor on {value.device}"
    return "an object that is not loaded" if isinstance(value, _Inert) or value is _Inert else type(value).__name__


class _Inert:
    """Inert stand-in for a class or function that published files name and nobody needs."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _Parameters(dict):
    """Stand-in for torch.nn.ParameterDict, in which the first embeddings were saved: keeps its parameters only."""

    def __setstate__(self, state):
        self.update(state.get("_parameters") or {})


_STANDINS = {"torch.nn.modules.container.ParameterDict": _Parameters}
_INERT = re.compile(r"pytorch_lightning\.[\w.]+|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)"
                    r"|numpy\.(dtype|ndarray|dtypes\.\w+)")
_SAFE = re.compile(r"collections\.OrderedDict|_codecs\.encode|(builtins|__builtin__)\.set"
                   r"|torch\.nn\.parameter\.Parameter|torch\.(\w+Storage|Size|device|u?int\d+|b?float\d\w*|bool|complex\d+)"
                   r"|torch\.storage\.(Untyped|Typed)Storage|torch\.serialization\._get_layout"
                   r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)")


def _collect_globals(path: Path, is_zip: bool, names: set[str]) -> None:
    # Only for the message and the stubs: torch's weights_only unpickler alone decides what is executed.
    with open(path, "rb") as file:
        stream: IO[bytes] = file
        pickles = 5  # magic number, protocol, system, content, storage keys
        if is_zip:
            archive = zipfile.ZipFile(file)
            member = next(m for m in archive.infolist() if m.filename.endswith("/data.pkl"))
            stream, pickles = io.BytesIO(archive.read(member)), 1
        strings: list[str] = []
        for _ in range(pickles):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names.add(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings = [*strings[-1:], argument]


def _sort_content(path: Path, content) -> TensorFile:
    """Split an unpickled object (a dict, a dict of dicts, or a list of tensors) into tensors, scalars and the rest."""
    if isinstance(content, Tensor):
        content = {"0": content}
    if isinstance(content, (list, tuple)):
        content = {str(i): value for i, value in enumerate(content)}
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type_name(content)}, not a dict of tensors")
    tensors, scalars, ignored = {}, {}, {}
    if isinstance(content.get("state_dict"), dict):
        ignored = {str(key): type_name(value) for key, value in content.items() if key != "state_dict"}
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
                ignored[name] = type_name(leaf)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors, only {', '.join([*scalars, *ignored][:8]) or 'nothing'}")
    return TensorFile(path, tensors, None, scalars, ignored)


def _is_state_dict(value: dict) -> bool:
    leaves = value.values()
    return all(isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves) \
        and any(isinstance(leaf, Tensor) for leaf in leaves)
