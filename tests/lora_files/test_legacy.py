"""LoRA files of older programs, each built by that program's own convention and compared with its own formula in fp64."""

import copy
import json
from functools import partial

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

from sd.checkpoints.names import model_names
from sd.config import SD15, TINY
from sd.files.tensor_file import TensorFile
from sd.files.tensors import read_tensors
from sd.lora import LoRAFormatError, load_lora_weights, lora_layers, modules_of
from sd.lora_files.legacy import LEGACY, fork_names
from sd.lora_files.modules import Modules
from sd.model_loader import Models
from sd.unet import UNet
from tests.lora_files import cases
from tests.lora_files.cases import close, our_outputs, outputs
from tests.peers import ours_and_peers

READ = {name: (detect, read) for name, detect, read in LEGACY}
FIRST = "down_blocks.0.attentions.0"
BLOCK = f"{FIRST}.transformer_blocks.0"
LAYER = "encoder.layers.0"


@pytest.fixture(scope="module")
def made():
    return ours_and_peers(TINY)


@pytest.fixture
def models(made):
    return Models(copy.deepcopy(made[0]), TINY)


@pytest.fixture
def peers(made):
    return {name: copy.deepcopy(made[1][name]) for name in ("unet", "text_encoder")}


random = partial(cases.random, scale=0.3)


def add(network, path, delta):
    layer = network.get_submodule(path)
    layer.weight.data = (layer.weight.data.double() + delta.reshape(layer.weight.shape)).to(layer.weight.dtype)


def check_models(models, peers, path, tensors, tolerance=2e-5):
    """Loading makes our networks equal to the peers, which hold the change, and accounts for every tensor of the file."""
    plain = our_outputs(models)
    report = load_lora_weights(models, path)
    ours, theirs = our_outputs(models), outputs(peers["unet"], peers["text_encoder"])
    assert close(ours, theirs, tolerance) and not close(ours, plain, 1e-3)
    assert report.tensors + len(report.skipped) == tensors
    return report


def check_model(model, path, deltas, tensors, x=None):
    """The same for a foreign model: `deltas` are written into a copy of it."""
    want = copy.deepcopy(model)
    for name, delta in deltas.items():
        add(want, name, delta)
    x = random(2, 5, 16, scale=1.0) if x is None else x
    plain = model(x)
    report = load_lora_weights(model, path)
    assert close([model(x)], [want(x)]) and not close([plain], [want(x)], 1e-3)
    assert set(lora_layers(model)) == set(deltas) and report.tensors + len(report.skipped) == tensors
    return report


def saved(tmp_path, content, name="lora.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


# ---- the fork of hkproj ------------------------------------------------------------------------------------------------

# The fork's name -> (peer's network, its layers: rows of the product in order, columns)
FORK_LAYERS = {
    "diffusion.unet.encoders.1.1.attention_1.in_proj": ("unet", [f"{BLOCK}.attn1.to_{x}" for x in "qkv"]),
    "diffusion.unet.encoders.1.1.attention_1.out_proj": ("unet", [f"{BLOCK}.attn1.to_out.0"]),
    "diffusion.unet.encoders.1.1.attention_2.k_proj": ("unet", [f"{BLOCK}.attn2.to_k"]),
    "diffusion.unet.encoders.1.1.linear_geglu_1": ("unet", [f"{BLOCK}.ff.net.0.proj"]),
    "diffusion.unet.bottleneck.1.attention_1.q_proj": ("unet", ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]),
    "diffusion.unet.decoders.3.1.conv_output": ("unet", ["up_blocks.1.attentions.1.proj_out"]),
    "diffusion.time_embedding.linear_2": ("unet", ["time_embedding.linear_2"]),
    "clip.layers.0.attention.in_proj": ("text_encoder", [f"{LAYER}.self_attn.{x}_proj" for x in "qkv"]),
    "clip.layers.1.attention.out_proj": ("text_encoder", ["encoder.layers.1.self_attn.out_proj"]),
    "clip.layers.0.linear_2": ("text_encoder", [f"{LAYER}.mlp.fc2"]),
}


