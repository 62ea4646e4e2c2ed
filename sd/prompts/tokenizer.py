"""Prompts to CLIP's token ids, learned words included."""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sd.errors import SDError

if TYPE_CHECKING:
    from torch import Tensor

# Files in which a tokenizer of transformers is saved with special tokens and settings of its own, as that of SD 2.x.
SETTINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def data_dir() -> Path:
    """The folder of CLIP's vocabulary and the bundled models: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "data", package.parent / "data"]
    for place in places:
        if (place / "vocab.json").is_file():
            return place
    raise FileNotFoundError(f"vocab.json of CLIP is in neither {places[0]} nor {places[1]}")


def load_tokenizer(folder: str | Path | None = None):
    """CLIP's tokenizer from a folder with vocab.json and merges.txt; default: the one in data/.

    Where the folder has more than the two files, transformers' CLIPTokenizer, which reads them all. Does not use the network.
    Raises FileNotFoundError.
    """
    folder = data_dir() if folder is None else Path(folder)
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: not a tokenizer folder, it has no {name}")
    if any((folder / name).is_file() for name in SETTINGS):
        import transformers  # takes seconds
        return transformers.CLIPTokenizer.from_pretrained(str(folder), model_max_length=77, local_files_only=True)
    from sd.prompts.clip_tokenizer import CLIPTokenizer
    return CLIPTokenizer(folder)


@lru_cache(maxsize=1)
def vocabulary() -> frozenset[str]:
    """CLIP's tokens as spelled in vocab.json, where tokens that end a word end in "</w>"."""
    return frozenset(json.loads((data_dir() / "vocab.json").read_text(encoding="utf-8")))


def tokenize(tokenizer, prompts: list[str], max_tokens: int, words: Mapping[str, Sequence[int]] | None = None) -> Tensor:
    """Token ids [B, max_tokens]: start, prompt, end, padded with the tokenizer's pad token (in SD 1.x the end token).

    `tokenizer`: what `load_tokenizer` returns, or one of transformers'. `words`: learned word -> its token ids (`CLIP.words`).
    A prompt that is too long is cut, with a warning that shows what was cut. Raises TypeError if `prompts` is not a list of
    strings, SDError for max_tokens below 2 and lone surrogates.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of strings, not {prompts!r:.200}")
    if max_tokens < 2:
        raise SDError(f"max_tokens is {max_tokens}; start and end need at least 2")
    import torch  # here: commands that only look at their arguments use this file too
    ids = torch.full((len(prompts), max_tokens), tokenizer.pad_token_id, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # tokenizers would drop the character silently
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
    """(token ids, character offset of each), without start and end. The text between learned words is tokenized separately."""
    tokens, starts, end = [], [], 0
    for first, last, word in [*find_words(text, words), (len(text), len(text), None)]:
        # verbose=False: transformers would add its own warning, once per process
        encoded = tokenizer(text[end:first], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens += encoded["input_ids"]
        starts += [end + start for start, _ in encoded["offset_mapping"]]
        if word is not None:
            tokens += words[word]
            starts += [first] * len(words[word])
        end = last
    return tokens, starts


def find_words(text: str, words: Mapping[str, object]) -> list[tuple[int, int, str]]:
    """(start, end, word) of each learned word in a text: case-insensitive as CLIP is, whole words only, longest match first."""
    if not words:
        return []
    pattern, spelled = _words_pattern(tuple(words))
    return [(match.start(), match.end(), spelled[(match.lastindex or 0) - 1]) for match in pattern.finditer(text)]


@lru_cache(maxsize=64)
def _words_pattern(words: tuple[str, ...]) -> tuple[re.Pattern, list[str]]:
    """(pattern with one group per word, the words in the order of the groups)."""
    def whole(word: str) -> str:
        # "<s0><s1>" is two adjacent words; "toys" does not contain the word "toy"
        before, after = (r"(?<!\w)" if re.match(r"\w", word) else ""), (r"(?!\w)" if re.search(r"\w$", word) else "")
        forms = {form: r"\s+".join(map(re.escape, unicodedata.normalize(form, word).split())) for form in ("NFC", "NFD")}
        return f"({before}(?:{'|'.join(sorted(set(forms.values())))}){after})"

    spelled = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(whole, spelled)), re.IGNORECASE), spelled
