"""A compiled UNet, and deterministic kernels, in whole runs."""

import importlib
from dataclasses import replace

import torch

from sd.lora import get_lora_parameters
from sd.training import train
from tests.training.tiny import LORA, copy_of, pictures


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
    work = importlib.import_module("sd.training.work")
    monkeypatch.setattr(work, "update_ema", lambda *args: seen.append(torch.are_deterministic_algorithms_enabled()))
    train(replace(LORA, steps=2, out=str(tmp_path), deterministic=True), copy_of(untrained), pictures())
    assert seen == [True, True] and torch.are_deterministic_algorithms_enabled() == before
