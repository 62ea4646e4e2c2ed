"""LoRA files of diffusers, PEFT and LyCORIS read here, and ours read there, on the same random weights."""

import copy
import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from sd.checkpoints.names import model_names
from sd.config import TINY
from sd.lora import attach_state, modules_of, remove_lora
from sd.lora_files.header import lora_metadata
from sd.lora_files.read import read_lora
from sd.lora_files.write import FORMATS, refusals, write_lora
from sd.model_loader import Models, load_lora_into_models
from sd.tools.convert import convert
from tests.lora_files import cases
from tests.lora_files.cases import ATTN, CONV, DOWN, NORM, PROJ, TEXT, close, magnitude, random
from tests.peers import ours_and_peers

MID = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
SMALL = replace(TINY, clip=replace(TINY.clip, vocab_size=300))  # a vocabulary that is quick to copy


@pytest.fixture(scope="module")
def base():
    return ours_and_peers(SMALL)


@pytest.fixture
def models(base):
    models = Models(base[0], SMALL)
    yield models
    remove_lora(models)


@pytest.fixture
def peers(base):
    return fresh(base)


def fresh(base):
    return base[1] | {name: copy.deepcopy(base[1][name]) for name in ("unet", "text_encoder")}


@pytest.fixture(scope="module")
def modules(base):
    return modules_of(base[0])


def pipeline(peers):
    return StableDiffusionPipeline(
        vae=peers["vae"], text_encoder=peers["text_encoder"], unet=peers["unet"], tokenizer=None, safety_checker=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), feature_extractor=None, requires_safety_checker=False)


def outputs(unet, clip):
    """The text encoder's and the UNet's output, the latter on a context of its own: neither hides what the other does."""
    g = torch.Generator().manual_seed(0)
    tokens, latents = torch.randint(0, 300, (2, 77), generator=g), torch.randn(2, 4, 8, 8, generator=g)
    context = torch.randn(2, 77, 32, generator=g)
    with torch.no_grad():
        text, out = clip(tokens), unet(latents, torch.tensor([3, 700]), context)
    return text if isinstance(text, torch.Tensor) else text[0], out if isinstance(out, torch.Tensor) else out.sample


def ours_of(models):
    return outputs(models["diffusion"], models["clip"])


def theirs_of(peers):
    return outputs(peers["unet"], peers["text_encoder"])


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def changed(now, before):
    """(text encoder, UNet): whether its output moved by more than 0.2 %."""
    return tuple(bool((a - b).abs().max() > 0.002 * b.abs().max()) for a, b in zip(now, before))


def fill(parameters, scale=0.2, seed=1):
    """What training would do to the parameters."""
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data += torch.randn(p.shape, generator=g) * scale * (p.abs().mean() or 1 / max(p.shape, default=1) ** 0.5)


# ---- what diffusers and PEFT write -----------------------------------------------------------------------------------

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS = {
    "alpha that is not the rank": dict(r=4, lora_alpha=7, target_modules=ATTENTION),
    "ranks and alphas by pattern": dict(r=4, lora_alpha=7, target_modules=ATTENTION, rank_pattern={"attn2.to_k": 2},
                                        alpha_pattern={r"mid_block.*to_q": 0.5, "attn2.to_k": 3}),
    "rank-stabilised": dict(r=4, lora_alpha=7, target_modules=ATTENTION, rank_pattern={"attn2.to_k": 2}, use_rslora=True),
    "DoRA": dict(r=4, lora_alpha=7, target_modules=[*ATTENTION, "conv1", "proj_in"], use_dora=True),
    "convolutions": dict(r=4, lora_alpha=7, target_modules=["conv1", "proj_in", "conv_shortcut", "conv", "conv_in",
                                                            "time_emb_proj", "linear_1", "ff.net.0.proj"]),
    "biases": dict(r=4, lora_alpha=8, target_modules=["conv1", "proj_in", "to_out.0"], lora_bias=True),
}
TEXT_TARGETS = ["q_proj", "out_proj", "fc1"]


