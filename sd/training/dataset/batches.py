"""The content of each micro-batch: pictures, captions, crops and noise as pure functions of (seed, its number). B images."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd.training.dataset.captions import caption_options, seen_caption
from sd.training.dataset.data import PictureData
from sd.training.dataset.randomness import numpy_rng, torch_rng


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return numpy_rng(seed, "order", epoch).permutation(n)


class Batches:
    """Number of a micro-batch -> indices of its pictures, all from one bucket: a pure function of (seed, number).

    The epochs of a bucket, each in a random order, are joined into an endless sequence and cut into batches. An incomplete
    last batch is thus filled from the bucket's next epoch: all batches have the same size, and every picture is used as
    often as its repeats say. A batch belongs to the epoch of its first picture, and the batches of an epoch are shuffled.
    """

    def __init__(self, dataset: PictureData, config):
        self.uses = np.array(dataset.uses)
        self.buckets = np.array(dataset.bucket_of)[self.uses]
        self.seed, self.size = config.seed, config.batch_size
        self.counts = np.bincount(self.buckets)
        self._places_of = lru_cache(maxsize=8)(self._places)
        self._batches_of = lru_cache(maxsize=2)(self.batches)

    def __call__(self, number: int) -> list[int]:
        epoch = bisect_right(range(number * self.size // len(self.uses) + 2), number, key=self.before) - 1
        bucket, k = self._batches_of(epoch)[number - self.before(epoch)]
        places, n = range(k * self.size, (k + 1) * self.size), int(self.counts[bucket])
        return [int(self._places_of(place // n)[bucket][place % n]) for place in places]

    def before(self, epoch: int) -> int:
        """Number of batches in all epochs before this one."""
        return sum(self._first(epoch, n) for n in self.counts)

    def batches(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number within the bucket) of each batch of the epoch, in order."""
        found = [(bucket, k) for bucket, n in enumerate(self.counts)
                 for k in range(self._first(epoch, n), self._first(epoch + 1, n))]
        if len(self.counts) == 1:  # the pictures are shuffled already
            return found
        return [found[i] for i in numpy_rng(self.seed, "batch order", epoch).permutation(len(found))]

    def _first(self, epoch: int, n: int) -> int:
        return -(-epoch * int(n) // self.size)

    def _places(self, epoch: int) -> list[np.ndarray]:
        """The pictures of each bucket, in the order of the epoch."""
        order = _order(len(self.uses), self.seed, epoch)
        return [self.uses[order[self.buckets[order] == bucket]] for bucket in range(len(self.counts))]


def batch_captions(dataset: PictureData, indices: list[int], config, number: int) -> list[str]:
    """The caption of each picture as the text encoder sees it, or the empty one with probability `caption_dropout`.

    Each is a pure function of (captions, options, seed, number, place in the batch).
    """
    choice = numpy_rng(config.seed, "caption", number).random(len(indices))
    dropped = numpy_rng(config.seed, "caption dropout", number).random(len(indices))
    texts = []
    for place, i in enumerate(indices):
        options = picture_options(dataset, config, i)
        text = dataset.captions[i][int(choice[place] * len(dataset.captions[i]))]
        texts.append("" if dropped[place] < options["caption_dropout"] else
                     seen_caption(text, options, numpy_rng(config.seed, "words", number, place)))
    return texts


def picture_options(dataset: PictureData, config, i: int) -> dict[str, Any]:
    """The caption options of picture i: those of its source, else those of the config."""
    return caption_options(config, dataset.options[i])


def batch_variants(dataset: PictureData, indices: list[int], config, number: int) -> list[int]:
    """A uniformly drawn variant (crop and mirror image) of each picture."""
    return numpy_rng(config.seed, "variant", number).integers(dataset.variants, size=len(indices)).tolist()


def batch_weights(dataset: PictureData, indices: list[int], config) -> Tensor | None:
    """[B] weights of the pictures' losses: `prior_weight` for regularisation, else 1; None without regularisation."""
    if not dataset.any_regular:
        return None
    return torch.tensor([float(config.prior_weight) if dataset.regular[i] else 1.0 for i in indices])


def batch_noise(shape: Sequence[int], config, number: int, stream: str = "noise") -> Tensor:
    """N(0, 1), drawn on the CPU."""
    return torch.randn(tuple(shape), generator=torch_rng(config.seed, stream, number))
