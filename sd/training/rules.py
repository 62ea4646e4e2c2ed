"""Which fields of a config have an effect beside the others: one that has none is refused, never ignored in silence."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from typing import NamedTuple

from sd.adapters.kinds import KINDS
from sd.lora_files.embedding_files import file_name
from sd.training.loss import LOSSES, WEIGHTINGS
from sd.training.optim import OPTIMIZERS, PRECISIONS, PRODUCTS, SCHEDULES
from sd.training.relora import KEPT, KINDS_THAT_ADD, OPTIMIZERS_THAT_FORGET
from sd.training.watch.monitor import LOGS

SCALED = tuple(name for name, kind in KINDS.items() if kind.scaled)
SIZED = tuple(name for name, kind in KINDS.items() if kind.sized)
WITH_ALPHA = tuple(name for name, kind in KINDS.items() if kind.scaled or kind.bounded)
INITS = ("default", "pissa")

LORA = ("kind", "rank", "alpha", "dropout", "rank_dropout", "module_dropout", "dora", "targets", "lora_plus",
        "max_norm", "relora_every")
CAPTIONS = ("caption_dropout", "shuffle_tags", "prefix", "suffix", "trigger", "wildcards")
DIFFUSION = ("loss", "weighting", "zero_terminal_snr", "min_timestep", "max_timestep", "timestep_bias", "noise_offset",
             "pyramid_noise", "input_perturbation", "masks", "checkpointing", "compile")

# fields, whether they have an effect, and where they have
EFFECTS = (
    (LORA, lambda c: c.train == "lora", "train lora"),
    (("rank",), lambda c: c.kind in SIZED, "a kind that has ranks"),
    (("alpha",), lambda c: c.kind in WITH_ALPHA, "a kind that has a scale"),
    (("relora_warmup", "relora_save"), lambda c: c.relora_every, "relora_every"),
    (("relora_rank",), lambda c: c.relora_every and c.relora_save == "svd", "relora_every and relora_save svd"),
    (("unet", "text_encoder", *CAPTIONS, *DIFFUSION), lambda c: c.train != "vae", "a train other than vae"),
    (("unet",), lambda c: c.train != "words", "a train other than words"),
    (("kl_weight",), lambda c: c.train == "vae", "train vae"),
    (("text_learning_rate",), lambda c: c.text_encoder or c.new_words, "text_encoder or new_words"),
    (("word_learning_rate",), lambda c: c.new_words, "new_words"),
    (("bucket_min", "bucket_max", "bucket_step", "upscale"), lambda c: c.buckets, "buckets"),
    (("variants",), lambda c: c.crop == "random", "crop random"),
    (("keep_tokens",), lambda c: c.shuffle_tags, "shuffle_tags"),
    (("tag_separator",), lambda c: c.shuffle_tags or c.trigger, "shuffle_tags or trigger"),
    (("prior_weight",), lambda c: c.reg_data or c.data.endswith(".toml"), "reg_data"),
    (("cycles",), lambda c: c.schedule == "cosine_restarts", "schedule cosine_restarts"),
    (("power",), lambda c: c.schedule == "polynomial", "schedule polynomial"),
    (("betas",), lambda c: c.optimizer != "adafactor", "an optimizer other than adafactor"),
    (("huber_delta",), lambda c: c.loss != "mse", "loss huber or smooth_l1"),
    (("snr_gamma",), lambda c: c.weighting == "min_snr", "weighting min_snr"),
    (("sample_every", "sample_seed", "sample_steps", "sample_cfg"), lambda c: c.sample_prompts, "sample_prompts"),
)


def effect_rules(config) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, field, what is allowed): a field without effect must be left as it is."""
    for names, has_effect, where in EFFECTS:
        if has_effect(config):
            continue
        for name in names:
            field = type(config).__dataclass_fields__[name]
            plain = field.default if field.default is not MISSING else field.default_factory()
            yield getattr(config, name) == plain, name, f"{plain!r}, since it has an effect only with {where}"


