"""Tensors of every dtype, and code in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from sd.files.tensor_file import DTYPES

ROOT = Path(__file__).parents[2]


def some_tensors() -> dict[str, torch.Tensor]:
    """One tensor of each dtype, odd sizes, an empty one, a scalar."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (7, 3), generator=generator)
    tensors = {f"of.{name}": raw.to(dtype) for name, dtype in DTYPES.items()}
    tensors["weight"] = torch.randn(5, 3, generator=generator)
    return tensors | {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name


def run(code: str, *args, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | env)
