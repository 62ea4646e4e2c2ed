"""Pictures from files as a data set: upright, on white, cut to the size of their bucket.

C channels, H, W pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sd.training.buckets import Buckets, make_buckets
from sd.training.captions import caption_options
from sd.training.sources import DataError, Entry, balanced, read_folder, read_image, read_sources, regularisation

DATA_OPTIONS = {"buckets": False, "bucket_min": None, "bucket_max": None, "bucket_step": 64, "upscale": True,
                "crop": "center", "flip": False, "variants": 1, "masks": False, "reg_data": None, "prior_weight": 1.0}


class Pictures:
    """Pictures from files, read when they are used. Upright, on white, scaled to cover their size and cut to it.

    sizes: (width, height) of each; without `buckets` all are size x size. variants: how many crops (with crop "random") and
    mirror images (`flip` doubles them) a picture has; number 0 is the first crop as it is. uses: the indices that make an
    epoch. bucket_of: those of one bucket may share a batch. regular: whether a picture is for prior preservation.
    Raises DataError that names the first picture that cannot be used; those whose digest is `known` were read before.
    """

    def __init__(self, entries: Sequence[Entry], *, size: int, channels: int, buckets: Buckets | None = None,
                 crop: str = "center", flip: bool = False, variants: int = 1, known: Container[str] = frozenset()):
        self.entries, self.mode = list(entries), {1: "L", 3: "RGB"}[channels]
        self.crop, self.flip, self.variants = crop, flip, variants * (2 if flip else 1)
        self.captions = [e.captions for e in self.entries]
        self.options, self.regular = [e.options for e in self.entries], [e.regular for e in self.entries]
        self.masked = any(e.mask for e in self.entries)
        self.uses = [i for i, e in enumerate(self.entries) for _ in range(e.repeats)]
        self._digests: dict[int, str] = {}
        # What cannot be read is found now, not after an hour of training.
        found = [self._known_size(i) if known and self.digest(i) in known else self._read(i).size for i in range(len(self))]
        self.sizes = [(size, size) if buckets is None else buckets.choose(*wh, self.entries[i].where)
                      for i, wh in enumerate(found)]
        order = sorted(set(self.sizes))
        self.bucket_of = [order.index(wh) for wh in self.sizes]

    def __len__(self) -> int:
        return len(self.entries)

    def picture(self, i: int, variant: int = 0) -> Tensor:
        """[C, H, W] in [-1, 1]."""
        width, height = self.sizes[i]
        image = self._cut(self._read(i), i, variant, Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # [H, W] or [H, W, 3]
        return pixels.reshape(height, width, -1).permute(2, 0, 1) / 127.5 - 1

    def mask(self, i: int, variant: int = 0) -> Tensor:
        """[1, H, W] in [0, 1], cut as the picture is: 1 where it is learned from, everywhere if it has no mask."""
        width, height = self.sizes[i]
        if self.entries[i].mask is None:
            return torch.ones(1, height, width)
        mask, image = read_image(self.entries[i].mask, "L"), self._read(i)
        if mask.size != image.size:
            raise DataError(f"{self.entries[i].mask}: has {mask.width} x {mask.height} pixels, its picture "
                            f"{image.width} x {image.height}")
        return torch.from_numpy(np.array(self._cut(mask, i, variant, Image.Resampling.BILINEAR), dtype=np.float32))[None] / 255

    def made_of(self, i: int, variant: int = 0) -> dict[str, object]:
        """All that `picture` and `mask` depend on, for the key of a cache."""
        mask = self.entries[i].mask
        return {"picture": self.digest(i), "size": self.sizes[i], "flip": self._flipped(variant),
                "crop": "center" if self.crop == "center" else variant // (2 if self.flip else 1),
                "mask": hashlib.sha256(mask.read_bytes()).hexdigest() if mask else None}

    def digest(self, i: int) -> str:
        """SHA-256 of the file, 32 hex digits."""
        if i not in self._digests:
            self._digests[i] = hashlib.sha256(self.entries[i].content()).hexdigest()[:32]
        return self._digests[i]

    def fingerprint(self) -> str:
        """Differs when a picture, its name, a caption, a mask or what its source says of it does."""
        rows = [(e.name, self.digest(i), e.captions, e.repeats, dict(e.options), e.regular, self.made_of(i)["mask"])
                for i, e in enumerate(self.entries)]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def _read(self, i: int) -> Image.Image:
        image = self.entries[i].image(self.mode)
        if min(image.size) < 8:
            raise DataError(f"{self.entries[i].where}: has {image.width} x {image.height} pixels; at least 8 x 8 are needed")
        return image

    def _known_size(self, i: int) -> tuple[int, int]:
        """From the file's first bytes: it is not decoded."""
        with Image.open(BytesIO(self.entries[i].content())) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations that swap the sides
            return image.size[::-1] if turned else image.size

    def _cut(self, image: Image.Image, i: int, variant: int, resampling: Image.Resampling) -> Image.Image:
        centering = (0.5, 0.5)
        if self.crop == "random":  # of the picture and the crop's number alone: other runs find it in their cache
            centering = np.random.default_rng([int(self.digest(i), 16), variant // (2 if self.flip else 1)]).random(2)
        image = ImageOps.fit(image, self.sizes[i], resampling, centering=tuple(centering))
        return ImageOps.mirror(image) if self._flipped(variant) else image

    def _flipped(self, variant: int) -> bool:
        return self.flip and variant % 2 == 1


class PictureFolder(Pictures):
    """The pictures of a folder with their captions, as `read_folder` finds them, scaled and cut to size x size pixels."""

    def __init__(self, folder: str | Path, *, size: int, channels: int):
        super().__init__(read_folder(folder), size=size, channels=channels)


def open_data(config, *, size: int, channels: int, factor: int, known: Container[str] = frozenset(),
              keep: Callable[[Entry], bool] = lambda entry: True) -> Pictures:
    """What `config.data` and `config.reg_data` name, with all options of the config. Raises DataError.

    size: side in pixels, of buckets the root of the largest area; factor: pixels of a latent's side.
    known: digests of pictures that were read before (`cached_pictures`), which are not decoded again. keep: which ones.
    """
    option = {name: getattr(config, name, default) for name, default in DATA_OPTIONS.items()}
    own = caption_options(config)

    def require(ok: bool, name: str, allowed: str) -> None:
        if not ok:
            raise DataError(f"{name} is {(option | own)[name]!r}; allowed: {allowed}")

    require(option["crop"] in ("center", "random"), "crop", "center, random")
    require(1 <= option["variants"] <= 1000, "variants", "1 to 1000")
    require(option["variants"] == 1 or option["crop"] == "random", "variants", "1, unless crop is random: else all are alike")
    require(0 <= option["prior_weight"] < math.inf, "prior_weight", "0 or more")
    require(option["upscale"] or option["buckets"], "upscale", "True, unless pictures go into buckets")
    require(own["keep_tokens"] >= 0, "keep_tokens", "0 or more")
    require(own["tag_separator"] != "", "tag_separator", "one character or more")
    entries = read_sources(config.data, masks=option["masks"])
    if option["reg_data"]:
        entries += regularisation(read_sources(option["reg_data"], masks=option["masks"]))
    if option["masks"] and not any(e.mask for e in entries):
        raise DataError(f"{config.data}: masks are asked for, and no picture has one; that of a.png is a-mask.png or "
                        f"masks/a.png")
    buckets = make_buckets(size, factor=factor, low=option["bucket_min"], high=option["bucket_max"],
                           step=option["bucket_step"], upscale=option["upscale"]) if option["buckets"] else None
    entries = balanced([e for e in entries if keep(e)])
    return Pictures(entries, size=size, channels=channels, buckets=buckets, crop=option["crop"],
                    flip=option["flip"], variants=option["variants"], known=known)