def objective_rules(config) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, field, what is allowed) for the fields of a config that say what is minimised."""
    yield config.loss in LOSSES, "loss", ", ".join(LOSSES)
    yield config.weighting in WEIGHTINGS, "weighting", ", ".join(WEIGHTINGS)
    for field in ("huber_delta", "snr_gamma", "timestep_bias"):
        yield 0 < getattr(config, field) < math.inf, field, "a number above 0"
    for field in ("noise_offset", "pyramid_noise", "input_perturbation"):
        yield 0 <= getattr(config, field) <= 1, field, "0 to 1"
    yield config.min_timestep >= 0, "min_timestep", "0 or more"
    low, high = config.min_timestep, config.max_timestep
    yield high is None or high > low, "max_timestep", f"{low + 1} or more (the last t is below it)"


def optimizer_rules(config) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, field, what is allowed) for the fields of a config that say how it is minimised."""
    free, prodigy = config.optimizer == "schedule_free", config.optimizer == "prodigy"
    yield config.optimizer in OPTIMIZERS, "optimizer", ", ".join(OPTIMIZERS)
    yield config.schedule in SCHEDULES, "schedule", ", ".join(SCHEDULES)
    yield config.schedule == "constant" or not free, "schedule", "constant with schedule_free, which needs no other"
    yield not (free and config.ema), "ema", "0 with schedule_free, whose result is an average already"
    yield config.betas[0] > 0 or not free, "betas", "a first one above 0 with schedule_free"
    for field in ("learning_rate", "text_learning_rate"):
        rate = getattr(config, field)
        if prodigy:
            yield rate is None or 0.01 <= rate <= 10, field, "0.01 to 10 with prodigy, a factor of its estimate (usually 1)"
        else:
            yield rate is None or 0 < rate <= 0.1, field, "above 0, to 0.1 (a usual one is 1e-4 to 1e-3)"
    yield config.cycles >= 1, "cycles", "1 or more"
    for field, highest in (("power", 10), ("lora_plus", 100)):
        yield 0 < getattr(config, field) <= highest, field, f"above 0, to {highest}"
    yield 0 <= config.max_norm < math.inf, "max_norm", "0 (no limit) or more"
    yield config.train == "lora" or not config.max_norm, "max_norm", "0 unless a LoRA is trained"
    yield config.precision in PRECISIONS, "precision", ", ".join(PRECISIONS)


class NewWord(NamedTuple):
    """A word to learn. `vectors`: how many it has, None for one for each token of `text`, from which it starts."""

    word: str
    vectors: int | None
    text: str


def parse_word(text: str) -> NewWord | None:
    """WORD=text or WORD:VECTORS=text, the text optional; None for what is neither."""
    match = re.fullmatch(r"\s*([^=\s][^=]*?)\s*(?::\s*(\d{1,3}))?\s*(?:=(.*))?", text, re.S)
    return NewWord(match[1], match[2] and int(match[2]), (match[3] or "").strip()) if match else None


def word_rules(config) -> Iterable[tuple[bool, str, str]]:
    """(whether it holds, field, what is allowed) for the fields of new words."""
    words = [parse_word(text) for text in config.new_words]
    yield None not in words, "new_words", "WORD=text or WORD:VECTORS=text, such as '<toy>=a small toy' or '<toy>:4=toy'"
    words = [word for word in words if word]
    yield all(word.vectors is None or 1 <= word.vectors <= 75 for word in words), "new_words", "1 to 75 vectors for a word"
    files = [file_name(word.word).lower() for word in words]
    yield len(set(files)) == len(files), "new_words", "words that differ in letters, digits, _, ., + or -"
    taken = {f"{name.lower()}.safetensors" for name in ("model", "state", config.name)}
    yield not taken & set(files), "new_words", f"words whose files are not called {', '.join(sorted(taken))}"
    yield config.train != "vae" or not words, "new_words", "none, where the autoencoder is trained"
    yield config.train != "words" or bool(words), "new_words", "one or more, where train is words"
    yield config.train != "words" or not config.text_encoder, "text_encoder", "off, where train is words"
    yield config.word_learning_rate is None or config.word_learning_rate >= 0, "word_learning_rate", "0 or more"


