"""LoRA on models that are not ours: torch's and transformers' layers against bare ones with the changed weight, and PEFT."""

import copy
import math
import pickle
import warnings

import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from sd.adapters import layers as lora_layers_module
from sd.adapters.quant import dequantize_base, quantize_base, quantized_kinds
from sd.lora import (
    KINDS,
    LoRAError,
    LoRALayer,
    apply_lora_to_model,
    find_targets,
    get_lora_parameters,
    load_lora_weights,
    lora_layers,
    merge,
    merge_lora_weights,
    recomputation,
    register_lora_layer,
    remove_lora,
    save_lora_weights,
    set_lora_enabled,
    tied_layers,
    unmerge,
    use_adapters,
)
from tests.adapters.cases import fill
from tests.any_model.tiny import ALPHA, RANK, tokens
from tests.any_model.zoo import ZOO, Attention, adapted, as_double, assert_near, changed, encoder, gpt2, made, run

# name -> (a model, its input, targets)


# ---- every kind of model -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ZOO)
def test_off_is_the_bare_model_and_on_is_the_bare_model_with_changed_weights(kind):
    model, bare, x = adapted(kind, ("a", "b"))
    multipliers = {"a": 0.7, "b": -1.2}
    expected, before = run(changed(model, bare, multipliers), as_double(x)), run(bare, x)
    with use_adapters(model, multipliers):
        trained = run(model, x)
        assert trained.requires_grad
        with torch.no_grad():
            fused = run(model, x)
            merge(model)
            merged = run(model, x)
            assert all(layer.is_merged() for layer in lora_layers(model).values())
            unmerge(model)
            assert torch.equal(run(model, x), fused)
    for out in (trained, fused, merged):
        assert_near(out, expected)
    with use_adapters(model, {}):
        assert torch.equal(run(model, x), before)
    set_lora_enabled(model, False)
    assert torch.equal(run(model, x), before)
    remove_lora(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]
    assert list(model.state_dict()) == list(bare.state_dict()) and torch.equal(run(model, x), before)


@pytest.mark.parametrize("kind", ZOO)
def test_each_sample_of_a_batch_gets_its_own_adapters(kind):
    model, bare, x = adapted(kind, ("a", "b"))
    for table in ({"a": [1.0, 0, 0, 2.0], "b": [0, 0, 0.5, 0]}, {"a": [1.0, 0, 0.5, 0], "b": [1.0, -1, 0, 0]}):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), use_adapters(model, {n: torch.tensor(m) for n, m in table.items()}):
                out = run(model, x).detach()
            for i in range(4):
                expected = run(changed(model, bare, {n: m[i] for n, m in table.items()}), as_double(x[i:i + 1]))
                assert_near(out[i:i + 1], expected)


@pytest.mark.parametrize("kind", ZOO)
def test_a_file_under_module_paths_brings_the_adapter_to_another_model(kind, tmp_path):
    model, bare, x = adapted(kind)
    save_lora_weights(model, tmp_path / "a.safetensors")
    keys = load_file(tmp_path / "a.safetensors")
    assert {key.rsplit(".lora_", 1)[0] for key in keys if "lora_" in key} <= set(lora_layers(model))
    report = load_lora_weights(bare, tmp_path / "a.safetensors", "loaded")
    assert report.tensors == len(keys) and sum(report.modules.values()) == len(lora_layers(model))
    with torch.no_grad():
        assert torch.equal(run(bare, x), run(model, x))


@pytest.mark.parametrize("kind", ZOO)
def test_merged_for_good_it_is_a_plain_model_again(kind):
    model, bare, x = adapted(kind, ("a", "b"))
    with use_adapters(model, {"a": 0.5, "b": 1.0}):
        expected = run(changed(model, bare, {"a": 0.5, "b": 1.0}), as_double(x))
        merge_lora_weights(model, untie=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()] and not lora_layers(model)
    assert list(model.state_dict()) == list(bare.state_dict())
    assert not any(p.requires_grad for p in model.parameters())
    assert_near(run(model, x), expected)


@pytest.mark.parametrize("kind", ZOO)
def test_a_copy_and_a_pickle_do_as_the_model_does_with_parameters_of_their_own(kind):
    model, _, x = adapted(kind, ("a", "b"))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        for multipliers in ({"a": 1.0}, {"b": 0.5}, {}):
            with use_adapters(model, multipliers), use_adapters(other, multipliers):
                assert torch.equal(run(other, x), run(model, x))
    fill(copies[0], "a", seed=9)
    with use_adapters(model, {"a": 1.0}), use_adapters(copies[0], {"a": 1.0}), use_adapters(copies[1], {"a": 1.0}):
        assert not torch.equal(run(copies[0], x), run(model, x)) and torch.equal(run(copies[1], x), run(model, x))


