"""LoRA layers against bare torch layers, fp64 formulas and PEFT: on, off, by rows, in training; what must not change."""

import copy

import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from sd.attention import SelfAttention
from sd.config import TINY
from sd.lora import (
    LoRAError,
    LoRALayer,
    LoRALinear,
    apply_lora_to_model,
    checkpoint,
    get_lora_parameters,
    merge,
    remove_lora,
    set_lora_enabled,
    use_adapters,
    use_rows,
)
from sd.unet import UNet
from tests.adapters.cases import LAYERS, adapted, expected, fill, model_and_input, on


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_new_adapter_changes_no_bit_and_off_is_the_bare_layer(name, dora):
    model, x = model_and_input(name)
    bare = copy.deepcopy(model)
    keys = list(model.state_dict())
    with torch.no_grad():
        want = bare(x)
        apply_lora_to_model(model, rank=2, alpha=3.0, target_modules=["0"], dora=dora)
        assert torch.equal(model(x), want)
        with torch.enable_grad():
            assert torch.equal(model(x).detach(), want)
        fill(model)
        assert not torch.equal(model(x), want)
        set_lora_enabled(model, False)
        assert torch.equal(model(x), want)
        set_lora_enabled(model, True)
        with use_adapters(model, {"default": 0.0}):
            assert torch.equal(model(x), want)
        assert not torch.equal(model(x), want)
        remove_lora(model)
        assert torch.equal(model(x), want)
    assert type(model[0]) is type(bare[0]) and list(model.state_dict()) == keys


@pytest.mark.parametrize("path", ["training", "inference", "merged"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_every_way_to_be_on_equals_a_bare_layer_with_the_summed_weight(name, dora, path):
    model, x = adapted(name, ("b", "a"), dora=dora)
    multipliers = {"a": 0.7, "b": -1.3}
    want = expected(model[0], x, on(model[0], multipliers))
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
    assert (out - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "one row"])
def test_each_row_gets_the_multipliers_of_its_image(name, dora, grad):
    model, x = adapted(name, ("a", "b"), dora=dora)
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


def test_a_changed_alpha_is_followed():
    model, x = adapted("linear")
    with torch.no_grad():
        model(x)
        model[0].adapter("a").alpha = 8.0
        assert torch.allclose(model(x), expected(model[0], x, on(model[0], {"a": 1.0})).float(), atol=1e-5)


# ---- against PEFT ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv3x3", "conv1d", "conv3d", "embedding"])
def test_output_and_gradients_equal_peft(name, dora):
    ours, x = model_and_input(name)
    if name == "embedding":
        ours[0].padding_idx = None  # PEFT's magnitude takes gradients from padding tokens, ours does not
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=dora))
    apply_lora_to_model(ours, rank=2, alpha=3.0, target_modules=["0"])
    layer, peer = ours[0], theirs.base_model.model[0]
    adapter = layer.adapter("default")
    fill(ours)
    with torch.no_grad():
        if name == "embedding":
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
    target = torch.randn_like(ours(x))
    for model in (ours, theirs):
        (model(x) * target).sum().backward()
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    if name == "embedding":
        assert torch.allclose(adapter.down.grad, peer.lora_embedding_A["default"].grad, atol=1e-4)
    else:
        assert torch.allclose(adapter.down.grad, peer.lora_A["default"].weight.grad, atol=1e-4)
        assert torch.allclose(adapter.up.grad, peer.lora_B["default"].weight.grad, atol=1e-4)
    if dora:
        want = peer.lora_magnitude_vector["default"].weight.grad.reshape(adapter.magnitude.shape)
        assert torch.allclose(adapter.magnitude.grad, want, atol=1e-4)


# ---- training --------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("dropout", ["dropout", "rank_dropout", "module_dropout"])
@pytest.mark.parametrize("name", ["linear", "conv3x3", "embedding"])
def test_dropout_keeps_the_mean_and_is_off_in_eval_and_in_merges(name, dropout):
    model, x = model_and_input(name)
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
    layer, target = model[0], torch.randn(4, 5, 8)
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


# ---- LoRALinear and attention ----------------------------------------------------------------------------------------

def test_lora_linear_starts_with_an_adapter_when_it_has_a_rank():
    layer = LoRALinear(8, 6, rank=3, alpha=2.0)
    assert layer.adapter_names == ["default"] and list(LoRALinear(8, 6).state_dict()) == ["weight", "bias"]
    down = layer.adapter("default").down
    assert down.abs().max() <= 8 ** -0.5 and down.std() > 0.1 and not layer.adapter("default").up.any()
    with pytest.raises(LoRAError, match="rank 7 does not fit LoRALinear"):
        LoRALinear(8, 6, rank=7)


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
