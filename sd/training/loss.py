"""What is minimised. B images, C channels, H, W height and width of latents or pictures, L tokens, D context width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sd.noise import add_noise, alphas_cumprod, velocity
from sd.vae import sample_posterior


def diffusion_loss(models, latents: Tensor, context: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the UNet's eps or v at x_t, Ho et al. 2020, equation 14; a scalar in fp32.

    latents: [B, C, H, W] in the UNet's scale (VAE latents times `config.vae.scale`), noise: the same shape,
    context: [B, L, D], t: [B] whole timesteps, one for each image.
    Raises ValueError when t or noise do not fit the latents.
    """
    if t.shape != latents.shape[:1] or noise.shape != latents.shape:
        raise ValueError(f"latents are {list(latents.shape)}, so t must be {list(latents.shape[:1])} and noise as the "
                         f"latents; they are {list(t.shape)} and {list(noise.shape)}")
    unet, abar = models["diffusion"], alphas_cumprod(models.config)
    dtype = unet.conv_in.weight.dtype  # the network may be half; noise levels and the loss are fp32
    x_t = add_noise(latents.float(), noise.float(), t, abar)
    out = unet(x_t.to(dtype), t, context.to(dtype)).float()
    target = noise if models.config.prediction == "eps" else velocity(latents.float(), noise.float(), t, abar)
    return F.mse_loss(out, target.float())


def vae_loss(models, pictures: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Mean squared error of a picture after encoding, sampling and decoding, plus `kl_weight` times the posterior's KL.

    pictures: [B, C, H, W] in [-1, 1], noise: [B, 4, H/f, W/f]. Both terms are means, over pixels and over latents
    (Kingma and Welling 2014, equation 10 and appendix B). Returns a scalar.
    """
    mean, logvar = models["encoder"](pictures)
    rebuilt = models["decoder"](sample_posterior(mean, logvar, noise))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.mse_loss(rebuilt, pictures) + kl_weight * kl
