"""Reads checkpoints, in any spelling, into our config and state dicts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch.nn as nn
from torch import Tensor

from sd.checkpoints.diffusers_config import config_of_folder
from sd.checkpoints.lora_inside import EmbeddedLoRA, embedded_loras, split_embedded
from sd.checkpoints.names import (
    COMPONENTS,
    FOLDERS,
    HARMLESS,
    LDM_PREFIX,
    Name,
    component_names,
    guess_checkpoint,
    ldm_facts,
    model_names,
    modern_key,
)
from sd.config import CONFIG_KEY, SD15, ModelConfig
from sd.files.atomic import former_folder
from sd.files.folder import read_diffusers_folder
from sd.files.tensor_file import CheckpointError, TensorFile
from sd.files.tensors import read_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, mapped: no tensor is read before it is used.

    `sources`: component -> the file it is read from, one shared object per file. `inside`: the tensors of LoRAs embedded in
    the file.
    """

    path: Path
    config: ModelConfig
    sources: Mapping[str, TensorFile]
    inside: TensorFile

    def states(self, networks: Mapping[str, nn.Module], *, ema: bool = False) -> dict[str, dict[str, Tensor]]:
        """Component -> state dict of views of the files, for networks of this config (on any device, even meta).

        `ema`: the averaged UNet of an LDM file. Raises CheckpointError if a tensor is missing, has another shape, or is
        unknown.
        """
        states = {}
        used: dict[int, set[str]] = {id(source): set() for source in self.sources.values()}
        for component, network in networks.items():
            source = self.sources[component]
            states[component], keys = _state_of(network, source, ema and component == "diffusion")
            used[id(source)] |= keys
        for source in {id(source): source for source in self.sources.values()}.values():
            elsewhere = tuple(LDM_PREFIX[c] for c in COMPONENTS if self.sources[c] is not source)
            _refuse_unexpected(source, used[id(source)], elsewhere)
        return states

    @property
    def loras(self) -> list[EmbeddedLoRA]:
        """The LoRAs inside the file. Raises CheckpointError if they are damaged."""
        return embedded_loras(self.inside, model_names(self.config))


def open_checkpoint(path: Path, *, config: ModelConfig | None = None, vae: str | os.PathLike | None = None,
                    text_encoder: str | os.PathLike | None = None, variant: str | None = None) -> Checkpoint:
    """Open an LDM .ckpt or .safetensors, or a diffusers folder; without `config` it is read or inferred from the files.

    `vae`, `text_encoder`: files or folders to read these from instead. `variant`: of a diffusers folder, such as "fp16".
    Raises CheckpointError if a part is missing or the model belongs to no known family.
    """
    if former_folder(path).exists() and not path.exists():
        raise CheckpointError(f"{path}: a save of this folder was killed at its last step; its former content "
                              f"is intact in {former_folder(path)}: rename that back")
    sources, configs, inside = _parts_of_folder(path, variant) if path.is_dir() else _parts_of_file(path)
    for given, replaced in ((vae, ("encoder", "decoder")), (text_encoder, ("clip",))):
        if given is not None:
            part, part_configs = _read_part(Path(given), FOLDERS[replaced[0]])
            sources, configs = sources | dict.fromkeys(replaced, part), configs | part_configs
    present: dict[str, TensorFile] = {}
    for component, source in sources.items():
        if source is None:
            kind = configs.get("model_index.json", {}).get("_class_name", "without a model_index.json")
            raise CheckpointError(f"{path}: has no {FOLDERS[component]} in it{_argument_hint(component)} "
                                  f"(the folder is a {kind})")
        present[component] = source
    if config is None:
        config = config_of_folder(configs, path) if path.is_dir() else config_of_file(present["diffusion"])
    return Checkpoint(path, config, present, inside)


def config_of_file(file: TensorFile) -> ModelConfig:
    """Config of a plain checkpoint, from our metadata or else from its shapes. Raises CheckpointError for unknown families."""
    path = file.path
    if CONFIG_KEY in file.metadata:
        try:
            return ModelConfig.from_dict(json.loads(file.metadata[CONFIG_KEY]))
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{path}: its {CONFIG_KEY} metadata is not a model config: {error}") from None
    facts = ldm_facts(file.shapes)
    if not facts:
        raise CheckpointError(f"{path}: not a Stable Diffusion 1.x checkpoint: {guess_checkpoint(file)}")
    family = replace(SD15, unet=replace(SD15.unet, in_channels=facts["in_channels"]))
    differs = [f"{k} {v}" for k, v in facts.items() if getattr(family.unet, k) != v]
    if differs:
        raise CheckpointError(f"{path}: no known family: its UNet has {', '.join(differs)}; {guess_checkpoint(file)}; heads, "
                              f"activation, prediction and noise schedule are not in the file: pass config=ModelConfig(...)")
    return family


