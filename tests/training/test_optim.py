"""Optimizers against their own libraries, schedules against transformers', loss scaling against torch's, and exact resume."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import Adafactor, get_polynomial_decay_schedule_with_warmup

from sd.lora import KINDS, apply_lora_to_model, lora_layers, modules_of, use_adapters
from sd.training import TrainConfig, TrainError, diffusion_loss
from sd.training.optim import (
    OPTIMIZERS,
    PACKAGES,
    SCHEDULES,
    autocast,
    final_weights,
    limit_norms,
    lr_factor,
    make_optimizer,
    next_loss_scale,
    set_learning_rate,
    settle,
    unscale,
)
from sd.training.run_state import Progress, load_state, save_state
from tests.training.tiny import copy_of

CONFIG = SimpleNamespace(
    train="lora", optimizer="adamw", learning_rate=1e-2, text_learning_rate=None, word_learning_rate=None,
    weight_decay=0.1, betas=(0.9, 0.99),
    schedule="constant", cycles=1, power=1.0, lora_plus=1.0, block_rates=(), max_norm=0.0, ema=0.0, precision="fp32",
    relora_every=0)


def config(**changes) -> SimpleNamespace:
    return SimpleNamespace(**(vars(CONFIG) | changes))


def optimizer_config(name: str, **changes) -> SimpleNamespace:
    return config(optimizer=name, **({"learning_rate": 1.0} if name == "prodigy" else {}), **changes)


def parameters() -> dict[str, nn.Parameter]:
    """A LoRA as it starts (`up` is 0), a magnitude, and a matrix that is large enough for a state in 8 bits."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"a.down": (4, 8), "a.up": (8, 4), "a.magnitude": (8, 1), "b.weight": (64, 72), "b.bias": (64,)}
    return {name: nn.Parameter(torch.zeros(shape) if name == "a.up" else torch.randn(shape, generator=rng))
            for name, shape in shapes.items()}


def train(found: dict[str, nn.Parameter], optimizer, steps: range) -> None:
    """The learning rate moves, and the gradients are those of `noisy_pull`."""
    for step in steps:
        set_learning_rate(optimizer, lr_factor(step, config(warmup=3, steps=9)))
        noisy_pull(found, step)
        optimizer.step()
        optimizer.zero_grad()


def noisy_pull(found: dict[str, nn.Parameter], step: int) -> None:
    """Gradients towards 2, with noise: a function of the weights and the step."""
    rng = torch.Generator().manual_seed(step)
    for p in found.values():
        p.grad = p.detach() - 2 + 0.1 * torch.randn(p.shape, generator=rng)


# ---- optimizers ------------------------------------------------------------------------------------------------------