def fork_file(peers, names=None):
    """{key: tensor or number} of the fork, and the change written into the peers."""
    content = {}
    for i, (name, (network, paths)) in enumerate(FORK_LAYERS.items()):
        if names and not name.startswith(names):
            continue
        weights = [peers[network].get_submodule(path).weight for path in paths]
        width, out, alpha = weights[0].shape[1], sum(len(w) for w in weights), 1.5 + i
        rank = width if name.endswith("attention_1.out_proj") else 2 + i % 2  # square at rank 32: shapes tell nothing
        a, b = random(width, rank, seed=i), random(rank, out, seed=i + 50)
        content |= {f"{name}.lora_A": a, f"{name}.lora_B": b, f"{name}.alpha": alpha, f"{name}.rank": rank}
        delta = (a.double() @ b.double()).T * (alpha / rank)
        for path, part in zip(paths, delta.split([len(w) for w in weights])):
            add(peers[network], path, part)
    return content


@pytest.mark.parametrize("how", ["flat", "nested", "numbers as tensors", "without the prefix", "clip alone"])
def test_the_forks_file_changes_networks_by_its_formula(how, models, peers, tmp_path):
    content = fork_file(peers, {"without the prefix": "diffusion.", "clip alone": "clip."}.get(how))
    tensors = 2 * len(content) // 4
    if how == "nested":
        content = {n: {k.removeprefix(n + "."): v for k, v in content.items() if k.startswith(n + ".")}
                   for n in ("diffusion", "clip")}
    elif how == "numbers as tensors":
        content, tensors = {k: torch.as_tensor(v) for k, v in content.items()}, 2 * tensors
    elif how in ("without the prefix", "clip alone"):
        content = {k.split(".", 1)[1]: v for k, v in content.items()}
    report = check_models(models, peers, saved(tmp_path, content), tensors)
    assert report.format == "hkproj fork" and report.alphas[0] in (1.5, 8.5)


def test_the_forks_file_without_alpha_and_rank_has_scale_1(models, peers, tmp_path):
    a, b = random(32, 3), random(3, 256, seed=1)
    add(peers["unet"], f"{BLOCK}.ff.net.0.proj", (a.double() @ b.double()).T)
    name = "unet.encoders.1.1.linear_geglu_1"
    check_models(models, peers, saved(tmp_path, {f"{name}.lora_A": a, f"{name}.lora_B": b}), 2)


def test_where_the_forks_matrices_fit_only_the_other_way_round_they_are_read_so(models, peers, tmp_path):
    a, b = random(3, 32), random(256, 3, seed=1)
    add(peers["unet"], f"{BLOCK}.ff.net.0.proj", b.double() @ a.double() * 2)
    name = "unet.encoders.1.1.linear_geglu_1"
    content = {f"{name}.lora_A": a, f"{name}.lora_B": b, f"{name}.alpha": 6.0, f"{name}.rank": 3}
    check_models(models, peers, saved(tmp_path, content), 2)


