"""diffusers and PEFT for bench.gpu: the same cases with random weights of the same size. Imported only where both are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet_of(b) -> Any:
    """diffusers' UNet of the same shape, with its own random initial values, channels_last as ours."""
    c = b.config.unet
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in c.attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in c.attention[::-1]]
    torch.manual_seed(0)
    with torch.device(b.device):
        unet = UNet2DConditionModel(
            sample_size=b.side, in_channels=c.in_channels, out_channels=c.out_channels, layers_per_block=c.layers_per_block,
            block_out_channels=c.widths, down_block_types=down, up_block_types=up, cross_attention_dim=c.context_width,
            attention_head_dim=c.heads, norm_num_groups=c.norm_groups)
    return unet.to(b.dtype).to(memory_format=torch.channels_last).requires_grad_(False).eval()


def add_loras(unet: Any, names) -> None:
    for name in names:
        unet.add_adapter(LoraConfig(r=8, lora_alpha=6, target_modules=ATTENTION), name)
    unet.requires_grad_(False)


@torch.no_grad()
def steps(b, inputs: Callable) -> None:
    """Base, one LoRA, one fused LoRA, and four LoRAs in four calls."""
    unet, names = unet_of(b), ("a0", "a1", "a2", "a3")

    def say(what: str, batch: int, call: Callable) -> None:
        row = b.time(call)
        b.say("peers", what, who="diffusers", mode="eager", batch=batch, **row, it_s=round(1e3 / row["ms"], 2))

    for batch in (1, 4, 8) if b.cuda else (1,):
        given = inputs(b, 2 * batch)
        say("base", batch, lambda given=given: unet(*given, return_dict=False))
    add_loras(unet, names)
    one = inputs(b, 2)

    def four() -> None:
        for name in names:
            unet.set_adapter(name)
            unet(*one, return_dict=False)

    unet.set_adapter("a0")
    say("adapters", 1, lambda: unet(*one, return_dict=False))
    say("four in four calls", 4, four)
    unet.set_adapter("a0")
    unet.fuse_lora()
    say("fused", 1, lambda: unet(*one, return_dict=False))


def training(b, train_rows: Callable) -> None:
    """A step with cached inputs, and the step of diffusers' script, which encodes pictures and captions in every step."""
    unet = unet_of(b)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=6, target_modules=ATTENTION))
    factors = [p for p in unet.parameters() if p.requires_grad]
    for p in factors:
        p.data = p.data.float()
    unet.train()
    encode = encoder_of(b)
    for batch in (1, 4, 16) if b.cuda else (1,):
        for checkpointing in (False, True):
            (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
            for each in (None, encode):
                train_rows(b, lambda *x: unet(*x, return_dict=False)[0], factors, batch, checkpointing,
                           "diffusers + PEFT", each)


def encoder_of(b) -> Callable[[int], tuple[Tensor, Tensor]]:
    """batch -> (latents, context) of random pictures and captions, by diffusers' VAE and transformers' text encoder."""
    v, c = b.config.vae, b.config.clip
    with torch.device(b.device):
        vae: Any = AutoencoderKL(
            in_channels=v.image_channels, out_channels=v.image_channels, latent_channels=v.latent_channels,
            block_out_channels=v.widths, layers_per_block=v.layers_per_block, norm_num_groups=v.norm_groups,
            down_block_types=["DownEncoderBlock2D"] * len(v.widths), up_block_types=["UpDecoderBlock2D"] * len(v.widths))
        text: Any = CLIPTextModel(CLIPTextConfig(
            vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, max_position_embeddings=c.max_tokens))
    dtype = torch.float32 if b.dtype == torch.float16 else b.dtype
    for network in (vae, text):
        network.to(dtype).requires_grad_(False).eval()

    @torch.no_grad()
    def encode(batch: int) -> tuple[Tensor, Tensor]:
        size = b.config.image_size
        pixels = torch.rand(batch, v.image_channels, size, size, device=b.device, dtype=dtype) * 2 - 1
        tokens = torch.randint(0, c.vocab_size, (batch, c.max_tokens), device=b.device)
        return vae.encode(pixels).latent_dist.sample() * v.scale, text(tokens)[0]

    return encode
