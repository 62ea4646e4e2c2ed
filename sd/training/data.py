"""Pictures and captions, and what each micro-batch holds: a pure function of (seed, stream, number of the micro-batch).

B images, C channels, H, W pixels, h, w latents, L tokens, D context width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sd.image_io import ImageError, load_image
from sd.tokenizer import tokenize

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STREAMS = ("init", "order", "caption", "caption dropout", "posterior", "timestep", "noise", "layers")


class DataError(ValueError):
    """Training data that cannot be used; the message says which and why."""


# ---- randomness ------------------------------------------------------------------------------------------------------

def seed_of(seed: int, stream: str, number: int) -> int:
    """A 63-bit seed for one purpose and one number: never seed + number, where the streams of near seeds would meet."""
    return int(np.random.SeedSequence([seed, STREAMS.index(stream), number]).generate_state(1, np.uint64)[0] >> 1)


def torch_rng(seed: int, stream: str, number: int) -> torch.Generator:
    """A CPU generator, so that the draws are the same on every device."""
    return torch.Generator().manual_seed(seed_of(seed, stream, number))


def numpy_rng(seed: int, stream: str, number: int) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, stream, number))


# ---- data sets: anything with `captions`, `picture(i)`, `fingerprint()` and a length --------------------------------

class PictureSet:
    """Pictures in memory, [N, C, H, W] in [-1, 1], with the captions of each; one is drawn each time it is used."""

    def __init__(self, pictures: Tensor, captions: Sequence[Sequence[str]]):
        if len(pictures) != len(captions):
            raise DataError(f"{len(pictures)} pictures are given with {len(captions)} captions")
        self.pictures, self.captions = pictures, [(c,) if isinstance(c, str) else tuple(c) for c in captions]

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, i: int) -> Tensor:
        return self.pictures[i]

    def fingerprint(self) -> str:
        """Differs when a picture or a caption does."""
        return _digest(self.captions, [self.pictures.contiguous().numpy().tobytes()])


class PictureFolder:
    """A folder of pictures, each with a caption in a `.txt` of its name, or all captions in one metadata.jsonl.

    A line of metadata.jsonl is {"file_name": "a.png", "text": "the caption"}. Pictures are turned as their EXIF says,
    laid on white, scaled to cover size x size and cut in the middle. Raises DataError that names the first bad file.
    """

    def __init__(self, folder: str | Path, *, size: int, channels: int):
        self.folder, self.size, self.mode = Path(folder), size, {1: "L", 3: "RGB"}[channels]
        if not self.folder.is_dir():
            raise DataError(f"{folder}: {'is no folder' if self.folder.exists() else 'no such folder'}")
        self.files = sorted(f for f in self.folder.iterdir()
                            if f.suffix.lower() in PICTURES and not f.name.startswith("."))
        if not self.files:
            raise DataError(f"{folder}: there are no pictures in it ({', '.join(PICTURES)})")
        captions = self._metadata() if (self.folder / "metadata.jsonl").exists() else self._texts()
        without = [f.name for f in self.files if f.name not in captions]
        if without:
            raise DataError(f"{folder}: {len(without)} of {len(self.files)} pictures have no caption, "
                            f"first: {without[0]}")
        self.captions = [(captions[f.name],) for f in self.files]
        for i in range(len(self)):
            self.picture(i)  # what cannot be read is found now, not after an hour of training

    def __len__(self) -> int:
        return len(self.files)

    def _texts(self) -> dict[str, str]:
        by_stem: dict[str, str] = {}
        for f in self.files:
            if f.stem in by_stem:
                raise DataError(f"{self.folder}: {by_stem[f.stem]} and {f.name} would share the caption {f.stem}.txt")
            by_stem[f.stem] = f.name
        captions = {}
        for text in sorted(self.folder.glob("*.txt")):
            if text.stem not in by_stem:
                raise DataError(f"{text}: a caption without a picture")
            captions[by_stem[text.stem]] = _read_text(text).strip()
        return captions

    def _metadata(self) -> dict[str, str]:
        path, names, captions = self.folder / "metadata.jsonl", {f.name for f in self.files}, {}
        for number, line in enumerate(_read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f'{path}, line {number}: expected {{"file_name": "...", "text": "..."}}, '
                                f"found {line[:80]!r}") from None
            wrong = ("is not in the folder" if name not in names else "is there twice" if name in captions
                     else "has a text that is no string" if not isinstance(text, str) else None)
            if wrong:
                raise DataError(f"{path}, line {number}: {name!r} {wrong}")
            captions[name] = text.strip()
        return captions

    def picture(self, i: int) -> Tensor:
        """[C, size, size] in [-1, 1]."""
        try:
            image = load_image(self.files[i], self.mode)
        except ImageError as error:
            raise DataError(str(error)) from None
        if min(image.size) < 8:
            raise DataError(f"{self.files[i]}: has {image.width} x {image.height} pixels; at least 8 x 8 are needed")
        image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # [H, W] or [H, W, 3]
        return pixels.reshape(self.size, self.size, -1).permute(2, 0, 1) / 127.5 - 1

    def fingerprint(self) -> str:
        """Differs when a file or a caption does."""
        return _digest(self.captions, [f.name.encode() + f.read_bytes() for f in self.files])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text") from None


def _digest(captions: Sequence, contents: Sequence[bytes]) -> str:
    digest = hashlib.sha256(json.dumps(captions).encode())
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:16]


# ---- one micro-batch -------------------------------------------------------------------------------------------------

def batch_indices(n: int, config, number: int) -> list[int]:
    """Which of the n pictures micro-batch `number` holds: epochs end to end, each in an order of its own."""
    places = range(number * config.batch_size, (number + 1) * config.batch_size)
    return [int(_order(n, config.seed, place // n)[place % n]) for place in places]


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return numpy_rng(seed, "order", epoch).permutation(n)


def batch_captions(dataset, indices: list[int], config, number: int) -> list[str]:
    """A caption for each picture; with probability `caption_dropout` the empty one, from which guidance is learned."""
    choice = numpy_rng(config.seed, "caption", number).random(len(indices))
    dropped = numpy_rng(config.seed, "caption dropout", number).random(len(indices)) < config.caption_dropout
    options = [dataset.captions[i] for i in indices]
    return ["" if drop else texts[int(u * len(texts))] for texts, u, drop in zip(options, choice, dropped)]


def batch_noise(shape: Sequence[int], config, number: int, stream: str = "noise") -> Tensor:
    """N(0, 1) on the CPU."""
    return torch.randn(tuple(shape), generator=torch_rng(config.seed, stream, number))


# ---- what the networks make of it ------------------------------------------------------------------------------------

@torch.no_grad()
def encode_pictures(models, dataset, batch: int = 16) -> tuple[Tensor, Tensor]:
    """The posterior of every picture in the UNet's scale: mean and std, [N, 4, h, w] on the CPU.

    Both are kept, not a sample of them, so that each use of a picture draws its latents anew.
    """
    encoder, scale = models["encoder"], models.config.vae.scale
    weight, means, stds = encoder.conv_in.weight, [], []
    for start in range(0, len(dataset), batch):
        pictures = torch.stack([dataset.picture(i) for i in range(start, min(start + batch, len(dataset)))])
        mean, logvar = encoder(pictures.to(weight.device, weight.dtype))
        means.append(scale * mean.float().cpu())
        stds.append(scale * (0.5 * logvar.float()).exp().cpu())
    return torch.cat(means), torch.cat(stds)


class Contexts:
    """captions -> context [B, L, D]; each is encoded once a batch, or once for good if the text encoder is frozen."""

    def __init__(self, models, *, trained: bool):
        self.models, self.trained, self.kept = models, trained, {}

    def __call__(self, captions: list[str]) -> Tensor:
        clip = self.models["clip"]
        device = clip.token_embedding.weight.device
        unique = sorted(set(captions))
        if self.trained:
            context = clip(self.tokens(unique).to(device))
            return context[[unique.index(caption) for caption in captions]]
        for caption in unique:  # one at a time: a row must not depend on what else is in the batch
            if caption not in self.kept:
                with torch.no_grad():
                    self.kept[caption] = clip(self.tokens([caption]).to(device))[0]
        return torch.stack([self.kept[caption] for caption in captions])

    def tokens(self, captions: list[str]) -> Tensor:
        return tokenize(self.models.tokenizer, captions, self.models.config.clip.max_tokens)
