"""Stable Diffusion with LoRA in its attention layers: generate, compare, train, blend, merge."""


__version__ = "0.1.0"
