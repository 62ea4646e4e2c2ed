"""ReLoRA: restarts against a bare nn.Linear that is written to, the schedule of the reference, and whole runs."""

import importlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sd.adapters.layers import as_lora_layer
from sd.adapters.low_rank import LowRank
from sd.adapters.quant import quantize_base
from sd.files.tensors import read_tensors
from sd.lora import adapter_names, apply_lora_to_model, get_lora_parameters, lora_layers, lora_state, use_adapters
from sd.model_loader import load_lora_into_models
from sd.training import TrainConfig, TrainError, train
from sd.training.loss import diffusion_loss
from sd.training.optim import lr_factor, make_optimizer
from sd.training.relora import adapters_in_training, attach_merged, fold, restart
from sd.training.rules import OPTIMIZERS_THAT_FORGET, kinds_with
from sd.training.trained import frozen_parts, training
from tests.training.tiny import copy_of, metrics, output, pictures, stopped

loop = importlib.import_module("sd.training.loop")

EVERY = TrainConfig(rank=2, alpha=3.0, steps=7, batch_size=2, save_every=100, progress=False, learning_rate=1e-2,
                    relora_every=3, relora_warmup=2)


def loss_of(models):
    g = torch.Generator().manual_seed(1)
    latents, noise, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g), \
        torch.randn(2, 77, 8, generator=g)
    return diffusion_loss(models, latents, context, torch.tensor([3, 700]), noise, objective=EVERY)


# ---- the paper's algorithm ---------------------------------------------------------------------------------------------

def test_restarts_take_the_steps_of_a_linear_layer_whose_weight_is_written():
    """Reference: W += alpha / R · B A, A anew, B = 0 and a new torch AdamW, with the very same A (algorithm 1)."""
    torch.manual_seed(0)
    layer = as_lora_layer(nn.Linear(12, 8)).requires_grad_(False)
    adapter = LowRank(layer.lora_shape(), 2, 3.0)
    layer.add_adapter("lora", adapter)
    attach_merged("lora", {"": adapter}, {"": layer})
    layer.train()
    parameters = {f"x.{name}": p for name, p in adapter.requires_grad_(True).named_parameters()}
    optimizer = make_optimizer(parameters, EVERY)
    x, target = torch.randn(32, 12), torch.randn(32, 8)

    before, scale = layer.weight.clone(), 1.5
    W, b = layer.weight.double(), layer.bias.double()
    A, B = (p.detach().double().requires_grad_() for p in (adapter.down, adapter.up))
    reference = torch.optim.AdamW([A, B], lr=EVERY.learning_rate, betas=EVERY.betas, weight_decay=EVERY.weight_decay)
    for step in range(8):
        restart(step, EVERY, layer, optimizer)
        if step in (3, 6):
            W = W + scale * (B @ A).detach()
            assert not torch.equal(adapter.down.detach().double(), A) and adapter.down.abs().max() <= 12 ** -0.5
            A, B = adapter.down.detach().double().requires_grad_(), torch.zeros_like(B, requires_grad=True)
            reference = torch.optim.AdamW([A, B], lr=EVERY.learning_rate, betas=EVERY.betas, weight_decay=EVERY.weight_decay)
        (layer(x) - target).square().mean().backward()
        (x.double() @ (W + scale * B @ A).T + b - target).square().mean().backward()
        for o in (optimizer, reference):
            o.step()
            o.zero_grad()
    with torch.no_grad():
        ours = sum(layer.adapter(name).delta(before) for name in ("lora", "lora.merged"))
        assert torch.allclose((before + ours).double(), W + scale * B @ A, atol=1e-5)
    assert torch.equal(layer.weight, before) and (ours.abs() > 0.01).any()
    assert torch.linalg.matrix_rank(layer.adapter("lora.merged").diff.double(), rtol=1e-5) == 4 > adapter.rank


