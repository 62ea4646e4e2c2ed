"""The lesson of docs/lesson.md: a diffusion model of digits from scratch, a LoRA that inverts them, and a comparison.

    python -m recipes.digits.lesson --config recipes/digits/lesson-pixels.yaml              # trains the base
    python -m recipes.digits.lesson --config recipes/digits/lesson-pixels.yaml --use-lora   # trains the LoRA on top of it
    python -m recipes.digits.lesson --config recipes/digits/lesson-pixels.yaml --sample     # draws with and without it

To resume a training, run it again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from recipes.digits.data import WORDS, captions, load_mnist, split
from sd.config import ModelConfig
from sd.model_loader import Models, load_lora_into_models, new_models, preload_models_from_standard_weights
from sd.models import default_device
from sd.pictures.image_io import save_image
from sd.pipeline import compare
from sd.training import PictureSet, TrainConfig, train
from sd.training.config_file import parse, train_options

NEEDED, MORE = {"out", "model", "train", "lora", "sample"}, {"autoencoder"}
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0)}


class LessonError(ValueError):
    """A lesson cannot continue; the message says what is missing or wrong."""


def read_lesson(path: str, changes: Sequence[str] = ()) -> dict:
    """The sections of a lesson's YAML file, with `changes` such as "lora.rank=16". Raises LessonError."""
    lesson = parse(path)
    if not NEEDED <= set(lesson) <= NEEDED | MORE:
        raise LessonError(f"{path}: a lesson has the sections {', '.join(sorted(NEEDED))}, and may have {', '.join(MORE)}")
    for change in changes:
        place, _, value = change.partition("=")
        section, _, name = place.rpartition(".")
        values = lesson.get(section) if section else lesson
        if not isinstance(values, dict) or not value or name in NEEDED - {"out"}:
            raise LessonError(f"--set {change}: is not of the form section.name=value, such as lora.rank=16, or out=folder")
        values[name] = yaml.safe_load(value)
    return lesson


# ---- pictures --------------------------------------------------------------------------------------------------------

def digit_pictures(config: ModelConfig) -> tuple[Tensor, list[tuple[str, ...]]]:
    """(4,000 digits [N, C, S, S] in [-1, 1] on black, white or, with three channels, in all colours; their captions)."""
    pictures, digits = load_mnist()
    chosen, _ = split(digits)
    pictures, digits = resized(pictures[chosen], config.image_size), digits[chosen].tolist()
    names = [colours(config)[i % len(colours(config))] for i in range(len(digits))]
    texts = [captions_of(d, name) for d, name in zip(digits, names)]
    if names[0] is None:
        return pictures, texts
    rgb = torch.tensor([COLOURS[name] for name in names])[:, :, None, None]
    return (pictures + 1) * rgb - 1, texts


def colours(config: ModelConfig) -> list[str | None]:
    return list(COLOURS) if config.vae.image_channels == 3 else [None]


def captions_of(digit: int, colour: str | None) -> tuple[str, ...]:
    return captions(digit) if colour is None else (f"a {colour} {WORDS[digit]}", f"a {colour} {digit}")


def resized(pictures: Tensor, size: int) -> Tensor:
    """Pad with black, or crop, to [.., size, size]."""
    return F.pad(pictures, [(size - pictures.shape[-1]) // 2] * 4, value=-1.0)


# ---- the three steps -------------------------------------------------------------------------------------------------

def train_base(lesson: dict) -> None:
    """Train a model from random weights, on the latents of `autoencoder` (which is not trained) if there is one."""
    if "autoencoder" in lesson:
        trained = preload_models_from_standard_weights(lesson["autoencoder"], "cpu", dtype=torch.float32)
        models = new_models(ModelConfig.from_dict(lesson["model"] | {"vae": asdict(trained.config.vae)}))
        models.update(encoder=trained["encoder"], decoder=trained["decoder"])
    else:
        models = new_models(ModelConfig.from_dict(lesson["model"]))
    for embedding in (models["clip"].token_embedding, models["clip"].position_embedding):
        embedding.weight.data.mul_(0.02)  # CLIP's initialisation; torch's N(0, 1) would drown the layers' output
    train(base_config(lesson), models.to(default_device()), PictureSet(*digit_pictures(models.config)))


def train_lora(lesson: dict) -> None:
    """Train a LoRA on the same digits, inverted, with the same captions."""
    models = load_base(lesson)
    pictures, texts = digit_pictures(models.config)
    train(lora_config(lesson), models, PictureSet(-pictures, texts))


def sample(lesson: dict, multipliers: Sequence[float]) -> Path:
    """Write a sheet of the ten digits, by the base and with the LoRA at each multiplier; each row has the same noise."""
    models, name = load_both(lesson)
    names = colours(models.config)
    prompts = [captions_of(d, names[d % len(names)])[0] for d in range(10)]
    sheet = compare(prompts, models, [{}, *({name: m} for m in multipliers)], seed=0, **lesson["sample"])
    path = Path(lesson["out"], f"{name}.png")
    save_image(sheet, path)
    return path


def base_config(lesson: dict) -> TrainConfig:
    options = {"train": "full", "text_encoder": True, "out": f"{lesson['out']}/base"}
    return TrainConfig(**options | train_options(lesson["train"], "train"))


def lora_config(lesson: dict) -> TrainConfig:
    options = {"name": "inverted"} | train_options(lesson["lora"], "lora")
    return TrainConfig(**{"out": f"{lesson['out']}/{options['name']}"} | options)


def load_base(lesson: dict) -> Models:
    """The trained base. Raises LessonError if there is none yet."""
    path = Path(base_config(lesson).out, "model.safetensors")
    if not path.exists():
        raise LessonError(f"{path}: no such file; first train the base: the same command without --use-lora or --sample")
    return preload_models_from_standard_weights(path, dtype=torch.float32)


def load_both(lesson: dict) -> tuple[Models, str]:
    """(the base with the LoRA loaded, name of the LoRA). Raises LessonError unless both are trained."""
    models, config = load_base(lesson), lora_config(lesson)
    path = Path(config.out, f"{config.name}.safetensors")
    if not path.exists():
        raise LessonError(f"{path}: no such file; first train the LoRA: the same command with --use-lora")
    load_lora_into_models(models, path, config.name)
    return models, config.name


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--config", required=True, metavar="YAML", help="the lesson")
    found.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="changes, such as lora.rank=16")
    found.add_argument("--multipliers", type=float, nargs="+", default=[1.0], help="multipliers of the LoRA to draw with")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    steps = parser()
    steps.add_argument("--use-lora", action="store_true", help="train the LoRA instead of the base")
    steps.add_argument("--sample", action="store_true", help="draw the ten digits with and without the LoRA")
    args = steps.parse_args(argv)
    lesson = read_lesson(args.config, args.set)
    if args.sample:
        print(sample(lesson, args.multipliers))
    else:
        (train_lora if args.use_lora else train_base)(lesson)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, KeyboardInterrupt) as error:
        sys.exit(str(error))
