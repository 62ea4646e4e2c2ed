"""Data sets of pictures, from files or in memory. C channels, H, W pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sd.files.hashes import digest
from sd.training.dataset.buckets import Buckets
from sd.training.dataset.data import PictureData
from sd.training.dataset.index import NO_INDEX, Index
from sd.training.dataset.sources import PictureEntry, read_folder, read_image
from sd.training.errors import DataError


class Pictures(PictureData):
    """Pictures from files, read at each use: turned upright, on a white background, scaled to cover their size and cropped.

    Without `buckets` all are size x size. `variants` is the number of crops (with crop "random"), and `flip` adds the mirror
    image of each; variant 0 is the first crop, unmirrored. Pictures whose digest is in `known` are not decoded to check them,
    and those that `index` knows are not even read. Raises DataError for the first picture that cannot be used.
    """

    def __init__(self, entries: Sequence[PictureEntry], *, size: int, channels: int, buckets: Buckets | None = None,
                 crop: str = "center", flip: bool = False, variants: int = 1, known: Container[str] = frozenset(),
                 index: Index = NO_INDEX):
        self.entries, self.mode = list(entries), {1: "L", 3: "RGB"}[channels]
        self.crop, self.flip, self.variants = crop, flip, variants * (2 if flip else 1)
        self.captions = [e.captions for e in self.entries]
        self.options, self.regular = [e.options for e in self.entries], [e.regular for e in self.entries]
        self.masked = any(e.mask for e in self.entries)
        self.uses = [i for i, e in enumerate(self.entries) for _ in range(e.repeats)]
        self.index, self._digests, self._mask_digests = index, dict[int, str](), dict[int, str | None]()
        # Unreadable files are found now, not after an hour of training.
        found = [self._size(i, known) for i in range(len(self))]
        self.sizes = [(size, size) if buckets is None else buckets.choose(*wh, self.entries[i].where)
                      for i, wh in enumerate(found)]
        number = {wh: k for k, wh in enumerate(sorted(set(self.sizes)))}
        self.bucket_of = [number[wh] for wh in self.sizes]
        for i in range(len(self)) if index.path else ():  # before it is saved
            self.digest(i)
            self._mask_digest(i)

    def picture(self, i: int, variant: int = 0) -> Tensor:
        width, height = self.sizes[i]
        image = self._cut(self._read(i), i, variant, Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # [H, W] or [H, W, 3]
        return pixels.reshape(height, width, -1).permute(2, 0, 1) / 127.5 - 1

    def mask(self, i: int, variant: int = 0) -> Tensor:
        """[1, H, W] in [0, 1], cropped like the picture; 1 everywhere if it has no mask. Raises DataError for another size."""
        width, height = self.sizes[i]
        if self.entries[i].mask is None:
            return torch.ones(1, height, width)
        mask, image = read_image(self.entries[i].mask, "L"), self._read(i)
        if mask.size != image.size:
            raise DataError(f"{self.entries[i].mask}: has {mask.width} x {mask.height} pixels, its picture "
                            f"{image.width} x {image.height}")
        return torch.from_numpy(np.array(self._cut(mask, i, variant, Image.Resampling.BILINEAR), dtype=np.float32))[None] / 255

    def made_of(self, i: int, variant: int = 0) -> dict[str, object]:
        return {"picture": self.digest(i), "size": self.sizes[i], "flip": self._flipped(variant),
                "crop": "center" if self.crop == "center" else variant // (2 if self.flip else 1),
                "mask": self._mask_digest(i)}

    def digest(self, i: int) -> str:
        """SHA-256 of the file, 32 hex digits."""
        if i not in self._digests:
            entry = self.entries[i]
            self._digests[i] = entry.fact(self.index, "digest", lambda: hashlib.sha256(entry.content()).hexdigest()[:32])
        return self._digests[i]

    def _mask_digest(self, i: int) -> str | None:
        """SHA-256 of the mask's file; None without one."""
        mask = self.entries[i].mask
        if mask is not None and i not in self._mask_digests:
            self._mask_digests[i] = self.index.fact("digest", mask, lambda: hashlib.sha256(mask.read_bytes()).hexdigest())
        return self._mask_digests.get(i)

    def fingerprint(self) -> str:
        """Changes with any picture, name, caption, mask or option of a source."""
        rows = [(e.name, self.digest(i), e.captions, e.repeats, dict(e.options), e.regular, self.made_of(i)["mask"])
                for i, e in enumerate(self.entries)]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def _read(self, i: int) -> Image.Image:
        image = self.entries[i].image(self.mode)
        if min(image.size) < 8:
            raise DataError(f"{self.entries[i].where}: has {image.width} x {image.height} pixels; at least 8 x 8 are needed")
        return image

    def _size(self, i: int, known: Container[str]) -> tuple[int, int]:
        """Size of the upright picture, which is decoded unless it is known."""
        def found() -> tuple[int, int]:
            if not known or self.digest(i) not in known:
                return self._read(i).size
            with Image.open(BytesIO(self.entries[i].content())) as image:  # its header
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations that swap the sides
                return image.size[::-1] if turned else image.size
        width, height = self.entries[i].fact(self.index, "size", found)
        return width, height

    def _cut(self, image: Image.Image, i: int, variant: int, resampling: Image.Resampling) -> Image.Image:
        x, y = 0.5, 0.5
        if self.crop == "random":  # a function of picture and crop alone, so that other runs find it in the cache
            x, y = np.random.default_rng([int(self.digest(i), 16), variant // (2 if self.flip else 1)]).random(2)
        image = ImageOps.fit(image, self.sizes[i], resampling, centering=(x, y))
        return ImageOps.mirror(image) if self._flipped(variant) else image

    def _flipped(self, variant: int) -> bool:
        return self.flip and variant % 2 == 1


class PictureFolder(Pictures):
    """The captioned pictures of a folder (see `read_folder`), scaled and cropped to size x size pixels."""

    def __init__(self, folder: str | Path, *, size: int, channels: int):
        super().__init__(read_folder(folder), size=size, channels=channels)


class PictureSet(PictureData):
    """Pictures in memory, [N, C, H, W] in [-1, 1], with one or several captions for each."""

    def __init__(self, pictures: Tensor, captions: Sequence[Sequence[str]]):
        if len(pictures) != len(captions):
            raise DataError(f"{len(pictures)} pictures are given with {len(captions)} captions")
        self.pictures, self.captions = pictures, [(c,) if isinstance(c, str) else tuple(c) for c in captions]

    def picture(self, i: int, variant: int = 0) -> Tensor:
        return self.pictures[i]

    def fingerprint(self) -> str:
        return captions_hash(self.captions, self.pictures)


def captions_hash(captions: Sequence[Sequence[str]], pictures: Tensor) -> str:
    """16 hex digits of the SHA-256 of captions and pictures."""
    return digest([json.dumps(captions), pictures])[:16]
