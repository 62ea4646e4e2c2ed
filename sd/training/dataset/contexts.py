"""Captions to context, encoded only once per caption if the text encoder is frozen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sd.placement import at, sent
from sd.prompts.tokenizer import tokenize
from sd.training.dataset.batches import picture_options
from sd.training.dataset.cache import Store, network_hash
from sd.training.dataset.captions import fixed_captions
from sd.training.dist import own_share_first

CONTEXT_BYTES = 1 << 30  # of contexts kept in memory


class Contexts:
    """Captions -> context [B, L, D] on the UNet's device: encoded in each batch if the text encoder is `trained`, else once.

    Contexts of a frozen text encoder are kept on the CPU, up to `limit` bytes (the least recently used are dropped first),
    and in `store`, a TextStore, if there is one.
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
        return sent(torch.stack([found[caption] for caption in captions]), self.models.device)

    def fill(self, captions: Iterable[str]) -> None:
        """Encode the captions that are not in the store in advance, so that the text encoder can leave the device.

        Those that neither memory nor store can hold are left out. Does nothing if the text encoder is trained.
        """
        captions = [] if self.trained else sorted(set(captions))
        for caption in own_share_first(captions) if self.store else captions:
            if self.bytes >= self.limit and not (self.store and self.store.has_room):
                continue
            if not (self.store and self.store.has(self.tokens([caption]))):
                self._frozen(caption)

    def _frozen(self, caption: str) -> Tensor:
        if caption in self.kept:
            self.kept.move_to_end(caption)
            return self.kept[caption]
        tokens = self.tokens([caption])
        context = self.store.read(tokens) if self.store else None
        if context is None:
            # One at a time, on the device and without autocast: a context must not depend on the rest of the batch, or on the
            # caller.
            device = self.models.device
            with torch.no_grad(), torch.autocast(device.type, enabled=False), at(self.models["clip"], device):
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
        return clip(sent(self.tokens(captions), clip.token_embedding.weight.device), self.clip_skip)

    def tokens(self, captions: list[str]) -> Tensor:
        return tokenize(self.models.tokenizer, captions, self.models.config.clip.max_tokens, self.models["clip"].words)


def all_captions(dataset, config) -> list[str] | None:
    """Every text that the training can use, sorted; None if wildcards or shuffling make them too many to list."""
    return fixed_captions(dataset.captions, [picture_options(dataset, config, i) for i in range(len(dataset))])


class TextStore:
    """Tokens [1, L] -> context [L, D] in a folder, for the `Contexts` of a frozen text encoder.

    The key holds the hash of the text encoder's weights and active adapters, its dtype, `clip_skip`, and the tokens. At most
    `limit` bytes are written, since varying captions would fill any disk.
    """

    def __init__(self, folder: str | Path, models, clip_skip: int = 1, limit: int = 2 << 30):
        clip = models["clip"]
        self.store = Store(Path(folder, "text"), limit)
        self.about = {"what": "context", "text encoder": network_hash(clip), "clip skip": clip_skip,
                      "dtype": str(clip.final_norm.weight.dtype)}

    @property
    def has_room(self) -> bool:
        return self.store.has_room

    def has(self, tokens: Tensor) -> bool:
        return self.store.has(self._key(tokens))

    def read(self, tokens: Tensor) -> Tensor | None:
        found = self.store.read(self._key(tokens))
        return None if found is None else found["context"]

    def write(self, tokens: Tensor, context: Tensor) -> None:
        self.store.write(self._key(tokens), {"context": context})

    def _key(self, tokens: Tensor) -> dict[str, object]:
        return self.about | {"tokens": tokens[0].tolist()}
