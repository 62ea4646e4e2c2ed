"""The KL autoencoder, from pictures to latents and back, and the identity for models without one.

Legend: B batch, C channels, H, W pixels; latents are [B, 4, H/f, W/f] with f = config.factor.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.attention import SelfAttention
from sd.config import VAEConfig

EPS = 1e-6  # for every norm in the VAE, as in LDM; torch's default is 1e-5


class VAEEncoder(nn.Module):
    """Pictures [B, C, H, W] in [-1, 1] to the posterior's mean and logvar, [B, 4, H/f, W/f] each (Rombach et al. 2022)."""

    component = "encoder"

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        widths, z = config.widths, config.latent_channels
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], width, config, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z, 3, padding=1)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        mean, logvar = self.quant_conv(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)


class VAEDecoder(nn.Module):
    """Latents [B, 4, h, w] in the VAE's own scale to pictures [B, C, h f, w f], about [-1, 1]."""

    component = "decoder"

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        widths, z = config.widths[::-1], config.latent_channels
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.conv_in = nn.Conv2d(z, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, config, upsample=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(self.post_quant_conv(z))
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class ResNet(nn.Module):
    def __init__(self, c_in: int, c_out: int, config: VAEConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, c_in, eps=EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.norm_groups, c_out, eps=EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention with one head over all spatial positions."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=EPS)
        self.attention = SelfAttention(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        return x + self.attention(h).transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(channels, channels, config) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, config)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, config: VAEConfig, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(c_in if j == 0 else c_out, c_out, config)
                                     for j in range(config.layers_per_block))
        self.downsampler = Downsampler(c_out) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsampler is None else self.downsampler(x)


class UpBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, config: VAEConfig, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(c_in if j == 0 else c_out, c_out, config)
                                     for j in range(config.layers_per_block + 1))
        self.upsampler = Upsampler(c_out) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsampler is None else self.upsampler(x)


class Downsampler(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as LDM was trained


class Upsampler(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelEncoder(nn.Module):
    """The encoder of a model without an autoencoder: its latents are exactly the pixels."""

    component = "encoder"

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.full_like(x, -math.inf)


class PixelDecoder(nn.Module):
    """The decoder of a model without an autoencoder."""

    component = "decoder"

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config

    def forward(self, z: Tensor) -> Tensor:
        return z


def build_vae(config: VAEConfig) -> dict[str, nn.Module]:
    """Build the networks "encoder" and "decoder"."""
    encoder, decoder = (VAEEncoder, VAEDecoder) if config.widths else (PixelEncoder, PixelDecoder)
    return {"encoder": encoder(config), "decoder": decoder(config)}


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return mean + exp(logvar / 2) · noise, a form in which fp16 does not underflow."""
    return mean + torch.exp(0.5 * logvar) * noise
