"""LoRA layers against bare torch layers, fp64 formulas and PEFT; toggling, routing, merging, and what must not change."""

import copy
import pickle
import threading

import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sd.attention import CrossAttention, SelfAttention
from sd.clip import CLIP
from sd.config import SD15, TINY
from sd.lora import (
    KINDS,
    LoRAError,
    LoRALayer,
    LoRALinear,
    active_multipliers,
    adapter_names,
    apply_lora_to_model,
    checkpoint,
    find_targets,
    get_lora_parameters,
    lora_layers,
    merge,
    merge_lora_weights,
    merge_loss,
    remove_lora,
    set_adapters,
    set_lora_enabled,
    unmerge,
    unreached_layers,
    use_adapters,
    use_rows,
)
from sd.unet import UNet

LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), (4, 7, 6)),
    "linear no bias": (lambda: nn.Linear(6, 10, bias=False), (4, 6)),
    "linear 1-d": (lambda: nn.Linear(6, 4), (6,)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"), (4, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2), (4, 6, 9, 11)),
    "conv2d groups": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (4, 6, 9, 11)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), (4, 6, 9, 11)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (4, 4, 5, 6, 7)),
    "embedding": (lambda: nn.Embedding(20, 6, padding_idx=3), (4, 7)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (4, 6, 9)),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 7, 6)),
}


def model_and_input(kind: str):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    x = torch.randint(0, 20, shape) if kind == "embedding" else torch.randn(shape)
    return nn.Sequential(make()), x