@pytest.mark.parametrize("fork, ours", [
    ("unet.encoders.8.1.attention_2.v_proj", "down_blocks.2.attentions.1.transformer_blocks.0.attn2.v_proj"),
    ("unet.encoders.1.1.attention_1.k_proj", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.k_proj"),
    ("unet.decoders.3.1.conv_input", "up_blocks.1.attentions.0.proj_in"),
    ("unet.decoders.11.1.linear_geglu_2", "up_blocks.3.attentions.2.transformer_blocks.0.ff.fc2"),
    ("unet.bottleneck.1.layernorm_3", "mid_block.attentions.0.transformer_blocks.0.norm3"),
    ("unet.bottleneck.1.groupnorm", "mid_block.attentions.0.norm"),
    ("unet.bottleneck.2.conv_merged", "mid_block.resnets.1.conv2"),
    ("unet.encoders.0.0", "conv_in"),
    ("unet.encoders.10.0.linear_time", "down_blocks.3.resnets.0.time_emb_proj"),
    ("unet.encoders.4.0.residual_layer", "down_blocks.1.resnets.0.conv_shortcut"),
    ("unet.encoders.6.0", "down_blocks.1.downsampler.conv"),
    ("unet.decoders.2.1.conv", "up_blocks.0.upsampler.conv"),
    ("unet.decoders.5.2.conv", "up_blocks.1.upsampler.conv"),
    ("unet.decoders.7.0.groupnorm_feature", "up_blocks.2.resnets.1.norm1"),
    ("unet.decoders.7.0.groupnorm_merged", "up_blocks.2.resnets.1.norm2"),
    ("time_embedding.linear_1", "time_embedding.linear_1"),
    ("final.conv", "conv_out"),
])
def test_every_name_of_the_forks_unet_means_our_layer(fork, ours):
    names = fork_names(Modules(model_names(SD15), {}))
    assert names[f"diffusion.{fork}"] == names[fork] == f"diffusion.{ours}"


def test_no_two_modules_share_a_name_of_the_fork():
    rows = [name for name in model_names(SD15) if name.component in ("clip", "diffusion")]
    names = fork_names(Modules(rows, {}))
    assert len({k for k in names if k.startswith(("clip.", "diffusion."))}) == len(rows) == len(set(names.values()))


# ---- LoRAW -------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """16 wide; k and v may be narrower."""

    def __init__(self, fused=False, narrow=8, names=("to_q", "to_k", "to_v")):
        super().__init__()
        self.narrow, self.names = narrow, ("to_qkv",) if fused else names
        for name, width in [("to_qkv", 16 + 2 * narrow)] if fused else zip(names, (16, narrow, narrow)):
            setattr(self, name, nn.Linear(16, width, bias=False))
        self.to_out = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = torch.cat([getattr(self, n)(x) for n in self.names], -1).split([16, self.narrow, self.narrow], -1)
        return self.to_out(torch.tanh(q) * (k - 2 * v).repeat(1, 1, 16 // self.narrow))


class DiT(nn.Module):
    def __init__(self, **kinds):
        super().__init__()
        torch.manual_seed(0)
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention(**kinds)}) for _ in range(2)])
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x):
        for layer in self.transformer.layers:
            x = x + layer["self_attn"](x)
        return x + self.conv(x.mT).mT


ATTN = "transformer.layers.{}.self_attn"


def loraw_file(prefix="model/model/", **layers):
    """LoRAW's keys; layer name -> (out, in, kernel) with rank 3."""
    content = {}
    for i, (name, (out, into, *kernel)) in enumerate(layers.items()):
        key = prefix + name.replace(".", "/")
        content[f"{key}/lora_down.weight"] = random(3, into, *kernel, seed=i)
        content[f"{key}/lora_up.weight"] = random(out, 3, *(1 for _ in kernel), seed=i + 9)
    return content


def product(content, name, prefix="model/model/"):
    key = prefix + name.replace(".", "/")
    return content[f"{key}/lora_up.weight"].double().flatten(1) @ content[f"{key}/lora_down.weight"].double().flatten(1)


class Inside(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("names, narrow", [(("to_q", "to_k", "to_v"), 8), (("q_proj", "k_proj", "v_proj"), 4)])
@pytest.mark.parametrize("around, head, prefix", [
    (lambda dit: Inside(Inside(dit)), "model.model.", "model/model/"), (Inside, "model.", "model/model/"),
    (lambda dit: dit, "", "model/model/"), (nn.Sequential, "0.", "")])
def test_loraws_fused_layers_are_split_by_the_widths_of_the_layers(around, head, prefix, names, narrow, tmp_path):
    attn = [ATTN.format(i) for i in range(2)]
    content = loraw_file(prefix, **{f"{attn[0]}.to_qkv": (16 + 2 * narrow, 16), f"{attn[1]}.to_kv": (2 * narrow, 16),
                                    f"{attn[1]}.to_out": (16, 16), "conv": (16, 16, 3)})
    qkv = product(content, f"{attn[0]}.to_qkv", prefix).split([16, narrow, narrow])
    kv = product(content, f"{attn[1]}.to_kv", prefix).split([narrow, narrow])
    deltas = {f"{attn[0]}.{name}": delta for name, delta in zip(names, qkv)}
    deltas |= {f"{attn[1]}.{name}": delta for name, delta in zip(names[1:], kv)}
    deltas |= {name: product(content, name, prefix) for name in (f"{attn[1]}.to_out", "conv")}
    report = check_model(around(DiT(names=names, narrow=narrow)), saved(tmp_path, content, "lora.ckpt"),
                         {head + name: delta for name, delta in deltas.items()}, len(content))
    assert report.format == "LoRAW" and report.alphas == [3.0]


def test_loraws_to_qkv_goes_to_the_models_own_to_qkv_where_it_has_one(tmp_path):
    name = ATTN.format(1) + ".to_qkv"
    content = loraw_file(**{name: (32, 16)})
    check_model(DiT(fused=True), saved(tmp_path, content), {name: product(content, name)}, 2)


def test_loraws_dora_scales_each_row_and_its_bias_is_accounted_for(tmp_path):
    model, name = DiT(), ATTN.format(0)
    content = loraw_file(**{f"{name}.to_qkv": (32, 16)})
    m = random(32, 1, seed=4).abs() + 0.5
    content |= {f"model/model/{name.replace('.', '/')}/to_qkv/dora_mag.weight": m,
                f"model/model/{name.replace('.', '/')}/to_qkv/dora_mag.bias": random(32)}
    attention = model.get_submodule(name)
    W = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]).detach().double()
    V = W + product(content, f"{name}.to_qkv")
    deltas = (m.double() * V / V.norm(dim=1, keepdim=True) - W).split([16, 8, 8])
    check_model(model, saved(tmp_path, content), {f"{name}.to_{x}": d for x, d in zip("qkv", deltas)}, 4)


