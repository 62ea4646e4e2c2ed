"""Options with values that are not allowed, and options without effect beside the others, are refused."""

from dataclasses import replace

import pytest

from sd.adapters.kinds import KINDS
from sd.adapters.quant import QUANTIZERS
from sd.training import TrainConfig, TrainError
from sd.training.loss import LOSSES, WEIGHTINGS
from sd.training.optim import OPTIMIZERS, PRECISIONS, SCHEDULES
from sd.training.rules import EFFECTS, VALUES, allowed_names
from sd.training.watch.monitor import LOGS

NAMES = allowed_names(TrainConfig)
TABLES = {"kind": KINDS, "quantize": ("none", *QUANTIZERS), "optimizer": OPTIMIZERS, "schedule": SCHEDULES,
          "precision": PRECISIONS, "loss": LOSSES, "weighting": WEIGHTINGS, "log_to": LOGS}


@pytest.mark.parametrize("field", TABLES)
def test_what_is_implemented_is_what_the_option_s_type_allows(field):
    assert sorted(TABLES[field]) == sorted(NAMES[field])


def test_the_options_without_a_table_are_these():
    assert set(NAMES) - set(TABLES) == {"crop", "train", "init", "relora_save"}


@pytest.mark.parametrize("field", NAMES)
def test_a_name_that_the_type_does_not_have_is_refused_with_all_that_it_has(field):
    with pytest.raises(TrainError, match=f"^{field} is .*other.*; allowed: {', '.join(NAMES[field])}$"):
        TrainConfig(**{field: ("other",) if field == "log_to" else "other"})


def test_every_default_keeps_the_rule_of_its_field():
    for fields, is_allowed, _ in VALUES:
        assert all(is_allowed(getattr(TrainConfig(), field)) for field in fields), fields
    assert replace(TrainConfig()) == TrainConfig()


@pytest.mark.parametrize("change, sentence", [
    ({"train": "full", "rank": 8}, "rank is 8; allowed: 4, since it has an effect only with train lora"),
    ({"train": "full", "dora": True}, "dora is True; allowed: False, since .* train lora"),
    ({"train": "vae", "caption_dropout": 0.5}, "caption_dropout is 0.5; allowed: 0.1, since .* a train other than vae"),
    ({"train": "vae", "weighting": "min_snr"}, "weighting is 'min_snr'; .* a train other than vae"),
    ({"kind": "ia3", "rank": 8}, "rank is 8; .* a kind that has ranks"),
    ({"bucket_min": 128}, "bucket_min is 128; .* buckets"), ({"upscale": False}, "upscale is False; .* buckets"),
    ({"keep_tokens": 1}, "keep_tokens is 1; .* shuffle_tags"),
    ({"relora_save": "svd"}, "relora_save is 'svd'; .* relora_every"),
    ({"relora_every": 10, "relora_rank": 8}, "relora_rank is 8; .* relora_every and relora_save svd"),
    ({"snr_gamma": 1.0}, "snr_gamma is 1.0; .* weighting min_snr"),
    ({"huber_delta": 1.0}, "huber_delta is 1.0; .* huber or smooth_l1"),
    ({"cycles": 2, "schedule": "cosine"}, "cycles is 2; .* schedule cosine_restarts"),
    ({"text_learning_rate": 1e-4}, "text_learning_rate is 0.0001; .* text_encoder or new_words"),
    ({"betas": (0.8, 0.9), "optimizer": "adafactor"}, "betas is .*; .* an optimizer other than adafactor"),
    ({"variants": 3}, "variants is 3; .* crop random"), ({"sample_every": 10}, "sample_every is 10; .* sample_prompts")])
def test_an_option_without_effect_beside_the_others_is_refused(change, sentence):
    with pytest.raises(TrainError, match=sentence):
        TrainConfig(**change)


def test_every_field_of_the_table_is_an_option_and_has_an_effect_somewhere():
    for names, has_effect, _ in EFFECTS:
        for name in names:
            getattr(TrainConfig(), name)
        cases = [TrainConfig(), TrainConfig(buckets=True, reg_data="x", sample_prompts=("a",), shuffle_tags=True, trigger="t",
                                            text_encoder=True, new_words=("a",), schedule="cosine_restarts", loss="huber",
                                            weighting="min_snr", relora_every=5, relora_save="svd", crop="random"),
                 TrainConfig(train="vae"), TrainConfig(schedule="polynomial")]
        assert any(has_effect(config) for config in cases), names