def monitor_rules(config) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, field, what is allowed) for the fields of a config that say what is watched."""
    yield 0 <= config.validation < 1, "validation", "0 <= validation < 1, a share of the pictures"
    yield not (config.validation and config.validation_data), "validation", "0 where validation_data is given"
    yield config.sample_steps <= 1000, "sample_steps", "1 to 1000"
    for field in ("validate_every", "sample_every", "sample_steps"):
        yield getattr(config, field) >= 1, field, "1 or more"
    yield 0 <= config.sample_seed < 2**62, "sample_seed", "0 to 2^62"
    yield math.isfinite(config.sample_cfg), "sample_cfg", "a finite number"
    yield config.train != "vae" or not config.sample_prompts, "sample_prompts", "none with train vae, which learns no prompts"
    yield len(set(config.sample_prompts)) == len(config.sample_prompts), "sample_prompts", "different ones"
    yield set(config.log_to) <= set(LOGS), "log_to", ", ".join(LOGS)
    for name in set(config.log_to) & set(LOGS):
        yield importlib.util.find_spec(name) is not None, "log_to", f"what is installed; run: pip install {name}"


def lora_rules(config) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, field, what is allowed) for the fields of a config that say what a LoRA is."""
    kind = KINDS.get(config.kind)
    yield kind is not None, "kind", ", ".join(KINDS)
    if kind is None:
        return
    yield config.init in INITS, "init", ", ".join(INITS)
    for field, plain in (("kind", "lora"), ("rslora", False), ("quantize", "none"), ("init", "default"), ("block_ranks", ()),
                         ("from_lora", None)):
        yield config.train == "lora" or getattr(config, field) == plain, "train", f"lora, where {field} is given"
    if config.from_lora is not None:
        for field in ("kind", "rank", "alpha", "rslora", "dora", "targets", "init", "block_ranks"):
            plain = type(config).__dataclass_fields__[field].default
            yield getattr(config, field) == plain, field, "left out with from_lora, whose file says it"
        return
    yield config.kind in SCALED or not config.rslora, "rslora", f"off unless kind is one of {', '.join(SCALED)}"
    yield config.kind in SIZED or not config.block_ranks, "block_ranks", f"left out unless kind is one of {', '.join(SIZED)}"
    yield kind.takes_dora or not config.dora, "dora", f"off with kind {config.kind}, which has no magnitude"
    yield kind.drops_ranks or not config.rank_dropout, "rank_dropout", f"0 with kind {config.kind}, which has no ranks to drop"
    yield not (config.dora and config.rank_dropout), "rank_dropout", "0 with dora, whose norm is that of the whole change"
    yield kind.is_product or not config.max_norm, "max_norm", f"0 unless kind is one of {', '.join(PRODUCTS)}"
    if config.init == "pissa":
        yield config.kind == "lora", "kind", "lora with init pissa"
        yield config.alpha > 0, "alpha", "above 0 with init pissa"
        yield not config.max_norm, "max_norm", "0 with init pissa, whose factors are not those of the change"


def relora_rules(config) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, field, what is allowed) for the fields of a config that say how a LoRA restarts."""
    yield config.relora_every >= 0, "relora_every", "0 (never) or more steps"
    yield config.relora_save in KEPT, "relora_save", ", ".join(KEPT)
    yield config.relora_rank is None or config.relora_rank >= 1, "relora_rank", "1 or more"
    yield config.relora_warmup >= 0, "relora_warmup", "0 or more steps"
    if config.relora_every:
        yield config.train == "lora", "relora_every", "0 unless a LoRA is trained"
        yield config.kind in KINDS_THAT_ADD, "kind", f"{', '.join(KINDS_THAT_ADD)} with relora_every"
        yield not config.dora, "dora", "off with relora_every: the magnitude is that of one whole change"
        yield config.init == "default", "init", "default with relora_every, which begins anew from a change of 0"
        yield not config.ema, "ema", "0 with relora_every: no average goes across a restart"
        yield not config.max_norm, "max_norm", "0 with relora_every, which adds changes up"
        yield (config.optimizer in OPTIMIZERS_THAT_FORGET, "optimizer",
               f"{', '.join(OPTIMIZERS_THAT_FORGET)} with relora_every, which makes it begin anew")


def shard_rules(config) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, field, what is allowed) for the fields of a config that do not go with every `shard`."""
    for field, allowed in {"train": ("full", "vae"), "optimizer": ("adamw", "lion", "schedule_free"), "compile": (False,),
                           "new_words": ((),)}.items():
        yield not config.shard or getattr(config, field) in allowed, field, f"{', '.join(map(str, allowed))} with shard"
