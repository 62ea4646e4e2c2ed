"""Train the emoji model's text encoder from scratch, to predict what a picture looks like, before there is a UNet.

Stable Diffusion's text encoder was trained on pictures before the UNet. A UNet trained together with a new text encoder spends
a long time on the look of pictures, and hardly learns the meaning of words. Here a small network regresses the latents of a
picture from its caption in one step. It predicts a blurred mean of all pictures with that caption, but is cheap to train.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import CrossAttention
from sd.config import ModelConfig
from sd.model_loader import Models
from sd.training import TrainConfig
from sd.training.dataset.batches import Batches, batch_captions
from sd.training.dataset.cache import Posteriors
from sd.training.dataset.contexts import Contexts
from sd.training.interrupt import asked_to_stop
from sd.training.optim import autocast, lr_factor, make_optimizer, set_learning_rate
from sd.training.run_state import Progress, alone_in, load_state, made_with, open_folder, run_facts, save_state


class Drawer(nn.Module):
    """Context [B, L, D] to latents [B, C, H, W]: each square of the picture attends to the text."""

    def __init__(self, config: ModelConfig, width: int = 192, squares: int = 4):
        super().__init__()
        self.squares, self.side = squares, config.image_size // config.vae.factor // squares
        self.places = nn.Parameter(0.3 * torch.randn(squares**2, width))
        self.norm1 = nn.LayerNorm(width)
        self.attention = CrossAttention(4, width, config.clip.width, in_proj_bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.norm3 = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.vae.latent_channels * self.side**2)

    def forward(self, context: Tensor) -> Tensor:
        x = self.places.expand(len(context), -1, -1)
        x = x + self.attention(self.norm1(x), context)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        x = self.out(self.norm3(x)).transpose(1, 2).unflatten(2, (self.squares, self.squares))
        return F.pixel_shuffle(x, self.side)


def train_text(config: TrainConfig, models: Models, dataset) -> Drawer:
    """Train models["clip"] in place, on the squared error of the latents that a Drawer predicts from its context."""
    torch.manual_seed(config.seed)
    drawer = Drawer(models.config)
    networks = {"clip": models["clip"], "drawer": drawer}
    parameters = {f"{key}.{name}": p.requires_grad_(True) for key, network in networks.items()
                  for name, p in network.train().named_parameters()}
    optimizer, folder = make_optimizer(parameters, config), open_folder(config.out)
    facts = run_facts(config, ("out", "cache", "save_every", "progress"), dataset=dataset.fingerprint())
    latents, _ = Posteriors(models, dataset, config.cache)(range(len(dataset)))
    batches, contexts = Batches(dataset, config), Contexts(models, trained=True)
    with alone_in(folder), asked_to_stop() as stop:
        done, losses = load_state(folder, parameters, optimizer, {}, facts, made_with=made_with(latents.device)), []
        for step in range(done.step, config.steps):
            set_learning_rate(optimizer, lr_factor(step, config))
            indices = batches(step)
            with autocast(config.precision, latents.device):
                made = drawer(contexts(batch_captions(dataset, indices, config, step)))
            loss = F.mse_loss(made.float(), latents[indices])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            stopping = stop()
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps or stopping:
                save_state(folder, Progress(step + 1), parameters, optimizer, {}, facts, made_with(latents.device))
            if (step + 1) % 100 == 0:
                print(f"step {step + 1} of {config.steps}, loss {sum(losses) / len(losses):.4f}", flush=True)
                losses.clear()
            if stopping:
                raise KeyboardInterrupt(f"stopped after {step + 1} of {config.steps} steps; the same command resumes")
    for network in networks.values():
        network.eval().requires_grad_(False)
    return drawer
