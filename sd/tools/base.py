"""Shared by the tools: find the model that a LoRA file is for, and check the file against it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sd.adapters.adapter import Adapter
from sd.adapters.kinds import KINDS
from sd.adapters.targets import layer_shapes
from sd.adapters.weights import AdapterWeights, LayerShape, LoRAFormatError
from sd.config import CONFIG_KEY, PRESETS, SD15, ModelConfig
from sd.cpu import tune
from sd.errors import SDError
from sd.files.tensor_file import TensorFile
from sd.lora_files.modules import Modules, modules_of
from sd.lora_files.read import LoRAFile, read_lora
from sd.lora_files.spellings import guess_file
from sd.model_loader import preload_models_from_standard_weights
from sd.models import Models, NoInitialValues, build_networks


@dataclass(frozen=True)
class Base:
    """The model that LoRA files are for: its config and layers, and its weights if a checkpoint was given."""

    config: ModelConfig
    modules: Modules
    layers: Mapping[str, LayerShape]
    models: Models | None = None

    def weight(self, path: str) -> Tensor:
        """The base weight of a layer in fp32. Raises LoRAFormatError if no checkpoint was given."""
        if self.models is None:
            raise LoRAFormatError(f"the LoRA's change of {path} depends on the base's weight; name the checkpoint (--model)")
        component, _, name = path.partition(".")
        return self.models[component].get_submodule(name).weight.detach().float()


@lru_cache(maxsize=4)
def base_of(config: ModelConfig) -> Base:
    """The layers of a model of this config, without weights."""
    with torch.device("meta"), NoInitialValues():
        networks = build_networks(config)
    return Base(config, modules_of(networks), layer_shapes(networks))


def load_base(path: str | os.PathLike, **load) -> Base:
    """Map a checkpoint; its tensors are read only when they are needed."""
    models = preload_models_from_standard_weights(path, "cpu", dtype="stored", **load)
    known = base_of(models.config)
    return Base(models.config, known.modules, known.layers, models)


def base_for(file: TensorFile) -> Base:
    """The base that a LoRA file was made for: by the config in its metadata, by the name of a known config, else SD 1.x."""
    if CONFIG_KEY in file.metadata:
        try:
            return base_of(ModelConfig.from_dict(json.loads(file.metadata[CONFIG_KEY])))
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise LoRAFormatError(f"{file.path}: its {CONFIG_KEY} metadata is not a model config: {error}") from None
    return base_of(PRESETS.get(file.metadata.get("ss_base_model_version", ""), SD15))


def load_lora_file(path: str | os.PathLike, base: Base | None = None, *, skip: str | None = None,
                   words: bool = False) -> tuple[LoRAFile, Base]:
    """Read a LoRA file of any program and check each tensor against its base. `words` and errors: see `read_lora`."""
    found_base = base
    tune()  # tools multiply matrices too

    def modules(file: TensorFile) -> Modules:
        nonlocal found_base
        found_base = base or base_for(file)
        return found_base.modules

    lora = read_lora(path, modules, skip=skip, words=words)
    assert found_base is not None  # read_lora called modules
    check_fit(lora, found_base)
    return lora, found_base


def check_fit(lora: LoRAFile, base: Base) -> None:
    """Raises LoRAFormatError for the first module whose tensors do not fit the base's layer."""
    misfits = []
    for path, weights in lora.state.items():
        try:
            fit(weights, base.layers[path])
        except SDError as error:
            misfits.append(f"{path}: {error}")
    if misfits:
        raise LoRAFormatError(f"{lora.path.name}: {len(misfits)} of {len(lora.state)} LoRA modules do not fit "
                              f"{base.config.name}, first: {misfits[0]}; {guess_file(lora.file or {})}; "
                              f"name the model that it is for with --model (base=)")


def fit(weights: AdapterWeights, shape: LayerShape) -> Adapter:
    """The adapter of these weights for a layer of this shape. Raises LoRAFormatError."""
    return KINDS[weights.kind].from_weights(weights, shape)
