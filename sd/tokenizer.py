"""CLIP's tokenizer, from the vocabulary in data/."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor


def data_dir() -> Path:
    """The folder of the vocabulary and the embedded models: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
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


def tokenize(tokenizer, prompts: list[str], max_tokens: int) -> Tensor:
    """Token ids [B, max_tokens]: start, prompt, end, padded with the tokenizer's pad token (in SD 1.x the end token).

    A prompt that is too long is cut, with one warning that shows what was cut. Raises TypeError for what is not a list
    of strings, ValueError for max_tokens below 2 and for lone surrogates.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of strings, not {prompts!r:.200}")
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}; start and end need at least 2")
    ids = torch.full((len(prompts), max_tokens), tokenizer.pad_token_id, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        prompt.encode("utf-8")  # a lone surrogate is a ValueError that names its place; tokenizers would say nothing
        # verbose=False: transformers would add a warning of its own, once a process
        encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, room = encoded["input_ids"], max_tokens - 2
        if len(tokens) > room:
            cut = prompt[encoded["offset_mapping"][room][0]:]
            shown = cut if len(cut) <= 200 else f"{cut[:200]}... ({len(cut)} characters)"
            warnings.warn(f"the prompt has {len(tokens)} tokens, the model takes {room}; cut: {shown!r}", stacklevel=2)
        tokens = [tokenizer.bos_token_id, *tokens[:room], tokenizer.eos_token_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids
