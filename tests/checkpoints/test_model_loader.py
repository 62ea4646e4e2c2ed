"""Base models from every kind of file and back, against diffusers and transformers; what must be refused, and how."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

import sd.model_loader as loader
from sd.checkpoints.names import HARMLESS, guess_checkpoint, ldm_facts, model_names
from sd.checkpoints.writer import ldm_state
from sd.config import CONFIG_KEY, DIGITS, SD15, TINY, CLIPConfig, ModelConfig, UNetConfig
from sd.files.tensor_file import CheckpointError
from sd.lora import LoRAFormatError, apply_lora_to_model, remove_lora
from sd.model_loader import Models, load_lora_into_models, new_models, save_checkpoint
from sd.models import build_networks
from tests.checkpoints.cases import DTYPES, assert_close, assert_same, load, our_outputs, outputs, refused
from tests.peers import peer_clip, peer_vae, randomize

SCHEDULE = [  # the buffers of CompVis' DDPM class
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"]
EXTRAS = [  # each is in some published checkpoint of SD 1.x
    *SCHEDULE, "lvlb_weights", "logvar", "scale_factor", "model_ema.decay", "model_ema.num_updates",
    "model_ema.diffusion_modelinput_blocks00weight", "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "cond_stage_model.transformer.embeddings.position_ids", "first_stage_model.loss.logvar", "loss.logvar",
    "first_stage_model.loss.discriminator.main.0.weight", "cond_stage_model.logit_scale", "cond_stage_model.text_projection",
    "cond_stage_model.transformer.text_projection.weight", "text_model.embeddings.position_ids", "embeddings.position_ids",
    "logit_scale", "text_projection.weight", "visual_projection.weight", "vision_model.embeddings.class_embedding"]


# ---- what is read ----------------------------------------------------------------------------------------------------

@pytest.fixture
def lightning(monkeypatch):
    """A callback class as the published checkpoints name it; gone again before the file is read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    return module.ModelCheckpoint


