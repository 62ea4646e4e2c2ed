"""Random numbers as pure functions of (seed, stream, number)."""

from __future__ import annotations

import numpy as np
import torch

# Append only: the numbers are the seeds of every past run.
STREAMS = {"init": 0, "order": 1, "caption": 2, "caption dropout": 3, "posterior": 4, "timestep": 5, "noise": 6, "layers": 7,
           "batch order": 8, "words": 9, "variant": 10, "new words": 11}


def seed_of(seed: int, stream: str, *number: int) -> int:
    """A 63-bit seed for one stream and number. Never seed + number: the streams of neighbouring seeds would overlap."""
    return int(np.random.SeedSequence([seed, STREAMS[stream], *number]).generate_state(1, np.uint64)[0] >> 1)


def torch_rng(seed: int, stream: str, number: int) -> torch.Generator:
    """A CPU generator, so that the draws are the same on every device."""
    return torch.Generator().manual_seed(seed_of(seed, stream, number))


def numpy_rng(seed: int, stream: str, *number: int) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, stream, *number))
