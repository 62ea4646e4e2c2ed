import inspect
import math

import diffusers
import pytest
import torch

from sd.config import SD15
from sd.sampling.denoiser import DENOISERS, CFGDenoiser
from sd.sampling.noise import Schedule, alphas_cumprod, cut, sigma_to_t
from sd.sampling.samplers import SAMPLERS, run, sampler_schedule, walk
from tests.sampling.peers import peer_of, samplers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
ABAR = alphas_cumprod(SD15)

# Not 1: the peer begins a single linspace step at t = 0, ours at 999.
STEPS = [2, 3, 4, 5, 6, 7, 8, 10, 15, 19, 20, 21, 25, 27, 30, 48, 50, 51, 61, 96, 99, 100, 103, 128, 200, 250, 333, 500,
         501, 750, 998]
# What both have; the others are refused by SAMPLERS or by the peer.
PAIRS = [(name, spacing) for name, row in SAMPLERS.items() for spacing in row.spacings
         if spacing not in ("karras", "exponential") or name in samplers(other_spacings=True)]


def schedule_of(peer):
    """The peer's timesteps and sigmas as a Schedule, without the entries that Heun and PNDM have twice."""
    t, alpha = peer.timesteps.double(), peer.alphas_cumprod.double()
    if isinstance(peer, diffusers.HeunDiscreteScheduler):
        return Schedule(torch.cat([peer.sigmas[::2], peer.sigmas[-1:]]).double(), t[::2], float(peer.init_noise_sigma))
    if not hasattr(peer, "sigmas"):
        if isinstance(peer, diffusers.PNDMScheduler) and len(t) > 1:
            t = torch.cat([t[:1], t[2:]])
        keeps_alpha = isinstance(peer, (diffusers.DDIMScheduler, diffusers.PNDMScheduler))
        last = peer.final_alpha_cumprod.double() if keeps_alpha else torch.ones((), dtype=torch.float64)
        alpha = torch.cat([alpha[t.long()], last[None]])
        sigmas = ((1 - alpha) / alpha).sqrt()
    else:
        sigmas = peer.sigmas.double()
    unit = (1 + float(sigmas[0]) ** 2) ** 0.5
    return Schedule(sigmas, t, unit if float(peer.init_noise_sigma) == 1 else float(peer.init_noise_sigma))


