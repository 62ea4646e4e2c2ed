"""LoRA files as a whole: what a file holds, whichever program wrote it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sd.checkpoint import CheckpointError, TensorFile, read_json, read_tensors
from sd.embeddings import beside_lora, read_embeddings
from sd.lora_formats import AdapterWeights, Assembled, LoRAFormatError, Modules, assemble, read_entries
from sd.lora_legacy import LEGACY

LORA_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
NETWORKS = ("unet", "text_encoder")  # subfolders of a PEFT folder for a whole pipeline


@dataclass
class LoRAFile:
    """What a LoRA file holds: every tensor of it is in `state` or `words`, or its key stands in `skipped`."""

    path: Path
    state: dict[str, AdapterWeights]
    format: str
    tensors: int  # how many of the file's are in `state` and `words`
    skipped: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    file: TensorFile | None = None
    words: dict[str, Tensor] = field(default_factory=dict)  # learned word of the prompt -> its vectors, [k, D] or [D]

    @property
    def base(self) -> str:
        """The family of models that the file's metadata names, or ""."""
        known = self.metadata.get("ss_base_model_version") or self.metadata.get("modelspec.architecture")
        return known or ("sd_v2" if self.metadata.get("ss_v2") == "True" else "")

    @property
    def trigger_words(self) -> list[str]:
        """What a prompt should hold, says the metadata: its trigger phrase, else the five most used tags of its training."""
        phrase = self.metadata.get("modelspec.trigger_phrase", "")
        words = [word.strip() for word in phrase.split(",") if word.strip()]
        return words or list(tag_counts(self.metadata))[:5]


def tag_counts(metadata: Mapping[str, str]) -> dict[str, int]:
    """Tags of the training captions (`ss_tag_frequency`) with their counts, most used first; {} if there are none."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: dict[str, int] = {}
        for tags in folders.values():
            for tag, count in tags.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, AttributeError, TypeError, RecursionError):  # only told, never needed
        return {}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def read_lora(path: str | os.PathLike | Mapping[str, Tensor], modules: Modules | Callable[[TensorFile], Modules], *,
              skip: str | None = None, words: bool = False) -> LoRAFile:
    """Read a LoRA of any known program: a file, a folder of PEFT or diffusers, or tensors in memory.

    `modules`: of the model that it is for, or a function that finds out from the file. `skip`: a regular expression;
    tensors whose key, or whose module's path, it matches somewhere are left out. `words`: whether the caller takes learned
    words of the prompt too (`LoRAFile.words`); else a file that holds one is refused.
    Raises CheckpointError for what is no file of tensors, LoRAFormatError for a tensor that is not understood, a module that
    the model does not have, half a pair, and values that are not finite.
    """
    file, configs = open_lora(path)
    made_for = file.metadata.get("ss_base_model_version")
    where = file.path.name + (f" (made for {made_for})" if made_for else "")
    if not file:
        raise LoRAFormatError(f"{where} holds no tensors")
    modules = modules if isinstance(modules, Modules) else modules(file)
    try:
        entries, strange, name = _entries(file, configs, modules)
        found: Assembled = assemble(entries, strange, modules, where, skip=skip, tensors=file, words=words)
    except LoRAFormatError as error:
        raise LoRAFormatError(f"{error}" if where in str(error) else f"{where}: {error}") from None
    if not found.state and not found.words and found.skipped:
        raise LoRAFormatError(f"{where}: skip={skip!r} leaves nothing of its {len(file)} tensors")
    return LoRAFile(file.path, found.state, name, len(found.used), sorted(found.skipped), file.metadata, file, found.words)


def _entries(file: TensorFile, configs: Mapping[str, dict], modules: Modules):
    for name, detect, read in LEGACY:
        if detect(file):
            entries = list(read(file, modules))
            return entries, sorted(set(file) - {entry.key for entry in entries}), name
    # pickles may hold alpha as a plain number
    file.update({key: torch.tensor(float(value)) for key, value in file.scalars.items() if key.endswith(".alpha")})
    return read_entries(file, file.metadata, configs)


def open_lora(path: str | os.PathLike | Mapping[str, Tensor]) -> tuple[TensorFile, dict[str, dict]]:
    """The tensors of a LoRA file or folder, and PEFT's configs by the prefix of the keys that they are for."""
    if isinstance(path, TensorFile):
        return path, {}
    if isinstance(path, Mapping):
        return TensorFile("tensors in memory", dict(path)), {}
    path = Path(path)
    if not path.is_dir():
        return read_tensors(path), {}
    parts = [(network + ".", path / network) for network in NETWORKS if _weights_in(path / network)]
    parts = parts or [("", path)]
    whole, configs = TensorFile(path, {}), {}
    for prefix, folder in parts:
        name = _weights_in(folder)
        if name is None:
            raise CheckpointError(f"{path}: is a folder without a LoRA in it; looked for {', '.join(LORA_NAMES)}, "
                                  f"also in {' and '.join(NETWORKS)}")
        part = read_tensors(folder / name)
        whole.update({prefix + re.sub(r"^base_model\.model\.", "", key) if prefix else key: t for key, t in part.items()})
        whole.metadata |= part.metadata
        if (folder / "adapter_config.json").exists():
            configs[prefix] = read_json(folder / "adapter_config.json")
    for file in beside_lora(path):  # as if they were bundled
        whole.update({f"bundle_emb.{word}.emb_params": vectors for word, vectors in read_embeddings(file).items()})
    return whole, configs


def _weights_in(folder: Path) -> str | None:
    return next((name for name in LORA_NAMES if (folder / name).is_file()), None)