@pytest.mark.parametrize("kind", kinds_with("adds"))
def test_the_loss_does_not_jump_across_a_restart(untrained, kind):
    models, config = copy_of(untrained), replace(EVERY, kind=kind, targets=("kohya", "norm1"))
    with training(config, models) as parameters:
        optimizer = make_optimizer(parameters, config)
        g = torch.Generator().manual_seed(2)
        for p in parameters.values():
            p.data += 0.1 * torch.randn(p.shape, generator=g)
        plain = loss_of(copy_of(untrained)).item()
        before = loss_of(models)
        before.backward()
        optimizer.step()
        moved = loss_of(models).item()
        restart(6, config, models, optimizer)
        assert loss_of(models).item() == pytest.approx(moved, rel=1e-5) and abs(moved - plain) > 1e-3 * plain
        with use_adapters(models, {"lora": 1.0}):  # the LoRA itself begins anew
            assert loss_of(models).item() == plain
        for layer in lora_layers(models).values():
            assert not layer.adapter("lora").delta(layer.base_weight()).any()


def test_a_change_of_the_bias_is_moved_too():
    torch.manual_seed(0)
    layer, x = as_lora_layer(nn.Linear(12, 8)), torch.randn(5, 12)
    adapter = LowRank(layer.lora_shape(), 2, 3.0)
    adapter.diff_b = nn.Parameter(torch.randn(8))
    layer.add_adapter("lora", adapter)
    attach_merged("lora", {"": adapter}, {"": layer})
    optimizer = torch.optim.AdamW(adapter.parameters())
    with torch.no_grad():
        before = layer(x)
        for step in (3, 6):
            restart(step, EVERY, layer, optimizer)
            assert not adapter.diff_b.any() and torch.allclose(layer(x), before, atol=1e-6)
            adapter.diff_b += 1.0
            before = before + 1.0
        fold(EVERY, layer)
        assert adapter_names(layer) == ["lora"] and torch.allclose(layer(x), before, atol=1e-6)


def test_a_restart_is_drawn_from_the_seed_and_its_number_alone(untrained):
    def drawn(step, seed=0, noise=0):
        models, config = copy_of(untrained), replace(EVERY, seed=seed)
        with training(config, models) as parameters:
            torch.manual_seed(noise)
            restart(step, config, models, make_optimizer(parameters, config))
            return next(p.clone() for name, p in parameters.items() if name.endswith(".down"))
    first = drawn(3)
    assert torch.equal(first, drawn(3, noise=5))
    assert not any(torch.equal(first, other) for other in (drawn(6), drawn(3, seed=1), drawn(0), drawn(4)))
    assert torch.equal(drawn(0), drawn(4))  # no restart: what it began with


@pytest.mark.parametrize("name", OPTIMIZERS_THAT_FORGET)
def test_after_a_restart_an_optimizer_steps_as_a_new_one(untrained, name):
    ends = []
    config = replace(EVERY, optimizer=name, targets=("kohya",))
    for old in (True, False):
        models = copy_of(untrained)
        with training(config, models) as parameters:
            optimizer = make_optimizer(parameters, config)
            if old:
                g = torch.Generator().manual_seed(3)
                for p in parameters.values():
                    p.grad = torch.randn(p.shape, generator=g)
                optimizer.step()
            restart(3, config, models, optimizer)
            g = torch.Generator().manual_seed(4)
            for p in parameters.values():
                p.grad = torch.randn(p.shape, generator=g)
            optimizer.step()
            ends.append({key: p.detach().clone() for key, p in parameters.items()})
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_is_the_references_jagged_cosine(schedule):
    """get_cosine_schedule_with_multiple_warmups of Lialin's peft_pretraining, first step at 1 / warm-up instead of 0."""
    config = SimpleNamespace(schedule=schedule, warmup=4, steps=40, cycles=1, power=1.0, relora_every=10, relora_warmup=5)
    for step in range(40):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 4) / 36)) if schedule == "cosine" else 1.0
        expected = (step + 1) / 4 if step < 4 else cosine
        if step >= 10 and step % 10 < 5:
            expected = (step % 10 + 1) / 5 * cosine
        assert lr_factor(step, config) == pytest.approx(expected), step
    config.relora_every = 0
    assert lr_factor(12, config) > 0.8


