"""Merged weights: what they are, what makes them stale, and models that are plain again."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from sd.config import TINY
from sd.lora import (
    LoRAError,
    LoRALinear,
    active_multipliers,
    apply_lora_to_model,
    get_lora_parameters,
    lora_layers,
    merge,
    merge_lora_weights,
    merge_loss,
    remove_lora,
    set_adapters,
    set_lora_enabled,
    unmerge,
    use_adapters,
)
from sd.unet import UNet
from tests.adapters.cases import LAYERS, adapted, changed, expected, fill, model_and_input, on


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_merge_and_unmerge_never_write_the_weight_and_keep_the_buffers_address(name, dtype):
    model, x = adapted(name, ("a", "b"))
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    before, base = model[0].weight.clone(), None
    with torch.no_grad():
        with use_adapters(model, {}):
            base = model(x)
        with use_adapters(model, {"a": 1.0}):
            adapters_on = model(x)
            merge(model)
            address = model[0].merged_weight.data_ptr()
            want = changed(model[0].adapter("a").weights(), model[0])
            # Half precision is rounded once: a second time would cost another half of the last bit.
            roundings = 0.6 if dtype.itemsize == 2 else 2
            error = (model[0].merged_weight.double() - want).abs().max()
            assert error <= roundings * torch.finfo(dtype).eps * want.abs().max()
            merged_on = model(x)
        with use_adapters(model, {"b": 2.0}):
            assert not model[0].is_merged()
            merge(model)
            assert model[0].merged_weight.data_ptr() == address
        with use_adapters(model, {"a": 1.0}):
            merge(model)
            assert torch.equal(model(x), merged_on)
        unmerge(model)
        with use_adapters(model, {"a": 1.0}):
            assert torch.equal(model(x), adapters_on)
        with use_adapters(model, {}):
            assert torch.equal(model(x), base)
    assert torch.equal(model[0].weight, before) and "merged_weight" not in model.state_dict()


def test_a_merged_bias_is_rewritten_in_place():
    model, x = model_and_input("linear")
    apply_lora_to_model(model, rank=2, target_modules=["0"], name="a")
    model[0].adapter("a").diff_b = nn.Parameter(torch.randn(8))
    fill(model)
    addresses = set()
    for m in (1.0, -0.5):
        with torch.no_grad(), use_adapters(model, {"a": m}):
            merge(model)
            addresses.add(model[0].merged_bias.data_ptr())
            assert torch.equal(model[0].merged_bias, model[0].bias + m * model[0].adapter("a").diff_b)
    assert len(addresses) == 1


def test_merged_weights_are_dropped_by_every_change_they_depend_on():
    def merged():
        model, x = adapted("linear", ("a", "b"))
        merge(model)
        assert model[0].is_merged()
        return model, x

    changes = {
        "adapter write": lambda m: m[0].adapter("a").up.data.mul_(1) is None or m[0].adapter("a").up.detach().mul_(2),
        "optimizer step": lambda m: torch.optim.SGD(get_lora_parameters(m), 0.1, foreach=False).step(),
        "base write": lambda m: m[0].weight.detach().mul_(2),
        "other multipliers": lambda m: set_adapters(m, {"a": 0.5}),
        "dtype": lambda m: m.to(torch.bfloat16),
        "load": lambda m: m.load_state_dict(m.state_dict()),
        "attach": lambda m: apply_lora_to_model(m, rank=1, target_modules=["0"], name="c"),
        "remove": lambda m: remove_lora(m, "b"),
    }
    for what, change in changes.items():
        model, x = merged()
        if what == "optimizer step":
            model(x).sum().backward()
        with torch.no_grad() if what != "optimizer step" else torch.enable_grad():
            change(model)
        assert not model[0].is_merged(), what
    model, _ = merged()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[0].merged_weight is None and active_multipliers(copied) == {"a": 1.0, "b": 1.0}
        for p in get_lora_parameters(copied):
            p.data.zero_()
        with torch.no_grad(), use_adapters(model, {}):
            assert torch.equal(copied(x := torch.randn(2, 12)), model(x))  # its adapters are its own
    assert model[0].is_merged()


def test_an_adapter_that_is_trained_is_never_run_merged():
    model, x = adapted("linear")
    merge(model)
    model(x).sum().backward()
    assert model[0].adapter("a").up.grad is not None


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("fused", [False, True])  # fused optimizers write without raising a version counter
def test_inference_follows_every_step_of_the_optimizer(fused, merged):
    model, x = adapted("linear")
    for p in (model[0].weight, model[0].bias):
        p.requires_grad_(False)  # a gradient of the base that nobody clears would keep anything from being cached
    optimizer = torch.optim.AdamW(get_lora_parameters(model), 0.1, fused=fused)
    for i in range(4):
        for backward in (False, True):
            if backward:
                model(x).square().sum().backward()
            if not backward or i % 2:  # what is cached in either is stale after the step
                with torch.no_grad():
                    if merged:
                        merge(model)
                    model(x)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if merged:
                merge(model)
            want = expected(model[0], x, on(model[0], {"a": 1.0})).float()
            assert torch.allclose(model(x), want, atol=1e-5)
        trained = model(x)
        with torch.no_grad():
            assert torch.allclose(model(x), trained, atol=1e-6)
        with torch.inference_mode():
            assert torch.allclose(model(x), trained, atol=1e-6)
    model(x).sum().backward()  # tensors cached in inference mode would break this


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_for_good_gives_a_plain_model_with_the_base_keys(dtype):
    torch.manual_seed(0)
    unet = UNet(TINY.unet).to(dtype)
    keys, modules = list(unet.state_dict()), {n: type(m) for n, m in unet.named_modules()}
    apply_lora_to_model(unet, rank=2, alpha=3.0, target_modules="full", name="a")
    fill(unet)
    args = torch.randn(2, 4, 8, 8, dtype=dtype), torch.tensor([3, 500]), torch.randn(2, 9, 32, dtype=dtype)
    with torch.no_grad():
        merge(unet)
        want = unet(*args)
    assert merge_lora_weights(unet) is unet
    assert list(unet.state_dict()) == keys and {n: type(m) for n, m in unet.named_modules()} == modules
    with torch.no_grad():
        assert torch.equal(unet(*args), want)
    fresh = UNet(TINY.unet).to(dtype)
    fresh.load_state_dict(unet.state_dict(), strict=True)
    with pytest.raises(LoRAError, match="nothing to merge"):
        merge_lora_weights(unet)


def test_merging_for_good_refuses_what_is_switched_off_and_leaves_tied_weights_alone():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    apply_lora_to_model(tied, rank=2, target_modules=["0"])
    fill(tied)
    before = tied[1].weight.clone()
    set_lora_enabled(tied, False)
    with pytest.raises(LoRAError, match="switched off"):
        merge_lora_weights(tied)
    set_lora_enabled(tied, True)
    with pytest.raises(LoRAError, match="0 shares its weight with 1, which would not change with it"):
        merge_lora_weights(tied)
    merge_lora_weights(tied, untie=True)
    assert torch.equal(tied[1].weight, before) and not torch.equal(tied[0].weight, before)


def test_merging_under_autocast_is_done_in_fp32():
    model, x = adapted("linear")
    with torch.autocast("cpu", torch.bfloat16):
        merge(model)
    assert (model[0].merged_weight.double() - changed(model[0].adapter("a").weights(), model[0])).abs().max() < 1e-6


def test_a_trained_base_gets_its_gradient_though_a_frozen_lora_is_merged():
    model, x = adapted("linear", dora=True)
    for p in get_lora_parameters(model):
        p.requires_grad_(False)
    with torch.no_grad():
        merge(model)
        model(x)
    model(x).sum().backward()
    W = model[0].weight.detach().double().requires_grad_()
    adapter = model[0].adapter("a")
    total = W + 1.5 * adapter.up.double() @ adapter.down.double()
    F.linear(x.double(), adapter.magnitude.double() * total / total.norm(dim=1, keepdim=True).detach()).sum().backward()
    assert torch.allclose(model[0].weight.grad.double(), W.grad, atol=1e-4)


def test_merging_and_removing_inside_use_adapters_work():
    for convert in (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), lambda: nn.Sequential(LoRALinear(8, 8))):
        model = convert()
        apply_lora_to_model(model, rank=2, target_modules=[r"\d"])
        fill(model)
        want = [(m.weight.double() + changed(m.adapter("default").weights(), m)).float() / 2 for m in model]
        with use_adapters(model, {"default": 0.5}):
            merge_lora_weights(model)
        assert all(torch.allclose(m.weight, w, atol=1e-6) for m, w in zip(model, want)) and not lora_layers(model)


def test_sets_that_python_hashes_alike_are_told_apart():
    assert hash(-1.0) == hash(-2.0)
    model, x = adapted("linear")
    with torch.no_grad():
        outputs = {}
        for m in (-1.0, -2.0):
            for merged in (False, True):
                with use_adapters(model, {"a": m}):
                    if merged:
                        merge(model)
                    outputs[m, merged] = model(x)
    assert torch.allclose(outputs[-1.0, True], outputs[-1.0, False], atol=1e-5)
    assert torch.allclose(outputs[-2.0, True], outputs[-2.0, False], atol=1e-5)
    assert (outputs[-1.0, False] - outputs[-2.0, False]).abs().max() > 0.01


def test_merge_loss_is_what_rounding_takes_of_the_change():
    model, _ = adapted("linear")
    model.to(torch.bfloat16)
    W, want = model[0].weight.detach().double(), changed(model[0].adapter("a").weights(), model[0])
    rounded = want.to(torch.bfloat16).double()
    assert merge_loss(model) == pytest.approx(float((rounded - want).norm() / (want - W).norm()), rel=1e-3)
    model.to(torch.float32)
    assert merge_loss(model) < 1e-6


def test_compiled_code_follows_merged_weights_without_recompiling():
    model, x = adapted("linear", ("a", "b"))
    model.eval()
    torch._dynamo.reset()
    compiled, ran = torch.compile(model, backend="eager"), False
    with torch.no_grad():
        for multipliers in ({"a": 1.0}, {"a": 0.3}, {"a": -2.0}, {"b": 0.7}, {"a": 0.5, "b": 0.5}):
            with use_adapters(model, multipliers), torch._dynamo.config.patch(error_on_recompile=ran):
                merge(model)
                assert torch.equal(compiled(x), model(x))
                ran = True
        for m in (4.0, -1.0):  # not merged: what is merged, and what was fused, belongs to another set
            with use_adapters(model, {"a": m}):
                assert torch.allclose(compiled(x), expected(model[0], x, on(model[0], {"a": m})).float(), atol=1e-5)
        with use_adapters(model, {}):
            assert torch.equal(compiled(x), model(x))
