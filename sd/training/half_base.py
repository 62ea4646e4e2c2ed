"""The frozen base in half precision while a training with `precision` bf16 or fp16 runs.

Autocast rounds the weights of linear layers and convolutions anew at every use, and backward keeps each of these copies.
Rounded once, the frozen ones are the same numbers: no bit of the training changes, only its time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sd.adapters.fused import is_pair
from sd.adapters.layer import LoRALayer
from sd.models import Models
from sd.training.optim import PRECISIONS

ROUNDED = (nn.Linear, nn.modules.conv._ConvNd)  # with these alone autocast rounds weights


class HalfBase:
    """The weights that can be rounded once, and their full values, which return at the end.

    The full values of a GPU's weights wait in the computer's memory. On the CPU they stay where they are: beside the rounded
    ones, which take no more than the copies that backward kept, or in the file that they are mapped from. With checkpointing
    backward keeps those of one block only, so there the CPU rounds at every use.
    """

    def __init__(self, config, models: Models):
        self.dtype = PRECISIONS[config.precision]
        costs_memory = config.checkpointing and models.device.type == "cpu"
        self.weights = [] if self.dtype is None or costs_memory else _frozen(config, models)
        self.full: list[Tensor] = []

    def round(self) -> None:
        for p in self.weights:
            self.full.append(p.detach().cpu())
            p.data = p.data.to(self.dtype)

    def restore(self) -> None:
        """Return the full values, bit for bit. Does nothing if they are back already."""
        while self.full:
            p = self.weights[len(self.full) - 1]
            p.data = self.full.pop().to(p.device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The full values inside the block, for what runs without autocast."""
        self.restore()
        yield
        self.round()

    @property
    def beside(self) -> int:
        """Bytes of full values that are kept on the networks' own device."""
        return sum(full.nbytes for p, full in zip(self.weights, self.full) if p.device == full.device)


@contextmanager
def half_base(config, models: Models) -> Iterator[HalfBase]:
    """Round the frozen weights of the networks that `config` runs under autocast, inside the block; see HalfBase."""
    base = HalfBase(config, models)
    try:
        base.round()
        yield base
    finally:
        base.restore()


def _frozen(config, models: Models) -> list[nn.Parameter]:
    """The frozen fp32 weights and biases that are only ever used in half precision.

    Those are not whose full values an adapter reads (any but a plain pair of factors), and those of the UNet's first
    convolution, whose dtype is that of what the UNet is given.
    """
    networks = () if config.train == "vae" else ("diffusion", "clip") if config.trains_text else ("diffusion",)
    layers = [layer for key in networks for layer in models[key].modules()
              if isinstance(layer, ROUNDED) and layer is not models["diffusion"].conv_in and not _is_read(layer)]
    found = {id(p): p for layer in layers for p in (layer.weight, layer.bias)
             if isinstance(p, nn.Parameter) and not p.requires_grad and p.dtype == torch.float32}
    return list(found.values())


def _is_read(layer: nn.Module) -> bool:
    return isinstance(layer, LoRALayer) and (
        layer.is_quantized or not all(is_pair(layer.adapter(name)) for name in layer.adapter_names))
