"""HRA (Householder reflections) against PEFT's layer and a product of reflections in fp64; its files, ours and PEFT's."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from peft import HRAConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sd.adapters.orthogonal import HRA
from sd.adapters.weights import AdapterWeights, LayerShape
from sd.config import CONFIG_KEY
from sd.files.tensors import read_tensors
from sd.lora import (
    LoRAError,
    LoRAFormatError,
    apply_lora_to_model,
    get_lora_parameters,
    lora_layers,
    lora_state,
    merge,
    remove_lora,
    use_adapters,
)
from sd.lora_files.modules import modules_of
from sd.lora_files.read import read_lora
from sd.lora_files.write import refusals, write_lora
from sd.model_loader import load_lora_into_models, new_models, save_checkpoint
from sd.tools.convert import convert
from sd.training import TrainConfig, TrainError, train
from tests.adapters.cases import SHAPES, layer_and_input, model_and_input
from tests.training.tiny import SMALL, copy_of, metrics, pictures

WITH_PEER = ["linear", "conv1x1", "conv3x3"]  # the layers that PEFT's HRA fits


@pytest.fixture(scope="module")
def untrained():
    return new_models(SMALL, seed=1)


def weights(shape, rank, apply_GS=False, seed=0):
    u = torch.randn(shape.fan_in, rank, generator=torch.Generator().manual_seed(seed))
    return AdapterWeights("hra", {"u": u, "apply_GS": torch.tensor(apply_GS)})


def reflected(W, u, apply_GS):
    """W' by the definition, in fp64."""
    u, product = u.double(), torch.eye(len(u), dtype=torch.float64)
    if apply_GS:
        columns = []
        for column in u.T:
            for other in columns:
                column = column - (other @ column) * other
            columns.append(column / column.norm())
        u = torch.stack(columns, dim=1)
    for column in u.T:
        product = product @ (torch.eye(len(u), dtype=torch.float64) - 2 * torch.outer(column, column) / column.square().sum())
    return (W.double().flatten(1) @ product).reshape(W.shape)


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 5, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_the_change_is_the_product_of_the_reflections(name, rank, apply_GS):
    layer, x = layer_and_input(name)
    given = weights(layer.lora_shape(), rank, apply_GS)
    layer.add_adapter("a", HRA.from_weights(given, layer.lora_shape()).requires_grad_(False))
    W = layer.weight.detach()
    want = reflected(W, given.tensors["u"], apply_GS)
    assert torch.allclose(W.double() + layer.adapter("a").delta(W.double()), want, atol=1e-12)
    assert torch.allclose(want.flatten(1).norm(dim=1), W.double().flatten(1).norm(dim=1))  # rows are turned, never scaled
    for multiplier in (1.0, -0.3):
        with torch.no_grad(), use_adapters(layer, {"a": multiplier}):
            out = layer(x)
            expected = layer.op(x.double(), W.double() + multiplier * (want - W), layer.bias.double())
            assert torch.allclose(out.double(), expected, atol=1e-5)
            merge(layer)
            assert torch.allclose(layer(x), out, atol=1e-5)