def libraries_own(name: str, groups: list[dict], rate: float):
    betas = (0.9, 0.99)
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    if name == "adafactor":
        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False, warmup_init=False)
    if name == "adamw8bit":
        return importlib.import_module("bitsandbytes").optim.AdamW8bit(groups, lr=rate, betas=betas)
    if name == "lion":
        return importlib.import_module("lion_pytorch").Lion(groups, lr=rate, betas=betas)
    if name == "prodigy":
        prodigy = importlib.import_module("prodigyopt").Prodigy
        return prodigy(groups, lr=rate, betas=betas, safeguard_warmup=True, use_bias_correction=True)
    optimizer = importlib.import_module("schedulefree").AdamWScheduleFree(groups, lr=rate, betas=betas)
    optimizer.train()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_library(name):
    settings = optimizer_config(name)
    ours, theirs = parameters(), parameters()
    matrices = [theirs[key] for key in ("a.down", "a.up", "b.weight")]
    groups = [{"params": ps, "lr": settings.learning_rate, "initial_lr": settings.learning_rate, "weight_decay": decay}
              for ps, decay in ((matrices, 0.1), ([theirs["a.magnitude"], theirs["b.bias"]], 0.0))]
    train(ours, make_optimizer(ours, settings), range(6))
    train(theirs, libraries_own(name, groups, settings.learning_rate), range(6))
    start = parameters()
    for key, p in ours.items():
        assert torch.equal(p, theirs[key]) and not torch.equal(p, start[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("k", [0, 4])
def test_a_run_that_is_saved_and_resumed_ends_with_the_same_bits_and_the_same_file(tmp_path, name, k):
    settings, facts = optimizer_config(name), {"seed": 0}
    (tmp_path / "whole").mkdir(), (tmp_path / "broken").mkdir()
    whole = parameters()
    optimizer = make_optimizer(whole, settings)
    train(whole, optimizer, range(9))
    save_state(tmp_path / "whole", Progress(9), whole, optimizer, {}, facts)

    first = parameters()
    optimizer = make_optimizer(first, settings)
    train(first, optimizer, range(k))
    save_state(tmp_path / "broken", Progress(k), first, optimizer, {}, facts)
    second = parameters()
    optimizer = make_optimizer(second, settings)
    assert load_state(tmp_path / "broken", second, optimizer, {}, facts).step == k
    train(second, optimizer, range(k, 9))
    save_state(tmp_path / "broken", Progress(9), second, optimizer, {}, facts)

    assert all(torch.equal(p, whole[key]) for key, p in second.items())
    assert (tmp_path / "broken/state.safetensors").read_bytes() == (tmp_path / "whole/state.safetensors").read_bytes()


def test_the_small_state_of_8_bits_and_of_adafactor_is_small():
    def size(name):
        found = {"b.weight": nn.Parameter(torch.randn(256, 256))}
        optimizer = make_optimizer(found, optimizer_config(name))
        train(found, optimizer, range(1))
        return sum(v.numel() * v.element_size() for v in optimizer.state[found["b.weight"]].values() if torch.is_tensor(v))

    assert size("adafactor") < 0.01 * size("adamw")
    assert size("adamw8bit") < 0.27 * size("adamw")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_a_sentence_that_says_what_to_install(monkeypatch, name):
    for module in ("bitsandbytes", "bitsandbytes.optim", "lion_pytorch", "prodigyopt", "schedulefree"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrainError, match=f"optimizer is '{name}', which needs the package {PACKAGES[name]} .*pip install"):
        make_optimizer(parameters(), config(optimizer=name))


# ---- schedule-free ---------------------------------------------------------------------------------------------------

def test_schedule_frees_warm_up_is_ours_and_its_final_weights_are_the_library_s():
    from schedulefree import AdamWScheduleFree as library
    ours, theirs = parameters(), parameters()
    optimizer = make_optimizer(ours, config(optimizer="schedule_free", weight_decay=0.0))
    peer = library(theirs.values(), lr=1e-2, betas=(0.9, 0.99), warmup_steps=3)
    peer.train()
    for step in range(6):
        train(ours, optimizer, range(step, step + 1))
        noisy_pull(theirs, step)
        peer.step()
    assert all(torch.equal(p, theirs[key]) for key, p in ours.items())

    before = {key: p.detach().clone() for key, p in ours.items()}
    peer.eval()
    with final_weights(optimizer):
        assert all(torch.equal(p, theirs[key]) for key, p in ours.items())
        assert not torch.equal(ours["a.down"], before["a.down"])
    assert all(torch.equal(p, before[key]) for key, p in ours.items())
    train(ours, optimizer, range(6, 7))  # still in training mode
    settle(optimizer)


def test_final_weights_of_other_optimizers_are_the_weights():
    found = parameters()
    optimizer = make_optimizer(found, CONFIG)
    train(found, optimizer, range(2))
    before = found["a.down"].detach().clone()
    settle(optimizer)
    with final_weights(optimizer):
        assert torch.equal(found["a.down"], before)


# ---- learning rates --------------------------------------------------------------------------------------------------

@pytest.fixture
def lora(untrained):
    """Models with a LoRA on both networks, and its parameters by name."""
    models = copy_of(untrained)
    torch.manual_seed(0)
    networks = {key: models[key] for key in ("diffusion", "clip")}
    apply_lora_to_model(networks, 2, 2.0, name="lora")
    found = {path: layer.adapter("lora") for path, layer in lora_layers(networks).items()}
    for adapter in found.values():
        adapter.requires_grad_(True)
        nn.init.normal_(adapter.up, std=0.1)
    return models, {f"{path}.{key}": p for path, a in found.items() for key, p in a.named_parameters()}


def rates(optimizer, found: dict[str, nn.Parameter]) -> dict[str, float]:
    of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in found.items()}


def test_text_encoder_up_and_blocks_have_the_rates_that_were_asked(lora):
    models, found = lora
    settings = config(text_learning_rate=1e-3, lora_plus=16.0, block_rates=("mid_block=0.5", "unet=2", "text_encoder=0"))
    got = rates(make_optimizer(found, settings, modules_of(models)), found)
    for name, rate in got.items():
        block = 0 if name.startswith("clip.") else 0.5 if ".mid_block." in name else 2
        base = 1e-3 if name.startswith("clip.") else 1e-2
        assert rate == pytest.approx(base * block * (16 if name.endswith(".up") else 1)), name
    assert len(set(got.values())) == 5
    only = rates(make_optimizer(found, config(text_learning_rate=1e-3)), found)
    assert all(rate == (1e-3 if name.startswith("clip.") else 1e-2) for name, rate in only.items())


def test_rates_that_leave_nothing_to_train_are_refused(lora):
    models, found = lora
    with pytest.raises(TrainError, match=r"block_rates is \('unet=0', 'text_encoder=0'\), so nothing is trained"):
        make_optimizer(found, config(block_rates=("unet=0", "text_encoder=0")), modules_of(models))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_block_with_a_rate_of_0_stays_as_it_is(lora, name):
    models, found = lora
    optimizer = make_optimizer(found, optimizer_config(name, block_rates=("mid_block=0",)), modules_of(models))
    before = {key: p.detach().clone() for key, p in found.items()}
    train(found, optimizer, range(4))
    settle(optimizer)
    assert any(".mid_block." in key for key in found)
    for key, p in found.items():
        assert torch.equal(p, before[key]) == (".mid_block." in key), key


@pytest.mark.parametrize("change, message", [
    ({"block_rates": ("mid_blok=1",)}, r"of what is trained: block weights name 'mid_blok', .* mid_block"),
    ({"block_rates": ("vae=1",)}, "of what is trained: block weights name 'vae'"),
    ({"block_rates": ("mid_block=-1",)}, "allowed: factors of 0 or more"),
    ({"block_rates": ("mid_block=high",)}, "a finite number is needed"),
    ({"optimizer": "prodigy", "lora_plus": 2.0}, "prodigy estimates one learning rate for all"),
    ({"optimizer": "prodigy", "text_learning_rate": 0.5}, "prodigy estimates one learning rate for all")])
def test_rates_that_cannot_be_are_refused(lora, change, message):
    models, found = lora
    with pytest.raises(TrainError, match=message):
        make_optimizer(found, config(**change), modules_of(models))


def test_lora_plus_without_a_lora_is_refused():
    with pytest.raises(TrainError, match="lora_plus is 2.0, but nothing that is trained has an `up`"):
        make_optimizer({"clip.weight": nn.Parameter(torch.ones(2, 2))}, config(lora_plus=2.0))


@pytest.mark.parametrize("schedule, peer, options", [
    ("constant", "constant_with_warmup", {}), ("cosine", "cosine", {}), ("linear", "linear", {}),
    ("polynomial", "polynomial", {"power": 2.5}), ("cosine_restarts", "cosine_with_restarts", {"cycles": 3})])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_transformers(schedule, peer, options, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    if peer == "polynomial":
        reference = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, 50, lr_end=0.0, power=options["power"])
    else:
        reference = get_scheduler(peer, optimizer, warmup, 50, {"num_cycles": 3} if "cycles" in options else None)
    expected = []
    for _ in range(51):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    ours = [lr_factor(step, config(schedule=schedule, warmup=warmup, steps=50, **options)) for step in range(50)]
    assert ours[warmup:] == pytest.approx(expected[warmup:50], rel=1e-9, abs=1e-12)
    assert ours[:warmup] == pytest.approx(expected[1:warmup + 1], rel=1e-9)  # their first step has a rate of 0
    assert set(SCHEDULES) == {"constant", "cosine", "linear", "polynomial", "cosine_restarts"}


# ---- precision -------------------------------------------------------------------------------------------------------

def test_the_loss_scale_moves_as_torchs(monkeypatch):
    monkeypatch.setattr("sd.training.optim.SCALE_STEPS", 3)
    peer = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    p, state = nn.Parameter(torch.zeros(())), torch.tensor([65536.0, 0])
    optimizer = torch.optim.SGD([p], lr=1.0)
    for good in [1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]:
        peer.scale(p * (1.0 if good else float("inf"))).backward()
        peer.step(optimizer)
        peer.update()
        optimizer.zero_grad()
        state = next_loss_scale(state, torch.tensor(bool(good)))
        assert state.tolist() == [peer.get_scale(), peer._get_growth_tracker()]


def test_scaling_and_unscaling_leave_no_trace(lora):
    models, found = lora
    batch = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 8), torch.tensor([10, 700]), torch.randn(2, 4, 8, 8)

    def gradients(scale):
        for p in found.values():
            p.grad = None
        with use_adapters(models, {"lora": 1.0}):
            (diffusion_loss(models, *batch) * scale).backward()
        unscale(found.values(), torch.tensor(scale))
        return [p.grad for p in found.values() if p.grad is not None]

    plain = gradients(1.0)
    assert len(plain) > 10 and all(map(torch.equal, plain, gradients(65536.0)))


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.05), ("fp16", 0.01)])
def test_half_precision_computes_nearly_the_same_gradients_in_fp32(lora, precision, tolerance):
    models, found = lora
    batch = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 8), torch.tensor([10, 700]), torch.randn(2, 4, 8, 8)
    names = [name for name in found if name.startswith("diffusion.")]

    def gradients(name):
        with use_adapters(models, {"lora": 1.0}), autocast(name, torch.device("cpu")):
            loss = diffusion_loss(models, *batch)
        assert loss.dtype == torch.float32
        return loss, torch.autograd.grad(loss * 1024, [found[name] for name in names])

    (loss, exact), (half_loss, half) = gradients("fp32"), gradients(precision)
    assert half_loss.item() == pytest.approx(loss.item(), rel=tolerance) and half_loss != loss
    error = sum((a - b).square().sum() for a, b in zip(exact, half)) / sum(a.square().sum() for a in exact)
    assert error.sqrt() < tolerance and all(g.dtype == torch.float32 for g in half)


