"""LoRAs embedded in a checkpoint beside the base's tensors, in two formats: ours and lora_wrapper's.

Ours is a safetensors file in LDM layout with additional keys `lora.<escaped name>.<key of the LoRA file in kohya's spelling>`,
and {name: {"multiplier": number, "metadata": {string: string}}} as JSON in its metadata. The base's tensors are those of a
plain checkpoint, so a program that ignores unknown keys loads the base alone.
lora_wrapper adds `<module>.lora_A` [R, in], `.lora_B` [out, R] and `.lora_scale` () to CompVis' keys, with
ΔW = lora_scale · B · A, and moves the base's tensors of such a module to `<module>.base_layer`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sd.checkpoints.names import Name
from sd.escape import escaped, unescaped
from sd.files.tensor_file import CheckpointError, TensorFile

EMBEDDED = "sdlora.embedded"
_PREFIX = "lora."
_WRAPPED = (".lora_A", ".lora_B", ".lora_scale")


@dataclass(frozen=True)
class EmbeddedLoRA:
    """One LoRA of a checkpoint: the tensors of a LoRA file in kohya's spelling, and its metadata."""

    name: str
    multiplier: float
    tensors: Mapping[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def embed_keys(loras: Iterable[EmbeddedLoRA]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata to add to a checkpoint to embed these LoRAs. Inverse of `embedded_loras`."""
    tensors = {f"{_PREFIX}{escaped(lora.name)}.{key}": tensor for lora in loras for key, tensor in lora.tensors.items()}
    facts = {lora.name: {"multiplier": lora.multiplier, "metadata": lora.metadata} for lora in loras}
    return tensors, {EMBEDDED: json.dumps(facts, ensure_ascii=False)}


def split_embedded(file: TensorFile) -> tuple[TensorFile, TensorFile]:
    """Split a file into (the plain checkpoint, the tensors of LoRAs inside it). A file of nothing but a LoRA stays whole."""
    inside = {key for key in file if key.startswith(_PREFIX)}
    if not inside and any(key.endswith(".lora_scale") for key in file):
        inside = {key for key in file if key.endswith((*_WRAPPED, ".lora_A.weight", ".lora_B.weight"))}
    if len(inside) == len(file):
        inside = set()
    wrapped = {key.rpartition(".lora_")[0] for key in inside if key.endswith(_WRAPPED)}
    base = {_unwrapped(key, wrapped, file): tensor for key, tensor in file.items() if key not in inside}
    return (TensorFile(file.path, base, file.metadata, file.scalars, file.ignored),
            TensorFile(file.path, {key: tensor for key, tensor in file.items() if key in inside}, file.metadata))


def _unwrapped(key: str, wrapped: set[str], file: TensorFile) -> str:
    module, _, tail = key.rpartition(".base_layer.")
    plain = f"{module}.{tail}"
    return plain if module in wrapped and plain not in file else key


def embedded_loras(inside: TensorFile, names: Sequence[Name]) -> list[EmbeddedLoRA]:
    """The LoRAs in the second part of `split_embedded`. Raises CheckpointError if they are damaged."""
    if EMBEDDED in inside.metadata or any(key.startswith(_PREFIX) for key in inside):
        return _ours(inside)
    return [_of_lora_wrapper(inside, names)] if inside else []


def _ours(inside: TensorFile) -> list[EmbeddedLoRA]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in inside.items():
        name, _, rest = key.removeprefix(_PREFIX).partition(".")
        parts.setdefault(unescaped(name), {})[rest] = tensor
    wrong = f"{inside.path}: its {EMBEDDED} metadata does not describe the LoRAs in it"
    try:
        facts = json.loads(inside.metadata[EMBEDDED])
        found = [EmbeddedLoRA(name, fact["multiplier"], parts.get(name, {}), fact["metadata"]) for name, fact in facts.items()]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{wrong} ({type(error).__name__}: {error})") from None
    for lora in found:
        number = isinstance(lora.multiplier, (int, float)) and not isinstance(lora.multiplier, bool)
        if not number or not math.isfinite(lora.multiplier):
            raise CheckpointError(f"{wrong}: the multiplier of {lora.name!r} is {lora.multiplier!r}; a finite number is needed")
        if not isinstance(lora.metadata, dict) or not all(isinstance(value, str) for value in lora.metadata.values()):
            raise CheckpointError(f"{wrong}: the metadata of {lora.name!r} must be strings by name")
    differs = sorted({lora.name for lora in found} ^ parts.keys())
    if differs:
        there = "has no tensors" if differs[0] in facts else "is not in it, though its tensors are there"
        raise CheckpointError(f"{wrong}: {differs[0]!r} {there}")
    return found


def _of_lora_wrapper(inside: TensorFile, names: Sequence[Name]) -> EmbeddedLoRA:
    kohya = {name.ldm: name.kohya or name.path for name in names}
    tensors: dict[str, Tensor] = {}
    for module in dict.fromkeys(key.rpartition(".lora_")[0] for key in inside):
        if module not in kohya:
            raise CheckpointError(f"{inside.path}: has a LoRA of lora_wrapper on {module!r}, which this model does not have")
        if f"{module}.lora_A.weight" in inside or f"{module}.lora_B.weight" in inside:
            raise CheckpointError(f"{inside.path}: its LoRA on {module!r} is a soft convolution of lora_wrapper, two layers "
                                  f"in a row that do not amount to a change of one weight; not read")
        missing = [module + tail for tail in _WRAPPED if module + tail not in inside]
        if missing:
            raise CheckpointError(f"{inside.path}: its LoRA on {module!r} is incomplete: {missing[0]!r} is not in the file")
        down, up, scale = (inside[module + tail] for tail in _WRAPPED)
        if down.dim() != 2 or up.dim() != 2 or scale.numel() != 1:
            raise CheckpointError(f"{inside.path}: its LoRA on {module!r} has lora_A {list(down.shape)}, lora_B "
                                  f"{list(up.shape)} and lora_scale {list(scale.shape)}; expected are [R, in], [out, R] "
                                  f"and one number")
        tensors |= {f"{kohya[module]}.lora_down.weight": down, f"{kohya[module]}.lora_up.weight": up,
                    f"{kohya[module]}.alpha": scale.double().reshape(()) * len(down)}  # so that alpha / R is the scale
    return EmbeddedLoRA(inside.path.stem, 1.0, tensors, {"format": "pt"})
