"""CLIP's tokenizer, from the vocabulary in data/."""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sd.errors import SDError


def data_dir() -> Path:
    """The folder of the vocabulary and the embedded models: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "data", package.parent / "data"]
    for place in places:
        if (place / "vocab.json").is_file():
            return place
    raise FileNotFoundError(f"vocab.json of CLIP is in neither {places[0]} nor {places[1]}")


def load_tokenizer(folder: str | Path | None = None):
    """CLIPTokenizer of transformers from a folder with vocab.json and merges.txt; default: the one in data/.

    Uses no network. Raises FileNotFoundError.
    """
    folder = data_dir() if folder is None else Path(folder)
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: not a tokenizer folder, it has no {name}")
    from transformers import CLIPTokenizer  # takes seconds

    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77, local_files_only=True)


@lru_cache(maxsize=1)
def vocabulary() -> frozenset[str]:
    """CLIP's tokens as they are spelled in vocab.json: those that end a word end in "</w>"."""
    return frozenset(json.loads((data_dir() / "vocab.json").read_text(encoding="utf-8")))


def tokenize(tokenizer, prompts: list[str], max_tokens: int, words: Mapping[str, Sequence[int]] | None = None) -> Tensor:
    """Token ids [B, max_tokens]: start, prompt, end, padded with the tokenizer's pad token (in SD 1.x the end token).

    `words`: the ids of each learned word (`CLIP.words`). A prompt that is too long is cut, with one warning that shows what
    was cut. Raises TypeError for what is not a list of strings, SDError for max_tokens below 2 and for lone surrogates.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of strings, not {prompts!r:.200}")
    if max_tokens < 2:
        raise SDError(f"max_tokens is {max_tokens}; start and end need at least 2")
    ids = torch.full((len(prompts), max_tokens), tokenizer.pad_token_id, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # tokenizers would drop the character without a word
            raise SDError(f"the prompt {prompt!r:.200} cannot be encoded: {error.reason} at character {error.start}") from None
        tokens, starts = tokens_of(tokenizer, prompt, words or {})
        room = max_tokens - 2
        if len(tokens) > room:
            cut = prompt[starts[room]:]
            shown = cut if len(cut) <= 200 else f"{cut[:200]}... ({len(cut)} characters)"
            warnings.warn(f"the prompt has {len(tokens)} tokens, the model takes {room}; cut: {shown!r}", stacklevel=2)
        tokens = [tokenizer.bos_token_id, *tokens[:room], tokenizer.eos_token_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids


def tokens_of(tokenizer, text: str, words: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
    """(token ids, where in the text each begins), without start and end; what lies between learned words is tokenized alone."""
    tokens, starts, end = [], [], 0
    for first, last, word in [*find_words(text, words), (len(text), len(text), None)]:
        # verbose=False: transformers would add a warning of its own, once a process
        encoded = tokenizer(text[end:first], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens += encoded["input_ids"]
        starts += [end + start for start, _ in encoded["offset_mapping"]]
        if word is not None:
            tokens += words[word]
            starts += [first] * len(words[word])
        end = last
    return tokens, starts


def find_words(text: str, words: Mapping[str, object]) -> list[tuple[int, int, str]]:
    """(start, end, word) of the learned words in a text: in any case, as CLIP's own, and whole; the longest that fits."""
    if not words:
        return []
    pattern, spelled = _words_pattern(tuple(words))
    return [(match.start(), match.end(), spelled[match.lastindex - 1]) for match in pattern.finditer(text)]


@lru_cache(maxsize=64)
def _words_pattern(words: tuple[str, ...]) -> tuple[re.Pattern, list[str]]:
    """(pattern with a group for each word, the words in the groups' order)."""
    def whole(word: str) -> str:
        # "<s0><s1>" are two words side by side; "toy" is none in "toys"
        before, after = (r"(?<!\w)" if re.match(r"\w", word) else ""), (r"(?!\w)" if re.search(r"\w$", word) else "")
        forms = {form: r"\s+".join(map(re.escape, unicodedata.normalize(form, word).split())) for form in ("NFC", "NFD")}
        return f"({before}(?:{'|'.join(sorted(set(forms.values())))}){after})"

    spelled = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(whole, spelled)), re.IGNORECASE), spelled
