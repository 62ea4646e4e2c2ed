"""The model that ships: its size and scale, what its LoRA does, and that data/digits-thick teaches it a new one."""


import numpy as np
import pytest
import torch

from sd.config import DIGITS
from sd.model_loader import load_lora_into_models, preload_models_from_standard_weights
from sd.pipeline import generate
from sd.prompts.tokenizer import data_dir
from sd.training import PictureFolder, TrainConfig, train
from sd.training.dataset.cache import Posteriors

PROMPTS = [f"a handwritten {word}" for word in ("zero", "two", "five", "seven")]


@pytest.fixture
def digits():
    return preload_models_from_standard_weights(data_dir() / "digits.safetensors", "cpu")


def make(models, **options) -> np.ndarray:
    return generate(PROMPTS, models=models, seed=0, sampler_name="dpmpp_2m", n_inference_steps=12, cfg_scale=3.0,
                    **options)


def test_the_model_is_small_and_knows_its_own_config(digits):
    assert (data_dir() / "digits.safetensors").stat().st_size <= 8_000_000
    assert digits.config == DIGITS


def test_latents_have_the_usual_scale(digits):
    data = PictureFolder(data_dir() / "digits-thick", size=32, channels=1)
    mean, std = Posteriors(digits, data)(range(len(data)))
    assert 0.7 < (mean.var() + std.square().mean()).sqrt() < 1.4  # 1 over ordinary digits of both polarities
    rebuilt = digits["decoder"](mean / digits.config.vae.scale)
    pictures = torch.stack([data.picture(i) for i in range(len(data))])
    assert 10 * torch.log10(4 / (rebuilt - pictures).square().mean()) > 20  # dB


@pytest.mark.smoke
def test_the_lora_turns_white_on_black_into_black_on_white_and_off_is_the_base(digits):
    base = make(digits)
    load_lora_into_models(digits, data_dir() / "loras" / "digits-inverted.safetensors", "inverted")
    inverted = make(digits, lora={"inverted": 1.0})
    assert base.mean() < 60 and inverted.mean() > 195
    for a, b in zip(base, inverted):  # the same seed, the same digit
        assert np.corrcoef(a.ravel(), 255.0 - b.ravel())[0, 1] > 0.6
    assert np.array_equal(make(digits, lora={"inverted": 0.0}), base)
    assert np.array_equal(make(digits, use_lora=False), base)


def test_a_lora_learns_thick_strokes_in_seconds(digits, tmp_path):
    base = make(digits)
    config = TrainConfig(data=str(data_dir() / "digits-thick"), out=str(tmp_path), name="thick", steps=100,
                         batch_size=8, learning_rate=2e-3, progress=False)
    train(config, digits)
    assert make(digits).mean() > 1.2 * base.mean()
    assert np.array_equal(make(digits, lora={"thick": 0.0}), base)
    fresh = preload_models_from_standard_weights(data_dir() / "digits.safetensors", "cpu")
    load_lora_into_models(fresh, tmp_path / "thick.safetensors")
    assert np.array_equal(make(fresh), make(digits))
