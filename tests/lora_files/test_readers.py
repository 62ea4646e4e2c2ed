"""Every spelling of a module and of a tensor, what a report tells, and what no file can do."""

import ctypes
import gc
import json
import random as python_random
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd.checkpoints.names import model_names
from sd.config import SD15, TINY
from sd.files.tensor_file import CheckpointError
from sd.lora import LoRAFormatError, active_multipliers, lora_layers, modules_of, remove_lora, use_adapters
from sd.lora_files.modules import Modules, module_lookup
from sd.lora_files.read import read_lora, tag_counts
from sd.lora_files.spellings import TENSORS
from sd.model_loader import load_lora_into_models, new_models
from tests.lora_files.cases import random

LAYER = "diffusion.down_blocks.0.attentions.0.transformer_blocks.0.attn1.q_proj"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DIFFUSERS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"
WIDTH = 32


DOWN, UP = random(3, WIDTH), random(WIDTH, 3)


# ---- names -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [SD15, TINY], ids=lambda c: c.name)
def test_no_spelling_means_two_modules(config):
    meant = defaultdict(set)
    for name in model_names(config):
        for spelling in module_lookup([name]):
            meant[spelling].add(name.path)
    assert not {spelling: paths for spelling, paths in meant.items() if len(paths) > 1}


def test_kohya_names_of_sd15_are_a_bijection_over_all_686_tensors_of_the_unet():
    names = [name for name in model_names(SD15) if name.component == "diffusion"]
    for spelling in ("ours", "ldm", "diffusers", "kohya"):
        assert len({getattr(name, spelling) for name in names}) == len(names)
    with torch.device("meta"):
        from sd.unet import UNet
        tensors = UNet(SD15.unet).state_dict()
    assert len(tensors) == 686
    assert {key.rpartition(".")[0] for key in tensors} == {name.ours for name in names}
    text = [name.kohya for name in model_names(SD15) if name.component == "clip"]
    assert len(set(text)) == len(text) and not set(text) & {name.kohya for name in names}


