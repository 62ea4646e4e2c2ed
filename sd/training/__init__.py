"""Training: a loop on one screen (loop.py) and its parts. Nothing that generates pictures imports this package."""

from sd.training.config import TrainConfig
from sd.training.dataset.pictures import PictureFolder, PictureSet
from sd.training.errors import DataError, ProcessError, TrainError
from sd.training.loop import train
from sd.training.loss import diffusion_loss, vae_loss

__all__ = ["DataError", "PictureFolder", "PictureSet", "ProcessError", "TrainConfig", "TrainError", "diffusion_loss", "train",
           "vae_loss"]