# ---- whole runs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, {"relora_save": "svd"}, {"relora_save": "svd", "relora_rank": 3}, {"quantize": "nf4"}, {"kind": "loha"}], ids=str)
def test_the_result_is_one_adapter_that_does_what_was_trained_and_the_base_is_not_written(
        untrained, tmp_path, options, monkeypatch):
    config = replace(EVERY, targets=("q_proj", "conv1", "norm1"), text_encoder=True, out=str(tmp_path), **options)
    models, seen = copy_of(untrained), {}

    def watched(config, models):
        seen["output"] = output(models)
        seen["rank"] = max(int(torch.linalg.matrix_rank(layer.adapter("lora.merged").diff.double().flatten(1), rtol=1e-5))
                           for layer in lora_layers(models).values() if len(layer.weight.shape) > 1)
        fold(config, models)

    monkeypatch.setattr(loop, "fold", watched)
    before = None if config.quantize != "none" else {k: t.clone() for k, t in models["diffusion"].state_dict().items()}
    train(config, models, pictures())
    assert adapter_names(models) == ["lora"] and seen["rank"] >= 4
    rates = [row["lr"] for row in metrics(tmp_path)]
    assert rates[3] < min(rates[2], rates[4])
    exact = config.relora_rank is None
    assert torch.allclose(output(models), seen["output"], atol=1e-5) == exact
    assert not torch.allclose(output(models), output(copy_of(untrained)), atol=1e-3)
    again = copy_of(untrained)
    if before is None:
        quantize_base(again, "nf4")
    else:
        assert all(torch.equal(t, models["diffusion"].state_dict()[k]) for k, t in before.items())
    again = load_lora_into_models(again, tmp_path / "lora.safetensors")
    assert torch.equal(output(again), output(models))
    kinds = {w.kind for w in lora_state(models, "lora").values()}
    ranks = {w.rank for w in lora_state(models, "lora").values() if w.kind == "lora"}
    if config.relora_save == "svd":  # 3 beginnings of rank 2, where a layer has as many
        assert kinds == {"lora", "full"} and ranks == ({3} if config.relora_rank else {6})
    else:
        assert kinds == {"full"}
    assert {id(p) for p in get_lora_parameters(models)} == {id(p) for p in get_lora_parameters(models, "lora")}


def test_the_state_holds_what_was_moved_and_a_failed_run_leaves_nothing_on_the_models(untrained, tmp_path, monkeypatch):
    models = copy_of(untrained)
    stopped(replace(EVERY, save_every=5, out=str(tmp_path)), models, monkeypatch, 6)
    assert adapter_names(models) == []
    moved = {key: t for key, t in read_tensors(tmp_path / "state.safetensors").items() if ".merged.diff" in key}
    assert moved and all(t.any() for t in moved.values())
    with training(EVERY, models):
        assert adapters_in_training(EVERY) == ["lora", "lora.merged"] == adapter_names(models)
        assert {f"weights/{name}" for name in frozen_parts(EVERY, models)} == set(moved)


@pytest.mark.parametrize("options, sentence", [
    ({"dora": True}, "dora is True; allowed: off with relora_every"), ({"kind": "oft"}, "kind is 'oft'; allowed: lora, loha"),
    ({"init": "pissa"}, "init is 'pissa'; allowed: default"), ({"ema": 0.9}, "ema is 0.9; allowed: 0 with relora_every"),
    ({"max_norm": 1.0}, "max_norm is 1.0; allowed: 0 with"), ({"optimizer": "schedule_free"}, "optimizer is 'schedule_free'"),
    ({"optimizer": "prodigy", "learning_rate": 1.0}, "allowed: adamw, adamw8bit, adafactor, lion with relora_every"),
    ({"relora_every": -1}, "relora_every is -1"),
    ({"relora_save": "svg"}, "relora_save is 'svg'; allowed: full, svd"), ({"relora_rank": 0}, "relora_rank is 0"),
], ids=str)
def test_what_does_not_go_with_restarts_is_a_sentence(options, sentence):
    with pytest.raises(TrainError, match=sentence):
        replace(EVERY, **options)


def test_an_adapter_that_has_the_name_of_what_is_moved_is_refused(untrained, tmp_path):
    models = copy_of(untrained)
    apply_lora_to_model(models["diffusion"], 2, name="lora.merged")
    with pytest.raises(TrainError, match="carries an adapter named 'lora.merged'; remove it"):
        train(replace(EVERY, out=str(tmp_path)), models, pictures())
    assert adapter_names(models) == ["lora.merged"]
