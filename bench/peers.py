"""diffusers, called as its users do, on the checkpoints of bench/."""

from __future__ import annotations

import warnings
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline

from bench.common import Options


def from_pretrained(options: Options, folder: Path) -> StableDiffusionPipeline:
    _quiet()
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=options.torch_dtype).to(options.device)


def from_single_file(options: Options, file: Path, folder: Path) -> StableDiffusionPipeline:
    _quiet()
    pipe = StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True,
                                                    torch_dtype=options.torch_dtype)
    return pipe.to(options.device)


def load_lora(pipe: StableDiffusionPipeline, file: Path, name: str) -> None:
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, local_files_only=True)


def attention_weights(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Copies of the weights that bench/'s LoRA changes, under names without PEFT's wrapping."""
    return {key.replace(".base_layer", ""): p.detach().clone() for key, p in pipe.unet.named_parameters()
            if "lora_" not in key and any(f".{a}." in key for a in ("to_q", "to_k", "to_v", "to_out")) and p.dim() == 2}


def _quiet() -> None:
    warnings.simplefilter("ignore")  # about torch_dtype, and about adapters already loaded
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
