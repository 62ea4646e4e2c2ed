"""Training: a loop on one screen (loop.py) and its parts. Nothing that generates pictures imports this package."""

from importlib import import_module
from typing import TYPE_CHECKING

from sd.training.config import TrainConfig
from sd.training.errors import DataError, ProcessError, TrainError

if TYPE_CHECKING:
    from sd.training.dataset.pictures import PictureFolder, PictureSet
    from sd.training.loop import train
    from sd.training.loss import diffusion_loss, vae_loss

__all__ = ["DataError", "PictureFolder", "PictureSet", "ProcessError", "TrainConfig", "TrainError", "diffusion_loss", "train",
           "vae_loss"]

# Loaded when asked for: they need torch, and the flags of `python -m sd train` are described from TrainConfig without it.
_HOMES = {"PictureFolder": "dataset.pictures", "PictureSet": "dataset.pictures", "train": "loop", "diffusion_loss": "loss",
          "vae_loss": "loss"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