def test_a_name_that_two_parts_of_the_model_could_have_is_refused(tmp_path):
    model = nn.ModuleDict({"a": DiT(), "b": DiT()})
    content = loraw_file("", **{f"{ATTN.format(0)}.to_out": (16, 16)})
    with pytest.raises(LoRAFormatError, match=r"may mean [ab]\.transformer.*self_attn\.to_out or [ab]\.transformer"):
        load_lora_weights(model, saved(tmp_path, content))


# ---- TheDiscoMole/LoRA -------------------------------------------------------------------------------------------------

class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(4, 4)
        self.plain = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 6, (1, 3), groups=2)
        self.line = nn.Conv1d(6, 5, 1)
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        x = self.grouped(self.plain(self.embed(x).permute(0, 3, 1, 2)))
        return self.linear(self.line(x.flatten(2)).mT)


PIXELS = torch.randint(0, 4, (2, 4, 4), generator=torch.Generator().manual_seed(0))


def discomole_file(model, task="anime", rank=2):
    content, deltas = {}, {}
    for i, (name, layer) in enumerate(model.named_modules()):
        if not hasattr(layer, "weight") or name == "embed":
            continue
        out, into, *kernel = layer.weight.shape
        a, b = random(*kernel, out, rank, seed=i), random(*kernel, rank, into, seed=i + 9)
        content |= {f"{name}.{task}.module.A": a, f"{name}.{task}.module.B": b}
        deltas[name] = (a.double() @ b.double()).view(layer.weight.shape)  # as that program's forward has it
    return content, deltas


def test_discomoles_linear_layers_and_convolutions_change_by_its_own_view_of_the_product(tmp_path):
    model = Convolutions()
    content, deltas = discomole_file(model)
    report = check_model(model, saved(tmp_path, content), deltas, len(content), PIXELS)
    assert report.format == "TheDiscoMole/LoRA" and report.kinds == ["full", "lora"]


@pytest.mark.parametrize("system", ["TheDiscoMole/LoRA", "loralib"])
def test_an_embedding_is_changed_in_its_own_layout(system, tmp_path):
    a, b, model = random(4, 4), random(4, 4, seed=1), Convolutions()  # square at rank 4: shapes tell nothing
    content = {"embed.line art.module.A": a, "embed.line art.module.B": b}
    if system == "loralib":
        content = {"embed.lora_A": a.T.contiguous(), "embed.lora_B": b.T.contiguous()}
    report = check_model(model, saved(tmp_path, content), {"embed": a.double() @ b.double()}, 2, PIXELS)
    assert report.format == system and report.kinds == ["lora"]


def test_a_file_of_several_tasks_is_refused_with_their_names(tmp_path):
    model = Convolutions()
    content = discomole_file(model)[0] | discomole_file(model, "line art")[0]
    with pytest.raises(LoRAFormatError, match=r"2 tasks \(anime, line art\); save one"):
        load_lora_weights(model, saved(tmp_path, content))


