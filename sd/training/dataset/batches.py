"""Pictures and captions, and what each micro-batch holds: a pure function of (seed, stream, number of the micro-batch).

B images, C channels, H, W pixels, h, w latents, L tokens, D context width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sd.placement import placed_for
from sd.training.dataset.captions import caption_options, seen_caption
from sd.training.dataset.randomness import numpy_rng, torch_rng

# ---- one micro-batch -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return numpy_rng(seed, "order", epoch).permutation(n)


class Batches:
    """number of a micro-batch -> the pictures in it, all of one bucket: a pure function of (seed, number).

    Each bucket is an endless row of its epochs, each in an order of its own, cut into batches end to end: a batch that an
    epoch leaves incomplete is filled from the bucket's next epoch, so every picture comes as often as its repeats say, in
    every epoch, and no batch is smaller than the others. An epoch's batches are those whose first picture is in it, in an
    order of their own.
    """

    def __init__(self, dataset, config):
        self.uses = np.array(getattr(dataset, "uses", range(len(dataset))))
        self.buckets = np.array(getattr(dataset, "bucket_of", [0] * len(dataset)))[self.uses]
        self.seed, self.size = config.seed, config.batch_size
        self.counts = np.bincount(self.buckets)
        self._places_of = lru_cache(maxsize=8)(self._places)

    def __call__(self, number: int) -> list[int]:
        epoch = bisect_right(range(number * self.size // len(self.uses) + 2), number, key=self.before) - 1
        bucket, k = self.batches(epoch)[number - self.before(epoch)]
        places, n = range(k * self.size, (k + 1) * self.size), int(self.counts[bucket])
        return [int(self._places_of(place // n)[bucket][place % n]) for place in places]

    def before(self, epoch: int) -> int:
        """How many batches the epochs before this one have."""
        return sum(self._first(epoch, n) for n in self.counts)

    def batches(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, number in the bucket) of each batch of the epoch, in their order."""
        found = [(bucket, k) for bucket, n in enumerate(self.counts)
                 for k in range(self._first(epoch, n), self._first(epoch + 1, n))]
        if len(self.counts) == 1:  # its pictures are in random order already
            return found
        return [found[i] for i in numpy_rng(self.seed, "batch order", epoch).permutation(len(found))]

    def _first(self, epoch: int, n: int) -> int:
        return -(-epoch * int(n) // self.size)

    def _places(self, epoch: int) -> list[np.ndarray]:
        """The pictures of each bucket in the epoch's order."""
        order = _order(len(self.uses), self.seed, epoch)
        return [self.uses[order[self.buckets[order] == bucket]] for bucket in range(len(self.counts))]


def batch_captions(dataset, indices: list[int], config, number: int) -> list[str]:
    """A caption for each picture as the text encoder sees it; with probability `caption_dropout` the empty one.

    From the empty one guidance is learned. Each is a pure function of (caption, options, seed, number, place in the batch).
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


def picture_options(dataset, config, i: int) -> dict[str, object]:
    """The caption options for picture i: those of its source, else the config's."""
    return caption_options(config, dataset.options[i] if hasattr(dataset, "options") else {})


def batch_variants(dataset, indices: list[int], config, number: int) -> list[int]:
    """Which of its crops and mirror images each picture shows, each as likely as any other."""
    n = getattr(dataset, "variants", 1)
    return numpy_rng(config.seed, "variant", number).integers(n, size=len(indices)).tolist()


def batch_weights(dataset, indices: list[int], config) -> Tensor | None:
    """[B] factors of each picture's loss: `prior_weight` for regularisation, else 1; None where there is none of these."""
    regular = getattr(dataset, "regular", [False])
    if not any(regular):
        return None
    return torch.tensor([float(config.prior_weight) if regular[i] else 1.0 for i in indices])


def batch_noise(shape: Sequence[int], config, number: int, stream: str = "noise") -> Tensor:
    """N(0, 1) on the CPU."""
    return torch.randn(tuple(shape), generator=torch_rng(config.seed, stream, number))


# ---- what the networks make of it ------------------------------------------------------------------------------------

@torch.no_grad()
def encode_pictures(models, dataset) -> tuple[Tensor, Tensor]:
    """The posterior of every picture in the UNet's scale: mean and std, [N, 4, h, w] on the CPU.

    Both are kept, not a sample of them, so that each use of a picture draws its latents anew.
    """
    encoder, scale = models["encoder"], models.config.vae.scale
    means, stds = [], []
    for i in range(len(dataset)):  # a picture's latents must not depend on what else is encoded
        mean, logvar = encoder(placed_for(encoder, dataset.picture(i)[None]))
        means.append(scale * mean.float().cpu())
        stds.append(scale * (0.5 * logvar.float()).exp().cpu())
    return torch.cat(means), torch.cat(stds)