def text_config(config):
    kept = {k: v for k, v in config.items() if k not in ("rank_pattern", "alpha_pattern")}
    return kept | dict(r=3, lora_alpha=0.7, target_modules=TEXT_TARGETS, rank_pattern={"1.self_attn.q_proj": 2})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_diffusers_changes_our_networks_as_it_changes_theirs(models, peers, tmp_path, name):
    bare, parts = theirs_of(peers), {}
    for part, config in (("unet", CONFIGS[name]), ("text_encoder", text_config(CONFIGS[name]))):
        peers[part].add_adapter(LoraConfig(**config))
        fill(p for n, p in peers[part].named_parameters() if "lora_" in n)
        parts[f"{part}_lora_layers"] = get_peft_model_state_dict(peers[part], adapter_name="default")
        parts[f"{part}_lora_adapter_metadata"] = peers[part].peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, **parts)
    theirs = theirs_of(peers)
    assert changed(theirs, bare) == (True, True)
    load_lora_into_models(models, tmp_path / "pytorch_lora_weights.safetensors", "x")
    assert close(ours_of(models), theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft_changes_our_networks_as_it_changes_theirs(models, peers, tmp_path, name):
    for part, config in (("unet", CONFIGS[name]), ("text_encoder", text_config(CONFIGS[name]))):
        wrapped = PeftModel(peers[part], LoraConfig(**config))
        fill(p for n, p in wrapped.named_parameters() if "lora_" in n)
        wrapped.save_pretrained(tmp_path / "both" / part)
    theirs = theirs_of(peers)
    load_lora_into_models(models, tmp_path / "both", "x")
    assert close(ours_of(models), theirs)
    load_lora_into_models(models, tmp_path / "both" / "text_encoder", "x")  # one network's folder on its own
    assert close(ours_of(models)[:1], theirs[:1]) and not close(ours_of(models)[1:], theirs[1:])


def test_peft_on_embeddings_is_read(models, peers, tmp_path):
    wrapped = PeftModel(peers["text_encoder"], LoraConfig(r=3, lora_alpha=0.7, target_modules=["token_embedding", "q_proj"]))
    fill(p for n, p in wrapped.named_parameters() if "lora_" in n)
    wrapped.save_pretrained(tmp_path)
    load_lora_into_models(models, tmp_path, "x")
    assert close(ours_of(models), theirs_of(peers))


OLDER = {
    "training scripts": lambda key: key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."),
    "attention processors": lambda key: (key.replace(".to_out.0.", ".to_out.") if "unet." in key else key)
    .replace(".attn1.", ".attn1.processor.").replace(".attn2.", ".attn2.processor.").replace("_proj.", "_.")
    .replace("self_attn.", "self_attn.to_").replace("_.lora", ".lora")
    .replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up."),
    "linear layers": lambda key: key if key.startswith("unet.") else
    key.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up."),
    "no text_model": lambda key: key.replace("text_model.", ""),
    "no prefix": lambda key: key.removeprefix("unet.").replace("text_encoder.text_model", "text_model"),
}


@pytest.mark.parametrize("spelling", OLDER)
def test_older_spellings_of_diffusers_mean_the_same(models, peers, tmp_path, spelling):
    tensors = {}
    for part, targets in (("unet", ATTENTION), ("text_encoder", ["q_proj", "k_proj", "v_proj", "out_proj"])):
        peers[part].add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))  # no alpha in these: the scale is 1
        fill(p for n, p in peers[part].named_parameters() if "lora_" in n)
        prefix = "unet." if part == "unet" else "text_encoder.text_model."
        tensors |= {prefix + k: v for k, v in get_peft_model_state_dict(peers[part], adapter_name="default").items()}
    spelled = {OLDER[spelling](key): tensor for key, tensor in tensors.items()}
    assert len(spelled) == len(tensors) and spelled.keys() != tensors.keys()
    safetensors.torch.save_file({k: v.contiguous() for k, v in spelled.items()}, tmp_path / "x.safetensors")
    load_lora_into_models(models, tmp_path / "x.safetensors", "x")
    assert close(ours_of(models), theirs_of(peers))


# ---- what LyCORIS writes ---------------------------------------------------------------------------------------------

LYCORIS = {
    "lora": {}, "Tucker LoRA": dict(use_tucker=True), "LoRA with a scalar": dict(use_scalar=True),
    "loha": dict(algo="loha"), "Tucker LoHa": dict(algo="loha", use_tucker=True),
    "lokr": dict(algo="lokr"), "Tucker LoKr": dict(algo="lokr", use_tucker=True, factor=4),
    "LoKr of full factors": dict(algo="lokr", full_matrix=True),
    "LoKr, both decomposed": dict(algo="lokr", decompose_both=True),
    "DoRA": dict(dora_wd=True), "LoHa with DoRA": dict(algo="loha", dora_wd=True),
    "LoKr with DoRA": dict(algo="lokr", dora_wd=True),
    "OFT": dict(algo="diag-oft"), "OFT with a constraint": dict(algo="diag-oft", constraint=0.001),
    "OFT with rescale": dict(algo="diag-oft", rescaled=True), "BOFT": dict(algo="boft"),
    "full": dict(algo="full"), "IA3": dict(algo="ia3"), "GLoRA": dict(algo="glora"), "norms": dict(train_norm=True),
}
LYCORIS_FOLDERS = {"unet": ("lora_unet", [ATTN, MID, PROJ, CONV, DOWN, NORM]), "text_encoder": ("lora_te", TEXT)}


