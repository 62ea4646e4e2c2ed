"""What was found out about files in earlier runs, in one file of the cache: a start reads it instead of all pictures."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sd.files.atomic import atomic_write
from sd.training.errors import DataError

FORMAT = 1  # increase it when a fact changes its meaning
SETTLED = 2 * 10**9  # ns; a younger file may be written again within one tick of its file system's clock


class Index:
    """Facts about files, such as hashes: each is made once, and again when the file's size or times have changed.

    Facts are kept in `folder`, one file for each group of data sets that are used together; without a folder, nowhere.
    """

    def __init__(self, folder: str | Path | None = None, data: Iterable[str | None] = ()):
        self.path = None if folder is None else Path(folder, "index", _name(data))
        self.before: dict[str, dict[str, Any]] = {} if self.path is None else _read(self.path)
        self.now: dict[str, dict[str, Any]] = {}  # of the files that this run asked for
        self.changed = False

    def fact(self, what: str, path: Path, make: Callable[[], Any]) -> Any:
        """make(), which must return JSON and depend on the file alone, or what it returned in an earlier run."""
        if self.path is None:
            return make()
        name = str(path)
        facts = self.now.get(name)
        if facts is None:
            if (stamp := _stamp(path)) is None:
                return make()
            facts = self.before.get(name, {})
            facts = self.now[name] = facts if facts.get("stamp") == stamp else {"stamp": stamp}
        if what not in facts:
            facts[what], self.changed = make(), True
        return facts[what]

    def save(self) -> None:
        """Write the facts of the files that were asked for, if there are new ones. Raises DataError."""
        if self.path is None or not self.changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps({"format": FORMAT, "files": self.now}).encode())
        except OSError as error:
            raise DataError(f"{self.path.parent}: the cache cannot be written ({error.strerror}); name another folder for "
                            f"it") from None


def _name(data: Iterable[str | None]) -> str:
    """One name for the same places, from wherever they are named."""
    places = [place if place is None or place.startswith("hf:") else os.path.abspath(place) for place in data]
    return f"{hashlib.sha256(json.dumps(places).encode()).hexdigest()[:32]}.json"


def _stamp(path: Path) -> list[int] | None:
    """Size and times of a file; None for one that is too young to be recognised by them, or is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns] if time.time_ns() - found.st_mtime_ns > SETTLED else None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The facts; none if the file is missing, damaged or of another format."""
    try:
        content = json.loads(path.read_bytes())
        return content["files"] if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


NO_INDEX = Index()
