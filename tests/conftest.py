"""One thread: small networks gain nothing from two, several tests fork, and results do not depend on the machine.

Generated inputs are the same ones in every run; `pytest --hypothesis-profile=default` tries new ones.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from sd.cpu import tune  # noqa: E402

torch.set_num_threads(1)
tune()  # at once, so that no test computes one half of a comparison untuned
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that both workers end together; they are given out by file in this order."""
    longest = ("test_resume.py", "test_dist.py", "test_bench.py", "test_start.py")
    items.sort(key=lambda item: item.path.name not in longest)
    for item in items:
        if item.path.name == "test_cuda.py" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
