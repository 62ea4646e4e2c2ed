"""Samplers: plain functions that walk x down the sigmas, and SAMPLERS, the table of what else differs between them.

x [B, C, H, W] is in VE scale (x0 + sigma noise), in fp32; `sigmas` [n + 1] fall. `denoise(x, sigma) -> x0` is all that
a sampler knows of networks, prompts and guidance; it is asked at the sigmas, never at the last. `noise(i)`, like x, is
the N(0, 1) noise of step i: asked for in rising order, once a step, not by a step that adds none (one to a sigma of 0).
`on_step(i, n, x0)` is told the estimate of step i of n when the step is done. The result is x at the last sigma.
In this scale DDPM, DDIM and Euler are one formula: they differ by schedule, start and end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import expm1, log, sqrt

from torch import Tensor

from sd.errors import SDError
from sd.sampling.noise import SPACINGS, Schedule, schedule


def sample_ddim(denoise, x, sigmas, *, noise=None, on_step=None, eta=0.0):
    """DDIM, Song et al. 2021, equations 12 and 16; eta 0 is the ODE, 1 the ancestral sampler. n draws if eta > 0."""
    if not 0 <= eta <= 1:
        raise SDError(f"eta is {eta}; allowed: 0 to 1")
    if eta > 0:
        _require(noise)
    steps = _steps(sigmas)
    for i, (s, s_next) in enumerate(steps):
        x0 = denoise(x, s)
        up = eta * s_next * sqrt(1 - (s_next / s) ** 2)
        down = sqrt(s_next**2 - up**2)
        x = x0 + down / s * (x - x0)
        if up > 0:
            x = x + up * noise(i)
        if on_step:
            on_step(i, len(steps), x0)
    return x


def sample_ddpm(denoise, x, sigmas, *, noise=None, on_step=None):
    """DDPM with the posterior's variance, Ho et al. 2020, equations 6 and 7. n - 1 draws."""
    return sample_ddim(denoise, x, sigmas, noise=noise, on_step=on_step, eta=1.0)


def sample_euler(denoise, x, sigmas, *, noise=None, on_step=None):
    """Euler steps of dx/dsigma = (x - x0) / sigma, Karras et al. 2022, equation 3. No draws."""
    return sample_ddim(denoise, x, sigmas, on_step=on_step)


def sample_euler_a(denoise, x, sigmas, *, noise=None, on_step=None):
    """Ancestral Euler: a step down to sigma_down and noise up to the next sigma, k-diffusion. n - 1 draws."""
    return sample_ddim(denoise, x, sigmas, noise=noise, on_step=on_step, eta=1.0)


def sample_heun(denoise, x, sigmas, *, noise=None, on_step=None):
    """Heun steps, Karras et al. 2022, algorithm 1; the last is an Euler step. 2n - 1 calls, no draws."""
    steps = _steps(sigmas)
    for i, (s, s_next) in enumerate(steps):
        x0 = denoise(x, s)
        d = (x - x0) / s
        if i < len(steps) - 1:
            x_euler = x + (s_next - s) * d
            d = (d + (x_euler - denoise(x_euler, s_next)) / s_next) / 2
        x = x + (s_next - s) * d
        if on_step:
            on_step(i, len(steps), x0)
    return x


ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def sample_pndm(denoise, x, sigmas, *, noise=None, on_step=None):
    """PLMS: Adams-Bashforth on eps, Liu et al. 2022, equations 9 and 12, after one Heun step. n + 1 calls, no draws."""
    steps = _steps(sigmas)
    history = []
    for i, (s, s_next) in enumerate(steps):
        x0 = denoise(x, s)
        history = [(x - x0) / s, *history[:3]]
        eps = sum(c * e for c, e in zip(ADAMS_BASHFORTH[len(history) - 1], history))
        if i == 0 and len(steps) > 1:
            x_euler = x + (s_next - s) * eps
            eps = (eps + (x_euler - denoise(x_euler, s_next)) / s_next) / 2
        x = x + (s_next - s) * eps
        if on_step:
            on_step(i, len(steps), x0)
    return x