def training_leftovers(callback):
    return {"epoch": 3, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "lr_schedulers": [{"last_epoch": 2}],
            "callbacks": {callback: {"best_model_score": np.float64(0.5), "current_score": torch.tensor(0.5)}},
            "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}]}


@pytest.mark.parametrize("level", ["state_dict", "flat"])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old pickle"])
def test_an_ldm_ckpt_loads_with_all_that_training_left_in_it(files, ldm, tmp_path, lightning, monkeypatch, level, is_zip):
    content = dict(ldm) | {key: torch.rand(5) for key in EXTRAS}
    content = {"state_dict": content} if level == "state_dict" else content
    path = tmp_path / "model.ckpt"
    torch.save(content | training_leftovers(lightning), path, _use_new_zipfile_serialization=is_zip)
    monkeypatch.undo()  # the reader's machine has no lightning
    assert_same(load(path, config=TINY), load(files / "tiny.safetensors"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_of_any_dtype_load_into_any_dtype(ldm, tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({k: v.to(dtype) for k, v in ldm.items()}, path)
    full = load(path, config=TINY)
    for component, network in full.items():
        for name in model_names(TINY):
            if name.component == component:
                weight = network.get_submodule(name.ours).weight
                assert weight.dtype == torch.float32 and not weight.requires_grad
                assert torch.equal(weight.flatten(), ldm[name.ldm + ".weight"].to(dtype).float().flatten())
    half = load(path, config=TINY, dtype=torch.float16)
    assert half["diffusion"].conv_in.weight.dtype == half["clip"].final_norm.weight.dtype == torch.float16
    assert {p.dtype for c in ("encoder", "decoder") for p in half[c].parameters()} == {torch.float32}, "the VAE overflows"
    assert {p.dtype for m in load(path, config=TINY, dtype=torch.bfloat16).values() for p in m.parameters()} == {torch.bfloat16}


def mapped_from(tensor):
    """The file that the tensor's memory is a map of."""
    for line in open("/proc/self/maps"):
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return os.path.basename(line.split(maxsplit=5)[-1].strip())


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "m"])
def test_as_stored_every_tensor_keeps_its_dtype_and_lies_in_the_map_of_its_file(pair, ldm, tmp_path, name):
    """An fp16 UNet with bf16 norms, an fp32 VAE and a bf16 text encoder."""
    models = Models({k: deepcopy(m) for k, m in pair[0].items()}, TINY)
    models["diffusion"].half()
    models["clip"].bfloat16()
    for module in models["diffusion"].modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.bfloat16()
    if name.endswith("ckpt"):
        torch.save({"state_dict": ldm_state(models)}, tmp_path / name)
    else:
        save_checkpoint(models, tmp_path / name)
    stored = load(tmp_path / name, dtype="stored", config=TINY)
    assert_same(models, stored)
    files = {"m.safetensors": {"m.safetensors"}, "m.ckpt": {"m.ckpt"},
             "m": {"diffusion_pytorch_model.safetensors", "model.safetensors"}}
    for component, network in stored.items():
        for key, p in network.named_parameters():
            assert p.dtype == models[component].get_parameter(key).dtype, key
            assert mapped_from(p) in files[name], key


def test_a_dtype_that_is_none_is_refused(files):
    with pytest.raises(ValueError, match="dtype is 'half'; allowed: a torch.dtype, 'auto', 'stored', or None"):
        load(files / "tiny.safetensors", dtype="half")


def test_ema_weights_are_used_on_request_only(ldm, tmp_path):
    prefix = "model.diffusion_model."
    ema = {"model_ema." + key.removeprefix("model.").replace(".", ""): value + 1  # as CompVis' LitEma names its buffers
           for key, value in ldm.items() if key.startswith(prefix)}
    path = tmp_path / "full.ckpt"
    torch.save({"state_dict": ldm | ema | {"model_ema.decay": torch.tensor(0.9999)}}, path)
    plain, averaged = load(path, config=TINY), load(path, config=TINY, ema=True)
    assert torch.equal(plain["diffusion"].conv_in.weight, ldm[prefix + "input_blocks.0.0.weight"])
    for key, tensor in plain["diffusion"].state_dict().items():
        assert torch.equal(averaged["diffusion"].state_dict()[key], tensor + 1)
    assert_same(plain, averaged, only=("clip", "encoder", "decoder"))
    torch.save({"state_dict": ldm}, path)
    assert "model_ema.diffusion_modeltime_embed0weight (it has no EMA weights)" in refused(path, config=TINY, ema=True)


def test_a_ckpt_from_before_transformers_4_20_has_no_text_model(files, ldm, tmp_path):
    old = {key.replace("transformer.text_model.", "transformer."): value for key, value in ldm.items()}
    assert "cond_stage_model.transformer.encoder.layers.1.mlp.fc2.bias" in old
    torch.save({"state_dict": old}, tmp_path / "old.ckpt")
    assert_same(load(tmp_path / "old.ckpt", config=TINY), load(files / "tiny.safetensors"))


def test_a_malicious_pickle_is_refused_by_the_name_that_it_asks_for(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-here"),)

    torch.save({"state_dict": {"model.diffusion_model.out.2.weight": torch.zeros(3), "x": Attack()}}, tmp_path / "evil.ckpt")
    assert "posix.mkdir" in refused(tmp_path / "evil.ckpt", config=TINY)
    assert not (tmp_path / "was-here").exists()


def test_folders_that_diffusers_saved_are_read_with_their_config(pair, files):
    ours, theirs = load(files / "ours"), load(files / "theirs")
    assert_same(ours, theirs)
    assert ours.config == replace(TINY, name="ours") and theirs.config == replace(TINY, name="theirs")
    assert_close(our_outputs(theirs), outputs(*pair[1].values()))


@pytest.mark.parametrize("config", [DIGITS, replace(TINY, name="v", prediction="v", beta_schedule="linear"),
                                    replace(TINY, name="gelu", clip=replace(TINY.clip, activation="gelu", heads=8))],
                         ids=lambda c: c.name)
def test_every_field_of_the_config_survives_the_file_and_the_folder(tmp_path, config):
    models = new_models(config)
    for name in ("model.safetensors", config.name):
        save_checkpoint(models, tmp_path / name)
        again = load(tmp_path / name)
        assert again.config == config
        assert_same(models, again)


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def rewrite(file, change, name=None):
    """Put a changed copy of a weight file in its place, under another name perhaps; .bin is written by torch.save."""
    tensors = {k: v for key, value in safetensors.torch.load_file(file).items() for k, v in change(key, value)}
    file.unlink()
    target = file.with_name(name or file.name)
    torch.save(tensors, target) if target.suffix == ".bin" else safetensors.torch.save_file(tensors, target)


def as_published(folder, name, clip_prefix):
    def vae(key, tensor):
        for new, old in OLD_ATTENTION.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return [(key, tensor)]

    def clip(key, tensor):
        return [(clip_prefix + key.removeprefix("text_model."), tensor)]

    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", vae, name.format("diffusion_pytorch_model"))
    rewrite(folder / "unet/diffusion_pytorch_model.safetensors", lambda k, t: [(k, t)], name.format("diffusion_pytorch_model"))
    ids = torch.arange(77)[None]
    rewrite(folder / "text_encoder/model.safetensors",
            lambda k, t: clip(k, t) + [(f"{clip_prefix}embeddings.position_ids", ids)] * ("final_layer_norm.bias" in k),
            name.format("model" if "safetensors" in name else "pytorch_model"))


@pytest.mark.parametrize("name", ["{}.safetensors", "{}.fp16.safetensors", "{}.bin", "{}.fp16.bin"])
@pytest.mark.parametrize("prefix", ["text_model.", ""], ids=["transformers 4", "transformers 5.6"])
def test_folders_as_published_are_read(files, copy, name, prefix):
    as_published(copy, name, prefix)
    read = torch.load if "bin" in name else safetensors.torch.load_file
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in read(copy / "vae" / name.format("diffusion_pytorch_model"))
    assert_same(load(copy), load(files / "ours"))


def test_the_variant_that_is_asked_for_is_taken(files, copy):
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    half = {k: v.half() for k, v in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert_same(load(copy), load(files / "ours"))
    rounded = load(copy, variant="fp16")["diffusion"].conv_in.weight
    assert torch.equal(rounded, half["conv_in.weight"].float())
    assert "no component has the variant 'bf16'" in refused(copy, variant="bf16")


def test_a_sharded_folder_is_read(pair, files, copy):
    shutil.rmtree(copy / "unet")
    pair[1]["unet"].save_pretrained(copy / "unet", max_shard_size="200KB")
    assert len(list((copy / "unet").glob("*-of-*.safetensors"))) > 2
    assert_same(load(copy), load(files / "ours"))
    next((copy / "unet").glob("*-00002-of-*.safetensors")).unlink()
    assert "00002-of" in str(pytest.raises(CheckpointError, load, copy).value)


# ---- parts named on their own ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parts(files, ldm, tmp_path_factory):
    """Another VAE and another text encoder in every form in which people have them."""
    folder = tmp_path_factory.mktemp("parts")
    vae, clip = randomize(peer_vae(TINY.vae), 11), randomize(peer_clip(TINY.clip), 12)
    vae.save_pretrained(folder / "vae folder")
    clip.save_pretrained(folder / "clip folder")
    shutil.copytree(files / "theirs", folder / "whole")
    for name, part in (("vae folder", "vae"), ("clip folder", "text_encoder")):
        shutil.rmtree(folder / "whole" / part)
        shutil.copytree(folder / name, folder / "whole" / part)
    other = load(folder / "whole")
    save_checkpoint(other, folder / "whole.safetensors")
    alone = {k.removeprefix("first_stage_model."): v for k, v in ldm_state(other).items() if k.startswith("first_stage")}
    torch.save({"state_dict": alone | {"loss.logvar": torch.zeros(1), "model_ema.num_updates": torch.tensor(3)}},
               folder / "vae.ckpt")  # as vae-ft-mse-840000-ema-pruned.ckpt
    safetensors.torch.save_file(vae.state_dict(), folder / "vae.safetensors")
    text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in clip.state_dict().items()}
    vision = {"vision_model.post_layernorm.weight": torch.ones(3), "visual_projection.weight": torch.ones(3, 3),
              "text_projection.weight": torch.ones(3, 3), "logit_scale": torch.ones(())}
    safetensors.torch.save_file(text | vision, folder / "clip.safetensors")  # as openai/clip-vit-large-patch14
    return folder, other


@pytest.mark.parametrize("base", ["tiny.safetensors", "theirs"])
@pytest.mark.parametrize("argument, given", [
    ("vae", "vae folder"), ("vae", "whole"), ("vae", "whole.safetensors"), ("vae", "vae.ckpt"), ("vae", "vae.safetensors"),
    ("text_encoder", "clip folder"), ("text_encoder", "whole"), ("text_encoder", "whole.safetensors"),
    ("text_encoder", "clip.safetensors")])
def test_a_vae_or_a_text_encoder_comes_from_wherever_it_is_named(pair, files, parts, base, argument, given):
    folder, other = parts
    models = load(files / base, **{argument: folder / given})
    replaced = ("encoder", "decoder") if argument == "vae" else ("clip",)
    assert_same(models, other, only=replaced)
    assert_same(models, pair[0], only=set(models) - set(replaced))


@pytest.mark.parametrize("argument, component, prefix, folder", [
    ("vae", "vae", "first_stage_model.", "vae"), ("text_encoder", "text_encoder", "cond_stage_model.", "text_encoder")])
def test_a_checkpoint_without_a_part_names_the_argument_that_gives_it(ldm, parts, copy, tmp_path, argument, component, prefix,
                                                                      folder):
    path = tmp_path / "pruned.safetensors"
    safetensors.torch.save_file({k: v for k, v in ldm.items() if not k.startswith(prefix)}, path)
    shutil.rmtree(copy / folder)
    given = {argument: parts[0] / "whole"}
    for base, config in ((path, TINY), (copy, None)):
        assert f"has no {component} in it; name one with {argument}=" in refused(base, config=config)
        assert load(base, config=config, **given).keys() == {"clip", "encoder", "decoder", "diffusion"}


def test_a_separate_vae_of_another_size_is_refused(files, tmp_path):
    peer_vae(replace(TINY.vae, widths=(16, 16, 32, 32))).save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    message = str(pytest.raises(CheckpointError, load, files / "tiny.safetensors", vae=file).value)
    assert "tensors of the encoder are missing" in message or "are of another shape" in message


def test_a_vae_folder_brings_its_own_config(files, tmp_path):
    narrow = replace(TINY.vae, widths=(16, 16, 32, 32), scale=0.5)
    AutoencoderKL.save_pretrained(peer_vae(narrow), tmp_path / "vae")
    assert load(files / "theirs", vae=tmp_path / "vae").config.vae == narrow


# ---- SD 1.x is told by its shapes ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sd15():
    """Every LDM key of SD 1.5 at its true shape, without memory: zero strides."""
    with torch.device("meta"):
        state = ldm_state(Models(build_networks(SD15), SD15))
    return {k: torch.zeros(1).expand(t.shape) for k, t in state.items()}


def test_sd_1_5_and_its_inpainting_model_are_known_by_their_shapes(sd15, tmp_path):
    assert len(sd15) == 686 + 248 + 196
    inpainting = sd15 | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1).expand(320, 9, 3, 3)}
    for state, channels in ((sd15, 4), (inpainting, 9)):
        torch.save({"state_dict": state}, tmp_path / "sd.ckpt")
        assert (tmp_path / "sd.ckpt").stat().st_size < 1e6
        models = load(tmp_path / "sd.ckpt")
        assert models.config == replace(SD15, unet=replace(SD15.unet, in_channels=channels))
        assert models["diffusion"].conv_in.weight.shape == (320, channels, 3, 3)


def test_a_checkpoint_of_no_known_family_asks_for_a_config(ldm, tmp_path):
    path = tmp_path / "unknown.safetensors"
    safetensors.torch.save_file(ldm, path)
    message = refused(path)
    assert "no known family" in message and "widths (32, 64, 64, 64)" in message and "pass config=ModelConfig(...)" in message
    assert load(path, config=TINY).config == TINY


UNET = "model.diffusion_model."
FOREIGN = {
    "Stable Diffusion 2": {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024),
                           UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
    "SDXL": {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
             UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
             UNET + "label_emb.0.0.weight": (1280, 2816)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "img_in.weight": (3072, 64)},
    "Flux ": {UNET + "double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
    "Stable Diffusion 3": {UNET + "joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536)},
    "a LoRA, not a checkpoint": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320, 1, 1)},
    "a LoRA, not a checkpoint ": {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": (4, 320)},
    "a LoRA, not a checkpoint  ": {"diffusion_model.input_blocks.1.1.proj_in.lora_up.weight": (320, 4)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "a VAE": {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)},
    "a VAE ": {"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)},
    "a UNet of diffusers": {"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
    "a CLIP text encoder": {"text_model.encoder.layers.0.layer_norm1.bias": (768,)},
    "'something.else'": {"something.else": (3,)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_of_another_kind_is_called_by_its_name(sd15, tmp_path, what):
    state = {k: torch.zeros(1).expand(shape) for k, shape in FOREIGN[what].items()}
    if any(k.startswith(UNET + "input_blocks") for k in state):  # relatives of SD 1.x share most of its keys
        state = {k: v for k, v in sd15.items() if k.startswith(UNET)} | state
    torch.save(state, tmp_path / "foreign.ckpt")
    for config in (None, SD15):
        assert what.strip() in refused(tmp_path / "foreign.ckpt", config=config)


@pytest.mark.parametrize("changes, sentence", [
    ({"unet/config.json": {"use_linear_projection": True}}, "not Stable Diffusion 1.x: unet use_linear_projection = True"),
    ({"unet/config.json": {"transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time"}},
     "not Stable Diffusion 1.x: unet addition_embed_type = 'text_time'"),
    ({"unet/config.json": {"attention_head_dim": [5, 10, 20, 20]}}, r"attention_head_dim is [5, 10, 20, 20]"),
    ({"unet/config.json": {"attention_head_dim": 5}}, "UNet width 32 is not a multiple of its 5 heads"),
    ({"unet/config.json": {"norm_num_groups": 0}}, "describe no model of this kind"),
    ({"scheduler/scheduler_config.json": {"prediction_type": "sample"}}, "prediction"),
    ({"text_encoder/config.json": {"hidden_act": "relu"}}, "CLIP activation 'relu' is unknown"),
    ({"text_encoder/config.json": {"hidden_size": 64}}, "context of width 32, the text encoder gives 64"),
])
def test_a_folder_of_another_architecture_is_refused_with_the_field_that_tells(copy, changes, sentence):
    for name, values in changes.items():
        config = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(config | values))
    assert sentence in refused(copy)


def test_a_folder_of_a_transformer_model_says_what_it_is(copy):
    shutil.move(copy / "unet", copy / "transformer")
    index = json.loads((copy / "model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    (copy / "model_index.json").write_text(json.dumps(index))
    assert "has no unet in it (the folder is a FluxPipeline)" in refused(copy)


def test_the_config_in_our_metadata_is_checked(ldm, tmp_path):
    for bad in ("[]", "{", '{"unet": 3}', '{"colour": 1}', '{"unet": {"norm_groups": 0}}', '{"unet": {"widths": ["a"]}}'):
        safetensors.torch.save_file(ldm, tmp_path / "bad.safetensors", {CONFIG_KEY: bad})
        assert f"its {CONFIG_KEY} metadata is not a model config" in refused(tmp_path / "bad.safetensors")


keys = st.builds(lambda *parts: "".join(parts), st.sampled_from(["", "model.diffusion_model.input_blocks."]),
                 st.sampled_from(["0.", "1.", "2.", "x."]),
                 st.sampled_from(["0.op.weight", "0.in_layers.2.weight", "0.weight",
                                  "1.transformer_blocks.0.attn2.to_k.weight"]))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=8))
def test_no_set_of_keys_and_shapes_breaks_the_recognition(shapes):
    facts = ldm_facts(shapes)
    assert facts == {} or facts.keys() == {"in_channels", "widths", "layers_per_block", "context_width"}
    assert guess_checkpoint(shapes)


def test_a_lora_is_no_checkpoint_and_a_checkpoint_is_no_lora(pair, files, tmp_path):
    models = load(files / "tiny.safetensors")
    apply_lora_to_model({"diffusion": models["diffusion"]}, 2, name="x")
    loader.save_models_lora(models, tmp_path / "lora.safetensors")
    remove_lora(models)
    assert "it seems to be a LoRA, not a checkpoint" in refused(tmp_path / "lora.safetensors")
    with pytest.raises(LoRAFormatError, match="it seems to be a whole checkpoint, not a LoRA"):
        load_lora_into_models(models, files / "tiny.safetensors")


# ---- every tensor counts ---------------------------------------------------------------------------------------------

FULL = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s.pop(FULL), f"1 of 440 tensors of the diffusion are missing, first: {FULL}"),
    (lambda s: s.update({FULL: s[FULL][:, :5].clone()}),
     f"1 of 440 tensors of the diffusion are of another shape, first: {FULL} is [64, 5], expected [64, 32]"),
    (lambda s: s.update({UNET + "extra.weight": torch.ones(2)}),
     f"1 tensors belong to no part of this model, first: '{UNET}extra.weight'"),
    (lambda s: s.update({"first_stage_model.encoder.mid.attn_1.q.weight": torch.ones(32, 32, 3, 3)}),
     "first_stage_model.encoder.mid.attn_1.q.weight is [32, 32, 3, 3], expected [32, 32]"),
    (lambda s: s.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
     "first: cond_stage_model.transformer.text_model.final_layer_norm.bias"),
], ids=["missing", "misshapen", "unexpected", "3x3 in place of 1x1", "missing in CLIP"])
def test_a_tensor_that_is_missing_misshapen_or_unexpected_is_named(ldm, tmp_path, change, sentence):
    state = dict(ldm)
    change(state)
    safetensors.torch.save_file(state, tmp_path / "bad.safetensors")
    message = refused(tmp_path / "bad.safetensors", config=TINY)
    assert sentence in message and "it is some latent diffusion model" in message


def test_every_harmless_key_is_needed_and_none_hides_a_weight():
    matched = {pattern: [key for key in EXTRAS if re.fullmatch(pattern, key)] for pattern in HARMLESS}
    assert all(matched.values()), "a pattern that no published file needs"
    assert all(sum(key in found for found in matched.values()) == 1 for key in EXTRAS), "patterns that overlap"
    weights = {f"{spelling}.{tail}" for name in model_names(SD15) for tail in ("weight", "bias")
               for spelling in (name.ldm, name.diffusers, name.ldm.replace("transformer.text_model.", "transformer."))}
    near = {"model.betas", "unet.position_ids", "x.loss.logvar", "posterior_x", "model_emax", "betas2", "position_ids"}
    assert not [key for key in weights | near if any(re.fullmatch(pattern, key) for pattern in HARMLESS)]


# ---- memory ----------------------------------------------------------------------------------------------------------

BIG = ModelConfig(name="big", clip=CLIPConfig(width=512, layers=2, heads=8, mlp_width=1024), vae=TINY.vae,
                  unet=UNetConfig(widths=(128, 128, 256, 256), layers_per_block=1, heads=8, context_width=512))

MEASURE = """
import json, re, sys, torch
from sd.model_loader import preload_models_from_standard_weights
torch.ones(8, 8) @ torch.ones(8, 8)
def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = status("VmHWM")
models = preload_models_from_standard_weights(sys.argv[1], "cpu")
total = sum(p.sum().item() for m in models.values() for p in m.parameters())
print(json.dumps([status("VmHWM") - before, total]))
"""


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1.2), (torch.float16, 3.1)], ids=["fp32", "fp16 to fp32"])
def test_peak_memory_of_loading(tmp_path, dtype, limit):
    """fp32: at most 1.2 times the file. From fp16: the fp32 models, which are twice the file, and the file's own pages."""
    with torch.device("meta"):
        state = ldm_state(Models(build_networks(BIG), BIG))
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.rand(t.shape, generator=generator).to(dtype) for k, t in state.items()}
    path = tmp_path / "big.safetensors"
    safetensors.torch.save_file(state, path, {CONFIG_KEY: json.dumps(BIG.to_dict())})
    size = path.stat().st_size
    assert size > 200e6 * dtype.itemsize / 4
    run = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    peak, total = json.loads(run.stdout)
    expected = sum(t.double().sum().item() for t in state.values())
    assert total == pytest.approx(expected, rel=1e-4)
    assert 0.9 * size < peak < limit * size, peak / size


# ---- the rest --------------------------------------------------------------------------------------------------------

def test_the_model_hash_is_the_files_sha256(pair, files):
    import hashlib
    models = load(files / "tiny.safetensors")
    assert models.model_hash == hashlib.sha256((files / "tiny.safetensors").read_bytes()).hexdigest()[:10]
    assert load(files / "ours").model_hash is None and pair[0].model_hash is None


def test_new_models_are_the_same_for_the_same_seed_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    a, b, c = new_models(DIGITS, 1), new_models(DIGITS, 1), new_models(DIGITS, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(a, b)
    assert not torch.equal(a["clip"].token_embedding.weight, c["clip"].token_embedding.weight)