@pytest.mark.parametrize("kind", ["root linear", "root embedding", "root Conv1D", "conv2d same", "attention", "encoder layer"])
def test_compiled_code_does_as_the_model_does(kind):
    if kind == "encoder layer":
        model, x = encoder(1).layers[0].eval().requires_grad_(False), torch.randn(4, 5, 8)
        fill(apply_lora_to_model(model, rank=RANK, target_modules="full", name="a"))
    else:
        model, _, x = adapted(kind)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for multipliers in ({"a": 1.0}, {}):
        with torch.no_grad(), use_adapters(model, multipliers):
            assert_near(run(compiled, x), run(model, x))
    if kind == "root linear":
        with use_adapters(model, {"a": torch.tensor([1.0, 0, 0, 1])}):
            out = run(compiled, x)
            assert_near(out, run(model, x))
        out.sum().backward()
        assert all(p.grad is not None for p in get_lora_parameters(model, "a"))


@pytest.mark.parametrize("kind", [kind for kind in ZOO if "norm" not in kind.split()[-1]])
def test_a_low_rank_is_one_also_for_convolutions(kind):
    model, bare, _ = adapted(kind)
    merge(model)
    for path, layer in lora_layers(model).items():
        if layer.adapter("a").kind == "lora":
            change = (layer.merged_weight - layer.plain_weight()).double().flatten(1)
            values = torch.linalg.svdvals(change)
            assert (values > 1e-5 * values[0]).sum() == min(RANK, *change.shape), path


# ---- convolutions and embeddings ---------------------------------------------------------------------------------------

def test_only_a_rank_that_the_groups_do_not_divide_is_refused():
    for rank, fits in ((2, False), (4, True), (6, False), (8, True), (12, False)):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))
        if fits:
            apply_lora_to_model(model, rank=rank, target_modules="full")
        else:
            with pytest.raises(LoRAError, match=f"rank {rank} "):
                apply_lora_to_model(model, rank=rank, target_modules="full")
    apply_lora_to_model(nn.Sequential(nn.Conv1d(16, 16, 3, groups=16)), rank=16, target_modules="full")  # depthwise


def test_padding_tokens_are_never_changed_by_training():
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=3))
    apply_lora_to_model(model, rank=2, target_modules=["0"])
    before = model[0].weight[3].clone()
    optimizer = torch.optim.AdamW(get_lora_parameters(model), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.arange(9)) - 1).square().sum().backward()
        optimizer.step()
    out = model(torch.arange(9)).detach()
    assert torch.equal(out[3], before) and not torch.equal(out, model[0].weight)


def test_gradients_of_an_embedding_scale_by_frequency_as_pefts_and_a_trained_base_keeps_sparse_ones():
    x = torch.tensor([[1, 1, 1, 2, 5]])
    ours = nn.Sequential(nn.Embedding(9, 6, scale_grad_by_freq=True))
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"]))
    apply_lora_to_model(ours, rank=RANK, alpha=ALPHA, target_modules=["0"])
    adapter, peer = fill(ours)[0].adapter("default"), theirs.base_model.model[0]
    with torch.no_grad():
        peer.lora_embedding_A["default"].copy_(adapter.down)
        peer.lora_embedding_B["default"].copy_(adapter.up)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    assert torch.allclose(adapter.down.grad, peer.lora_embedding_A["default"].grad, atol=1e-5)
    sparse = nn.Sequential(nn.Embedding(9, 6, sparse=True))
    apply_lora_to_model(sparse, rank=2, target_modules=["0"])
    sparse(x).sum().backward()
    assert sparse[0].weight.grad.is_sparse


def test_an_embedding_with_max_norm_is_refused():
    with pytest.raises(LoRAError, match="max_norm, which writes to its base weight"):
        apply_lora_to_model(nn.Embedding(9, 6, max_norm=1.0), rank=2, target_modules="full")


