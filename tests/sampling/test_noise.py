import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from sd.config import SD15, ConfigError, ModelConfig
from sd.sampling.noise import (
    add_noise,
    alphas_cumprod,
    betas,
    cosine_angle,
    cut,
    schedule,
    sigma_to_t,
    t_to_sigma,
    velocity,
)
from sd.sampling.spacings import SPACINGS

ABAR = alphas_cumprod(SD15)


@pytest.mark.parametrize("t, value", [(0, 0.99915), (100, 0.89422), (250, 0.67379), (500, 0.27633), (750, 0.05617),
                                      (980, 0.0058438), (999, 0.0046601)])
def test_alphas_cumprod_has_the_known_values_of_sd15(t, value):
    digits = len(f"{value}".split(".")[1])
    assert round(float(ABAR[t]), digits) == value


def test_alphas_cumprod_is_the_product_in_fp64():
    beta = np.linspace(SD15.beta_start**0.5, SD15.beta_end**0.5, 1000) ** 2
    assert ABAR.dtype == torch.float64 and ABAR.shape == (1000,)
    np.testing.assert_allclose(ABAR.numpy(), np.cumprod(1 - beta), rtol=1e-13)


def test_linear_betas_are_linear():
    config = ModelConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, train_timesteps=500)
    np.testing.assert_allclose(betas(config).numpy(), np.linspace(1e-4, 0.02, 500), rtol=1e-13)


def test_sigma_and_t_are_inverse_at_whole_timesteps():
    t = torch.arange(1000)
    sigmas = t_to_sigma(t, ABAR)
    torch.testing.assert_close(sigmas, ((1 - ABAR) / ABAR).sqrt(), rtol=0, atol=0)
    torch.testing.assert_close(sigma_to_t(sigmas, ABAR), t.double(), rtol=0, atol=1e-9)


def test_sigma_lies_on_a_line_between_timesteps_and_t_on_a_line_in_log_sigma():
    low, high = t_to_sigma(torch.tensor([300, 301]), ABAR)
    torch.testing.assert_close(t_to_sigma(torch.tensor([300.25]), ABAR)[0], 0.75 * low + 0.25 * high)
    torch.testing.assert_close(sigma_to_t((low * high).sqrt()[None], ABAR)[0], torch.tensor(300.5, dtype=torch.float64))


def test_sigma_to_t_stays_within_the_timesteps():
    assert sigma_to_t(torch.tensor([1e-6, 1e6]), ABAR).tolist() == [0, 999]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spacing=st.sampled_from(SPACINGS), n=st.integers(1, 1000), flags=st.tuples(*[st.booleans()] * 4))
