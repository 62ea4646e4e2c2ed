"""How the networks are run while a training lasts: compiled, in a memory format, with deterministic kernels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from sd.adapters.merging import merge
from sd.models import Models


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


def placed_for(network: nn.Module, x: Tensor) -> Tensor:
    """x on the device and in the dtype of the network's weights; as it is for a network without weights."""
    weight = next(network.parameters(), x)
    return x.to(weight.device, weight.dtype)


@contextmanager
def placed(models, keys: Iterable[str], device) -> Iterator[None]:
    """Networks on another device inside the block: frozen ones leave it when all that is needed of them is cached."""
    before = {key: placed_for(models[key], torch.empty(0)).device for key in keys}
    try:
        _move(models, dict.fromkeys(before, torch.device(device)))
        yield
    finally:
        _move(models, before)


def _move(models, places: Mapping[str, torch.device]) -> None:
    for key, device in places.items():
        if placed_for(models[key], torch.empty(0)).device != device:
            models[key].to(device)  # which drops merged weights
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Placement:
    """Brings a network to the device when it is needed, merged if asked, and sends the one before to `idle_device`."""

    def __init__(self, models: Models, device: torch.device, idle_device, merged: bool):
        self.models, self.device, self.idle, self.merged, self.current = models, device, idle_device, merged, None

    def __call__(self, name: str | None):
        if self.idle is not None and self.current not in (None, name):
            self.models[self.current].to(self.idle)
        self.current = name
        if name is None:
            return None
        network, wanted = self.models[name], self.device
        there = placed_for(network, torch.empty(0, device=wanted)).device
        # A network that is there already is not touched: a move drops merged weights. "cuda" means any of its devices.
        if there.type != wanted.type or wanted.index not in (None, there.index):
            network.to(wanted)
        if self.merged:
            merge(network)
        return network
