"""Packed weights compute what plain ones do, are made again when anything changes, and take no more memory than stated."""

import copy
import io
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sd.packed
from sd.adapters.layer import LoRALayer
from sd.adapters.layers import LoRAConv2d, LoRALinear
from sd.adapters.quant import quantize_base
from sd.config import TINY
from sd.files.tensors import write_safetensors
from sd.lora import apply_lora_to_model, lora_layers, merge, set_adapters, unmerge, use_adapters
from sd.models import new_models
from sd.packed import give_pages_back, pack, unpack, works
from sd.pipeline import generate

pytestmark = pytest.mark.skipif(not works(torch.float32), reason="torch lacks oneDNN's packed products here")

LAYERS = {"3x3": partial(nn.Conv2d, 32, 48, 3, padding=1), "stride 2": partial(nn.Conv2d, 32, 32, 3, stride=2, padding=1),
          "1x1": partial(nn.Conv2d, 48, 32, 1), "groups": partial(nn.Conv2d, 32, 32, 3, padding=1, groups=4, bias=False),
          "dilated": partial(nn.Conv2d, 32, 32, 3, padding=2, dilation=2), "linear": partial(nn.Linear, 40, 64),
          "no bias": partial(nn.Linear, 40, 64, bias=False), "LoRA": partial(LoRALinear, 40, 64)}


