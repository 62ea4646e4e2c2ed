"""Each way to train, as a whole run: what is stopped and started again ends with the bits of an unbroken run."""

import importlib
from dataclasses import replace

import pytest
import torch

from sd.lora import get_lora_parameters
from sd.model_loader import new_models
from sd.training import train
from sd.training.optim import OPTIMIZERS
from tests.training.test_resume import LORA, files, stopped
from tests.training.tiny import SMALL, copy_of, metrics, pictures

CASES = {name: {"optimizer": name} for name in OPTIMIZERS} | {
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule_free": {"optimizer": "schedule_free", "schedule": "constant", "ema": 0.0},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "objective": {"loss": "huber", "weighting": "min_snr", "noise_offset": 0.1, "pyramid_noise": 0.3,
                  "input_perturbation": 0.1, "min_timestep": 10, "max_timestep": 900, "timestep_bias": 1.5},
    "deterministic": {"deterministic": True},
    "rates": {"schedule": "cosine_restarts", "cycles": 2, "lora_plus": 4.0, "block_rates": ("mid_block=0.5",),
              "max_norm": 0.05, "text_learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def untrained():
    return new_models(SMALL, seed=1)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_ends_as_if_it_had_never_been(tmp_path, untrained, case, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = replace(LORA, **CASES[case])
    train(replace(config, out=str(whole)), copy_of(untrained), pictures())
    stopped(replace(config, out=str(broken)), copy_of(untrained), monkeypatch, 5)
    train(replace(config, out=str(broken)), copy_of(untrained), pictures())
    for name, content in files(whole).items():
        assert files(broken)[name] == content, name
    assert any(row["loss"] is not None and not row["skipped"] for row in metrics(whole))


def test_a_compiled_unet_trains_as_the_plain_one_does_and_is_plain_again_afterwards(tmp_path, untrained, monkeypatch):
    original, compiled = torch.nn.Module.compile, []

    def traced(self, **options):
        compiled.append(self)
        original(self, backend="eager", **options)  # the capture is what may go wrong; code takes minutes to make

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    models, plain = copy_of(untrained), copy_of(untrained)
    config = replace(LORA, steps=2, text_encoder=False, dropout=0.0, rank_dropout=0.0, module_dropout=0.0)
    train(replace(config, out=str(tmp_path / "a"), compile=True), models, pictures())
    train(replace(config, out=str(tmp_path / "b")), plain, pictures())
    assert compiled == [models["diffusion"]] and models["diffusion"]._compiled_call_impl is None
    for a, b in zip(get_lora_parameters(models), get_lora_parameters(plain)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_deterministic_kernels_are_asked_for_while_the_training_lasts(tmp_path, untrained, monkeypatch):
    seen, before = [], torch.are_deterministic_algorithms_enabled()
    loop = importlib.import_module("sd.training.loop")
    monkeypatch.setattr(loop, "update_ema", lambda *args: seen.append(torch.are_deterministic_algorithms_enabled()))
    train(replace(LORA, steps=2, out=str(tmp_path), deterministic=True), copy_of(untrained), pictures())
    assert seen == [True, True] and torch.are_deterministic_algorithms_enabled() == before
