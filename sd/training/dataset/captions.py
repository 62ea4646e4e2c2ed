"""A caption as the text encoder sees it: wildcards, shuffled tags, trigger, prefix and suffix. Pure functions of a caption
and a generator.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

# Every option with its default; a source of several (sd/training/sources.py) may have values of its own.
CAPTION_OPTIONS = {"caption_dropout": 0.0, "shuffle_tags": False, "keep_tokens": 0, "tag_separator": ",", "prefix": "",
                   "suffix": "", "trigger": "", "wildcards": False}
_WILDCARD = re.compile(r"\{([^{}]*)\}")  # an innermost one


def caption_options(config, own: Mapping[str, object] = {}) -> dict[str, object]:  # noqa: B006 (it is only read)
    """The options in force: a source's own, else the config's, else the default."""
    return {name: own.get(name, getattr(config, name, default)) for name, default in CAPTION_OPTIONS.items()}


def seen_caption(caption: str, options: Mapping[str, object], rng: np.random.Generator) -> str:
    """`caption` with all options but dropout, in this order; with the defaults it is the caption, to the letter.

    wildcards: each {a|b|c} becomes one of its parts, inner ones first. shuffle_tags: the tags between separators change
    places, all but the first `keep_tokens`. trigger: a tag in front, unless the caption has the word. prefix and suffix:
    around all of it, as they are, with a space between.
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


def fixed_captions(captions: Iterable[Iterable[str]], options: Iterable[Mapping[str, object]]) -> list[str] | None:
    """All texts that can ever be seen, sorted; None where wildcards or shuffling make each use a text of its own.

    captions: those of each picture; options: of each picture.
    """
    seen = set()
    for texts, chosen in zip(captions, options, strict=True):
        for text in texts:
            if _varies(text, chosen):
                return None
            seen.add(seen_caption(text, chosen, np.random.default_rng(0)))
        if chosen["caption_dropout"]:
            seen.add("")
    return sorted(seen)


def _varies(text: str, options: Mapping[str, object]) -> bool:
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
    return text if text == before else " ".join(text.split())  # an empty part leaves no second space