def frozen(name, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(LAYERS[name]().requires_grad_(False).eval())


def inputs(network, rows=2, seed=1):
    weight, g = network[0].weight, torch.Generator().manual_seed(seed)
    shape = (rows, weight.shape[1] * getattr(network[0], "groups", 1), 12, 10) if weight.dim() == 4 else (rows, 7, 40)
    return torch.randn(shape, generator=g)


def exact(network, x):
    """The layer's formula in fp64, by torch's functions."""
    layer = network[0]
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    if weight.dim() == 2:
        return F.linear(x.double(), weight, bias)
    return F.conv2d(x.double(), weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def copies(network):
    packed = [layer.derived.packed for layer in network.modules() if isinstance(layer, LoRALayer)]
    return [p.weight for p in packed if p is not None and p.weight is not None]


def assert_right(network, x):
    """The output is the formula's, and a packed copy was used."""
    with torch.no_grad():
        found, wanted = network(x), exact(network, x)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max() and wanted.std() > 0.1
    assert len(copies(network)) == 1 and copies(network)[0].layout == torch._mkldnn


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_computes_its_formula(name):
    network = frozen(name)
    pack(network)
    assert_right(network, inputs(network))
    assert_right(network, inputs(network, rows=5))
    assert_right(network, inputs(network, rows=1))


@pytest.mark.parametrize("name", ["3x3", "linear"])
def test_a_copy_is_made_again_when_the_weight_changes(name):
    network = frozen(name)
    x = inputs(network)
    pack(network)
    assert_right(network, x)
    with torch.no_grad():
        network[0].weight[0].mul_(3)
    assert_right(network, x)
    network[0].set_base(network[0].weight * 2, None)
    assert_right(network, x)
    network[0].weight.data.add_(1.0)  # has no version, so it is noticed when the next picture begins
    pack(network)
    assert_right(network, x)
    network[0].load_state_dict({"weight": torch.randn_like(network[0].weight)}, strict=False)
    pack(network)
    assert_right(network, x)


@pytest.mark.parametrize("name", ["3x3", "linear"])
def test_copies_go_with_moves_and_copies_of_the_network_and_are_in_no_file(name):
    network = frozen(name)
    x, keys = inputs(network), list(network.state_dict())
    pack(network)
    assert_right(network, x)
    assert list(network.state_dict()) == keys and not copies(copy.deepcopy(network))
    file = io.BytesIO()
    torch.save(network, file)
    assert len(file.getvalue()) < 1.5 * sum(p.nbytes for p in network.parameters()) + 20_000
    file.seek(0)
    assert not copies(torch.load(file, weights_only=False))
    network.double()
    assert not copies(network) and network(x.double()).dtype == torch.float64
    network.float()
    pack(network)
    assert_right(network, x)
    unpack(network)
    assert not copies(network) and type(network[0]) is type(LAYERS[name]())


def test_training_uses_plain_weights():
    network, plain = frozen("3x3"), frozen("3x3")
    pack(network)
    assert_right(network, inputs(network))
    x = inputs(network).requires_grad_()
    y = network(x)
    assert torch.equal(y, plain(x)) and y.requires_grad
    trained = frozen("3x3").requires_grad_(True)
    pack(trained)
    with torch.no_grad():
        trained(inputs(trained))
    assert type(trained[0]) is nn.Conv2d


def test_autocast_compute_dtype_and_empty_inputs_are_those_of_the_plain_layer():
    network, plain = frozen("linear"), frozen("linear")
    pack(network)
    x = inputs(network)
    with torch.no_grad():
        assert network(x[:0]).shape == (0, 7, 64)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network(x), plain(x)) and network(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype"):
            network(x.double())


def test_layers_with_hooks_and_other_types_are_left_alone():
    class Mine(nn.Linear):
        pass

    hooked = nn.Linear(8, 8).requires_grad_(False)
    hooked.forward = lambda x: x
    network = nn.Sequential(Mine(8, 8).requires_grad_(False), hooked,
                            nn.Conv2d(16, 16, 3, padding="same").requires_grad_(False))
    types = [type(layer) for layer in network]
    pack(network)
    assert [type(layer) for layer in network] == types


# ---- whole pictures ------------------------------------------------------------------------------------------------------

@pytest.fixture
def models():
    models = new_models(TINY)
    models["decoder"].conv_out.weight.mul_(30)
    apply_lora_to_model(models, 4, 4.0, target_modules="full", name="a")
    for name in ("b", "c"):
        apply_lora_to_model(models, 4, 4.0, target_modules="attn", name=name)
    torch.manual_seed(1)
    for layer in lora_layers(models).values():
        for adapter in layer.adapters.values():
            nn.init.normal_(adapter.up, std=0.1)
    set_adapters(models, {})
    return models


CASES = {"base": {"use_lora": False}, "adapters": {"lora": {"a": 0.7, "b": -0.5}, "merged": False},
         "merged": {"lora": {"a": 0.7, "b": -0.5}, "merged": True},
         "routed": {"lora": [{"a": 1.0}, {"b": 1.0}, {"c": 0.5}, {}], "images_per_prompt": 4},
         "a set and the next": {"lora": {"c": 1.0}}}


@pytest.mark.parametrize("quantize", [False, True])
def test_pictures_are_those_of_plain_weights(models, monkeypatch, quantize):
    if quantize:
        quantize_base(models["diffusion"], "int8")
    draw = partial(generate, "a cat", models=models, seed=1, n_inference_steps=3)
    packed = {case: draw(**arguments) for case, arguments in CASES.items()}
    count = len(copies(models["diffusion"]))
    assert count > (0 if quantize else 40)
    assert all(np.array_equal(draw(**CASES[case]), packed[case]) for case in ("base", "merged", "adapters"))
    unmerge(models)
    unpack(models)
    monkeypatch.setattr(sd.packed, "tuned", lambda: False)
    for case, arguments in CASES.items():
        plain = draw(**arguments)
        assert np.abs(plain.astype(int) - packed[case]).max() <= 1, case
        assert plain.std() > 10 and (case == "base" or np.abs(plain[..., 0].astype(int) - packed["base"][..., 0]).max() > 3)
    assert not copies(models["diffusion"])


def test_a_merged_weight_is_packed_and_given_up_with_the_set(models):
    unet = models["diffusion"]
    pack(unet)
    layer = next(layer for layer in lora_layers(unet).values() if isinstance(layer, LoRALinear))
    x = torch.randn(2, 5, layer.in_features)
    with torch.no_grad():
        base = layer(x)
        with use_adapters(models, {"a": 1.0, "b": 1.0}):
            merge(unet)
            wanted = F.linear(x.double(), layer.merged_weight.double(), None if layer.bias is None else layer.bias.double())
            assert (layer(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
            kept = weakref.ref(layer.merged_weight.untyped_storage())
            unmerge(unet)
            freed = kept() is None
            assert freed
        pack(unet)
        assert torch.equal(layer(x), base) and (wanted - base).abs().max() > 0.01


# ---- the operators and memory -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", ["missing", "wrong", "raises"])
def test_without_the_operators_nothing_is_packed(monkeypatch, fault):
    def pack_wrong(weight, x, layer):
        if fault == "missing":
            return torch.ops.mkldnn._no_such_operator(weight)
        if fault == "raises":
            raise RuntimeError("not implemented for this processor")
        return right(weight * 1.001, x, layer)

    right = sd.packed.linear.pack
    monkeypatch.setattr(sd.packed._Linear, "pack", staticmethod(pack_wrong))
    works.cache_clear()
    try:
        network = frozen("linear")
        pack(network)
        assert not works(torch.float32) and type(network[0]) is nn.Linear
    finally:
        works.cache_clear()


def test_copies_beside_plain_weights_in_memory_are_limited(monkeypatch):
    monkeypatch.setattr(sd.packed, "SMALL", 0)
    network = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20))).requires_grad_(False)
    for _ in range(2):
        pack(network)
        with torch.no_grad():
            network(torch.randn(3, 64))
        assert len(copies(network)) == 4 and all(layer.derived.packed is not None for layer in list(network)[:4])


def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def test_the_pages_of_a_mapped_weight_are_given_back_unless_it_was_written(tmp_path):
    from sd.files.tensors import read_tensors
    values = torch.randn(4, 4 * 2**20)
    write_safetensors(tmp_path / "w.safetensors", {"w": values, "x": values + 1}, {})
    weights = read_tensors(tmp_path / "w.safetensors")
    for key, written in (("w", False), ("x", True)):
        weight = weights[key]
        if written:
            weight[2, 5] = 42.0
        weight.sum()
        before = resident()
        give_pages_back(weight)
        given = before - resident()
        assert given < 2**20 if written else given > 0.9 * weight.nbytes, key
        assert torch.equal(weight[:2], (values + written)[:2]) and (weight[2, 5] == 42 if written else True)
    memory = torch.randn(2**22)
    expected = memory.clone()
    give_pages_back(memory)
    assert torch.equal(memory, expected)


def test_mapped_weights_are_packed_whatever_their_size(monkeypatch, tmp_path):
    from sd.model_loader import preload_models_from_standard_weights, save_checkpoint
    save_checkpoint(new_models(TINY), tmp_path / "tiny.safetensors")
    monkeypatch.setattr(sd.packed, "SMALL", 0)
    monkeypatch.setattr(sd.packed, "EXTRA", 0.0)
    mapped = preload_models_from_standard_weights(tmp_path / "tiny.safetensors", "cpu", dtype="stored")
    for models, wanted in ((mapped, True), (new_models(TINY), False)):
        generate("a cat", models=models, seed=1, n_inference_steps=1)
        assert bool(copies(models["diffusion"])) == wanted


def test_convolutions_of_few_channels_stay_plain():
    unet = new_models(TINY)["diffusion"]
    pack(unet)
    assert isinstance(unet.conv_out, LoRAConv2d) and unet.conv_out.derived.packed and type(unet.conv_in) is nn.Conv2d