def lycoris_network(module, folder, prefix, targets, **arguments):
    preset = folder / "preset.toml"  # create_lycoris takes the names of the targets from a file only
    preset.write_text(f'target_module = []\nlora_prefix = "{prefix}"\ntarget_name = {json.dumps(targets)}\n')
    return create_lycoris(module, 1.0, linear_dim=4, linear_alpha=2.6, preset=str(preset), **arguments)


def lycoris_files(peers, folder, **arguments):
    """One file of each network, as LyCORIS saves them; it stays applied to the peers."""
    paths = []
    for part, (prefix, targets) in LYCORIS_FOLDERS.items():
        network = lycoris_network(peers[part], folder, prefix, targets, **arguments)
        network.apply_to()
        fill(network.parameters())
        paths.append(folder / f"{part}.safetensors")
        network.save_weights(str(paths[-1]), None, {"ss_network_module": "lycoris.kohya"})
    return paths


@pytest.mark.parametrize("name", LYCORIS)
def test_a_file_of_lycoris_changes_our_networks_as_it_changes_theirs(models, peers, tmp_path, name):
    bare = theirs_of(peers)
    for path in lycoris_files(peers, tmp_path, **LYCORIS[name]):
        load_lora_into_models(models, path)
    theirs = theirs_of(peers)
    assert changed(theirs, bare) == (True, True)
    assert close(ours_of(models), theirs)


# ---- what we write ---------------------------------------------------------------------------------------------------

UNET = {name.diffusers: name.path for name in model_names(SMALL) if name.component == "diffusion"}
CLIP = {name.diffusers.removeprefix("text_model."): name.path for name in model_names(SMALL) if name.component == "clip"}


def low_rank(modules, path, rank, alpha, *, dora=False, bias=False, tucker=False):
    shape, seed, more = modules.shapes[path], sum(map(ord, path)), {}
    embedding = path.endswith("_embedding") and path.startswith("clip")
    if dora:
        more["magnitude"] = magnitude(*((1, shape[1]) if embedding else (shape[0], *(1,) * (len(shape) - 1))), seed=seed)
    if bias:
        more["diff_b"] = random(shape[0], seed=seed, scale=0.3)
    return cases.low_rank(shape, rank, alpha, seed=seed, scale=0.1 if embedding else 0.3, embedding=embedding, tucker=tucker,
                          **more)


def states(modules, **more):
    """Ranks and alphas that differ from module to module."""
    layers = {ATTN: (4, 7.0), MID: (2, 0.7), PROJ: (4, 7.0), CONV: (3, 1.3), DOWN: (4, 2.0), "conv_in": (2, 7.0)}
    state = {UNET[name]: low_rank(modules, UNET[name], *numbers, **more) for name, numbers in layers.items()}
    return state | {CLIP[name]: low_rank(modules, CLIP[name], *numbers, **more)
                    for name, numbers in zip(TEXT, ((3, 5.0), (2, 1.1)))}


def wide(modules, names, rank, alpha, **more):
    return {path: low_rank(modules, path, rank, alpha, **more) for path in names}


STATES = {
    "LoRA": states,
    "DoRA": lambda modules: states(modules, dora=True),
    "DoRA in the UNet alone": lambda modules: states(modules) | {
        path: low_rank(modules, path, 4, 1.5, dora=True) for path in map(UNET.get, (ATTN, MID, PROJ, CONV, DOWN, "conv_in"))},
    "biases": lambda modules: wide(modules, [UNET[PROJ], UNET[CONV], CLIP[TEXT[0]]], 4, 8.0, bias=True),
    "only feed-forward layers of the text encoder": lambda modules: wide(modules, [CLIP["encoder.layers.0.mlp.fc2"]], 3, 0.5),
    "embeddings": lambda modules: states(modules) | wide(modules, ["clip.token_embedding", "clip.position_embedding"], 3, 0.5),
    "DoRA of embeddings": lambda modules: wide(modules, ["clip.token_embedding", CLIP[TEXT[0]]], 3, 0.5, dora=True),
}
TUCKER = {"Tucker": lambda modules: states(modules) | wide(modules, [UNET[CONV], UNET[DOWN]], 3, 1.3, tucker=True)}


def with_state(models, state):
    attach_state(models, state, "x")
    return ours_of(models)


@pytest.mark.parametrize("name", {**STATES, **TUCKER})
def test_diffusers_loads_our_file_with_the_same_output(models, peers, modules, tmp_path, name):
    state = (STATES | TUCKER)[name](modules)
    write_lora(tmp_path / "x.safetensors", state, modules, format="diffusers")
    pipe = pipeline(peers)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    assert adapted(peers) == {path for path in state}
    assert close(theirs_of(peers), with_state(models, state))