# ---- lists without names -----------------------------------------------------------------------------------------------

def walked(network, targets, *, older=False):
    """Names of the layers below modules of these classes in the order in which cloneofsimo's program meets them."""
    names, found = {m: n for n, m in network.named_modules()}, []
    for ancestor in network.modules():
        if type(ancestor).__name__ in targets:
            found += [m for m in ancestor.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m not in found]
    paths = [names[m] for m in found]
    if older:  # diffusers once made ff between attn1 and attn2; published files are that old
        at = {path: i for i, path in enumerate(paths)}
        for path in [p for p in paths if ".ff." in p]:
            at[path] = at[path.replace("ff.net.0.proj", "attn1.to_out.0")] + 0.5
        paths = sorted(paths, key=at.get)
    return paths


def listed(network, paths, rank=2, size=0.1):
    """[(up, down), ...] of these layers, and their changes written into the network."""
    pairs = []
    for i, path in enumerate(paths):
        out, into, *kernel = network.get_submodule(path).weight.shape
        up, down = random(out, rank, *(1 for _ in kernel), seed=i), random(rank, into, *kernel, seed=i + 200, scale=size)
        add(network, path, up.double().flatten(1) @ down.double().flatten(1))
        pairs.append((up, down))
    return pairs


ATTENTION = {"Attention", "GEGLU"}


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("targets, count", [(ATTENTION, 90), (ATTENTION | {"ResnetBlock2D"}, 141)])
def test_a_list_for_the_unet_is_read_in_the_order_of_its_program(targets, count, older, models, peers, tmp_path):
    paths = walked(peers["unet"], targets, older=older)
    assert len(paths) == count
    content = [nn.Parameter(t) for pair in listed(peers["unet"], paths) for t in pair]
    report = check_models(models, peers, saved(tmp_path, content), 2 * count)
    assert report.modules == {"diffusion": count} and report.format == "cloneofsimo list"


def test_a_list_for_the_text_encoder_is_told_by_its_length(models, peers, tmp_path):
    paths = walked(peers["text_encoder"], {"CLIPAttention"})
    assert [p.split(".")[-1] for p in paths[:4]] == ["k_proj", "v_proj", "q_proj", "out_proj"]
    content = [t for pair in listed(peers["text_encoder"], paths) for t in pair]
    check_models(models, peers, saved(tmp_path, content), len(content))


def sd15_pairs():
    """Shapes (out, in) of the pairs of a published file (cloneofsimo's lora_disney.safetensors), with rank 1."""
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    for c in widths:
        yield from [(c, c)] * 4 + [(8 * c, c), (c, c), (c, 768), (c, 768), (c, c)]


def test_a_published_file_of_sd15_fits_in_the_published_order():
    with torch.device("meta"):
        modules = modules_of(Models({"diffusion": UNet(SD15.unet)}, SD15))
    tensors = [torch.zeros(1).expand(*shape) for out, into in sd15_pairs() for shape in ((out, 1), (1, into))]
    file = TensorFile("lora.pt", {str(i): tensor for i, tensor in enumerate(tensors)})
    paths = [e.module for e in READ["cloneofsimo list"][1](file, modules)][::2]
    attn1 = "diffusion.{}.attentions.{}.transformer_blocks.0.attn1.q_proj"
    assert len(paths) == len(set(paths)) == 144
    assert [paths[i] for i in (0, 9, 54, 126, 135)] == [attn1.format("down_blocks.0", 0), attn1.format("down_blocks.0", 1),
                                                        attn1.format("up_blocks.1", 0), attn1.format("up_blocks.3", 2),
                                                        attn1.format("mid_block", 0)]
    assert [p.split(".0.")[-1] for p in paths[:9]] == [
        "attn1.q_proj", "attn1.k_proj", "attn1.v_proj", "attn1.out_proj", "ff.fc1",
        "attn2.q_proj", "attn2.k_proj", "attn2.v_proj", "attn2.out_proj"]


def foreign():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.Conv1d(5, 5, 3, padding=1), nn.Linear(8, 16))


