"""Every rule of a TrainConfig: the values that an option may have, alone and beside the others.

The allowed names of an option are in its type, a Literal of config.py; nothing here imports the code that implements them,
apart from the facts about kinds of adapter, which are looked up last: `--help` and most mistakes need no torch.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

from sd.training.errors import TrainError

OPTIMIZERS_THAT_FORGET = ("adamw", "adamw8bit", "adafactor", "lion")  # that can drop a parameter's state in mid-run

Rule = tuple[bool, str, str]  # (whether it holds, field, what is allowed)


def check(config) -> None:
    """Raises TrainError for the first option of a TrainConfig that breaks a rule."""
    def check_all(rules: Iterator[Rule]) -> None:
        for holds, field, allowed in rules:
            if not holds:
                raise TrainError(f"{field} is {getattr(config, field)!r}; allowed: {allowed}")

    check_all(names(config))
    check_all(values(config))
    for rules in TOPICS:
        check_all(rules(config))
    if config.train != "vae" and not (config.unet or config.text_encoder):
        raise TrainError("nothing is trained: unet and text_encoder are both off")
    check_all(effects(config))


def kinds_with(*facts: str) -> tuple[str, ...]:
    """The kinds of adapter that have at least one of these facts (attributes of Adapter)."""
    from sd.adapters.kinds import KINDS
    return tuple(name for name, kind in KINDS.items() if any(getattr(kind, fact) for fact in facts))


# ---- one option by itself --------------------------------------------------------------------------------------------

def allowed_names(config_class: type) -> dict[str, tuple[str, ...]]:
    """Field -> the values of its Literal, or of the Literal of its tuple's items."""
    found = {}
    for field, hint in get_type_hints(config_class).items():
        item = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if get_origin(item) is Literal:
            found[field] = get_args(item)
    return found


def names(config) -> Iterator[Rule]:
    """Options whose values are one or several of a few names."""
    for field, allowed in allowed_names(type(config)).items():
        value = getattr(config, field)
        yield all(v in allowed for v in (value if isinstance(value, tuple) else (value,))), field, ", ".join(allowed)


# (fields, check of a value, what is allowed)
VALUES = (
    (("steps", "batch_size", "accumulate", "save_every", "rank", "cycles", "validate_every", "sample_every", "sample_steps"),
     lambda v: v >= 1, "1 or more"),
    (("caption_dropout", "dropout", "rank_dropout", "module_dropout", "ema"), lambda v: 0 <= v < 1, "0 <= {field} < 1"),
    (("warmup", "weight_decay", "clip_norm", "kl_weight", "seed", "prior_weight"), lambda v: 0 <= v < math.inf, "0 or more"),
    (("huber_delta", "snr_gamma", "timestep_bias"), lambda v: 0 < v < math.inf, "a number above 0"),
    (("noise_offset", "pyramid_noise", "input_perturbation"), lambda v: 0 <= v <= 1, "0 to 1"),
    (("min_timestep", "keep_tokens"), lambda v: v >= 0, "0 or more"),
    (("power",), lambda v: 0 < v <= 10, "above 0, to 10"),
    (("lora_plus",), lambda v: 0 < v <= 100, "above 0, to 100"),
    (("max_norm",), lambda v: 0 <= v < math.inf, "0 (no limit) or more"),
    (("word_learning_rate",), lambda v: v is None or v >= 0, "0 or more"),
    (("betas",), lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v), "two numbers of 0 <= beta < 1"),
    (("batch_size",), lambda v: v <= 4096, "1 to 4096"),
    (("weight_decay",), lambda v: v <= 10, "0 to 10"),
    (("alpha",), lambda v: 0 < abs(v) <= 1e4, "a number other than 0, to 10000"),
    (("size",), lambda v: v is None or v >= 8, "8 or more pixels"),
    (("variants",), lambda v: 1 <= v <= 1000, "1 to 1000"),
    (("tag_separator",), lambda v: v != "", "one character or more"),
    (("validation",), lambda v: 0 <= v < 1, "0 <= validation < 1, a share of the pictures"),
    (("sample_steps",), lambda v: v <= 1000, "1 to 1000"),
    (("sample_seed",), lambda v: 0 <= v < 2**62, "0 to 2^62"),
    (("sample_cfg",), math.isfinite, "a finite number"),
    (("sample_prompts",), lambda v: len(set(v)) == len(v), "different ones"),
    (("relora_every",), lambda v: v >= 0, "0 (never) or more steps"),
    (("relora_warmup",), lambda v: v >= 0, "0 or more steps"),
    (("relora_rank",), lambda v: v is None or v >= 1, "1 or more"),
    (("out",), bool, "a folder"),
    (("name",), lambda v: 0 < len(v) <= 100 and Path(v).name == v and v not in ("..", "state")
     and Path(v).suffix not in (".safetensors", ".pt"),
     "a file's name of up to 100 letters, without its ending, and not 'state'"),
)