def sample_dpmpp_2m(denoise, x, sigmas, *, noise=None, on_step=None):
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2; first and last step are of first order. No draws."""
    steps = _steps(sigmas)
    x0_before = s_before = None
    for i, (s, s_next) in enumerate(steps):
        x0 = denoise(x, s)
        d = x0 if i in (0, len(steps) - 1) else _midpoint(x0, x0_before, s_before, s, s_next)
        x = s_next / s * x + (1 - s_next / s) * d
        x0_before, s_before = x0, s
        if on_step:
            on_step(i, len(steps), x0)
    return x


def sample_dpmpp_2m_sde(denoise, x, sigmas, *, noise=None, on_step=None):
    """SDE-DPM-Solver++(2M) of Lu et al. 2022b; first and last step are of first order. n - 1 draws."""
    _require(noise)
    steps = _steps(sigmas)
    x0_before = s_before = None
    for i, (s, s_next) in enumerate(steps):
        x0 = denoise(x, s)
        d = x0 if i in (0, len(steps) - 1) else _midpoint(x0, x0_before, s_before, s, s_next)
        q = (s_next / s) ** 2
        x = q * x + (1 - q) * d
        if s_next > 0:
            x = x + s_next * sqrt(1 - q) * noise(i)
        x0_before, s_before = x0, s
        if on_step:
            on_step(i, len(steps), x0)
    return x


def sample_unipc(denoise, x, sigmas, *, noise=None, on_step=None):
    """UniPC of order 2 with B(h) = e^h - 1, Zhao et al. 2023, algorithms 1 and 2, on x0. No draws.

    The predictor is DPM-Solver++(2M); each x0 is used a second time, to correct the x at which it was computed.
    """
    steps = _steps(sigmas)
    x_before, x0s, before = x, [], []
    for i, (s, s_next) in enumerate(steps):
        x0 = denoise(x, s)
        x0s, before = [*x0s[-2:], x0], [*before[-2:], s]
        if i > 0:
            x = _correct(x_before, x0s, before)
        x_before = x
        d = x0 if i in (0, len(steps) - 1) else _midpoint(x0, x0s[-2], before[-2], s, s_next)
        x = s_next / s * x + (1 - s_next / s) * d
        if on_step:
            on_step(i, len(steps), x0)
    return x


def sample_lcm(denoise, x, sigmas, *, noise=None, on_step=None):
    """Multistep consistency sampling, Luo et al. 2023, algorithm 3. n - 1 draws.

    The paper's c_skip and c_out are left out: on its schedule (t >= 19) they are less than 1e-5 from 0 and 1.
    """
    _require(noise)
    steps = _steps(sigmas)
    for i, (s, s_next) in enumerate(steps):
        x = x0 = denoise(x, s)
        if s_next > 0:
            x = x0 + s_next * noise(i)
        if on_step:
            on_step(i, len(steps), x0)
    return x


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    # Python floats: fp64, and no waiting for a device.
    return list(pairwise(sigmas.tolist()))


def _require(noise) -> None:
    if noise is None:
        raise SDError("this sampler adds noise: it needs noise=, a function that gives the noise of step i")


def _midpoint(x0, x0_before, s_before, s, s_next):
    """x0 in the middle (in lambda = -log sigma) of the step s -> s_next, on the line through the last two estimates."""
    r = log(s_before / s) / log(s / s_next)
    return x0 + (x0 - x0_before) / (2 * r)


def _correct(x, x0s, sigmas):
    """UniC: the step sigmas[-2] -> sigmas[-1] from x again, now with x0 at its end; x0s, sigmas: the last 2 or 3."""
    *older, s, s_next = sigmas
    *x0s_older, x0, x0_end = x0s
    d = (x0_end - x0) / 2
    if older:
        hh = log(s_next / s)  # -h of the paper
        b = expm1(hh)
        phi2 = expm1(hh) / hh - 1
        phi3 = phi2 / hh - 1 / 2
        r = log(older[0] / s) / -hh
        # Weights of the two slopes: [[1, 1], [-r, 1]] rho = [phi2, 2 phi3] / b.
        rho = (phi2 - 2 * phi3) / (b * (1 + r))
        d = rho * (x0 - x0s_older[0]) / r + (phi2 / b - rho) * (x0_end - x0)
    return s_next / s * x + (1 - s_next / s) * (x0 + d)


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS: the function, and its schedule as diffusers lays it for SD 1.5 (see `schedule`)."""

    sample: Callable
    spacing: str  # the default one of `spacings`
    spacings: tuple[str, ...] = SPACINGS[:-1]
    order: int = 1  # of convergence in the step size; more is possible
    stochastic: bool = False  # needs noise= always; ddim does when eta > 0
    extra_point: bool = False
    fractional: bool = False
    to_zero: bool = True
    unit_start: bool = True


EQUAL = ("leading", "trailing", "linspace")  # the steps in t for which Adams-Bashforth has its coefficients

SAMPLERS = {
    "ddpm": Sampler(sample_ddpm, "leading", stochastic=True),
    "ddim": Sampler(sample_ddim, "leading", to_zero=False),
    "pndm": Sampler(sample_pndm, "leading", EQUAL, order=2, to_zero=False),
    "euler": Sampler(sample_euler, "linspace", fractional=True, unit_start=False),
    "euler_a": Sampler(sample_euler_a, "linspace", stochastic=True, fractional=True, unit_start=False),
    "heun": Sampler(sample_heun, "linspace", order=2, fractional=True, unit_start=False),
    "dpmpp_2m": Sampler(sample_dpmpp_2m, "linspace", order=2, extra_point=True),
    "dpmpp_2m_sde": Sampler(sample_dpmpp_2m_sde, "linspace", stochastic=True, extra_point=True),
    "unipc": Sampler(sample_unipc, "linspace", order=2, extra_point=True),
    "lcm": Sampler(sample_lcm, "lcm", ("lcm",), stochastic=True),
}


def sampler_schedule(name: str, n: int, alphas_cumprod: Tensor, spacing: str | None = None) -> Schedule:
    """The n steps of sampler `name`, by its default spacing or another. Raises ValueError on what it does not have."""
    if name not in SAMPLERS:
        raise SDError(f"sampler {name!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    row = SAMPLERS[name]
    spacing = row.spacing if spacing is None else spacing
    if spacing not in row.spacings:
        raise SDError(f"spacing {spacing!r} is not possible with sampler {name}; allowed: {', '.join(row.spacings)}")
    return schedule(spacing, n, alphas_cumprod, extra_point=row.extra_point, fractional=row.fractional,
                    to_zero=row.to_zero, unit_start=row.unit_start)
