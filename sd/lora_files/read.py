"""Reads LoRA files and folders of any known program, and reports on them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sd.adapters.weights import AdapterWeights, LoRAFormatError
from sd.files.folder import read_json
from sd.files.hashes import lora_hash
from sd.files.tensor_file import CheckpointError, TensorFile
from sd.files.tensors import read_tensors
from sd.lora_files.assemble import Assembled, assemble
from sd.lora_files.block_weights import BlockWeights
from sd.lora_files.embedding_files import beside_lora, read_embeddings
from sd.lora_files.legacy import LEGACY
from sd.lora_files.modern import read_entries
from sd.lora_files.modules import Modules

LORA_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
NETWORKS = ("unet", "text_encoder")  # subfolders of a PEFT folder of a whole pipeline


@dataclass
class LoRAFile:
    """The content of a LoRA file: each of its tensors is in `state` or `words`, or its key is in `skipped`."""

    path: Path
    state: dict[str, AdapterWeights]
    format: str
    tensors: int  # number of the file's tensors in `state` and `words`
    skipped: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    file: TensorFile | None = None
    words: dict[str, Tensor] = field(default_factory=dict)  # learned word of the prompt -> its vectors, [k, D] or [D]

    @property
    def base(self) -> str:
        """The model family named in the file's metadata, or ""."""
        known = self.metadata.get("ss_base_model_version") or self.metadata.get("modelspec.architecture")
        return known or ("sd_v2" if self.metadata.get("ss_v2") == "True" else "")

    @property
    def trigger_words(self) -> list[str]:
        """Words to use in a prompt: the metadata's trigger phrase, or else the five most frequent training tags."""
        phrase = self.metadata.get("modelspec.trigger_phrase", "")
        words = [word.strip() for word in phrase.split(",") if word.strip()]
        return words or list(tag_counts(self.metadata))[:5]


def tag_counts(metadata: Mapping[str, str]) -> dict[str, int]:
    """Tag -> count in the training captions (`ss_tag_frequency`), most frequent first; {} if there are none."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: dict[str, int] = {}
        for tags in folders.values():
            for tag, count in tags.items():
                counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    except (ValueError, AttributeError, TypeError, RecursionError):  # informative only
        return {}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def read_lora(path: str | os.PathLike | Mapping[str, Tensor], modules: Modules | Callable[[TensorFile], Modules], *,
              skip: str | None = None, words: bool = False) -> LoRAFile:
    """Read a LoRA of any known program: a file, a folder of PEFT or diffusers, or tensors in memory.

    `modules`: of the model that the LoRA is for, or a function that infers them from the file. `skip`: a regular expression;
    tensors whose key or module path contains a match are left out. `words`: whether to accept learned words of the prompt
    (`LoRAFile.words`); otherwise a file that has one is refused.
    Raises CheckpointError for a file that holds no tensors, LoRAFormatError for tensors that are not understood, modules that
    the model lacks, half a pair, and values that are not finite.
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
    # in pickles alpha may be a plain number
    file.update({key: torch.tensor(float(value)) for key, value in file.scalars.items() if key.endswith(".alpha")})
    return read_entries(file, file.metadata, configs)


def open_lora(path: str | os.PathLike | Mapping[str, Tensor]) -> tuple[TensorFile, dict[str, dict]]:
    """(tensors, {key prefix: PEFT config}) of a LoRA file or folder. Raises CheckpointError."""
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
    for file in beside_lora(path):  # read as if bundled
        whole.update({f"bundle_emb.{word}.emb_params": vectors for word, vectors in read_embeddings(file).items()})
    return whole, configs


def _weights_in(folder: Path) -> str | None:
    return next((name for name in LORA_NAMES if (folder / name).is_file()), None)


@dataclass
class LoadReport:
    """How a LoRA file was loaded: each of its tensors is counted in `tensors` (applied) or named in `skipped` (as asked)."""

    name: str
    file: str
    format: str
    base: str  # the model family named in the file's metadata, or ""
    modules: dict[str, int]  # component -> modules matched
    kinds: list[str]
    ranks: list[int]
    alphas: list[float]
    tensors: int
    skipped: list[str] = field(default_factory=list)
    trigger_words: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)  # block -> multiplier, as given
    words: list[str] = field(default_factory=list)  # learned words that the file added
    stamp: tuple[int, int] | None = None  # size and mtime of the file when it was read

    @property
    def hash(self) -> str | None:
        """The loaded file's `lora_hash`; None if it has changed since, or was not a file."""
        return lora_hash(self.file) if self.stamp is not None and self.stamp == stamp_of(self.file) else None

    def __str__(self) -> str:
        where = ", ".join(f"{n} in {component or 'the model'}" for component, n in self.modules.items())
        ranks, alphas = ("/".join(f"{v:g}" for v in values) or "-" for values in (self.ranks, self.alphas))
        kinds = "" if self.kinds == ["lora"] else f" ({', '.join(self.kinds)})"
        text = f"LoRA {self.name!r}: {self.format}{kinds}{f' for {self.base}' if self.base else ''}, {where}, rank {ranks}, " \
               f"alpha {alphas}, {self.tensors} tensors applied"
        if self.skipped:
            text += f", {len(self.skipped)} skipped as asked"
        if self.blocks:
            text += ", blocks " + ", ".join(f"{block} {m:g}" for block, m in self.blocks.items())
        if self.words:
            text += f", learned words: {', '.join(self.words)}"
        return text + (f", trigger words: {', '.join(self.trigger_words)}" if self.trigger_words else "")


def report_of(found: LoRAFile, name: str, networks: Iterable[str] = (), blocks: BlockWeights | None = None) -> LoadReport:
    """The report on a file that was read; modules are counted per component if their path starts with one of `networks`."""
    state = found.state
    counts: dict[str, int] = {}
    for module in state:
        component = module.split(".")[0] if module.split(".")[0] in networks else ""
        counts[component] = counts.get(component, 0) + 1
    return LoadReport(name, os.fspath(found.path), found.format, found.base, counts, sorted({w.kind for w in state.values()}),
                      sorted({w.rank for w in state.values() if w.rank}),
                      sorted({w.alpha for w in state.values() if w.alpha is not None}), found.tensors, found.skipped,
                      found.trigger_words, found.metadata, dict(blocks.given) if blocks else {}, list(found.words),
                      stamp_of(found.path))


def stamp_of(path) -> tuple[int, int] | None:
    """(size in bytes, mtime in ns) of a file; None for anything else."""
    return (os.stat(path).st_size, os.stat(path).st_mtime_ns) if os.path.isfile(path) else None
