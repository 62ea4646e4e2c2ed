"""LoRA files that are refused: one sentence that says why, and a model that stays as it was."""

import copy

import pytest
import torch

from sd.config import TINY
from sd.files.tensor_file import CheckpointError
from sd.lora import (
    LoRAError,
    LoRAFormatError,
    active_multipliers,
    adapter_names,
    load_lora_weights,
    lora_state,
)
from sd.lora_files.spellings import guess_file
from sd.model_loader import load_lora_into_models, new_models
from tests.lora_files.cases import (
    ATTN,
    CONV,
    GOOD,
    PROJ,
    TEXT,
    our_outputs,
    pair,
    random,
    t,
    u,
    write,
)

NAN = torch.full((32, 3), torch.nan)
BAD = {
    "half a pair": (GOOD | {f"{u(PROJ)}.lora_up.weight": random(64, 3)}, f"{u(PROJ)} is half a pair: .* without its down"),
    "alpha alone": (GOOD | {f"{u(PROJ)}.alpha": torch.tensor(1.0)}, f"{u(PROJ)} is not an adapter of one kind: .* only alpha"),
    "magnitude alone": (GOOD | {f"{u(PROJ)}.dora_scale": random(64, 1)}, "it has only dora_scale"),
    "two kinds": (GOOD | {f"{u(ATTN)}.diff": random(32, 32)}, "it has full and lora"),
    "a bias of another layer": (GOOD | {f"{u(PROJ)}.diff_b": random(48)}, r"diff_b.* \[48\]"),
    "SDXL, second text encoder": (GOOD | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 64, 32),
                                  "1 of 5 LoRA modules are unknown.*'lora_te2_text_model.*it seems to be a LoRA for SDXL"),
    "SDXL, UNet": (pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 64, 64),
                   "1 of 1 LoRA modules are unknown .* first: 'lora_unet_input_blocks_4_1.*it seems to be a LoRA for SDXL"),
    "SD 2, text": (GOOD | pair("lora_te_text_model_encoder_layers_17_mlp_fc1", 64, 32), "it seems to be a LoRA for SD 2"),
    "SD 2, UNet": (pair(u(ATTN), 32, 1024), r"1 of 1 LoRA modules do not fit this model, first: diffusion\.down_blocks\.0\."
                   r"attentions\.0.*down has shape \[3, 1024\].*wants \[3, 32\].*a LoRA for SD 2 \(text embed.* 1024\)"),
    "SD 1": (pair(u(ATTN), 32, 768), r"do not fit this model.*a LoRA for SD 1.x \(text embeddings of width 768\)"),
    "Flux": (pair("lora_unet_double_blocks_0_img_attn_proj", 64, 64), "it seems to be a LoRA for Flux"),
    "SD 3": (pair("lora_unet_joint_blocks_0_x_block_attn_proj", 64, 64), "it seems to be a LoRA for SD 3"),
    "another width": (GOOD | pair(u(PROJ), 48, 64), r"1 of 5 LoRA modules do not fit .*up has shape \[48, 3\]"),
    "another kernel": (GOOD | pair(u(CONV), 64, 128, kernel=(5, 5)), r"down has shape \[3, 128, 5, 5\]"),
    "NaN": (GOOD | {f"{u(ATTN)}.lora_up.weight": NAN}, f"{u(ATTN)}.lora_up.weight holds values that are not finite"),
    "infinite alpha": (GOOD | {f"{u(ATTN)}.alpha": torch.tensor(torch.inf)}, r"alpha holds values that are not finite"),
    "many alphas": (GOOD | {f"{u(ATTN)}.alpha": torch.ones(3)}, r"alpha has shape \[3\]; one number is expected"),
    "no tensors": ({}, "holds no tensors"),
    "rank 0": (GOOD | pair(u(PROJ), 64, 64, rank=0), r"lora_down.weight has shape \[0, 64\], which fits no layer"),
    "a number for a matrix": (GOOD | {f"{u(ATTN)}.lora_down.weight": torch.tensor(1.0)}, r"has shape \[\], which fits no"),
    "magnitude of another layer": (GOOD | {f"{u(ATTN)}.dora_scale": random(48, 1)}, r"its magnitude has shape \[48, 1\]"),
    "magnitude of no axis": (GOOD | {f"{u(ATTN)}.dora_scale": random(32, 32)}, r"its magnitude has shape \[32, 32\]"),
    "a bias where none is": ({f"{u(ATTN)}.diff": random(32, 32), f"{u(ATTN)}.diff_b": random(32)}, "changes a bias that"),
    "one module in two spellings": (pair(t(TEXT[0]), 32, 32) | pair(t(TEXT[0], "lora_te1_text_model_"), 32, 32),
                                    "a second LoRA for"),
    "diffusers": ({f"unet.{ATTN}x.lora_A.weight": random(3, 32), f"unet.{ATTN}x.lora_B.weight": random(32, 3)},
                  "1 of 1 LoRA modules are unknown to this model, first: 'unet.*it is damaged, or a LoRA for another base"),
    "diffusers, training scripts": ({f"unet.{ATTN}.lora.down.weight": random(3, 32)}, "is half a pair: .* without its up"),
    "diffusers before 0.18": ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight":
                               random(3, 32)}, "half a pair: lora_up.weight without its down"),
    "LyCORIS": ({f"{u(ATTN)}.hada_w1_a": random(32, 3)}, "half a pair: hada_w1_a without its w1_b"),
    "Kronecker": ({f"{u(ATTN)}.lokr_w1": random(4, 4), f"{u(ATTN)}.lokr_w2_a": random(8, 2)}, "half a pair: .* without its w2"),
    "a scale of nothing": ({f"{u(ATTN)}.diff": random(32, 32), f"{u(ATTN)}.scale": torch.tensor(2.0)}, "has a scale, but"),
    "sparse residual": ({f"{u(ATTN)}.bias_values": random(3)} | pair(u(ATTN), 32, 32), "residual without its bias_indices"),
    "cloneofsimo": ({"unet:0:up": random(32, 3), "unet:0:down": random(3, 32)}, "list of 1 pairs without names"),
    "a stranger": ({"some.weight": random(3)}, "1 of 1 tensors are not understood, first: 'some.weight'; it does not look"),
    "an unknown block": (GOOD | pair(u("down_blocks.7.resnets.0.conv1"), 64, 64), "first: 'lora_unet_down_blocks_7.*it seems"),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model with a good LoRA on, and what it gives."""
    models = new_models(TINY)
    load_lora_into_models(models, write(tmp_path_factory.mktemp("good") / "good.safetensors", GOOD), "x", multiplier=0.7)
    return models, our_outputs(models), copy.deepcopy(lora_state(models, "x"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence_and_changes_nothing(loaded, tmp_path, name):
    models, expected, state = loaded
    tensors, sentence = BAD[name]
    path = write(tmp_path / "bad.safetensors", tensors)
    for adapter in ("x", "y"):  # a name in use, and a new one
        with pytest.raises(LoRAFormatError, match=sentence) as error:
            load_lora_into_models(models, path, adapter)
        assert str(error.value).startswith("bad.safetensors") and "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(our_outputs(models), expected))
    assert adapter_names(models) == ["x"] and active_multipliers(models) == {"x": 0.7} and list(models.lora_reports) == ["x"]
    now = lora_state(models, "x")
    assert now.keys() == state.keys()
    assert all(torch.equal(v, now[path].tensors[k]) for path, w in state.items() for k, v in w.tensors.items())


def test_the_base_that_a_file_names_stands_in_the_error(models, tmp_path):
    header = {"ss_base_model_version": "sdxl_b"}
    path = write(tmp_path / "x.safetensors", pair("lora_unet_label_emb_0_0", 64, 64), metadata=header)
    with pytest.raises(LoRAFormatError, match=r"^x.safetensors \(made for sdxl_b\): 1 of 1 LoRA modules are unknown"):
        load_lora_into_models(models, path)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_and_changes_nothing(models, tmp_path, cut):
    path = write(tmp_path / "x.safetensors", GOOD)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="x.safetensors"):
        load_lora_into_models(models, path)
    assert adapter_names(models) == [] and models.lora_reports == {}


@pytest.mark.parametrize("multiplier", [float("nan"), float("inf")])
def test_a_multiplier_must_be_finite(models, tmp_path, multiplier):
    with pytest.raises(LoRAError, match="a finite number is needed"):
        load_lora_into_models(models, write(tmp_path / "x.safetensors", GOOD), multiplier=multiplier)
    assert adapter_names(models) == []


def test_a_text_encoder_part_is_not_dropped_when_only_the_unet_is_there(models, tmp_path):
    path = write(tmp_path / "x.safetensors", GOOD)
    with pytest.raises(LoRAFormatError, match="2 of 4 LoRA modules are unknown to this model, first: 'lora_te_text_model"):
        load_lora_weights({"diffusion": models["diffusion"]}, path)


def test_the_guess_never_fails():
    assert guess_file({}) == "it is empty" and "does not look like" in guess_file({"x": torch.ones(1)})