@pytest.mark.parametrize("apply_GS", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("name", WITH_PEER)
def test_it_computes_what_the_layer_of_peft_does_with_the_same_vectors(name, rank, apply_GS):
    layer, x = layer_and_input(name)
    plain = nn.Sequential(copy.deepcopy(layer))
    plain[0].__class__ = nn.Linear if name == "linear" else nn.Conv2d
    peer = get_peft_model(plain, HRAConfig(r=rank, apply_GS=apply_GS, target_modules=["0"], init_weights=False))
    given = weights(layer.lora_shape(), rank, apply_GS)
    with torch.no_grad():
        peer.base_model.model[0].hra_u["default"].copy_(given.tensors["u"])
    layer.add_adapter("a", HRA.from_weights(given, layer.lora_shape()))
    ours, theirs = layer(x), peer(x)
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, layer.base_forward(x), atol=1e-2)
    target = torch.randn(ours.shape)
    (ours * target).sum().backward()
    (theirs * target).sum().backward()
    gradient = peer.base_model.model[0].hra_u["default"].grad
    assert torch.allclose(layer.adapter("a").u.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", ["linear", "conv3x3"])
def test_a_new_one_changes_no_bit_and_all_of_it_learns(name):
    model, x = model_and_input(name)
    base = model(x).detach()
    apply_lora_to_model(model, 6, target_modules=["0"], kind="hra")
    W = model[0].weight
    with torch.no_grad():
        assert torch.equal(model(x), base) and not model[0].adapter("default").delta(W).any()
        merge(model)
        assert torch.equal(model[0].merged_weight, W)
    (u,) = get_lora_parameters(model)
    assert torch.equal(u[:, ::2], u[:, 1::2]) and len(u.unique()) == u.numel() // 2
    optimizer, losses, target = torch.optim.Adam([u], lr=0.02), [], torch.randn(base.shape)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        assert u.grad.any(dim=0).all()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    remove_lora(model)
    assert torch.equal(model(x), base)


def test_it_is_trained_and_its_file_does_what_the_trained_model_does(untrained, tmp_path):
    config = TrainConfig(kind="hra", rank=4, steps=20, batch_size=2, save_every=100, progress=False, learning_rate=1e-2,
                         caption_dropout=0.0, out=str(tmp_path))
    models = train(config, copy_of(untrained), pictures())
    still = train(replace(config, learning_rate=1e-12, out=str(tmp_path / "still")), copy_of(untrained), pictures())
    losses, others = ([row["loss"] for row in metrics(out)] for out in (tmp_path, tmp_path / "still"))  # of the same draws
    assert losses[0] == others[0] and sum(losses[10:]) < 0.995 * sum(others[10:])
    again = load_lora_into_models(copy_of(untrained), tmp_path / "lora.safetensors")
    assert again.lora_reports["lora"].kinds == ["hra"] and again.lora_reports["lora"].format == "sdlora"
    for path, layer in lora_layers(models).items():
        adapter, W = layer.adapter("lora"), layer.base_weight()
        assert adapter.delta(W).abs().max() > 1e-4
        assert torch.equal(adapter.delta(W), lora_layers(again)[path].adapter("lora").delta(W))
        assert lora_layers(still)[path].adapter("lora").delta(W).abs().max() < 1e-6
    file = read_tensors(tmp_path / "lora.safetensors")
    assert {key.partition(".")[2] for key in file} == {"hra_u", "hra_apply_GS"}  # no alpha: it has no scale
    assert "ss_network_module" not in file.metadata  # which no other program has


@pytest.mark.parametrize("options, sentence", [
    ({"alpha": 2.0}, "alpha is 2.0; allowed: 4.0, since it has an effect only with a kind that has a scale"),
    ({"rslora": True}, "rslora is True; allowed: off unless"), ({"dora": True}, "dora is True; allowed: off with kind hra"),
    ({"max_norm": 1.0}, "max_norm is 1.0; allowed: 0 unless"), ({"relora_every": 5}, "kind is 'hra'; allowed: lora, loha"),
    ({"rank_dropout": 0.1}, "rank_dropout is 0.1; allowed: 0 with kind hra"),
])
def test_options_that_it_does_not_have_are_refused(options, sentence):
    with pytest.raises(TrainError, match=sentence):
        TrainConfig(kind="hra", relora_warmup=TrainConfig.relora_warmup, **options)


def test_a_new_one_of_an_odd_rank_is_refused_and_so_are_vectors_without_a_direction():
    model = nn.Sequential(nn.Linear(12, 8), nn.Embedding(5, 8))
    for rank in (0, 3):
        with pytest.raises(LoRAError, match=f"0: rank {rank} does not go with kind 'hra'"):
            apply_lora_to_model(model, rank, target_modules=["0"], kind="hra")
    with pytest.raises(LoRAError, match="1: kind 'hra' does not fit an embedding; allowed: lora, full"):
        apply_lora_to_model(model, 2, target_modules=["1"], kind="hra")
    shape = LayerShape((8, 12))
    good = weights(shape, 3)
    for name, bad, sentence in (("u", torch.zeros(12, 2), "u has a column of zeros"), ("u", torch.ones(12), "u has shape"),
                                ("u", torch.ones(13, 2), "u has shape"), ("u", torch.ones(12, 13), "u has shape"),
                                ("apply_GS", torch.zeros(2), "it has no apply_GS of one value")):
        with pytest.raises(LoRAFormatError, match=sentence):
            HRA.from_weights(AdapterWeights("hra", good.tensors | {name: bad}), shape)


# ---- files of PEFT -----------------------------------------------------------------------------------------------------

class Diffusers(nn.Module):
    """The attention layers of our small UNet under diffusers' names, which are those in PEFT's file."""

    def __init__(self, models):
        super().__init__()
        names = {name.path: name.diffusers for name in modules_of(models).names if name.component == "diffusion"}
        self.paths = {}
        for path, shape in modules_of(models).shapes.items():
            if path in names and ("to_q" in names[path] or "conv1" in names[path]):
                parent = self
                *parents, last = names[path].split(".")
                for part in parents:
                    if not hasattr(parent, part):
                        parent.add_module(part, nn.Module())
                    parent = getattr(parent, part)
                parent.add_module(last, nn.Linear(shape[1], shape[0]) if len(shape) == 2 else
                                  nn.Conv2d(shape[1], shape[0], shape[2]))
                self.paths[names[path]] = path


@pytest.mark.parametrize("apply_GS", [False, True])
def test_a_file_of_peft_is_read_with_the_flag_of_its_config(untrained, tmp_path, apply_GS):
    net = Diffusers(untrained)
    config = HRAConfig(r=3, apply_GS=apply_GS, target_modules=list(net.paths), init_weights=False)
    peer = get_peft_model(net, config)
    peer.save_pretrained(tmp_path)
    found = read_lora(tmp_path, modules_of(untrained))
    assert found.format == "PEFT" and set(found.state) == set(net.paths.values()) and found.tensors == len(net.paths)
    layers = lora_layers(load_lora_into_models(copy_of(untrained), tmp_path, name="a"))
    for name, path in net.paths.items():
        theirs = peer.base_model.model.get_submodule(name)
        shape = theirs.get_base_layer().weight.shape
        W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        want = (W.flatten(1) @ theirs.get_delta_weight("default")).reshape(shape)
        assert torch.allclose(W + layers[path].adapter("a").delta(W), want, atol=1e-4), path


def test_a_file_of_peft_without_its_config_does_not_say_enough(untrained, tmp_path):
    net = Diffusers(untrained)
    get_peft_model(net, HRAConfig(r=2, target_modules=list(net.paths))).save_pretrained(tmp_path)
    with pytest.raises(LoRAFormatError, match="is half a pair: hra_u without its apply_GS"):
        read_lora(tmp_path / "adapter_model.safetensors", modules_of(untrained))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"apply_GS": "yes"}))
    with pytest.raises(LoRAFormatError, match="its config has the apply_GS 'yes'; true or false is needed"):
        read_lora(tmp_path, modules_of(untrained))


