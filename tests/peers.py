"""The same random weights in our networks and in those of diffusers and transformers."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sd.checkpoints.names import component_names, modern_key
from sd.clip import CLIP
from sd.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from sd.unet import UNet
from sd.vae import VAEDecoder, VAEEncoder


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values in every parameter: norm weights around 1, biases not 0, the rest at its usual spread."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.dim() == 1:
            noise = noise * 0.2 + (1.0 if name.endswith("weight") else 0.0)
        else:
            noise = noise * (p[0].numel() ** -0.5)
        p.data.copy_(noise)
    return module.eval()


def peer_unet(c: UNetConfig) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in c.attention[::-1]]
    return UNet2DConditionModel(
        in_channels=c.in_channels, out_channels=c.out_channels, block_out_channels=c.widths, down_block_types=down,
        up_block_types=up, layers_per_block=c.layers_per_block, attention_head_dim=c.heads,
        cross_attention_dim=c.context_width, norm_num_groups=c.norm_groups)


def peer_vae(c: VAEConfig) -> AutoencoderKL:
    n = len(c.widths)
    return AutoencoderKL(
        in_channels=c.image_channels, out_channels=c.image_channels, latent_channels=c.latent_channels,
        block_out_channels=c.widths, down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n,
        layers_per_block=c.layers_per_block, norm_num_groups=c.norm_groups, scaling_factor=c.scale)


def peer_clip(c: CLIPConfig) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, max_position_embeddings=c.max_tokens, hidden_act=c.activation,
        bos_token_id=49406, eos_token_id=49407, attn_implementation="sdpa"))


def copy_from_peer(ours: torch.nn.Module, peer: torch.nn.Module, folder: str) -> torch.nn.Module:
    """Load the peer's weights into our network, through the table of names; every key must match."""
    source = {modern_key(k, folder): v for k, v in peer.state_dict().items()}
    state = {}
    for name in component_names(ours.component, ours.config):
        for tail in ("weight", "bias"):
            if f"{name.diffusers}.{tail}" in source:
                state[f"{name.ours}.{tail}"] = source[f"{name.diffusers}.{tail}"]
    ours.load_state_dict(state, strict=True)
    return ours.eval()


def ours_and_peers(config: ModelConfig, dtype=torch.float32, seed: int = 0):
    """(our networks by component, the peer's networks by folder), with equal weights."""
    peers = {"unet": peer_unet(config.unet), "vae": peer_vae(config.vae), "text_encoder": peer_clip(config.clip)}
    for i, peer in enumerate(peers.values()):
        randomize(peer, seed + i).to(dtype)
    ours = {"clip": (CLIP(config.clip), "text_encoder"), "encoder": (VAEEncoder(config.vae), "vae"),
            "decoder": (VAEDecoder(config.vae), "vae"), "diffusion": (UNet(config.unet), "unet")}
    return {k: copy_from_peer(m.to(dtype), peers[folder], folder) for k, (m, folder) in ours.items()}, peers