# ---- transformers' Conv1D ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dora", [False, True])
def test_conv1d_of_transformers_equals_pefts(dora):
    torch.manual_seed(0)
    ours, x = nn.Sequential(Conv1D(8, 6)), torch.randn(3, 5, 6)
    config = peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"], use_dora=dora, fan_in_fan_out=True)
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    apply_lora_to_model(ours, rank=RANK, alpha=ALPHA, target_modules=["0"])
    adapter, peer = fill(ours)[0].adapter("default"), theirs.base_model.model[0]
    with torch.no_grad():
        peer.lora_A["default"].weight.copy_(adapter.down)
        peer.lora_B["default"].weight.copy_(adapter.up)
        if dora:
            adapter.start_magnitude(ours[0].base_weight())
            adapter.magnitude.mul_(1.5)
            peer.lora_magnitude_vector["default"].weight.copy_(adapter.magnitude.flatten())
    for model in (ours, theirs):
        model(x).square().sum().backward()
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(adapter.down.grad, peer.lora_A["default"].weight.grad, atol=1e-4)
    assert torch.allclose(adapter.up.grad, peer.lora_B["default"].weight.grad, atol=1e-4)
    merged = theirs.merge_and_unload()
    assert torch.allclose(merge_lora_weights(ours)[0].weight, merged[0].weight, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_sees_a_conv1d_as_the_linear_layer_that_it_is(kind):
    torch.manual_seed(0)
    linear, transposed, x = nn.Linear(6, 8), Conv1D(8, 6), torch.randn(3, 5, 6)
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.T)
        transposed.bias.copy_(linear.bias)
    for layer in (linear, transposed):
        torch.manual_seed(1)
        fill(apply_lora_to_model(layer, rank=RANK, alpha=ALPHA, target_modules=["layer"], kind=kind))
    assert torch.allclose(linear(x), transposed(x), atol=1e-5) and not torch.equal(linear(x), F.linear(x, linear.weight))


# ---- names: ties, shared modules, presets, one's own layers ------------------------------------------------------------

def test_tied_weights_are_noticed_before_a_merge_unties_them():
    model, bare, x = adapted("GPT-2")
    assert tied_layers(model) == {"transformer.wte": ["lm_head"]}
    with pytest.raises(LoRAError, match="transformer.wte shares its weight with lm_head.*untie=True"):
        merge_lora_weights(model)
    assert lora_layers(model)
    merge_lora_weights(model, untie=True)
    assert torch.equal(model.lm_head.weight, bare.lm_head.weight) and not tied_layers(model)
    assert not torch.equal(model.transformer.wte.weight, bare.lm_head.weight)


def test_a_tie_stays_where_the_adapters_that_are_on_do_not_touch_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    apply_lora_to_model(model, rank=2, target_modules=["0"], name="a")
    apply_lora_to_model(model, rank=2, target_modules=["2"], name="b")
    with use_adapters(model, {"b": 1.0}):
        merge_lora_weights(model)
    assert model[1].weight is model[0].weight


def test_a_module_with_two_names_is_one_target_under_either():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": shared})
    assert list(find_targets(model, ["second"])) == list(find_targets(model, ["first", "second"])) == ["first.0"]
    fill(apply_lora_to_model(model, rank=2, target_modules=["second"]))
    assert not tied_layers(model) and merge_lora_weights(model)["second"] is model["first"][0]


def test_a_preset_means_the_encoder_of_a_foreign_model_too():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(4, 4)), "decoder": nn.Sequential(nn.Linear(4, 4))})
    assert list(find_targets(model, "full")) == ["encoder.0", "decoder.0"]


class Scaled(nn.Module):
    """A layer of one's own with a layer inside."""

    def __init__(self, n, factor):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n))
        self.inner, self.factor = nn.Linear(n, n), factor

    def forward(self, x):
        return self.inner(x).relu() + self.factor * F.linear(x, self.weight)


class LoRAScaled(LoRALayer, Scaled):
    bias = None

    def op(self, x, weight, bias):
        return self.factor * F.linear(x, weight)

    def base_forward(self, x):
        return Scaled.forward(self, x)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(lora_layers_module, "_registered", {})


def test_a_registered_layer_is_one_target_and_is_not_descended_into(registry, tmp_path):
    torch.manual_seed(0)
    bare, x = nn.Sequential(Scaled(4, 0.5), nn.Linear(4, 4)), torch.randn(3, 4)
    with pytest.raises(LoRAError, match="matches no layer"):
        find_targets(bare, [r"^0$"])
    register_lora_layer(Scaled, LoRAScaled)
    model = apply_lora_to_model(copy.deepcopy(bare), rank=RANK, alpha=ALPHA, target_modules="full")
    assert list(lora_layers(model)) == ["0", "1"] and torch.equal(model(x), bare(x))
    fill(model)
    reference = changed(model, bare, {"default": 1.0})
    assert_near(model(x), reference(x.double()))
    save_lora_weights(model, tmp_path / "a.safetensors")
    other = copy.deepcopy(bare)
    load_lora_weights(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x)) and torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    assert list(find_targets(nn.ModuleDict({"a": Scaled(4, 1.0)}), "full")) == ["a"]
    remove_lora(model)
    assert type(model[0]) is Scaled and torch.equal(model(x), bare(x))


