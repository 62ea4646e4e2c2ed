"""Samplers: generators that take x down the sigmas; `run` drives one; SAMPLERS lists them with their schedules.

A sampler knows nothing of networks, prompts or guidance: `x0 = yield i, x, sigma` asks, in step i, for the estimate x0 at
x and sigma. It asks once or twice per step, only at the sigmas of its schedule and never at the last, and returns x at the
last sigma. The driver decides how to answer. `run` calls one `denoise`; a driver of many samplers may collect their
requests, answer them in one network call (each row with its own sigma), and send each sampler its x0.
x [B, C, H, W] is fp32 in VE scale (x0 + sigma noise); `sigmas` [n + 1] fall. `noise(i)`, shaped like x, is the N(0, 1)
noise of step i: requested in rising order, at most once per step, and not by steps that add none (those to a sigma of 0).
In this scale DDPM, DDIM and Euler share one formula and differ in schedule, start and end.
The formulas are plain arithmetic on x, so that this file, whose table the flags are described from, does without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import expm1, log, sqrt
from typing import TYPE_CHECKING

from sd.errors import SDError
from sd.sampling.spacings import SPACINGS

if TYPE_CHECKING:
    from torch import Tensor

    from sd.sampling.noise import Schedule

    Walk = Generator[tuple[int, Tensor, float], Tensor, Tensor]  # yields (step, x, sigma), is sent x0, returns x


def run(name: str, denoise: Callable[[Tensor, float], Tensor], x: Tensor, schedule: Schedule, *,
        noise: Callable[[int], Tensor] | None = None, on_step: Callable[[int, int, Tensor], None] | None = None,
        eta: float = 0.0) -> Tensor:
    """Run sampler `name` from x [B, C, H, W] at the first sigma down to the last, both in VE scale.

    `denoise(x, sigma) -> x0`. `on_step(i, n, x0)` is called after step i of n, with the first x0 of that step.
    Raises SDError as `walk` does.
    """
    walker, n = walk(name, x, schedule, noise=noise, eta=eta), len(schedule.timesteps)
    step = 0
    first: Tensor | None = None  # x0 of the step
    x0: Tensor | None = None
    while True:
        i, x, sigma = _question(walker, x0, n)
        if i > step:
            if on_step is not None and first is not None:
                on_step(step, n, first)
            step, first = i, None
        if i == n:
            return x
        x0 = denoise(x, sigma)
        first = x0 if first is None else first


def walk(name: str, x: Tensor, schedule: Schedule, *, noise: Callable[[int], Tensor] | None = None, eta: float = 0.0) -> Walk:
    """The generator of sampler `name`, to be driven by `run` or together with others.

    Raises SDError for an eta outside 0..1, for an eta the sampler does not take, and for missing noise.
    """
    row = SAMPLERS[name]
    check_eta(name, eta)
    if noise is None and (row.stochastic or eta > 0):
        raise SDError("this sampler adds noise: it needs noise=, a function that returns the noise of step i")
    options = {"eta": eta} if row.takes_eta else {}
    return row.sample(x, schedule.sigmas.tolist(), noise=noise, **options)  # Python floats: fp64, no device sync


def check_eta(name: str, eta: float) -> None:
    """Raises SDError for an eta outside 0..1, and for one above 0 with a sampler that takes none."""
    if not 0 <= eta <= 1:
        raise SDError(f"eta is {eta}; allowed: 0 to 1")
    if eta and not SAMPLERS[name].takes_eta:
        having = [other for other, row in SAMPLERS.items() if row.takes_eta]
        raise SDError(f"eta is {eta} for {name}; only {' and '.join(having)} {'has' if len(having) == 1 else 'have'} an eta")


def _question(walker: Walk, x0: Tensor | None, n: int) -> tuple[int, Tensor, float]:
    """The sampler's next request (step, x, sigma); once it has ended, (n, result, 0)."""
    try:
        return next(walker) if x0 is None else walker.send(x0)
    except StopIteration as end:
        return n, end.value, 0.0


def sample_ddim(x, sigmas, *, noise=None, eta=0.0):
    """DDIM, Song et al. 2021, equations 12 and 16; eta 0 is the ODE, 1 the ancestral sampler. n draws if eta > 0."""
    steps = _steps(sigmas)
    for i, s, s_next in steps:
        x0 = yield i, x, s
        up = eta * s_next * sqrt(1 - (s_next / s) ** 2)
        down = sqrt(s_next**2 - up**2)
        x = x0 + down / s * (x - x0)
        if up > 0:
            x = x + up * noise(i)
    return x


def sample_ddpm(x, sigmas, *, noise=None):
    """DDPM with the posterior's variance, Ho et al. 2020, equations 6 and 7. n - 1 draws."""
    return (yield from sample_ddim(x, sigmas, noise=noise, eta=1.0))


def sample_euler(x, sigmas, *, noise=None):
    """Euler steps of dx/dsigma = (x - x0) / sigma, Karras et al. 2022, equation 3. No draws."""
    return (yield from sample_ddim(x, sigmas))


def sample_euler_a(x, sigmas, *, noise=None):
    """Ancestral Euler, as in k-diffusion: a step down to sigma_down, then noise up to the next sigma. n - 1 draws."""
    return (yield from sample_ddim(x, sigmas, noise=noise, eta=1.0))


