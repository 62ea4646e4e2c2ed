"""Which fields of a config have an effect beside the others: one that has none is refused, never ignored in silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING

LORA = ("kind", "rank", "alpha", "dropout", "rank_dropout", "module_dropout", "dora", "targets", "lora_plus",
        "max_norm", "relora_every")
CAPTIONS = ("caption_dropout", "shuffle_tags", "prefix", "suffix", "trigger", "wildcards")
DIFFUSION = ("loss", "weighting", "zero_terminal_snr", "min_timestep", "max_timestep", "timestep_bias", "noise_offset",
             "pyramid_noise", "input_perturbation", "masks", "checkpointing", "compile")

# fields, whether they have an effect, and where they have
EFFECTS = (
    (LORA, lambda c: c.train == "lora", "train lora"),
    (("rank",), lambda c: c.kind not in ("full", "ia3"), "a kind that has ranks"),
    (("alpha",), lambda c: c.kind not in ("full", "ia3"), "a kind that has a scale"),
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