SPELLINGS = {
    "kohya": (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", "kohya"),
    "kohya, LDM names": ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
                         "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight", "kohya"),
    "SimpleTuner": (KOHYA.replace("lora_unet", "lycoris") + ".lora_down.weight",
                    KOHYA.replace("lora_unet", "lycoris") + ".lora_up.weight", "kohya"),
    "diffusers": (f"unet.{DIFFUSERS}.to_q.lora_A.weight", f"unet.{DIFFUSERS}.to_q.lora_B.weight", "diffusers"),
    "diffusers, training scripts": (f"unet.{DIFFUSERS}.to_q.lora.down.weight", f"unet.{DIFFUSERS}.to_q.lora.up.weight",
                                    "diffusers"),
    "attn-procs": (f"unet.{DIFFUSERS}.processor.to_q_lora.down.weight", f"unet.{DIFFUSERS}.processor.to_q_lora.up.weight",
                   "diffusers attn-procs"),
    "attn-procs of a unet alone": (f"{DIFFUSERS}.processor.to_q_lora.down.weight", f"{DIFFUSERS}.processor.to_q_lora.up.weight",
                                   "diffusers attn-procs"),
    "PEFT": (f"base_model.model.{DIFFUSERS}.to_q.lora_A.weight", f"base_model.model.{DIFFUSERS}.to_q.lora_B.weight", "PEFT"),
    "PEFT in memory": (f"base_model.model.{DIFFUSERS}.to_q.lora_A.default.weight",
                       f"base_model.model.{DIFFUSERS}.to_q.lora_B.default.weight", "PEFT"),
    "ComfyUI": ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
                "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight", "ComfyUI"),
    "our path": (f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", "kohya"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_unet_layer_is_found_under_every_spelling_with_the_same_tensors(modules, name):
    down, up, program = SPELLINGS[name]
    found = read_lora({down: DOWN, up: UP}, modules)
    weights = found.state[LAYER]
    assert found.format == program and found.tensors == 2 and list(found.state) == [LAYER]
    assert torch.equal(weights.tensors["down"], DOWN) and torch.equal(weights.tensors["up"], UP)
    assert (weights.kind, weights.rank, weights.alpha) == ("lora", 3, 3.0), "without an alpha it is the rank"


@pytest.mark.parametrize("down", [
    f"lora_te_{TEXT.replace('.', '_')}.lora_down.weight", f"lora_te1_{TEXT.replace('.', '_')}.lora_down.weight",
    "lora_te_encoder_layers_1_self_attn_q_proj.lora_down.weight", "lora_te1_encoder_layers_1_self_attn_q_proj.lora_down.weight",
    f"text_encoder.{TEXT}.lora_A.weight", "text_encoder.encoder.layers.1.self_attn.q_proj.lora_A.weight",
    f"text_encoder.{TEXT}.lora_linear_layer.down.weight", f"text_encoder.{TEXT[:-6]}to_q_lora.down.weight",
    f"base_model.model.{TEXT}.lora_A.weight", "base_model.model.encoder.layers.1.self_attn.q_proj.lora_A.weight",
    f"text_encoders.clip_l.transformer.{TEXT}.lora_down.weight",
])
def test_a_text_layer_is_found_under_every_spelling(modules, down):
    up = down.replace("lora_down", "lora_up").replace("lora_A", "lora_B").replace(".down.", ".up.")
    found = read_lora({down: DOWN, up: UP}, modules)
    assert list(found.state) == ["clip.layers.1.attention.q_proj"]
    assert torch.equal(found.state["clip.layers.1.attention.q_proj"].tensors["up"], UP)


def test_the_output_projection_has_its_own_old_names(modules):
    files = [{f"unet.{DIFFUSERS}.processor.to_out_lora.{side}.weight": t for side, t in (("down", DOWN), ("up", UP))},
             {f"unet.{DIFFUSERS}.to_out.0.lora_{side}.weight": t for side, t in (("A", DOWN), ("B", UP))}]
    assert [list(read_lora(file, modules).state) for file in files] == [[LAYER.replace("q_proj", "out_proj")]] * 2
    text = {f"text_encoder.{TEXT[:-6]}to_out_lora.{side}.weight": t for side, t in (("down", DOWN), ("up", UP))}
    assert list(read_lora(text, modules).state) == ["clip.layers.1.attention.out_proj"]


# ---- alpha -----------------------------------------------------------------------------------------------------------

PAIR = {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}


@pytest.mark.parametrize("more, alpha", [
    ({"alpha": torch.tensor(1.5)}, 1.5), ({"alpha": torch.tensor([1.5])}, 1.5), ({}, 3.0), ({"alpha": torch.tensor(0.0)}, 0.0),
    ({"scale": torch.tensor(0.25)}, 0.75), ({"scale": torch.tensor(0.25), "alpha": torch.tensor(9.0)}, 0.75),
    ({"scalar": torch.tensor(2.0), "alpha": torch.tensor(1.5)}, 3.0),
], ids=str)
def test_what_scales_a_change_becomes_its_alpha(modules, more, alpha):
    found = read_lora(PAIR | {f"{KOHYA}.{tail}": t for tail, t in more.items()}, modules)
    assert found.state[LAYER].alpha == alpha and found.tensors == 2 + len(more)


@pytest.mark.parametrize("config, alphas", [
    ({"lora_alpha": 6}, (6.0, 6.0)),
    ({"lora_alpha": 6, "alpha_pattern": {"to_q": 1}}, (1.0, 6.0)),
    ({"lora_alpha": 6, "alpha_pattern": {r"down_blocks\.0\..*to_q": 1, "attn1.to_k": 2}}, (1.0, 2.0)),
    ({"lora_alpha": 6, "alpha_pattern": {"o_q": 1}}, (6.0, 6.0)),  # whole parts of a name only
    ({"lora_alpha": 6, "use_rslora": True}, (6 * 3**0.5, 6 * 2**0.5)),
    ({"r": 8}, (3.0, 2.0)),
], ids=str)
def test_alpha_comes_from_the_metadata_of_diffusers_by_pefts_rules(modules, config, alphas):
    file = {f"unet.{DIFFUSERS}.to_q.lora_A.weight": DOWN, f"unet.{DIFFUSERS}.to_q.lora_B.weight": UP,
            f"unet.{DIFFUSERS}.to_k.lora_A.weight": DOWN[:2], f"unet.{DIFFUSERS}.to_k.lora_B.weight": UP[:, :2]}
    from sd.files.tensor_file import TensorFile
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    state = read_lora(TensorFile("x", file, metadata), modules).state
    assert tuple(state[LAYER.replace("q_proj", p)].alpha for p in ("q_proj", "k_proj")) == pytest.approx(alphas, rel=1e-15)


@pytest.mark.parametrize("metadata, words", [
    ("{", "lora_adapter_metadata cannot be read"), ("[1]", "cannot be read"), ('{"unet.lora_alpha": "x"}', "the alpha 'x'"),
    ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "not a regular expression"),
    ('{"unet.peft_type": "BONE"}', "peft_type is 'BONE'"),
    ('{"unet.lora_alpha": 1, "unet.alpha_pattern": 3}', "the patterns 3; a table"),
])
def test_damaged_metadata_of_diffusers_is_one_sentence(modules, metadata, words):
    from sd.files.tensor_file import TensorFile
    file = {f"unet.{DIFFUSERS}.to_q.lora_A.weight": DOWN, f"unet.{DIFFUSERS}.to_q.lora_B.weight": UP}
    with pytest.raises(LoRAFormatError, match=words) as error:
        read_lora(TensorFile("x.safetensors", file, {"lora_adapter_metadata": metadata}), modules)
    assert str(error.value).startswith("x.safetensors")


