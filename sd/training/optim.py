"""Optimizer, learning rate and moving average: pure functions of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "cosine")


def adamw(parameters: dict[str, nn.Parameter], config) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019): matrices decay, biases and norms do not; the text encoder may have a rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        text = name.startswith("clip.") and config.text_learning_rate is not None
        rate = config.text_learning_rate if text else config.learning_rate
        groups.setdefault((rate, config.weight_decay if p.dim() > 1 and not name.endswith("magnitude") else 0.0), []).append(p)
    return torch.optim.AdamW(
        [{"params": ps, "lr": rate, "initial_lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()],
        betas=config.betas, fused=True)


def lr_factor(step: int, *, schedule: str, warmup: int, steps: int) -> float:
    """What the learning rate is multiplied by in step 0, 1, ..: linear over `warmup`, then 1 or half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's own rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float, step: int) -> None:
    """ema += (1 - d) (p - ema), in place; d rises to `decay`, so that the random start is soon forgotten."""
    if ema:
        decay = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [parameters[name].data for name in ema], 1 - decay)
