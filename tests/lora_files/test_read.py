"""LoRA files against formulas in fp64 and against diffusers: what they change, what survives them, what is refused."""

import copy
import json
import re
from functools import partial

import pytest
import safetensors.torch
import torch
import torch.nn as nn
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from sd.adapters.weights import AdapterWeights
from sd.checkpoints.names import model_names
from sd.config import TINY
from sd.files.hashes import lora_hash
from sd.lora import (
    KINDS,
    LoRAError,
    LoRAFormatError,
    active_multipliers,
    adapter_names,
    apply_lora_to_model,
    load_lora_weights,
    lora_layers,
    lora_state,
    merge_lora_weights,
    remove_lora,
    save_lora_weights,
    set_lora_enabled,
    use_adapters,
)
from sd.lora_files.modules import Modules
from sd.lora_files.read import read_lora
from sd.lora_files.write import write_kohya
from sd.model_loader import (
    Models,
    load_lora_into_models,
    merge_lora_into_checkpoint,
    preload_models_from_standard_weights,
    save_checkpoint,
    save_models_lora,
)
from tests.lora_files import cases
from tests.lora_files.cases import ATTN, FILES, GOOD, PROJ, close, our_outputs, outputs, pair, u, write
from tests.peers import ours_and_peers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder with the model as tiny.safetensors and as `tiny`, the peers' networks with the same weights)."""
    ours, peers = ours_and_peers(TINY)
    folder = tmp_path_factory.mktemp("base")
    models = Models(ours, TINY)
    save_checkpoint(models, folder / "tiny.safetensors")
    save_checkpoint(models, folder / "tiny")
    return folder, peers


@pytest.fixture
def models(base):
    return preload_models_from_standard_weights(base[0] / "tiny.safetensors", "cpu")


@pytest.fixture
def peers(base):
    return {name: copy.deepcopy(base[1][name]) for name in ("unet", "text_encoder")}


random = partial(cases.random, scale=0.3)


def assert_close(ours, theirs, tolerance=2e-5):
    assert close(ours, theirs, tolerance) and all(b.std() > 0.01 for b in theirs)


def differ(a, b):
    return any((x - y).abs().max() > 1e-3 * y.abs().max() for x, y in zip(a, b))


def peer_module(peers, kohya):
    """The module that a kohya name means, found in diffusers' and transformers' own module names."""
    for prefix, part in (("lora_unet_", "unet"), ("lora_te_", "text_encoder"), ("lora_te_text_model_", "text_encoder"),
                         ("lora_te1_text_model_", "text_encoder")):
        for name, module in peers[part].named_modules():
            if kohya == prefix + name.removeprefix("text_model.").replace(".", "_"):
                return module
    raise KeyError(kohya)


def add_by_formula(peers, tensors, multiplier=1.0):
    """W + multiplier (W' - W) of the published formulas in fp64, written into the peers' weights."""
    for module in {key.split(".")[0] for key in tensors}:
        target, t = peer_module(peers, module), {k.split(".", 1)[1]: v.double() for k, v in tensors.items()
                                                 if k.startswith(module + ".")}
        W = target.weight.data.double()
        delta = torch.zeros_like(W)
        if "lora_up.weight" in t:
            rank = t["lora_down.weight"].shape[0]
            alpha = t["alpha"].item() if "alpha" in t else rank
            product = t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)
            delta = product.reshape(W.shape) * alpha / rank
        for name in ("diff", "w_norm"):
            delta = delta + t.get(name, 0)
        if "dora_scale" in t:
            m = t["dora_scale"].reshape([*t["dora_scale"].shape] + [1] * (W.dim() - t["dora_scale"].dim()))
            axes = [i for i in range(W.dim()) if m.shape[i] == 1]
            delta = m * (W + delta) / (W + delta).pow(2).sum(axes, keepdim=True).sqrt() - W
        target.weight.data = (W + multiplier * delta).to(target.weight.dtype)
        for name in ("diff_b", "b_norm"):
            if name in t:
                target.bias.data = (target.bias.data.double() + multiplier * t[name]).to(target.bias.dtype)


