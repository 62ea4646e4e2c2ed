"""A model and pictures on which a training takes a second."""

from __future__ import annotations

import importlib
import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sd.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from sd.lora import apply_lora_to_model, get_lora_parameters, save_lora_weights
from sd.model_loader import Models, save_models_lora
from sd.training import PictureSet, TrainConfig, train
from sd.training.rules import EFFECTS

SMALL = ModelConfig(
    name="small", clip=CLIPConfig(width=8, layers=1, heads=2, mlp_width=16),
    vae=VAEConfig(image_channels=1, widths=(8, 8), layers_per_block=1, norm_groups=4),
    unet=UNetConfig(widths=(8, 16), attention=(True, True), layers_per_block=1, heads=2, context_width=8, norm_groups=4),
    image_size=16)
LORA = TrainConfig(rank=2, alpha=2.0, steps=7, batch_size=2, accumulate=2, save_every=2, progress=False,
                   dropout=0.3, rank_dropout=0.2, module_dropout=0.1, text_encoder=True, ema=0.9,
                   schedule="cosine", warmup=2, learning_rate=0.01)


def copy_of(models: Models) -> Models:
    """Other weights, the same tokenizer: building one takes longer than a training here."""
    return Models({key: deepcopy(network) for key, network in models.items()}, models.config, models.tokenizer)


def pictures(n: int = 5) -> PictureSet:
    """n random pictures with two captions each."""
    return PictureSet(torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
                      [(f"number {i}", f"{i}") for i in range(n)])


def held_out() -> PictureSet:
    """Two more of them."""
    return PictureSet(pictures(7).pictures[5:], ["number 1", "2"])


def output(models: Models) -> torch.Tensor:
    """The UNet's output for a random batch of 2."""
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 8, generator=g)
    with torch.no_grad():
        return models["diffusion"](x, torch.tensor([3, 700]), context)


def randomized(models: Models, name: str, seed: int = 0, scale: float = 0.3) -> None:
    """Fill adapter `name` with random values: a LoRA that somebody has trained."""
    g = torch.Generator().manual_seed(seed)
    for p in get_lora_parameters(models, name):
        p.data += scale * torch.randn(p.shape, generator=g)


def a_lora(models: Models, path: Path, format: str = "kohya", seed: int = 0, **options) -> tuple[Path, Models]:
    """A file with a LoRA that somebody has trained on UNet and text encoder, and models that carry it."""
    models = copy_of(models)
    options = {"rank": 2, "alpha": 3.0, "target_modules": ["q_proj", "proj_in", "mlp"]} | options
    apply_lora_to_model({key: models[key] for key in ("diffusion", "clip")}, name="old", **options)
    randomized(models, "old", seed)
    if format == "pt":
        save_models_lora(models, path.with_suffix(".pt"), "old")
        return path.with_suffix(".pt"), models
    save_lora_weights(models, path, "old", format=format)
    return path, models


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but what the clock says, with its own folder's name taken out."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    found["config.json"] = found["config.json"].replace(folder.name.encode(), b"")
    return {name: content for name, content in found.items() if name != "timing.jsonl"}


def stopped(config: TrainConfig, models: Models, monkeypatch, k: float = 3, held_out: PictureSet | None = None) -> None:
    """A run that ends before step k is computed, as if somebody had pulled the plug; 4.5: in the middle of step 4."""
    loop = importlib.import_module("sd.training.loop")
    original = loop.seed_of

    def power_cut(seed, stream, number):
        if number == k * config.accumulate:
            raise KeyboardInterrupt
        return original(seed, stream, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "seed_of", power_cut)
        train(config, models, pictures(), held_out=held_out)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def changed(config: TrainConfig, **changes) -> TrainConfig:
    """`replace`, with what has no effect then as it is by default."""
    values = vars(config) | changes
    for names, has_effect, _ in EFFECTS:
        if not has_effect(SimpleNamespace(**values)):
            values |= {name: getattr(TrainConfig(), name) for name in names}
    return TrainConfig(**values)
