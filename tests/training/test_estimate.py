"""The estimate against what torch's allocator really gave, and a dry run that shows all and leaves nothing behind."""

import importlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from sd.adapters.quant import base_bytes, quantize_base
from sd.lora import adapter_names
from sd.training import PictureSet, TrainConfig, train
from sd.training.optim import OPTIMIZERS, make_optimizer
from sd.training.trained import training
from sd.training.watch.estimate import duration, estimate, one_step, optimizer_bytes, peak_bytes
from tests.training.tiny import changed, pictures

measure = importlib.import_module("sd.training.watch.estimate")

LORA = TrainConfig(rank=2, alpha=3.0, batch_size=4, progress=False, targets=("kohya",))


@pytest.fixture
def quick(monkeypatch):
    """Without the count of bytes, which other tests compare."""
    monkeypatch.setattr(measure, "peak_bytes", lambda models, step, **how: 3_000_000)


def allocated(step, folder: Path) -> int:
    """Most bytes that the CPU's allocator gave out at a time during `step`, from its own record of each."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    record.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return int(max(np.cumsum([e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])])))


@pytest.mark.parametrize("change, error", [
    ({"checkpointing": True, "dropout": 0.2, "module_dropout": 0.1}, 0.03), ({"train": "full", "text_encoder": True}, 0.03),
    ({"quantize": "int8"}, 0.03), ({"precision": "bf16", "text_encoder": True}, 0.06),  # without bf16 in hardware: buffers
    ({"train": "vae"}, 0.1)],  # large convolutions, which have buffers of their own
    ids=["checkpointing", "full", "int8", "bf16", "vae"])
def test_the_peak_of_a_step_is_what_the_allocator_gave(tmp_path, models, change, error):
    config = changed(LORA, **change)
    if config.quantize != "none":
        quantize_base(models, config.quantize)
    with training(config, models) as parameters:
        step = one_step(config, models, (48, 32))
        counted = peak_bytes(models, step, checkpointing=config.checkpointing)
        assert all(p.grad is None and p.device.type == "cpu" for p in parameters.values())
        step()  # what is built once
        for p in parameters.values():
            p.grad = None
        assert counted == pytest.approx(allocated(step, tmp_path), rel=error)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_bytes_are_those_of_its_states_after_a_step(models, name):
    config = replace(LORA, optimizer=name, learning_rate=1.0 if name == "prodigy" else 1e-3)
    with training(config, models) as parameters:
        counted = optimizer_bytes(config, parameters.values())
        optimizer = make_optimizer(parameters, config)
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    states = [value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert counted == sum(states) > 0


def test_the_parts_are_those_of_the_model_and_checkpointing_is_compared(models):
    numbers = sum(t.numel() for network in models.values() for t in network.parameters())
    buffers = sum(t.nbytes for network in models.values() for t in network.buffers())
    config = replace(LORA, ema=0.9, batch_size=16)
    with training(config, models) as parameters:
        about = estimate(config, models, pictures(), parameters, steps=7)
    trained = sum(p.numel() for p in parameters.values())
    assert about.weights == 4 * (numbers + trained) + buffers
    assert about.gradients == about.average == 4 * trained
    assert about.step == about.weights + 2 * 4 * trained + about.optimizer + about.activations
    assert about.other_activations < 0.7 * about.activations
    assert str(about).count("\n") == 6 and "with checkpointing" in str(about) and "for 7 steps" in str(about)


def test_a_quantised_base_counts_as_what_it_takes(models, quick):
    quantize_base(models, "nf4")
    config = replace(LORA, quantize="nf4", precision="bf16")
    with training(config, models) as parameters:
        about = estimate(config, models, pictures(), parameters, steps=1, compare=False)
    last = sum(p.numel() for p in models["diffusion"].conv_out.parameters())  # not quantised; on the CPU also in bf16
    assert about.weights == base_bytes(models) + 2 * last + sum(p.nbytes for p in parameters.values())


def test_the_time_grows_with_the_area_of_the_pictures_and_with_accumulation(models, quick, monkeypatch):
    monkeypatch.setattr(measure, "_seconds", lambda *args: 2.0)  # a micro-batch of the largest size
    data = PictureSet(torch.zeros(4, 1, 16, 16), ["a"] * 4)
    data.sizes, data.bucket_of = [(16, 16), (16, 16), (16, 8), (8, 16)], [0, 0, 1, 2]
    config = replace(LORA, accumulate=3)
    with training(config, models) as parameters:
        assert estimate(config, models, data, parameters, steps=5, compare=False).seconds == 0.75 * 3 * 2.0
    assert [duration(s) for s in (0.0421, 9.96, 61, 240, 7200, 400_000)] == [
        "0.042 s", "10 s", "61 s", "4 min", "2 h", "4.6 days"]


def test_a_short_memory_is_told_with_what_helps(models, quick, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    with caplog.at_level(logging.INFO, "sd"):
        train(replace(LORA, steps=1, out=str(tmp_path), progress=True), models, pictures())
    assert "1 kB are free: try checkpointing" in caplog.text and "a step, " in caplog.text


def test_a_dry_run_shows_pictures_captions_parameters_and_options_and_writes_nothing(tmp_path, models, quick, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(12):
        Image.fromarray(np.full((16, 16 + 16 * (i % 2)), 20 * i, np.uint8)).save(data / f"{i:02d}.png")
        (data / f"{i:02d}.txt").write_text(f"number {i}")
    weights = {f"{key}.{name}": t.clone() for key, network in models.items() for name, t in network.state_dict().items()}
    before = sorted(str(f) for f in tmp_path.rglob("*"))
    config = replace(LORA, data=str(data), cache=str(tmp_path / "cache"), out=str(tmp_path / "out"), validation=0.3,
                     buckets=True, bucket_step=8, prefix="a drawing of", caption_dropout=0.0, dry_run=True, batch_size=2)
    random_state = torch.get_rng_state()
    train(config, models)
    shown = capsys.readouterr().out
    assert sorted(str(f) for f in tmp_path.rglob("*")) == before
    assert adapter_names(models) == [] and torch.equal(torch.get_rng_state(), random_state)
    after = {f"{key}.{name}": t for key, network in models.items() for name, t in network.state_dict().items()}
    assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in after)
    assert not any(p.requires_grad for network in models.values() for p in network.parameters())
    with training(replace(config, dry_run=False), models) as parameters:
        numbers = sum(p.numel() for p in parameters.values())
    for part in ("width x height", "'a drawing of number ", "for the validation loss alone", f"{numbers:,} numbers in",
                 "are frozen", "activations", "with checkpointing", "rank", "(default: 4)", "prefix", "nothing was written"):
        assert part in shown, part
    assert "learning_rate" not in shown  # it is at its default
    assert max(map(len, shown.splitlines())) < 200
