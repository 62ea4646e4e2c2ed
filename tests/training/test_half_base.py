"""The frozen base is rounded once: no bit of a training differs from autocast's own rounding at every use."""

import importlib
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from sd.adapters.kinds import KINDS
from sd.lora import lora_layers, lora_state
from sd.training import train
from sd.training.half_base import HalfBase, half_base
from sd.training.trained import training
from sd.training.watch.estimate import estimate
from tests.training.tiny import LORA, changed, copy_of, files, held_out, pictures

work = importlib.import_module("sd.training.work")

SHORT = changed(LORA, steps=2, accumulate=1, precision="bf16", dropout=0.0, rank_dropout=0.0, module_dropout=0.0,
                targets=("q_proj", "(conv|fc)1"))
WATCHED = replace(SHORT, steps=3, validate_every=2, sample_every=2, sample_prompts=("number 1",), sample_steps=2,
                  sample_cfg=2.0)
RUNS = {
    **{kind: changed(SHORT, kind=kind, rank=8 if kind == "boft" else 2) for kind in KINDS},
    "dora": replace(SHORT, dora=True), "pissa": replace(SHORT, init="pissa"), "unet": replace(SHORT, text_encoder=False),
    "dropouts": replace(SHORT, dropout=0.3, rank_dropout=0.2, module_dropout=0.1), "fp16": replace(SHORT, precision="fp16"),
    "relora": replace(SHORT, relora_every=2, ema=0.0), "nf4": replace(SHORT, quantize="nf4"),
    "max norm": replace(SHORT, max_norm=0.05),
    "text alone": replace(SHORT, unet=False), "full": changed(SHORT, train="full"), "vae": changed(SHORT, train="vae"),
    "full text": changed(SHORT, train="full", unet=False),
    "watched": WATCHED, "watched fp16": replace(WATCHED, precision="fp16"),
    "words": changed(SHORT, train="words", text_encoder=False, new_words=("<toy>=number",), prefix="<toy>"),
}


def weights(models):
    return {f"{key}.{name}": p for key, m in models.items() for name, p in m.named_parameters() if ".adapters." not in name}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_bit_for_bit_that_with_autocast_alone(untrained, tmp_path, name, monkeypatch):
    config, seen = RUNS[name], name.startswith("watched")
    for side in ("rounded", "autocast"):
        with monkeypatch.context() as patch:
            if side == "autocast":
                patch.setattr(HalfBase, "round", lambda self: None)
            config = replace(config, out=str(tmp_path / side))
            train(config, copy_of(untrained), pictures(), held_out=held_out() if seen else None)
    rounded, autocast = files(tmp_path / "rounded"), files(tmp_path / "autocast")
    assert rounded == autocast and "loss.png" in rounded and (not seen or any("samples/" in file for file in rounded))


@pytest.mark.parametrize("change", [{}, {"text_encoder": False}, {"kind": "oft"}, {"dora": True}, {"precision": "fp16"}],
                         ids=str)
def test_in_a_step_products_have_half_weights_and_what_is_trained_or_read_is_fp32(models, tmp_path, change, monkeypatch):
    config = changed(SHORT, **change, out=str(tmp_path))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    original, seen = work.clip_gradients, []

    def look(parameters, most):
        parameters = list(parameters)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
        read = [layer for layer in lora_layers(models).values() if layer.adapters] if change.keys() & {"kind", "dora"} else []
        for key, network in models.items():
            idle = key in ("encoder", "decoder") or key == "clip" and not config.text_encoder
            for layer in network.modules():
                rounds = isinstance(layer, (nn.Linear, nn.Conv2d)) and not idle and layer is not models["diffusion"].conv_in
                for p in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
                    assert p is None or p.dtype == (half if rounds and layer not in read else torch.float32)
        seen.append(bool(read))
        return original(parameters, most)

    monkeypatch.setattr(work, "clip_gradients", look)
    train(config, models, pictures())
    assert len(seen) == config.steps
    assert {t.dtype for w in lora_state(models, "lora").values() for t in w.tensors.values()} == {torch.float32}


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_full_base_is_the_same_memory_after_a_run_and_after_an_error(models, tmp_path, precision, error, monkeypatch):
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in weights(models).items()}
    config = replace(SHORT, precision=precision, out=str(tmp_path))
    if error is None:
        train(config, models, pictures())
    else:
        def fails(*args, **options):
            assert models["diffusion"].conv_out.weight.dtype != torch.float32
            raise error("boom")
        monkeypatch.setattr(work, "update_ema", fails)
        with pytest.raises(error, match="boom"):
            train(config, models, pictures())
    after = weights(models)
    assert after.keys() == before.keys()
    for name, (p, address, value) in before.items():
        assert after[name] is p and p.data_ptr() == address and torch.equal(p, value), name


def test_memory_that_ends_while_weights_are_rounded_leaves_the_full_base(models, monkeypatch):
    before, original, left = {name: p.detach().clone() for name, p in weights(models).items()}, torch.Tensor.to, [9]

    def short(self, *args, **options):
        if args == (torch.bfloat16,):
            left[0] -= 1
            if not left[0]:
                raise MemoryError
        return original(self, *args, **options)

    with training(SHORT, models), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", short)
        with pytest.raises(MemoryError), half_base(SHORT, models):
            pass
    assert all(torch.equal(p, before[name]) for name, p in weights(models).items())


def test_the_estimate_counts_what_stays_on_the_device(models, monkeypatch):
    config = replace(SHORT, text_encoder=False)
    with training(config, models) as parameters:
        with half_base(config, models) as base:
            rounded = sum(p.numel() for p in base.weights)
            assert rounded > 0.9 * sum(p.numel() for p in models["diffusion"].parameters() if not p.requires_grad)
            assert base.beside == 4 * rounded
        with half_base(replace(config, checkpointing=True), models) as base:
            assert not base.weights  # it would take more than the copies of one block
        bf16, fp32 = (estimate(replace(config, precision=precision), models, pictures(), parameters, steps=1, compare=False)
                      for precision in ("bf16", "fp32"))
        assert bf16.weights == fp32.weights + 2 * rounded
        monkeypatch.setattr(HalfBase, "beside", 0)  # as on a GPU
        there = estimate(config, models, pictures(), parameters, steps=1, compare=False)
        assert there.weights == fp32.weights - 2 * rounded
        monkeypatch.setattr(HalfBase, "round", lambda self: None)
        every_use = estimate(config, models, pictures(), parameters, steps=1, compare=False)
        assert there.activations < every_use.activations - rounded  # backward keeps no rounded copies of weights


def test_a_run_that_goes_on_with_other_threads_says_so_and_one_with_the_same_says_nothing(models, untrained, tmp_path, caplog):
    config = replace(SHORT, schedule="constant", out=str(tmp_path), precision="fp32")
    train(config, models, pictures())
    with caplog.at_level(logging.WARNING, "sd"):
        train(replace(config, steps=3), copy_of(untrained), pictures())
        assert not caplog.text
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(threads + 1)
            train(replace(config, steps=4), copy_of(untrained), pictures())
        finally:
            torch.set_num_threads(threads)
    assert f"made with threads {threads}, now {threads + 1}; it goes on, but not to the same last bits" in caplog.text
