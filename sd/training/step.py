"""From the number of a micro-batch to its loss: data, random draws, networks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sd.models import Models
from sd.placement import sent
from sd.training.config import TrainConfig
from sd.training.dataset.batches import Batches, batch_captions, batch_noise, batch_variants, batch_weights
from sd.training.dataset.cache import Posteriors
from sd.training.dataset.contexts import CONTEXT_BYTES, Contexts, TextStore, all_captions
from sd.training.dataset.data import PictureData
from sd.training.loss import check_objective, diffusion_loss
from sd.training.new_words import check_words_shown
from sd.training.noise import draw_noise, draw_timesteps


def idle_networks(config: TrainConfig, models: Models, dataset: PictureData) -> tuple[str, ...]:
    """Networks whose outputs are all computed before the first step; they can leave the device while the steps run."""
    if config.train == "vae":
        return ()
    captions, clip = None if config.trains_text else all_captions(dataset, config), models.config.clip
    kept = captions is not None and len(captions) * clip.max_tokens * clip.width * 4 <= CONTEXT_BYTES
    return ("encoder", "decoder", "clip") if kept else ("encoder", "decoder")


def diffusion_batches(config: TrainConfig, models: Models, dataset: PictureData) -> Callable[[int], torch.Tensor]:
    """Micro-batch number -> loss, for UNet, text encoder, their LoRAs and new words."""
    check_objective(config, models.config)
    check_words_shown(config, dataset)
    posteriors, batches = Posteriors(models, dataset, config.cache, progress=config.progress), Batches(dataset, config)
    store = TextStore(config.cache, models) if config.cache and not config.trains_text else None
    contexts = Contexts(models, trained=config.trains_text, store=store)
    contexts.fill(all_captions(dataset, config) or [])
    device = models["diffusion"].conv_in.weight.device

    def micro_loss(number: int) -> torch.Tensor:
        indices = batches(number)
        variants = batch_variants(dataset, indices, config, number)
        mean, std = posteriors(indices, variants)
        latents = mean + std * batch_noise(mean.shape, config, number, "posterior")
        weights, mask = batch_weights(dataset, indices, config), posteriors.masks(indices, variants)
        context = contexts(batch_captions(dataset, indices, config, number))
        t = draw_timesteps(len(indices), models.config, config, number)
        noise, input_noise = draw_noise(latents.shape, config, number)
        return diffusion_loss(models, sent(latents, device), context, sent(t, device), sent(noise, device), objective=config,
                              input_noise=sent(input_noise, device), weights=None if weights is None else sent(weights, device),
                              mask=None if mask is None else sent(mask, device))

    return micro_loss


def vae_batches(config: TrainConfig, models: Models, dataset: PictureData, loss: Callable) -> Callable[[int], torch.Tensor]:
    """Micro-batch number -> loss, for the autoencoder."""
    vae, device, batches = models.config.vae, models.device, Batches(dataset, config)

    def micro_loss(number: int) -> torch.Tensor:
        indices = batches(number)
        shown = zip(indices, batch_variants(dataset, indices, config, number))
        pictures = torch.stack([dataset.picture(i, variant) for i, variant in shown])
        b, _, h, w = pictures.shape
        noise = batch_noise((b, vae.latent_channels, h // vae.factor, w // vae.factor), config, number, "posterior")
        return loss(models, sent(pictures, device), sent(noise, device), config.kl_weight)

    return micro_loss
