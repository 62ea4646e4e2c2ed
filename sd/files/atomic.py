"""Atomic writes: at every moment a path is the old file or folder or the new one, even after a power cut."""

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

_TEMPORARY = ".sd-tmp"


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` when the block ends, and leaves no trace if the block raises.

    At every moment `path` is the old file or the new one, even after a power cut. A symbolic link stays; its target is
    replaced. An OSError names `path`.
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
        with suppress(OSError):  # this fails too on a read-only disk; report the first error
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise
    if os.name == "posix":  # the rename itself must reach the disk
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder that replaces `path` when the block ends, and leaves no trace if the block raises.

    A symbolic link stays; its target is replaced. If the process is killed between the two renames, the old folder survives
    intact at `former_folder(path)`.
    """
    path, old = Path(os.path.realpath(path)), former_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(glob.escape(f".{path.name}.") + "*.new"):  # left by killed saves
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


def former_folder(path: str | os.PathLike) -> Path:
    """Where the old folder is kept while a new one takes its place."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.old")


def remove_stale_temporaries(folder: str | os.PathLike) -> None:
    """Delete the temporary files of killed writers: those not written to for an hour."""
    for file in Path(folder).glob(f".*{_TEMPORARY}"):
        try:
            if time.time() - file.stat().st_mtime > 3600:
                file.unlink()
        except FileNotFoundError:  # another process was first
            pass
