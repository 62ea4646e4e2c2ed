"""The cost of a training: memory counted on tensors without data, time measured on one micro-batch.

B images, C channels, H, W pixels, h, w latents, L tokens, D context width.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sd.adapters.attach import remove_lora
from sd.adapters.switch import adapter_names
from sd.placement import placed_for
from sd.training.config import TrainConfig
from sd.training.dataset.data import PictureData
from sd.training.dist import devices, world
from sd.training.half_base import half_base
from sd.training.loss import diffusion_loss, vae_loss
from sd.training.optim import OPTIMIZERS, autocast
from sd.training.step import idle_networks
from sd.training.trained import training
from sd.training.watch.describe import describe_config, describe_data, describe_held_out, describe_parameters
from sd.training.watch.monitor import size_text

log = logging.getLogger("sd")


@dataclass(frozen=True)
class Estimate:
    """Memory of a training in bytes, by part, and seconds per step."""

    weights: int
    idle: int  # the part of them that leaves the device before the first step
    gradients: int
    optimizer: int
    average: int  # moving average of the weights
    activations: int  # peak of forward and backward, without the gradients
    encoding: int  # peak of encoding the pictures, before the first step
    checkpointing: bool
    other_activations: int | None  # with checkpointing off if it is on, and vice versa
    seconds: float
    steps: int

    @property
    def step(self) -> int:
        """Peak bytes of a step, without Python, libraries and the device's own buffers."""
        return self.weights - self.idle + self.gradients + self.optimizer + self.average + self.activations

    @property
    def peak(self) -> int:
        return max(self.step, self.weights + self.average + self.encoding)

    def __str__(self) -> str:
        parts = {"weights": self.weights - self.idle, "gradients": self.gradients, "optimizer": self.optimizer,
                 "moving average": self.average, "activations": self.activations}
        lines = [f"{name:<16}{size_text(n):>9}" for name, n in parts.items() if n]
        other = "" if self.other_activations is None else (
            f"   ({'without' if self.checkpointing else 'with'} checkpointing "
            f"{size_text(self.step - self.activations + self.other_activations)})")
        lines.append(f"{'a step':<16}{size_text(self.step):>9}{other}")
        if self.peak > self.step:
            lines.append(f"{'encoding':<16}{size_text(self.peak):>9}   of the pictures, before the first step")
        return "\n".join([*lines, f"{'time':<16}{duration(self.seconds):>9} a step, {duration(self.seconds * self.steps)} for "
                                  f"{self.steps:,} steps"])


def estimate(config: TrainConfig, models, dataset: PictureData, parameters: Mapping[str, nn.Parameter], *, steps: int,
             compare: bool = True) -> Estimate:
    """The cost of `steps` steps that train `parameters` (inside `training`) on pictures of the sizes in `dataset`.

    Bytes are counted for the largest pictures. Seconds are those of forward and backward, without saves, samples and
    validation. `compare`: also fill in `other_activations`. Changes only torch's random state.
    """
    sizes, used = dataset.sizes, dataset.uses
    largest = max(sizes, key=lambda size: size[0] * size[1])
    area = sum(sizes[i][0] * sizes[i][1] for i in used) / len(used) / (largest[0] * largest[1])
    gradients = sum(p.nbytes for p in parameters.values())

    def activations(checkpointing: bool) -> int:
        return max(0, peak_bytes(models, one_step(config, models, largest), checkpointing=checkpointing) - gradients)

    encoded = 0 if config.train == "vae" else min(16, len(dataset)) if len(set(sizes)) == 1 and not config.cache else 1
    idle = () if models.device.type == "cpu" else idle_networks(config, models, dataset)
    compare = compare and config.train != "vae" and config.unet
    with half_base(config, models) as base:
        return Estimate(
            weights=_bytes(models.values()) + base.beside, idle=_bytes(models[key] for key in idle), gradients=gradients,
            optimizer=optimizer_bytes(config, parameters.values()), average=gradients if config.ema else 0,
            activations=activations(config.checkpointing), checkpointing=config.checkpointing,
            other_activations=activations(not config.checkpointing) if compare else None,
            encoding=peak_bytes(models, _encode(models, largest, encoded)) if encoded else 0,
            seconds=area * config.accumulate / world() * _seconds(config, models, parameters, largest),
            steps=steps)


# ---- memory ----------------------------------------------------------------------------------------------------------

