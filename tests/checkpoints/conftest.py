"""One model, random and tiny, in every form that it has on disk."""

import shutil

import pytest
from diffusers import StableDiffusionPipeline

from sd.checkpoints.writer import ldm_state
from sd.config import TINY
from sd.model_loader import Models, save_checkpoint
from tests.peers import ours_and_peers


@pytest.fixture(scope="module")
def pair():
    """(our networks as Models, the peers' networks by folder) with equal random weights."""
    ours, peers = ours_and_peers(TINY)
    return Models({k: m.requires_grad_(False) for k, m in ours.items()}, TINY), peers


@pytest.fixture(scope="module")
def files(pair, tmp_path_factory):
    """The same weights as an LDM file and as a folder, both written by us, and as a folder written by diffusers."""
    models, _ = pair
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(models, folder / "tiny.safetensors")
    save_checkpoint(models, folder / "ours")
    StableDiffusionPipeline.from_pretrained(folder / "ours").save_pretrained(folder / "theirs")
    return folder


@pytest.fixture(scope="module")
def ldm(pair):
    """{LDM key: tensor}; diffusers itself reads these keys in a test below."""
    return ldm_state(pair[0])


@pytest.fixture
def copy(files, tmp_path):
    """A folder of diffusers to change at will."""
    return shutil.copytree(files / "theirs", tmp_path / "copy")
