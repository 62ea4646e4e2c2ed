"""Training: a loop on one screen (train.py) and its parts. Nothing that generates pictures imports it."""

from sd.training.config import TrainConfig
from sd.training.data import DataError, PictureFolder, PictureSet
from sd.training.dist import ProcessError
from sd.training.loss import diffusion_loss, vae_loss
from sd.training.run_state import TrainError
from sd.training.train import train

__all__ = ["DataError", "PictureFolder", "PictureSet", "ProcessError", "TrainConfig", "TrainError", "diffusion_loss", "train",
           "vae_loss"]
