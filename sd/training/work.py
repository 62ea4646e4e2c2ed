"""What a step computes on the device: the gradients of its micro-batches, then the update.

Each is a function of its inputs and of tensors that stay where they are. So on CUDA both are repeated from graphs
(sd/graphs.py), which have the kernels of a plain call, and its bits.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from sd.adapters.quant import quantized_kinds
from sd.adapters.targets import lora_layers
from sd.graphs import Graphs, tapes_on
from sd.models import Models
from sd.training.config import TrainConfig
from sd.training.dist import clip_gradients, is_joined
from sd.training.loss import MicroLoss
from sd.training.optim import autocast, ema_rate, limit_norms, next_loss_scale, step_unless, unscale, update_ema

MAX_LOSS = 1000.0  # a network that answers 0 has a loss of 1
GRAPHS_KEPT = 16  # one for the update, the others for the sizes of micro-batches
CAPTURED = ("lora", "full", "loha", "lokr")  # kinds; orthogonal ones solve equations, for which the host waits


class Work:
    """The work of a run on its parameters, their optimizer, moving average and loss scale, all written in place."""

    def __init__(self, config: TrainConfig, models: Models, parameters: dict[str, nn.Parameter],
                 optimizer: torch.optim.Optimizer, ema: dict[str, Tensor], micro_loss: MicroLoss, scale: Tensor):
        self.config, self.parameters, self.optimizer, self.ema = config, parameters, optimizer, ema
        self.micro_loss, self.scale = micro_loss, scale  # [loss scale, good steps since it changed]
        self.layers = lora_layers(models) if config.max_norm else {}
        self.rate = torch.zeros((), device=scale.device)  # of the moving average
        tapes = tapes_on(scale.device) if can_be_captured(config, models) else None
        self.graphs = None if tapes is None else Graphs(tapes, GRAPHS_KEPT)

    def add_gradients(self, number: int) -> Tensor:
        """Add the gradients of a micro-batch; returns its part of the step's loss."""
        with autocast(self.config.precision, self.scale.device):
            inputs = self.micro_loss.inputs(number)
        names = tuple(inputs)

        def run(*tensors: Tensor) -> Tensor:
            with torch.enable_grad():
                with autocast(self.config.precision, self.scale.device):
                    part = self.micro_loss.loss(**dict(zip(names, tensors))) / self.config.accumulate
                (part * self.scale[0]).backward()
            return part.detach()

        return self._call(names, run, *inputs.values())

    def update(self, loss: Tensor, step: int) -> Tensor:
        """Take an optimizer step with the gradients, unless they or the loss are bad; then they are gone.

        Returns the loss, the gradients' norm, and whether they are bad.
        """
        self.rate.fill_(ema_rate(self.config.ema, step))
        return self._call("update", self._update, loss)

    def _update(self, loss: Tensor) -> Tensor:
        if self.config.precision == "fp16":
            unscale(self.parameters.values(), self.scale[0])
        norm = clip_gradients(self.parameters.values(), self.config.clip_norm)
        bad = ~(norm.isfinite() & (loss < MAX_LOSS))
        step_unless(bad, self.optimizer)
        limit_norms(self.layers, self.config.name, self.config.max_norm)
        update_ema(self.ema, self.parameters, self.rate, bad)
        self.optimizer.zero_grad(set_to_none=self.graphs is None)  # a graph adds to gradients where they are
        if self.config.precision == "fp16":
            self.scale.copy_(next_loss_scale(self.scale, norm.isfinite()))
        return torch.stack([loss, norm, bad])

    def release(self) -> None:
        """Free graphs and gradients, before the networks are used otherwise: that may move weights, and needs the memory.

        Adapters that are used drop what was derived from them in the next step, which is a plain one.
        """
        if self.graphs is not None:
            self.graphs.kept = {}
            self.optimizer.zero_grad()

    def _call(self, key: Hashable, run, *inputs: Tensor) -> Tensor:
        return run(*inputs) if self.graphs is None else self.graphs.repeat(key, run, inputs)


def can_be_captured(config: TrainConfig, models: Models) -> bool:
    """Whether all steps do the same on the same tensors: no chance, no processes, nothing that waits for the host or moves."""
    adapters = [layer.adapter(name) for layer in lora_layers(models).values() for name in layer.adapter_names]
    moves = config.checkpointing or config.compile or config.relora_every or config.trains_text or is_joined()
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in models["diffusion"].modules())
    return (config.train == "lora" and config.optimizer == "adamw" and not (moves or hooked or quantized_kinds(models))
            and all(adapter.kind in CAPTURED and not adapter.drops for adapter in adapters))
