"""The quantised base: numbers against bitsandbytes and fp64 formulas, layers against plain ones that hold the same weight."""

import copy
import math
import pickle
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from sd.adapters.quant import (
    NF4_LEVELS,
    QUANTIZERS,
    QuantizedWeight,
    base_bytes,
    dequantize_base,
    quantize_base,
    quantized_kinds,
)
from sd.adapters.targets import named_layers
from sd.checkpoints.writer import save_checkpoint, save_merged
from sd.clip import CLIP
from sd.config import SD15
from sd.lora import (
    KINDS,
    LoRAError,
    adapter_names,
    apply_lora_to_model,
    checkpoint,
    find_targets,
    get_lora_parameters,
    lora_layers,
    lora_state,
    merge,
    merge_lora_weights,
    remove_lora,
    set_lora_enabled,
    unmerge,
    use_adapters,
)
from sd.model_loader import Models, load_lora_into_models, preload_models_from_standard_weights, save_models_lora
from sd.training import diffusion_loss
from sd.unet import UNet
from tests.adapters.cases import MATRICES, model_and_input, random
from tests.training.tiny import SMALL

ADAPTERS = [(kind, dora) for kind in KINDS for dora in (False, True) if KINDS[kind].takes_dora or not dora]


def pair(name="linear", kind="nf4", dtype=torch.float32):
    """(quantised layer in a model, plain layer that holds the dequantised weight in a model, input)."""
    quantised, x = model_and_input(name)
    quantised.to(dtype).requires_grad_(False)
    plain = copy.deepcopy(quantised)
    quantize_base(quantised, kind)
    plain[0].weight.copy_(quantised[0].weight.dequantize())
    return quantised, plain, x.to(dtype)


def adapt(*models, kind="lora", dora=False, **options):
    """The same random adapter on each."""
    for model in models:
        torch.manual_seed(1)
        rank, alpha = 1 if kind == "lokr" else 4, 0.5 if KINDS[kind].bounded else 6.0
        apply_lora_to_model(model, rank, alpha, kind=kind, dora=dora,
                            target_modules=list(dict(model.named_children())), **options)
        for i, p in enumerate(get_lora_parameters(model)):
            p.data.add_(random(*p.shape, seed=i) * 0.2)


