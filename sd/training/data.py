"""Pictures and captions, and what each micro-batch holds: a pure function of (seed, stream, number of the micro-batch).

B images, C channels, H, W pixels, h, w latents, L tokens, D context width.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sd.tokenizer import tokenize
from sd.training.captions import caption_options, fixed_captions, seen_caption
from sd.training.dist import own_first
from sd.training.pictures import PictureFolder, Pictures, open_data  # noqa: F401
from sd.training.sources import DataError
from sd.vae import placed_for

STREAMS = ("init", "order", "caption", "caption dropout", "posterior", "timestep", "noise", "layers", "batch order", "words",
           "variant", "new words")
CONTEXT_BYTES = 1 << 30  # of contexts that are kept in memory


# ---- randomness ------------------------------------------------------------------------------------------------------

def seed_of(seed: int, stream: str, *number: int) -> int:
    """A 63-bit seed for one purpose and one number: never seed + number, where the streams of near seeds would meet."""
    return int(np.random.SeedSequence([seed, STREAMS.index(stream), *number]).generate_state(1, np.uint64)[0] >> 1)


def torch_rng(seed: int, stream: str, number: int) -> torch.Generator:
    """A CPU generator, so that the draws are the same on every device."""
    return torch.Generator().manual_seed(seed_of(seed, stream, number))


def numpy_rng(seed: int, stream: str, *number: int) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, stream, *number))


# ---- data sets: anything with `captions`, `picture(i)`, `fingerprint()` and a length; the rest of Pictures if it has it ---

class PictureSet:
    """Pictures in memory, [N, C, H, W] in [-1, 1], with the captions of each; one is drawn each time it is used."""

    def __init__(self, pictures: Tensor, captions: Sequence[Sequence[str]]):
        if len(pictures) != len(captions):
            raise DataError(f"{len(pictures)} pictures are given with {len(captions)} captions")
        self.pictures, self.captions = pictures, [(c,) if isinstance(c, str) else tuple(c) for c in captions]

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, i: int, variant: int = 0) -> Tensor:
        return self.pictures[i]

    def fingerprint(self) -> str:
        """Differs when a picture or a caption does."""
        return _digest(self.captions, [self.pictures.contiguous().numpy().tobytes()])


def _digest(captions: Sequence, contents: Sequence[bytes]) -> str:
    digest = hashlib.sha256(json.dumps(captions).encode())
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:16]


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


class Contexts:
    """captions -> context [B, L, D] on the UNet's device; each is encoded once a batch, or once for good if the text encoder
    is frozen.

    What is encoded for good is kept on the CPU, `limit` bytes of it, and in `store` (sd/training/latent_cache.py: TextStore)
    if there is one: the least recently used is encoded, or read, again.
    """

    def __init__(self, models, *, trained: bool, store=None, clip_skip: int = 1, limit: int = CONTEXT_BYTES):
        self.models, self.trained, self.store, self.clip_skip = models, trained, store, clip_skip
        self.kept: OrderedDict[str, Tensor] = OrderedDict()
        self.limit, self.bytes = limit, 0

    def __call__(self, captions: list[str]) -> Tensor:
        unique = sorted(set(captions))
        if self.trained:
            return self._encode(unique)[[unique.index(caption) for caption in captions]]
        found = {caption: self._frozen(caption) for caption in unique}
        return torch.stack([found[caption] for caption in captions]).to(self.models.device)

    def fill(self, captions: Iterable[str]) -> None:
        """Encode all that will be needed, so that the text encoder may leave the device. Nothing if it is trained."""
        captions = [] if self.trained else sorted(set(captions))
        for caption in own_first(captions) if self.store else captions:
            self._frozen(caption)

    def _frozen(self, caption: str) -> Tensor:
        if caption in self.kept:
            self.kept.move_to_end(caption)
            return self.kept[caption]
        tokens = self.tokens([caption])
        context = self.store.read(tokens) if self.store else None
        if context is None:
            # One at a time and without autocast: a row must not depend on what else is in the batch, or on who asks first.
            with torch.no_grad(), torch.autocast(self.models.device.type, enabled=False):
                context = self._encode([caption])[0].cpu()
            if self.store:
                self.store.write(tokens, context)
        self.kept[caption] = context
        self.bytes += context.nbytes
        while self.bytes > self.limit and len(self.kept) > 1:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes
        return context

    def _encode(self, captions: list[str]) -> Tensor:
        clip = self.models["clip"]
        return clip(self.tokens(captions).to(clip.token_embedding.weight.device), self.clip_skip)

    def tokens(self, captions: list[str]) -> Tensor:
        return tokenize(self.models.tokenizer, captions, self.models.config.clip.max_tokens, self.models["clip"].words)


# ---- what a person sees before it starts -----------------------------------------------------------------------------

def all_captions(dataset, config) -> list[str] | None:
    """Every text that the training will show, sorted; None where wildcards or shuffling make each use another one."""
    return fixed_captions(dataset.captions, [picture_options(dataset, config, i) for i in range(len(dataset))])


def describe_data(dataset, config, n: int = 8) -> str:
    """Counts, buckets with their numbers, and the first n captions as they will be seen."""
    batches, regular = Batches(dataset, config), getattr(dataset, "regular", [False] * len(dataset))
    uses, variants = len(batches.uses), getattr(dataset, "variants", 1)
    lines = [f"{len(dataset)} pictures, {uses} uses and about {uses / config.batch_size:.1f} batches of {config.batch_size} an "
             f"epoch; {config.steps} steps are {config.steps * config.accumulate * config.batch_size / uses:.1f} epochs"]
    if variants > 1:
        lines.append(f"{variants} crops and mirror images of each")
    if any(regular):
        lines.append(f"{sum(regular)} of them, and {sum(regular[i] for i in batches.uses)} of the uses, are for prior "
                     f"preservation; their loss counts {config.prior_weight:g} times")
    origins = Counter(e.origin for e in getattr(dataset, "entries", []))
    if len(origins) > 1:
        used = Counter(dataset.entries[i].origin for i in batches.uses)
        lines += [f"  {origin}: {count} pictures, {used[origin]} uses" for origin, count in origins.items()]
    if getattr(dataset, "masked", False):
        lines.append(f"{sum(e.mask is not None for e in dataset.entries)} have a mask")
    sizes = getattr(dataset, "sizes", None) or [tuple(dataset.picture(i).shape[:0:-1]) for i in range(len(dataset))]
    pictures, used = Counter(sizes), Counter(sizes[i] for i in batches.uses)
    lines += ["width x height:", *(f"  {w} x {h}: {pictures[w, h]} pictures, {used[w, h]} uses" for w, h in sorted(pictures))]
    lines.append("captions as they will be seen:")
    shown, number = [], 0
    while len(shown) < n:
        indices = batches(number)
        shown += zip(indices, batch_captions(dataset, indices, config, number))
        number += 1
    names = [e.name for e in dataset.entries] if hasattr(dataset, "entries") else [f"picture {i}" for i in range(len(dataset))]
    return "\n".join(lines + [f"  {names[i]}: {text!r}" for i, text in shown[:n]])