class Network:
    """A smooth, nonlinear eps or v of (x_vp, t) that mixes channels and neighbours, and remembers its inputs."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(4, 4, generator=generator) / 2
        self.bias = torch.randn(4, 1, 1, generator=generator)
        self.inputs, self.timesteps = [], []

    def __call__(self, x, t, context=None, rows=None):
        t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1)
        self.inputs.append(x)
        self.timesteps.append(float(t[0]))
        mixed = torch.einsum("oc,bchw->bohw", self.weight, x) + x.roll(1, -1) / 3
        return 0.6 * x * (t / 1000) + 0.4 * torch.tanh(mixed + self.bias * torch.cos(t / 150))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_peer(peer, noise, seed, **more):
    return walk_peer(peer, noise * peer.init_noise_sigma, peer.timesteps, seed, **more)


def walk_peer(peer, latents, timesteps, seed, **more):
    network = Network()
    if "generator" in inspect.signature(peer.step).parameters:
        more["generator"] = torch.Generator().manual_seed(seed)
    for t in timesteps:
        x = peer.scale_model_input(latents, t)
        latents = peer.step(network(x, t), t, latents, **more).prev_sample
    return network, latents


def step_noise(shape, seed):
    """noise(i), which checks that the steps ask in order, at most once."""
    generator, asked = torch.Generator().manual_seed(seed), [-1]

    def noise(i):
        assert i == asked[-1] + 1
        asked.append(i)
        return torch.randn(shape, generator=generator)

    return noise


def run_ours(name, schedule, noise, seed, prediction="eps", **more):
    network, x = Network(), noise * schedule.start
    denoise = CFGDenoiser(DENOISERS[prediction](network, schedule), torch.zeros(len(noise), 1, 1))
    x = run(name, denoise, x, schedule, noise=step_noise(noise.shape, seed), **more)
    return network, x * schedule.end


def assert_same_walk(ours, theirs, atol):
    (network, latents), (peer_network, peer_latents) = ours, theirs
    assert len(network.inputs) == len(peer_network.inputs)
    assert network.timesteps == pytest.approx(peer_network.timesteps, abs=2e-3)
    for x, peer_x in zip([*network.inputs, latents], [*peer_network.inputs, peer_latents]):
        torch.testing.assert_close(x, peer_x, rtol=0, atol=atol * float(peer_x.abs().max().clamp(min=1)))


def follows_its_timesteps(name, spacing, n):
    return name in samplers(own_steps=True) or spacing == "leading" or spacing == "trailing" and 1000 % n == 0


@pytest.mark.parametrize("name, spacing, n", [(*pair, n) for pair in PAIRS for n in (1, 2, 3, 5, 14, 20)
                                              if follows_its_timesteps(*pair, n)])
def test_the_whole_trajectory_equals_diffusers_on_its_sigmas_and_timesteps(name, spacing, n):
    peer = peer_of(name, spacing)
    peer.set_timesteps(n)
    noise = randn(2, 4, 6, 5)
    assert_same_walk(run_ours(name, schedule_of(peer), noise, 1), run_peer(peer, noise, 1), atol=2e-5)


@pytest.mark.parametrize("name", samplers(same_v=True))
def test_the_whole_trajectory_equals_diffusers_with_v_prediction(name):
    peer = peer_of(name, None, prediction_type="v_prediction")
    peer.set_timesteps(10)
    noise = randn(2, 4, 6, 5)
    assert_same_walk(run_ours(name, schedule_of(peer), noise, 1, "v"), run_peer(peer, noise, 1), atol=2e-5)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_equals_diffusers(eta):
    peer = peer_of("ddim", None)
    peer.set_timesteps(10)
    noise = randn(2, 4, 6, 5)
    ours = run_ours("ddim", schedule_of(peer), noise, 1, eta=eta)
    assert_same_walk(ours, run_peer(peer, noise, 1, eta=eta), atol=2e-5)


@pytest.mark.parametrize("n", [4, 20, 33])
@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_to_latents_on_our_own_default_schedule_equals_the_scheduler_that_sd15_users_have(name, n):
    peer = peer_of(name, None)
    peer.set_timesteps(n)
    noise = randn(2, 4, 6, 5)
    assert_same_walk(run_ours(name, sampler_schedule(name, n, ABAR), noise, 1), run_peer(peer, noise, 1), atol=2e-4)


@pytest.mark.parametrize("name, spacing", PAIRS)
def test_schedules_equal_diffusers_for_any_number_of_steps(name, spacing):
    peer = peer_of(name, spacing)
    for n in [n for n in STEPS if spacing != "lcm" or n <= 50]:
        peer.set_timesteps(n)
        ours, theirs = sampler_schedule(name, n, ABAR, spacing), schedule_of(peer)
        # Trailing has n + 1 timesteps there for some n, with -1 as the last.
        assert len(theirs.timesteps) == n or spacing == "trailing" and theirs.timesteps[n:].tolist() == [-1]
        if spacing in ("karras", "exponential"):
            t = sigma_to_t(ours.sigmas[:-1], ABAR)
            assert torch.equal(ours.timesteps, t if SAMPLERS[name].fractional else t.round())
            # Theirs come from fp32 sigmas. Exponential ones are cut to whole numbers there, karras ones rounded.
            whole = 0 if SAMPLERS[name].fractional else {"karras": 0.5, "exponential": 1}[spacing]
            torch.testing.assert_close(t, theirs.timesteps, rtol=0, atol=whole + 2e-3)
        else:
            fp32 = 5e-5 if SAMPLERS[name].fractional else 0
            torch.testing.assert_close(ours.timesteps, theirs.timesteps[:n], rtol=0, atol=fp32)
        torch.testing.assert_close(ours.sigmas[:-1], theirs.sigmas[:n], rtol=2e-5, atol=0)
        if len(theirs.timesteps) == n:
            torch.testing.assert_close(ours.sigmas[-1], theirs.sigmas[-1], rtol=5e-5, atol=0)
            assert ours.start == pytest.approx(theirs.start, rel=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_default_spacing_is_that_of_diffusers_for_sd15(name):
    peer = peer_of(name, None)
    assert SAMPLERS[name].spacing in ("lcm", peer.config.timestep_spacing)


@pytest.mark.parametrize("strength", [0.34, 0.8, 1.0])
@pytest.mark.parametrize("name", samplers(same_middle=True))
def test_img2img_equals_diffusers_begun_in_the_middle(name, strength):
    n, image, noise = 10, randn(2, 4, 6, 5, seed=3), randn(2, 4, 6, 5)
    peer = peer_of(name, None)
    peer.set_timesteps(n)
    first = (n - int(n * strength)) * peer.order
    if hasattr(peer, "set_begin_index"):
        peer.set_begin_index(first)
    t = peer.timesteps[first:]
    theirs = walk_peer(peer, peer.add_noise(image, noise, t[:1].repeat(2)), t, 1)

    part, network = cut(sampler_schedule(name, n, ABAR), strength), Network()
    denoise = CFGDenoiser(DENOISERS["eps"](network, part), torch.zeros(2, 1, 1))
    x = run(name, denoise, image + noise * part.start, part, noise=step_noise(noise.shape, 1))
    assert_same_walk((network, x * part.end), theirs, atol=2e-4)


# A Gaussian N(MEAN, WIDTH^2) for data, whose best denoiser and whose ODE are known in closed form.
MEAN, WIDTH = 0.7, 0.5


def gaussian(x, sigma):
    return (MEAN * sigma**2 + WIDTH**2 * x) / (sigma**2 + WIDTH**2)


def flow(x, sigma, end):
    return MEAN + (x - MEAN) * math.sqrt((WIDTH**2 + end**2) / (WIDTH**2 + sigma**2))


def down(*sigmas):
    return Schedule(torch.tensor(sigmas, dtype=torch.float64), torch.zeros(len(sigmas) - 1), 1.0)


def log_sigmas(n, high=10.0, low=0.05):
    return torch.linspace(math.log(high), math.log(low), n + 1, dtype=torch.float64).exp().tolist()


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if not row.stochastic])
def test_deterministic_samplers_converge_to_the_ode_with_their_order(name):
    x = torch.tensor([[[[-9.0, 0.3, 12.0]]]], dtype=torch.float64)

    def error(n):
        sigmas = log_sigmas(n)
        got = run(name, gaussian, x, down(*sigmas))
        return float((got - flow(x, sigmas[0], sigmas[-1])).abs().max())

    order = math.log2(error(40) / error(640)) / 4
    assert order > SAMPLERS[name].order - 0.1


@pytest.mark.parametrize("name", [name for name in samplers(from_data=True) if SAMPLERS[name].stochastic])
def test_stochastic_samplers_draw_from_the_data(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, 1, 1, generator=generator) * 30
    got = run(name, gaussian, x, down(*log_sigmas(60, 30.0), 0.0),
              noise=lambda i: torch.randn(x.shape, generator=generator))
    assert float(got.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(got.std()) == pytest.approx(WIDTH, rel=0.05)


def test_lcm_draws_from_the_data_with_a_consistency_function():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, 1, 1, generator=generator) * 30
    got = run("lcm", lambda x, sigma: flow(x, sigma, 0), x, down(30.0, 5.0, 1.0, 0.0),
              noise=lambda i: torch.randn(x.shape, generator=generator))
    assert float(got.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(got.std()) == pytest.approx(WIDTH, rel=0.05)


@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_is_believed(name, n):
    x0, noise, made = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), sampler_schedule(name, n, ABAR)
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return x0

    x = run(name, denoise, noise * made.start, made, noise=step_noise(noise.shape, 2))
    # A schedule that ends above 0 leaves that much of the noise.
    left = float(made.sigmas[-1] / made.sigmas[0]) * (noise * made.start - x0).abs().max()
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-5 + float(left))
    assert set(calls) == set(made.sigmas[:-1].tolist())


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_step_sees_every_step_once_and_changes_nothing(name):
    made, noise, seen = sampler_schedule(name, 6, ABAR), randn(2, 4, 6, 5), []
    _, watched = run_ours(name, made, noise, 1, on_step=lambda i, n, x0: seen.append((i, n, x0.shape)))
    assert seen == [(i, 6, noise.shape) for i in range(6)]
    assert torch.equal(watched, run_ours(name, made, noise, 1)[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_is_over_when_all_that_it_asks_is_answered_and_shows_its_first_x0(name):
    made, noise, events = sampler_schedule(name, 4, ABAR), randn(1, 4, 6, 5), []
    asked = run_questions(name, made, noise)

    def denoise(x, sigma):
        events.append(x0 := x / (1 + sigma))
        return x0

    run(name, denoise, noise * made.start, made, noise=step_noise(noise.shape, 1),
        on_step=lambda i, n, x0: events.append((i, x0)))
    steps = [event for event in events if isinstance(event, tuple)]
    assert [i for i, _ in steps] == [0, 1, 2, 3]
    place = 0
    for i, x0 in steps:
        calls = asked.count(i)
        assert x0 is events[place] and events[place + calls] == (i, x0)
        place += calls + 1
    assert place == len(events)


def run_questions(name, made, noise):
    """The step that each question of a sampler belongs to."""
    asking, answer, asked = walk(name, noise * made.start, made, noise=step_noise(noise.shape, 1)), None, []
    with pytest.raises(StopIteration):
        while True:
            i, x, sigma = asking.send(answer)
            asked.append(i)
            answer = x / (1 + sigma)
    return asked


@pytest.mark.parametrize("name", SAMPLERS)
def test_many_walks_may_be_answered_together(name):
    """As a server does: each its own schedule, one call for all, a sigma for each row."""
    made = [sampler_schedule(name, n, ABAR) for n in (3, 5)]
    starts = [randn(1, 4, 6, 5, seed=n) * schedule.start for n, schedule in enumerate(made)]

    def denoise(x, sigmas):
        return x / (1 + torch.tensor(sigmas).view(-1, 1, 1, 1))

    alone = [run(name, lambda x, sigma: denoise(x, [sigma]), x, schedule, noise=step_noise(x.shape, 1))
             for x, schedule in zip(starts, made)]
    walks = {k: walk(name, x, schedule, noise=step_noise(x.shape, 1)) for k, (x, schedule) in enumerate(zip(starts, made))}
    answers, together = dict.fromkeys(walks), {}
    while walks:
        asked = {}
        for k, walker in list(walks.items()):
            try:
                asked[k] = walker.send(answers[k])
            except StopIteration as end:
                together[k] = end.value
                del walks[k]
        if asked:
            x0s = denoise(torch.cat([x for _, x, _ in asked.values()]), [sigma for *_, sigma in asked.values()])
            answers = dict(zip(asked, x0s.split(1)))
    assert all(torch.equal(together[k], x) for k, x in enumerate(alone))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(name):
    made, start = sampler_schedule(name, 6, ABAR), randn(3, 4, 6, 5)
    steps = randn(6, 3, 4, 6, 5, seed=1)

    def sample(images):
        denoise = CFGDenoiser(DENOISERS["eps"](Network(), made), torch.zeros(len(images), 1, 1))
        return run(name, denoise, start[images] * made.start, made, noise=lambda i: steps[i, images])

    torch.testing.assert_close(sample([0, 1, 2])[1:2], sample([1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_writes_to_none_of_its_arguments_and_keeps_fp32(name):
    made, x = sampler_schedule(name, 5, ABAR), randn(2, 4, 6, 5) * 14
    steps = randn(5, 2, 4, 6, 5, seed=1)
    before = x.clone(), made.sigmas.clone(), steps.clone()
    got = run(name, lambda x, sigma: x / 2, x, made, noise=lambda i: steps[i])
    assert got.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip((x, made.sigmas, steps), before))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_spacing_of_a_sampler_gives_a_finite_result(name):
    for spacing in SAMPLERS[name].spacings:
        _, x = run_ours(name, sampler_schedule(name, 12, ABAR, spacing), randn(1, 4, 6, 5), 1)
        assert x.isfinite().all() and float(x.abs().max()) < 50


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.stochastic])
def test_a_sampler_that_adds_noise_asks_for_it(name):
    with pytest.raises(ValueError, match="it needs noise="):
        run(name, gaussian, randn(1, 4, 6, 5), sampler_schedule(name, 5, ABAR))


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_ddim_refuses_an_eta_outside_0_to_1(eta):
    with pytest.raises(ValueError, match=f"eta is {eta}; allowed: 0 to 1"):
        run("ddim", gaussian, randn(1, 4, 6, 5), down(*log_sigmas(3)), eta=eta)


def test_an_eta_for_a_sampler_that_has_none_is_refused():
    with pytest.raises(ValueError, match="eta is 0.5 for euler; only ddim has an eta"):
        run("euler", gaussian, randn(1, 4, 6, 5), down(*log_sigmas(3)), eta=0.5)


def test_ddim_with_eta_and_no_noise_is_refused():
    with pytest.raises(ValueError, match="it needs noise="):
        run("ddim", gaussian, randn(1, 4, 6, 5), down(*log_sigmas(3)), eta=0.5)


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="sampler 'plms' is unknown; allowed: ddpm, ddim, pndm, euler"):
        sampler_schedule("plms", 20, ABAR)


@pytest.mark.parametrize("name, spacing", [("pndm", "karras"), ("lcm", "leading"), ("euler", "lcm"), ("heun", "cos")])
def test_a_spacing_that_a_sampler_does_not_have_is_refused(name, spacing):
    with pytest.raises(ValueError, match=f"spacing '{spacing}' is not possible with sampler {name}; allowed: "):
        sampler_schedule(name, 20, ABAR, spacing)
