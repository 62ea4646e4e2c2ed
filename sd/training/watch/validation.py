"""The validation loss, on held-out pictures with the same noise and timesteps in every run.

B images, h, w latents, T timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sd.files.hashes import digest
from sd.training.dataset.batches import picture_options
from sd.training.dataset.cache import Posteriors
from sd.training.dataset.captions import seen_caption
from sd.training.dataset.contexts import Contexts, TextStore
from sd.training.dataset.data import PictureData
from sd.training.loss import Objective, diffusion_loss
from sd.training.optim import autocast

TIMESTEPS = 8  # per picture: one from each eighth of the trained range


class Validation:
    """() -> mean squared error on the held-out pictures, with noise and timesteps that depend on each picture alone.

    Runs can therefore be compared, whatever their seed, batch size (up to rounding), weighting and other pictures.
    Each picture has its first caption, its first crop and T timesteps spread evenly over the trained range. For the
    autoencoder it is `autoencoder_loss`.
    """

    def __init__(self, config, models, held_out: PictureData, autoencoder_loss=None):
        self.config, self.models, self.pictures, self.autoencoder_loss = config, models, held_out, autoencoder_loss
        self.seeds = [_seed(held_out.picture(i)) for i in range(len(held_out))]
        if config.train == "vae":
            return
        self.posteriors = Posteriors(models, held_out, config.cache, progress=config.progress)
        store = TextStore(config.cache, models) if config.cache and not config.trains_text else None
        self.contexts = Contexts(models, trained=config.trains_text, store=store)
        self.contexts.fill(self._caption(i) for i in range(len(held_out)))

    @torch.no_grad()
    def __call__(self) -> float:
        """The loss; reads from the device only once."""
        loss = self._autoencoder if self.config.train == "vae" else self._diffusion
        device = self.models.device
        total, count = torch.zeros((), device=device), 0
        with autocast(self.config.precision, device):
            for rows in self._batches(1 if self.config.train == "vae" else TIMESTEPS):
                total += loss(rows, device) * len(rows)
                count += len(rows)
        return total.item() / count

    def _batches(self, times: int) -> Iterator[list[tuple[int, int]]]:
        """Batches of (picture, number of its timestep), as large as in training, each from one bucket."""
        buckets = self.pictures.bucket_of
        for bucket in sorted(set(buckets)):
            rows = [(i, k) for i, own in enumerate(buckets) if own == bucket for k in range(times)]
            yield from (rows[n:n + self.config.batch_size] for n in range(0, len(rows), self.config.batch_size))

    def _diffusion(self, rows: list[tuple[int, int]], device: torch.device) -> Tensor:
        indices, config = [i for i, _ in rows], self.config
        mean, std = self.posteriors(indices)
        draws = [self._draw(i, mean.shape[1:]) for i in indices]
        latents = mean + std * torch.stack([posterior for posterior, _, _ in draws])
        noise = torch.stack([noise[k] for (_, noise, _), (_, k) in zip(draws, rows)])
        t = torch.tensor([t[k] for (_, _, t), (_, k) in zip(draws, rows)])
        mask = self.posteriors.masks(indices)
        return diffusion_loss(self.models, latents.to(device), self.contexts([self._caption(i) for i in indices]), t.to(device),
                              noise.to(device), objective=Objective(zero_terminal_snr=config.zero_terminal_snr),
                              mask=None if mask is None else mask.to(device))

    def _draw(self, i: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int]]:
        """For picture i: noise for its posterior [C, h, w], noise [T, C, h, w], and T timesteps."""
        rng = torch.Generator().manual_seed(self.seeds[i])
        low, high = self.config.min_timestep, self.config.max_timestep or self.models.config.train_timesteps
        u = torch.rand((), generator=rng, dtype=torch.float64).item()
        t = [low + int((high - low) * (k + u) / TIMESTEPS) for k in range(TIMESTEPS)]
        return torch.randn(shape, generator=rng), torch.randn((TIMESTEPS, *shape), generator=rng), t

    def _caption(self, i: int) -> str:
        """The first caption; wildcards and shuffling are drawn the same way each time."""
        options = picture_options(self.pictures, self.config, i)
        return seen_caption(self.pictures.captions[i][0], options, np.random.default_rng(self.seeds[i]))

    def _autoencoder(self, rows: list[tuple[int, int]], device: torch.device) -> Tensor:
        vae = self.models.config.vae
        pictures = torch.stack([self.pictures.picture(i) for i, _ in rows])
        shape = vae.latent_channels, pictures.shape[2] // vae.factor, pictures.shape[3] // vae.factor
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(self.seeds[i])) for i, _ in rows])
        return self.autoencoder_loss(self.models, pictures.to(device), noise.to(device), self.config.kl_weight)


def _seed(picture: Tensor) -> int:
    """63 bits of the hash of the pixels."""
    return int(digest([picture])[:16], 16) >> 1