def one_step(config: TrainConfig, models, size: tuple[int, int]) -> Callable[[], None]:
    """A function that runs forward and backward on a micro-batch of pictures of (width, height) pixels, all 0."""
    device, c, (width, height), b = models.device, models.config, size, config.batch_size

    def step() -> None:
        with autocast(config.precision, device):
            latents = torch.zeros(b, c.vae.latent_channels, height // c.vae.factor, width // c.vae.factor, device=device)
            if config.train == "vae":
                pictures = torch.zeros(b, c.vae.image_channels, height, width, device=device)
                loss = vae_loss(models, pictures, latents, config.kl_weight)
            else:
                tokens = torch.zeros(b, c.clip.max_tokens, dtype=torch.long, device=device)
                context = (models["clip"](tokens) if config.trains_text else
                           torch.zeros(*tokens.shape, c.clip.width, device=device))  # [B, L, D]
                t = torch.zeros(b, dtype=torch.long, device=device)
                loss = diffusion_loss(models, latents, context, t, torch.ones_like(latents), objective=config)
        loss.backward()

    return step


def _encode(models, size: tuple[int, int], n: int) -> Callable[[], None]:
    def step() -> None:
        pictures = torch.zeros(n, models.config.vae.image_channels, size[1], size[0])
        with torch.no_grad():
            models["encoder"](placed_for(models["encoder"], pictures))
    return step


def peak_bytes(models, step: Callable[[], None], *, checkpointing: bool = False) -> int:
    """Peak bytes of `step`, with gradients but without the networks' weights.

    Runs on tensors without data (torch's FakeTensorMode), which select the same kernels as real ones; the result is within
    3 % of what the allocator reports. Workspaces of kernels are not counted (oneDNN's on the CPU is 0.5 GB for SD 1.5).
    """
    networks, unet = _Networks(models, step), models["diffusion"]
    before, unet.checkpointing = unet.checkpointing, checkpointing
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            state = {name: torch.empty_like(t, device=t.device).requires_grad_(t.requires_grad)
                     for name, t in (*networks.named_parameters(), *networks.named_buffers())}
            with _Peak(state.values()) as peak:
                functional_call(networks, state, ())
    finally:
        unet.checkpointing = before
    return peak.most


class _Networks(nn.Module):
    """Runs `step` on the networks, so that functional_call can replace their tensors."""

    def __init__(self, models, step: Callable[[], None]):
        super().__init__()
        self.networks, self.step = nn.ModuleDict(models), step

    def forward(self) -> None:
        self.step()


class _Peak(TorchDispatchMode):
    """Counts the bytes of live storages that were created inside; those of `given` tensors are not counted."""

    def __init__(self, given: Iterable[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.given = [t.untyped_storage() for t in given]  # kept alive, or their ids would be reused
        self.alive: dict[int, object] = dict.fromkeys(s._cdata for s in self.given)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, made)
        return made

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self.alive or tensor.device.type == "meta":  # meta tensors have no data in a real run either
            return
        self.now += size
        self.most = max(self.most, self.now)

        def gone(_) -> None:
            self.now -= size
            del self.alive[number]

        self.alive[number] = weakref.ref(storage, gone)


def optimizer_bytes(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the optimizer's states, measured after one step on a stand-in for each shape."""
    total = 0
    by_shape: dict[tuple, list[nn.Parameter]] = {}
    for p in parameters:
        by_shape.setdefault((p.shape, p.dtype), []).append(p)
    for alike in by_shape.values():
        p = nn.Parameter(alike[0].detach().clone())  # Prodigy keeps less state for one that starts at 0
        rate = {"lr": config.learning_rate, "initial_lr": config.learning_rate, "weight_decay": config.weight_decay}
        optimizer = OPTIMIZERS[config.optimizer]([{"params": [p], **rate}], config)
        p.grad = torch.ones_like(p)
        optimizer.step()
        total += len(alike) * sum(value.nbytes for value in optimizer.state[p].values() if isinstance(value, Tensor))
    return total


def _bytes(networks: Iterable[nn.Module]) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in _storages(networks)}.values())


def _storages(networks: Iterable[nn.Module]) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for network in networks for t in (*network.parameters(), *network.buffers())]


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


# ---- time ------------------------------------------------------------------------------------------------------------

def _seconds(config: TrainConfig, models, parameters: Mapping[str, nn.Parameter], size: tuple[int, int]) -> float:
    """Seconds of a micro-batch, measured on the second, or on the first if that took long."""
    step, device = one_step(config, models, size), models.device
    for _ in range(2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        for p in parameters.values():
            p.grad = None
        if seconds > 5:
            break
    return seconds


def duration(seconds: float) -> str:
    """Two digits and a unit, such as 0.42 s, 12 s, 3.5 min or 2.1 h."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600), ("days", 86400)):
        value = seconds / size
        if value < {"s": 100, "min": 100, "h": 48}.get(unit, float("inf")):
            break
    return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"


# ---- text ------------------------------------------------------------------------------------------------------------

def announce(config: TrainConfig, models, dataset: PictureData, parameters: Mapping[str, nn.Parameter], *, steps: int) -> None:
    """Log the estimate, and a warning if memory is short."""
    about = estimate(config, models, dataset, parameters, steps=steps, compare=False)
    log.info("%s", about)
    if warning := short_of_memory(about, models.device):
        log.warning("%s", warning)


def dry_run(config: TrainConfig, models, dataset: PictureData, held_out: PictureData | None = None) -> str:
    """Describe the training in a text, without writing a file or changing the models."""
    before = adapter_names(models)
    with torch.random.fork_rng(devices()):
        with training(config, models) as parameters:
            about = estimate(config, models, dataset, parameters, steps=config.steps)
            trained = describe_parameters(models, parameters)
        for name in set(adapter_names(models)) - set(before):
            remove_lora(models, name)
    parts = {"pictures": describe_data(dataset, config), "held out": "" if held_out is None else describe_held_out(held_out),
             "trained": trained,
             "memory and time": "\n".join(filter(None, [str(about), short_of_memory(about, models.device)])),
             "options other than the default": describe_config(config)}
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in text.splitlines())
                       for title, text in parts.items() if text) + "\n\nA dry run: nothing was written."


def short_of_memory(about: Estimate, device: torch.device) -> str | None:
    """A warning if more memory is needed, besides the weights, which are there already, than is free; else None."""
    free, needed = free_memory(device), about.peak - about.weights
    if free is None or needed <= free:
        return None
    return (f"{size_text(needed)} are needed besides the weights, and {size_text(free)} are free: try checkpointing, a smaller "
            f"batch_size with accumulate, precision bf16, or quantize")