# ---- where the parts are ---------------------------------------------------------------------------------------------

def _parts_of_file(path: Path) -> tuple[dict[str, TensorFile | None], dict[str, dict], TensorFile]:
    """(component -> tensors, JSON files, tensors of LoRAs inside)."""
    file, inside = split_embedded(read_tensors(path))
    return dict.fromkeys(COMPONENTS, file), {}, inside


def _parts_of_folder(path: Path, variant: str | None) -> tuple[dict[str, TensorFile | None], dict[str, dict], TensorFile]:
    folder = read_diffusers_folder(path, variant=variant)
    return {c: folder.components.get(FOLDERS[c]) for c in COMPONENTS}, folder.configs, TensorFile(path, {})


def _read_part(path: Path, folder: str) -> tuple[TensorFile, dict[str, dict]]:
    """Tensors and config of a separately given VAE or text encoder: a file, its folder, or a folder of a whole model."""
    if not path.is_dir():
        return read_tensors(path), {}
    found = read_diffusers_folder(path, components=(folder,))
    where = folder if folder in found.components else ""
    config = found.configs.get(f"{where}/config.json".lstrip("/"))
    return found.components[where], {} if config is None else {f"{folder}/config.json": config}


def _argument_hint(component: str) -> str:
    argument = {"clip": "text_encoder", "encoder": "vae", "decoder": "vae"}.get(component)
    return f"; name one with {argument}=" if argument else ""


# ---- tensors under our names --------------------------------------------------------------------------------------------

def _state_of(network: nn.Module, source: TensorFile, ema: bool) -> tuple[dict[str, Tensor], set[str]]:
    """(our state dict, the file's keys that were used), from a file in any spelling."""
    component, shapes = str(network.component), {k: tuple(p.shape) for k, p in network.state_dict().items()}
    given = {modern_key(key, FOLDERS[component]): key for key in source}
    names = component_names(component, network.config)
    if not names:  # no autoencoder
        return {}, set()
    spell = max(KEY_SPELLINGS, key=lambda spell: sum(spell(n) + ".weight" in given for n in names))
    if not any(spell(n) + ".weight" in given for n in names):
        raise CheckpointError(f"{source.path}: has no {FOLDERS[component]} in it{_argument_hint(component)} "
                              f"({guess_checkpoint(source)})")
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    missing, misshapen = [], []
    for name in names:
        for tail in ("weight", "bias"):
            ours, theirs = f"{name.ours}.{tail}", f"{spell(name)}.{tail}"
            if ours not in shapes:
                continue
            key = _ema_key(theirs) if ema else given.get(theirs)
            if key is None or key not in source:
                missing.append(key or theirs)
                continue
            used |= {key, given.get(theirs, key)}
            tensor = source[key]
            if tail == "weight" and name.ldm_conv and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]  # LDM's VAE attention uses 1x1 convolutions
            if tuple(tensor.shape) != shapes[ours]:
                misshapen.append(f"{key} is {list(tensor.shape)}, expected {list(shapes[ours])}")
            state[ours] = tensor
    for what, bad in (("missing", missing), ("of another shape", misshapen)):
        if bad:
            hint = " (it has no EMA weights)" if ema and what == "missing" else ""
            raise CheckpointError(f"{source.path}: {len(bad)} of {len(shapes)} tensors of the {component} are {what}, "
                                  f"first: {bad[0]}{hint}; {guess_checkpoint(source)}")
    return state, used


def _refuse_unexpected(source: TensorFile, used: set[str], elsewhere: tuple[str, ...]) -> None:
    """`elsewhere`: key prefixes of the parts that are read from another file."""
    unexpected = [key for key in source if key not in used and not key.startswith(elsewhere)
                  and not any(re.fullmatch(pattern, key) for pattern in HARMLESS)]
    if unexpected:
        raise CheckpointError(f"{source.path}: {len(unexpected)} tensors belong to no part of this model, "
                              f"first: {unexpected[0]!r}; {guess_checkpoint(source)}")


def _ldm(name: Name) -> str:
    return name.ldm


def _ldm_flat_clip(name: Name) -> str:
    return name.ldm.replace(".text_model.", ".")  # CompVis files from before transformers 4.20


def _bare_ldm(name: Name) -> str:
    return name.ldm.removeprefix(LDM_PREFIX[name.component])  # a VAE on its own


def _diffusers(name: Name) -> str:
    return name.diffusers


KEY_SPELLINGS = (_ldm, _ldm_flat_clip, _bare_ldm, _diffusers)


def _ema_key(key: str) -> str:
    return "model_ema." + key.removeprefix("model.").replace(".", "")
