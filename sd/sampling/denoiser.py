"""From a network to `denoise(x, sigma) -> x0`: the one border between samplers (VE, fp32) and networks (VP, any dtype).

B batch, C channels, H, W latent height and width, L tokens, D context width, R rows of a network call (B, or 2B with guidance).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sd.errors import SDError
from sd.sampling.noise import Schedule


class EpsDenoiser:
    """x0 = x - sigma eps for a network that predicts the noise, Ho et al. 2020, equation 15.

    network(x [R, C, H, W] in VP, t [R] in fp32, context [R, L, D], rows [R], the image of each row) -> [R, C, H, W].
    `extra` [B, 5, H, W]: mask and masked latents for an inpainting UNet, concatenated to x as further channels.
    """

    def __init__(self, network: Callable, schedule: Schedule, *, dtype: torch.dtype = torch.float32,
                 extra: Tensor | None = None):
        self.network, self.schedule, self.dtype, self.extra = network, schedule, dtype, extra

    def __call__(self, x: Tensor, sigma: float, context: Tensor, rows: Tensor) -> Tensor:
        x_vp = x / (1 + sigma**2) ** 0.5
        if self.extra is not None:
            x_vp = torch.cat([x_vp, self.extra[rows].to(x_vp)], dim=1)
        t = torch.full((len(x),), self.schedule.timestep(sigma), dtype=torch.float32, device=x.device)
        out = self.network(x_vp.to(self.dtype), t, context.to(self.dtype), rows)
        return self.x0(x, sigma, out.to(x.dtype))

    def x0(self, x: Tensor, sigma: float, out: Tensor) -> Tensor:
        return x - sigma * out


class VDenoiser(EpsDenoiser):
    """x0 = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v for a network that predicts v, Salimans and Ho 2022."""

    def x0(self, x: Tensor, sigma: float, out: Tensor) -> Tensor:
        return x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * out


DENOISERS = {"eps": EpsDenoiser, "v": VDenoiser}  # by ModelConfig.prediction


class CFGDenoiser:
    """x0 = uncond + scale (cond - uncond), Ho and Salimans 2022, equation 6: the `denoise(x, sigma)` for a sampler.

    context [B, L, D], uncond [B, L, D] or [1, L, D]. A network call has 2B rows, uncond first; at scale 1 only the B of cond.
    Raises SDError when uncond is missing or does not fit.
    """

    def __init__(self, denoise: EpsDenoiser, context: Tensor, uncond: Tensor | None = None, scale: float = 1.0):
        self.denoise, self.context, self.scale = denoise, context, scale
        if scale == 1:
            return
        if uncond is None:
            raise SDError(f"cfg_scale {scale} needs an unconditional context; without one it can only be 1")
        if uncond.shape[1:] != context.shape[1:] or len(uncond) not in (1, len(context)):
            raise SDError(f"the unconditional context is {list(uncond.shape)}, the other {list(context.shape)}")
        self.context = torch.cat([uncond.expand_as(context), context])

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        images = torch.arange(len(x), device=x.device)
        if self.scale == 1:
            return self.denoise(x, sigma, self.context, images)
        x0 = self.denoise(torch.cat([x, x]), sigma, self.context, torch.cat([images, images]))
        uncond, cond = x0.chunk(2)
        return uncond + self.scale * (cond - uncond)
