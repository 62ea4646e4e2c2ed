"""Open-licensed emoji as captioned pictures: seven styles of 1,634 concepts, drawn from pinned npm packages.

    python -m recipes.emoji.data [--size 64]      # about 3 minutes on one core; needs npm and `pip install -e '.[emoji]'`

At 64 pixels it also writes data/emoji-delft/, the example for training a LoRA.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sd.files.tensors import read_tensors, write_safetensors
from sd.training.dataset.data import PictureData
from sd.training.dataset.pictures import captions_hash

OUT = Path("out/emoji")
EXAMPLES, EXAMPLE_COUNT = Path("data/emoji-delft"), 40
NPM = OUT / "npm"
PACKAGES = ("@iconify-json/noto@1.2.9", "@iconify-json/noto-v1@1.2.5", "@iconify-json/twemoji@1.2.5",
            "@iconify-json/fluent-emoji@1.2.7", "@iconify-json/fluent-emoji-flat@1.2.6", "@iconify-json/emojione@1.2.3",
            "@iconify-json/fluent-emoji-high-contrast@1.2.6", "emojibase-data@17.0.0")
BASE = {"noto": "noto", "noto-v1": "blob", "twemoji": "twemoji", "fluent-emoji": "fluent 3d",
        "fluent-emoji-flat": "fluent flat", "emojione": "emojione"}  # icon set -> its name in captions
HIGH_CONTRAST = "fluent-emoji-high-contrast"
STYLES = BASE | {HIGH_CONTRAST: "high contrast"}
COLOURS = ("red", "orange", "yellow", "green", "blue", "light blue", "purple", "brown", "black", "white", "pink", "grey")
POOL = 20  # captions of a picture; each use draws one
HELD_OUT = json.loads(Path(__file__).with_name("heldout.json").read_text(encoding="utf-8"))


# ---- the packages ----------------------------------------------------------------------------------------------------

def install() -> None:
    """Install the pinned packages into out/emoji/npm, once."""
    if not (NPM / "node_modules/emojibase-data").exists():
        subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(NPM), *PACKAGES],
                       check=True)


def package(name: str, file: str) -> dict:
    """A JSON file of an installed package; an empty dict if there is none."""
    path = NPM / "node_modules" / name / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@dataclass(frozen=True)
class Concept:
    """The subject of an emoji: code points without the variation selector, name, and tags of Unicode CLDR."""

    code: str
    label: str
    tags: tuple[str, ...]


def concepts() -> list[Concept]:
    """All concepts except country flags, regional letters, skin and hair components, and mirrored variants."""
    rows = package("emojibase-data", "en/data.json")
    return [Concept(plain(row["hexcode"]), row["label"], tuple(row.get("tags", ())))
            for row in rows if row.get("group") not in (None, 2)
            and "facing right" not in row["label"] and not row["label"].startswith("flag: ")]


def slug(label: str) -> str:
    """A label as the icon sets spell it."""
    return re.sub(r"-+", "-", re.sub(r"[^a-z0-9]+", "-", re.sub(r"[’'“”.:]", "", label.lower()))).strip("-")


def aliases_of(data: dict) -> dict[str, list[str]]:
    """Drawing of an icon set -> all its names, the main one first."""
    names = {name: [name] for name in data["icons"]}
    for alias, value in data.get("aliases", {}).items():
        names[value["parent"]].append(alias)
    return names


def names_of() -> dict[str, list[str]]:
    """Code points -> every name in the sets that list code points; older sets use a concept's older name."""
    names: dict[str, list[str]] = {}
    for name in ("noto", "twemoji", "fluent-emoji-flat"):
        data = package(f"@iconify-json/{name}", "icons.json")
        aliases = aliases_of(data)
        for code, icon in package(f"@iconify-json/{name}", "chars.json").items():
            parent = data.get("aliases", {}).get(icon, {}).get("parent", icon)
            names.setdefault(plain(code), []).extend([icon, *aliases[parent]])
    return names


def plain(code: str) -> str:
    """Code points without leading zeros and without the emoji variation selector."""
    return "-".join(part.lstrip("0") for part in code.upper().split("-") if part != "FE0F")


class IconSet:
    """The drawings of a package, as SVG."""

    def __init__(self, name: str):
        self.data = package(f"@iconify-json/{name}", "icons.json")
        named_as = "fluent-emoji-flat" if name == "fluent-emoji" else name
        self.by_code = {plain(code): icon for code, icon in package(f"@iconify-json/{named_as}", "chars.json").items()}

    def has(self, name: str) -> bool:
        icon = self.data["icons"].get(name) or self.data.get("aliases", {}).get(name)
        return icon is not None and not icon.get("hidden")

    def match(self, concepts: list[Concept], names: dict[str, list[str]]) -> dict[Concept, str]:
        """Concept -> drawing: by code points, else by the slug of its label, else by a name that no other concept has taken."""
        found: dict[Concept, str] = {}
        for concept in concepts:
            name = self.by_code.get(concept.code, slug(concept.label))
            if self.has(name):
                found[concept] = name
        for concept in concepts:
            taken = set(found.values())
            for name in names.get(concept.code, ()) if concept not in found else ():
                if self.has(name) and name not in taken:
                    found[concept] = name
                    break
        return found

    def svg(self, name: str, size: int) -> str:
        """The drawing centred on a white square of size x size pixels."""
        alias = self.data.get("aliases", {}).get(name, {})
        icon = self.data["icons"][alias.get("parent", name)]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", self.data.get("width", 16)), icon.get("height", self.data.get("height", 16))
        side = max(width, height)
        box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
        flip = f'transform="translate({2 * left + width} 0) scale(-1 1)"' if alias.get("hFlip") else ""
        return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" '
                f'height="{size}" viewBox="{box}"><g {flip}>{icon["body"]}</g></svg>')


