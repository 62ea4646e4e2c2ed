"""What tests of checkpoints share: comparing models and outputs; two LoRAs, and the checkpoint with their changes."""

import os

import pytest
import safetensors.torch
import torch

from sd.checkpoints.names import model_names
from sd.config import TINY
from sd.files.tensor_file import CheckpointError
from sd.model_loader import preload_models_from_standard_weights
from tests.lora_files.cases import pair

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def load(path, **kwargs):
    return preload_models_from_standard_weights(path, "cpu", **kwargs)


def assert_same(a, b, dtype=None, only=None):
    for component in only or a:
        x, y = a[component].state_dict(), b[component].state_dict()
        assert x.keys() == y.keys()
        for key, tensor in x.items():
            assert torch.equal(tensor if dtype is None else tensor.to(dtype), y[key]), f"{component}.{key}"


def refused(path, **kwargs):
    with pytest.raises(CheckpointError) as error:
        load(path, **kwargs)
    message = str(error.value)
    assert os.path.basename(path) in message and "\n" not in message
    return message


def outputs(unet, vae, clip):
    """What diffusers' and transformers' networks give for fixed inputs."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 49406, (2, 77), generator=g)
    latents, image = torch.randn(2, 4, 8, 8, generator=g), torch.randn(1, 3, 64, 64, generator=g)
    with torch.no_grad():
        context = clip(tokens)[0]
        return [context, unet(latents, torch.tensor([3, 700]), context).sample, vae.decode(latents).sample,
                vae.encode(image).latent_dist.parameters]


def our_outputs(models):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 49406, (2, 77), generator=g)
    latents, image = torch.randn(2, 4, 8, 8, generator=g), torch.randn(1, 3, 64, 64, generator=g)
    with torch.no_grad():
        context = models["clip"](tokens)
        return [context, models["diffusion"](latents, torch.tensor([3, 700]), context), models["decoder"](latents),
                torch.cat(models["encoder"](image), dim=1)]


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 2e-5 * b.abs().max() and b.std() > 0.01


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # no bias
IN = "lora_unet_conv_in"
PROJ = "lora_unet_mid_block_attentions_0_proj_in"
NORM = "lora_unet_mid_block_resnets_0_norm1"
TEXT = "lora_te_text_model_encoder_layers_1_mlp_fc1"
LDM = {Q: "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
       IN: "model.diffusion_model.input_blocks.0.0", PROJ: "model.diffusion_model.middle_block.1.proj_in",
       NORM: "model.diffusion_model.middle_block.0.in_layers.0",
       TEXT: "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1"}


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


ONE = (pair(Q, 32, 32, 3, 2.0, scale=0.1) | pair(IN, 32, 4, 2, 3.0, (3, 3), seed=2, scale=0.1)
       | pair(TEXT, 64, 32, 4, 1.0, seed=4, scale=0.1))
TWO = pair(Q, 32, 32, 5, 4.0, seed=6, scale=0.1) | {
    f"{PROJ}.diff": rand(64, 64, 1, 1, seed=8), f"{PROJ}.diff_b": rand(64, seed=9),
    f"{NORM}.w_norm": rand(64, seed=10), f"{NORM}.b_norm": rand(64, seed=11)}


def change(tensors, module):
    """(ΔW, Δb) of one module of a file by the published formulas, in fp64; None where the file has none."""
    t = {key.removeprefix(module + "."): value.double() for key, value in tensors.items() if key.startswith(module + ".")}
    if "lora_up.weight" in t:
        down, up = t["lora_down.weight"], t["lora_up.weight"]
        return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:]) * t["alpha"] / len(down), None
    return t.get("diff", t.get("w_norm")), t.get("diff_b", t.get("b_norm"))


def expected(base, loras):
    """{LDM key: W + Σ m ΔW in fp64} of every tensor that the files change; `base`: {LDM key: tensor}."""
    sums = {}
    for tensors, multiplier in loras:
        for module, ldm in LDM.items():
            for tail, delta in zip(("weight", "bias"), change(tensors, module)):
                if delta is not None:
                    key = f"{ldm}.{tail}"
                    sums[key] = sums.get(key, base[key].double()) + multiplier * delta
    return sums


def as_ldm(path):
    """A file's tensors, or a folder's under the names that they have in LDM layout."""
    if path.is_file():
        return safetensors.torch.load_file(path)
    parts = {part: {k: v for file in (path / part).glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}
             for part in ("unet", "vae", "text_encoder")}
    part_of = {"diffusion": "unet", "clip": "text_encoder", "encoder": "vae", "decoder": "vae"}
    tensors = {}
    for name in model_names(TINY):
        for tail in ("weight", "bias"):
            tensor = parts[part_of[name.component]].get(f"{name.diffusers}.{tail}")
            if tensor is not None:
                conv = name.ldm_conv and tail == "weight"
                tensors[f"{name.ldm}.{tail}"] = tensor[:, :, None, None] if conv else tensor
    return tensors


def write(path, tensors, metadata=None):
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def assert_merged(found, base, sums, dtype=None):
    assert found.keys() == base.keys() and len(sums) > 1
    for key, tensor in base.items():
        want = dtype or tensor.dtype
        assert found[key].dtype == want, key
        if key in sums:
            assert not torch.equal(found[key], tensor.to(want)), key
            ulp = torch.finfo(want).eps * sums[key].abs() / 2  # of the one rounding; fp32 sums round a little before
            assert ((found[key].double() - sums[key]).abs() <= 1.01 * ulp + 2e-7 * (0.5 + sums[key].abs())).all(), key
        else:
            assert torch.equal(found[key].flatten().view(torch.uint8), tensor.to(want).flatten().view(torch.uint8)), key
