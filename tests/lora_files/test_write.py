"""Writers of LoRA files: how each format spells a LoRA, what it refuses, its header; conversion from one to another."""

import hashlib
import json
import re
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from sd.adapters.weights import AdapterWeights, LoRAFormatError
from sd.config import SD15, TINY
from sd.files.hashes import lora_hash, tensor_bytes_hash
from sd.files.tensor_file import CheckpointError
from sd.lora_files.header import lora_metadata
from sd.lora_files.read import read_lora
from sd.lora_files.write import FORMATS, refusals, write_lora
from sd.model_loader import save_checkpoint
from sd.tools.convert import convert
from tests.lora_files.cases import low_rank, magnitude, random

ATTN = "diffusion.down_blocks.0.attentions.0.transformer_blocks.0.attn1.out_proj"
PROJ = "diffusion.down_blocks.1.attentions.0.proj_in"  # a 1x1 convolution
CONV = "diffusion.up_blocks.1.resnets.0.conv1"
NORM = "diffusion.mid_block.attentions.0.norm"
TEXT = "clip.layers.1.attention.q_proj"
TOKENS = "clip.token_embedding"
VAE = "decoder.conv_in"


LORA = {ATTN: low_rank((32, 32)), CONV: low_rank((64, 128, 3, 3), 5, 0.7), TEXT: low_rank((32, 32), 2, 7.0)}
LOHA = AdapterWeights("loha", {"w1_a": random(32, 3), "w1_b": random(3, 32), "w2_a": random(32, 3, seed=1),
                               "w2_b": random(3, 32, seed=1)}, 1.5)
OFT = AdapterWeights("oft", {"blocks": random(8, 4, 4) * 0.1}, 0.0)
IA3 = AdapterWeights("ia3", {"weight": random(32, 1), "on_input": torch.tensor(False)})
NORM_DIFF = AdapterWeights("full", {"diff": random(64), "diff_b": random(64, seed=1)})


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---- spelling --------------------------------------------------------------------------------------------------------

OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
KOHYA = "lora_unet_" + OUT.replace(".", "_")
COMFY = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"
KEYS = {  # on TINY: one resnet a block, so output block 2 is the first of up_blocks.1
    "kohya": [f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", f"{KOHYA}.alpha",
              "lora_unet_up_blocks_1_resnets_0_conv1.lora_down.weight", "lora_unet_up_blocks_1_resnets_0_conv1.alpha",
              "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight"],
    "diffusers": [f"unet.{OUT}.lora_A.weight", f"unet.{OUT}.lora_B.weight", "unet.up_blocks.1.resnets.0.conv1.lora_A.weight",
                  "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight"],
    "comfyui": [f"{COMFY}.lora_down.weight", f"{COMFY}.lora_up.weight", f"{COMFY}.alpha",
                "diffusion_model.output_blocks.2.0.in_layers.2.lora_down.weight",
                "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj.lora_up.weight"],
}


@pytest.mark.parametrize("format", KEYS)
def test_a_file_has_the_names_of_its_format(modules, tmp_path, format):
    write_lora(tmp_path / "x.safetensors", LORA, modules, format=format)
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert not set(KEYS[format]) - tensors.keys()
    assert len(tensors) == (6 if format == "diffusers" else 9)
    assert all(re.search(r"alpha$|lora_(down|up)\.weight$|lora_[AB]\.weight$", key) for key in tensors)
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")}
    assert alphas == (set() if format == "diffusers" else {1.5, 0.7, 7.0})


