"""Evaluate data/digits.safetensors and its LoRA with a classifier; writes contact sheets to out/digits/.

    python -m recipes.digits.evaluate
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.digits.data import OUT, WORDS, captions, load_mnist, split
from recipes.digits.train import LORA, MODEL
from sd.files.tensors import read_tensors, write_safetensors
from sd.model_loader import Models, load_lora_into_models, preload_models_from_standard_weights
from sd.pictures.image_io import save_image
from sd.pictures.sheets import contact_sheet
from sd.pipeline import generate

EACH = 20  # generated pictures of each digit
SAMPLING = {"sampler_name": "dpmpp_2m", "n_inference_steps": 20, "cfg_scale": 2.0}


# ---- classifier ------------------------------------------------------------------------------------------------------

def classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, 10))


def moved(pictures: Tensor) -> Tensor:
    """Augmentation: rotate by up to 15 degrees, scale by up to 10 % and shift by up to 2 pixels."""
    n = len(pictures)
    angle, scale = (torch.rand(n) - 0.5) * math.radians(30), 1 + (torch.rand(n) - 0.5) * 0.2
    shift = (torch.rand(n, 2) - 0.5) * 4 / 16  # in grid units, 16 pixels are 1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures + 1, grid, align_corners=False) - 1  # padding is black


def train_classifier(pictures: Tensor, digits: Tensor, epochs: int = 20, batch: int = 64) -> nn.Module:
    """Train on augmented pictures; deterministic on one machine. The classifier is kept in out/digits/."""
    path = OUT / "classifier.safetensors"
    model = classifier()
    if path.exists():
        model.load_state_dict(read_tensors(path))
        return model.eval()
    torch.manual_seed(0)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    steps = epochs * (len(pictures) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for indices in torch.randperm(len(pictures)).split(batch)[: len(pictures) // batch]:
            F.cross_entropy(model(moved(pictures[indices])), digits[indices]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    write_safetensors(path, model.state_dict())
    return model.eval()


@torch.no_grad()
def correct(judge: nn.Module, pictures: Tensor, digits: Tensor) -> float:
    """Accuracy of the classifier on pictures [N, 1, 32, 32] in [-1, 1] of `digits`."""
    return (judge(pictures).argmax(dim=1) == digits).float().mean().item()


# ---- measurements ----------------------------------------------------------------------------------------------------

def prompts() -> tuple[list[str], Tensor]:
    """(EACH prompts for every digit, cycling through its captions; their digits)."""
    texts = [captions(d)[k % len(captions(d))] for d in range(10) for k in range(EACH)]
    return texts, torch.arange(10).repeat_interleave(EACH)


def make(models: Models, **options) -> Tensor:
    """Generate the pictures of all prompts, [200, 1, 32, 32] in [-1, 1], with seeds 0 to 199."""
    made = generate(prompts()[0], models=models, seed=0, **(SAMPLING | options))
    return to_tensor(made)


def to_tensor(made: np.ndarray) -> Tensor:
    """Grey uint8 [B, H, W, 3] to [B, 1, H, W] in [-1, 1]."""
    return torch.from_numpy(made[..., 0]).float()[:, None] / 127.5 - 1


def brightness(pictures: Tensor) -> float:
    """Mean of all pixels, from 0 (black) to 255 (white)."""
    return ((pictures + 1) * 127.5).mean().item()


@torch.no_grad()
def vae_psnr(models: Models, pictures: Tensor) -> float:
    """PSNR in dB of pictures decoded from the mean of their posterior, averaged over pictures."""
    rebuilt = torch.cat([models["decoder"](models["encoder"](p)[0]) for p in pictures.split(50)]).clamp(-1, 1)
    return (10 * torch.log10(4 / (rebuilt - pictures).square().mean(dim=(1, 2, 3)))).mean().item()


def sheet(path: Path, pictures: Tensor) -> None:
    """Write a contact sheet with a row of EACH pictures per digit."""
    grey = ((pictures[:, 0] + 1) * 127.5).round().byte().numpy()
    rows = [list(grey[d * EACH:(d + 1) * EACH]) for d in range(10)]
    save_image(contact_sheet(rows, row_labels=list(WORDS), tile=64), path)


def main() -> None:
    torch.set_num_threads(1)
    pictures, digits = load_mnist()
    train, held_out = split(digits)
    judge = train_classifier(pictures[train], digits[train])
    print(f"judge: {correct(judge, pictures[held_out], digits[held_out]):.1%} of the 1,000 held-out pictures are right")

    models = preload_models_from_standard_weights(MODEL, "cpu")
    for name, sign in (("white on black", 1), ("black on white", -1)):
        print(f"VAE, {name}: PSNR {vae_psnr(models, sign * pictures[held_out]):.1f} dB on the held-out pictures")

    asked = prompts()[1]
    base = make(models)
    sheet(OUT / "base.png", base)
    print(f"base: {correct(judge, base, asked):.1%} of {len(asked)} pictures are the digit asked for, "
          f"brightness {brightness(base):.0f} of 255 ({', '.join(f'{k} {v}' for k, v in SAMPLING.items())})")
    if not LORA.exists():
        return
    load_lora_into_models(models, LORA, "inverted")
    inverted = make(models, lora={"inverted": 1.0})
    sheet(OUT / "inverted.png", inverted)
    print(f"LoRA: {correct(judge, -inverted, asked):.1%} after inverting back, brightness {brightness(inverted):.0f}")
    off = {"multiplier 0": {"lora": {"inverted": 0.0}}, "use_lora=False": {"use_lora": False}}
    for name, options in off.items():
        same = torch.equal(make(models, **options), base)
        print(f"{name}: {'bit-identical to the base' if same else 'DIFFERS FROM THE BASE'}")


if __name__ == "__main__":
    main()