def test_every_schedule_falls_from_a_valid_timestep_to_its_end(spacing, n, flags):
    names = ("extra_point", "fractional", "to_zero", "unit_start")
    options = dict(zip(names, flags, strict=True))
    try:
        made = schedule(spacing, n, ABAR, **options)
    except ValueError:
        assert n == 1000 and options["extra_point"] or spacing == "lcm" and n > 50
        return
    assert len(made.timesteps) == n and len(made.sigmas) == n + 1
    assert (made.sigmas[:-1].diff() < 0).all() and made.sigmas[-1] <= made.sigmas[-2]
    assert 0 <= made.timesteps.min() and made.timesteps.max() <= 999
    assert options["fractional"] or torch.equal(made.timesteps, made.timesteps.round())
    assert float(made.sigmas[-1]) == (0 if options["to_zero"] else float(((1 - ABAR[0]) / ABAR[0]).sqrt()))
    assert made.timestep(float(made.sigmas[n // 2])) == made.timesteps[n // 2]


def test_the_design_examples_of_leading_spacing_hold():
    assert schedule("leading", 20, ABAR).timesteps.tolist() == list(range(951, 0, -50))
    assert schedule("leading", 20, ABAR, extra_point=True).timesteps.tolist() == list(range(941, 1, -47))


def test_leading_spacing_can_take_the_full_chain():
    assert schedule("leading", 1000, ABAR).timesteps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "karras", "exponential", "lcm"])
def test_a_single_step_starts_at_the_noisiest_timestep(spacing):
    assert schedule(spacing, 1, ABAR).timesteps.tolist() == [999]


@pytest.mark.parametrize("n", [0, -3, 1001, 2.5, "20"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_an_impossible_number_of_steps_is_refused(spacing, n):
    with pytest.raises(ValueError, match=f"^{n!r} steps are not possible.*allowed: 1 to"):
        schedule(spacing, n, ABAR)


def test_an_unknown_spacing_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'cosine' is unknown; allowed: leading, trailing, linspace, karras"):
        schedule("cosine", 20, ABAR)


def test_steps_that_would_repeat_a_timestep_are_refused():
    with pytest.raises(ValueError, match="1000 steps with leading spacing repeat a timestep"):
        schedule("leading", 1000, ABAR, extra_point=True)


def test_a_sigma_outside_the_schedule_has_no_timestep():
    made = schedule("linspace", 10, ABAR)
    with pytest.raises(ValueError, match="sigma 0.0 has no timestep"):
        made.timestep(float(made.sigmas[-1]))


def test_start_is_unit_variance_in_vp_or_the_first_sigma():
    sigma0 = float(((1 - ABAR[999]) / ABAR[999]).sqrt())
    assert schedule("linspace", 10, ABAR).start == pytest.approx((1 + sigma0**2) ** 0.5)
    assert schedule("linspace", 10, ABAR, unit_start=False).start == pytest.approx(sigma0)
    leading = schedule("leading", 10, ABAR, unit_start=False)
    assert leading.start == pytest.approx(float(1 + leading.sigmas[0] ** 2) ** 0.5)


def test_end_is_the_vp_scale_of_the_last_sigma():
    assert schedule("leading", 10, ABAR).end == 1
    assert schedule("leading", 10, ABAR, to_zero=False).end == pytest.approx(float(ABAR[0]) ** 0.5)


@pytest.mark.parametrize("n, strength, kept", [(50, 0.8, 40), (50, 0.58, 28), (20, 1.0, 20), (20, 0.05, 1)])
def test_cut_keeps_as_many_steps_as_diffusers_img2img(n, strength, kept):
    whole = schedule("leading", n, ABAR)
    part = cut(whole, strength)
    assert torch.equal(part.timesteps, whole.timesteps[n - kept:])
    assert torch.equal(part.sigmas, whole.sigmas[n - kept:])
    assert part.start == float(part.sigmas[0])


@pytest.mark.parametrize("strength", [0, 0.01, 0.049])
def test_a_strength_too_small_for_one_step_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength {strength} of 20 steps leaves no step; use at least 1/20"):
        cut(schedule("leading", 20, ABAR), strength)


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_outside_0_to_1_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength is {strength}; allowed: 0 to 1"):
        cut(schedule("leading", 20, ABAR), strength)


@pytest.mark.parametrize("shape", [(4, 4, 8, 8), (4, 6)])
def test_add_noise_and_velocity_equal_diffusers_at_different_timesteps_in_a_batch(shape):
    peer = DDPMScheduler(beta_start=SD15.beta_start, beta_end=SD15.beta_end, beta_schedule="scaled_linear")
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.tensor([0, 31, 500, 999])
    torch.testing.assert_close(add_noise(x0, noise, t, ABAR), peer.add_noise(x0, noise, t), rtol=0, atol=2e-6)
    torch.testing.assert_close(velocity(x0, noise, t, ABAR), peer.get_velocity(x0, noise, t), rtol=0, atol=2e-6)


def test_add_noise_keeps_the_dtype_and_leaves_its_arguments_alone():
    x0, noise = torch.ones(2, 4, 2, 2, dtype=torch.bfloat16), torch.ones(2, 4, 2, 2, dtype=torch.bfloat16)
    assert add_noise(x0, noise, torch.tensor([1, 2]), ABAR).dtype == torch.bfloat16
    assert (x0 == 1).all() and (noise == 1).all()


# ---- schedules that SD 1.x does not have ---------------------------------------------------------------------------------

COSINE = ModelConfig(prediction="v", beta_schedule="cosine")
ZERO_SNR = ModelConfig(prediction="v", zero_terminal_snr=True)


def test_the_cosine_schedule_has_the_log_snr_of_hoogeboom_2023():
    t_min, t_max = math.atan(math.exp(-0.5 * 20)), math.atan(math.exp(-0.5 * -20))
    for t in (0.0, 0.4, 250.75, 500.0, 998.6, 999.0):
        log_snr = -2 * math.log(math.tan(t_min + t / 999 * (t_max - t_min)))
        angle = cosine_angle(torch.tensor(t, dtype=torch.float64), 1000)
        assert math.log(math.cos(angle) ** 2 / math.sin(angle) ** 2) == pytest.approx(log_snr, abs=1e-9)
        if t == int(t):
            assert float(alphas_cumprod(COSINE)[int(t)]) == pytest.approx(1 / (1 + math.exp(-log_snr)), rel=1e-9)


@pytest.mark.parametrize("spacing, theirs", [("linspace", {"timestep_spacing": "linspace"}),
                                             ("trailing", {"timestep_spacing": "trailing"})])
def test_a_zero_terminal_snr_has_the_sigmas_of_diffusers(spacing, theirs):
    peer = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                  rescale_betas_zero_snr=True, **theirs)
    peer.set_timesteps(12)
    ours = schedule(spacing, 12, alphas_cumprod(ZERO_SNR), fractional=True)
    np.testing.assert_allclose(ours.sigmas.numpy(), peer.sigmas.numpy(), rtol=2e-4)
    assert float(ours.sigmas[0]) > 4000


@pytest.mark.parametrize("change, message", [({"prediction": "eps", "zero_terminal_snr": True}, "predicts v"),
                                             ({"beta_schedule": "cosine", "zero_terminal_snr": True, "prediction": "v"},
                                              "schedule of betas")])
def test_a_zero_terminal_snr_that_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**change)
