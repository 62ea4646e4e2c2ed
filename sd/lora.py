"""LoRA on models: the public functions and classes of adapters in one place.

`models` is an nn.Module (a whole model or one network) or the Models that a loader returns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sd.adapters.active import ActiveSet
from sd.adapters.adapter import Adapter
from sd.adapters.attach import apply_lora_to_model, attach_state, get_lora_parameters, lora_state, remove_lora, unreached_layers
from sd.adapters.kinds import KINDS
from sd.adapters.layer import LoRALayer
from sd.adapters.layers import (
    LORA_CLASSES,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRAGroupNorm,
    LoRALayerNorm,
    LoRALinear,
    register_lora_layer,
)
from sd.adapters.merging import merge, merge_lora_weights, merge_loss, tied_layers, unmerge
from sd.adapters.quant import dequantize_base, quantize_base
from sd.adapters.switch import (
    active_multipliers,
    adapter_names,
    checkpoint,
    exclusive,
    recomputation,
    set_adapters,
    set_lora_enabled,
    use_adapters,
    use_rows,
)
from sd.adapters.targets import TARGET_PRESETS, components, find_targets, lora_layers
from sd.adapters.weights import AdapterWeights, LoRAError, LoRAFormatError
from sd.lora_files.block_weights import BlockWeightError, block_multipliers
from sd.lora_files.modules import modules_of
from sd.lora_files.read import LoadReport, LoRAFile, read_lora, report_of
from sd.lora_files.spellings import guess_file
from sd.lora_files.write import write_lora
from sd.prompts.learned_words import EmbeddingError

__all__ = [
    # layers
    "LORA_CLASSES", "LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRAEmbedding", "LoRAGroupNorm", "LoRALayer", "LoRALayerNorm",
    "LoRALinear", "register_lora_layer",
    # adapters and their layers
    "KINDS", "TARGET_PRESETS", "Adapter", "AdapterWeights", "apply_lora_to_model", "attach_state", "find_targets",
    "get_lora_parameters", "lora_layers", "lora_state", "modules_of", "remove_lora", "unreached_layers",
    # switching
    "ActiveSet", "active_multipliers", "adapter_names", "checkpoint", "exclusive", "recomputation", "set_adapters",
    "set_lora_enabled", "use_adapters", "use_rows",
    # merging and quantisation
    "dequantize_base", "merge", "merge_lora_weights", "merge_loss", "quantize_base", "tied_layers", "unmerge",
    # files
    "LoadReport", "load_lora_weights", "save_lora_weights",
    # errors
    "BlockWeightError", "LoRAError", "LoRAFormatError",
]


def save_lora_weights(models, path: str | os.PathLike, name: str | None = None, *, metadata: Mapping[str, str] | None = None,
                      dtype: torch.dtype | None = None, format: str = "kohya") -> None:
    """Write one adapter (None: the only one) with alpha and metadata, atomically. `format`: see `sd.lora_files.write`.

    The file is safetensors; for the kohya format, a path ending in `.pt` is written as a flat dict of tensors by
    torch.save, readable with weights_only.
    """
    write_lora(path, lora_state(models, name), modules_of(models), format=format, dtype=dtype, metadata=metadata)


def load_lora_weights(models, path: str | os.PathLike | Mapping[str, Tensor], name: str = "default",
                      multiplier: float = 1.0, *, skip: str | None = None,
                      block_weights: Mapping[str, float] | Sequence[float] | str | None = None) -> LoadReport:
    """Read a LoRA from any program and attach it as adapter `name`, active; an adapter of that name is replaced.

    `path`: a file, a PEFT or diffusers folder, or tensors in memory. `skip`: a regular expression; tensors whose key or
    module path matches are left out. `block_weights`: see `sd.lora_files.block_weights`. Learned words bundled with the
    LoRA are added to the text encoder and stay until `remove_embedding`. Every tensor is applied or skipped; otherwise
    LoRAFormatError names the first that cannot be applied and what the file seems to be.
    """
    modules = modules_of(models)
    clip: Any = components(models).get("clip")
    found = read_lora(path, modules, skip=skip, words=hasattr(clip, "learned"))
    blocks = block_multipliers(block_weights, modules)
    with exclusive(models):  # until block weights are set, so no forward sees a half-configured adapter
        if found.words:
            _check_words(found, clip)
        try:
            attach_state(models, found.state, name, multiplier, found.path.name)
        except LoRAFormatError as error:
            raise LoRAFormatError(f"{error}; {guess_file(found.file or {})}") from None
        if blocks is not None:
            for layer_path, layer in lora_layers(models).items():
                if layer_path in found.state:
                    layer.set_block_multiplier(name, blocks.of(layer_path))
        if found.words:
            clip.learn(found.words)
    return report_of(found, name, components(models), blocks)


def _check_words(found: LoRAFile, clip: Any) -> None:
    """Raises LoRAFormatError for learned words that do not fit, before anything changes."""
    try:
        clip.learned.new(found.words)
    except EmbeddingError as error:
        raise LoRAFormatError(f"{found.path.name}: {error}; leave a word out with skip, by its name") from None