def test_what_cannot_carry_adapters_is_not_registered(registry):
    class Wrong(LoRALayer, nn.Linear):
        pass

    class NoOp(LoRALayer, Scaled):
        pass

    for lora_class, sentence in ((nn.Linear, "a class LoRAScaled"), (Wrong, "a class LoRAScaled"), (None, "a class LoRAScaled"),
                                 (NoOp, "NoOp does not define op")):
        with pytest.raises(LoRAError, match=sentence):
            register_lora_layer(Scaled, lora_class)


# ---- activation checkpointing of the model's own -----------------------------------------------------------------------

def test_a_models_own_checkpointing_recomputes_with_the_set_of_the_forward():
    torch.manual_seed(0)
    model, x, grads = gpt2(2), tokens(2, 5), []
    fill(apply_lora_to_model(model, rank=RANK, target_modules=["transformer.h"]))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: recomputation(model)})
        model.zero_grad()
        with use_adapters(model, {"default": 0.5}):
            loss = model(x).logits.square().sum()
        loss.backward()
        grads.append([p.grad.clone() for p in get_lora_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and math.isfinite(loss)


# ---- kinds, dtypes, a quantised base -----------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [*({"kind": kind} for kind in KINDS), {"dora": True}, {"kind": "loha", "dora": True}],
                         ids=str)
@pytest.mark.parametrize("kind", ["root Conv1D", "attention", "encoder", "conv1d"])
def test_every_kind_is_no_change_when_new_and_the_same_trained_fused_and_merged(kind, options):
    bare, x, targets = made(kind)
    model = apply_lora_to_model(copy.deepcopy(bare), rank=RANK, alpha=ALPHA, target_modules=targets, **options)
    assert_near(run(model, x), run(bare, x))
    fill(model)
    trained = run(model, x)
    with torch.no_grad():
        fused = run(model, x)
        merge(model)
        assert_near(run(model, x), trained)
    assert_near(fused, trained)
    expected, before = run(merge_lora_weights(model), x), run(bare, x)
    assert_near(expected, trained, 1e-5)
    assert (trained - before).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["root linear", "root Conv1D", "root embedding", "conv2d same", "attention", "BERT"])
def test_a_half_precision_base_has_adapters_in_fp32_and_computes_in_its_own(kind):
    model, bare, x = adapted(kind)
    with torch.no_grad():
        expected = run(model, x)
        model.bfloat16()
        assert {p.dtype for p in get_lora_parameters(model)} == {torch.float32}
        out = run(model, x.bfloat16() if x.is_floating_point() else x)
    assert out.dtype == torch.bfloat16 and (out - expected).abs().max() < 0.05 * expected.abs().max()
    trained = run(model, x.bfloat16() if x.is_floating_point() else x)
    trained.float().sum().backward()
    assert {p.grad.dtype for p in get_lora_parameters(model) if p.grad is not None} == {torch.float32}


def test_adapters_follow_their_model_to_the_device_on_which_it_is():
    with torch.device("meta"):
        model = Attention()
    apply_lora_to_model(model, rank=2, target_modules="full")
    assert len(get_lora_parameters(model)) == 8 and all(p.is_meta for p in get_lora_parameters(model))


def test_a_quantised_foreign_base_computes_what_its_dequantised_one_does():
    model, x, _ = made("BERT")
    targets = ["query", "value", "dense"]
    quantize_base(model, "int8", targets)
    fill(apply_lora_to_model(model, rank=RANK, alpha=ALPHA, target_modules=targets))
    out = run(model, x)
    assert quantized_kinds(model) == ["int8"] and torch.equal(run(dequantize_base(model), x), out)


@pytest.mark.parametrize("hook", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_is_refused(hook):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(hook(nn.Linear(6, 8)))
    with pytest.raises(LoRAError, match="0 has a weight that a hook computes"):
        apply_lora_to_model(model, rank=RANK, target_modules=["0"])


def test_an_adapter_attached_in_inference_mode_can_be_trained():
    model = nn.Sequential(nn.Linear(6, 8))
    with torch.inference_mode():
        apply_lora_to_model(model, rank=RANK, target_modules=["0"])
    fill(model)
    model(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in get_lora_parameters(model))
