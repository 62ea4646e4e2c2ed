"""Models that no test trains: each takes a copy."""

import pytest
import torch

from sd.model_loader import new_models
from tests.training.tiny import SMALL, copy_of


def tensors_of(models):
    return [t for network in models.values() for t in network.state_dict().values()]


@pytest.fixture(scope="session")
def untrained():
    made = new_models(SMALL, seed=1)
    before = [t.clone() for t in tensors_of(made)]
    yield made
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(made), strict=True)), "a test changed the shared models"


@pytest.fixture
def models(untrained):
    return copy_of(untrained)
