"""The training loop, for a LoRA, for whole networks and for the autoencoder. To resume, run the same command again.

Everything random in micro-batch number n is a pure function of (seed, purpose, n), so no random state is saved, and
N steps are the same bits as k steps, a kill at any instant and N - k steps (with the same number of threads).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from sd.checkpoint import atomic_write
from sd.lora import lora_layers, modules_of
from sd.model_loader import Models, preload_models_from_standard_weights, save_checkpoint, save_models_lora
from sd.quant import quantize_base, quantized_kinds
from sd.training.config import TrainConfig
from sd.training.data import (
    Batches,
    Contexts,
    Pictures,
    all_captions,
    batch_captions,
    batch_noise,
    batch_variants,
    batch_weights,
    open_data,
    seed_of,
)
from sd.training.latent_cache import Posteriors, TextStore, cached_pictures
from sd.training.loss import check_objective, diffusion_loss, vae_loss
from sd.training.noise import draw_noise, draw_timesteps
from sd.training.optim import (
    autocast,
    limit_norms,
    lr_factor,
    make_optimizer,
    next_loss_scale,
    set_learning_rate,
    settle,
    unscale,
    update_ema,
)
from sd.training.run_state import (
    Metrics,
    Progress,
    TrainError,
    alone_in,
    fingerprint,
    load_state,
    open_folder,
    run_facts,
    save_state,
)
from sd.training.trained import training

MAX_LOSS = 1000.0  # a network that answers 0 has a loss of 1
MAX_SKIPPED = 20  # bad steps in a row, then the training stops


def train(config: TrainConfig, models: Models | None = None, dataset=None, *, autoencoder_loss=vae_loss) -> Models:
    """Train `models` (none: `config.model`) on `dataset` (none: `config.data`); returns the models.

    They are trained in place; a LoRA is left attached and active, and with `quantize` the base stays quantised. The result
    goes into `config.out`, as `<name>.safetensors` or model.safetensors. `autoencoder_loss` has the arguments of `vae_loss`
    and may replace it. Raises TrainError or DataError, before the first step wherever that can be known.
    """
    folder = open_folder(config.out)
    if models is None:
        models = preload_models_from_standard_weights(config.model, dtype=torch.float32)
    if dataset is None:
        dataset = _open_data(config, models)
    if config.quantize != "none" and quantized_kinds(models) != [config.quantize]:
        quantize_base(models, config.quantize)
    with alone_in(folder), torch.random.fork_rng(), training(config, models) as parameters:
        optimizer = make_optimizer(parameters, config, modules_of(models))
        layers = lora_layers(models) if config.max_norm else {}
        ema = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
        facts = run_facts(config, ("data", "reg_data", "cache", "out", "model", "save_every", "progress",
                                   "checkpointing"),
                          dataset=dataset.fingerprint(), base=fingerprint(models, parameters))
        done = load_state(folder, parameters, optimizer, ema, facts)
        _write_json(folder / "config.json", asdict(config) | {"dataset": facts["dataset"], "base": facts["base"]})
        metrics = Metrics(folder, done.step)
        bar = tqdm(total=config.steps, initial=done.step, unit="step", disable=not config.progress, dynamic_ncols=True)
        device = next(iter(parameters.values())).device
        micro_loss = (_vae_loss(config, models, dataset, autoencoder_loss) if config.train == "vae" else
                      _diffusion_loss(config, models, dataset))

        for step in range(done.step, config.steps + 1):
            if step == config.steps or (step % config.save_every == 0 and step > done.step):
                metrics.sync()
                done.step = step
                save_state(folder, done, parameters, optimizer, ema, facts)
            if step == config.steps:
                break

            factor = lr_factor(step, schedule=config.schedule, warmup=config.warmup, steps=config.steps,
                               cycles=config.cycles, power=config.power)
            scale = done.loss_scale if config.precision == "fp16" else 1.0
            set_learning_rate(optimizer, factor)
            loss = 0.0
            for number in range(step * config.accumulate, (step + 1) * config.accumulate):
                torch.manual_seed(seed_of(config.seed, "layers", number))  # dropout inside the layers
                with autocast(config.precision, device):
                    micro = micro_loss(number) / config.accumulate
                (micro * scale).backward()
                loss += micro.item()
            unscale(parameters.values(), scale)
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm or math.inf).item()
            good = math.isfinite(norm) and loss < MAX_LOSS
            if good:
                optimizer.step()
                limit_norms(layers, config.name, config.max_norm)
                update_ema(ema, parameters, config.ema, step)
            optimizer.zero_grad()

            if config.precision == "fp16":
                done.loss_scale, done.good_steps = next_loss_scale(done.loss_scale, done.good_steps, math.isfinite(norm))
            _count(done, good, step, loss, config)
            metrics.add(step=step, loss=_finite(loss), grad_norm=_finite(norm), lr=config.learning_rate * factor,
                        skipped=done.skipped)
            bar.set_postfix(loss=f"{metrics.recent_loss():.4f}", refresh=False)
            bar.update()

        bar.close()
        settle(optimizer)
        with torch.no_grad():
            for name, value in ema.items():
                parameters[name].copy_(value)
        metrics.plot(folder / "loss.png")
        _save_result(config, models, folder, facts, len(dataset))
    return models


def _diffusion_loss(config: TrainConfig, models: Models, dataset):
    """micro-batch number -> loss, for the UNet, the text encoder and their LoRAs."""
    check_objective(config, models.config)
    posteriors, batches = Posteriors(models, dataset, config.cache, progress=config.progress), Batches(dataset, config)
    store = TextStore(config.cache, models) if config.cache and not config.text_encoder else None
    contexts = Contexts(models, trained=config.text_encoder, store=store)
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
        return diffusion_loss(models, latents.to(device), context, t.to(device), noise.to(device), objective=config,
                              input_noise=input_noise.to(device), weights=None if weights is None else weights.to(device),
                              mask=None if mask is None else mask.to(device))

    return micro_loss


def _vae_loss(config: TrainConfig, models: Models, dataset, loss):
    """micro-batch number -> loss, for the autoencoder."""
    vae, device, batches = models.config.vae, models["encoder"].conv_in.weight.device, Batches(dataset, config)

    def micro_loss(number: int) -> torch.Tensor:
        indices = batches(number)
        shown = zip(indices, batch_variants(dataset, indices, config, number))
        pictures = torch.stack([dataset.picture(i, variant) for i, variant in shown])
        b, _, h, w = pictures.shape
        noise = batch_noise((b, vae.latent_channels, h // vae.factor, w // vae.factor), config, number, "posterior")
        return loss(models, pictures.to(device), noise.to(device), config.kl_weight)

    return micro_loss


def _open_data(config: TrainConfig, models: Models) -> Pictures:
    size, factor = config.size or models.config.image_size, models.config.vae.factor
    if size > models.config.largest_size:
        raise TrainError(f"size is {size}; allowed: up to {models.config.largest_size} pixels, 8 times what this model is "
                         f"made for")
    if size % factor:
        raise TrainError(f"size is {size}; it must be a multiple of {factor}, such as {size - size % factor or factor}")
    if not config.data:
        raise TrainError("no data: name a folder of pictures with captions")
    return open_data(config, size=size, channels=models.config.vae.image_channels, factor=factor,
                     known=cached_pictures(config.cache))


def _count(done: Progress, good: bool, step: int, loss: float, config: TrainConfig) -> None:
    done.skipped += not good
    done.skipped_in_a_row = 0 if good else done.skipped_in_a_row + 1
    if done.skipped_in_a_row >= MAX_SKIPPED:
        raise TrainError(f"{MAX_SKIPPED} steps in a row, to step {step}, had no usable loss or gradient (the last loss "
                         f"is {loss:g}): the training has diverged; use a lower learning rate than "
                         f"{config.learning_rate:g} and another out folder")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _write_json(path: Path, values: dict) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def _save_result(config: TrainConfig, models: Models, folder: Path, facts: dict, pictures: int) -> None:
    metadata = {"sdlora.training": json.dumps(facts), "sdlora.base_quantization": ",".join(quantized_kinds(models)) or "none"}
    if config.train != "lora":
        models.source = None  # they are no longer what that file holds
        save_checkpoint(models, folder / "model.safetensors", metadata=metadata)
        return
    kohya = {"ss_output_name": config.name, "ss_learning_rate": config.learning_rate, "ss_unet_lr": config.learning_rate,
             "ss_text_encoder_lr": config.text_learning_rate or config.learning_rate, "ss_max_train_steps": config.steps,
             "ss_steps": config.steps, "ss_seed": config.seed, "ss_batch_size_per_device": config.batch_size,
             "ss_gradient_accumulation_steps": config.accumulate, "ss_gradient_checkpointing": config.checkpointing,
             "ss_optimizer": config.optimizer, "ss_lr_scheduler": config.schedule, "ss_lr_warmup_steps": config.warmup,
             "ss_max_grad_norm": config.clip_norm, "ss_caption_dropout_rate": config.caption_dropout,
             "ss_network_dropout": config.dropout, "ss_num_train_images": pictures,
             "ss_scale_weight_norms": config.max_norm or None,
             "ss_mixed_precision": "no" if config.precision == "fp32" else config.precision}
    metadata |= {key: str(value) for key, value in kohya.items()}
    save_models_lora(models, folder / f"{config.name}.safetensors", config.name, metadata=metadata)
