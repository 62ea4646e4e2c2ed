"""Training losses.

B images, C channels, H, W height and width of latents or pictures, L tokens, D context width, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sd.config import ModelConfig
from sd.errors import SDError
from sd.sampling.noise import LOG_SNR, add_noise, alphas_cumprod, cosine_angle, velocity, zero_terminal
from sd.training.errors import TrainError
from sd.vae import sample_posterior

if TYPE_CHECKING:
    from sd.training.config import TrainConfig


def _pseudo_huber(out: Tensor, target: Tensor, delta: float) -> Tensor:
    """sqrt(r^2 + delta^2) - delta, written so that a small r does not cancel."""
    square = (out - target).square()
    return square / ((square + delta * delta).sqrt() + delta)


# Elementwise. The last two are scaled as in Khrapov et al. 2024 (and kohya): huber approaches the squared error for small
# errors, smooth_l1 twice the absolute error for large ones.
LOSSES = {
    "mse": lambda out, target, delta: (out - target).square(),
    "huber": lambda out, target, delta: 2 * delta * _pseudo_huber(out, target, delta),
    "smooth_l1": lambda out, target, delta: 2 * _pseudo_huber(out, target, delta),
}

# Weights of the error in x0, by SNR = abar / (1 - abar). The squared error in eps is SNR times, in v SNR + 1 times that in x0
# (Salimans and Ho 2022), so these weights are divided by that factor; for eps this gives the weights of the papers.
WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor] | None] = {
    "none": None,
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma),  # Hang et al. 2023, section 3.4
    "debiased": lambda snr, gamma: snr.sqrt(),  # Yu et al. 2023: 1 / sqrt(SNR) for eps
    "p2": lambda snr, gamma: snr / (1 + snr),  # Choi et al. 2022, equation 8 with k = gamma = 1
}


@dataclass(frozen=True)
class Objective:
    """The diffusion objective; the defaults are Ho et al. 2020. A TrainConfig has the same fields and can be used instead."""

    loss: str = "mse"
    huber_delta: float = 0.1
    weighting: str = "none"
    snr_gamma: float = 5.0
    zero_terminal_snr: bool = False


PLAIN = Objective()


@dataclass(frozen=True)
class MicroLoss:
    """Micro-batch number -> loss: the host says what is seen, as tensors on the device, and the rest is a function of those."""

    inputs: Callable[[int], dict[str, Tensor]]
    loss: Callable[..., Tensor]

    def __call__(self, number: int) -> Tensor:
        return self.loss(**self.inputs(number))


def diffusion_loss(models, latents: Tensor, context: Tensor, t: Tensor, noise: Tensor, *,
                   objective: Objective | TrainConfig = PLAIN, input_noise: Tensor | None = None,
                   weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Mean error of the UNet's prediction (eps or v) at x_t, Ho et al. 2020, equation 14, with `objective`; a scalar in fp32.

    latents: [B, C, H, W] in the UNet's scale (VAE latents times `config.vae.scale`), noise: the same shape,
    context: [B, L, D], t: [B] timesteps, integers unless the schedule is the continuous cosine. input_noise: the noise in x_t,
    if it differs from the target's. weights: [B], a factor for each image; mask: [B, 1, H, W], a factor for each position.
    Raises SDError if t, noise, weights or mask do not fit the latents or the schedule, and TrainError as `noise_levels` does.
    """
    b, _, h, w = latents.shape
    for name, value, shape in (("t", t, (b,)), ("noise", noise, latents.shape), ("input_noise", input_noise, latents.shape),
                               ("weights", weights, (b,)), ("mask", mask, (b, 1, h, w))):
        if value is not None and value.shape != shape:
            raise SDError(f"latents are {list(latents.shape)}, so {name} must be {list(shape)}; it is {list(value.shape)}")
    unet, abar = models["diffusion"], _levels_on(latents.device, models.config, objective.zero_terminal_snr)
    dtype = unet.conv_in.weight.dtype  # the network may be half; noise levels and the loss are fp32
    at = t  # indices of the images' noise levels in abar
    if t.is_floating_point():
        if models.config.beta_schedule != "cosine":
            raise SDError(f"t is {t.dtype}; with the schedule {models.config.beta_schedule} timesteps are whole numbers")
        abar = cosine_angle(t, models.config.train_timesteps).cos().square().clamp(max=1 - 2**-24)  # stays below 1 in fp32
        at = torch.arange(b, device=t.device)
    x_t = add_noise(latents.float(), (noise if input_noise is None else input_noise).float(), at, abar)
    out = unet(x_t.to(dtype), t, context.to(dtype)).float()
    target = noise.float() if models.config.prediction == "eps" else velocity(latents.float(), noise.float(), at, abar)

    if objective.loss == "mse" and objective.weighting == "none" and weights is None and mask is None:
        return F.mse_loss(out, target)  # the same as below, in one kernel
    error = LOSSES[objective.loss](out, target, objective.huber_delta)
    each = (error if mask is None else error * mask).flatten(1).mean(1)
    if objective.weighting != "none":
        table = snr_weights(abar, models.config.prediction, objective)
        each = each * table.float().to(t.device)[at]
    return (each if weights is None else each * weights).mean()


