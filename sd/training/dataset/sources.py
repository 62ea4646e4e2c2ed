"""Sources of pictures and captions: a folder, kohya's `10_name` folders, a TOML that lists several, Hugging Face.

Each is read into a list of `PictureEntry`. Inconsistent data raises a DataError that names the first bad item.
"""

from __future__ import annotations

import csv
import json
import math
import re
import struct
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from PIL import Image

from sd.pictures.image_io import ImageError, load_image
from sd.training.dataset.captions import CAPTION_OPTIONS
from sd.training.dataset.index import NO_INDEX, Index
from sd.training.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_REPEATS = 10_000


@dataclass(frozen=True)
class PictureEntry:
    """A picture with its captions. `source`: its file, or a function that returns the file's bytes."""

    name: str  # within its source, wherever that is
    source: Path | Callable[[], bytes]
    captions: tuple[str, ...]
    origin: str = ""  # name of the source
    repeats: int = 1  # uses in an epoch
    options: Mapping[str, object] = field(default_factory=dict)  # caption options of the source
    mask: Path | None = None
    regular: bool = False  # for prior preservation

    @property
    def where(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else f"{self.origin}, {self.name}"

    def content(self) -> bytes:
        """The bytes of the file. Raises DataError."""
        try:
            return self.source.read_bytes() if isinstance(self.source, Path) else self.source()
        except OSError as error:
            raise DataError(f"{self.where}: cannot be read ({error.strerror})") from None

    def fact(self, index: Index, what: str, make: Callable[[], Any]) -> Any:
        """make(), a fact about the file's bytes, or what the index knows of it."""
        return index.fact(what, self.source, make) if isinstance(self.source, Path) else make()

    def image(self, mode: str) -> Image.Image:
        """The picture, turned upright, on a white background; mode is "RGB" or "L". Raises DataError."""
        if isinstance(self.source, Path):
            return read_image(self.source, mode)
        try:
            with Image.open(BytesIO(self.content())) as image:
                image.load()
                return load_image(image, mode)
        except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error,
                Image.DecompressionBombError) as error:
            raise DataError(f"{self.where}: not a picture, or a damaged one ({str(error)[:100]})") from None


def read_image(path: Path, mode: str) -> Image.Image:
    try:
        return load_image(path, mode)
    except ImageError as error:
        raise DataError(str(error)) from None


def read_sources(data: str, *, masks: bool = False, index: Index = NO_INDEX) -> list[PictureEntry]:
    """All pictures of `data`: a folder, a .toml that lists several sources, or "hf:" and the name or path of a dataset.

    Raises DataError for missing, inconsistent or duplicate items.
    """
    if data.startswith("hf:"):
        return _hugging_face(data.removeprefix("hf:"))
    path = Path(data)
    if path.suffix.lower() == ".toml" and not path.is_dir():
        return _toml(path, masks, index)
    return read_folder(path, masks=masks, index=index)


# ---- folders ---------------------------------------------------------------------------------------------------------

