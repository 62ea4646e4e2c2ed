"""The denoising UNet of Stable Diffusion 1.x.

Legend: B rows, C channels, H, W latent height and width, N = H * W, L tokens, D context width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.adapters.switch import checkpoint
from sd.attention import CrossAttention, SelfAttention
from sd.config import UNetConfig


class UNet(nn.Module):
    """x: [B, C, H, W] noisy latents, t: [B] timesteps 0..999 (fractions allowed), context: [B, L, D]; returns eps or v."""

    component = "diffusion"

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block's activations in backward: less memory, a third more time
        widths, n = config.widths, config.layers_per_block
        emb = 4 * widths[0]
        self.time_embedding = TimeEmbedding(widths[0], emb)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        skips = [widths[0]]  # channels of the skip connections
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            self.down_blocks.append(DownBlock(widths[max(i - 1, 0)], width, emb, config.attention[i], not last, config))
            skips += [width] * (n if last else n + 1)

        self.mid_block = MidBlock(widths[-1], emb, config)

        self.up_blocks = nn.ModuleList()
        c_in = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            skip = [skips.pop() for _ in range(n + 1)]
            self.up_blocks.append(UpBlock(c_in, width, skip, emb, config.attention[i], i > 0, config))
            c_in = width

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb = self.time_embedding(t, x.dtype)
        x = self.conv_in(x)
        skips = [x]
        block: Any  # in torch's stubs, a ModuleList yields plain Modules
        for block in self.down_blocks:
            x, left = self.run(block, x, emb, context)
            skips += left
        x = self.run(self.mid_block, x, emb, context)
        for block in self.up_blocks:
            n = len(block.resnets)
            left, skips = skips[-n:], skips[:-n]
            size = skips[-1].shape[2:] if skips else None  # upsample to the next skip, whose size may be odd
            x = self.run(block, x, emb, context, left, size)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def run(self, block: nn.Module, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args)
        return block(*args)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, emb: int):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, emb)
        self.linear_2 = nn.Linear(emb, emb)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed the sinusoids of t: [B], cosines first, in fp32 whatever the network's dtype; returns [B, 4 · width]."""
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t.float()[:, None] * frequencies  # [B, width / 2]
        x = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResNet(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, c_out)
        self.norm2 = nn.GroupNorm(config.norm_groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Transformer(nn.Module):
    """One transformer block over all spatial positions, between two 1x1 convolutions."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, config)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x))
        h = h.flatten(2).transpose(1, 2)  # [B, N, C]
        h = self.transformer_blocks[0](h, context)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])  # [B, C, H, W]
        return x + self.proj_out(h)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(config.heads, channels, in_proj_bias=False)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(config.heads, channels, config.context_width, in_proj_bias=False)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = GEGLU(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class GEGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020): fc2(a · gelu(b)) with [a, b] = fc1(x)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, 8 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(x * F.gelu(gate))


class DownBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb: int, attention: bool, downsample: bool, config: UNetConfig):
        super().__init__()
        n = config.layers_per_block
        self.resnets = nn.ModuleList(ResNet(c_in if j == 0 else c_out, c_out, emb, config) for j in range(n))
        self.attentions = nn.ModuleList(Transformer(c_out, config) for _ in range(n if attention else 0))
        self.downsampler = Downsampler(c_out) if downsample else None

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        left = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[j](x, context)
            left.append(x)
        if self.downsampler is not None:
            x = self.downsampler(x)
            left.append(x)
        return x, left


class MidBlock(nn.Module):
    def __init__(self, channels: int, emb: int, config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(channels, channels, emb, config) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(channels, config)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, emb), context)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, skips: list[int], emb: int, attention: bool, upsample: bool,
                 config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet((c_in if j == 0 else c_out) + skip, c_out, emb, config)
                                     for j, skip in enumerate(skips))
        self.attentions = nn.ModuleList(Transformer(c_out, config) for _ in skips if attention)
        self.upsampler = Upsampler(c_out) if upsample else None

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, left: list[Tensor], size) -> Tensor:
        for j, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, left[-1 - j]], dim=1), emb)
            if self.attentions:
                x = self.attentions[j](x, context)
        return x if self.upsampler is None else self.upsampler(x, size)


class Downsampler(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsampler(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
