"""How networks are run: on which device, merged, compiled, with deterministic kernels. All of it ends with its `with` block."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from sd.adapters.merging import merge, unmerge
from sd.adapters.quant import quantized_kinds
from sd.adapters.switch import active_multipliers
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
def at(network: nn.Module, device, afterwards=None) -> Iterator[nn.Module]:
    """The network is on `device` inside the block; then it goes where it was, or to the device `afterwards`.

    A network that is there already is not touched: a move drops merged weights.
    """
    before = _device_of(network, device)
    _move(network, device)
    try:
        yield network
    finally:
        _move(network, before if afterwards is None else afterwards)


@contextmanager
def placed(models, keys: Iterable[str], device) -> Iterator[None]:
    """Networks on another device inside the block: frozen ones leave it when all that is needed of them is cached."""
    with ExitStack() as stack:
        stack.callback(_free_cache)  # after the networks are back
        for key in keys:
            stack.enter_context(at(models[key], device))
        _free_cache()
        yield


@dataclass(frozen=True)
class Networks:
    """The networks of a model as a call of `generate` runs them."""

    models: Models
    device: torch.device
    idle_device: torch.device | None = None  # where they go after use; None: where they were
    merged: bool = False

    @contextmanager
    def use(self, key: str) -> Iterator[nn.Module]:
        """The network on the device, merged if asked, inside the block. Its merged weights stay until it moves."""
        with at(self.models[key], self.device, self.idle_device) as network:
            if self.merged:
                merge(network)
            yield network


def should_merge(models: Models, merged: bool | str) -> bool:
    """Whether to run merged weights; "auto": in fp32, where all images have the same LoRA. False frees those that are there."""
    if merged is False:
        unmerge(models)
    if merged != "auto":
        return bool(merged)
    # In half precision the sum W + ΔW rounds away a good part of a usual ΔW; the adapters' own path keeps it.
    same_for_all = not any(isinstance(m, tuple) for m in active_multipliers(models).values())
    # Merged weights are whole ones: of a quantised base they would take what it saves.
    return same_for_all and models.dtype == torch.float32 and not quantized_kinds(models)


def _device_of(network: nn.Module, default) -> torch.device:
    """Of its weights; the default for a network without weights."""
    weight = next(network.parameters(), None)
    return torch.device(default) if weight is None else weight.device


def _move(network: nn.Module, device) -> None:
    there, wanted = _device_of(network, device), torch.device(device)
    if there.type != wanted.type or wanted.index not in (None, there.index):  # "cuda" means any of its devices
        network.to(wanted)


def _free_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