@pytest.mark.parametrize("name", FILES)
def test_a_file_changes_the_outputs_as_its_formula_says(models, peers, tmp_path, name):
    before = our_outputs(models)
    load_lora_into_models(models, write(tmp_path / "x.safetensors", FILES[name]), "x")
    add_by_formula(peers, FILES[name])
    expected = outputs(peers["unet"], peers["text_encoder"])
    assert differ(expected, before)
    assert_close(our_outputs(models), expected)
    assert models.lora_reports["x"].tensors == len(FILES[name])
    merge_lora_weights(models)
    assert_close(our_outputs(models), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_file_of_any_dtype_is_read_in_fp32(models, peers, tmp_path, dtype):
    tensors = {k: v.to(dtype) for k, v in (FILES["attention"] | FILES["text encoder"]).items()}
    load_lora_into_models(models, write(tmp_path / "x.safetensors", tensors), "x", multiplier=-0.6)
    add_by_formula(peers, tensors, -0.6)
    assert_close(our_outputs(models), outputs(peers["unet"], peers["text_encoder"]))


def test_several_loras_of_other_ranks_add_up_and_leave_without_a_trace(models, peers, tmp_path):
    bare = our_outputs(models)
    one = FILES["attention"] | FILES["text encoder"]
    two = pair(u(ATTN), 32, 32, rank=7, alpha=3.0, seed=5) | FILES["3x3 convolution"]
    load_lora_into_models(models, write(tmp_path / "one.safetensors", one), multiplier=0.8)
    alone = our_outputs(models)
    load_lora_into_models(models, write(tmp_path / "two.safetensors", two), multiplier=-1.5)
    assert active_multipliers(models) == {"one": 0.8, "two": -1.5} and adapter_names(models) == ["one", "two"]
    add_by_formula(peers, one, 0.8)
    add_by_formula(peers, two, -1.5)
    assert_close(our_outputs(models), outputs(peers["unet"], peers["text_encoder"]))
    with use_adapters(models, {"one": 0.8}):
        assert_close(our_outputs(models), alone, 1e-5)
    remove_lora(models, "two")
    assert all(torch.equal(a, b) for a, b in zip(our_outputs(models), alone))
    remove_lora(models, "one")
    assert all(torch.equal(a, b) for a, b in zip(our_outputs(models), bare))
    assert adapter_names(models) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_using_and_removing_restores_every_bit(base, tmp_path, dtype):
    models = preload_models_from_standard_weights(base[0] / "tiny.safetensors", "cpu", dtype=dtype)
    state = {k: copy.deepcopy(m.state_dict()) for k, m in models.items()}
    bare = our_outputs(models)
    for name, tensors in FILES.items():
        load_lora_into_models(models, write(tmp_path / "x.safetensors", tensors), name)
    assert differ(our_outputs(models), bare)
    remove_lora(models)
    assert all(torch.equal(a, b) for a, b in zip(our_outputs(models), bare))
    for component, network in models.items():
        assert network.state_dict().keys() == state[component].keys()
        assert all(torch.equal(v, state[component][k]) for k, v in network.state_dict().items())


def test_a_name_in_use_is_replaced_whatever_its_rank(models, tmp_path):
    load_lora_into_models(models, write(tmp_path / "a.safetensors", FILES["attention"] | FILES["text encoder"]), "x")
    fresh = preload_models_from_standard_weights(models.source, "cpu")
    other = write(tmp_path / "b.safetensors", pair(u(ATTN), 32, 32, rank=9, alpha=1.0))
    for m in (models, fresh):
        load_lora_into_models(m, other, "x", multiplier=0.5)
    assert adapter_names(models) == ["x"] and active_multipliers(models) == {"x": 0.5}
    assert list(lora_layers(models)) == list(lora_layers(fresh)) and models.lora_reports["x"].ranks == [9]
    assert all(torch.equal(a, b) for a, b in zip(our_outputs(models), our_outputs(fresh)))


def test_a_lora_that_is_loaded_while_lora_is_off_is_never_half_on(models, tmp_path):
    bare = our_outputs(models)
    load_lora_into_models(models, write(tmp_path / "a.safetensors", FILES["attention"]), "a")
    set_lora_enabled(models, False)
    load_lora_into_models(models, write(tmp_path / "b.safetensors", FILES["attention"] | FILES["3x3 convolution"]), "b")
    assert all(torch.equal(a, b) for a, b in zip(our_outputs(models), bare))
    set_lora_enabled(models, True)
    assert active_multipliers(models) == {"a": 1.0, "b": 1.0}
    set_lora_enabled(models, False)
    remove_lora(models)
    load_lora_into_models(models, tmp_path / "a.safetensors", "a")  # what was switched off is gone: this one is on
    assert differ(our_outputs(models), bare)


# ---- writing ---------------------------------------------------------------------------------------------------------

def fill(models, seed=0):
    g = torch.Generator().manual_seed(seed)
    for layer in lora_layers(models).values():
        for p in layer.adapters.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.2 + (1.0 if p.shape == layer.weight.shape else 0.0)


class Everything(nn.Module):
    """One of every layer that can carry an adapter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.diff = nn.ModuleDict({"alpha": nn.Linear(6, 8)})  # names that are endings of keys elsewhere
        self.conv = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8), nn.Conv1d(8, 8, 1))
        self.image = nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.volume = nn.Conv3d(4, 4, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens):
        x = self.conv(self.diff["alpha"](self.embed(tokens)).mT)  # [B, 8, L]
        x = self.image(x.unsqueeze(-1).expand(-1, -1, -1, 6))
        return self.norm(self.volume(x.unsqueeze(-1).expand(-1, -1, -1, -1, 3)).flatten(2).mT)


@pytest.mark.parametrize("kind, dora", [(k, d) for k in KINDS for d in (False, True) if KINDS[k].takes_dora or not d])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_every_kind_on_every_layer_comes_back_bit_for_bit(tmp_path, kind, dora, suffix):
    net, again = Everything(), Everything()
    tokens = torch.arange(10).view(2, 5)
    targets = [rf"^({'embed|' if kind in ('lora', 'full') else ''}diff\.alpha|conv\.[12]|image|volume|norm)$"]
    if kind in ("lora", "full"):
        targets.append("conv.0")  # a grouped convolution
    apply_lora_to_model(net, 2, 0.3, 0.0, targets, "mine", kind=kind, dora=dora)
    fill(net)
    path = tmp_path / f"net.{suffix}"
    with pytest.warns(UserWarning, match="holds no metadata") if suffix == "pt" else pytest.MonkeyPatch.context():
        save_lora_weights(net, path)
    report = load_lora_weights(again, path, "v1.5")
    ours, theirs = lora_state(net, "mine"), lora_state(again, "v1.5")
    assert ours.keys() == theirs.keys() and report.modules == {"": len(ours)} and len(ours) == 8 - 2 * (len(targets) < 2)
    for module, weights in ours.items():
        assert (weights.kind, weights.alpha) == (theirs[module].kind, theirs[module].alpha)
        assert weights.tensors.keys() == theirs[module].tensors.keys()
        assert all(torch.equal(w, theirs[module].tensors[k]) for k, w in weights.tensors.items())
    assert torch.equal(net.eval()(tokens), again.eval()(tokens))
    assert not torch.allclose(net(tokens), Everything()(tokens), atol=1e-3)
    if suffix == "pt":
        flat = torch.load(path, weights_only=True)
        assert all(isinstance(v, torch.Tensor) for v in flat.values()) and len(flat) == report.tensors
    remove_lora(again)
    assert {type(m) for m in again.modules()} == {type(m) for m in Everything().modules()}, "foreign layers are plain again"


PATHS = [name.path for name in model_names(TINY)]
numbers = st.floats(-1e4, 1e4, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-30)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(PATHS), st.tuples(st.integers(1, 3), numbers, st.sampled_from(["lora", "full", "dora"]),
                                                         st.integers(1, 4)), min_size=1, max_size=6))
def test_reading_what_was_written_is_the_identity(modules):
    state = {}
    for path, (rank, alpha, kind, dims) in modules.items():
        kernel = (1,) * max(0, dims - 2)
        if kind == "full":
            state[path] = AdapterWeights("full", {"diff": random(*[3] * dims), "diff_b": random(3)})
        else:
            state[path] = AdapterWeights("lora", {"down": random(rank, 5, *kernel), "up": random(4, rank, *kernel)}, alpha)
            if kind == "dora":
                state[path].tensors["magnitude"] = random(4, 1)
    names = model_names(TINY)
    tensors = write_kohya(state, names)
    again = read_lora(tensors, Modules(names, {})).state
    assert again.keys() == state.keys()
    for path, weights in state.items():
        assert again[path].kind == weights.kind and again[path].alpha == weights.alpha
        assert again[path].tensors.keys() == weights.tensors.keys()
        assert all(torch.equal(v, again[path].tensors[k]) for k, v in weights.tensors.items())
    assert all(torch.equal(v, tensors[k]) for k, v in write_kohya(again, names).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_file_in_half_precision_keeps_alpha_exactly(models, tmp_path, dtype):
    apply_lora_to_model({"diffusion": models["diffusion"]}, 3, 0.1, name="x")
    fill(models)
    save_models_lora(models, tmp_path / "x.safetensors", dtype=dtype)
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert {v.dtype for k, v in tensors.items() if not k.endswith(".alpha")} == {dtype}
    assert {v.item() for k, v in tensors.items() if k.endswith(".alpha")} == {0.1}
    load_lora_into_models(models, tmp_path / "x.safetensors", "again")
    assert {w.alpha for w in lora_state(models, "again").values()} == {0.1}


def test_alpha_as_a_plain_number_in_a_pickle_counts(models, peers, tmp_path):
    tensors = pair(u(ATTN), 32, 32, alpha=2.0)
    torch.save({k: v.item() if k.endswith("alpha") else v for k, v in tensors.items()}, tmp_path / "x.pt")
    load_lora_into_models(models, tmp_path / "x.pt")
    add_by_formula(peers, tensors)
    assert_close(our_outputs(models), outputs(peers["unet"], peers["text_encoder"]))


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_diffusers_gives_the_same_with_our_file(base, models, tmp_path, dtype):
    targets = [r"\.(q_proj|out_proj|fc1|proj_in)$", r"\.resnets\.0\.conv1$"]
    apply_lora_to_model({"diffusion": models["diffusion"]}, 3, 1.3, target_modules=targets, name="x")
    # alpha = rank: on a text encoder of transformers >= 5.6 diffusers 0.42 loses alpha, and knows a file by its out_proj
    apply_lora_to_model({"clip": models["clip"]}, 3, 3.0, target_modules=["q_proj", "out_proj", "fc2"], name="x")
    fill(models)
    save_models_lora(models, tmp_path / "x.safetensors", dtype=dtype)
    load_lora_into_models(models, tmp_path / "x.safetensors", "x")
    pipe = StableDiffusionPipeline.from_pretrained(base[0] / "tiny")
    bare = outputs(pipe.unet, pipe.text_encoder)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    theirs = outputs(pipe.unet, pipe.text_encoder)
    assert differ(theirs[:1], bare[:1]) and differ(theirs[1:], bare[1:])
    assert_close(our_outputs(models), theirs, 5e-5)


def test_our_file_is_spelt_as_kohya_spells_it(models, tmp_path):
    apply_lora_to_model({k: models[k] for k in ("diffusion", "clip")}, 2, 1.0, target_modules="kohya", name="x")
    fill(models)
    save_models_lora(models, tmp_path / "x.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    names = {key.split(".")[0] for key in tensors}
    assert {key.split(".", 1)[1] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    for name in ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
                 "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj",
                 "lora_unet_up_blocks_1_attentions_1_proj_out", "lora_te_text_model_encoder_layers_1_self_attn_out_proj",
                 "lora_te_text_model_encoder_layers_0_mlp_fc2"):
        assert name in names
    assert tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"].shape == (2, 32, 1, 1)
    assert tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"].shape == (32, 2, 1, 1)


def test_the_vae_is_saved_under_its_module_path(models, tmp_path):
    apply_lora_to_model(models, 2, 1.0, target_modules=["decoder.mid_block", "encoder.conv_in"], name="x")
    fill(models)
    save_models_lora(models, tmp_path / "x.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert "decoder.mid_block.attentions.0.attention.q_proj.lora_up.weight" in tensors
    fresh = preload_models_from_standard_weights(models.source, "cpu")
    report = load_lora_into_models(fresh, tmp_path / "x.safetensors").lora_reports["x"]
    assert report.modules == {"encoder": 1, "decoder": 8}
    z = random(1, 4, 6, 5, seed=1)
    with torch.no_grad():
        assert torch.equal(models["decoder"](z), fresh["decoder"](z))


def test_a_foreign_transformer_takes_loras_from_files_too(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=100)
    torch.manual_seed(0)
    bert = BertModel(config).eval()
    other = copy.deepcopy(bert)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        bare = bert(tokens)[0]
        apply_lora_to_model(bert, 4, 2.0, target_modules=["query", "value", "word_embeddings"], name="mine")
        fill(bert)
        save_lora_weights(bert, tmp_path / "bert.safetensors")
        report = load_lora_weights(other, tmp_path / "bert.safetensors")
        assert torch.equal(bert(tokens)[0], other(tokens)[0]) and not torch.allclose(bert(tokens)[0], bare, atol=1e-3)
        keys = safetensors.torch.load_file(tmp_path / "bert.safetensors").keys()
        assert "encoder.layer.1.attention.self.query.lora_down.weight" in keys and report.modules == {"": 5}
        nets = {"left": nn.Sequential(nn.Linear(4, 4)), "right": nn.Sequential(nn.Linear(4, 4))}  # a dict of foreign models
        apply_lora_to_model(nets, 2, target_modules=["0"], name="x")
        save_lora_weights(nets, tmp_path / "nets.safetensors")
        assert load_lora_weights(nets, tmp_path / "nets.safetensors", "y").modules == {"left": 1, "right": 1}


def test_the_header_says_what_the_file_is(models, tmp_path):
    apply_lora_to_model({"diffusion": models["diffusion"]}, 4, 2.0, target_modules=["q_proj"], name="x")
    save_models_lora(models, tmp_path / "x.safetensors", metadata={"ss_learning_rate": "0.0001", "ss_steps": "12"})
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == "4" and float(header["ss_network_alpha"]) == 2.0
    assert header["ss_network_module"] == "networks.lora"
    assert header["ss_learning_rate"] == "0.0001" and header["ss_steps"] == "12"
    assert header["ss_new_sd_model_hash"] == models.model_hash and header["ss_sd_model_name"] == "tiny.safetensors"
    modules = json.loads(header["sdlora.modules"])
    assert modules.keys() == lora_layers(models).keys() and set(map(tuple, modules.values())) == {("lora", 4, 2.0)}
    report = load_lora_into_models(models, tmp_path / "x.safetensors", "y").lora_reports["y"]
    assert report.metadata == header and (report.ranks, report.alphas) == ([4], [2.0])
    assert re.fullmatch(r"LoRA 'y': kohya for tiny, \d+ in diffusion, rank 4, alpha 2, \d+ tensors applied", str(report))
    before = lora_hash(tmp_path / "x.safetensors")
    save_models_lora(models, tmp_path / "y.safetensors", "y", metadata={"ss_training_comment": "another header"})
    assert lora_hash(tmp_path / "y.safetensors") == before


def test_another_base_is_worth_a_line_and_no_more(models, tmp_path, caplog):
    for base_hash, lines in (("0" * 64, 1), (models.model_hash + "0" * 54, 0)):
        write(tmp_path / "x.safetensors", FILES["attention"], metadata={"ss_new_sd_model_hash": base_hash})
        with caplog.at_level("INFO", logger="sd"):
            caplog.clear()
            load_lora_into_models(models, tmp_path / "x.safetensors")
        assert sum("was made on a base with hash" in r.getMessage() for r in caplog.records) == lines


def test_which_adapter_to_save_must_be_clear(models, tmp_path):
    with pytest.raises(LoRAError, match="loaded: none"):
        save_models_lora(models, tmp_path / "x.safetensors")
    for name in ("a", "b"):
        apply_lora_to_model(models, 2, name=name)
    with pytest.raises(LoRAError, match="name the adapter to save; loaded: 'a', 'b'"):
        save_models_lora(models, tmp_path / "x.safetensors")
    with pytest.raises(LoRAError, match="no adapter is named 'c'"):
        save_models_lora(models, tmp_path / "x.safetensors", "c")
    assert not list(tmp_path.iterdir())


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_failed_load_converts_no_foreign_layer(tmp_path):
    net = Everything()
    with pytest.raises(LoRAFormatError, match=r"1 of 2 LoRA modules do not fit this model, first: image"):
        load_lora_weights(net, write(tmp_path / "x.safetensors", pair("diff.alpha", 8, 6) | pair("image", 4, 5, kernel=(3, 3))))
    assert {type(m) for m in net.modules()} == {type(m) for m in Everything().modules()}


# ---- merging for deployment ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out", ["merged.safetensors", "merged"])
def test_a_merged_checkpoint_is_the_base_plus_every_weighted_change(base, peers, tmp_path, dtype, out):
    one = FILES["attention"] | FILES["text encoder"] | FILES["DoRA of a convolution"]
    two = pair(u(ATTN), 32, 32, rank=7, alpha=3.0, seed=5) | FILES["full difference with bias"] | FILES["norm"]
    loras = {write(tmp_path / "one.safetensors", one): 0.8, write(tmp_path / "two.safetensors", two): -0.5}
    merged = merge_lora_into_checkpoint(base[0] / "tiny.safetensors", loras, tmp_path / out, dtype=dtype)
    assert adapter_names(merged) == []
    for peer in peers.values():
        peer.double()
    for path, multiplier in loras.items():
        add_by_formula(peers, safetensors.torch.load_file(path), multiplier)
    save_checkpoint(preload_models_from_standard_weights(tmp_path / out, "cpu", dtype=torch.float32), tmp_path / "plain")
    for folder, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        found = safetensors.torch.load_file(tmp_path / "plain" / folder / f"{file}.safetensors")
        wanted = {("text_model." if folder == "text_encoder" else "") + k.removeprefix("text_model."): v
                  for k, v in peers[folder].state_dict().items()}
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            error, ulp = (found[key].double() - tensor).abs(), torch.finfo(dtype or torch.float32).eps
            assert (error <= 0.51 * ulp * tensor.abs() + 3e-7 * (1 + tensor.abs().max())).all(), key
    if out.endswith("s"):
        tensors = safetensors.torch.load_file(tmp_path / out)
        assert tensors.keys() == safetensors.torch.load_file(base[0] / "tiny.safetensors").keys()
        assert {v.dtype for v in tensors.values()} == {dtype or torch.float32}


def test_merging_with_a_bad_file_writes_nothing(base, tmp_path):
    (tmp_path / "out.safetensors").write_text("precious")
    bad = write(tmp_path / "bad.safetensors", GOOD | pair(u(PROJ), 48, 64))
    with pytest.raises(LoRAFormatError, match="do not fit"):
        merge_lora_into_checkpoint(base[0] / "tiny.safetensors", {bad: 1.0}, tmp_path / "out.safetensors")
    with pytest.raises(LoRAError, match="nothing to merge"):
        merge_lora_into_checkpoint(base[0] / "tiny.safetensors", {}, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_text() == "precious"


def test_a_failed_save_of_a_lora_leaves_the_old_file(models, tmp_path, monkeypatch):
    path = write(tmp_path / "x.safetensors", GOOD)
    load_lora_into_models(models, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_models_lora(models, path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]
