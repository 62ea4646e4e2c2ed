"""A model and pictures on which a training takes a second."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch

from sd.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from sd.model_loader import Models
from sd.training import PictureSet, TrainConfig
from sd.training.rules import EFFECTS

SMALL = ModelConfig(
    name="small", clip=CLIPConfig(width=8, layers=1, heads=2, mlp_width=16),
    vae=VAEConfig(image_channels=1, widths=(8, 8), layers_per_block=1, norm_groups=4),
    unet=UNetConfig(widths=(8, 16), attention=(True, True), layers_per_block=1, heads=2, context_width=8, norm_groups=4),
    image_size=16)


def copy_of(models: Models) -> Models:
    """Other weights, the same tokenizer: building one takes longer than a training here."""
    return Models({key: deepcopy(network) for key, network in models.items()}, models.config, models.tokenizer)


def pictures(n: int = 5) -> PictureSet:
    """n random pictures with two captions each."""
    return PictureSet(torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
                      [(f"number {i}", f"{i}") for i in range(n)])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def changed(config: TrainConfig, **changes) -> TrainConfig:
    """`replace`, with what has no effect then as it is by default."""
    values = vars(config) | changes
    for names, has_effect, _ in EFFECTS:
        if not has_effect(SimpleNamespace(**values)):
            values |= {name: getattr(TrainConfig(), name) for name in names}
    return TrainConfig(**values)
