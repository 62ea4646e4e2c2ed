"""Random numbers as pure functions of (seed, stream, number)."""

from __future__ import annotations

import numpy as np
import torch

STREAMS = ("init", "order", "caption", "caption dropout", "posterior", "timestep", "noise", "layers", "batch order", "words",
           "variant", "new words")


def seed_of(seed: int, stream: str, *number: int) -> int:
    """A 63-bit seed for one purpose and one number: never seed + number, where the streams of near seeds would meet."""
    return int(np.random.SeedSequence([seed, STREAMS.index(stream), *number]).generate_state(1, np.uint64)[0] >> 1)


def torch_rng(seed: int, stream: str, number: int) -> torch.Generator:
    """A CPU generator, so that the draws are the same on every device."""
    return torch.Generator().manual_seed(seed_of(seed, stream, number))


def numpy_rng(seed: int, stream: str, *number: int) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, stream, *number))
