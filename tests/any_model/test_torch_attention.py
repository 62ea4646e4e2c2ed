"""LoRA in torch's own attention, encoder and transformer, against bare ones with changed weights, and PEFT."""

import copy
from functools import partial

import peft
import pytest
import torch
import torch.nn as nn

from sd.lora import (
    LoRAError,
    apply_lora_to_model,
    lora_layers,
    remove_lora,
    unreached_layers,
    use_adapters,
)
from tests.adapters.cases import fill
from tests.any_model.tiny import ALPHA, RANK
from tests.any_model.zoo import as_double, assert_near, changed, delta, encoder

MASK = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.3
ATTENTION = {
    "plain": ({}, {}),
    "no bias": (dict(bias=False), {}),
    "other widths": (dict(kdim=5, vdim=7), {}),
    "bias rows": (dict(add_bias_kv=True), dict(key_padding_mask=torch.tensor([[0, 1, 0, 0, 0, 1]] * 3).bool())),
    "zero row": (dict(add_zero_attn=True), dict(attn_mask=MASK.float())),
    "both rows and a mask": (dict(add_zero_attn=True, add_bias_kv=True), dict(attn_mask=MASK)),
    "each head a mask": ({}, dict(attn_mask=torch.randn(6, 4, 6))),
    "both masks": ({}, dict(attn_mask=torch.randn(4, 6), key_padding_mask=torch.randn(3, 6))),
    "weights of each head": ({}, dict(average_attn_weights=False)),
    "only the output": ({}, dict(need_weights=False, attn_mask=MASK)),
}


@pytest.mark.parametrize("layout", ["batch first", "batch second", "no batch"])
@pytest.mark.parametrize("case", ATTENTION)
def test_torchs_attention_with_adapters_is_torchs_attention_with_changed_weights(case, layout):
    torch.manual_seed(0)
    options, arguments = ATTENTION[case]
    bare = nn.MultiheadAttention(8, 2, batch_first=layout == "batch first", **options)
    q, k, v = torch.randn(3, 4, 8), torch.randn(3, 6, options.get("kdim", 8)), torch.randn(3, 6, options.get("vdim", 8))
    if layout == "batch second":
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    if layout == "no batch":
        q, k, v = q[0], k[0], v[0]
        arguments = {n: m[0] if n == "key_padding_mask" else m[:2] if getattr(m, "ndim", 0) == 3 else m
                     for n, m in arguments.items() if isinstance(m, torch.Tensor)} | {
                         n: m for n, m in arguments.items() if not isinstance(m, torch.Tensor)}
    model = apply_lora_to_model(copy.deepcopy(bare), rank=RANK, alpha=ALPHA, target_modules="full")
    fill(model)
    assert list(lora_layers(model)) == ["out_proj", "q_proj", "k_proj", "v_proj"]
    reference = copy.deepcopy(bare).double()
    for i, path in enumerate(("q_proj", "k_proj", "v_proj", "out_proj")):
        whole = reference.out_proj.weight if i == 3 else getattr(reference, path + "_weight")
        weight = reference.in_proj_weight.data.chunk(3)[i] if whole is None else whole.data
        weight += delta(lora_layers(model)[path], "default")
    double = {n: as_double(m) if isinstance(m, torch.Tensor) else m for n, m in arguments.items()}
    expected = reference(q.double(), k.double(), v.double(), **double)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(q, k, v, **arguments)
        for ours, theirs in zip(found, expected):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.shape == theirs.shape
                assert_near(ours, theirs)
    with use_adapters(model, {}):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(model(q, k, v, **arguments), bare(q, k, v, **arguments)))


def test_the_hint_that_a_mask_is_causal_is_followed_and_needs_the_mask():
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    apply_lora_to_model(model, rank=RANK, target_modules="full")
    fill(model)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    plain = model(x, x, x, attn_mask=mask, need_weights=False)[0]
    assert_near(model(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)[0], plain)
    assert_near(model(x, x, x, attn_mask=mask, is_causal=True)[0], plain)
    with pytest.raises(ValueError, match="give the mask too"):
        model(x, x, x, is_causal=True)


def test_the_attentions_dropout_is_at_work_in_training_only():
    model, x = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), torch.randn(3, 5, 8)
    fill(apply_lora_to_model(model, rank=RANK, target_modules="full"))
    for need_weights in (True, False):
        call = partial(model, x, x, x, need_weights=need_weights)
        assert not torch.equal(call()[0], call()[0])
        model.eval()
        assert torch.equal(call()[0], call()[0])
        model.train()