def test_the_bias_of_pefts_up_has_the_scale_of_the_change(modules):
    module = f"base_model.model.{DIFFUSERS}.to_out.0"
    file = {f"{module}.lora_A.weight": DOWN, f"{module}.lora_B.weight": UP, f"{module}.alpha": torch.tensor(1.5),
            f"{module}.lora_B.bias": torch.arange(WIDTH) / 7}
    weights = read_lora(file, modules).state[LAYER.replace("q_proj", "out_proj")]
    assert torch.allclose(weights.tensors["diff_b"], torch.arange(WIDTH) / 7 * 0.5, rtol=1e-6)


def test_a_sparse_residual_is_added_to_the_low_rank(modules):
    indices = torch.tensor([[0, 5, 31], [2, 2, 30]])
    file = PAIR | {f"{KOHYA}.alpha": torch.tensor(3.0), f"{KOHYA}.bias_indices": indices,
                   f"{KOHYA}.bias_values": torch.tensor([1.0, -2.0, 3.0]), f"{KOHYA}.bias_size": torch.tensor([WIDTH, WIDTH])}
    weights = read_lora(file, modules).state[LAYER]
    expected = UP.double().numpy() @ DOWN.double().numpy()
    np.add.at(expected, tuple(indices.numpy()), [1.0, -2.0, 3.0])
    assert weights.kind == "full" and np.allclose(weights.tensors["diff"].numpy(), expected, atol=1e-5)


def peft_folder(folder, config, tensors):
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_anchored_pattern_of_a_peft_folder_is_for_the_names_inside(modules, tmp_path):
    module = f"{DIFFUSERS}.to_q"
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 1, "alpha_pattern": {"^" + module.replace(".", r"\.") + "$": 6}}
    tensors = {f"base_model.model.{module}.lora_A.weight": DOWN, f"base_model.model.{module}.lora_B.weight": UP}
    assert read_lora(peft_folder(tmp_path / "flat", config, tensors), modules).state[LAYER].alpha == 6.0
    (tmp_path / "both").mkdir()
    peft_folder(tmp_path / "both" / "unet", config, tensors)
    assert read_lora(tmp_path / "both", modules).state[LAYER].alpha == 6.0


def test_pefts_kronecker_product_of_whole_factors_is_scaled_and_lycoris_is_not(modules, tmp_path):
    from peft import LoKrConfig, get_peft_model
    net = torch.nn.Sequential()
    net.add_module("layer", torch.nn.Linear(32, 32))
    wrapped = get_peft_model(net, LoKrConfig(r=16, alpha=4, target_modules=["layer"]))
    layer = wrapped.base_model.model.layer
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3
    expected = layer.get_delta_weight("default")
    wrapped.save_pretrained(tmp_path / "peft")
    plain = torch.nn.Sequential()
    plain.add_module("layer", torch.nn.Linear(32, 32))
    weights = read_lora(tmp_path / "peft", modules_of(plain)).state["layer"]
    w1, w2 = (weights.tensors[n].double() for n in ("w1", "w2"))
    assert weights.alpha is None and torch.allclose(torch.kron(w1, w2), expected.double(), rtol=1e-5, atol=1e-7)
    one, two = random(4, 4), random(8, 8)
    lycoris = read_lora({f"{KOHYA}.lokr_w1": one, f"{KOHYA}.lokr_w2": two, f"{KOHYA}.alpha": torch.tensor(4.0)}, modules)
    assert torch.equal(lycoris.state[LAYER].tensors["w1"], one)


