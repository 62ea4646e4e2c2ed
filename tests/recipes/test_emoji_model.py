"""The model of emoji that ships: its size, what it draws, its LoRAs, and that diffusers draws the same with it."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from recipes.emoji.train import CONCEPT, EMOJI, STYLE
from sd.files.tensors import read_tensors
from sd.model_loader import load_lora_into_models, model_path, preload_models_from_standard_weights, save_checkpoint
from sd.pipeline import generate
from sd.prompts.tokenizer import data_dir, tokenize
from sd.training import TrainConfig, train

LORAS = {config.name: data_dir() / "loras" / f"{config.name}.safetensors" for config in (STYLE, CONCEPT)}
PROMPTS = ["red apple, twemoji style", "grinning face, noto style", "yellow heart, fluent flat style", "pizza, emojione style"]
HOW = {"seed": 0, "sampler_name": "dpmpp_2m", "n_inference_steps": 12, "cfg_scale": 3.0}


@pytest.fixture
def emoji():
    return preload_models_from_standard_weights(device="cpu")


def colour(pictures: np.ndarray) -> float:
    return float((pictures.max(axis=-1).astype(int) - pictures.min(axis=-1)).mean())


def blueness(pictures: np.ndarray) -> float:
    """Mean of blue - red where the picture is not white."""
    drawn = pictures[pictures.min(axis=-1) < 200].astype(int)
    return float((drawn[:, 2] - drawn[:, 0]).mean())


@pytest.mark.smoke
def test_it_is_the_default_and_small_and_knows_its_config_and_its_sources(emoji):
    assert emoji.source == data_dir() / "emoji.safetensors" and emoji.source.stat().st_size <= 36e6
    assert emoji.config == EMOJI
    metadata = read_tensors(emoji.source).metadata
    assert "data/NOTICE" in metadata["license"] and "@iconify-json/noto@1.2.9" in metadata["sdlora.provenance"]
    for path in LORAS.values():
        assert path.stat().st_size < 2e6 and "data/NOTICE" in read_tensors(path).metadata["license"]


def test_a_model_of_data_is_meant_by_its_name_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_path("digits") == data_dir() / "digits.safetensors"
    assert model_path(tmp_path / "digits") == tmp_path / "digits" and str(model_path("nowhere")) == "nowhere"
    (tmp_path / "digits").mkdir()
    assert str(model_path("digits")) == "digits" and model_path(None) == data_dir() / "emoji.safetensors"


def test_colours_are_those_of_the_prompt(emoji):
    asked = {"red": (1, 0, 0), "green": (0, 1, 0), "yellow": (1, 1, 0), "purple": (1, 0, 1)}
    made = generate([f"{name} heart, twemoji style" for name in asked], models=emoji, **HOW).astype(float)
    for picture, wanted in zip(made, asked.values()):
        mean = picture[picture.max(-1) - picture.min(-1) > 60].mean(axis=0)  # of what is not white
        wanted = np.array(wanted, dtype=bool)
        assert mean[wanted].min() > mean[~wanted].max() + 20, mean


def test_words_that_were_never_trained_do_no_harm(emoji):
    table = emoji["clip"].token_embedding.weight
    rows, counts = table.unique(dim=0, return_counts=True)
    unknown = rows[counts.argmax()]
    assert counts.max() > 40_000 and unknown.norm() < table[(table != unknown).any(1)].norm(dim=1).mean()
    words = ["austria", "parliamentary"]
    for word in words:
        ids = tokenize(emoji.tokenizer, [word], 32)[0]
        assert (table[ids[1:2]] == unknown).all()
    a, b = generate([f"{word} red apple, twemoji style" for word in words], models=emoji, **(HOW | {"seed": [0, 0]}))
    assert np.array_equal(a, b)


def test_the_style_lora_draws_black_on_white_and_off_is_the_base(emoji):
    base = generate(PROMPTS, models=emoji, **HOW)
    load_lora_into_models(emoji, LORAS[STYLE.name], "style")
    half, whole = (generate(PROMPTS, models=emoji, lora={"style": m}, **HOW) for m in (0.5, 1.0))
    assert colour(base) > 25 and colour(whole) < 0.25 * colour(base) and colour(whole) < colour(half) < colour(base)
    assert np.array_equal(generate(PROMPTS, models=emoji, lora={"style": 0.0}, **HOW), base)
    assert np.array_equal(generate(PROMPTS, models=emoji, use_lora=False, **HOW), base)


def test_a_lora_learns_blue_from_the_example_pictures(emoji, tmp_path):
    base = generate(PROMPTS, models=emoji, **HOW)
    config = TrainConfig(data=str(data_dir() / "emoji-delft"), out=str(tmp_path), name="delft", steps=60, batch_size=8,
                         learning_rate=4e-3, progress=False)
    train(config, emoji)
    assert blueness(base) < 0 and blueness(generate(PROMPTS, models=emoji, **HOW)) > 0
    assert np.array_equal(generate(PROMPTS, models=emoji, lora={"delft": 0.0}, **HOW), base)


@pytest.mark.parametrize("name", ["folder", "ldm.safetensors"])
def test_diffusers_draws_the_same_picture(emoji, tmp_path, name):
    save_checkpoint(emoji, tmp_path / "folder")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    if name != "folder":
        save_checkpoint(emoji, tmp_path / name)
        pipe = StableDiffusionPipeline.from_single_file(str(tmp_path / name), config=str(tmp_path / "folder"),
                                                        local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPTS, num_inference_steps=10, guidance_scale=3.0, output_type="np",
                  generator=[torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]).images * 255
    ours = generate(PROMPTS, models=emoji, seed=0, sampler_name="ddim", n_inference_steps=10, cfg_scale=3.0)
    assert np.abs(ours - theirs).mean() < 1 and theirs.std() > 30
