"""The noise of diffusion: alphas_cumprod, sigma <-> t, and the noise levels through which a sampler walks.

B batch, C channels, H, W latent height and width, T training timesteps, n sampling steps.
VP ("variance preserving") is the scale of the network: x_vp = sqrt(abar) x0 + sqrt(1 - abar) noise.
VE ("variance exploding") is that of the samplers: x_ve = x_vp / sqrt(abar) = x0 + sigma noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import atan, exp

import numpy as np
import torch
from torch import Tensor

from sd.config import ModelConfig
from sd.errors import SDError

SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "lcm")
LCM_STEPS = 50  # timesteps on which LCM models are distilled; sampling takes some of them
KARRAS_RHO = 7.0
LOG_SNR = 20.0  # of the cosine schedule at t = 0; at its end the negative


def betas(config: ModelConfig) -> Tensor:
    """Variances of the forward process, Ho et al. 2020, of a schedule that is made of them; returns [T] in fp64."""
    power = 2 if config.beta_schedule == "scaled_linear" else 1  # latent diffusion has them linear in sqrt(beta)
    start, end = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
    return torch.linspace(start, end, config.train_timesteps, dtype=torch.float64) ** power


def alphas_cumprod(config: ModelConfig) -> Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), Ho et al. 2020, equation 4, or of the cosine schedule; returns [T] in fp64.

    With zero_terminal_snr the last is 2^-24 instead of 0, so that sigma stays a number.
    """
    if config.beta_schedule == "cosine":
        return cosine_angle(torch.arange(config.train_timesteps, dtype=torch.float64), config.train_timesteps).cos().square()
    abar = torch.cumprod(1 - betas(config), dim=0)
    return zero_terminal(abar).clamp(min=2**-24) if config.zero_terminal_snr else abar


def zero_terminal(alphas_cumprod: Tensor) -> Tensor:
    """sqrt(abar) [T] shifted and scaled so that the last is 0 and the first stays, Lin et al. 2024, algorithm 1; [T]."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


def cosine_angle(t: Tensor, T: int) -> Tensor:
    """The angle whose cosine is sqrt(abar) and whose sine is sqrt(1 - abar), at any real t of 0..T-1.

    log SNR = -2 log tan(angle) falls from LOG_SNR to -LOG_SNR: Kingma et al. 2021 with the cosine of Nichol and Dhariwal 2021,
    as Hoogeboom et al. 2023, section 3.1, have it.
    """
    first, last = atan(exp(-LOG_SNR / 2)), atan(exp(LOG_SNR / 2))
    return first + (last - first) * t / (T - 1)


def t_to_sigma(t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """sigma = sqrt((1 - abar) / abar) at t [n], linear in between whole timesteps; returns [n] in fp64."""
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    low = t.floor().long().clamp(max=len(sigmas) - 2)
    return torch.lerp(sigmas[low], sigmas[low + 1], t.double() - low)


def sigma_to_t(sigma: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The t that belongs to sigma [n], linear in log sigma between timesteps, within 0..T-1; returns [n] in fp64."""
    log_sigmas = ((1 - alphas_cumprod) / alphas_cumprod).log() / 2
    log_sigma = sigma.double().log()
    high = torch.searchsorted(log_sigmas, log_sigma).clamp(1, len(log_sigmas) - 1)
    low = high - 1
    return low + ((log_sigma - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels of one walk: falling sigmas [n + 1], and timesteps [n], one for each sigma but the last.

    The result lies at the last. N(0, 1) noise times `start` is the x to begin with, the result times `end` is latents.
    """

    sigmas: Tensor
    timesteps: Tensor
    start: float

    def __post_init__(self):
        assert len(self.sigmas) == len(self.timesteps) + 1

    @property
    def end(self) -> float:
        """sqrt(abar) of the last sigma: 1 when that is 0."""
        return (1 + float(self.sigmas[-1]) ** 2) ** -0.5

    def timestep(self, sigma: float) -> float:
        """The t that belongs to one of the sigmas. Raises ValueError on any other sigma."""
        found = (self.sigmas[:-1] == sigma).nonzero()
        if not len(found):
            raise SDError(f"sigma {sigma} has no timestep in this schedule of {len(self.timesteps)} steps")
        return float(self.timesteps[found[0, 0]])


def schedule(spacing: str, n: int, alphas_cumprod: Tensor, *, extra_point: bool = False, fractional: bool = False,
             to_zero: bool = True, unit_start: bool = True) -> Schedule:
    """n steps: Lin et al. 2023, table 2 (first three), Karras et al. 2022, equation 5, even in log sigma, or LCM's.

    What samplers disagree on is said by their row in SAMPLERS. `extra_point`: leading and linspace lay a grid of n + 1
    points and leave out the last. `fractional`: t need not be whole. `to_zero`: the last sigma is 0, else that of t 0.
    `unit_start`: begin with N(0, 1) in VP, else (leading excepted) with noise of exactly the first sigma.
    Raises ValueError on an unknown spacing, and on an n for which there are not that many different steps.
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
            sigmas = torch.lerp(*ends ** (1 / KARRAS_RHO), ramp) ** KARRAS_RHO
        else:
            sigmas = torch.lerp(*ends.log(), ramp).exp()
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

    last = torch.zeros(1, dtype=torch.float64) if to_zero else t_to_sigma(torch.zeros(1), alphas_cumprod)
    sigma0 = float(sigmas[0])
    start = (1 + sigma0**2) ** 0.5 if unit_start or spacing == "leading" else sigma0
    return Schedule(torch.cat([sigmas, last]), timesteps, start)


def _timesteps(spacing: str, n: int, T: int, extra: int) -> Tensor:
    # numpy's grids: its last bit decides which way diffusers rounds a half, and with it t.
    if spacing == "leading":
        t = np.arange(n + extra)[::-1][:n] * (T // (n + extra))
        t = t + min(1, T - 1 - t[0])  # the offset of SD 1.5, for which the full chain of T steps has no room
    elif spacing == "trailing":
        t = np.arange(T, 0, -T / n)[:n].round() - 1  # without [:n] some n get a t of -1 more
    elif spacing == "linspace":
        t = np.linspace(0, T - 1, max(n + extra, 2))[::-1][:n]  # a single step is from the noisiest t
    else:
        steps = min(LCM_STEPS, T)
        t = (steps - np.linspace(0, steps, n, endpoint=False).astype(int)) * (T // steps) - 1
    return torch.tensor(t.astype(float))


def cut(schedule: Schedule, strength: float) -> Schedule:
    """The last int(n * strength) steps, for img2img: begin with latents + `start` * noise.

    Raises ValueError when strength is outside 0..1 or too small for one step.
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
    # The dtype first: not every device has fp64.
    values = values.to(like.dtype).to(like.device)
    return values[t.to(like.device)].view(-1, *[1] * (like.ndim - 1))
