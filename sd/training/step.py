"""From the number of a micro-batch to its loss: data, random draws, networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sd.models import Models
from sd.placement import sent
from sd.training.config import TrainConfig
from sd.training.dataset.batches import Batches, batch_captions, batch_noise, batch_variants, batch_weights
from sd.training.dataset.cache import Posteriors
from sd.training.dataset.contexts import CONTEXT_BYTES, Contexts, TextStore, all_captions
from sd.training.dataset.data import PictureData
from sd.training.loss import MicroLoss, check_objective, diffusion_loss
from sd.training.new_words import check_words_shown
from sd.training.noise import draw_noise, draw_timesteps


def idle_networks(config: TrainConfig, models: Models, dataset: PictureData) -> tuple[str, ...]:
    """Networks whose outputs are all computed before the first step; they can leave the device while the steps run."""
    if config.train == "vae":
        return ()
    captions, clip = None if config.trains_text else all_captions(dataset, config), models.config.clip
    kept = captions is not None and len(captions) * clip.max_tokens * clip.width * 4 <= CONTEXT_BYTES
    return ("encoder", "decoder", "clip") if kept else ("encoder", "decoder")


def diffusion_batches(config: TrainConfig, models: Models, dataset: PictureData) -> MicroLoss:
    """Micro-batch number -> loss, for UNet, text encoder, their LoRAs and new words."""
    check_objective(config, models.config)
    check_words_shown(config, dataset)
    posteriors, batches = Posteriors(models, dataset, config.cache, progress=config.progress), Batches(dataset, config)
    store = TextStore(config.cache, models) if config.cache and not config.trains_text else None
    contexts = Contexts(models, trained=config.trains_text, store=store)
    contexts.fill(all_captions(dataset, config) or [])
    device = models["diffusion"].conv_in.weight.device

    def inputs(number: int) -> dict[str, Tensor]:
        indices = batches(number)
        variants = batch_variants(dataset, indices, config, number)
        mean, std = posteriors(indices, variants)
        latents = mean + std * batch_noise(mean.shape, config, number, "posterior")
        noise, input_noise = draw_noise(latents.shape, config, number)
        seen = {"latents": latents, "context": contexts(batch_captions(dataset, indices, config, number)), "noise": noise,
                "t": draw_timesteps(len(indices), models.config, config, number), "input_noise": input_noise,
                "weights": batch_weights(dataset, indices, config), "mask": posteriors.masks(indices, variants)}
        return {name: sent(x, device) for name, x in seen.items() if x is not None}

    return MicroLoss(inputs, partial(diffusion_loss, models, objective=config))


def vae_batches(config: TrainConfig, models: Models, dataset: PictureData, loss: Callable) -> MicroLoss:
    """Micro-batch number -> loss, for the autoencoder."""
    vae, device, batches = models.config.vae, models.device, Batches(dataset, config)

    def inputs(number: int) -> dict[str, Tensor]:
        indices = batches(number)
        shown = zip(indices, batch_variants(dataset, indices, config, number))
        pictures = torch.stack([dataset.picture(i, variant) for i, variant in shown])
        b, _, h, w = pictures.shape
        noise = batch_noise((b, vae.latent_channels, h // vae.factor, w // vae.factor), config, number, "posterior")
        return {"pictures": sent(pictures, device), "noise": sent(noise, device)}

    return MicroLoss(inputs, lambda pictures, noise: loss(models, pictures, noise, config.kl_weight))