@pytest.mark.parametrize("file, words", [
    ({f"{KOHYA}.oft_blocks": random(4, 8, 8), f"{KOHYA}.scalar": torch.tensor(0.5)}, "a scale, but its kind .oft. has none"),
    (PAIR | {f"{KOHYA}.lora_down.weight": DOWN * 1j}, "complex numbers"),
    (PAIR | {f"{KOHYA}.alpha": torch.tensor(1e300, dtype=torch.float64)}, "1e.300, which overflows fp32"),
    ({f"{DIFFUSERS}.to_q.lora_{side}.{name}.weight": t for side, t in (("A", DOWN), ("B", UP)) for name in "ab"},
     "several adapters"),
    *(({f"{KOHYA}.{name}": t for name, t in tensors.items()} | {f"{KOHYA}.lora_B.bias": random(WIDTH)},
       f"a lora_up.bias, whose scale is alpha / rank, but its kind .{kind}. has no rank")
      for kind, tensors in (("full", {"diff": random(WIDTH, WIDTH)}), ("oft", {"oft_blocks": random(4, 8, 8)}),
                            ("lokr", {"lokr_w1": random(4, 4), "lokr_w2": random(8, 8)}))),
])
def test_what_would_be_lost_in_silence_is_refused(modules, file, words):
    with pytest.raises(LoRAFormatError, match=words):
        read_lora(file, modules)


# ---- what a report tells ---------------------------------------------------------------------------------------------

def write(path, tensors, metadata=None):
    safetensors.torch.save_file({k: t.clone() for k, t in tensors.items()}, path, metadata)
    return path


def test_the_report_accounts_for_every_tensor(models, tmp_path, caplog):
    file = PAIR | {f"{KOHYA}.alpha": torch.tensor(1.5), "lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b": random(64),
                   "lora_unet_conv_in.diff": random(32, 4, 3, 3), "strange.key": random(2)}
    metadata = {"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "sks dog, oil painting",
                "ss_tag_frequency": json.dumps({"a": {"cat": 3, "dog": 1}})}
    path = write(tmp_path / "x.safetensors", file, metadata)
    with pytest.raises(LoRAFormatError, match="1 of 6 tensors are not understood, first: 'strange.key'"):
        load_lora_into_models(models, path)
    with caplog.at_level("INFO", "sd"):
        assert load_lora_into_models(models, path, skip=r"^strange|conv_in") is models
    report = models.lora_reports["x"]
    assert report.tensors == 4 and sorted(report.skipped) == ["lora_unet_conv_in.diff", "strange.key"]
    assert report.tensors + len(report.skipped) == len(file)
    assert (report.format, report.base, report.modules) == ("LyCORIS", "sd_v1", {"diffusion": 1, "clip": 1})
    assert (report.ranks, report.alphas, report.kinds) == ([3], [1.5], ["full", "lora"])
    assert report.trigger_words == ["sks dog", "oil painting"]
    assert len(caplog.records) == 1 and caplog.records[0].getMessage() == str(report)
    for part in ("LyCORIS", "sd_v1", "1 in diffusion", "1 in clip", "rank 3", "alpha 1.5", "4 tensors applied", "2 skipped",
                 "sks dog"):
        assert part in str(report)
    remove_lora(models)


def test_trigger_words_fall_back_to_the_tags_of_the_training(modules):
    from sd.files.tensor_file import TensorFile
    tags = {"1_a": {"cat": 3, " dog": 1}, "2_b": {"dog": 9, "e": 1, "f": 1, "g": 1, "h": 1}}
    file = TensorFile("x", PAIR, {"ss_tag_frequency": json.dumps(tags)})
    assert read_lora(file, modules).trigger_words[:2] == ["dog", "cat"] and len(read_lora(file, modules).trigger_words) == 5
    assert tag_counts({"ss_tag_frequency": "[broken"}) == tag_counts({}) == {}


@pytest.mark.parametrize("skip, words", [("(", "not a regular expression"), ("lora", "leaves nothing of its 2 tensors")])
def test_skip_is_checked(modules, skip, words):
    with pytest.raises(LoRAFormatError, match=words):
        read_lora(PAIR, modules, skip=skip)


def test_skip_goes_by_the_files_key_and_by_our_path(modules):
    other = {key.replace("attn1", "attn2"): t for key, t in PAIR.items()}
    for skip in (r"attn2_to_q\.", r"attn2\.q_proj"):
        found = read_lora(PAIR | other, modules, skip=skip)
        assert list(found.state) == [LAYER] and sorted(found.skipped) == sorted(other)


# ---- what no file can do ---------------------------------------------------------------------------------------------

names = st.sampled_from([KOHYA, f"unet.{DIFFUSERS}.to_q", LAYER, "lora_te_text_model_final_layer_norm", "x", "", "unet:0",
                         "lora_unet_"])
tails = st.sampled_from([*TENSORS, "alpha", "scale", "scalar", "dora_scale", "diff_b", "bias_indices", "bias_values",
                         "bias_size", "lora_A.weight", "lora_B", "processor.to_k_lora.up.weight", "lora_A", "lora_scale",
                         "module.A", "up", ""])
