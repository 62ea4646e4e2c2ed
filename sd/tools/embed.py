"""LoRAs inside a checkpoint: embed and extract them. merge_lora_into_checkpoint merges them into the weights instead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sd.adapters.attach import attach_state, remove_lora
from sd.checkpoints.lora_inside import EmbeddedLoRA, embed_keys, embedded_loras, split_embedded
from sd.checkpoints.names import model_names
from sd.checkpoints.reader import config_of_file
from sd.checkpoints.writer import ldm_metadata, ldm_tensors
from sd.config import ModelConfig
from sd.files.tensor_file import CheckpointError
from sd.files.tensors import keep_sources, read_tensors, write_safetensors
from sd.lora_files.header import renewed
from sd.lora_files.modules import modules_of
from sd.lora_files.read import read_lora
from sd.lora_files.write import write_kohya
from sd.model_loader import model_path, preload_models_from_standard_weights


def embed(ckpt_path: str | os.PathLike | None, loras: Mapping[str | os.PathLike, float], out: str | os.PathLike,
          **load) -> None:
    """Write one .safetensors: the base in LDM layout, its tensors bit for bit, and every LoRA inside it with its multiplier.

    preload_models_from_standard_weights attaches the LoRAs on loading. Other programs ignore the unknown keys and load the
    base alone. LoRAs already inside the base are kept; new ones are named after their files. `load`: further arguments of
    preload_models_from_standard_weights. Raises as load_lora_weights does, and CheckpointError for a name that occurs
    twice and if `out` is one of the inputs.
    """
    ckpt_path = model_path(ckpt_path)
    if Path(out).suffix.lower() != ".safetensors":
        raise CheckpointError(f"{out}: a checkpoint with LoRAs inside is written as .safetensors")
    keep_sources(out, ckpt_path, *loras)
    models = preload_models_from_standard_weights(ckpt_path, "cpu", dtype="stored", **load)
    remove_lora(models)
    found = [] if ckpt_path.is_dir() else embedded_loras(split_embedded(read_tensors(ckpt_path))[1], model_names(models.config))
    modules = modules_of(models)
    for path, multiplier in loras.items():
        name = Path(path).stem
        if name in {lora.name for lora in found}:
            raise CheckpointError(f"two LoRAs are named {name!r}; rename one of the files")
        lora = read_lora(path, modules)
        attach_state(models, lora.state, name, multiplier, os.fspath(path))  # checks that every tensor fits the base
        found.append(EmbeddedLoRA(name, float(multiplier), write_kohya(lora.state, modules.names), lora.metadata))
    if not found:
        raise CheckpointError(f"{out}: there is nothing to embed: no LoRA is given, and the base has none inside")
    tensors, metadata = embed_keys(found)
    write_safetensors(Path(out), {**ldm_tensors(models), **tensors}, ldm_metadata(models) | metadata)


def take_out(path: str | os.PathLike, folder: str | os.PathLike, *, config: ModelConfig | None = None) -> list[Path]:
    """Write every LoRA inside a checkpoint, ours or lora_wrapper's, as `folder`/<name>.safetensors; returns the files.

    The tensors are the embedded ones, bit for bit, under kohya's names, with the metadata of the original LoRA file.
    `config` is needed only for a lora_wrapper checkpoint of an unknown family. Raises CheckpointError, before anything is
    written, for a checkpoint without LoRAs, damaged LoRAs, names that cannot be file names, and files that exist.
    """
    base, inside = split_embedded(read_tensors(Path(path)))
    if not inside:
        raise CheckpointError(f"{path}: has no LoRA inside it")
    loras = embedded_loras(inside, model_names(config or config_of_file(base)))
    files = [_file_for(lora.name, Path(folder), path) for lora in loras]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file, lora in zip(files, loras):
        write_safetensors(file, lora.tensors, renewed(lora.metadata, lora.tensors))
    return files


def _file_for(name: str, folder: Path, path: str | os.PathLike) -> Path:
    if not name or set(name) & set('/\\:\0') or not name.strip("."):  # a name from a file must not escape the folder
        raise CheckpointError(f"{path}: the LoRA {name!r} inside it has a name that cannot be that of a file")
    file = folder / f"{name}.safetensors"
    if file.exists():
        raise CheckpointError(f"{file}: exists; name another folder")
    return file
