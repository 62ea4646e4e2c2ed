"""Models: the four networks with their config and tokenizer; devices and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from sd.adapters.targets import lora_layers
from sd.clip import CLIP
from sd.config import ModelConfig
from sd.cpu import has_bf16, tune
from sd.errors import SDError
from sd.files.hashes import model_hash
from sd.graphs import forget
from sd.prompts.learned_words import LearnedWords
from sd.prompts.tokenizer import load_tokenizer
from sd.unet import UNet
from sd.vae import build_vae

if TYPE_CHECKING:
    from sd.lora_files.read import LoadReport


class DeviceError(SDError):
    """A device that is not available."""


class Models(dict):
    """The networks "clip", "encoder", "decoder" and "diffusion" by name.

    Attributes: `config`, `tokenizer`, `source` (file or folder they were loaded from), `lora_reports` (name -> LoadReport).
    """

    def __init__(self, networks: Mapping[str, nn.Module], config: ModelConfig, tokenizer=None, source: Path | None = None):
        super().__init__(networks)
        tune()
        self.config, self.source = config, source
        self.lora_reports: dict[str, LoadReport] = {}
        self._tokenizer = tokenizer

    @property
    def tokenizer(self):
        """Built on first use: reading the vocabulary takes longer than loading a small model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer()
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return self["diffusion"].conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self["diffusion"].conv_in.weight.dtype

    @property
    def dtype_name(self) -> str:
        """As pictures record it and flags take it: "float32"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def model_hash(self) -> str | None:
        """First ten hex digits of the checkpoint's SHA-256; None for models not loaded from a single file."""
        return model_hash(self.source) if self.source is not None and Path(self.source).is_file() else None

    def to(self, device) -> Models:
        for network in self.values():
            forget(network)
            network.to(device)
        return self


def default_device() -> torch.device:
    """The best device available: CUDA, then Apple MPS, then CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(name) -> torch.device:
    """The device `name` as torch.device. Raises DeviceError if it is not available."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise DeviceError(f"device {str(name)!r} cannot be used ({str(error).splitlines()[0]}); the best one here is "
                          f"{default_device()}") from None
    if device.type == "meta":
        raise DeviceError(f"device 'meta' has no data, so nothing runs on it; the best one here is {default_device()}")
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """fp32 on the CPU; elsewhere bf16 if the hardware supports it, else fp16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16


LARGE = 100_000_000  # parameters of a UNet from which half precision pays on a CPU


def auto_dtype(device: torch.device, unet: nn.Module) -> torch.dtype:
    """The fastest dtype: bf16 on a CPU that multiplies it, for a large UNet; else the device's default."""
    large = sum(p.numel() for p in unet.parameters()) >= LARGE
    return torch.bfloat16 if device.type == "cpu" and large and has_bf16() else default_dtype(device)


def memory_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The layout of the fastest convolutions: channels_last on CUDA, and on the CPU in bf16."""
    fast = device.type == "cuda" or device.type == "cpu" and dtype == torch.bfloat16
    return torch.channels_last if fast else torch.preserve_format


def build_networks(config: ModelConfig) -> dict[str, nn.Module]:
    """The four networks with torch's random initial weights; inside `with torch.device("meta")`, without any."""
    return {"clip": CLIP(config.clip), **build_vae(config.vae), "diffusion": UNet(config.unet)}


class NoInitialValues(TorchFunctionMode):
    """Skip torch.nn.init: loading replaces its values anyway, and on the meta device its normal_ imports for seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def new_models(config: ModelConfig, seed: int = 0) -> Models:
    """Untrained models on the CPU in fp32; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Models({k: m.eval().requires_grad_(False) for k, m in build_networks(config).items()}, config)


def count_parameters(models) -> dict[str, int]:
    """Number of parameters: "base" (without learned words), "lora" (all adapters), and "trainable" at present."""
    networks = [models] if isinstance(models, nn.Module) else [m for m in models.values() if isinstance(m, nn.Module)]
    adapters = sum(p.numel() for m in networks for layer in lora_layers(m).values() for p in layer.adapters.parameters())
    words = sum(p.numel() for network in networks for m in network.modules() if isinstance(m, LearnedWords) for p in m.values())
    total = sum(p.numel() for m in networks for p in m.parameters()) - words
    trainable = sum(p.numel() for m in networks for p in m.parameters() if p.requires_grad)
    return {"base": total - adapters, "lora": adapters, "trainable": trainable}