def sample_heun(x, sigmas, *, noise=None):
    """Heun steps, Karras et al. 2022, algorithm 1; the last is an Euler step. 2n - 1 calls, no draws."""
    steps = _steps(sigmas)
    for i, s, s_next in steps:
        x0 = yield i, x, s
        d = (x - x0) / s
        if i < len(steps) - 1:
            x_euler = x + (s_next - s) * d
            d = (d + (x_euler - (yield i, x_euler, s_next)) / s_next) / 2
        x = x + (s_next - s) * d
    return x


ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def sample_pndm(x, sigmas, *, noise=None):
    """PLMS: Adams-Bashforth on eps, Liu et al. 2022, equations 9 and 12, after one Heun step. n + 1 calls, no draws."""
    steps = _steps(sigmas)
    history = []
    for i, s, s_next in steps:
        x0 = yield i, x, s
        history = [(x - x0) / s, *history[:3]]
        eps = sum(c * e for c, e in zip(ADAMS_BASHFORTH[len(history) - 1], history))
        if i == 0 and len(steps) > 1:
            x_euler = x + (s_next - s) * eps
            eps = (eps + (x_euler - (yield i, x_euler, s_next)) / s_next) / 2
        x = x + (s_next - s) * eps
    return x


def sample_dpmpp_2m(x, sigmas, *, noise=None):
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2; the first and last steps are first-order. No draws."""
    steps = _steps(sigmas)
    x0_before = s_before = None
    for i, s, s_next in steps:
        x0 = yield i, x, s
        d = x0 if i in (0, len(steps) - 1) else _midpoint(x0, x0_before, s_before, s, s_next)
        x = s_next / s * x + (1 - s_next / s) * d
        x0_before, s_before = x0, s
    return x


def sample_dpmpp_2m_sde(x, sigmas, *, noise=None):
    """SDE-DPM-Solver++(2M), Lu et al. 2022b; the first and last steps are first-order. n - 1 draws."""
    steps = _steps(sigmas)
    x0_before = s_before = None
    for i, s, s_next in steps:
        x0 = yield i, x, s
        d = x0 if i in (0, len(steps) - 1) else _midpoint(x0, x0_before, s_before, s, s_next)
        q = (s_next / s) ** 2
        x = q * x + (1 - q) * d
        if s_next > 0:
            x = x + s_next * sqrt(1 - q) * noise(i)
        x0_before, s_before = x0, s
    return x


def sample_unipc(x, sigmas, *, noise=None):
    """UniPC of order 2 with B(h) = e^h - 1, Zhao et al. 2023, algorithms 1 and 2, on x0. No draws.

    The predictor is DPM-Solver++(2M); each x0 is used again to correct the x at which it was computed.
    """
    steps = _steps(sigmas)
    x_before, x0s, before = x, [], []
    for i, s, s_next in steps:
        x0 = yield i, x, s
        x0s, before = [*x0s[-2:], x0], [*before[-2:], s]
        if i > 0:
            x = _correct(x_before, x0s, before)
        x_before = x
        d = x0 if i in (0, len(steps) - 1) else _midpoint(x0, x0s[-2], before[-2], s, s_next)
        x = s_next / s * x + (1 - s_next / s) * d
    return x


def sample_lcm(x, sigmas, *, noise=None):
    """Multistep consistency sampling, Luo et al. 2023, algorithm 3. n - 1 draws.

    The paper's c_skip and c_out are omitted: on its schedule (t >= 19) they are within 1e-5 of 0 and 1.
    """
    steps = _steps(sigmas)
    for i, s, s_next in steps:
        x = x0 = yield i, x, s
        if s_next > 0:
            x = x0 + s_next * noise(i)
    return x


def _steps(sigmas: Sequence[float]) -> list[tuple[int, float, float]]:
    """(i, sigma, next sigma) for each step."""
    return [(i, s, s_next) for i, (s, s_next) in enumerate(pairwise(sigmas))]


def _midpoint(x0, x0_before, s_before, s, s_next):
    """x0 at the midpoint (in lambda = -log sigma) of the step s -> s_next, extrapolated linearly from the last two."""
    r = log(s_before / s) / log(s / s_next)
    return x0 + (x0 - x0_before) / (2 * r)


def _correct(x, x0s, sigmas):
    """UniC: redo the step sigmas[-2] -> sigmas[-1] from x, now knowing x0 at its end; x0s, sigmas: the last 2 or 3."""
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
    """A row of SAMPLERS: the function, and its schedule as diffusers has it for SD 1.5 (see `schedule`)."""

    sample: Callable[..., Walk]
    spacing: str  # default, one of `spacings`
    spacings: tuple[str, ...] = SPACINGS[:-1]
    order: int = 1  # lower bound on the order of convergence in the step size
    stochastic: bool = False  # always needs noise=; samplers with an eta need it only if eta > 0
    takes_eta: bool = False
    extra_point: bool = False  # leading spacing steps by T // (n + 1), as DPM-Solver's does
    fractional: bool = False  # karras and exponential keep fractions of timesteps
    to_zero: bool = True  # the last sigma is 0, not that of timestep 0
    unit_start: bool = True  # starts at noise of variance 1 in VP scale, not at sigma times noise in VE


EQUAL = ("leading", "trailing", "linspace")  # equal steps in t, which the Adams-Bashforth coefficients assume

SAMPLERS = {
    "ddpm": Sampler(sample_ddpm, "leading", stochastic=True),
    "ddim": Sampler(sample_ddim, "leading", takes_eta=True, to_zero=False),
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
    """The n-step schedule of sampler `name`, with its default spacing or another. Raises SDError for one it lacks."""
    if name not in SAMPLERS:
        raise SDError(f"sampler {name!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    row = SAMPLERS[name]
    spacing = row.spacing if spacing is None else spacing
    if spacing not in row.spacings:
        raise SDError(f"spacing {spacing!r} is not possible with sampler {name}; allowed: {', '.join(row.spacings)}")
    from sd.sampling.noise import schedule
    return schedule(spacing, n, alphas_cumprod, extra_point=row.extra_point, fractional=row.fractional,
                    to_zero=row.to_zero, unit_start=row.unit_start)