@pytest.mark.parametrize("name", {**STATES, **TUCKER})
def test_peft_loads_our_folder_with_the_same_output(models, peers, modules, tmp_path, name):
    state = (STATES | TUCKER)[name](modules)
    write_lora(tmp_path / "x", state, modules, format="peft")
    for part in (tmp_path / "x").iterdir():
        PeftModel.from_pretrained(peers[part.name], part)
    assert adapted(peers) == {path for path in state}
    assert close(theirs_of(peers), with_state(models, state))


def adapted(peers):
    """Our paths of the modules on which PEFT put a LoRA: no pattern may match more than its own."""
    return {table[name.removeprefix("text_model.")] for part, table in (("unet", UNET), ("text_encoder", CLIP))
            for name, module in peers[part].named_modules() if isinstance(module, BaseTunerLayer)}


def lycoris_state(peers, modules, folder, **arguments):
    paths = lycoris_files(peers, folder, **arguments)
    return {path: weights for file in paths for path, weights in read_lora(file, modules).state.items()}


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_loads_our_file_with_the_same_output(models, base, peers, modules, tmp_path, name):
    state = lycoris_state(fresh(base), modules, tmp_path, **LYCORIS[name])
    write_lora(tmp_path / "x.safetensors", state, modules)
    for part, (_, targets) in LYCORIS_FOLDERS.items():
        prefix = "lora_unet" if part == "unet" else "lora_te_text_model"
        if name in ("IA3", "Tucker LoKr"):  # LyCORIS 4.1.3 fails to make these from its own files, but fills those it has
            network = lycoris_network(peers[part], tmp_path, prefix, targets, **LYCORIS[name])
            assert "missing keys" not in network.load_weights(str(tmp_path / "x.safetensors"))
        else:
            LycorisNetwork.apply_preset({"lora_prefix": prefix})
            network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), peers[part])
        network.apply_to()
    assert close(theirs_of(peers), with_state(models, state))


# ---- from one format to another --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def every_state(base, modules, tmp_path_factory):
    """Every kind of weights, by name."""
    folder = tmp_path_factory.mktemp("states")
    found = {name: make(modules) for name, make in (STATES | TUCKER).items()}
    return found | {f"LyCORIS {name}": lycoris_state(fresh(base), modules, folder, **arguments)
                    for name, arguments in LYCORIS.items()}


def able(state, modules):
    """The formats that hold it; a Tucker core is none that diffusers and PEFT could give back."""
    tucker = any("mid" in weights.tensors for weights in state.values())
    return [f for f in FORMATS if not refusals(state, modules, f) and not (tucker and f in ("diffusers", "peft"))]


def same(a, b):
    assert a.keys() == b.keys()
    for path, weights in a.items():
        other = b[path]
        assert (weights.kind, weights.alpha, weights.tensors.keys()) == (other.kind, other.alpha, other.tensors.keys()), path
        for name, tensor in weights.tensors.items():
            assert tensor.dtype == other.tensors[name].dtype and torch.equal(tensor, other.tensors[name]), (path, name)
    return True


def name_of(format):
    return "x" if format == "peft" else "x.safetensors"


@pytest.mark.parametrize("name", [*STATES, *TUCKER, *(f"LyCORIS {name}" for name in LYCORIS)])
def test_a_lora_is_the_same_in_every_format_and_after_every_pair_of_conversions(models, modules, every_state, tmp_path, name):
    state = every_state[name]
    wanted, formats = with_state(models, state), able(state, modules)
    assert "kohya" in formats
    header = {"ss_training_comment": "ours", "modelspec.title": "a title", "anything": "else", "ss_steps": "12"}
    header |= {key: value for key, value in lora_metadata(state, SMALL).items() if key == "sdlora.config"}
    for first in formats:
        one = tmp_path / first / name_of(first)
        one.parent.mkdir()
        write_lora(one, state, modules, format=first, metadata=header)
        read = read_lora(one, modules)
        assert same(read.state, state) and header.items() <= read.metadata.items() and read.skipped == []
        assert equal(with_state(models, read.state), wanted)
        for second in formats:
            there, back = tmp_path / first / second / name_of(second), tmp_path / first / second / "back" / name_of(first)
            back.parent.mkdir(parents=True)
            convert(one, there, format=second)
            convert(there, back, format=first)
            again = read_lora(back, modules)
            assert same(again.state, state) and again.metadata == read.metadata
            assert same_files(one, back)


def same_files(one, other):
    """Tensors and header of a file, or of a PEFT folder's files."""
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file()) if one.is_dir() else [""]
    assert not one.is_dir() or files == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
