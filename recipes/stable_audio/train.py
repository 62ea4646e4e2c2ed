"""Training: a base model of sine tones, and a LoRA, from LoRAW's config, that raises every tone by an octave."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recipes.stable_audio.model import v_loss
from recipes.stable_audio.tones import PATCH, PITCHES, SOUNDS, to_latents, tones
from sd.adapters.quant import quantize_base
from sd.any_model.config import apply_lora_config, prepare_for_training
from sd.lora import lora_layers, use_adapters
from sd.training import TrainConfig
from sd.training.dataset.randomness import torch_rng
from sd.training.optim import lr_factor, set_learning_rate
from sd.training.relora import adapters_in_training, attach_merged, fold, restart

SECTIONS = ("library", "model", "base", "training", "lora")
OPTIONS = ("steps", "batch_size", "learning_rate", "schedule", "warmup", "weight_decay", "clip_norm", "seed", "quantize",
           "relora_every", "relora_warmup", "relora_save", "relora_rank")  # of a TrainConfig
PATCHES = 32  # of a training sound: 0.128 seconds


def read_config(path: str | os.PathLike) -> dict:
    """Read a JSON config with LoRAW's `lora` section. Raises ValueError if it is not one, or has unknown sections."""
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict) or (unknown := [key for key in config if key not in SECTIONS]):
        what = f"section {unknown[0]!r} is unknown" if isinstance(config, dict) else "holds no sections"
        raise ValueError(f"{path}: {what}; allowed: {', '.join(SECTIONS)}")
    return config


def settings(section: Mapping, **more) -> tuple[TrainConfig, str]:
    """(options of the run, sound to learn) from the section `base` or `training`. Raises ValueError for unknown options."""
    options = dict(section)
    sound = options.pop("sound", "sine")
    if sound not in SOUNDS:
        raise ValueError(f"sound is {sound!r}; allowed: {', '.join(SOUNDS)}")
    if unknown := [key for key in options if key not in OPTIONS]:
        raise ValueError(f"training option {unknown[0]!r} is unknown; allowed: sound, {', '.join(OPTIONS)}")
    if options.get("relora_every"):
        options = {"relora_save": "svd"} | options  # saves a LoRA with the sum of all ranks, which is exact
    try:
        return TrainConfig(**options | more), sound
    except TypeError as error:
        raise ValueError(f"a training option is of the wrong kind: {error}") from None


def micro_batch(sound: str, config: TrainConfig, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0 [B, PATCH, PATCHES], noise, t [B] and pitch [B] of step n: a pure function of (seed, n)."""
    B = config.batch_size
    order, when, what = (torch_rng(config.seed, stream, n) for stream in ("order", "timestep", "noise"))
    pitch = torch.randint(PITCHES.start, PITCHES.stop, (B,), generator=order)
    x0 = to_latents(tones(sound, pitch, torch.rand(B, generator=order), PATCHES * PATCH))
    t = ((torch.arange(B) + torch.rand(B, generator=when)) / B).sqrt()  # more of them near 1, where the pitch is determined
    return x0, torch.randn(x0.shape, generator=what), t, pitch


def learn(model: nn.Module, groups: list[dict], sound: str, config: TrainConfig) -> list[float]:
    """Train with AdamW on the v objective; returns the loss of each step."""
    groups = [{"initial_lr": group.get("lr", config.learning_rate), **group} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
    parameters, losses = [p for group in groups for p in group["params"]], []
    model.train()
    for step in range(config.steps):
        restart(step, config, model, optimizer)
        set_learning_rate(optimizer, lr_factor(step, config))
        loss = v_loss(model, *micro_batch(sound, config, step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or float("inf"))
        if not norm.isfinite():
            raise ValueError(f"step {step}: the gradient is not finite: the training has diverged; use a lower learning rate")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def train_base(model: nn.Module, config: Mapping) -> list[float]:
    """Train all weights with the options in config["base"]; returns the losses."""
    options, sound = settings(config.get("base", {}))
    losses = learn(model.requires_grad_(True), [{"params": list(model.parameters())}], sound, options)
    model.requires_grad_(False)
    return losses


def train_lora(model: nn.Module, config: Mapping, name: str = "default") -> list[float]:
    """Train the adapter `name` of config["lora"] with the options in config["training"]; it is active afterwards.

    `weight_decompose` is DoRA, `relora_every` ReLoRA, `quantize` QLoRA. Returns the losses.
    """
    lora = config.get("lora")
    if not isinstance(lora, Mapping):
        raise ValueError("the config has no section `lora`, which says what to train: component_whitelist, rank, alpha, ..")
    options, sound = settings(config.get("training", {}), name=name, dora=bool(lora.get("weight_decompose")))
    if options.quantize != "none":
        quantize_base(model, options.quantize)
    torch.manual_seed(options.seed)
    if lora.get("trainable_model"):
        raise ValueError("trainable_model is on in the section `lora`; allowed: 0, since only the LoRA is saved")
    applied = apply_lora_config(model, lora, name)
    groups = prepare_for_training(model, name)
    if options.relora_every:
        layers = lora_layers(model)
        attach_merged(name, {path: layers[path].adapter(name) for path in applied.modules}, layers)
    with use_adapters(model, dict.fromkeys(adapters_in_training(options), 1.0)):
        losses = learn(model, groups, sound, options)
    fold(options, model)
    return losses
