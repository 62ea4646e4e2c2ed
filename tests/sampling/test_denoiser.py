import pytest
import torch

from sd.config import SD15
from sd.sampling.denoiser import DENOISERS, CFGDenoiser, EpsDenoiser, VDenoiser
from sd.sampling.noise import add_noise, alphas_cumprod, schedule, velocity
from sd.sampling.samplers import SAMPLERS, run, sampler_schedule

ABAR = alphas_cumprod(SD15)
SCHEDULE = schedule("leading", 20, ABAR)
SIGMA = float(SCHEDULE.sigmas[7])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A network that keeps what it was called with and answers with `answer(x, context)`."""

    def __init__(self, answer=lambda x, context: torch.zeros_like(x)):
        self.answer = answer

    def __call__(self, x, t, context, rows):
        self.x, self.t, self.context, self.rows = x, t, context, rows
        return self.answer(x, context)


def mix(x, context):
    return torch.tanh(x) + context.mean(dim=(1, 2))[:, None, None, None]


def test_there_is_a_denoiser_for_every_prediction_type():
    assert DENOISERS == {"eps": EpsDenoiser, "v": VDenoiser}


@pytest.mark.parametrize("kind", DENOISERS)
def test_a_perfect_network_gives_x0_back(kind):
    x0, noise, t = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), SCHEDULE.timesteps[7].long().expand(2)
    target = noise if kind == "eps" else velocity(x0, noise, t, ABAR)
    network = Recorder(lambda x, context: target)
    x = x0 + SIGMA * noise
    got = DENOISERS[kind](network, SCHEDULE)(x, SIGMA, randn(2, 3, 5), torch.arange(2))
    torch.testing.assert_close(got, x0, rtol=0, atol=2e-6)
    torch.testing.assert_close(network.x, add_noise(x0, noise, t, ABAR), rtol=0, atol=2e-6)


def test_the_network_is_given_the_timestep_of_the_sigma_for_every_row():
    network = Recorder()
    EpsDenoiser(network, SCHEDULE)(randn(3, 4, 8, 8), SIGMA, randn(3, 3, 5), torch.arange(3))
    assert network.t.tolist() == [601.0] * 3 and network.t.dtype == torch.float32


def test_fractional_timesteps_reach_the_network():
    network, fractional = Recorder(), schedule("karras", 8, ABAR, fractional=True)
    EpsDenoiser(network, fractional)(randn(1, 4, 8, 8), float(fractional.sigmas[3]), randn(1, 3, 5), torch.arange(1))
    assert network.t.item() == pytest.approx(float(fractional.timesteps[3])) and network.t.item() % 1 > 0.01


@pytest.mark.parametrize("kind", DENOISERS)
def test_the_network_runs_in_its_dtype_and_the_sampler_in_fp32(kind):
    network = Recorder()
    x = randn(2, 4, 8, 8)
    got = DENOISERS[kind](network, SCHEDULE, dtype=torch.bfloat16)(x, SIGMA, randn(2, 3, 5), torch.arange(2))
    assert network.x.dtype == network.context.dtype == torch.bfloat16
    assert got.dtype == torch.float32
    if kind == "eps":  # what is not noise passes by the network, unrounded
        assert torch.equal(got, x)


def test_extra_channels_follow_their_image_unscaled():
    network, extra = Recorder(lambda x, context: x[:, :4]), randn(2, 5, 8, 8)
    denoise = CFGDenoiser(EpsDenoiser(network, SCHEDULE, extra=extra), randn(2, 3, 5), randn(1, 3, 5), 3.0)
    assert denoise(randn(2, 4, 8, 8), SIGMA).shape == (2, 4, 8, 8)
    assert network.x.shape == (4, 9, 8, 8)
    assert torch.equal(network.x[:, 4:], torch.cat([extra, extra]))


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("uncond_rows", [1, 3])
def test_guidance_of_x0_equals_guidance_of_what_the_network_predicts(kind, uncond_rows):
    x, cond, uncond = randn(3, 4, 8, 8), randn(3, 7, 5, seed=1), randn(uncond_rows, 7, 5, seed=2)
    got = CFGDenoiser(DENOISERS[kind](Recorder(mix), SCHEDULE), cond, uncond, 7.5)(x, SIGMA)

    def guided(x, context):
        low, high = mix(x, uncond.expand_as(cond)), mix(x, cond)
        return low + 7.5 * (high - low)

    want = DENOISERS[kind](Recorder(guided), SCHEDULE)(x, SIGMA, cond, torch.arange(3))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_a_guided_call_has_2b_rows_that_know_their_image_uncond_first():
    network, cond, uncond = Recorder(), randn(3, 7, 5, seed=1), randn(3, 7, 5, seed=2)
    CFGDenoiser(EpsDenoiser(network, SCHEDULE), cond, uncond, 2.0)(randn(3, 4, 8, 8), SIGMA)
    assert network.rows.tolist() == [0, 1, 2, 0, 1, 2] and network.rows.dtype == torch.int64
    assert torch.equal(network.context, torch.cat([uncond, cond]))
    assert torch.equal(network.x[:3], network.x[3:])


@pytest.mark.parametrize("uncond", [None, randn(1, 7, 5)])
def test_scale_1_calls_the_network_with_the_cond_rows_only(uncond):
    network, x, cond = Recorder(mix), randn(3, 4, 8, 8), randn(3, 7, 5, seed=1)
    got = CFGDenoiser(EpsDenoiser(network, SCHEDULE), cond, uncond, 1.0)(x, SIGMA)
    assert network.rows.tolist() == [0, 1, 2] and torch.equal(network.context, cond)
    assert torch.equal(got, EpsDenoiser(Recorder(mix), SCHEDULE)(x, SIGMA, cond, torch.arange(3)))


def test_scale_0_is_the_unconditional_estimate():
    x, cond, uncond = randn(2, 4, 8, 8), randn(2, 7, 5, seed=1), randn(2, 7, 5, seed=2)
    got = CFGDenoiser(EpsDenoiser(Recorder(mix), SCHEDULE), cond, uncond, 0.0)(x, SIGMA)
    want = EpsDenoiser(Recorder(mix), SCHEDULE)(x, SIGMA, uncond, torch.arange(2))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_guidance_without_an_unconditional_context_is_refused():
    with pytest.raises(ValueError, match="cfg_scale 7.5 needs an unconditional context"):
        CFGDenoiser(EpsDenoiser(Recorder(), SCHEDULE), randn(2, 7, 5), None, 7.5)


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 8, 5), (2, 7, 6)])
def test_an_unconditional_context_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"the unconditional context is \[.*, the other \[2, 7, 5\]"):
        CFGDenoiser(EpsDenoiser(Recorder(), SCHEDULE), randn(2, 7, 5), randn(*shape), 7.5)


def test_a_sigma_outside_the_schedule_is_refused():
    with pytest.raises(ValueError, match="sigma 0.123 has no timestep"):
        EpsDenoiser(Recorder(), SCHEDULE)(randn(1, 4, 8, 8), 0.123, randn(1, 3, 5), torch.arange(1))


def test_the_arguments_are_left_as_they_were():
    x, cond, uncond, extra = randn(2, 4, 8, 8), randn(2, 7, 5), randn(2, 7, 5), randn(2, 5, 8, 8)
    before = [a.clone() for a in (x, cond, uncond, extra)]
    network = Recorder(lambda x, context: x[:, :4])
    CFGDenoiser(VDenoiser(network, SCHEDULE, extra=extra), cond, uncond, 7.5)(x, SIGMA)
    assert all(torch.equal(a, b) for a, b in zip((x, cond, uncond, extra), before, strict=True))


class OnDevice(torch.Tensor):
    """A tensor whose values the host may not have: asking for them would wait for the device in every step."""

    WAIT = {getattr(torch.Tensor, name) for name in (
        "item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__array__")} | {
        torch.equal, torch.allclose, torch.nonzero, torch.unique}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func not in cls.WAIT, f"{func.__name__} waits for the device"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_waits_for_the_device(name, kind):
    steps = sampler_schedule(name, 6, ABAR)
    cond, uncond, extra = (randn(*shape).as_subclass(OnDevice) for shape in ((2, 7, 5), (2, 7, 5), (2, 5, 8, 8)))
    network = DENOISERS[kind](lambda x, t, context, rows: mix(x[:, :4], context), steps, extra=extra)
    x = run(name, CFGDenoiser(network, cond, uncond, 3.0), randn(2, 4, 8, 8).as_subclass(OnDevice), steps,
            noise=lambda i: randn(2, 4, 8, 8, seed=i).as_subclass(OnDevice))
    assert type(x) is OnDevice
    with pytest.raises(AssertionError, match="item waits"):
        x.sum().item()
