"""Noise and timesteps of a micro-batch: pure functions of (seed, its number). B images, C channels, h, w latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.training.dataset.randomness import torch_rng

PYRAMID_LEVELS = 6


def draw_noise(shape: Sequence[int], config, number: int) -> tuple[Tensor, Tensor]:
    """(noise of the target, noise of x_t), [B, C, h, w] each, on the CPU.

    The former is N(0, 1), plus `noise_offset` times one number per image and channel (Guttenberg 2023), plus coarser noise
    (`pyramid`). The latter is the same plus `input_perturbation` times independent noise (Ning et al. 2023).
    """
    rng = torch_rng(config.seed, "noise", number)
    noise = torch.randn(tuple(shape), generator=rng)
    if config.noise_offset:
        noise = noise + config.noise_offset * torch.randn(*shape[:2], 1, 1, generator=rng)
    if config.pyramid_noise:
        noise = pyramid(noise, config.pyramid_noise, rng)
    if not config.input_perturbation:
        return noise, noise
    return noise, noise + config.input_perturbation * torch.randn(tuple(shape), generator=rng)


def pyramid(noise: Tensor, discount: float, rng: torch.Generator) -> Tensor:
    """Multi-resolution noise (Whitaker 2023, as in kohya): level i is smaller by r^i, r in 2..4, and is weighted by discount^i.

    noise: [B, C, h, w]; the sum is scaled to a standard deviation of 1.
    """
    h, w = noise.shape[-2:]
    total = noise.clone()
    for i in range(PYRAMID_LEVELS):
        ratio = (2 + 2 * torch.rand((), generator=rng).item()) ** i
        small = max(1, int(h / ratio)), max(1, int(w / ratio))
        level = torch.randn(*noise.shape[:2], *small, generator=rng)
        total += discount**i * F.interpolate(level, size=(h, w), mode="bilinear")
        if 1 in small:
            break
    return total / total.std()


def draw_timesteps(n: int, model_config, config, number: int) -> Tensor:
    """Integer timesteps [n], min_timestep <= t < max_timestep: uniform, or distributed as u^timestep_bias over that range.

    A bias above 1 favours small t (details), one below 1 large t (composition). For the continuous cosine schedule they are
    real numbers in fp32, between the first and the last of that range.
    """
    rng = torch_rng(config.seed, "timestep", number)
    low, high = config.min_timestep, config.max_timestep or model_config.train_timesteps
    if model_config.beta_schedule == "cosine":
        u = torch.rand(n, generator=rng, dtype=torch.float64)
        return (low + (high - 1 - low) * u**config.timestep_bias).float()
    if config.timestep_bias == 1:
        return torch.randint(low, high, (n,), generator=rng)
    u = torch.rand(n, generator=rng, dtype=torch.float64)
    return low + ((high - low) * u**config.timestep_bias).long()