def test_a_list_for_a_foreign_model_has_one_pair_for_each_linear_layer_and_convolution(tmp_path):
    model = foreign()
    paths = ["0", "2", "3", "4"]
    pairs = listed(copy.deepcopy(model), paths)
    deltas = {path: up.double().flatten(1) @ down.double().flatten(1) for path, (up, down) in zip(paths, pairs)}
    check_model(model, saved(tmp_path, [t for pair in pairs for t in pair]), deltas, 8)


@pytest.mark.parametrize("change, message", [
    (lambda pairs: pairs[:-1], "list of 3 pairs without names.* 4 of the model"),
    (lambda pairs: [pairs[0], pairs[3], pairs[2], pairs[1]],
     r"pair 1 of a list without names, up \[16, 2\] and down \[2, 8\], does not fit 2, .* is \[8, 16\]"),
    (lambda pairs: [*pairs[:-1], pairs[-1][:1]], "list of 7 tensors; pairs of up and down"),
])
def test_a_list_that_does_not_fit_is_refused(change, message, tmp_path):
    pairs = change(listed(foreign(), ["0", "2", "3", "4"]))
    with pytest.raises(LoRAFormatError, match=message):
        load_lora_weights(foreign(), saved(tmp_path, [t for pair in pairs for t in pair]))


# ---- cloneofsimo's safetensors -----------------------------------------------------------------------------------------

def numbered(peers, tmp_path, targets=ATTENTION, change=None):
    tensors, header = {}, {}
    for network, classes in (("unet", targets), ("text_encoder", {"CLIPAttention"})):
        header[network] = json.dumps(sorted(classes))
        for i, (up, down) in enumerate(listed(peers[network], walked(peers[network], classes, older=True))):
            tensors |= {f"{network}:{i}:up": up, f"{network}:{i}:down": down}
            header[f"{network}:{i}:rank"] = "2"
    tensors["<s1>"], header["<s1>"] = random(32), "<embed>"
    for key in change or ():
        tensors.pop(key)
    safetensors.torch.save_file(tensors, tmp_path / "lora.safetensors", header)
    return tmp_path / "lora.safetensors", tensors


@pytest.mark.parametrize("targets", [ATTENTION, ATTENTION | {"ResnetBlock2D"}])
def test_cloneofsimos_safetensors_hold_both_networks_and_tokens(targets, models, peers, tmp_path):
    path, tensors = numbered(peers, tmp_path, targets)
    plain = our_outputs(models)
    report = load_lora_weights(models, path, skip="^<s1>$")
    ours, theirs = our_outputs(models), outputs(peers["unet"], peers["text_encoder"])
    assert close(ours, theirs) and not close(ours, plain, 1e-3)
    assert report.tensors + 1 == len(tensors) and report.skipped == ["<s1>"]


def test_a_token_is_an_entry_of_its_own(models, peers, tmp_path):
    path, tensors = numbered(peers, tmp_path)
    entries = [e for e in READ["cloneofsimo"][1](read_tensors(path), modules_of(models)) if e.tail == "token"]
    assert [(e.key, e.module) for e in entries] == [("<s1>", "<s1>")] and torch.equal(entries[0].tensor, tensors["<s1>"])


@pytest.mark.parametrize("missing, message", [
    (["unet:3:down"], "pair 3 of a list without names lacks its down"),
    (["unet:3:down", "unet:3:up"], "pair 3 of a list without names lacks its"),
    (["unet:89:down", "unet:89:up"], r"unet \(its targets are .*GEGLU.*89 pairs without names.* 90 of the unet"),
])
def test_numbered_pairs_that_do_not_fit_are_refused(missing, message, models, peers, tmp_path):
    path, _ = numbered(peers, tmp_path, change=missing)
    with pytest.raises(LoRAFormatError, match=message):
        load_lora_weights(models, path)


def test_pairs_for_a_network_that_is_not_loaded_are_named_and_can_be_skipped(models, peers, tmp_path):
    path, tensors = numbered(peers, tmp_path)
    unet = models["diffusion"]
    with pytest.raises(LoRAFormatError, match="text_encoder:0"):
        load_lora_weights(unet, path, skip="^<")
    report = load_lora_weights(unet, path, skip="^text_encoder:|^<")
    assert report.tensors + len(report.skipped) == len(tensors) and report.modules == {"diffusion": 90}


