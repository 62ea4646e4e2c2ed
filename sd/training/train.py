"""The training loop, for a LoRA, for whole networks and for the autoencoder. To resume, run the same command again.

Everything random in micro-batch number n is a pure function of (seed, purpose, n), so no random state is saved, and
N steps are the same bits as k steps, a kill at any instant and N - k steps (with the same number of threads).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from sd.checkpoint import atomic_write
from sd.lora import adapter_names, apply_lora_to_model, lora_layers, named_layers, remove_lora, use_adapters
from sd.model_loader import Models, preload_models_from_standard_weights, save_checkpoint, save_models_lora
from sd.quant import quantize_base, quantized_kinds
from sd.training.data import (
    Contexts,
    PictureFolder,
    batch_captions,
    batch_indices,
    batch_noise,
    encode_pictures,
    seed_of,
)
from sd.training.loss import check_objective, diffusion_loss, objective_rules, vae_loss
from sd.training.noise import draw_noise, draw_timesteps
from sd.training.optim import SCHEDULES, adamw, lr_factor, set_learning_rate, update_ema
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

MAX_LOSS = 1000.0  # a network that answers 0 has a loss of 1
MAX_SKIPPED = 20  # bad steps in a row, then the training stops


@dataclass(frozen=True)
class TrainConfig:
    """Train a LoRA, or the whole model, on a folder of pictures with captions; the same command again resumes."""

    data: str = ""
    """Folder of pictures with captions: a .txt beside each, or one metadata.jsonl."""
    out: str = "out/train"
    """Folder of the run: state, metrics, loss curve and result. The same command with the same folder resumes."""
    model: str | None = None
    """Checkpoint or diffusers folder to start from; none: the embedded model."""
    train: Literal["lora", "full", "vae"] = "lora"
    """A LoRA, all weights of UNet and/or text encoder, or the autoencoder."""
    unet: bool = True
    """Whether the UNet is trained (its LoRA, or all of it)."""
    text_encoder: bool = False
    """Train the text encoder (its LoRA, or all of it)."""

    name: str = "lora"
    """Name of the LoRA, and of its file in the out folder."""
    kind: Literal["lora", "full", "loha", "lokr", "ia3", "glora", "oft", "boft"] = "lora"
    """What is learned beside each weight: see sd/lora_kinds.py."""
    rank: int = 4
    """Rank of the LoRA."""
    alpha: float = 4.0
    """The LoRA is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023); files hold alpha times sqrt(rank)."""
    quantize: Literal["none", "nf4", "nf4-double", "int8", "fp8"] = "none"
    """Hold the frozen base in few bits (QLoRA): 4.5, 4.1 or 8 bits a value of UNet and text encoder."""
    dropout: float = 0.0
    """Dropout on the input of the LoRA's layers."""
    rank_dropout: float = 0.0
    """Dropout on the ranks of the LoRA."""
    module_dropout: float = 0.0
    """Probability with which a layer is trained without its LoRA."""
    dora: bool = False
    """Train a magnitude as well (DoRA)."""
    targets: tuple[str, ...] = ("attn",)
    """Layers with a LoRA: a preset (attn, kohya, full), module names or regular expressions."""

    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 4
    """Pictures in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in an optimizer step."""
    size: int | None = None
    """Pictures are scaled and cut to size x size pixels; none: what the model is made for."""
    caption_dropout: float = 0.1
    """Probability of an empty caption, from which guidance is learned."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW."""
    text_learning_rate: float | None = None
    """Learning rate of the text encoder; none: the same."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or half a cosine down to 0."""
    warmup: int = 0
    """Steps in which the learning rate rises to its value."""
    weight_decay: float = 0.01
    """Weight decay of matrices and convolutions; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's two moving averages."""
    clip_norm: float = 1.0
    """Largest norm of the gradient, all weights together; 0: no limit."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then the result; 0: none."""
    kl_weight: float = 1e-3
    """Weight of the posterior's KL in the autoencoder's loss."""
    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    """Error of each number; the two others count large errors less."""
    huber_delta: float = 0.1
    """Where huber and smooth_l1 turn from squares to absolute errors."""
    weighting: Literal["none", "min_snr", "debiased", "p2"] = "none"
    """Weight of a timestep by its signal-to-noise ratio."""
    snr_gamma: float = 5.0
    """The gamma of min_snr."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise; for models that predict v."""
    min_timestep: int = 0
    """Lowest timestep that is trained."""
    max_timestep: int | None = None
    """The timesteps below it are trained; none: all."""
    timestep_bias: float = 1.0
    """Above 1 prefers small timesteps, the details; below 1 large ones, the composition."""
    noise_offset: float = 0.0
    """Share of noise that is one number for each image and channel: darker and brighter pictures."""
    pyramid_noise: float = 0.0
    """Discount of coarser noise that is added level by level; 0: none."""
    input_perturbation: float = 0.0
    """Other noise that the input has and the target has not."""
    checkpointing: bool = False
    """Compute the UNet's activations a second time in the backward: less memory, a third more time."""
    seed: int = 0
    """Everything random follows from it."""
    save_every: int = 500
    """Steps between two saves of the state."""
    progress: bool = True
    """Whether a progress bar is shown."""

    def __post_init__(self):
        def require(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise TrainError(f"{field} is {getattr(self, field)!r}; allowed: {allowed}")

        for field in ("steps", "batch_size", "accumulate", "save_every"):
            require(getattr(self, field) >= 1, field, "1 or more")
        for field in ("caption_dropout", "dropout", "rank_dropout", "module_dropout", "ema"):
            require(0 <= getattr(self, field) < 1, field, f"0 <= {field} < 1")
        for field in ("learning_rate", "text_learning_rate"):
            rate = getattr(self, field)
            require(rate is None or 0 < rate <= 0.1, field, "above 0, to 0.1 (a usual one is 1e-4 to 1e-3)")
        for field in ("warmup", "weight_decay", "clip_norm", "kl_weight", "seed"):
            require(0 <= getattr(self, field) < math.inf, field, "0 or more")
        for ok, field, allowed in objective_rules(self):
            require(ok, field, allowed)
        require(len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers of 0 <= beta < 1")
        require(self.schedule in SCHEDULES, "schedule", ", ".join(SCHEDULES))
        require(self.train in ("lora", "full", "vae"), "train", "lora, full, vae")
        require(bool(self.out), "out", "a folder")
        require(0 < len(self.name) <= 100 and Path(self.name).name == self.name and self.name not in ("..", "state"), "name",
                "a file's name of up to 100 letters, without its ending, and not 'state'")
        require(self.batch_size <= 4096, "batch_size", "1 to 4096")
        require(0 < abs(self.alpha) <= 1e4, "alpha", "a number other than 0, to 10000")
        require(self.weight_decay <= 10, "weight_decay", "0 to 10")
        require(self.size is None or self.size >= 8, "size", "8 or more pixels")
        require(self.train == "lora" or (self.kind, self.rslora, self.quantize) == ("lora", False, "none"), "train",
                "lora, where kind, rslora or quantize is given")
        if self.train != "vae" and not (self.unet or self.text_encoder):
            raise TrainError("nothing is trained: unet and text_encoder are both off")


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
        dataset = _picture_folder(config, models)
    if config.quantize != "none" and quantized_kinds(models) != [config.quantize]:
        quantize_base(models, config.quantize)
    with alone_in(folder), torch.random.fork_rng(), _training(config, models) as parameters:
        optimizer = adamw(parameters, config)
        ema = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
        facts = run_facts(config, ("data", "out", "model", "save_every", "progress", "checkpointing"),
                          dataset=dataset.fingerprint(), base=fingerprint(models, parameters))
        done = load_state(folder, parameters, optimizer, ema, facts)
        _write_json(folder / "config.json", asdict(config) | {"dataset": facts["dataset"], "base": facts["base"]})
        metrics = Metrics(folder, done.step)
        bar = tqdm(total=config.steps, initial=done.step, unit="step", disable=not config.progress, dynamic_ncols=True)
        micro_loss = (_vae_loss(config, models, dataset, autoencoder_loss) if config.train == "vae" else
                      _diffusion_loss(config, models, dataset))

        for step in range(done.step, config.steps + 1):
            if step == config.steps or (step % config.save_every == 0 and step > done.step):
                metrics.sync()
                done.step = step
                save_state(folder, done, parameters, optimizer, ema, facts)
            if step == config.steps:
                break

            factor = lr_factor(step, schedule=config.schedule, warmup=config.warmup, steps=config.steps)
            set_learning_rate(optimizer, factor)
            loss = 0.0
            for number in range(step * config.accumulate, (step + 1) * config.accumulate):
                torch.manual_seed(seed_of(config.seed, "layers", number))  # dropout inside the layers
                micro = micro_loss(number) / config.accumulate
                micro.backward()
                loss += micro.item()
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm or math.inf).item()
            good = math.isfinite(norm) and loss < MAX_LOSS
            if good:
                optimizer.step()
                update_ema(ema, parameters, config.ema, step)
            optimizer.zero_grad()

            _count(done, good, step, loss, config)
            metrics.add(step=step, loss=_finite(loss), grad_norm=_finite(norm), lr=config.learning_rate * factor,
                        skipped=done.skipped)
            bar.set_postfix(loss=f"{metrics.recent_loss():.4f}", refresh=False)
            bar.update()

        bar.close()
        with torch.no_grad():
            for name, value in ema.items():
                parameters[name].copy_(value)
        metrics.plot(folder / "loss.png")
        _save_result(config, models, folder, facts, len(dataset))
    return models


def _diffusion_loss(config: TrainConfig, models: Models, dataset):
    """micro-batch number -> loss, for the UNet, the text encoder and their LoRAs."""
    check_objective(config, models.config)
    mean, std = encode_pictures(models, dataset)
    contexts = Contexts(models, trained=config.text_encoder)
    device = models["diffusion"].conv_in.weight.device

    def micro_loss(number: int) -> torch.Tensor:
        indices = batch_indices(len(dataset), config, number)
        latents = mean[indices] + std[indices] * batch_noise(mean[indices].shape, config, number, "posterior")
        context = contexts(batch_captions(dataset, indices, config, number))
        t = draw_timesteps(len(indices), models.config, config, number)
        noise, input_noise = draw_noise(latents.shape, config, number)
        return diffusion_loss(models, latents.to(device), context, t.to(device), noise.to(device), objective=config,
                              input_noise=input_noise.to(device))

    return micro_loss


def _vae_loss(config: TrainConfig, models: Models, dataset, loss):
    """micro-batch number -> loss, for the autoencoder."""
    vae, device = models.config.vae, models["encoder"].conv_in.weight.device

    def micro_loss(number: int) -> torch.Tensor:
        indices = batch_indices(len(dataset), config, number)
        pictures = torch.stack([dataset.picture(i) for i in indices])
        b, _, h, w = pictures.shape
        noise = batch_noise((b, vae.latent_channels, h // vae.factor, w // vae.factor), config, number, "posterior")
        return loss(models, pictures.to(device), noise.to(device), config.kl_weight)

    return micro_loss


@contextmanager
def _training(config: TrainConfig, models: Models) -> Iterator[dict[str, nn.Parameter]]:
    """The weights to train, by name; they alone have gradients inside the block, and afterwards all is as it was."""
    before = [(p, p.requires_grad) for network in models.values() for p in network.parameters()]
    modes = [(module, module.training) for _, module in named_layers(models)]
    unet, checkpointing, adapters = models["diffusion"], models["diffusion"].checkpointing, adapter_names(models)
    try:
        for network in models.values():
            network.eval().requires_grad_(False)
        parameters = _parameters(config, models)
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


def _parameters(config: TrainConfig, models: Models) -> dict[str, nn.Parameter]:
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


def _picture_folder(config: TrainConfig, models: Models) -> PictureFolder:
    size, factor = config.size or models.config.image_size, models.config.vae.factor
    if size > models.config.largest_size:
        raise TrainError(f"size is {size}; allowed: up to {models.config.largest_size} pixels, 8 times what this model is "
                         f"made for")
    if size % factor:
        raise TrainError(f"size is {size}; it must be a multiple of {factor}, such as {size - size % factor or factor}")
    if not config.data:
        raise TrainError("no data: name a folder of pictures with captions")
    return PictureFolder(config.data, size=size, channels=models.config.vae.image_channels)


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
             "ss_optimizer": "torch.optim.AdamW", "ss_lr_scheduler": config.schedule, "ss_lr_warmup_steps": config.warmup,
             "ss_max_grad_norm": config.clip_norm, "ss_caption_dropout_rate": config.caption_dropout,
             "ss_network_dropout": config.dropout, "ss_num_train_images": pictures, "ss_mixed_precision": "no"}
    metadata |= {key: str(value) for key, value in kohya.items()}
    save_models_lora(models, folder / f"{config.name}.safetensors", config.name, metadata=metadata)