# ---- our files, and tools ----------------------------------------------------------------------------------------------

def a_file(untrained, path):
    modules = modules_of(untrained)
    state = {p: weights(LayerShape(shape), 4, seed=i) for i, (p, shape) in enumerate(modules.shapes.items())
             if p.endswith(("q_proj", "conv1")) and p.startswith(("diffusion.", "clip."))}
    write_lora(path, state, modules, metadata={CONFIG_KEY: json.dumps(untrained.config.to_dict())})
    return state, modules


def test_what_was_written_comes_back_and_other_formats_refuse_it(untrained, tmp_path):
    path = tmp_path / "a.safetensors"
    state, modules = a_file(untrained, path)
    again = read_lora(path, modules).state
    assert again.keys() == state.keys() and all(w.kind == "hra" and w.alpha is w.rank is None for w in again.values())
    assert all(torch.equal(t, again[p].tensors[name]) for p, w in state.items() for name, t in w.tensors.items())
    keys = load_file(path)
    assert {t.dtype for key, t in keys.items() if key.endswith("hra_apply_GS")} == {torch.bool}
    for format in ("diffusers", "peft", "comfyui"):
        assert set(refusals(state, modules, format).values()) == {"kind 'hra'"}
        with pytest.raises(LoRAFormatError, match=rf"{format} cannot hold .* kind 'hra'; kohya can, or approximate it"):
            write_lora(tmp_path / "b.safetensors", state, modules, format=format)
    lost = {key: t for key, t in keys.items() if not key.endswith("hra_u")}
    save_file(lost, path)
    with pytest.raises(LoRAFormatError, match="is half a pair: hra_apply_GS without its u"):
        read_lora(path, modules)


def test_a_lora_can_stand_for_it(untrained, tmp_path):
    """W' - W = W A Bᵀ has the rank R of the reflections, so a LoRA of that rank holds all of it."""
    source, base = tmp_path / "a.safetensors", tmp_path / "base.safetensors"
    state, modules = a_file(untrained, source)
    save_checkpoint(untrained, base)
    with pytest.raises(LoRAFormatError, match=r"depends on the base's weight; name the checkpoint \(--model\)"):
        convert(source, tmp_path / "b.safetensors", format="diffusers", approximate=4)
    done = convert(source, tmp_path / "b.safetensors", format="diffusers", approximate=4, base=base)
    assert all(row.error < 1e-5 for row in done.approximated.modules.values()) and len(done.approximated.modules) == len(state)
    found = read_lora(tmp_path / "b.safetensors", modules).state
    for path, layer in lora_layers(load_lora_into_models(copy_of(untrained), source, name="a")).items():
        if path in state:
            W = layer.base_weight()
            low = found[path].tensors["up"].flatten(1) @ found[path].tensors["down"].flatten(1)
            low = low * (found[path].alpha / found[path].rank)
            assert torch.allclose(low, layer.adapter("a").delta(W).flatten(1), atol=1e-5 * math.sqrt(W[0].numel()))


def test_a_merged_model_is_the_turned_one(untrained, tmp_path):
    state, _ = a_file(untrained, tmp_path / "a.safetensors")
    models = load_lora_into_models(copy_of(untrained), tmp_path / "a.safetensors", name="a")
    merge(models)
    assert lora_state(models, "a").keys() == state.keys()
    for path, layer in lora_layers(models).items():
        if path in state:
            want = reflected(layer.weight, state[path].tensors["u"], False)
            assert torch.allclose(layer.merged_weight.double(), want, atol=1e-5)