_ON_CUDA: dict[tuple[torch.device, ModelConfig, bool], Tensor] = {}


def _levels_on(device: torch.device, config: ModelConfig, zero_terminal_snr: bool) -> Tensor:
    """Those of `noise_levels`: on CUDA sent once, not in each step; elsewhere on the CPU, since not every device has fp64."""
    abar = noise_levels(config, zero_terminal_snr)
    if device.type != "cuda" or type(abar) is not Tensor:  # a fake one, when memory is counted, must not be kept
        return abar
    key = device, config, zero_terminal_snr
    if key not in _ON_CUDA:
        _ON_CUDA[key] = abar.to(device)
    return _ON_CUDA[key]


def noise_levels(config, zero_terminal_snr: bool = False) -> Tensor:
    """alphas_cumprod [T] in fp64; with `zero_terminal_snr` rescaled to end at 0, Lin et al. 2024, algorithm 1.

    Raises TrainError for a model that predicts eps: at the last timestep its input would be its target.
    """
    if config.zero_terminal_snr or not zero_terminal_snr:
        return alphas_cumprod(config)
    if config.beta_schedule == "cosine":
        raise TrainError(f"zero_terminal_snr rescales betas; this model's schedule is the cosine, which ends at a log SNR of "
                         f"-{LOG_SNR:g}")
    if config.prediction == "eps":
        raise TrainError("zero_terminal_snr needs a model that predicts v; this one predicts eps, which at an SNR of 0 "
                         "is its input")
    return zero_terminal(alphas_cumprod(config))


def snr_weights(abar: Tensor, prediction: str, objective: Objective | TrainConfig) -> Tensor:
    """The loss weight of each timestep, [T] in fp64, from alphas_cumprod [T]; see WEIGHTINGS."""
    snr = abar / (1 - abar)
    weigh = WEIGHTINGS[objective.weighting]
    assert weigh is not None, "weighting none needs no table"
    return weigh(snr, objective.snr_gamma) / (snr if prediction == "eps" else snr + 1)


def check_objective(config, model_config) -> None:
    """Raises TrainError before the first step if the model cannot be trained with this objective."""
    noise_levels(model_config, config.zero_terminal_snr)
    steps = model_config.train_timesteps
    for field in ("min_timestep", "max_timestep"):
        value, most = getattr(config, field), steps - (field == "min_timestep")
        if value is not None and value > most:
            raise TrainError(f"{field} is {value}; allowed: up to {most}, since this model has {steps} timesteps")


def vae_loss(models, pictures: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Mean squared reconstruction error plus `kl_weight` times the KL of the posterior; a scalar.

    pictures: [B, C, H, W] in [-1, 1], noise: [B, 4, H/f, W/f]. Both terms are means, over pixels and over latents
    (Kingma and Welling 2014, equation 10 and appendix B).
    """
    mean, logvar = models["encoder"](pictures)
    rebuilt = models["decoder"](sample_posterior(mean, logvar, noise))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.mse_loss(rebuilt, pictures) + kl_weight * kl
