"""Learned words of a text encoder (textual inversion, Gal et al. 2022).

A word stands for k vectors of the text encoder's width D, which take the places of k tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sd.config import CLIPConfig
from sd.errors import SDError
from sd.escape import as_key, from_key
from sd.files.hashes import digest
from sd.files.tensor_file import all_finite
from sd.prompts.tokenizer import vocabulary

WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL"}  # width of the vectors -> model family


class EmbeddingError(SDError):
    """A learned word that cannot be read, added or written; the message names it and says why."""


class LearnedWords(nn.ParameterDict):
    """The vectors [k, D] of each learned word. They extend the token embedding, whose own weight is never written."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config

    @property
    def ids(self) -> dict[str, range]:
        """Word -> the token ids of its vectors, numbered from the end of the vocabulary in order of addition."""
        found, first = {}, self.config.vocab_size
        for key, vectors in self.items():
            found[from_key(key)] = range(first, first + len(vectors))
            first += len(vectors)
        return found

    def find(self, word: str) -> str | None:
        """The loaded word that equals `word` up to case and spacing, in its own spelling; None if there is none."""
        return next((known for known in self.ids if known.lower() == one_space(word).lower()), None)

    def of(self, word: str) -> nn.Parameter:
        """The vectors of a word. Raises EmbeddingError."""
        return self[self.key_of(word)]

    def key_of(self, word: str) -> str:
        """The key of a loaded word. Raises EmbeddingError."""
        known = self.find(word)
        if known is None:
            raise EmbeddingError(f"the word {word!r} is not loaded; loaded: {', '.join(map(repr, self.ids)) or 'none'}")
        return word_key(known)

    def new(self, words: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The words that `learn` would add: {word: fp32 [k, D]}. A word loaded with the same vectors is not new.

        Raises EmbeddingError for a word that is loaded with other vectors or is in the vocabulary, for vectors that do not
        fit, and for values that are not finite.
        """
        there = {word.lower(): self.of(word).detach().float().cpu() for word in self.ids}
        new: dict[str, Tensor] = {}
        for word, vectors in words.items():
            word, vectors = one_space(word), self._checked(word, vectors)
            if not word or {word.lower(), word.lower() + "</w>"} & vocabulary():
                raise EmbeddingError(f"{word!r} cannot be a learned word: the vocabulary has it already; it needs another name")
            known = there.setdefault(word.lower(), vectors)
            if known is vectors:
                new[word] = vectors
            elif not torch.equal(known, vectors):
                raise EmbeddingError(f"the word {word!r} is there already with other vectors; give this one another name, or "
                                     f"remove_embedding the first")
        return new

    def learn(self, words: Mapping[str, Tensor], device) -> list[str]:
        """Add words with their vectors, [k, D] or [D], frozen and in fp32: all or none. Returns the new ones.

        Raises as `new` does.
        """
        new = self.new(words)
        with torch.inference_mode(False):
            for word, vectors in new.items():
                self[word_key(word)] = nn.Parameter(vectors.to(device, copy=True), requires_grad=False)
        return list(new)

    def forget(self, word: str) -> None:
        """Remove a word. Raises EmbeddingError if it is not loaded."""
        del self[self.key_of(word)]

    def _checked(self, word: str, vectors: Tensor) -> Tensor:
        shape, width, longest = list(vectors.shape), self.config.width, self.config.max_tokens - 2
        if not vectors.is_floating_point() or len(shape) not in (1, 2) or not vectors.numel():
            raise EmbeddingError(f"the word {word!r} has a tensor {shape} of {str(vectors.dtype).removeprefix('torch.')}; "
                                 f"vectors [k, {width}] are expected")
        if shape[-1] != width:
            family = f", as for {WIDTHS[shape[-1]]}" if shape[-1] in WIDTHS else ""
            raise EmbeddingError(f"the word {word!r} has vectors of width {shape[-1]}{family}; this text encoder has {width}")
        if len(shape) == 2 and shape[0] > longest:
            raise EmbeddingError(f"the word {word!r} has {shape[0]} vectors; a prompt takes {longest}")
        if not all_finite(vectors):
            raise EmbeddingError(f"the word {word!r} has vectors that are not finite (NaN or infinity)")
        return vectors.detach().float().cpu().reshape(-1, width)


def one_space(word: str) -> str:
    """Normalize a word: NFC, single spaces."""
    return " ".join(unicodedata.normalize("NFC", word).split())


def word_key(word: str) -> str:
    """A word's key in LearnedWords."""
    return as_key(word, nn.ParameterDict())


def vectors_hash(vectors: Tensor) -> str:
    """First 12 hex digits of the SHA-256 of a word's vectors in fp32, whatever file they came from."""
    return digest([vectors.float()])[:12]
