"""Files and folders that are the old one or the new one at every moment, also after a power cut."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sd.files.tensor_file import CheckpointError

_TEMPORARY = ".sd-tmp"


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


def keep_sources(out: str | os.PathLike, *sources: str | os.PathLike) -> None:
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