def test_a_peft_folder_has_one_adapter_for_each_network(modules, tmp_path):
    write_lora(tmp_path / "x", LORA, modules, format="peft")
    assert sorted(str(p.relative_to(tmp_path / "x")) for p in (tmp_path / "x").rglob("*.*")) == [
        f"{part}/adapter_{file}" for part in ("text_encoder", "unet") for file in ("config.json", "model.safetensors")]
    unet, text = (safetensors.torch.load_file(tmp_path / "x" / part / "adapter_model.safetensors")
                  for part in ("unet", "text_encoder"))
    assert unet.keys() == {f"base_model.model.{name}.lora_{x}.weight" for name in (OUT, "up_blocks.1.resnets.0.conv1")
                           for x in "AB"}
    assert text.keys() == {f"base_model.model.encoder.layers.1.self_attn.q_proj.lora_{x}.weight" for x in "AB"}
    write_lora(tmp_path / "one", {TEXT: LORA[TEXT]}, modules, format="peft")
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["text_encoder"]


def peft_configs(modules, folder, state):
    """The same from both formats that have it."""
    write_lora(folder / "x.safetensors", state, modules, format="diffusers")
    write_lora(folder / "x", state, modules, format="peft")
    flat, found = json.loads(header_of(folder / "x.safetensors")["lora_adapter_metadata"]), {}
    for part in ("unet", "text_encoder"):
        fields = {key.removeprefix(part + "."): value for key, value in flat.items() if key.startswith(part + ".")}
        if fields:
            found[part] = json.loads((folder / "x" / part / "adapter_config.json").read_text())
            assert fields.items() <= found[part].items() and found[part]["peft_type"] == "LORA"
    return found


def test_the_config_gives_each_module_its_rank_and_alpha(modules, tmp_path):
    state = LORA | {PROJ: low_rank((64, 64, 1, 1)), "clip.layers.0.mlp.fc1": low_rank((64, 32), 2, 0.1)}
    config = peft_configs(modules, tmp_path, state)
    conv = "up_blocks.1.resnets.0.conv1"
    assert (config["unet"]["r"], config["unet"]["lora_alpha"]) == (3, 1.5)
    assert config["unet"]["rank_pattern"] == {"^" + re.escape(conv): 5}
    assert config["unet"]["alpha_pattern"] == {"^" + re.escape(conv): 0.7}
    assert config["unet"]["target_modules"] == sorted([OUT, conv, "down_blocks.1.attentions.0.proj_in"])
    assert config["text_encoder"]["r"] == 2 and len(config["text_encoder"]["alpha_pattern"]) == 1
    assert config["unet"]["use_dora"] is False and "lora_bias" not in config["unet"]


def test_no_pattern_matches_a_second_module(modules, tmp_path):
    state = {path: low_rank(modules.shapes[path], rank=2 + i % 7, alpha=0.5 + i)
             for i, path in enumerate(p for p in modules.shapes if len(modules.shapes[p]) > 1)
             if path.startswith(("diffusion.", "clip.layers"))}
    for part, config in peft_configs(modules, tmp_path, state).items():
        names = {n.diffusers for n in modules.names if n.component == {"unet": "diffusion", "text_encoder": "clip"}[part]}
        for every in (names, {name.removeprefix("text_model.") for name in names}):  # transformers before and since 5.6
            for patterns in (config["rank_pattern"], config["alpha_pattern"]):
                assert len(patterns) >= 10
                for pattern in patterns:  # as PEFT matches them
                    assert sum(bool(re.match(rf"(.*\.)?({pattern})$", name)) for name in every) == 1


