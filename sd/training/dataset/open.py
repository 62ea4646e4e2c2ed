"""Opens what a training learns from and what it holds out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container
from dataclasses import replace

from sd.training.dataset.buckets import make_buckets
from sd.training.dataset.cache import cached_pictures
from sd.training.dataset.captions import caption_options
from sd.training.dataset.pictures import Pictures
from sd.training.dataset.sources import Entry, balanced, read_sources, regularisation
from sd.training.errors import DataError, TrainError

DATA_OPTIONS = {"buckets": False, "bucket_min": None, "bucket_max": None, "bucket_step": 64, "upscale": True,
                "crop": "center", "flip": False, "variants": 1, "masks": False, "reg_data": None, "prior_weight": 1.0}


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


def is_held_out(entry: Entry, share: float) -> bool:
    """Whether a picture is among the `share` that is held out: by the hash of its file alone, so others change nothing.

    Pictures for regularisation never are.
    """
    digest = hashlib.sha256(b"held out" + entry.content()).digest()
    return not entry.regular and int.from_bytes(digest[:8], "big") < share * 2**64


def open_pictures(config, models, dataset=None, held_out=None):
    """(data set to learn from, held-out data set or None): those that are given, else those of `config`.

    Raises TrainError or DataError.
    """
    if dataset is not None:
        if held_out is None and (config.validation or config.validation_data):
            raise TrainError("validation chooses among pictures from files; with a dataset of your own give held_out as well")
        return dataset, held_out
    pictures, chosen = _open_both(config, models)
    return pictures, chosen if held_out is None else held_out


def _open_both(config, models) -> tuple[Pictures, Pictures | None]:
    size, factor = config.size or models.config.image_size, models.config.vae.factor
    if size > models.config.largest_size:
        raise TrainError(f"size is {size}; allowed: up to {models.config.largest_size} pixels, 8 times what this model is "
                         f"made for")
    if size % factor:
        raise TrainError(f"size is {size}; it must be a multiple of {factor}, such as {size - size % factor or factor}")
    if not config.data:
        raise TrainError("no data: name a folder of pictures with captions")

    def opened(keep: Callable[[Entry], bool] = lambda entry: True, **change) -> Pictures:
        return open_data(replace(config, **change), size=size, channels=models.config.vae.image_channels, factor=factor,
                         known=cached_pictures(config.cache), keep=keep)

    if config.validation_data:
        pictures, held_out = opened(), opened(lambda e: not e.regular, data=config.validation_data, reg_data=None)
        twins = {pictures.digest(i): e.where for i, e in enumerate(pictures.entries)}
        for i, entry in enumerate(held_out.entries):
            if held_out.digest(i) in twins:
                raise TrainError(f"{entry.where}: is held out and learned from, as {twins[held_out.digest(i)]}; remove one")
        return pictures, held_out
    if not config.validation:
        return opened(), None
    held_out = opened(lambda e: is_held_out(e, config.validation), reg_data=None)
    pictures = opened(lambda e: not is_held_out(e, config.validation))
    for kind, found in (("held out", held_out), ("left to learn from", pictures)):
        if not len(found):
            raise TrainError(f"validation is {config.validation:g}, and of {len(pictures) + len(held_out)} pictures none is "
                             f"{kind} (each is chosen by its content alone); use another share, or validation_data")
    return pictures, held_out
