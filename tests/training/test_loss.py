"""Objectives, noise and timesteps against diffusers' training utilities, kohya's published formulas and fp64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr
from torch import nn

from sd.model_loader import new_models
from sd.sampling.noise import add_noise, alphas_cumprod, betas
from sd.training import TrainConfig, TrainError, diffusion_loss
from sd.training.dataset.batches import batch_noise
from sd.training.dataset.randomness import torch_rng
from sd.training.loss import LOSSES, Objective, check_objective, noise_levels, snr_weights
from sd.training.noise import draw_noise, draw_timesteps
from tests.training.tiny import SMALL

CONFIG = SimpleNamespace(
    seed=3, batch_size=4, loss="mse", huber_delta=0.1, weighting="none", snr_gamma=5.0, noise_offset=0.0, pyramid_noise=0.0,
    input_perturbation=0.0, min_timestep=0, max_timestep=None, timestep_bias=1.0, zero_terminal_snr=False)
PEERS = {"eps": "epsilon", "v": "v_prediction"}


def config(**changes) -> SimpleNamespace:
    return SimpleNamespace(**(vars(CONFIG) | changes))


def scheduler(prediction: str = "eps", **options) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         prediction_type=PEERS[prediction], **options)


class Fixed(nn.Module):
    """A UNet that answers `out`, whatever it sees, and remembers what that was."""

    def __init__(self, out):
        super().__init__()
        self.conv_in, self.out = nn.Conv2d(4, 4, 1), out

    def forward(self, x, t, context):
        self.seen = x
        return self.out


class Stub(dict):
    def __init__(self, out, prediction="eps"):
        super().__init__(diffusion=Fixed(out))
        self.config = replace(SMALL, prediction=prediction)


@pytest.fixture
def batch():
    """out, latents, context, t, noise"""
    rng = torch.Generator().manual_seed(0)
    out, latents, noise = (torch.randn(4, 4, 6, 8, generator=rng) for _ in range(3))
    return out, latents, torch.randn(4, 7, 8, generator=rng), torch.tensor([0, 300, 700, 999]), noise


# ---- the loss --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("objective", [Objective(), config()])
def test_by_default_loss_and_gradients_are_the_bits_of_the_plain_mean_square(batch, objective):
    _, latents, context, t, noise = batch
    models = new_models(SMALL, seed=1)
    parameters = list(models["diffusion"].requires_grad_(True).parameters())
    plain = F.mse_loss(models["diffusion"](add_noise(latents, noise, t, alphas_cumprod(SMALL)), t, context), noise)
    expected = torch.autograd.grad(plain / 3, parameters)
    loss = diffusion_loss(models, latents, context, t, noise, objective=objective)
    assert torch.equal(loss, plain)
    assert all(map(torch.equal, torch.autograd.grad(loss / 3, parameters), expected))


@pytest.mark.parametrize("prediction", PEERS)
def test_min_snr_is_that_of_the_training_scripts_of_diffusers(batch, prediction):
    out, latents, context, t, noise = batch
    peer, gamma = scheduler(prediction), 3.0
    snr = compute_snr(peer, t)
    weights = torch.stack([snr, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0] / (snr if prediction == "eps" else snr + 1)
    target = noise if prediction == "eps" else peer.get_velocity(latents, noise, t)
    expected = (F.mse_loss(out, target, reduction="none").mean(dim=[1, 2, 3]) * weights).mean()
    loss = diffusion_loss(Stub(out, prediction), latents, context, t, noise,
                          objective=Objective(weighting="min_snr", snr_gamma=gamma))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting, formula", [
    ("min_snr", lambda snr: min(snr, 5) / snr), ("debiased", lambda snr: snr**-0.5), ("p2", lambda snr: 1 / (1 + snr))])
def test_weights_of_eps_are_those_of_the_papers_and_v_gets_the_same_objective(batch, weighting, formula):
    out, latents, context, t, noise = batch
    peer, objective = scheduler(), Objective(weighting=weighting)
    abar = peer.alphas_cumprod.double()
    expected = [formula(float(a / (1 - a))) for a in abar]
    table = snr_weights(alphas_cumprod(SMALL), "eps", objective)
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=2e-4, atol=0)  # peer's abar is fp32

    # A network that says v says eps too: eps = sqrt(abar) v + sqrt(1 - abar) x_t (Salimans and Ho 2022, appendix D).
    a = abar[t].float().view(-1, 1, 1, 1)
    as_eps = a.sqrt() * out + (1 - a).sqrt() * peer.add_noise(latents, noise, t)
    losses = [diffusion_loss(Stub(answer, prediction), latents[i:i + 1], context[i:i + 1], t[i:i + 1], noise[i:i + 1],
                             objective=objective)
              for i in (1, 2, 3) for answer, prediction in ((out[i:i + 1], "v"), (as_eps[i:i + 1], "eps"))]
    torch.testing.assert_close(losses[0::2], losses[1::2], rtol=1e-4, atol=0)


def test_huber_losses_are_the_published_formulas_and_small_errors_do_not_cancel():
    r = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 3.0], dtype=torch.float64)
    root = [math.sqrt(float(x) ** 2 + 0.01) - 0.1 for x in r]  # kohya: 2 c (sqrt(r^2 + c^2) - c), and without its c
    for name, scale in (("huber", 0.2), ("smooth_l1", 2.0)):
        error = LOSSES[name](r.float(), torch.zeros(5), 0.1)
        torch.testing.assert_close(error.double()[2:], scale * torch.tensor(root[2:]).double(), rtol=1e-5, atol=0)
        torch.testing.assert_close(error.double()[:3], (scale / 0.2) * r[:3] ** 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_factors_of_images_and_places_multiply_the_error_before_the_mean(batch, loss):
    out, latents, context, t, noise = batch
    objective, delta = Objective(loss=loss, huber_delta=0.2), 0.2
    weights, mask = torch.tensor([1.0, 0.0, 0.5, 2.0]), torch.rand(4, 1, 6, 8)
    got = diffusion_loss(Stub(out), latents, context, t, noise, objective=objective, weights=weights, mask=mask)
    r, total = (out - noise).double(), 0.0
    error = {"mse": r**2, "huber": 2 * delta * ((r**2 + delta**2).sqrt() - delta),
             "smooth_l1": 2 * ((r**2 + delta**2).sqrt() - delta)}[loss]
    for i in range(4):
        total += float(weights[i]) * float((error[i] * mask[i].double()).sum()) / error[i].numel() / 4
    assert got.item() == pytest.approx(total, rel=1e-5)


def test_ones_as_factors_change_nothing(batch):
    out, latents, context, t, noise = batch
    plain = diffusion_loss(Stub(out), latents, context, t, noise)
    ones = diffusion_loss(Stub(out), latents, context, t, noise, weights=torch.ones(4), mask=torch.ones(4, 1, 6, 8))
    torch.testing.assert_close(ones, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", PEERS)
def test_input_perturbation_changes_what_the_network_sees_and_not_its_target(batch, prediction):
    out, latents, context, t, noise = batch
    peer, stub, new_noise = scheduler(prediction), Stub(out, prediction), noise + 0.1 * torch.randn_like(noise)
    loss = diffusion_loss(stub, latents, context, t, noise, input_noise=new_noise)
    torch.testing.assert_close(stub["diffusion"].seen, peer.add_noise(latents, new_noise, t))
    target = noise if prediction == "eps" else peer.get_velocity(latents, noise, t)
    torch.testing.assert_close(loss, F.mse_loss(out, target), rtol=1e-5, atol=0)


def test_zero_terminal_snr_is_the_rescaling_of_diffusers_and_ends_in_pure_noise(batch):
    out, latents, context, t, noise = batch
    v = replace(SMALL, prediction="v")
    abar = noise_levels(v, True)
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas(SMALL)), 0)
    torch.testing.assert_close(abar, expected, rtol=1e-9, atol=1e-12)
    assert abar[-1] == 0 and abar[0] == pytest.approx(float(alphas_cumprod(SMALL)[0]), rel=1e-12)
    assert torch.equal(noise_levels(v), alphas_cumprod(v))

    stub = Stub(out[:1], "v")
    for weighting, weight in (("none", 1), ("min_snr", 0), ("debiased", 0), ("p2", 0)):
        loss = diffusion_loss(stub, latents[:1], context[:1], torch.tensor([999]), noise[:1],
                              objective=Objective(weighting=weighting, zero_terminal_snr=True))
        torch.testing.assert_close(loss, weight * F.mse_loss(out[:1], -latents[:1]))  # what is left to say is x0
    assert torch.equal(stub["diffusion"].seen, noise[:1])


def test_zero_terminal_snr_with_eps_is_refused_before_and_in_the_step(batch):
    out, latents, context, t, noise = batch
    with pytest.raises(TrainError, match="needs a model that predicts v"):
        diffusion_loss(Stub(out), latents, context, t, noise, objective=Objective(zero_terminal_snr=True))
    with pytest.raises(TrainError, match="needs a model that predicts v"):
        check_objective(config(zero_terminal_snr=True), SMALL)


@pytest.mark.parametrize("change, message", [
    ({"weights": torch.ones(4, 1)}, r"weights must be \[4\]; it is \[4, 1\]"),
    ({"mask": torch.ones(4, 4, 6, 8)}, r"mask must be \[4, 1, 6, 8\]"), ({"mask": torch.ones(6, 8)}, "mask must be"),
    ({"input_noise": torch.ones(1, 4, 6, 8)}, "input_noise must be")])
def test_factors_that_do_not_fit_the_latents_are_refused(batch, change, message):
    out, *rest = batch
    with pytest.raises(ValueError, match=message):
        diffusion_loss(Stub(out), *rest, **change)


# ---- noise -----------------------------------------------------------------------------------------------------------

def test_by_default_noise_and_timesteps_are_the_bits_that_they_were():
    for number in range(3):
        noise, input_noise = draw_noise((4, 4, 6, 8), CONFIG, number)
        assert torch.equal(noise, batch_noise((4, 4, 6, 8), CONFIG, number)) and input_noise is noise
        uniform = torch.randint(1000, (4,), generator=torch_rng(CONFIG.seed, "timestep", number))
        assert torch.equal(draw_timesteps(4, SMALL, CONFIG, number), uniform)


@pytest.mark.parametrize("change", [{"noise_offset": 0.1}, {"pyramid_noise": 0.4}, {"input_perturbation": 0.1}])
def test_noise_depends_on_seed_and_number_only(change):
    torch.manual_seed(0)
    a = draw_noise((2, 4, 8, 8), config(**change), 5)
    torch.manual_seed(1)
    b, c = draw_noise((2, 4, 8, 8), config(**change), 5), draw_noise((2, 4, 8, 8), config(**change), 6)
    assert all(map(torch.equal, a, b)) and not any(map(torch.equal, a, c))


def test_offset_noise_is_a_number_for_each_image_and_channel():
    noise, _ = draw_noise((300, 4, 8, 8), config(noise_offset=0.3), 0)
    added = noise - batch_noise((300, 4, 8, 8), CONFIG, 0)
    assert (added - added[:, :, :1, :1]).abs().max() < 1e-6
    assert added[:, :, 0, 0].std().item() == pytest.approx(0.3, rel=0.07)  # three standard errors
    assert (torch.corrcoef(added[:, :, 0, 0].T) - torch.eye(4)).abs().max() < 0.2


def test_pyramid_noise_is_that_of_kohya(monkeypatch):
    rng = torch_rng(CONFIG.seed, "noise", 7)

    def random():
        return torch.rand((), generator=rng).item()

    def pyramid_noise_like(noise, iterations=6, discount=0.4):  # library/custom_train_functions.py of kohya-ss/sd-scripts
        b, c, w, h = noise.shape
        u = torch.nn.Upsample(size=(w, h), mode="bilinear")
        for i in range(iterations):
            r = random() * 2 + 2
            wn, hn = max(1, int(w / (r**i))), max(1, int(h / (r**i)))
            noise += u(torch.randn(b, c, wn, hn, generator=rng)) * discount**i
            if wn == 1 or hn == 1:
                break
        return noise / noise.std()

    expected = pyramid_noise_like(torch.randn(2, 4, 64, 48, generator=rng), discount=0.7)
    noise, _ = draw_noise((2, 4, 64, 48), config(pyramid_noise=0.7), 7)
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-6)
    assert noise.std().item() == pytest.approx(1, abs=1e-5)


def test_the_perturbation_of_the_input_has_the_size_that_was_asked():
    noise, input_noise = draw_noise((50, 4, 16, 16), config(input_perturbation=0.1, noise_offset=0.1), 0)
    assert torch.equal(noise, draw_noise((50, 4, 16, 16), config(noise_offset=0.1), 0)[0])
    added = input_noise - noise
    assert added.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([added.flatten(), noise.flatten()]))[0, 1]) < 0.02


@pytest.mark.parametrize("bias", [0.5, 1.0, 2.0])
def test_timesteps_stay_in_their_range_with_the_density_of_u_to_the_bias(bias):
    t = draw_timesteps(40000, SMALL, config(min_timestep=100, max_timestep=600, timestep_bias=bias), 0)
    assert t.dtype == torch.int64 and t.min() >= 100 and t.max() <= 599
    for part in (0.1, 0.5, 0.9):  # P(u^bias < part) = part^(1 / bias)
        expected = part ** (1 / bias)
        assert (t < 100 + 500 * part).float().mean().item() == pytest.approx(expected, abs=3 * math.sqrt(0.25 / 40000))


# ---- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field, value", [
    ("loss", "l3"), ("weighting", "snr"), ("huber_delta", 0.0), ("snr_gamma", -1.0), ("snr_gamma", math.inf),
    ("timestep_bias", 0.0), ("timestep_bias", math.nan), ("noise_offset", -0.1), ("pyramid_noise", 1.5),
    ("input_perturbation", math.nan), ("min_timestep", -1), ("max_timestep", 0)])
def test_a_bad_value_breaks_the_rule_of_its_field(field, value):
    needed = {"huber_delta": {"loss": "huber"}, "snr_gamma": {"weighting": "min_snr"}}.get(field, {})  # else it has no effect
    TrainConfig(**needed)
    with pytest.raises(TrainError, match=f"^{field} is "):
        TrainConfig(**needed, **{field: value})


def test_timesteps_that_the_model_does_not_have_are_refused():
    check_objective(config(min_timestep=999, max_timestep=1000), SMALL)
    with pytest.raises(TrainError, match="max_timestep is 1001; allowed: up to 1000"):
        check_objective(config(max_timestep=1001), SMALL)
    with pytest.raises(TrainError, match="min_timestep is 1000; allowed: up to 999"):
        check_objective(config(min_timestep=1000), SMALL)
