"""Opens the pictures to learn from and the held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container
from dataclasses import replace

from sd.training.dataset.buckets import make_buckets
from sd.training.dataset.cache import cached_pictures
from sd.training.dataset.data import PictureData, as_picture_data
from sd.training.dataset.index import NO_INDEX, Index
from sd.training.dataset.pictures import Pictures
from sd.training.dataset.sources import PictureEntry, balanced, read_sources, regularisation
from sd.training.dist import is_main
from sd.training.errors import DataError, TrainError


def open_pictures(config, models, dataset=None, held_out=None) -> tuple[PictureData, PictureData | None]:
    """(data set to learn from, held-out data set or None): the given ones, else those of `config`.

    A given data set has at least captions, picture(i), fingerprint() and a length. Raises TrainError or DataError.
    """
    given = None if held_out is None else as_picture_data(held_out)
    if dataset is not None:
        if given is None and (config.validation or config.validation_data):
            raise TrainError("validation chooses among pictures from files; with a dataset of your own give held_out as well")
        return as_picture_data(dataset), given
    pictures, chosen = _open_files(config, models)
    return pictures, chosen if given is None else given


def _open_files(config, models) -> tuple[Pictures, Pictures | None]:
    size, factor = config.size or models.config.image_size, models.config.vae.factor
    if size > models.config.largest_size:
        raise TrainError(f"size is {size}; allowed: up to {models.config.largest_size} pixels, 8 times what this model is "
                         f"made for")
    if size % factor:
        raise TrainError(f"size is {size}; it must be a multiple of {factor}, such as {size - size % factor or factor}")
    if not config.data:
        raise TrainError("no data: name a folder of pictures with captions")
    known = cached_pictures(config.cache)
    index = Index(config.cache, (config.data, config.reg_data, config.validation_data))

    def opened(keep: Callable[[PictureEntry], bool] = lambda entry: True, **change) -> Pictures:
        return open_data(replace(config, **change), size=size, channels=models.config.vae.image_channels, factor=factor,
                         known=known, index=index, keep=keep)

    if config.validation_data:
        pictures = opened()
        # Without reg_data, prior_weight would have no effect and be refused.
        held_out = opened(lambda e: not e.regular, data=config.validation_data, reg_data=None, prior_weight=1.0)
        _check_disjoint(pictures, held_out)
    elif config.validation:
        held_out = opened(lambda e: is_held_out(e, config.validation, index), reg_data=None, prior_weight=1.0)
        pictures = opened(lambda e: not is_held_out(e, config.validation, index))
        _check_both_have_some(pictures, held_out, config.validation)
    else:
        pictures, held_out = opened(), None
    if is_main() and not config.dry_run:
        index.save()
    return pictures, held_out


def is_held_out(entry: PictureEntry, share: float, index: Index = NO_INDEX) -> bool:
    """Whether a picture belongs to the held-out `share`: decided by the hash of its file alone, whatever the others are.

    Regularisation pictures never belong to it.
    """
    if entry.regular:
        return False
    digest = entry.fact(index, "held out", lambda: hashlib.sha256(b"held out" + entry.content()).hexdigest()[:16])
    return int(digest, 16) < share * 2**64


def _check_disjoint(pictures: Pictures, held_out: Pictures) -> None:
    learned = {pictures.digest(i): entry.where for i, entry in enumerate(pictures.entries)}
    for i, entry in enumerate(held_out.entries):
        if held_out.digest(i) in learned:
            raise TrainError(f"{entry.where}: is held out and learned from, as {learned[held_out.digest(i)]}; remove one")


def _check_both_have_some(pictures: Pictures, held_out: Pictures, share: float) -> None:
    for what, found in (("held out", held_out), ("left to learn from", pictures)):
        if not len(found):
            raise TrainError(f"validation is {share:g}, and of {len(pictures) + len(held_out)} pictures none is {what} (each "
                             f"is chosen by its content alone); use another share, or validation_data")


def open_data(config, *, size: int, channels: int, factor: int, known: Container[str] = frozenset(), index: Index = NO_INDEX,
              keep: Callable[[PictureEntry], bool] = lambda entry: True) -> Pictures:
    """The pictures of `config.data` and `config.reg_data` for which `keep` is true, with all options of the config.

    size: side in pixels; with buckets, the root of the largest area. factor: pixels of a latent's side. known: hashes of
    pictures (`cached_pictures`) that were read before and need no check. index: what is known of the files. Raises DataError.
    """
    entries = read_sources(config.data, masks=config.masks, index=index)
    if config.reg_data:
        entries += regularisation(read_sources(config.reg_data, masks=config.masks, index=index))
    if config.masks and not any(e.mask for e in entries):
        raise DataError(f"{config.data}: masks are asked for, and no picture has one; that of a.png is a-mask.png or "
                        f"masks/a.png")
    buckets = make_buckets(size, factor=factor, low=config.bucket_min, high=config.bucket_max, step=config.bucket_step,
                           upscale=config.upscale) if config.buckets else None
    return Pictures(balanced([e for e in entries if keep(e)]), size=size, channels=channels, buckets=buckets,
                    crop=config.crop, flip=config.flip, variants=config.variants, known=known, index=index)
