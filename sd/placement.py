"""How networks run: device, merged weights, compilation, deterministic kernels; each as a `with` block that restores it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from sd.adapters.merging import merge, unmerge
from sd.adapters.quant import quantized_kinds
from sd.adapters.switch import active_multipliers
from sd.cpu import tune, tuned
from sd.graphs import forget, repeated
from sd.models import Models
from sd.packed import pack, works


@contextmanager
def run_as(config, models: Models) -> Iterator[None]:
    """Apply `config.compile` and `config.deterministic` inside the block, and undo both afterwards.

    On CUDA the networks are in channels_last, as loaded ones are. The UNet is compiled for each shape separately:
    dynamic code depends on which shapes came first, so a resumed run would not give the same bits.
    """
    unet, before = models["diffusion"], torch.are_deterministic_algorithms_enabled()
    if models.device.type == "cuda":
        for network in models.values():
            network.to(memory_format=torch.channels_last)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
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
    """x on the device and in the dtype of the network's weights; unchanged for a network without weights."""
    weight = next(network.parameters(), x)
    return x.to(weight.device, weight.dtype)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; from the host without waiting for what runs there."""
    waits = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if waits else x.to(device)


@contextmanager
def at(network: nn.Module, device, afterwards=None) -> Iterator[nn.Module]:
    """Move the network to `device` inside the block; afterwards back, or to the device `afterwards`.

    A network already on the device is not touched, because a move drops merged weights.
    """
    before = _device_of(network, device)
    _move(network, device)
    try:
        yield network
    finally:
        _move(network, before if afterwards is None else afterwards)


@contextmanager
def placed(models, keys: Iterable[str], device) -> Iterator[None]:
    """Move networks to another device inside the block, such as frozen ones whose outputs are fully cached."""
    with ExitStack() as stack:
        stack.callback(_free_cache)  # after the networks are back
        for key in keys:
            stack.enter_context(at(models[key], device))
        _free_cache()
        yield


@dataclass(frozen=True)
class Networks:
    """The networks of a model, as one call of `generate` runs them."""

    models: Models
    device: torch.device
    idle_device: torch.device | None = None  # where each is moved after use; None: back
    merged: bool = False

    @contextmanager
    def use(self, key: str) -> Iterator[nn.Module]:
        """The network on the device inside the block, merged if `merged`. Its merged weights stay until it moves.

        The UNet of a CUDA device, called many times, is repeated from graphs, unless it goes away after each use.
        """
        stays = _is_at(self.models[key], self.device) and self.idle_device is None
        with at(self.models[key], self.device, self.idle_device) as network:
            if self.merged:
                merge(network)
            if self.device.type == "cpu" and key == "diffusion":  # the others run once a picture
                pack(network)
            with repeated(network) if key == "diffusion" and stays else nullcontext():
                yield network


def running(device: torch.device) -> str:
    """How networks run on a device, in words."""
    if device.type != "cpu":
        return f"torch {torch.__version__}, {device}"
    tuning = [*tune(), *(["packed weights"] if tuned() and works(torch.float32) else [])]
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {', '.join(tuning) or 'untuned'}"


def should_merge(models: Models, merged: bool | str) -> bool:
    """Whether to run merged weights; "auto": in fp32, if all images have the same LoRA. False also frees existing ones."""
    if merged is False:
        unmerge(models)
    if merged != "auto":
        return bool(merged)
    # In half precision the sum W + ΔW rounds away a good part of a typical ΔW; unmerged adapters keep it.
    same_for_all = not any(isinstance(m, tuple) for m in active_multipliers(models).values())
    # Merged weights are not quantised: they would cost the memory that a quantised base saves.
    return same_for_all and models.dtype == torch.float32 and not quantized_kinds(models)


def _device_of(network: nn.Module, default) -> torch.device:
    """The device of the network's weights; `default` for a network without weights."""
    weight = next(network.parameters(), None)
    return torch.device(default) if weight is None else weight.device


def _is_at(network: nn.Module, device) -> bool:
    there, wanted = _device_of(network, device), torch.device(device)
    return there.type == wanted.type and wanted.index in (None, there.index)  # "cuda" means any of its devices


def _move(network: nn.Module, device) -> None:
    if not _is_at(network, device):
        forget(network)
        network.to(torch.device(device))


def _free_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