values = st.builds(lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
                   st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 32]), max_size=4),
                   st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]),
                   st.sampled_from([0.0, 1.0, -3.0, float("nan")]))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.builds(lambda a, b: f"{a}.{b}", names, tails), values, max_size=5),
       st.dictionaries(st.sampled_from(["ss_base_model_version", "lora_adapter_metadata", "ss_tag_frequency", "unet"]),
                       st.sampled_from(["", "[]", "{}", "null", '{"unet.lora_alpha": null}', '{"a": {"b": "c"}}', '["x"]']),
                       max_size=2))
def test_any_tensors_under_any_names_are_read_or_refused_in_one_sentence(tensors, metadata):
    from sd.files.tensor_file import TensorFile
    models = TINY_MODELS
    try:
        found = read_lora(TensorFile("fuzz.safetensors", tensors, metadata), modules_of(models))
        assert found.tensors + len(found.skipped) == len(tensors)
        load_lora_into_models(models, tensors, "x")
    except (LoRAFormatError, CheckpointError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    finally:
        remove_lora(models)


TINY_MODELS = new_models(TINY)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_in_one_sentence(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("f") / "x.safetensors", PAIR, {"ss_v2": "False"})
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[:data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content))
    try:
        load_lora_into_models(TINY_MODELS, path, "x")
    except (LoRAFormatError, CheckpointError) as error:
        assert "\n" not in str(error)
    finally:
        remove_lora(TINY_MODELS)


def resident() -> int:
    """Bytes in use: what the allocator keeps for later is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_hundred_adapters_come_and_go_without_a_trace(tmp_path):
    models, rng = new_models(TINY), python_random.Random(0)
    layers = {name.kohya: models["diffusion"].get_submodule(name.ours) for name in model_names(TINY)
              if name.component == "diffusion" and name.ours.endswith(("_proj", "fc1", "fc2", "conv1"))}
    files = []
    for i in range(10):  # random modules, ranks and kinds
        tensors = {}
        for kohya in rng.sample(sorted(layers), 20):
            out, inner, *kernel = layers[kohya].weight.shape
            r = rng.randint(1, 8)
            tensors |= ({f"{kohya}.diff": random(out, inner, *kernel, seed=i)} if rng.random() < 0.2 else
                        {f"{kohya}.lora_down.weight": random(r, inner, *kernel, seed=i),
                         f"{kohya}.lora_up.weight": random(out, r, *(1,) * len(kernel), seed=i)})
        files.append(write(tmp_path / f"{i}.safetensors", tensors))
    x, t, context = random(2, 4, 8, 8), torch.tensor([3, 700]), random(2, 77, TINY.clip.width)
    start = {key: p.clone() for key, p in models["diffusion"].state_dict().items()}
    with torch.no_grad():
        expected = models["diffusion"](x, t, context)
        on, memory = [], {}
        for i in range(100):
            load_lora_into_models(models, files[i % 10], f"a{i}", rng.uniform(-1, 1))
            on.append(f"a{i}")
            assert not torch.equal(models["diffusion"](x, t, context), expected)
            while len(on) > 3:
                remove_lora(models, on.pop(rng.randrange(len(on))))
            if i + 1 in (20, 100):  # with the same adapters on: none
                while on:
                    remove_lora(models, on.pop())
                memory[i + 1] = resident()
            assert set(active_multipliers(models)) == set(on) == set(models.lora_reports)
        assert torch.equal(models["diffusion"](x, t, context), expected)
    assert not lora_layers(models)
    now = models["diffusion"].state_dict()
    assert now.keys() == start.keys() and all(torch.equal(start[key], now[key]) for key in start)
    assert memory[100] <= 1.005 * memory[20]


def test_an_adapter_of_any_kind_is_gone_when_it_is_off(models, tmp_path):
    path = write(tmp_path / "x.safetensors", PAIR)
    x, t, context = random(2, 4, 8, 8), torch.tensor([3, 700]), random(2, 77, TINY.clip.width)
    with torch.no_grad():
        before = models["diffusion"](x, t, context)
        load_lora_into_models(models, path)
        with use_adapters(models, {"x": 0.0}):
            assert torch.equal(models["diffusion"](x, t, context), before)
        remove_lora(models)
        assert torch.equal(models["diffusion"](x, t, context), before)


def test_foreign_models_are_addressed_by_their_own_paths():
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 4))
    modules = modules_of(net)
    assert isinstance(modules, Modules) and modules.shapes == {"0": (5, 4), "1": (4, 5)}
    file = {"base_model.model.1.lora_A.weight": random(2, 5), "base_model.model.1.lora_B.weight": random(4, 2)}
    found = read_lora(file, modules)
    assert list(found.state) == ["1"]