# ---- lora_wrapper and loralib -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_lora_wrappers_scale_stands_before_the_product(prefix, models, peers, tmp_path):
    content, inside = {}, "transformer_blocks.0"
    layers = {f"input_blocks.1.1.{inside}.attn1.to_q": f"{BLOCK}.attn1.to_q",
              f"input_blocks.1.1.{inside}.ff.net.0.proj": f"{BLOCK}.ff.net.0.proj",
              f"middle_block.1.{inside}.attn2.to_v": f"mid_block.attentions.0.{inside}.attn2.to_v"}
    for i, (ldm, path) in enumerate(layers.items()):
        out, into = peers["unet"].get_submodule(path).weight.shape
        a, b, scale = random(3, into, seed=i), random(out, 3, seed=i + 9), torch.tensor(0.7 + i)
        content |= {f"{prefix}{ldm}.lora_A": a, f"{prefix}{ldm}.lora_B": b, f"{prefix}{ldm}.lora_scale": scale}
        add(peers["unet"], path, scale.double() * b.double() @ a.double())
    first, second = random(3, 32, 1, 1), random(32, 3, 1, 1, seed=1)  # a soft wrapper: A(B(x))
    soft = f"{prefix}input_blocks.1.1.proj_in"
    content |= {f"{soft}.lora_B.weight": first, f"{soft}.lora_A.weight": second, f"{soft}.lora_scale": torch.tensor(0.5)}
    add(peers["unet"], f"{FIRST}.proj_in", 0.5 * second.double().flatten(1) @ first.double().flatten(1))
    report = check_models(models, peers, saved(tmp_path, content, "lora.ckpt"), 12)
    assert report.format == "lora_wrapper"


def test_a_soft_wrapper_of_two_wide_kernels_is_refused(models, tmp_path):
    name = "input_blocks.1.0.in_layers.2"
    content = {f"{name}.lora_B.weight": random(2, 32, 3, 3), f"{name}.lora_A.weight": random(32, 2, 3, 3),
               f"{name}.lora_scale": torch.tensor(1.0)}
    with pytest.raises(LoRAFormatError, match="soft wrapper, two convolutions one after the other, the second of 3x3"):
        load_lora_weights(models, saved(tmp_path, content))


def test_a_checkpoint_with_a_lora_in_it_is_no_lora_file():
    content = {"a.lora_A": random(2, 4), "a.lora_B": random(4, 2), "a.lora_scale": torch.tensor(1.0)}
    assert READ["lora_wrapper"][0](TensorFile("lora.ckpt", content))
    whole = TensorFile("model.ckpt", content | {"a.base_layer.weight": random(4, 4)})
    assert not any(detect(whole) for detect, _ in READ.values())


def merged_linear(a, b, n):
    """loralib's MergedLinear.merge_AB: a grouped convolution."""
    return F.conv1d(a.double()[None], b.double()[..., None], groups=n)[0]


def test_loralibs_merged_linear_on_a_fused_layer_gives_each_part_its_own_rows(tmp_path):
    name, a, b = ATTN.format(0) + ".to_qkv", random(6, 16), random(48, 2, seed=1)
    path = saved(tmp_path, {f"{name}.lora_A": a, f"{name}.lora_B": b})
    report = check_model(DiT(fused=True, narrow=16), path, {name: merged_linear(a, b, 3)}, 2)
    assert report.format == "loralib" and report.ranks == [6]


def test_loralibs_merged_linear_on_separate_layers_is_three_pairs(models, peers, tmp_path):
    a, b = random(6, 32), random(96, 2, seed=1)
    name = "text_model.encoder.layers.0.self_attn.in_proj"
    for x, delta in zip("qkv", merged_linear(a, b, 3).chunk(3)):
        add(peers["text_encoder"], f"{LAYER}.self_attn.{x}_proj", delta)
    check_models(models, peers, saved(tmp_path, {f"{name}.lora_A": a, f"{name}.lora_B": b}), 2)


