"""Benchmarks against diffusers and PEFT: the same weights, one machine, one run."""

import os

# Set before torch and the peers are imported: detect CUDA without initialising it (the programs fork), no network.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