def test_output_and_gradients_of_a_fused_projection_equal_pefts():
    torch.manual_seed(0)
    ours, x = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(3, 5, 8)
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"]))
    # Without out_proj, whose adapter stays zero in PEFT too: its forward counts that change twice.
    fill(apply_lora_to_model(ours, rank=RANK, alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj"]))
    peer, layers = theirs.base_model.model[0], lora_layers(ours)
    q, k, v = (layers[f"0.{name}"].adapter("default") for name in ("q_proj", "k_proj", "v_proj"))
    with torch.no_grad():
        k.down.copy_(q.down)
        v.down.copy_(q.down)
        peer.lora_A["default"].weight.copy_(q.down)
        peer.lora_B["default"].weight.copy_(torch.cat([q.up, k.up, v.up]))
    outputs = [model[0](x, x, x)[0] for model in (ours, theirs.base_model.model)]
    assert torch.allclose(*outputs, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    assert torch.allclose(q.down.grad + k.down.grad + v.down.grad, peer.lora_A["default"].weight.grad, atol=1e-4)
    assert torch.allclose(torch.cat([q.up.grad, k.up.grad, v.up.grad]), peer.lora_B["default"].weight.grad, atol=1e-4)


@pytest.mark.parametrize("targets", [["0.linear1"], ["1.linear2"], ["1.self_attn"], ["0.self_attn.q_proj"], ["1.norm1"]])
def test_the_fast_path_of_an_encoder_is_left_while_an_adapter_is_on_and_taken_otherwise(targets, monkeypatch):
    torch.manual_seed(0)
    bare, x = encoder().eval().requires_grad_(False), torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    model = fill(apply_lora_to_model(copy.deepcopy(bare), rank=RANK, alpha=ALPHA, target_modules=targets))
    taken, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: taken.append(1) or fast(*args))
    reference = changed(model, bare, {"default": 1.0})
    with torch.no_grad():
        for mask in (None, padding):
            out, expected = (m(as_double(x) if m is reference else x, src_key_padding_mask=mask) for m in (model, reference))
            keep = torch.ones(3, 5, dtype=bool) if mask is None else ~mask
            assert_near(out[keep], expected[keep])
            taken.clear()
            with use_adapters(model, {}):
                assert torch.equal(model(x, src_key_padding_mask=mask), bare(x, src_key_padding_mask=mask))
            assert len(taken) == 4


def test_a_whole_transformer_with_masks_is_reached_everywhere():
    torch.manual_seed(0)
    bare = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True).eval().requires_grad_(False)
    model = fill(apply_lora_to_model(copy.deepcopy(bare), rank=RANK, alpha=ALPHA, target_modules="full"))
    x, y = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    call = dict(tgt_mask=nn.Transformer.generate_square_subsequent_mask(4), tgt_is_causal=True)
    assert len(lora_layers(model)) == 2 + 2 + 3 * 4 and not unreached_layers(model, lambda: model(x, y, **call))
    reference = changed(model, bare, {"default": 1.0})
    assert_near(model(x, y, **call), reference(x.double(), y.double(), **call))
    remove_lora(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]


def test_a_class_of_ones_own_made_from_torchs_attention_is_refused():
    class MyAttention(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"mine": MyAttention(8, 2), "plain": nn.Linear(8, 8)})
    with pytest.raises(LoRAError, match=r"mine.out_proj lies in a MyAttention, which can bypass"):
        apply_lora_to_model(model, rank=2, target_modules="full")
    apply_lora_to_model(model, rank=2, target_modules=["plain"])


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer(8, 2, 16), nn.LSTM(8, 8), nn.GRU(8, 8), nn.RNN(8, 8)])
def test_multipliers_by_image_are_refused_where_rows_are_positions(layer):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    apply_lora_to_model(model, rank=2, target_modules=["0"])
    with pytest.raises(LoRAError, match="^1.* is made with batch_first=False"), use_adapters(model, {"default": torch.ones(4)}):
        pass
    with use_adapters(model, {"default": 0.5}):
        model(torch.randn(5, 4, 8))


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"kind": "loha"}])
def test_one_row_that_all_samples_share_parts_into_theirs(options):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8)).requires_grad_(False), torch.randn(1, 5, 6)
    for i, name in enumerate("abc"):  # c has another form, so that layers hold both at once
        apply_lora_to_model(model, rank=RANK, alpha=ALPHA, target_modules=["0"], name=name, **options if name != "c" else {})
        fill(model, name, seed=i)
    table = {"a": [1.0, 0, 0.5], "b": [0, 0, -1], "c": [0, 0.7, 0]}
    for names in ("ab", "abc"):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), use_adapters(model, {n: torch.tensor(table[n]) for n in names}):
                out = model(x).detach()
            for i in range(3):
                with torch.no_grad(), use_adapters(model, {n: table[n][i] for n in names}):
                    assert_near(out[i:i + 1], model(x))


@pytest.mark.parametrize("holder, name", [("", "use_nested_tensor"), ("layers.0", "activation_relu_or_gelu")])
def test_what_decides_on_the_fast_path_may_be_set_while_adapters_lie_in_the_encoder(holder, name):
    model = apply_lora_to_model(encoder(), rank=2, target_modules="full")
    module = model.get_submodule(holder)
    setattr(module, name, False)
    remove_lora(model)
    assert module.__dict__[name] is False


@pytest.mark.parametrize("masks", [
    {"key_padding_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])}, {"key_padding_mask": torch.zeros(1, 4, dtype=torch.bool)},
    {"attn_mask": torch.zeros(1, 4, dtype=torch.bool)}, {"attn_mask": torch.zeros(2, 4, 4, dtype=torch.bool)}])
def test_masks_that_torchs_attention_refuses_are_refused_with_an_adapter_too(masks):
    bare, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 4, 8)
    with pytest.raises((RuntimeError, AssertionError)):
        bare(x, x, x, **masks)
    model = apply_lora_to_model(bare, rank=RANK, target_modules="full")
    with pytest.raises(ValueError, match=next(iter(masks))):
        model(x, x, x, **masks)