def fill(model, seed=0, scale=0.3):
    """Random values in all adapters: an adapter that is zero proves nothing."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in get_lora_parameters(model):
            p.add_(torch.randn(p.shape, generator=g) * scale)
    return model


def adapted(kind: str, names=("a",), **kwargs):
    model, x = model_and_input(kind)
    for i, name in enumerate(names):
        apply_lora_to_model(model, rank=2 * (i + 1), alpha=3.0, target_modules=["0"], name=name, **kwargs)
    return fill(model), x


def written_out(layer, name, dtype=torch.float64):
    """ΔW (and Δb) of one adapter from its parameters alone, by the formula, in fp64."""
    adapter, W = layer.adapter(name), layer.weight.to(dtype)
    if adapter.kind == "full":
        return adapter.diff.to(dtype), None if adapter.diff_b is None else adapter.diff_b.to(dtype)
    up, down, groups = adapter.up.to(dtype), adapter.down.to(dtype), getattr(layer, "groups", 1)
    parts = [torch.einsum("or,ri->oi", u.flatten(1), d.flatten(1)) for u, d in zip(up.chunk(groups), down.chunk(groups))]
    delta = torch.cat(parts) * adapter.alpha / adapter.rank
    delta = delta.T if isinstance(layer, nn.Embedding) else delta.reshape(W.shape)
    if adapter.magnitude is not None:
        axes = [i for i, n in enumerate(adapter.magnitude.shape) if n == 1]
        merged = W + delta
        delta = adapter.magnitude.to(dtype) * merged / merged.square().sum(axes, keepdim=True).sqrt() - W
    return delta, None


def plain_with(layer, multipliers, make):
    """A bare torch layer that holds W + Σ mᵢ ΔWᵢ in fp64."""
    plain = make().double()
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        if getattr(plain, "bias", None) is not None:
            plain.bias.copy_(layer.bias)
        for name, m in multipliers.items():
            delta, bias = written_out(layer, name)
            plain.weight.add_(m * delta)
            if bias is not None:
                plain.bias.add_(m * bias)
    return plain


def as_double(x):
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_new_adapter_changes_no_bit_and_off_is_the_bare_layer(kind, dora):
    model, x = model_and_input(kind)
    bare = copy.deepcopy(model)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = bare(x)
        apply_lora_to_model(model, rank=2, alpha=3.0, target_modules=["0"], dora=dora)
        assert torch.equal(model(x), expected)
        with torch.enable_grad():
            assert torch.equal(model(x).detach(), expected)
        fill(model)
        assert not torch.equal(model(x), expected)
        set_lora_enabled(model, False)
        assert torch.equal(model(x), expected)
        set_lora_enabled(model, True)
        with use_adapters(model, {"default": 0.0}):
            assert torch.equal(model(x), expected)
        assert not torch.equal(model(x), expected)
        remove_lora(model)
        assert torch.equal(model(x), expected)
    assert type(model[0]) is type(bare[0]) and list(model.state_dict()) == keys


@pytest.mark.parametrize("path", ["training", "inference", "merged"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_way_to_be_on_equals_a_bare_layer_with_the_summed_weight(kind, dora, path):
    model, x = adapted(kind, ("b", "a"), dora=dora)
    multipliers = {"a": 0.7, "b": -1.3}
    expected = plain_with(model[0], multipliers, LAYERS[kind][0])(as_double(x))
    with use_adapters(model, multipliers):
        if path == "training":
            out = model(x)
            assert out.requires_grad
        else:
            if path == "merged":
                merge(model)
                assert model[0].is_merged()
            with torch.no_grad():
                out = model(x)
    assert (out - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "linear 1-d"])
def test_each_row_gets_the_multipliers_of_its_image(kind, dora, grad):
    model, x = adapted(kind, ("a", "b"), dora=dora)
    table = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.5, -2.0])}
    rows = torch.tensor([1, 0, 0, 1])
    with torch.set_grad_enabled(grad):
        with use_adapters(model, table), use_rows(model, rows):
            out = model(x)
        for row, image in enumerate(rows.tolist()):
            with use_adapters(model, {name: float(m[image]) for name, m in table.items()}):
                alone = model(x[row:row + 1])
            assert torch.allclose(out[row:row + 1], alone, rtol=0, atol=2e-6 * float(alone.detach().abs().max()))


@pytest.mark.parametrize("grad", [False, True])
def test_routes_are_those_of_all_adapters_also_where_one_is_no_low_rank(grad):
    model, x = model_and_input("linear")
    for name in "abc":
        apply_lora_to_model(model, rank=2, target_modules=["0"], name=name, dora=name == "a")
    fill(model)
    with torch.set_grad_enabled(grad), use_adapters(model, {n: torch.eye(4)[i] for i, n in enumerate("abc")}):
        out = model(x)
    for row, multipliers in enumerate(({"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {})):
        with use_adapters(model, multipliers):
            assert torch.allclose(out[row:row + 1], model(x[row:row + 1]), atol=2e-6)


def test_a_layer_adds_the_fields_that_its_class_names_and_loses_them_when_it_is_plain_again():
    plain = nn.Linear(4, 4)
    model = nn.Sequential(copy.deepcopy(plain))

    def fields(layer):
        return {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    apply_lora_to_model(model, rank=2, target_modules=["0"])
    merge(model)
    assert fields(model[0]) - fields(plain) == set(LoRALayer.__annotations__) and len(LoRALayer.__annotations__) <= 8
    remove_lora(model)
    assert fields(model[0]) == fields(plain) and type(model[0]) is nn.Linear


def test_nothing_derived_is_valid_while_a_gradient_waits_for_its_step():
    model, x = adapted("linear")
    layer = model[0]
    with torch.no_grad():
        model(x)
    kept = layer.derived.present
    assert kept.stamp.settled and kept.stamp.still_valid(layer)
    layer.adapter("a").up.grad = torch.zeros_like(layer.adapter("a").up)
    assert not kept.stamp.still_valid(layer)
    with torch.no_grad():
        model(x)
    assert not layer.derived.present.stamp.settled and not layer.derived.present.stamp.still_valid(layer)
    layer.adapter("a").up.grad = None
    assert kept.stamp.still_valid(layer) and not layer.derived.present.stamp.still_valid(layer)


def test_the_fused_weights_of_eight_sets_are_kept():
    model, x = adapted("linear")
    made = []
    with torch.no_grad():
        for m in (*range(1, 10), *range(9, 0, -1)):  # the ninth takes the place of the first
            with use_adapters(model, {"a": float(m)}):
                before = model[0].derived.present
                model(x)
                made.append(before is None)
    assert made == [True] * 9 + [False] * 8 + [True]


def test_a_batch_that_does_not_match_its_rows_is_an_error():
    model, x = adapted("linear")
    with use_adapters(model, {"a": torch.tensor([1.0, 2.0])}), pytest.raises(LoRAError, match="2 rows.*got 4 rows"):
        model(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_merge_and_unmerge_never_write_the_weight_and_keep_the_buffers_address(kind, dtype):
    model, x = adapted(kind, ("a", "b"))
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
            W, delta = model[0].weight.double(), written_out(model[0], "a")[0]
            # Half precision is rounded once: a second time would cost another half of the last bit.
            roundings = 0.6 if dtype.itemsize == 2 else 2
            error = (model[0].merged_weight.double() - (W + delta)).abs().max()
            assert error <= roundings * torch.finfo(dtype).eps * (W + delta).abs().max()
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
    model[0].adapter("a").diff_b = nn.Parameter(torch.randn(10))
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
            assert torch.equal(copied(x := torch.randn(2, 6)), model(x))  # its adapters are its own
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
            expected = plain_with(model[0], {"a": 1.0}, LAYERS["linear"][0])(x.double()).float()
            assert torch.allclose(model(x), expected, atol=1e-5)
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
        expected = unet(*args)
    assert merge_lora_weights(unet) is unet
    assert list(unet.state_dict()) == keys and {n: type(m) for n, m in unet.named_modules()} == modules
    with torch.no_grad():
        assert torch.equal(unet(*args), expected)
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
    W, delta = model[0].weight.double(), written_out(model[0], "a")[0]
    assert (model[0].merged_weight.double() - W - delta).abs().max() < 1e-6


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
        expected = [m.weight + 0.5 * written_out(m, "default", torch.float32)[0] for m in model]
        with use_adapters(model, {"default": 0.5}):
            merge_lora_weights(model)
        assert all(torch.allclose(m.weight, w, atol=1e-6) for m, w in zip(model, expected)) and not lora_layers(model)


def test_an_adapter_attached_inside_use_adapters_is_off_everywhere_afterwards():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_lora_to_model(model, rank=2, target_modules=["0"], name="x")
    with use_adapters(model, {"x": 1.0}):
        apply_lora_to_model(model, rank=2, target_modules=["0", "1"], name="y")
        assert active_multipliers(model) == {"x": 1.0, "y": 1.0}
    assert [m.multipliers for m in model] == [{"x": 1.0}, {}]


def test_a_layer_with_a_forward_of_its_own_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    old = model[0].forward
    model[0].forward = lambda x: old(x)
    with pytest.raises(LoRAError, match="0 has a forward of its own"):
        apply_lora_to_model(model, rank=2, target_modules=["0"])


def test_a_changed_alpha_is_followed():
    model, x = adapted("linear")
    with torch.no_grad():
        model(x)
        model[0].adapter("a").alpha = 8.0
        assert torch.allclose(model(x), plain_with(model[0], {"a": 1.0}, LAYERS["linear"][0])(x.double()).float(), atol=1e-5)


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
    W, delta = model[0].weight.double(), written_out(model[0], "a")[0]
    rounded = (W + delta).to(torch.bfloat16).double()
    assert merge_loss(model) == pytest.approx(float(((rounded - W - delta).norm() / delta.norm()).detach()), rel=1e-3)
    model.to(torch.float32)
    assert merge_loss(model) < 1e-6


# ---- against PEFT ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d", "conv3d", "embedding"])
def test_output_and_gradients_equal_peft(kind, dora):
    make, shape = LAYERS[kind]
    if kind in ("conv1d", "conv2d"):  # PEFT's factors drop the padding mode and the dilation
        make = (lambda: nn.Conv1d(6, 8, 3, padding=1)) if kind == "conv1d" else lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1)
    if kind == "embedding":
        make = lambda: nn.Embedding(20, 6)  # noqa: E731 (PEFT's magnitude takes gradients from padding tokens, ours does not)
    torch.manual_seed(0)
    ours = nn.Sequential(make())
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=dora))
    apply_lora_to_model(ours, rank=2, alpha=3.0, target_modules=["0"])
    layer, peer = ours[0], theirs.base_model.model[0]
    adapter = layer.adapter("default")
    fill(ours)
    with torch.no_grad():
        if kind == "embedding":
            peer.lora_embedding_A["default"].copy_(adapter.down)
            peer.lora_embedding_B["default"].copy_(adapter.up)
        else:
            peer.lora_A["default"].weight.copy_(adapter.down)
            peer.lora_B["default"].weight.copy_(adapter.up)
        if dora:
            m = peer.lora_magnitude_vector["default"].weight
            m.mul_(torch.rand(m.shape) + 0.5)
            adapter.start_magnitude(layer.weight)
            adapter.magnitude.copy_(m.reshape(adapter.magnitude.shape))
    x = torch.randint(0, 20, shape) if kind == "embedding" else torch.randn(shape)
    target = torch.randn_like(ours(x))
    for model in (ours, theirs):
        (model(x) * target).sum().backward()
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    if kind == "embedding":
        assert torch.allclose(adapter.down.grad, peer.lora_embedding_A["default"].grad, atol=1e-4)
    else:
        assert torch.allclose(adapter.down.grad, peer.lora_A["default"].weight.grad, atol=1e-4)
        assert torch.allclose(adapter.up.grad, peer.lora_B["default"].weight.grad, atol=1e-4)
    if dora:
        expected = peer.lora_magnitude_vector["default"].weight.grad.reshape(adapter.magnitude.shape)
        assert torch.allclose(adapter.magnitude.grad, expected, atol=1e-4)


# ---- names, targets, counts ------------------------------------------------------------------------------------------

def sd15_unet():
    with torch.device("meta"):
        return UNet(SD15.unet)


def test_trainable_parameters_on_sd15_are_those_of_the_papers_tables():
    counts = {}
    for rank, targets in ((8, ["q_proj", "v_proj"]), (4, None), (8, "attn"), (16, "attn")):
        unet = apply_lora_to_model(sd15_unet(), rank=rank, target_modules=targets)
        counts[rank, str(targets)] = sum(p.numel() for p in get_lora_parameters(unet))
    assert counts == {(8, "['q_proj', 'v_proj']"): 797_184, (4, "None"): 797_184, (8, "attn"): 1_594_368,
                      (16, "attn"): 3_188_736}
    assert sum(p.numel() for p in get_lora_parameters(
        apply_lora_to_model(sd15_unet(), rank=8, target_modules=[r"attn2\.[qv]_proj$"]))) == 397_824


def test_presets_reach_the_layers_they_promise():
    with torch.device("meta"):
        clip = CLIP(SD15.clip)
    assert len(find_targets(sd15_unet())) == 128
    assert len(find_targets(sd15_unet(), "kohya")) == 192
    assert len(find_targets(clip, "kohya")) == 72
    everything = {n for n, m in sd15_unet().named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {p.removeprefix("diffusion.") for p in find_targets(sd15_unet(), "full")} == everything - {"conv_in", "conv_out"}


def test_a_plain_name_matches_whole_components_only():
    unet = UNet(TINY.unet)
    assert find_targets(unet, ["conv1"]).keys() == find_targets(unet, [r"\.conv1$"]).keys()
    assert all(".attn1." in p for p in find_targets(unet, ["attn1"]))
    assert all(p.startswith("diffusion.down_blocks.0.") for p in find_targets(unet, ["down_blocks.0"]))
    assert not any(isinstance(m, nn.GroupNorm) for m in find_targets(unet, ["resnets"]).values())
    for wrong in ("con", "q_pro", "proj"):
        with pytest.raises(LoRAError, match=f"target '{wrong}' matches no layer"):
            find_targets(unet, [wrong])
    with pytest.raises(LoRAError, match="not a regular expression"):
        find_targets(unet, ["q_proj("])


def test_q_and_v_reach_self_and_cross_attention():
    paths = list(find_targets(UNet(TINY.unet), ["q_proj", "v_proj"]))
    assert {p.split(".")[-2] for p in paths} == {"attn1", "attn2"} and {p.split(".")[-1] for p in paths} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", ["train", "type", "v1.5", "", "a b/ü%2E", "_", ".", "apply", "modules", "_call__"])
def test_any_text_is_a_name(name):
    model, x = model_and_input("linear")
    apply_lora_to_model(model, rank=2, target_modules=["0"], name=name)
    fill(model)
    assert adapter_names(model) == [name] and len(get_lora_parameters(model, name)) == 2
    with use_adapters(model, {name: 2.0}):
        model(x)
    model.load_state_dict(model.state_dict())
    remove_lora(model, name)
    assert not lora_layers(model)


@given(st.lists(st.text(max_size=6), min_size=2, max_size=4, unique=True))
@settings(max_examples=30, deadline=None)
def test_different_names_never_meet(names):
    layer = LoRALinear(4, 4)
    for i, name in enumerate(names):
        layer.add_adapter(name, KINDS["lora"](layer.lora_shape(), 1 + i % 4))
    assert layer.adapter_names == names


@pytest.mark.parametrize("arguments, sentence", [
    (dict(rank=0), r"rank 0 does not fit 0, which maps 6 to 10 values; allowed: 1 to 6"),
    (dict(rank=7), r"rank 7 does not fit"),
    (dict(rank=2.0), r"rank 2.0 does not fit"),
    (dict(name="taken"), r"an adapter named 'taken' already exists"),
    (dict(kind="loraa"), r"kind 'loraa' is unknown; allowed: lora, full"),
    (dict(dropout=1.0), r"dropout is 1.0; allowed: 0 <= dropout < 1"),
    (dict(alpha=float("nan")), r"alpha is nan"),
    (dict(target_modules=[]), r"target_modules is empty"),
    (dict(target_modules=["1"]), r"target '1' matches no layer"),
])
def test_bad_arguments_are_one_sentence_and_change_nothing(arguments, sentence):
    model, x = model_and_input("linear")
    apply_lora_to_model(model, rank=2, target_modules=["0"], name="taken")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LoRAError, match=sentence):
        apply_lora_to_model(model, **(dict(rank=2, target_modules=["0"], name="new") | arguments))
    assert model.state_dict().keys() == state.keys() and adapter_names(model) == ["taken"]


def test_a_failed_attach_converts_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(LoRAError, match="rank 4 does not fit 1"):
        apply_lora_to_model(model, rank=4, target_modules=["0", "1"])
    assert [type(m) for m in model] == [nn.Linear, nn.Linear] and not hasattr(model[0], "adapters")


def test_layers_whose_forward_can_be_bypassed_are_refused():
    class MyEncoder(nn.TransformerEncoderLayer):
        pass

    for target in ("linear1", "out_proj"):
        with pytest.raises(LoRAError, match="lies in a MyEncoder, which can bypass"):
            apply_lora_to_model(MyEncoder(8, 2, 16), rank=2, target_modules=[target])

    class Mine(nn.Linear):
        pass

    with pytest.raises(LoRAError, match="0 is a Mine, which has no LoRA form"):
        apply_lora_to_model(nn.Sequential(Mine(4, 4)), rank=2, target_modules=["0"])
    with pytest.raises(LoRAError, match="max_norm"):
        apply_lora_to_model(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), rank=2, target_modules=["0"])


def test_a_probe_names_the_adapted_layers_that_are_not_reached():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    apply_lora_to_model(model, rank=2, target_modules=["used", "idle"])
    assert unreached_layers(model, lambda: model["used"](torch.randn(1, 4))) == ["idle"]


# ---- the active set --------------------------------------------------------------------------------------------------

def test_the_active_set_is_exact_and_returns_after_an_exception():
    model, x = adapted("linear", ("a", "b"))
    set_adapters(model, {"a": 0.5})
    with pytest.raises(RuntimeError, match="boom"):
        with use_adapters(model, {"b": 2.0}):
            assert active_multipliers(model) == {"b": 2.0}
            raise RuntimeError("boom")
    assert active_multipliers(model) == {"a": 0.5}
    for wrong in ({"c": 1.0}, {"a": float("nan")}, {"a": "x"}, {"a": None}, {"a": torch.tensor([])},
                  {"a": torch.tensor([1.0]), "b": torch.tensor([1.0, 2.0])}):
        with pytest.raises(LoRAError), use_adapters(model, wrong):
            raise AssertionError("must not get here")
    with pytest.raises(LoRAError, match="no adapter is named 'c'; loaded: 'a', 'b'"), use_adapters(model, {"c": 1.0}):
        pass
    assert active_multipliers(model) == {"a": 0.5}


def test_two_threads_never_share_an_active_set():
    model, x = adapted("linear", ("a", "b"))
    with torch.no_grad():
        expected = {}
        for name in ("a", "b"):
            with use_adapters(model, {name: 1.0}):
                expected[name] = model(x)
    wrong = []

    def use(name):
        for _ in range(50):
            with torch.no_grad(), use_adapters(model, {name: 1.0}):
                if not torch.equal(model(x), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=use, args=(name,)) for name in ("a", "b", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_created_adapters_are_the_default_parameters():
    model, _ = adapted("linear", ("a", "b"))
    model[0].adapter("b").from_file = True
    assert {id(p) for p in get_lora_parameters(model)} == {id(p) for p in model[0].adapter("a").parameters()}
    assert len(get_lora_parameters(model, "b")) == 2
    with pytest.raises(LoRAError, match="no adapter is named 'c'"):
        get_lora_parameters(model, "c")


def test_adapters_stay_fp32_when_the_model_becomes_half():
    model, x = adapted("linear")
    model.half()
    assert {p.dtype for p in get_lora_parameters(model)} == {torch.float32} and model[0].weight.dtype == torch.float16
    assert model(x.half()).dtype == torch.float16
    with torch.no_grad():
        assert model(x.half()).dtype == torch.float16


# ---- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dropout", ["dropout", "rank_dropout", "module_dropout"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_dropout_keeps_the_mean_and_is_off_in_eval_and_in_merges(kind, dropout):
    model, x = model_and_input(kind)
    apply_lora_to_model(model, rank=2, alpha=3.0, target_modules=["0"], **{dropout: 0.5})
    fill(model)
    model.eval()
    exact = model(x)
    assert torch.equal(model(x), exact)
    model.train()
    torch.manual_seed(0)
    samples = torch.stack([model(x).detach() for _ in range(2000)])
    with torch.no_grad():
        with use_adapters(model, {}):
            change = exact - model(x)
    keep = 1.0 if dropout != "module_dropout" else 0.5  # a skipped module is not made up for
    assert (samples[0] - samples[1]).abs().max() > 0
    assert (samples.mean(0) - (exact - change + keep * change)).abs().mean() < 0.1 * change.abs().mean() + 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_equal_those_of_the_written_out_formula(dora):
    model, x = adapted("linear", dora=dora)
    layer, target = model[0], torch.randn(4, 7, 10)
    adapter = layer.adapter("a")
    (model(x) * target).sum().backward()
    up, down = (p.detach().double().requires_grad_() for p in (adapter.up, adapter.down))
    W, delta = layer.weight.detach().double(), 1.5 * up @ down
    if dora:
        m = adapter.magnitude.detach().double().requires_grad_()
        delta = m * (W + delta) / (W + delta).norm(dim=1, keepdim=True).detach() - W
    (F.linear(x.double(), W + delta, layer.bias.double()) * target).sum().backward()
    assert torch.allclose(adapter.up.grad.double(), up.grad, atol=1e-4)
    assert torch.allclose(adapter.down.grad.double(), down.grad, atol=1e-4)
    if dora:
        assert torch.allclose(adapter.magnitude.grad.double(), m.grad, atol=1e-4)


def test_checkpointing_gives_the_same_gradients_and_recomputes_with_the_set_of_the_forward():
    torch.manual_seed(0)
    unet = UNet(TINY.unet)
    unet.requires_grad_(False)
    for name in ("a", "b"):
        apply_lora_to_model(unet, rank=2, target_modules="full", name=name, dropout=0.3)
    fill(unet)
    args = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 9, 32)
    grads = []
    for checkpointing in (False, True):
        unet.checkpointing = checkpointing
        unet.zero_grad()
        torch.manual_seed(1)
        with use_adapters(unet, {"a": torch.tensor([0.5, 1.0])}):
            loss = unet(*args).square().sum()
        loss.backward()  # outside: what is active by now is not what was
        grads.append({n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all("_a." in n for n in grads[0])
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_a_foreign_checkpoint_that_recomputes_with_another_set_raises():
    model, x = adapted("linear")
    for before, after in ((1.0, 2.0), (1.0, -1.0), (-1.0, -2.0)):
        with use_adapters(model, {"a": before}):
            loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum()
        with use_adapters(model, {"a": after}), pytest.raises(LoRAError, match="active LoRA set changed"):
            loss.backward()
    loss = checkpoint(model, x).sum()
    with use_adapters(model, {"a": 5.0}):
        loss.backward()


def test_base_weights_get_no_gradient_and_stay_as_they_are():
    model, x = adapted("linear")
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    weight, up = model[0].weight.clone(), model[0].adapter("a").up.detach().clone()
    optimizer = torch.optim.SGD(get_lora_parameters(model), 0.1)
    model(x).sum().backward()
    optimizer.step()
    assert model[0].weight.grad is None and torch.equal(model[0].weight, weight)
    assert not torch.equal(model[0].adapter("a").up, up)


# ---- the seed's own faces --------------------------------------------------------------------------------------------

def test_lora_linear_starts_with_an_adapter_when_it_has_a_rank():
    layer = LoRALinear(8, 6, rank=3, alpha=2.0)
    assert layer.adapter_names == ["default"] and list(LoRALinear(8, 6).state_dict()) == ["weight", "bias"]
    down = layer.adapter("default").down
    assert down.abs().max() <= 8 ** -0.5 and down.std() > 0.1 and not layer.adapter("default").up.any()
    with pytest.raises(LoRAError, match="rank 7 does not fit LoRALinear"):
        LoRALinear(8, 6, rank=7)


def test_attention_projects_with_lora_layers():
    for attention in (SelfAttention(2, 8), CrossAttention(2, 8, 12)):
        assert all(isinstance(getattr(attention, p), LoRALinear) for p in ("q_proj", "k_proj", "v_proj", "out_proj"))
    assert all(isinstance(m, LoRALayer) for m in find_targets(sd15_unet()).values())


def test_self_attention_equals_torch_multi_head_attention():
    torch.manual_seed(0)
    ours, peer = SelfAttention(2, 8), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        peer.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        peer.out_proj.weight.copy_(ours.out_proj.weight)
        peer.out_proj.bias.copy_(ours.out_proj.bias)
    x = torch.randn(3, 5, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    assert torch.allclose(ours(x), peer(x, x, x)[0], atol=1e-6)
    assert torch.allclose(ours(x, causal_mask=True), peer(x, x, x, attn_mask=causal)[0], atol=1e-6)


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
                assert torch.allclose(compiled(x), plain_with(model[0], {"a": m}, LAYERS["linear"][0])(x.double()).float(),
                                      atol=1e-5)
        with use_adapters(model, {}):
            assert torch.equal(compiled(x), model(x))
