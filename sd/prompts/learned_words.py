"""Learned words of the prompt (textual inversion, Gal et al. 2022): in a text encoder, and in files of all programs.

A word stands for k vectors of the text encoder's width D, in the places of k tokens. Facts: docs/lora-formats.md.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sd.config import CLIPConfig
from sd.errors import SDError
from sd.escape import escaped, unescaped
from sd.files.hashes import digest
from sd.files.tensor_file import all_finite
from sd.prompts.tokenizer import vocabulary

WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL"}  # of vectors, by family


class EmbeddingError(SDError):
    """A learned word that cannot be read, added or written; the message names it and says why."""


# ---- in a text encoder -------------------------------------------------------------------------------------------------

class LearnedWords(nn.ParameterDict):
    """The vectors [k, D] of each learned word: rows that follow the token embedding's table, which is never written."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config

    @property
    def ids(self) -> dict[str, range]:
        """Word -> the token ids for which its vectors stand, in order: the first after the vocabulary's."""
        found, first = {}, self.config.vocab_size
        for key, vectors in self.items():
            found[unescaped(key[1:])] = range(first, first + len(vectors))
            first += len(vectors)
        return found

    def find(self, word: str) -> str | None:
        """The learned word that this one is, in any case, as it is spelled here."""
        return next((known for known in self.ids if known.lower() == one_space(word).lower()), None)

    def of(self, word: str) -> nn.Parameter:
        """The vectors of a word. Raises EmbeddingError."""
        if self.find(word) is None:
            raise EmbeddingError(f"the word {word!r} is not loaded; loaded: {', '.join(map(repr, self.ids)) or 'none'}")
        return self[word_key(self.find(word))]

    def new(self, words: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `learn` would add: {word: fp32 [k, D]}. A word that is there with the same vectors is not new.

        Raises EmbeddingError for one that is there with others or is a token of the vocabulary, for vectors that do not
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
        """Add words with their vectors, [k, D] or [D], frozen and in fp32: all of them or none. Returns those that are new.

        Raises as `new` does.
        """
        new = self.new(words)
        with torch.inference_mode(False):
            for word, vectors in new.items():
                self[word_key(word)] = nn.Parameter(vectors.to(device, copy=True), requires_grad=False)
        return list(new)

    def forget(self, word: str) -> None:
        """Raises EmbeddingError for a word that is not there."""
        self.of(word)
        del self[word_key(self.find(word))]

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
    """The one spelling of a word: single spaces, composed letters."""
    return " ".join(unicodedata.normalize("NFC", word).split())


def word_key(word: str) -> str:
    """A word's key in LearnedWords: names of parameters may not hold dots, nor equal an attribute such as `keys`."""
    return "_" + escaped(word)


def vectors_hash(vectors: Tensor) -> str:
    """First 12 hex digits of the SHA-256 of a word's vectors in fp32: the same whatever file they came from."""
    return digest([vectors.float()])[:12]