def values(config) -> Iterator[Rule]:
    """Options with limited values."""
    for fields, is_allowed, allowed in VALUES:
        for field in fields:
            yield is_allowed(getattr(config, field)), field, allowed.format(field=field)


# ---- options beside each other ---------------------------------------------------------------------------------------

def objective(config) -> Iterator[Rule]:
    low, high = config.min_timestep, config.max_timestep
    yield high is None or high > low, "max_timestep", f"{low + 1} or more (the last t is below it)"


def optimization(config) -> Iterator[Rule]:
    free, prodigy = config.optimizer == "schedule_free", config.optimizer == "prodigy"
    yield config.schedule == "constant" or not free, "schedule", "constant with schedule_free, which needs no other"
    yield not (free and config.ema), "ema", "0 with schedule_free, whose result is an average already"
    yield config.betas[0] > 0 or not free, "betas", "a first one above 0 with schedule_free"
    for field in ("learning_rate", "text_learning_rate"):
        rate = getattr(config, field)
        if prodigy:
            yield rate is None or 0.01 <= rate <= 10, field, "0.01 to 10 with prodigy, a factor of its estimate (usually 1)"
        else:
            yield rate is None or 0 < rate <= 0.1, field, "above 0, to 0.1 (a usual one is 1e-4 to 1e-3)"
    yield config.train == "lora" or not config.max_norm, "max_norm", "0 unless a LoRA is trained"


class NewWord(NamedTuple):
    """A word to learn, with its number of `vectors`; None: one for each token of the initial `text`."""

    word: str
    vectors: int | None
    text: str


def parse_word(text: str) -> NewWord | None:
    """Parse WORD=text or WORD:VECTORS=text, where the text is optional; None if it is neither."""
    match = re.fullmatch(r"\s*([^=\s][^=]*?)\s*(?::\s*(\d{1,3}))?\s*(?:=(.*))?", text, re.S)
    return NewWord(match[1], int(match[2]) if match[2] else None, (match[3] or "").strip()) if match else None


def words_of(config) -> list[NewWord]:
    """The words of `new_words` that can be parsed."""
    return [word for text in config.new_words if (word := parse_word(text))]


def file_name(word: str) -> str:
    """The name of the file in which a word is saved: <cat-toy> -> cat-toy.safetensors."""
    return (re.sub(r"[^\w.+-]+", "-", word).strip("-.") or "word") + ".safetensors"


def new_words(config) -> Iterator[Rule]:
    words = words_of(config)
    yield (len(words) == len(config.new_words), "new_words",
           "WORD=text or WORD:VECTORS=text, such as '<toy>=a small toy' or '<toy>:4=toy'")
    yield all(word.vectors is None or 1 <= word.vectors <= 75 for word in words), "new_words", "1 to 75 vectors for a word"
    files = [file_name(word.word).lower() for word in words]
    yield len(set(files)) == len(files), "new_words", "words that differ in letters, digits, _, ., + or -"
    taken = {f"{name.lower()}.safetensors" for name in ("model", "state", config.name)}
    yield not taken & set(files), "new_words", f"words whose files are not called {', '.join(sorted(taken))}"
    yield config.train != "vae" or not words, "new_words", "none, where the autoencoder is trained"
    yield config.train != "words" or bool(words), "new_words", "one or more, where train is words"
    yield config.train != "words" or not config.text_encoder, "text_encoder", "off, where train is words"


def monitoring(config) -> Iterator[Rule]:
    yield not (config.validation and config.validation_data), "validation", "0 where validation_data is given"
    yield config.train != "vae" or not config.sample_prompts, "sample_prompts", "none with train vae, which learns no prompts"
    for name in config.log_to:
        yield importlib.util.find_spec(name) is not None, "log_to", f"what is installed; run: pip install {name}"


