"""Captions as the text encoder sees them: wildcards, shuffled tags, trigger, prefix and suffix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Every option with its default. With several sources (sources.py), each may override them.
CAPTION_OPTIONS = {"caption_dropout": 0.0, "shuffle_tags": False, "keep_tokens": 0, "tag_separator": ",", "prefix": "",
                   "suffix": "", "trigger": "", "wildcards": False}
_WILDCARD = re.compile(r"\{([^{}]*)\}")  # the innermost


def caption_options(config, own: Mapping[str, Any] = {}) -> dict[str, Any]:  # noqa: B006 (it is only read)
    """The options in effect: the source's own, else the config's, else the default."""
    return {name: own.get(name, getattr(config, name, default)) for name, default in CAPTION_OPTIONS.items()}


def seen_caption(caption: str, options: Mapping[str, Any], rng: np.random.Generator) -> str:
    """Apply all options except dropout, in this order; with the defaults the caption is returned unchanged.

    wildcards: each {a|b|c} becomes one of its parts, innermost first. shuffle_tags: the tags are shuffled, except for the
    first `keep_tokens`. trigger: prepended as a tag, unless the caption has the word. prefix and suffix: joined with a space.
    """
    text = caption
    if options["wildcards"]:
        text = _fill_wildcards(text, rng)
    separator = options["tag_separator"]
    if options["shuffle_tags"]:
        tags = _tags(text, separator)
        kept, moved = tags[:options["keep_tokens"]], tags[options["keep_tokens"]:]
        text = f"{separator} ".join(kept + [moved[i] for i in rng.permutation(len(moved))])
    trigger = options["trigger"]
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text):
        text = f"{trigger}{separator} {text}" if text else trigger
    if options["prefix"]:
        text = f"{options['prefix']} {text}" if text else options["prefix"]
    if options["suffix"]:
        joint = "" if not text or options["suffix"].startswith(separator) else " "
        text = f"{text}{joint}{options['suffix']}"
    return text


def fixed_captions(captions: Iterable[Iterable[str]], options: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """All texts that can occur, sorted; None if wildcards or shuffling make them too many to list.

    captions and options: those of each picture.
    """
    seen, rng = set(), np.random.default_rng(0)  # without a choice, draws change nothing
    for texts, chosen in zip(captions, options, strict=True):
        for text in texts:
            if _varies(text, chosen):
                return None
            seen.add(seen_caption(text, chosen, rng))
        if chosen["caption_dropout"]:
            seen.add("")
    return sorted(seen)


def _varies(text: str, options: Mapping[str, Any]) -> bool:
    if options["wildcards"] and any("|" in choice for choice in _WILDCARD.findall(text)):
        return True
    return bool(options["shuffle_tags"]) and len(_tags(text, options["tag_separator"])) > options["keep_tokens"] + 1


def _tags(text: str, separator: str) -> list[str]:
    return [tag for part in text.split(separator) if (tag := part.strip())]


def _fill_wildcards(text: str, rng: np.random.Generator) -> str:
    before = text
    while found := _WILDCARD.search(text):
        parts = found[1].split("|")
        text = text[:found.start()] + parts[rng.integers(len(parts))] + text[found.end():]
    return text if text == before else " ".join(text.split())  # an empty part must not leave two spaces