def test_a_1x1_convolution_given_as_matrices_gets_peft_s_four_dimensions(modules, tmp_path):
    write_lora(tmp_path / "x", {PROJ: low_rank((64, 64), magnitude=magnitude(64, 1))}, modules, format="peft")
    tensors = safetensors.torch.load_file(tmp_path / "x" / "unet" / "adapter_model.safetensors")
    name = "base_model.model.down_blocks.1.attentions.0.proj_in."
    assert {key.removeprefix(name): tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "lora_A.weight": (3, 64, 1, 1), "lora_B.weight": (64, 3, 1, 1), "lora_magnitude_vector": (1, 64, 1, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_a_tucker_core_is_multiplied_in_without_loss(modules, tmp_path, format, dtype):
    down, mid, up = random(5, 128, 1, 1).to(dtype), random(5, 5, 3, 3).to(dtype), random(64, 5, 1, 1).to(dtype)
    weights = AdapterWeights("lora", {"down": down, "up": up, "mid": mid}, 0.7)
    write_lora(tmp_path / "x", {CONV: weights}, modules, format=format)
    found = read_lora(tmp_path / "x", modules).state[CONV]
    wanted = torch.einsum("nmkl,in,mj->ijkl", mid.double(), up.double().flatten(1), down.double().flatten(1))
    given = (found.tensors["up"].double().flatten(1) @ found.tensors["down"].double().flatten(1)).reshape(wanted.shape)
    assert (given - wanted).norm() <= 1e-7 * wanted.norm() and found.alpha == 0.7 and found.rank == 5


def test_modules_without_a_name_keep_their_path_in_kohya_s_format(modules, tmp_path):
    write_lora(tmp_path / "x.safetensors", {VAE: low_rank((32, 4, 3, 3))}, modules)
    assert safetensors.torch.load_file(tmp_path / "x.safetensors").keys() == {
        "decoder.conv_in.lora_down.weight", "decoder.conv_in.lora_up.weight", "decoder.conv_in.alpha"}


# ---- dtypes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_values_are_rounded_to_the_dtype_and_alpha_is_not(modules, tmp_path, format, dtype):
    write_lora(tmp_path / "x", LORA, modules, format=format, dtype=dtype)
    found = read_lora(tmp_path / "x", modules).state
    for path, weights in LORA.items():
        assert found[path].alpha == weights.alpha
        assert all(torch.equal(found[path].tensors[name], tensor.to(dtype)) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize("format", FORMATS)
def test_a_value_that_overflows_the_dtype_is_named_and_nothing_is_written(modules, tmp_path, format):
    state = {ATTN: LORA[ATTN], TEXT: low_rank((32, 32))}
    state[TEXT].tensors["up"][3, 1] = 70000.0
    with pytest.raises(LoRAFormatError, match=rf"{re.escape(TEXT)}: (up|lora_B\.weight) holds values .* not finite in float16"):
        write_lora(tmp_path / "x", state, modules, format=format, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


# ---- what a format cannot hold ---------------------------------------------------------------------------------------

PAIR = {ATTN: low_rank((32, 32)), PROJ: low_rank((64, 64, 1, 1), 4, 8.0)}
DORA = {ATTN: low_rank((32, 32), magnitude=magnitude(32, 1))}
REFUSED = {
    "LoHa": ({**PAIR, TEXT: LOHA}, {"diffusers", "peft"}, f"1 of 3 modules, first: {TEXT}, kind 'loha'; kohya and comfyui can"),
    "OFT": ({ATTN: OFT}, {"diffusers", "peft"}, "kind 'oft'; kohya and comfyui can, or approximate it"),
    "IA3": ({ATTN: IA3}, {"diffusers", "peft", "comfyui"}, "kind 'ia3'; kohya can, or approximate it"),
    "old OFT": ({ATTN: AdapterWeights("oft", {"rotation": torch.eye(4).repeat(8, 1, 1)})},
                {"diffusers", "peft", "comfyui"}, "kind 'oft'"),
    "a norm": ({**PAIR, NORM: NORM_DIFF}, {"diffusers", "peft"},
               f"1 of 3 modules, first: {NORM}, kind 'full'; kohya and comfyui can$"),
    "the VAE": ({**PAIR, VAE: low_rank((32, 4, 3, 3))}, {"diffusers", "peft", "comfyui"},
                f"first: {VAE}, a module for which it has no name; kohya can$"),
    "DoRA on the input axis": ({ATTN: low_rank((32, 32), magnitude=magnitude(1, 32))}, {"diffusers", "peft"},
                               "kind 'lora' with a magnitude on the input axis; kohya and comfyui can"),
    "DoRA on some modules of a network": (DORA | {PROJ: PAIR[PROJ]}, {"diffusers", "peft"},
                                          f"1 of 2 modules, first: {ATTN}, kind 'lora' with a magnitude, which other modules "
                                          f"of the network lack; kohya and comfyui can, or approximate it"),
    "a bias on some modules": ({ATTN: PAIR[ATTN], PROJ: low_rank((64, 64, 1, 1), 4, 8.0, diff_b=random(64))},
                               {"diffusers", "peft"}, f"first: {PROJ}, kind 'lora' with a bias change .* not all"),
    "a bias that does not divide": ({PROJ: low_rank((64, 64, 1, 1), 3, 1.1, diff_b=random(64))}, {"diffusers", "peft"},
                                    "with a bias change .* alpha / rank does not divide exactly"),
    "an embedding": ({TOKENS: low_rank((49408, 32), 3, 1.0, embedding=True)}, {"comfyui"},
                     "a low rank of an embedding"),
    "a difference with a magnitude": ({ATTN: AdapterWeights("full", {"diff": random(32, 32), "magnitude": magnitude(32, 1)})},
                                      {"diffusers", "peft", "comfyui"}, "kind 'full'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_hold_is_named_and_nothing_is_written(modules, tmp_path, name):
    state, unable, sentence = REFUSED[name]
    assert {format for format in FORMATS if refusals(state, modules, format)} == unable
    for format in FORMATS:
        if format not in unable:
            write_lora(tmp_path / format, state, modules, format=format)
            assert read_lora(tmp_path / format, modules).state.keys() == state.keys()
            continue
        with pytest.raises(LoRAFormatError, match=sentence) as error:
            write_lora(tmp_path / format, state, modules, format=format)
        assert str(error.value).startswith(f"{format} cannot hold") and "\n" not in str(error.value)
        assert not (tmp_path / format).exists()


def test_an_unknown_format_and_a_file_without_a_header_are_refused(modules, tmp_path):
    with pytest.raises(LoRAFormatError, match="format 'a1111' cannot be written; allowed: kohya, diffusers, peft, comfyui"):
        write_lora(tmp_path / "x", LORA, modules, format="a1111")
    with pytest.raises(LoRAFormatError, match="keeps alpha in the metadata"):
        write_lora(tmp_path / "x.pt", LORA, modules, format="diffusers")
    with pytest.warns(UserWarning, match="holds no metadata"):
        write_lora(tmp_path / "x.pt", LORA, modules, format="comfyui")
    assert read_lora(tmp_path / "x.pt", modules).state[TEXT].alpha == 7.0


# ---- the folder ------------------------------------------------------------------------------------------------------

def test_a_peft_folder_is_complete_or_absent(modules, tmp_path, monkeypatch):
    def fail(file):
        if len(list(tmp_path.rglob("*"))) > 5:  # in the middle of the second network
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_lora(tmp_path / "x", LORA, modules, format="peft")
    assert not list(tmp_path.iterdir())


def test_a_peft_folder_replaces_a_former_one_and_nothing_else(modules, tmp_path):
    write_lora(tmp_path / "x", LORA, modules, format="peft")
    write_lora(tmp_path / "x", {TEXT: LORA[TEXT]}, modules, format="peft")
    assert read_lora(tmp_path / "x", modules).state.keys() == {TEXT} and [p.name for p in tmp_path.iterdir()] == ["x"]
    (tmp_path / "x" / "notes.txt").write_text("precious")
    with pytest.raises(LoRAFormatError, match="a folder with other things in it, such as notes.txt; name a new folder"):
        write_lora(tmp_path / "x", LORA, modules, format="peft")
    with pytest.raises(LoRAFormatError, match="is a file; PEFT's format is a folder"):
        write_lora(tmp_path / "x" / "notes.txt", LORA, modules, format="peft")
    assert (tmp_path / "x" / "notes.txt").read_text() == "precious"


def test_a_failed_replacement_leaves_the_former_folder(modules, tmp_path, monkeypatch):
    write_lora(tmp_path / "x", LORA, modules, format="peft")
    rename, calls = type(tmp_path).rename, []

    def fail_second(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fail_second)
    with pytest.raises(OSError, match="Input/output"):
        write_lora(tmp_path / "x", {TEXT: LORA[TEXT]}, modules, format="peft")
    assert read_lora(tmp_path / "x", modules).state.keys() == LORA.keys() and [p.name for p in tmp_path.iterdir()] == ["x"]


# ---- the header ------------------------------------------------------------------------------------------------------

def test_the_header_says_what_kohya_s_tools_say():
    state = {ATTN: low_rank((32, 32)), TEXT: low_rank((32, 32))}
    header = lora_metadata(state, SD15, {"ss_steps": "12", "modelspec.title": "a line"})
    assert header["ss_network_module"] == "networks.lora" and "ss_network_args" not in header
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("3", "1.5")
    assert (header["ss_base_model_version"], header["ss_v2"]) == ("sd_v1", "False")
    assert {k: v for k, v in header.items() if k.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers", "modelspec.prediction_type": "epsilon", "modelspec.resolution": "512x512",
        "modelspec.title": "a line"}
    assert json.loads(header["sdlora.modules"]) == {ATTN: ["lora", 3, 1.5], TEXT: ["lora", 3, 1.5]}
    assert header["ss_steps"] == "12" and all(isinstance(v, str) for v in header.values())


def test_a_model_of_another_size_is_not_called_sd_1():
    header = lora_metadata(LORA, TINY)
    assert not any("version" in key or key.startswith("modelspec") for key in header)
    assert json.loads(header["sdlora.config"]) == json.loads(json.dumps(TINY.to_dict()))


@pytest.mark.parametrize("state, expected", [
    (LORA, {"ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}),
    ({ATTN: LOHA}, {"ss_network_module": "lycoris.kohya", "ss_network_dim": "3", "ss_network_args": {"algo": "loha"}}),
    ({ATTN: LOHA, NORM: NORM_DIFF}, {"ss_network_args": {"algo": "loha", "train_norm": "True"}}),
    (DORA, {"ss_network_module": "lycoris.kohya", "ss_network_args": {"algo": "locon", "dora_wd": "True"}}),
    ({ATTN: OFT}, {"ss_network_dim": None, "ss_network_alpha": None, "ss_network_args": {"algo": "diag-oft"}}),
    ({NORM: NORM_DIFF}, {"ss_network_args": {"algo": "full", "train_norm": "True"}}),
])
def test_the_header_names_the_algorithm(state, expected):
    header = lora_metadata(state)
    for key, value in expected.items():
        found = header.get(key)
        assert (json.loads(found) if isinstance(value, dict) else found) == value


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_the_hash_in_the_header_is_that_of_the_bytes_behind_it(modules, tmp_path, format, dtype):
    write_lora(tmp_path / "x", LORA, modules, format=format, dtype=dtype, metadata={"sshs_model_hash": "old", "format": "old"})
    files = [tmp_path / "x"] if format != "peft" else list((tmp_path / "x").rglob("*.safetensors"))
    for path in files:
        data = path.read_bytes()
        digest = hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0]:]).hexdigest()
        assert header_of(path)["sshs_model_hash"] == digest and lora_hash(path) == digest[:12]
        assert header_of(path)["format"] == "pt"
        assert tensor_bytes_hash(safetensors.torch.load_file(path)) == digest


def test_the_hash_does_not_depend_on_order_or_memory_layout():
    tensors = {"b": random(3, 4), "a": random(4, 3).T, "c": random(5).half(), "d": torch.tensor(True), "e": torch.empty(0, 3)}
    plain = {key: tensors[key].contiguous() for key in sorted(tensors, reverse=True)}
    assert tensor_bytes_hash(tensors) == tensor_bytes_hash(plain) != tensor_bytes_hash({**plain, "b": plain["b"] + 1})


# ---- conversion ------------------------------------------------------------------------------------------------------

FROM_TINY = {"sdlora.config": json.dumps(TINY.to_dict())}


@pytest.fixture
def source(modules, tmp_path):
    def write(state, metadata=FROM_TINY, **how):
        write_lora(tmp_path / "source.safetensors", state, modules, metadata=metadata, **how)
        return tmp_path / "source.safetensors"
    return write


@pytest.fixture(scope="module")
def checkpoint(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tiny.safetensors"
    save_checkpoint(models, path)
    return path


def product(weights):
    up, down = (weights.tensors[name].double().flatten(1) for name in ("up", "down"))
    return up @ down * weights.alpha / weights.rank


def test_a_conversion_keeps_the_source_s_header_but_what_is_derived(modules, tmp_path, source):
    given = {"ss_learning_rate": "1e-4", "modelspec.title": "mine", "my.key": "x", "ss_network_dim": "as trained",
             "lora_adapter_metadata": "stale", "modelspec.hash_sha256": "stale", **FROM_TINY}
    report = convert(source(LORA, given), tmp_path / "out.safetensors", format="comfyui")
    header = header_of(tmp_path / "out.safetensors")
    assert {key: header.get(key) for key in given} == given | {"lora_adapter_metadata": None, "modelspec.hash_sha256": None}
    assert header["sshs_model_hash"].startswith(lora_hash(tmp_path / "out.safetensors"))
    assert str(report) == "kohya -> comfyui, 3 modules"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_a_conversion_keeps_the_source_s_dtype_unless_told_otherwise(modules, tmp_path, source, dtype):
    convert(source(LORA, dtype=torch.float16), tmp_path / "out", format="peft", dtype=dtype)
    found = read_lora(tmp_path / "out", modules).state
    for path, weights in LORA.items():
        half = {name: tensor.half().to(dtype or torch.float16) for name, tensor in weights.tensors.items()}
        assert all(torch.equal(found[path].tensors[name], tensor) for name, tensor in half.items())


def test_the_model_of_a_source_without_our_header_is_named_with_base(modules, tmp_path, source, checkpoint):
    path = source(LORA, {})
    with pytest.raises(LoRAFormatError, match="do not fit sd15|are unknown to this model"):
        convert(path, tmp_path / "out", format="peft")
    convert(path, tmp_path / "out", format="peft", base=checkpoint)
    assert read_lora(tmp_path / "out", modules).state.keys() == LORA.keys()


@pytest.mark.parametrize("rank, dtype", [(4, None), (9, None), (4, torch.float16)])
def test_an_approximation_is_the_best_of_its_rank_and_its_error_is_told(modules, tmp_path, source, rank, dtype):
    big = AdapterWeights("full", {"diff": random(64, 128, 3, 3)})
    path = source({ATTN: LOHA, CONV: big, TEXT: LORA[TEXT]}, dtype=dtype)
    report = convert(path, tmp_path / "out", format="diffusers", approximate=rank)
    read, kept = read_lora(tmp_path / "out", modules).state, {}
    for name, exact in ((ATTN, np.kron(1, (LOHA.tensors["w1_a"].numpy() @ LOHA.tensors["w1_b"].numpy())
                                       * (LOHA.tensors["w2_a"].numpy() @ LOHA.tensors["w2_b"].numpy()) * 0.5)),
                        (CONV, big.tensors["diff"].flatten(1).numpy())):
        kept[name] = np.linalg.svd(exact.astype(np.float64), compute_uv=False)
        best = np.sqrt((kept[name][rank:] ** 2).sum() / (kept[name] ** 2).sum())
        row = report.approximated.modules[name]
        assert row.error == pytest.approx(best, rel=1e-4 if dtype is None else 1e-2, abs=1e-6 if dtype is None else 1e-3)
        given = np.linalg.norm(product(read[name]).numpy() - exact) / np.linalg.norm(exact)
        assert given == pytest.approx(row.error, rel=1e-3, abs=2e-6 if dtype is None else 2e-3)
        assert read[name].rank == rank and {t.dtype for t in read[name].tensors.values()} == {dtype or torch.float32}
    whole = sum((s ** 2).sum() for s in kept.values())
    assert report.approximated.error == pytest.approx(
        np.sqrt(sum((s[rank:] ** 2).sum() for s in kept.values()) / whole), rel=1e-2)
    assert f"2 modules, rank {rank}, relative error" in str(report) and CONV in str(report)
    header = header_of(tmp_path / "out")
    assert header["ss_network_module"] == "networks.lora" and header["ss_network_dim"] == "Dynamic"


def test_a_difference_of_an_embedding_is_approximated_in_its_own_layout(modules, tmp_path, source):
    diff = (random(77, 3) @ random(3, 32)).half()
    convert(source({"clip.position_embedding": AdapterWeights("full", {"diff": diff})}), tmp_path / "out", format="peft",
            approximate=3, dtype=torch.float32)
    found = read_lora(tmp_path / "out", modules).state["clip.position_embedding"]
    assert (product(found).T - diff.double()).norm() <= 1e-3 * diff.double().norm()


def test_kinds_that_depend_on_the_weight_are_approximated_with_the_base_alone(models, modules, tmp_path, source, checkpoint):
    weights = AdapterWeights("ia3", {"weight": random(32), "on_input": torch.tensor(False)})
    path = source({ATTN: weights})
    with pytest.raises(LoRAFormatError, match=rf"{re.escape(ATTN)} depends on the base's weight; name the checkpoint"):
        convert(path, tmp_path / "out", format="peft", approximate=32)
    convert(path, tmp_path / "out", format="peft", approximate=32, base=checkpoint)
    W = models["diffusion"].get_submodule(ATTN.removeprefix("diffusion.")).weight.double()
    exact = W * random(32).double()[:, None]
    assert (product(read_lora(tmp_path / "out", modules).state[ATTN]) - exact).norm() <= 1e-6 * exact.norm()


def test_a_magnitude_on_some_modules_is_approximated_where_peft_cannot_have_it(models, modules, tmp_path, source, checkpoint):
    path = source(DORA | {PROJ: PAIR[PROJ]})
    convert(path, tmp_path / "out", format="peft", approximate=32, base=checkpoint)
    found = read_lora(tmp_path / "out", modules).state
    W = models["diffusion"].get_submodule(ATTN.removeprefix("diffusion.")).weight.double()
    tuned = W + product(DORA[ATTN])
    exact = DORA[ATTN].tensors["magnitude"].double() * tuned / tuned.norm(dim=1, keepdim=True) - W
    assert (product(found[ATTN]) - exact).norm() <= 1e-6 * exact.norm() and "magnitude" not in found[ATTN].tensors
    assert all(torch.equal(found[PROJ].tensors[name], tensor) for name, tensor in PAIR[PROJ].tensors.items())


@pytest.mark.parametrize("name", ["a norm", "the VAE", "a bias on some modules", "an embedding"])
def test_what_no_low_rank_can_stand_for_is_an_error_unless_it_is_skipped(modules, tmp_path, source, name):
    state, unable, _ = REFUSED[name]
    path, format = source(LORA | state), min(unable)
    offender = next(iter(refusals(LORA | state, modules, format)))
    with pytest.raises(LoRAFormatError, match=rf"cannot hold {re.escape(offender)}, .* leave it out with skip"):
        convert(path, tmp_path / "out", format=format, approximate=4)
    assert not (tmp_path / "out").exists()
    report = convert(path, tmp_path / "out", format=format, skip=re.escape(offender))
    assert read_lora(tmp_path / "out", modules).state.keys() == (LORA | state).keys() - {offender}
    assert len(report.skipped) >= 2 and f"{len(report.skipped)} tensors skipped as asked" in str(report)


def test_a_file_is_not_converted_onto_itself(modules, source):
    path = source(LORA)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="is read by this and would be lost"):
        convert(path, path, format="diffusers", dtype=torch.float16)
    assert path.read_bytes() == before
