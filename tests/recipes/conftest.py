"""`make test` runs one test of each recipe, marked smoke; `make test-recipes` runs them all."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.get_closest_marker("smoke"):
            item.add_marker(pytest.mark.recipes)