def lora(config) -> Iterator[Rule]:
    for field in ("kind", "rslora", "quantize", "init", "block_ranks", "from_lora"):
        yield config.train == "lora" or is_default(config, field), "train", f"lora, where {field} is given"
    if config.from_lora is not None:
        for field in ("kind", "rank", "alpha", "rslora", "dora", "targets", "init", "block_ranks"):
            yield is_default(config, field), field, "left out with from_lora, whose file says it"
        return
    from sd.adapters.kinds import KINDS
    kind = KINDS[config.kind]
    yield kind.scaled or not config.rslora, "rslora", f"off unless kind is one of {', '.join(kinds_with('scaled'))}"
    yield (kind.sized or not config.block_ranks, "block_ranks",
           f"left out unless kind is one of {', '.join(kinds_with('sized'))}")
    yield kind.takes_dora or not config.dora, "dora", f"off with kind {config.kind}, which has no magnitude"
    yield kind.drops_ranks or not config.rank_dropout, "rank_dropout", f"0 with kind {config.kind}, which has no ranks to drop"
    yield not (config.dora and config.rank_dropout), "rank_dropout", "0 with dora, whose norm is that of the whole change"
    products = ", ".join(sorted(kinds_with("is_product")))
    yield kind.is_product or not config.max_norm, "max_norm", f"0 unless kind is one of {products}"
    if config.init == "pissa":
        yield config.kind == "lora", "kind", "lora with init pissa"
        yield config.alpha > 0, "alpha", "above 0 with init pissa"
        yield not config.max_norm, "max_norm", "0 with init pissa, whose factors are not those of the change"


def relora(config) -> Iterator[Rule]:
    if not config.relora_every:
        return
    yield config.train == "lora", "relora_every", "0 unless a LoRA is trained"
    adding = kinds_with("adds")
    yield config.kind in adding, "kind", f"{', '.join(adding)} with relora_every"
    yield not config.dora, "dora", "off with relora_every: the magnitude is that of one whole change"
    yield config.init == "default", "init", "default with relora_every, which begins anew from a change of 0"
    yield not config.ema, "ema", "0 with relora_every: no average goes across a restart"
    yield not config.max_norm, "max_norm", "0 with relora_every, which adds changes up"
    yield (config.optimizer in OPTIMIZERS_THAT_FORGET, "optimizer",
           f"{', '.join(OPTIMIZERS_THAT_FORGET)} with relora_every, which makes it begin anew")


def sharding(config) -> Iterator[Rule]:
    for field, allowed in {"train": ("full", "vae"), "optimizer": ("adamw", "lion", "schedule_free"), "compile": (False,),
                           "new_words": ((),)}.items():
        yield not config.shard or getattr(config, field) in allowed, field, f"{', '.join(map(str, allowed))} with shard"


TOPICS = (objective, optimization, new_words, monitoring, lora, relora, sharding)


# ---- options without effect ------------------------------------------------------------------------------------------

LORA = ("kind", "rank", "alpha", "dropout", "rank_dropout", "module_dropout", "dora", "targets", "lora_plus",
        "max_norm", "relora_every")
CAPTIONS = ("caption_dropout", "shuffle_tags", "prefix", "suffix", "trigger", "wildcards")
DIFFUSION = ("loss", "weighting", "zero_terminal_snr", "min_timestep", "max_timestep", "timestep_bias", "noise_offset",
             "pyramid_noise", "input_perturbation", "masks", "checkpointing", "compile")

# (fields, whether they have an effect, where they have one)
EFFECTS = (
    (LORA, lambda c: c.train == "lora", "train lora"),
    (("rank",), lambda c: c.kind in kinds_with("sized"), "a kind that has ranks"),
    (("alpha",), lambda c: c.kind in kinds_with("scaled", "bounded"), "a kind that has a scale"),
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


def effects(config) -> Iterator[Rule]:
    """An option that the others leave without effect must stay at its default, so that none is silently ignored."""
    for fields, has_effect, where in EFFECTS:
        for field in () if has_effect(config) else fields:
            yield is_default(config, field), field, f"{default(config, field)!r}, since it has an effect only with {where}"


def default(config, field: str) -> object:
    return type(config).__dataclass_fields__[field].default


def is_default(config, field: str) -> bool:
    return getattr(config, field) == default(config, field)
