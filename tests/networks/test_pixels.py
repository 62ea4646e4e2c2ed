"""Models without an autoencoder, and the cosine schedule, whose timesteps are real numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from sd.config import ConfigError, VAEConfig
from sd.files.tensor_file import CheckpointError
from sd.files.tensors import read_tensors
from sd.model_loader import new_models, preload_models_from_standard_weights, save_checkpoint
from sd.pipeline import generate
from sd.sampling.noise import alphas_cumprod
from sd.training import TrainConfig, TrainError, diffusion_loss, train
from sd.training.loss import Objective, check_objective
from sd.training.noise import draw_timesteps
from tests.training.test_loss import Stub, config
from tests.training.tiny import SMALL, metrics, pictures

COSINE = replace(SMALL, prediction="v", beta_schedule="cosine")


def pixel_config(channels: int):
    unet = replace(SMALL.unet, in_channels=channels, out_channels=channels)
    return replace(COSINE, vae=VAEConfig.pixels(channels), unet=unet)


# ---- pixels ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_of_pixels_is_saved_loaded_and_draws_the_same_picture(tmp_path, channels):
    models = new_models(pixel_config(channels))
    x = torch.rand(2, channels, 16, 16) * 2 - 1
    mean, logvar = models["encoder"](x)
    assert torch.equal(mean, x) and torch.equal((0.5 * logvar).exp(), torch.zeros_like(x))
    assert torch.equal(models["decoder"](x), x)
    save_checkpoint(models, tmp_path / "pixels.safetensors")
    assert not [key for key in read_tensors(tmp_path / "pixels.safetensors") if key.startswith("first_stage_model.")]
    again = preload_models_from_standard_weights(tmp_path / "pixels.safetensors", "cpu")
    assert again.config == models.config
    arguments = {"n_inference_steps": 3, "sampler_name": "dpmpp_2m", "seed": 3, "idle_device": "cpu"}
    picture = generate("a", models=models, **arguments)
    assert picture.shape == (16, 16, 3) and picture.std() > 10
    assert np.array_equal(picture, generate("a", models=again, **arguments))


def test_a_picture_of_pixels_comes_through_img2img_of_no_strength_unchanged():
    """One step from an SNR of e^20: what is left of the picture is the picture."""
    models = new_models(replace(pixel_config(3), train_timesteps=1000))
    given = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    found = generate("a", models=models, input_image=given, strength=0.001, n_inference_steps=1000, sampler_name="ddim",
                     cfg_scale=1, seed=0)
    assert np.abs(found.astype(int) - given).max() <= 1


def test_a_training_on_pixels_learns_them(tmp_path):
    config = TrainConfig(train="full", steps=60, batch_size=4, learning_rate=3e-3, progress=False, out=str(tmp_path / "a"))
    train(config, new_models(pixel_config(1)), pictures(1))
    losses = [row["loss"] for row in metrics(tmp_path / "a")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert preload_models_from_standard_weights(tmp_path / "a" / "model.safetensors", "cpu").config == pixel_config(1)


def test_what_a_model_of_pixels_does_not_have_is_refused(tmp_path):
    models = new_models(pixel_config(1))
    with pytest.raises(TrainError, match="it has no autoencoder"):
        train(TrainConfig(train="vae", out=str(tmp_path / "out"), steps=1, progress=False), models, pictures())
    with pytest.raises(CheckpointError, match="has none; save it as .safetensors"):
        save_checkpoint(models, tmp_path / "folder")
    with pytest.raises(ConfigError, match="the 3 channels of images, not 4"):
        VAEConfig(widths=())


# ---- the cosine schedule -------------------------------------------------------------------------------------------------

def test_the_loss_at_real_timesteps_is_the_formula_in_fp64():
    rng = torch.Generator().manual_seed(0)
    out, latents, noise = (torch.randn(4, 4, 6, 8, generator=rng) for _ in range(3))
    t = torch.tensor([17.25, 250.5, 600.125, 998.75])
    low, high = math.atan(math.exp(-10)), math.atan(math.exp(10))
    angle = (low + (high - low) * t.double() / 999).view(-1, 1, 1, 1)
    target = angle.cos() * noise.double() - angle.sin() * latents.double()
    stub = Stub(out, "v")
    stub.config = COSINE
    snr = (angle.cos() / angle.sin()).square().view(-1)
    for weighting, weight in (("none", torch.ones(4)), ("min_snr", snr.clamp(max=5) / (snr + 1)),
                              ("debiased", snr.sqrt() / (snr + 1)), ("p2", snr / (1 + snr) ** 2)):
        loss = diffusion_loss(stub, latents, torch.zeros(4, 3, 8), t, noise, objective=Objective(weighting=weighting))
        each = (out - target).square().flatten(1).mean(1)
        torch.testing.assert_close(loss.double(), (weight * each).mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(stub["diffusion"].seen.double(), angle.cos() * latents + angle.sin() * noise, rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "debiased", "p2"])
def test_both_ends_of_the_cosine_schedule_have_a_finite_loss(weighting):
    stub = Stub(torch.ones(2, 4, 6, 8), "v")
    stub.config = COSINE
    loss = diffusion_loss(stub, torch.ones(2, 4, 6, 8), torch.zeros(2, 3, 8), torch.tensor([0.0, 999.0]),
                          torch.ones(2, 4, 6, 8), objective=Objective(weighting=weighting))
    assert torch.isfinite(loss)


def test_timesteps_of_the_cosine_schedule_are_real_and_stay_in_their_range():
    t = draw_timesteps(20000, COSINE, config(min_timestep=100, max_timestep=600), 0)
    assert t.dtype == torch.float32 and t.min() >= 100 and t.max() <= 599 and len(t.unique()) > 15000
    assert t.mean().item() == pytest.approx((100 + 599) / 2, abs=3 * 499 / math.sqrt(12 * 20000))


def test_real_timesteps_and_rescaled_betas_are_refused_where_they_mean_nothing():
    batch = torch.ones(2, 4, 6, 8), torch.zeros(2, 3, 8), torch.tensor([0.5, 3.5]), torch.ones(2, 4, 6, 8)
    with pytest.raises(ValueError, match="timesteps are whole numbers"):
        diffusion_loss(Stub(torch.ones(2, 4, 6, 8), "v"), *batch)
    with pytest.raises(TrainError, match="this model's schedule is the cosine"):
        check_objective(config(zero_terminal_snr=True), COSINE)


# ---- in diffusers --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [{"beta_schedule": "cosine"}, {"zero_terminal_snr": True}])
def test_a_folder_has_the_schedule_that_diffusers_needs(tmp_path, change):
    models = new_models(replace(SMALL, prediction="v", vae=replace(SMALL.vae, image_channels=3), **change))
    save_checkpoint(models, tmp_path / "model")
    assert preload_models_from_standard_weights(tmp_path / "model", "cpu").config == replace(models.config, name="model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    peer = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    expected = alphas_cumprod(models.config)
    torch.testing.assert_close(peer.alphas_cumprod.double(), expected, rtol=1e-3, atol=1e-7)

    pipe.scheduler = peer
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs = pipe("a", num_inference_steps=6, guidance_scale=3.0, latents=latents, height=16, width=16, output_type="np").images
    ours = generate("a", models=models, n_inference_steps=6, cfg_scale=3.0, seed=5, sampler_name="ddim", spacing="trailing")
    assert ours.std() > 5 and np.abs(ours / 255 - theirs[0]).mean() < 1 / 255