def test_loralibs_linear_layers_and_convolutions_change_by_its_formula(tmp_path):
    model, r, content, deltas = Convolutions(), 2, {}, {}
    for i, (name, k) in enumerate({"plain": 3, "line": 1, "linear": 1}.items()):
        out, into = model.get_submodule(name).weight.shape[:2]
        a, b = random(r * k, into * k, seed=i), random(out * k, r * k, seed=i + 9)
        content |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        deltas[name] = (b.double() @ a.double()).view(model.get_submodule(name).weight.shape)
    report = check_model(model, saved(tmp_path, content), deltas, 6, PIXELS)
    assert report.ranks == [2] and {n: layer.adapter("default").kind for n, layer in lora_layers(model).items()} == {
        "plain": "full", "line": "lora", "linear": "lora"}


def test_a_merged_linear_with_parts_switched_off_is_refused(tmp_path):
    name = ATTN.format(0) + ".to_qkv"
    content = {f"{name}.lora_A": random(4, 16), f"{name}.lora_B": random(32, 2)}
    with pytest.raises(LoRAFormatError, match=r"A \[4, 16\] and B \[32, 2\] are 2 parts of a fused layer, which has 48 rows"):
        load_lora_weights(DiT(fused=True, narrow=16), saved(tmp_path, content))


# ---- errors that all of them share --------------------------------------------------------------------------------------

FORK_PAIR = {"conv.lora_A": random(16, 2), "conv.lora_B": random(2, 16)}
OUT = f"model/model/{ATTN.format(0).replace('.', '/')}/to_out"


@pytest.mark.parametrize("content, message", [
    ({f"{OUT}/lora_down.weight": random(2, 12), f"{OUT}/lora_up.weight": random(16, 2)},
     r"to_out: its down \[2, 12\] and up \[16, 2\] do not fit .*weight \[16, 16\], which wants \[R, 16\] and \[16, R\]"),
    ({f"{OUT}/lora_down.weight": random(2, 16)}, "half a pair: lora_down.weight without its up"),
    ({f"{OUT}/lora_down.weight": random(2, 16), f"{OUT}/lora_up.weight": torch.full((16, 2), torch.nan)}, "not finite"),
    (loraw_file(**{"decoder.nowhere": (4, 4)}), r"unknown to this model, first: 'model\.model\.decoder\.nowhere'"),
    (loraw_file(**{"decoder.self_attn.to_out": (4, 4)}), r"unknown to this model, first: 'model\.model\.decoder\.self_attn"),
    (loraw_file(**{f"{ATTN.format(0)}.to_qkv": (40, 16)}), r"up \[40, 3\] do not fit the layer's weight \[32, 16\]"),
    (loraw_file(**{f"{ATTN.format(0)}.to_qkv": (32, 16)}) | {f"{OUT[:-3]}qkv/dora_mag.weight": random(40, 1)},
     r"its magnitude has 40 values, its layers .*to_q and .*to_k and .*to_v have 32 rows"),
    ({"conv.x.module.A": random(3, 16, 2), "conv.x.module.B": random(3, 2, 12)},
     r"conv: its A \[3, 16, 2\] and B \[3, 2, 12\] do not fit .*\[16, 16, 3\]"),
    ({"conv.x.module.A": torch.tensor(1.0), "conv.x.module.B": random(3, 2, 12)}, r"conv: its down \[3, 2, 12\] and up \[\]"),
    ({"conv.lora_A": random(4, 16), "conv.lora_B": random(16, 0)}, r"conv: its down \[4, 16\] and up \[16, 0\] do not fit"),
    ({"conv.lora_A": random(4, 16), "conv.lora_B": random(16, 4)}, r"conv: its down \[4, 16\] and up \[16, 4\] do not fit"),
    (FORK_PAIR | {"conv.rank": 3}, r"conv\.rank is 3, but its down and up are"),
    (FORK_PAIR | {"conv.alpha": "big"}, r"conv\.alpha is 'big'; a finite number"),
    (FORK_PAIR | {"conv.alpha": float("inf")}, r"conv\.alpha is inf; a finite number"),
    (FORK_PAIR | {"conv.alpha": torch.ones(2, 1)}, r"conv\.alpha has shape \[2, 1\]; one number is expected"),
])
def test_a_file_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(content, message, tmp_path):
    model = DiT()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LoRAFormatError, match=message) as refused:
        load_lora_weights(model, saved(tmp_path, content))
    assert str(refused.value).startswith("lora.pt: ")
    assert not lora_layers(model) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