def read_folder(folder: str | Path, *, masks: bool = False, index: Index = NO_INDEX) -> list[PictureEntry]:
    """The pictures of a folder, sorted by name, or those of its subfolders such as `10_some words`, repeated 10 times.

    Captions are in one of metadata.jsonl, metadata.csv (columns file_name, text) and captions.txt (lines `name: caption`,
    names with a colon in quotes), else in a .txt beside each picture. The words of a numbered folder are the caption of
    its pictures that have none. With `masks`, the mask of a.png is a-mask.png or masks/a.png. Raises DataError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    numbered = sorted(d for d in folder.iterdir() if d.is_dir() and re.fullmatch(r"\d+_.+", d.name) and _pictures(d))
    if not numbered:
        return _read_flat(folder, masks, index)
    stray = [*_pictures(folder), *folder.glob("*.txt"), *(folder / name for name in CAPTION_LISTS if (folder / name).exists())]
    if stray:
        raise DataError(f"{stray[0]}: is beside numbered folders such as {numbered[0].name}, where it would not be used; "
                        f"move it into one of them")
    entries = []
    for part in numbered:
        repeats, words = part.name.split("_", 1)
        if not 1 <= int(repeats) <= MAX_REPEATS:
            raise DataError(f"{part}: says {repeats} repeats; allowed: 1 to {MAX_REPEATS}")
        found = _read_flat(part, masks, index, words)
        entries += [replace(e, name=f"{part.name}/{e.name}", repeats=int(repeats)) for e in found]
    return [replace(e, origin=str(folder)) for e in entries]


def _pictures(folder: Path) -> list[Path]:
    found = (f for f in folder.iterdir() if f.suffix.lower() in PICTURES and not f.name.startswith("."))
    return sorted(found, key=lambda f: f.name)


def _read_flat(folder: Path, masks: bool, index: Index, default: str | None = None) -> list[PictureEntry]:
    files = _pictures(folder)
    files, mask_of = _masks(folder, files) if masks else (files, {})
    if not files:
        raise DataError(f"{folder}: there are no pictures in it ({', '.join(PICTURES)})")
    lists = [name for name in CAPTION_LISTS if (folder / name).exists()
             and not (name == "captions.txt" and any(f.stem == "captions" for f in files))]
    if len(lists) > 1:
        raise DataError(f"{folder}: has both {lists[0]} and {lists[1]}; keep one of them")
    captions = _listed(folder / lists[0], files) if lists else _texts(folder, files, index)
    without = [f.name for f in files if f.name not in captions]
    if without and default is None:
        raise DataError(f"{folder}: {len(without)} of {len(files)} pictures have no caption, first: {without[0]}")
    return [PictureEntry(f.name, f, (captions.get(f.name, default or ""),), str(folder), mask=mask_of.get(f.name))
            for f in files]


def _texts(folder: Path, files: list[Path], index: Index) -> dict[str, str]:
    by_stem: dict[str, str] = {}
    for f in files:
        if f.stem in by_stem:
            raise DataError(f"{folder}: {by_stem[f.stem]} and {f.name} would share the caption {f.stem}.txt")
        by_stem[f.stem] = f.name
    captions = {}
    for text in sorted(folder.glob("*.txt")):
        if text.stem not in by_stem:
            raise DataError(f"{text}: a caption without a picture")
        captions[by_stem[text.stem]] = index.fact("text", text, lambda: _read_text(text).strip())  # noqa: B023 (called now)
    return captions


def _masks(folder: Path, files: list[Path]) -> tuple[list[Path], dict[str, Path]]:
    """(pictures that are not masks, name of a picture -> its mask)."""
    beside = {f.stem.removesuffix("-mask"): f for f in files if f.stem.endswith("-mask") and f.suffix.lower() == ".png"}
    not_pictures = set(beside.values())
    files = [f for f in files if f not in not_pictures]
    inside = {f.name: f for f in _pictures(folder / "masks")} if (folder / "masks").is_dir() else {}
    found = {}
    for f in files:
        both = [m for m in (beside.pop(f.stem, None), inside.pop(f.name, None)) if m is not None]
        if len(both) > 1:
            raise DataError(f"{f}: has two masks, {both[0].name} and {folder.name}/masks/{both[1].name}")
        if both:
            found[f.name] = both[0]
    if stray := [*beside.values(), *inside.values()]:
        raise DataError(f"{stray[0]}: a mask without a picture")
    return files, found


# ---- lists of captions -----------------------------------------------------------------------------------------------

def _listed(path: Path, files: list[Path]) -> dict[str, str]:
    names, captions = {f.name for f in files}, {}
    for number, name, text in CAPTION_LISTS[path.name](path):
        wrong = ("is not in the folder" if name not in names else "is listed twice" if name in captions
                 else "has a text that is not a string" if not isinstance(text, str) else None)
        if wrong:
            raise DataError(f"{path}, line {number}: {name!r} {wrong}")
        captions[name] = text.strip()
    return captions


def _jsonl(path: Path) -> Iterator[tuple[int, str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield number, row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{path}, line {number}: expected {{"file_name": "...", "text": "..."}}, '
                            f"found {line[:80]!r}") from None


def _csv(path: Path) -> Iterator[tuple[int, str, object]]:
    reader = csv.DictReader(StringIO(_read_text(path), newline=""), strict=True)
    try:
        if not {"file_name", "text"} <= set(reader.fieldnames or ()):
            raise DataError(f"{path}, line 1: expected the columns file_name and text, found {reader.fieldnames}")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}, line {reader.reader.line_num}: has {'more' if None in row else 'fewer'} values than "
                                f"the first line has columns; quote a text that contains ','")
            yield reader.reader.line_num, row["file_name"], row["text"]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: {error}") from None


def _colon_lines(path: Path) -> Iterator[tuple[int, str, object]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        found = re.fullmatch(r'\s*(?:"([^"]+)"|([^":]+?))\s*:(.*)', line)
        if not found:
            raise DataError(f"{path}, line {number}: expected `name.png: caption`, names with ':' in quotes, "
                            f"found {line[:80]!r}")
        yield number, found[1] or found[2], found[3]


CAPTION_LISTS = {"metadata.jsonl": _jsonl, "metadata.csv": _csv, "captions.txt": _colon_lines}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


# ---- several sources -------------------------------------------------------------------------------------------------

_SOURCE_KEYS = {"data": "", "repeats": 1, "weight": 1.0, "reg": False} | CAPTION_OPTIONS


def _toml(path: Path, masks: bool, index: Index) -> list[PictureEntry]:
    """Read [[source]] tables: `data` (relative to the file) and, optionally, repeats or weight, reg (prior preservation) and
    caption options.
    """
    try:
        content = tomllib.loads(_read_text(path)) if path.exists() else None
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML ({error})") from None
    if content is None:
        raise DataError(f"{path}: no such file")
    rows = content.get("source")
    if set(content) != {"source"} or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected [[source]] tables and nothing else, found {', '.join(content) or 'nothing'}")
    for number, row in enumerate(rows, 1):
        _check_source(f"{path}, source {number}", row)
    places = [row["data"] if row["data"].startswith("hf:") else str(path.parent / row["data"]) for row in rows]
    for number, place in enumerate(places, 1):
        if place in places[:number - 1]:
            raise DataError(f"{path}, source {number}: data {rows[number - 1]['data']!r} is listed twice; use repeats")
        if place.lower().endswith(".toml"):
            raise DataError(f"{path}, source {number}: data is {rows[number - 1]['data']!r}; allowed: a folder or hf:name")
    groups = [read_sources(place, masks=masks, index=index) for place in places]
    weighted = ["weight" in row for row in rows if not row.get("reg")]
    if any(weighted) and not all(weighted):
        raise DataError(f"{path}: some sources have a weight and some have none; give one to all or to none")
    repeats = [row.get("repeats", 1) for row in rows]
    if any(weighted):
        chosen = [i for i, row in enumerate(rows) if not row.get("reg")]
        wanted = [rows[i]["weight"] / sum(e.repeats for e in groups[i]) for i in chosen]
        for i, times in zip(chosen, whole_repeats(wanted)):
            repeats[i] = times
    entries = []
    for row, group, times in zip(rows, groups, repeats):
        own = {key: value for key, value in row.items() if key in CAPTION_OPTIONS}
        group = [replace(e, repeats=e.repeats * times, options=own) for e in group]
        entries += regularisation(group) if row.get("reg") else group
    return entries


def _check_source(where: str, row: Mapping[str, Any]) -> None:
    if unknown := [key for key in row if key not in _SOURCE_KEYS]:
        raise DataError(f"{where}: {unknown[0]!r} is unknown; allowed: {', '.join(_SOURCE_KEYS)}")
    for key, value in row.items():
        kind = type(_SOURCE_KEYS[key])
        fits = type(value) in (int, float) if kind is float else type(value) is kind
        if not fits:
            raise DataError(f"{where}: {key} is {value!r}; a {kind.__name__} is needed")
    limits = {"repeats": (1, MAX_REPEATS), "weight": (1e-6, 1e6), "caption_dropout": (0, 1), "keep_tokens": (0, 1000)}
    for key, (low, high) in limits.items():
        if key in row and not low <= row[key] <= high:
            raise DataError(f"{where}: {key} is {row[key]!r}; allowed: {low} to {high}")
    if not row.get("data") or row.get("tag_separator") == "":
        raise DataError(f"{where}: {'tag_separator' if row.get('data') else 'data'} is missing or empty")
    if "weight" in row and ("repeats" in row or row.get("reg")):
        raise DataError(f"{where}: weight does not go with {'reg' if row.get('reg') else 'repeats'}")


def whole_repeats(wanted: list[float], error: float = 0.05, most: int = 1000) -> list[int]:
    """The smallest integers in the proportions of `wanted`, each within `error`. Raises DataError if there are none."""
    unit = min(wanted)
    for k in range(1, most + 1):
        exact = [k * w / unit for w in wanted]
        if max(exact) > MAX_REPEATS:
            break
        if all(abs(round(x) / x - 1) <= error for x in exact):
            return [round(x) for x in exact]
    raise DataError(f"the weights ask for repeats in the proportions {', '.join(f'{w / unit:g}' for w in wanted)}; allowed: up "
                    f"to {MAX_REPEATS}")


def regularisation(entries: list[PictureEntry]) -> list[PictureEntry]:
    """The same entries as regularisation pictures, without the prefix, suffix and trigger of the learned subject."""
    return [replace(e, regular=True, options={"prefix": "", "suffix": "", "trigger": "", **e.options}) for e in entries]


def balanced(entries: list[PictureEntry]) -> list[PictureEntry]:
    """Repeat entries so that an epoch uses regularisation pictures as often as others, and each picture at least once.

    Without regularisation pictures nothing changes. Raises DataError if there are no others.
    """
    others, regular = ([e for e in entries if e.regular is kind] for kind in (False, True))
    if not regular:
        return entries
    if not others:
        raise DataError("all pictures are for regularisation; add some to learn from")
    wanted, present = sum(e.repeats for e in others), sum(e.repeats for e in regular)
    times = math.ceil(present / wanted)
    others = [replace(e, repeats=e.repeats * times) for e in others]
    rounds, rest = divmod(wanted * times, present)
    more, regular = rest, [replace(e, repeats=e.repeats * rounds) for e in regular]
    for i, e in enumerate(regular):  # the remainder goes to the first ones
        extra = min(more, e.repeats // rounds)
        regular[i], more = replace(e, repeats=e.repeats + extra), more - extra
    return others + regular


# ---- Hugging Face ----------------------------------------------------------------------------------------------------

def _hugging_face(name: str) -> list[PictureEntry]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"data is 'hf:{name}', which needs the package datasets; pip install datasets") from None
    try:
        if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "state.json").exists():
            found = datasets.load_from_disk(name)
        elif Path(name).is_dir():
            found = datasets.load_dataset("imagefolder", data_dir=name)
        else:
            found = datasets.load_dataset(name)
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"hf:{name}: cannot be loaded ({str(error).strip().splitlines()[0][:200]})") from None
    if isinstance(found, dict):
        split = "train" if "train" in found else next(iter(found)) if len(found) == 1 else None
        if split is None:
            raise DataError(f"hf:{name}: has no split 'train', only {', '.join(found)}")
        found = found[split]
    column = next((k for k, kind in found.features.items() if isinstance(kind, datasets.Image)), None)
    text = next((k for k in ("text", "caption", "captions", "prompt") if k in found.features), None)
    if column is None or text is None:
        raise DataError(f"hf:{name}: a column of pictures and one named text, caption, captions or prompt are needed; it has "
                        f"{', '.join(found.features)}")
    if not len(found):
        raise DataError(f"hf:{name}: there are no pictures in it")
    found = found.cast_column(column, datasets.Image(decode=False))
    entries = []
    for i, given in enumerate(found[text]):
        texts = (given,) if isinstance(given, str) else tuple(given or ())
        if not texts or not all(isinstance(t, str) for t in texts):
            raise DataError(f"hf:{name}, row {i}: has the {text} {given!r}; a string or a list of strings is needed")
        content = partial(_hf_bytes, found, column, i)
        entries.append(PictureEntry(f"row {i}", content, tuple(t.strip() for t in texts), f"hf:{name}"))
    return entries


def _hf_bytes(rows, column: str, i: int) -> bytes:
    cell = rows[i][column] or {}
    return cell["bytes"] if cell.get("bytes") is not None else Path(cell.get("path") or "no file").read_bytes()
