"""New words for prompts (textual inversion, Gal et al. 2022), trained alone or together with a LoRA or the networks.

k vectors per word, D width of the text encoder.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sd.prompts.learned_words import EmbeddingError, word_key
from sd.prompts.tokenizer import find_words, tokens_of
from sd.training.dataset.batches import picture_options
from sd.training.dataset.captions import seen_caption
from sd.training.dataset.randomness import torch_rng
from sd.training.errors import TrainError
from sd.training.rules import NewWord, file_name, words_of


def new_words(config, models) -> dict[str, nn.Parameter]:
    """Add the words of `config` to the text encoder; returns their vectors by canonical name.

    A word without initial text starts at random. A word that is already loaded is trained further. Raises TrainError.
    """
    clip = models["clip"]
    found: dict[str, nn.Parameter] = {}
    for new in words_of(config):
        try:
            if clip.learned.find(new.word) is None:
                clip.learn({new.word: start_vectors(config, models, new, len(found))})
            elif new.vectors or new.text:
                raise TrainError(f"new_words has {new.word!r}, which is loaded already; name it without text and number to "
                                 f"train it further, or choose another word")
        except EmbeddingError as error:
            raise TrainError(f"new_words: {error}") from None
        found[f"clip.learned.{word_key(clip.learned.find(new.word))}"] = clip.learned.of(new.word)
    return found


def word_files(config) -> dict[str, str]:
    """New word -> name of its result file."""
    return {new.word: file_name(new.word) for new in words_of(config)}


def start_vectors(config, models, new: NewWord, number: int) -> Tensor:
    """[k, D] initial vectors: the embeddings of the text's tokens, repeated evenly if k is larger; without text N(0, std²).

    std is that of the vocabulary's embeddings. `number` is the word's, and seeds its random numbers.
    """
    clip = models["clip"]
    tokens, _ = tokens_of(models.tokenizer, new.text, clip.words)
    k, n = new.vectors or len(tokens) or 1, len(tokens)
    if n > k:
        raise TrainError(f"new_words has {new.word!r} with {k} vectors, and its text {new.text!r} has {n} tokens; "
                         f"shorten it, or give {n} vectors")
    table = clip.token_embedding.weight.detach()
    if not tokens:
        return torch.randn(k, table.shape[1], generator=torch_rng(config.seed, "new words", number)) * table.float().std().cpu()
    with torch.no_grad():
        start = clip.embed(torch.tensor([tokens], device=table.device))[0].float()
    return start[[i * n // k for i in range(k)]]


def check_words_shown(config, dataset) -> None:
    """Raises TrainError for a new word that is in no caption, since it would never be trained."""
    left = {new.word for new in words_of(config)}
    for i, texts in enumerate(dataset.captions if left else ()):
        options = picture_options(dataset, config, i)
        for text in texts:  # the raw caption too: the word may be inside a wildcard
            seen = seen_caption(text, options, np.random.default_rng(0))
            left -= {word for shown in (seen, text) for *_, word in find_words(shown, dict.fromkeys(left))}
        if not left:
            return
    if left:
        word = min(left)
        raise TrainError(f"new_words has {word!r}, which is in no caption; write it there, or add it to all of them "
                         f"(trigger or prefix)")
