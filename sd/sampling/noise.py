"""Noise levels of diffusion: alphas_cumprod, sigma <-> t, and the schedules that samplers follow.

B batch, C channels, H, W latent height and width, T training timesteps, n sampling steps.
VP ("variance preserving") is the scale of the network: x_vp = sqrt(abar) x0 + sqrt(1 - abar) noise.
VE ("variance exploding") is the scale of the samplers: x_ve = x_vp / sqrt(abar) = x0 + sigma noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import atan, exp

import numpy as np
import torch
from torch import Tensor

from sd.config import ModelConfig
from sd.errors import SDError
from sd.sampling.spacings import SPACINGS

LCM_STEPS = 50  # timesteps on which LCM models are distilled; sampling uses a subset
KARRAS_RHO = 7.0
LOG_SNR = 20.0  # of the cosine schedule at t = 0; -LOG_SNR at its end


def betas(config: ModelConfig) -> Tensor:
    """Variances beta of the forward process, Ho et al. 2020, for schedules defined by them; returns [T] in fp64."""
    power = 2 if config.beta_schedule == "scaled_linear" else 1  # latent diffusion: linear in sqrt(beta)
    start, end = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
    return torch.linspace(start, end, config.train_timesteps, dtype=torch.float64) ** power


def alphas_cumprod(config: ModelConfig) -> Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), Ho et al. 2020, equation 4, or the cosine schedule's; returns [T] in fp64.

    With zero_terminal_snr the last value is 2^-24 instead of 0, which keeps sigma finite.
    """
    if config.beta_schedule == "cosine":
        return cosine_angle(torch.arange(config.train_timesteps, dtype=torch.float64), config.train_timesteps).cos().square()
    abar = torch.cumprod(1 - betas(config), dim=0)
    return zero_terminal(abar).clamp(min=2**-24) if config.zero_terminal_snr else abar


def zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """abar [T] with its root shifted and scaled to end in 0, the first unchanged, Lin et al. 2024, algorithm 1; [T]."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


def cosine_angle(t: Tensor, T: int) -> Tensor:
    """The angle with cosine sqrt(abar) and sine sqrt(1 - abar), at any real t in 0..T-1.

    log SNR = -2 log tan(angle) falls from LOG_SNR to -LOG_SNR: Kingma et al. 2021 with the cosine of Nichol and Dhariwal 2021,
    as in Hoogeboom et al. 2023, section 3.1.
    """
    first, last = atan(exp(-LOG_SNR / 2)), atan(exp(LOG_SNR / 2))
    return first + (last - first) * t / (T - 1)


def t_to_sigma(t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """sigma = sqrt((1 - abar) / abar) at t [n], interpolated linearly between whole timesteps; returns [n] in fp64."""
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    low = t.floor().long().clamp(max=len(sigmas) - 2)
    return torch.lerp(sigmas[low], sigmas[low + 1], t.double() - low)


def sigma_to_t(sigma: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The t for each sigma [n], interpolated linearly in log sigma, clamped to 0..T-1; returns [n] in fp64."""
    log_sigmas = ((1 - alphas_cumprod) / alphas_cumprod).log() / 2
    log_sigma = sigma.double().log()
    high = torch.searchsorted(log_sigmas, log_sigma).clamp(1, len(log_sigmas) - 1)
    low = high - 1
    return low + ((log_sigma - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels of one sampling run: falling sigmas [n + 1], and timesteps [n], one for each sigma except the last.

    Sampling starts from N(0, 1) noise times `start`; the result, at the last sigma, times `end` gives latents.
    """

    sigmas: Tensor
    timesteps: Tensor
    start: float

    def __post_init__(self):
        assert len(self.sigmas) == len(self.timesteps) + 1

    @property
    def end(self) -> float:
        """sqrt(abar) at the last sigma; 1 if that is 0."""
        return (1 + float(self.sigmas[-1]) ** 2) ** -0.5

    def timestep(self, sigma: float) -> float:
        """The t of one of the sigmas. Raises SDError for any other sigma."""
        found = (self.sigmas[:-1] == sigma).nonzero()
        if not len(found):
            raise SDError(f"sigma {sigma} has no timestep in this schedule of {len(self.timesteps)} steps")
        return float(self.timesteps[found[0, 0]])


def schedule(spacing: str, n: int, alphas_cumprod: Tensor, *, extra_point: bool = False, fractional: bool = False,
             to_zero: bool = True, unit_start: bool = True) -> Schedule:
    """n steps: Lin et al. 2023, table 2 (first three), Karras et al. 2022, equation 5, even in log sigma, or LCM's.

    The options differ between samplers (see SAMPLERS). `extra_point`: leading and linspace use a grid of n + 1 points
    without the last. `fractional`: t need not be whole. `to_zero`: the last sigma is 0, otherwise that of t = 0.
    `unit_start`: start from N(0, 1) in VP; otherwise (except for leading) from noise of exactly the first sigma.
    Raises SDError for an unknown spacing, and for more steps than there are distinct timesteps.
    """
    T = len(alphas_cumprod)
    most = min(LCM_STEPS, T) if spacing == "lcm" else T
    if spacing not in SPACINGS:
        raise SDError(f"spacing {spacing!r} is unknown; allowed: {', '.join(SPACINGS)}")
    if not isinstance(n, int) or not 1 <= n <= most:
        raise SDError(f"{n!r} steps are not possible with {spacing} spacing; allowed: 1 to {most}")

    if spacing in ("karras", "exponential"):
        ends = t_to_sigma(torch.tensor([T - 1, 0]), alphas_cumprod)
        ramp = torch.linspace(0, 1, n, dtype=torch.float64)
        if spacing == "karras":
            first, last = ends ** (1 / KARRAS_RHO)
            sigmas = torch.lerp(first, last, ramp) ** KARRAS_RHO
        else:
            first, last = ends.log()
            sigmas = torch.lerp(first, last, ramp).exp()
        timesteps = sigma_to_t(sigmas, alphas_cumprod)
        if not fractional:
            timesteps = timesteps.round()
    else:
        timesteps = _timesteps(spacing, n, T, int(extra_point))
        if not fractional:
            timesteps = timesteps.round()
        sigmas = t_to_sigma(timesteps, alphas_cumprod)
    if not (sigmas.diff() < 0).all():
        raise SDError(f"{n} steps with {spacing} spacing repeat a timestep; use fewer steps or another spacing")

    end = torch.zeros(1, dtype=torch.float64) if to_zero else t_to_sigma(torch.zeros(1), alphas_cumprod)
    sigma0 = float(sigmas[0])
    start = (1 + sigma0**2) ** 0.5 if unit_start or spacing == "leading" else sigma0
    return Schedule(torch.cat([sigmas, end]), timesteps, start)


def _timesteps(spacing: str, n: int, T: int, extra: int) -> Tensor:
    t: np.ndarray
    # numpy's grids, as diffusers has them: their last bit decides which way a half is rounded.
    if spacing == "leading":
        t = np.arange(n + extra)[::-1][:n] * (T // (n + extra))
        t = t + min(1, T - 1 - t[0])  # SD 1.5's offset of 1, for which the full chain of T steps leaves no room
    elif spacing == "trailing":
        t = np.arange(T, 0, -T / n)[:n].round() - 1  # without [:n] some n get an extra t of -1
    elif spacing == "linspace":
        t = np.linspace(0, T - 1, max(n + extra, 2))[::-1][:n]  # a single step starts at the noisiest t
    else:
        steps = min(LCM_STEPS, T)
        t = (steps - np.linspace(0, steps, n, endpoint=False).astype(int)) * (T // steps) - 1
    return torch.tensor(t.astype(float))


def cut(schedule: Schedule, strength: float) -> Schedule:
    """The last int(n * strength) steps, for img2img: start from latents + `start` * noise.

    Raises SDError when strength is outside 0..1 or too small for one step.
    """
    n = len(schedule.timesteps)
    if not 0 <= strength <= 1:
        raise SDError(f"strength is {strength}; allowed: 0 to 1")
    first = n - min(int(n * strength), n)
    if first == n:
        raise SDError(f"strength {strength} of {n} steps leaves no step; use at least 1/{n}, or more steps")
    sigmas = schedule.sigmas[first:]
    return replace(schedule, sigmas=sigmas, timesteps=schedule.timesteps[first:], start=float(sigmas[0]))


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, Ho et al. 2020, equation 4; [B, C, H, W], whole t [B]."""
    return _at(alphas_cumprod.sqrt(), t, x0) * x0 + _at((1 - alphas_cumprod).sqrt(), t, x0) * noise


def velocity(x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v = sqrt(abar_t) noise - sqrt(1 - abar_t) x0, Salimans and Ho 2022, appendix D; [B, C, H, W], whole t [B]."""
    return _at(alphas_cumprod.sqrt(), t, x0) * noise - _at((1 - alphas_cumprod).sqrt(), t, x0) * x0


def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    # dtype first: not every device supports fp64.
    values = values.to(like.dtype).to(like.device)
    return values[t.to(like.device)].view(-1, *[1] * (like.ndim - 1))
