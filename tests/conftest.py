"""One thread: small networks gain nothing from two, several tests fork, and results do not depend on the machine.

Generated inputs are the same ones in every run; `pytest --hypothesis-profile=default` tries new ones.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for processes that tests start

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
