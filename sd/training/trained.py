"""What is trained: an adapter of a LoRA, or whole networks; the rest is frozen while it lasts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sd.lora import adapter_names, apply_lora_to_model, lora_layers, named_layers, remove_lora, use_adapters
from sd.model_loader import Models
from sd.quant import quantized_kinds
from sd.training.config import TrainConfig
from sd.training.data import seed_of
from sd.training.run_state import TrainError


@contextmanager
def training(config: TrainConfig, models: Models) -> Iterator[dict[str, nn.Parameter]]:
    """The weights to train, by name; they alone have gradients inside the block, and afterwards all is as it was."""
    before = [(p, p.requires_grad) for network in models.values() for p in network.parameters()]
    modes = [(module, module.training) for _, module in named_layers(models)]
    unet, checkpointing, adapters = models["diffusion"], models["diffusion"].checkpointing, adapter_names(models)
    try:
        for network in models.values():
            network.eval().requires_grad_(False)
        parameters = trained_parameters(config, models)
        unet.checkpointing = config.checkpointing
        with use_adapters(models, {config.name: 1.0} if config.train == "lora" else {}):
            yield parameters
    except BaseException:
        if config.train == "lora" and config.name in adapter_names(models) and config.name not in adapters:
            remove_lora(models, config.name)  # half a training is in its folder, not in the models
        raise
    finally:
        unet.checkpointing = checkpointing
        for module, mode in modes:
            module.training = mode
        for p, trainable in before:
            p.requires_grad_(trainable)
        for layer in lora_layers(models).values():
            layer.adapters.eval()


def trained_parameters(config: TrainConfig, models: Models) -> dict[str, nn.Parameter]:
    """Attach the LoRA or free the networks; returns what is trained, by canonical name."""
    if config.train == "lora":
        networks = {key: models[key] for key, on in (("diffusion", config.unet), ("clip", config.text_encoder)) if on}
        torch.manual_seed(seed_of(config.seed, "init", 0))
        alpha = config.alpha * math.sqrt(config.rank) if config.rslora else config.alpha
        apply_lora_to_model(networks, config.rank, alpha, config.dropout, config.targets, config.name, kind=config.kind,
                            dora=config.dora, rank_dropout=config.rank_dropout, module_dropout=config.module_dropout)
        chosen = {path: layer.adapter(config.name) for path, layer in lora_layers(networks).items()
                  if config.name in layer.adapter_names}
    else:
        if quantized_kinds(models):
            raise TrainError(f"the base is quantised ({quantized_kinds(models)[0]}), so its weights cannot be trained; load it "
                             f"anew, or dequantize_base(models)")
        if adapter_names(models):
            raise TrainError(f"the model carries the adapters {', '.join(map(repr, adapter_names(models)))}; merge or "
                             f"remove them before all of its weights are trained")
        vae = config.train == "vae"
        on = {"encoder": vae, "decoder": vae, "diffusion": config.unet and not vae,
              "clip": config.text_encoder and not vae}
        chosen = {key: models[key] for key in on if on[key]}
    for module in chosen.values():
        module.train().requires_grad_(True)
    return {f"{path}.{name}": p for path, module in chosen.items() for name, p in module.named_parameters()}