def draw(svg: str, size: int, finer: int) -> np.ndarray:
    """Render an SVG at `finer` times the size and average it down to uint8 [3, size, size]."""
    try:
        import resvg_py
    except ImportError:
        raise SystemExit("drawing the emoji needs resvg-py: pip install -e '.[emoji]'") from None
    from io import BytesIO

    from PIL import Image
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True))
    pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB"), dtype=np.float32)  # [H, W, 3]
    blocks = pixels.reshape(size, finer, size, finer, 3).mean(axis=(1, 3))
    return blocks.round().astype(np.uint8).transpose(2, 0, 1)


# ---- the data set ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """A picture: its index, its concept, and its icon set."""

    index: int
    code: str
    label: str
    tags: tuple[str, ...]
    style: str

    @property
    def split(self) -> str:
        """"concept" or "pair" if heldout.json holds it out, else "train"."""
        if self.code in HELD_OUT["concepts"]:
            return "concept"
        return "pair" if [self.code, self.style] in HELD_OUT["pairs"] else "train"


def build(size: int = 64) -> tuple[Tensor, list[Row]]:
    """(all pictures, uint8 [N, 3, size, size] on white; their rows). Drawn once, then read from out/emoji."""
    path = OUT / f"pictures-{size}.safetensors"
    if not path.exists():
        install()
        pictures, rows = [], []
        known, names = concepts(), names_of()
        for style in STYLES:
            icons = IconSet(style)
            finer = 4 if style == "fluent-emoji" and size < 128 else 2  # or its filter effects come out jagged
            for concept, name in sorted(icons.match(known, names).items(), key=lambda pair: known.index(pair[0])):
                pictures.append(draw(icons.svg(name, size * finer), size, finer))
                rows.append(asdict(Row(len(rows), concept.code, concept.label, concept.tags, style)))
            print(f"{style}: {sum(row['style'] == style for row in rows)} pictures", flush=True)
        write_safetensors(path, {"pictures": torch.from_numpy(np.stack(pictures))}, {"rows": json.dumps(rows)})
    tensors = read_tensors(path)
    rows = [Row(**(row | {"tags": tuple(row["tags"])})) for row in json.loads(tensors.metadata["rows"])]
    return tensors["pictures"].clone(), rows


def caption(row: Row, tags: tuple[str, ...] = (), style: bool = True) -> str:
    """"{label}, {tags}, {style} style"; captions of the black and white set leave out colours."""
    words = [row.label, *tags]
    if row.style == HIGH_CONTRAST:
        words = [re.sub(rf"\b({'|'.join(COLOURS)}) ", "", word) for word in words]
    return ", ".join([*words, f"{STYLES[row.style]} style"] if style else words)


def captions(row: Row) -> tuple[str, ...]:
    """POOL captions, always the same: half with up to four tags in random order, one tenth without the style."""
    seed = hashlib.sha256(f"{row.code} {row.style}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(seed[:8], "little"))
    pool = []
    for k in range(POOL):
        chosen = rng.permutation(len(row.tags))[:rng.integers(1, 5)] if k % 2 else ()
        pool.append(caption(row, tuple(row.tags[i] for i in chosen), style=k >= POOL // 10))
    return tuple(pool)


class EmojiSet(PictureData):
    """A data set for `sd.training.train` that keeps its pictures in memory as uint8 [N, 3, H, W]."""

    def __init__(self, pictures: Tensor, captions: list[tuple[str, ...]]):
        self.pictures, self.captions = pictures, captions

    def picture(self, i: int, variant: int = 0) -> Tensor:
        """[3, H, W] in [-1, 1]."""
        return to_float(self.pictures[i])

    def fingerprint(self) -> str:
        return captions_hash(self.captions, self.pictures)


def to_float(pictures: Tensor) -> Tensor:
    """uint8 to fp32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def choose(pictures: Tensor, rows: list[Row]) -> EmojiSet:
    """A data set of these rows."""
    return EmojiSet(pictures[[row.index for row in rows]], [captions(row) for row in rows])


def write_examples(pictures: Tensor, rows: list[Row], folder: Path = EXAMPLES) -> None:
    """Write the example data for LoRA training: emoji in Delft blue on white, as PNG and .txt with two captions."""
    from PIL import Image, ImageOps
    rows = [row for row in rows if row.style == "fluent-emoji-flat" and row.split == "train"]
    folder.mkdir(parents=True, exist_ok=True)
    for i in sorted(np.random.default_rng(1).permutation(len(rows))[:EXAMPLE_COUNT]):
        name, grey = slug(rows[i].label), Image.fromarray(pictures[rows[i].index].permute(1, 2, 0).numpy()).convert("L")
        ImageOps.colorize(grey, "#06206e", "white").save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(f"{caption(rows[i])}\n{caption(rows[i], style=False)}\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="pixels on a side (default 64)")
    size = parser.parse_args().size
    made, described = build(size)
    if size == 64:
        write_examples(made, described)
    for split in ("train", "pair", "concept"):
        inside = [row for row in described if row.split == split]
        print(f"{split}: {sum(row.style in BASE for row in inside)} of the base, "
              f"{sum(row.style == HIGH_CONTRAST for row in inside)} of high contrast")
