"""Writes models: one .safetensors in LDM layout, or a diffusers folder, atomically and one tensor at a time.

`models` is a sd.models.Models. save_merged merges active adapters tensor by tensor as it writes, so it needs little more
memory than the base.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from sd.adapters.derived import exact
from sd.adapters.layer import LoRALayer
from sd.adapters.quant import quantized_kinds
from sd.adapters.switch import adapter_names, exclusive
from sd.adapters.targets import lora_layers
from sd.adapters.weights import LoRAError
from sd.checkpoints.diffusers_config import folder_configs
from sd.checkpoints.names import Name, component_names
from sd.config import CONFIG_KEY
from sd.files.atomic import atomic_folder, atomic_write
from sd.files.tensor_file import CheckpointError, Lazy, all_finite
from sd.files.tensors import write_safetensors
from sd.prompts.tokenizer import data_dir

Reader = Callable[[nn.Module, str], Tensor]  # (layer, "weight" or "bias") -> the tensor to write


def save_checkpoint(models, path: str | os.PathLike, *, dtype: torch.dtype | None = None,
                    metadata: Mapping[str, str] | None = None) -> None:
    """Write the whole model, atomically: to a path ending in .safetensors in LDM layout, to any other as a diffusers folder.

    Raises LoRAError while adapters are attached: merge_lora_weights merges them into the model, remove_lora drops them, and
    save_merged writes a merged model without changing this one.
    """
    path = check_target(path)
    if adapter_names(models):
        raise LoRAError(f"the model carries the adapters {', '.join(map(repr, adapter_names(models)))}; "
                        f"merge_lora_weights(models) or remove_lora(models) before saving the checkpoint")
    _save(models, path, dtype, metadata, _base)


def save_merged(models, path: str | os.PathLike, *, dtype: torch.dtype | None = None,
                metadata: Mapping[str, str] | None = None) -> None:
    """As save_checkpoint, with the active adapters merged into the written weights; the models do not change.

    Each tensor is W + Σ mᵢ ΔWᵢ, summed in fp32 and rounded once to `dtype` (None: its own); tensors that no adapter changes
    are written bit for bit. Raises CheckpointError, and writes nothing, if values overflow `dtype`.
    """
    path = check_target(path)
    with exclusive(models):
        if any(layer.active.per_image for layer in lora_layers(models).values()):
            raise LoRAError("multipliers that differ from image to image cannot be merged into one weight")
        _save(models, path, dtype, metadata, _merged)


def check_target(path: str | os.PathLike) -> Path:
    """Raises CheckpointError if nothing can be saved at `path`; to be called before a long computation."""
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        return path
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise CheckpointError(f"{path}: checkpoints are written as .safetensors or as a diffusers folder, not as {path.suffix}")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; name a new folder, or a .safetensors file")
    there = {file.name for file in path.iterdir()} if path.exists() else set()
    if there and ("model_index.json" not in there or there - FOLDER_ENTRIES):
        first = min(there - FOLDER_ENTRIES, default=min(there))
        raise CheckpointError(f"{path}: is a folder with other things in it, such as {first}; "
                              f"name a new folder, or a .safetensors file")
    return path


def ldm_state(models, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """{LDM key: tensor} of the whole model, without adapters."""
    return {key: lazy.make() for key, lazy in ldm_tensors(models, dtype).items()}


def ldm_tensors(models, dtype: torch.dtype | None = None, read: Reader | None = None) -> dict[str, Lazy]:
    """As ldm_state, with tensors that are computed when they are written."""
    return {f"{name.ldm}.{tail}": lazy for network in models.values()
            for name, tail, lazy in _tensors(network, dtype, read or _base, ldm=True)}


def ldm_metadata(models) -> dict[str, str]:
    """Metadata of a file in LDM layout that describes the model."""
    quantized = {"sdlora.base_quantization": kind} if (kind := ",".join(quantized_kinds(models))) else {}
    return {"format": "pt", CONFIG_KEY: json.dumps(models.config.to_dict()), **quantized}


def _tensors(network: nn.Module, dtype: torch.dtype | None, read: Reader,
             ldm: bool = False) -> Iterator[tuple[Name, str, Lazy]]:
    """(name, "weight" or "bias", tensor to write) of every module, in the shapes of LDM or diffusers."""
    for name in component_names(str(network.component), network.config):
        layer = network.get_submodule(name.ours)
        for tail in ("weight", "bias"):
            tensor = getattr(layer, tail, None)
            if tensor is not None:
                ones = (1, 1) if ldm and name.ldm_conv and tail == "weight" else ()
                shape, kind = (*tensor.shape, *ones), dtype or tensor.dtype
                yield name, tail, Lazy(shape, kind, partial(_made, layer, tail, read, shape, kind, f"{name.path}.{tail}"))


def _made(layer: nn.Module, tail: str, read: Reader, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
    tensor = read(layer, tail).to(dtype)
    if not tensor.is_meta and not all_finite(tensor):
        raise CheckpointError(f"{what} holds values that are not finite in {str(dtype).removeprefix('torch.')}, "
                              f"so the model is not written")
    return tensor.reshape(shape)


def _base(layer: nn.Module, tail: str) -> Tensor:
    tensor = layer.plain_weight() if tail == "weight" and isinstance(layer, LoRALayer) else getattr(layer, tail)
    return tensor.detach()


def _merged(layer: nn.Module, tail: str) -> Tensor:
    """The layer's weight or bias plus its active adapters' changes, in fp32; unchanged tensors keep their bits."""
    base = _base(layer, tail)
    if not isinstance(layer, LoRALayer) or not layer.lora_enabled:
        return base
    adapters = [layer.adapter(name) for name in layer.multipliers]
    if tail == "bias":
        adapters = [adapter for adapter in adapters if adapter.bias_delta(layer.base_bias()) is not None]
    if not adapters:
        return base
    with exact():
        merged = layer.merged_sum()[tail == "bias"]
    if merged is None or torch.equal(merged, base.to(merged.dtype)):
        return base  # -0.0 + 0.0 would be 0.0
    return merged


# The entries of a folder that we write; a save deletes nothing else.
FOLDER_ENTRIES = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def _save(models, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None, read: Reader) -> None:
    if path.suffix.lower() == ".safetensors":
        write_safetensors(path, ldm_tensors(models, dtype, read), ldm_metadata(models) | dict(metadata or {}))
    else:
        _save_folder(models, path, dtype, read)


def _save_folder(models, path: Path, dtype: torch.dtype | None, read: Reader) -> None:
    if not models.config.vae.widths:
        raise CheckpointError(f"{path}: a diffusers folder has a VAE, this model of pixels has none; save it as .safetensors")
    with atomic_folder(path) as new:
        for folder, stem, networks in (("unet", "diffusion_pytorch_model", ("diffusion",)),
                                       ("vae", "diffusion_pytorch_model", ("encoder", "decoder")),
                                       ("text_encoder", "model", ("clip",))):
            tensors = {f"{name.diffusers}.{tail}": lazy
                       for key in networks for name, tail, lazy in _tensors(models[key], dtype, read)}
            (new / folder).mkdir()
            write_safetensors(new / folder / f"{stem}.safetensors", tensors, {"format": "pt"})
        texts = {name: json.dumps(content, indent=2) + "\n" for name, content in folder_configs(models.config).items()}
        texts |= {f"tokenizer/{n}": (data_dir() / n).read_text(encoding="utf-8") for n in ("vocab.json", "merges.txt")}
        for name, text in texts.items():
            (new / name).parent.mkdir(exist_ok=True)
            with atomic_write(new / name) as file:
                file.write(text.encode("utf-8"))
