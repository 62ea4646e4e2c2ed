"""One thread: small networks gain nothing from two, several tests fork, and results do not depend on the machine."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for processes that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
