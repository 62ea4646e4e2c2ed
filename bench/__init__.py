"""Programs that print a measurement, of ours and of diffusers, on the same weights, on one machine, in one run."""

import os

# Read while torch and the peers are imported: look for CUDA without starting it (the programs fork), use no network.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