def gradients(model, x, run=None):
    """Output, and the gradients of the input and of the adapters; the forward alone is `run`."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = (run or model)(x)
    (out * random(*out.shape, seed=7).to(out)).sum().backward()
    return [out, x.grad, *(p.grad for p in get_lora_parameters(model))]


def small_models():
    torch.manual_seed(0)
    models = Models({"clip": CLIP(SMALL.clip), "diffusion": UNet(SMALL.unet)}, SMALL)
    for network in models.values():
        network.eval().requires_grad_(False)
    return models


def loss_of(models):
    context = models["clip"](torch.arange(2 * 77).view(2, 77) % 49408)
    return diffusion_loss(models, random(2, 4, 8, 8), context, torch.tensor([3, 700]), random(2, 4, 8, 8, seed=1))


# ---- numbers -----------------------------------------------------------------------------------------------------------

def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution_as_published():
    """Dettmers et al. 2023, equation 4, with the offset of their code: 8 quantiles above 0, 7 below, and an exact 0."""
    offset, ppf = 0.9677083, NormalDist().inv_cdf
    upper = [ppf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    lower = [-ppf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    want = sorted([0.0, *upper, *lower])
    assert np.allclose(NF4_LEVELS, np.array(want) / max(want), atol=2e-7, rtol=0)


def test_nf4_has_the_bits_of_bitsandbytes():
    """What quantize_4bit and dequantize_4bit of bitsandbytes 0.50.2 gave on the CPU, blocksize 64, for these 128 values."""
    W = ((torch.arange(128) * 37 % 101 - 50) / 23).view(2, 64)
    quantised = QuantizedWeight(W, "nf4")
    assert bytes(quantised.codes.flatten().tolist()).hex() == (
        "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
        "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18")
    assert quantised.absmax.flatten().tolist() == [2.17391300201416] * 2
    assert quantised.dequantize().double().sum().item() == -4.055653348565102


@pytest.mark.parametrize("shape", [(6, 64), (5, 7), (16, 3, 3, 3), (1, 1)])
def test_nf4_is_the_nearest_level_of_each_block_of_64_values(shape):
    W = random(*shape) * 0.03
    flat = W.double().flatten().numpy()
    want = []
    for block in (flat[i:i + 64] for i in range(0, len(flat), 64)):
        levels = np.array(NF4_LEVELS) * abs(block).max()
        want += [levels[abs(levels - v).argmin()] for v in block]
    got = QuantizedWeight(W, "nf4").dequantize()
    assert got.shape == W.shape and got.dtype == W.dtype
    assert np.allclose(got.double().flatten().numpy(), want, rtol=1e-6, atol=0)


def test_double_quantisation_rounds_the_absmaxes_of_256_blocks_to_8_bits():
    W = random(40, 1000) * 0.03
    flat = F.pad(W.double().flatten(), (0, 0)).view(-1, 64)
    absmax = flat.abs().amax(1)
    rest = F.pad(absmax - absmax.mean(), (0, -len(absmax) % 256)).view(-1, 256)
    step = rest.abs().amax(1, keepdim=True) / 127
    rounded = ((rest / step).round() * step).flatten()[:len(absmax)] + absmax.mean()
    single, double = QuantizedWeight(W, "nf4").dequantize(), QuantizedWeight(W, "nf4-double").dequantize()
    want = (single.double().view(-1, 64) / absmax[:, None]) * rounded[:, None]
    assert torch.allclose(double.double().view(-1, 64), want, rtol=1e-4, atol=1e-7)
    assert not torch.equal(single, double)


def test_int8_and_fp8_round_each_row_to_the_steps_of_its_scale():
    W = random(8, 5, 3, 3) * torch.logspace(-4, 2, 8).view(-1, 1, 1, 1)
    rows = W.double().flatten(1)
    absmax = rows.abs().amax(1, keepdim=True)
    want = (rows / absmax * 127).round() * absmax / 127
    assert torch.allclose(QuantizedWeight(W, "int8").dequantize().double().flatten(1), want, rtol=1e-6, atol=0)
    y = rows / absmax * 448  # float8_e4m3fn: 3 bits of mantissa, the least exponent is -6 (Micikevicius et al. 2022)
    step = torch.exp2(torch.log2(y.abs()).floor().clamp(min=-6) - 3)
    want = (y / step).round() * step * absmax / 448
    assert torch.allclose(QuantizedWeight(W, "fp8").dequantize().double().flatten(1), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind, error", [("nf4", 0.0921), ("nf4-double", 0.0921), ("int8", 0.0085), ("fp8", 0.0265)])
def test_the_error_of_normal_weights_is_that_of_the_format(kind, error):
    """nf4: from the 16 levels alone, the error of bitsandbytes 0.50.2 on the same values is 0.09199."""
    W = torch.randn(320, 2880, generator=torch.Generator().manual_seed(0))
    assert ((QuantizedWeight(W, kind).dequantize() - W).norm() / W.norm()).item() == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_zeros_and_the_smallest_numbers_are_no_special_case(kind):
    for W in (torch.zeros(3, 70), torch.full((3, 70), 9.1e-43), torch.full((3, 70), 3e37)):
        got = QuantizedWeight(W, kind).dequantize()
        assert got.isfinite().all() and torch.allclose(got, W, rtol=1e-4, atol=2e-42)


# ---- layers ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", MATRICES)
def test_a_quantised_layer_is_the_plain_layer_with_the_dequantised_weight_bit_for_bit(name, kind):
    quantised, plain, x = pair(name, kind)
    with torch.no_grad():
        assert torch.equal(quantised(x), plain(x))
    for a, b in zip(gradients(quantised, x), gradients(plain, x), strict=True):
        assert torch.equal(a, b)
    adapt(quantised, plain)
    with torch.no_grad():
        assert torch.equal(quantised(x), plain(x))
    for a, b in zip(gradients(quantised, x), gradients(plain, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["linear", "conv3x3"])
def test_the_same_holds_in_every_dtype(name, dtype):
    quantised, plain, x = pair(name, dtype=dtype)
    adapt(quantised, plain, dora=True)
    for a, b in zip(gradients(quantised, x), gradients(plain, x), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_under_autocast_gradients_are_those_of_the_plain_layer():
    for name in ("linear", "conv3x3"):
        quantised, plain, x = pair(name)
        adapt(quantised, plain)
        a, b = (gradients(model, x, torch.autocast("cpu", torch.bfloat16)(model)) for model in (quantised, plain))
        for got, want in zip(a, b, strict=True):
            assert got.dtype == want.dtype and torch.allclose(got, want, rtol=2e-2, atol=2e-2)


def test_a_bias_that_is_freed_later_gets_its_gradient():
    for name in ("linear", "conv3x3", "circular"):
        quantised, plain, x = pair(name)
        for model in (quantised, plain):
            model[0].bias.requires_grad_(True)
            gradients(model, x)
        assert torch.allclose(quantised[0].bias.grad, plain[0].bias.grad, rtol=1e-5, atol=1e-5)


def test_channels_last_stays_channels_last_in_the_gradient():
    model = quantize_base(nn.Sequential(nn.Conv2d(32, 16, 3)).requires_grad_(False))
    x = random(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    (got,) = torch.autograd.grad(model(x).square().sum(), x)  # x.grad would be given the layout of x in any case
    (want,) = torch.autograd.grad(dequantize_base(model)(x).square().sum(), x)
    assert got.stride() == want.stride() == x.stride() and torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, dora", ADAPTERS)
@pytest.mark.parametrize("name", ["linear", "conv3x3"])
def test_every_kind_of_adapter_works_on_a_quantised_base_as_on_the_plain_one(name, kind, dora):
    quantised, plain, x = pair(name)
    adapt(quantised, plain, kind=kind, dora=dora)
    for a, b in zip(gradients(quantised, x), gradients(plain, x), strict=True):
        assert torch.equal(a, b)
    for model in (quantised, plain):
        model.requires_grad_(False).zero_grad()  # nothing is merged while a gradient waits for its step
    for strength in (1.0, -0.3):
        with use_adapters(quantised, {"default": strength}), use_adapters(plain, {"default": strength}):
            assert torch.equal(quantised(x), plain(x))
            merge(quantised), merge(plain)
            assert quantised[0].is_merged() and torch.equal(quantised[0].merged_weight, plain[0].merged_weight)
            assert torch.equal(quantised(x), plain(x))
            unmerge(quantised)
            assert quantised[0].merged_weight is None
    with torch.no_grad():
        set_lora_enabled(quantised, False)
        base = quantised(x)
        remove_lora(quantised)
        assert torch.equal(quantised(x), base) and quantized_kinds(quantised) == ["nf4"]


@pytest.mark.parametrize("kind, dora", [("lora", False), ("lora", True), ("oft", False), ("ia3", False), ("glora", False)])
@pytest.mark.parametrize("name", ["linear", "conv3x3", "circular"])
def test_the_graph_of_a_training_forward_holds_the_packed_weight_and_never_the_dequantised_one(name, kind, dora):
    quantised, plain, x = pair(name)
    adapt(quantised, plain, kind=kind, dora=dora)
    weight, packed = quantised[0].weight, {b.data_ptr() for b in quantised[0].weight.buffers()}

    def saved_by(model):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            model(x.clone().requires_grad_())
        return saved

    whole = [t for t in saved_by(plain) if t.numel() == weight.shape.numel()]
    assert whole  # so that this can fail
    saved = saved_by(quantised)
    assert not [t for t in saved if t.is_floating_point() and t.numel() == weight.shape.numel()]
    assert sum(t.nbytes for t in saved if t.data_ptr() in packed) == sum(b.nbytes for b in weight.buffers())


@pytest.mark.parametrize("layer, shape", [(nn.Linear(320, 320), (2, 9, 320)), (nn.Conv2d(64, 64, 3), (2, 64, 5, 5))])
def test_int8_moves_the_gradients_of_a_layer_by_less_than_a_hundredth(layer, shape):
    model = nn.Sequential(layer).requires_grad_(False)
    torch.manual_seed(0)
    layer.weight.normal_(std=layer.weight[0].numel() ** -0.5)
    adapt(model)
    x, grads = random(*shape), []
    for kind in (None, "int8"):
        if kind:
            quantize_base(model, kind)
        y = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(model(y).square().mean(), [y, *get_lora_parameters(model)]))
    for got, want in zip(*grads[::-1], strict=True):
        assert 1e-4 < ((got - want).norm() / want.norm()).item() < 1e-2


# ---- whole models ------------------------------------------------------------------------------------------------------

def test_a_training_step_changes_the_lora_alone_and_has_the_gradients_of_the_dequantised_model():
    models = quantize_base(small_models())
    plain = dequantize_base(Models({k: copy.deepcopy(m) for k, m in models.items()}, SMALL))
    assert quantized_kinds(models) == ["nf4"] and quantized_kinds(plain) == []
    for m in (models, plain):
        torch.manual_seed(2)
        apply_lora_to_model(m, 4, target_modules="full", dora=True)
    before = {n: t.clone() for k in models for n, t in (*models[k].named_parameters(k), *models[k].named_buffers(k))}
    losses = {}
    for name, m in (("nf4", models), ("plain", plain), ("checkpointed", models)):
        m["diffusion"].checkpointing = name == "checkpointed"
        parameters = get_lora_parameters(m)
        loss = loss_of(m)
        losses[name] = loss, *torch.autograd.grad(loss, parameters)
    for name in ("plain", "checkpointed"):
        assert all(torch.equal(a, b) for a, b in zip(losses["nf4"], losses[name], strict=True)), name

    optimizer = torch.optim.AdamW(get_lora_parameters(models), lr=1e-2)
    for _ in range(2):  # up is 0 at the start, so down has no gradient in the first
        optimizer.zero_grad()
        loss_of(models).backward()
        optimizer.step()
    after = {n: t for k in models for n, t in (*models[k].named_parameters(k), *models[k].named_buffers(k))}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if ".adapters." in n}


def test_all_but_the_first_and_last_convolution_is_quantised_and_in_nf4_sd15_takes_less_than_600_megabytes():
    with torch.device("meta"):
        unet = UNet(SD15.unet).requires_grad_(False)
    weights = {path: m.weight.numel() for path, m in named_layers(unet) if isinstance(m, (nn.Linear, nn.Conv2d))}
    total = sum(p.numel() for p in unet.parameters())
    assert total == 859_520_964 and base_bytes(unet) == 4 * total
    first_and_last = weights.pop("diffusion.conv_in") + weights.pop("diffusion.conv_out")
    norms_and_biases = total - sum(weights.values()) - first_and_last
    quantize_base(unet)
    tables = 2048 * len(weights)  # the levels of the 256 bytes
    packed = sum(n // 2 + n // 64 * 4 for n in weights.values())
    assert base_bytes(unet) == packed + tables + 4 * (norms_and_biases + first_and_last)
    assert base_bytes(unet) == 485_658_896
    assert base_bytes(unet.to(torch.bfloat16)) == 484_725_128
    assert len(find_targets(unet, "full")) == len(weights) == 280
    assert {p.rpartition(".")[0] for p, m in named_layers(unet) if isinstance(m, QuantizedWeight)} == set(weights)


def test_merging_for_good_gives_plain_layers_and_the_keys_of_the_base():
    models = small_models()
    keys = set(models["diffusion"].state_dict())
    quantize_base(models)
    plain = dequantize_base(Models({k: copy.deepcopy(m) for k, m in models.items()}, SMALL))
    for m in (models, plain):
        torch.manual_seed(2)
        apply_lora_to_model(m, 2, target_modules=["attn", "conv1"])
        for i, p in enumerate(get_lora_parameters(m)):
            p.data.add_(random(*p.shape, seed=i) * 0.1)
        merge_lora_weights(m)
    assert not adapter_names(models) and not lora_layers(models)
    state = models["diffusion"].state_dict()
    assert set(state) == keys
    assert all(torch.equal(v, state[k]) for k, v in plain["diffusion"].state_dict().items())
    assert type(models["diffusion"].get_submodule("down_blocks.0.resnets.0.conv1")) is nn.Conv2d


def test_a_checkpoint_of_a_quantised_model_holds_the_dequantised_weights(tmp_path):
    models = preload_models_from_standard_weights(dtype=torch.float32)
    for network in models.values():
        network.requires_grad_(False)
    quantize_base(models)
    assert not any(isinstance(m, QuantizedWeight) for key in ("encoder", "decoder") for m in models[key].modules())
    save_checkpoint(models, tmp_path / "plain.safetensors")
    loaded = preload_models_from_standard_weights(tmp_path / "plain.safetensors", dtype=torch.float32)
    assert all(torch.equal(v, models[k].state_dict()[n]) for k in loaded for n, v in loaded[k].state_dict().items())

    apply_lora_to_model(models["diffusion"], 2, name="a")
    for i, p in enumerate(get_lora_parameters(models)):
        p.data.add_(random(*p.shape, seed=i) * 0.1)
    save_models_lora(models, tmp_path / "a.safetensors", "a")
    load_lora_into_models(loaded, tmp_path / "a.safetensors", "a")
    state, want = lora_state(loaded, "a"), lora_state(models, "a")
    assert all(torch.equal(t, state[path].tensors[name]) for path, w in want.items() for name, t in w.tensors.items())
    save_merged(models, tmp_path / "merged.safetensors")
    merged = preload_models_from_standard_weights(tmp_path / "merged.safetensors", dtype=torch.float32)
    merge_lora_weights(loaded)
    assert all(torch.equal(v, loaded[k].state_dict()[n]) for k in merged for n, v in merged[k].state_dict().items())


def test_dequantising_gives_the_plain_model_back_with_its_classes_and_the_order_of_its_keys():
    models = small_models()
    classes = {path: type(m) for path, m in named_layers(models)}
    keys = [list(network.state_dict()) for network in models.values()]
    dequantize_base(quantize_base(models, "int8"))
    assert {path: type(m) for path, m in named_layers(models)} == classes
    assert [list(network.state_dict()) for network in models.values()] == keys
    assert not any(p.requires_grad for network in models.values() for p in network.parameters())
    once = copy.deepcopy(models["diffusion"].state_dict())
    dequantize_base(quantize_base(models, "int8"))
    assert all(torch.allclose(v, models["diffusion"].state_dict()[k], rtol=1e-5) for k, v in once.items())


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_copies_pickles_and_moves_keep_what_is_stored(kind):
    quantised, _, x = pair("conv3x3", kind)
    adapt(quantised)
    with torch.no_grad():
        quantised[0].bias.copy_(quantised[0].bias.half())
        want = quantised(x)
        assert torch.equal(copy.deepcopy(quantised)(x), want)
        assert torch.equal(pickle.loads(pickle.dumps(quantised))(x), want)
        weight, stored = quantised[0].weight.dequantize(), [b.clone() for b in quantised[0].weight.buffers()]
        quantised.half()
        assert quantised[0].weight.dtype == quantised[0].weight.dequantize().dtype == torch.float16
        assert torch.equal(quantised[0].weight.dequantize(), weight.half())
        quantised.to(torch.float32)
        assert torch.equal(quantised(x), want)
        assert all(torch.equal(a, b) for a, b in zip(quantised[0].weight.buffers(), stored, strict=True))
    assert quantised.to("meta")[0].weight.device.type == "meta"


def test_a_merged_weight_is_dropped_when_the_base_beneath_it_is_quantised_or_written():
    quantised, _, x = pair()
    dequantize_base(quantised)
    adapt(quantised)
    quantised.requires_grad_(False)
    merge(quantised)
    plain = quantised(x)
    quantize_base(quantised, "fp8")
    assert quantised[0].merged_weight is None and not torch.equal(quantised(x), plain)
    merge(quantised)
    quantised[0].weight.scale.mul_(2)
    assert not quantised[0].is_merged()


def test_checkpointing_of_torch_and_of_ours_gives_the_same_gradients():
    quantised, _, x = pair("conv3x3")
    adapt(quantised, dora=True)
    want = gradients(quantised, x)
    for run in (checkpoint, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)):
        got = gradients(quantised, x, partial(run, quantised))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiled_code_gives_the_same_output_and_gradients():
    quantised, _, x = pair("conv3x3")
    adapt(quantised)
    want, got = gradients(quantised, x), gradients(quantised, x, torch.compile(quantised, backend="aot_eager"))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("spoil, message", [
    (lambda m: m.requires_grad_(True), "is trainable; only a frozen base"),
    (lambda m: m[1].weight.fill_(math.nan), "1 holds weights that are not finite"),
    (lambda m: quantize_base(m, target_modules=["1"]), "1 is quantised already"),
    (lambda m: m.append(nn.TransformerEncoderLayer(8, 1).requires_grad_(False)), "can bypass its layers"),
])
def test_what_cannot_be_quantised_is_refused_before_anything_changes(spoil, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    spoil(model)
    with pytest.raises(LoRAError, match=message):
        quantize_base(model)
    assert type(model[0]) is nn.Linear


def test_unknown_kinds_norms_and_loading_into_a_quantised_model_are_refused_with_a_sentence():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).requires_grad_(False)
    with pytest.raises(LoRAError, match="'nf5' is unknown; allowed: nf4, nf4-double, int8, fp8"):
        quantize_base(model, "nf5")
    with pytest.raises(LoRAError, match="1 is a LayerNorm; only linear layers"):
        quantize_base(model, target_modules=["1"])
    state = quantize_base(model).state_dict()
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    with pytest.raises(LoRAError, match="0.weight is quantised .nf4. and takes no values"):
        model.load_state_dict(state)
