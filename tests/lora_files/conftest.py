"""The tiny models, for tests that leave them as they were."""

import pytest

from sd.config import TINY
from sd.lora import modules_of
from sd.model_loader import new_models


@pytest.fixture(scope="module")
def models():
    return new_models(TINY)


@pytest.fixture(scope="module")
def modules(models):
    return modules_of(models)
