"""How the networks are run while a training lasts: compiled, in a memory format, with deterministic kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sd.model_loader import Models


@contextmanager
def run_as(config, models: Models) -> Iterator[None]:
    """Inside, what `config.compile` and `config.deterministic` ask for holds; afterwards all is as it was.

    On CUDA convolutions are in channels_last, the layout of their fastest kernels. Compiled for each shape on its own: code
    that depended on which shapes came first would not give the same bits after a resume.
    """
    unet, before = models["diffusion"], torch.are_deterministic_algorithms_enabled()
    if models.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    if config.compile:
        unet.compile(dynamic=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        if config.compile:
            unet._compiled_call_impl = None