# ---- norms -----------------------------------------------------------------------------------------------------------

def test_norms_are_limited_as_kohya_does_and_what_is_within_keeps_its_bits(lora):
    models, found = lora
    layers = lora_layers(models)
    norms = {path: torch.linalg.matrix_norm((a.up.double() @ a.down.double()) * a.scale).item()
             for path, a in ((path, layer.adapter("lora")) for path, layer in layers.items())}
    limit = sum(sorted(norms.values())[len(norms) // 2 - 1:][:2]) / 2  # between two of them
    before = {name: p.detach().clone() for name, p in found.items()}
    limit_norms(layers, "lora", limit)
    for path, norm in norms.items():
        ratio = min(1.0, limit / norm) ** 0.5  # kohya's scale_weight_norms: the root of the ratio on either factor
        for key in ("down", "up"):
            name = f"{path}.{key}"
            torch.testing.assert_close(found[name], before[name] * ratio, rtol=1e-5, atol=0)
            assert torch.equal(found[name], before[name]) == (norm <= limit), name


@pytest.mark.parametrize("options", [
    *({"kind": kind} for kind in KINDS if KINDS[kind].is_product), {"tucker": True}, {"dora": True}], ids=str)
def test_the_change_of_every_kind_that_is_a_product_ends_at_the_limit(untrained, options):
    models = copy_of(untrained)
    torch.manual_seed(0)
    apply_lora_to_model(models["diffusion"], 2, 2.0, name="x", target_modules=("mid_block",), **options)
    layers = lora_layers(models)
    for layer in layers.values():
        for p in layer.adapter("x").parameters():
            nn.init.normal_(p)
    magnitudes = [layer.adapter("x").magnitude.detach().clone() for layer in layers.values()] if "dora" in options else []
    before = {path: layer.adapter("x").delta(layer.base_weight()).double() for path, layer in layers.items()}
    limit_norms(layers, "x", 0.25)
    assert len(layers) > 3
    for path, layer in layers.items():
        after = layer.adapter("x").delta(layer.base_weight()).double()
        torch.testing.assert_close(after, before[path] * (0.25 / before[path].norm()), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(m, layer.adapter("x").magnitude) for m, layer in zip(magnitudes, layers.values()))


def test_norms_of_kinds_that_are_no_product_are_refused_and_an_adapter_of_zeros_stays_zero(untrained):
    models = copy_of(untrained)
    apply_lora_to_model(models["diffusion"], 2, 2.0, name="zero")
    limit_norms(lora_layers(models), "zero", 1e-3)
    assert all(layer.adapter("zero").up.abs().sum() == 0 for layer in lora_layers(models).values())
    apply_lora_to_model(models["diffusion"], 4, 1.0, name="turn", kind="oft")
    with pytest.raises(TrainError, match="max_norm is 1.0, which does not go with kind 'oft'"):
        limit_norms(lora_layers(models), "turn", 1.0)


# ---- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, field", [
    ({"optimizer": "sgd"}, "optimizer"), ({"schedule": "zigzag"}, "schedule"), ({"learning_rate": 3.0}, "learning_rate"),
    ({"learning_rate": float("nan")}, "learning_rate"), ({"text_learning_rate": -1.0}, "text_learning_rate"),
    ({"optimizer": "prodigy", "learning_rate": 1e-3}, "learning_rate"), ({"cycles": 0}, "cycles"), ({"power": 0.0}, "power"),
    ({"lora_plus": 0.0}, "lora_plus"), ({"max_norm": -1.0}, "max_norm"), ({"max_norm": 1.0, "train": "full"}, "max_norm"),
    ({"precision": "fp8"}, "precision"), ({"optimizer": "schedule_free", "schedule": "cosine"}, "schedule"),
    ({"optimizer": "schedule_free", "ema": 0.9}, "ema"), ({"optimizer": "schedule_free", "betas": (0.0, 0.9)}, "betas")])
def test_a_bad_value_breaks_the_rule_of_its_field(changes, field):
    TrainConfig(optimizer="prodigy", learning_rate=1.0)
    with pytest.raises(TrainError, match=f"^{field} is "):
        TrainConfig(**changes)
