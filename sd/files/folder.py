"""diffusers folders: each component's weights, and the JSON files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sd.files.tensor_file import CheckpointError, TensorFile
from sd.files.tensors import read_tensors


@dataclass(frozen=True)
class Folder:
    """A diffusers folder, mapped.

    `configs`: "model_index.json", "unet/config.json", ... -> content. `components`: "unet", "vae", ... -> tensors.
    """

    path: Path
    configs: dict[str, dict]
    components: dict[str, TensorFile]


def read_diffusers_folder(path: str | os.PathLike, components: tuple[str, ...] = ("unet", "vae", "text_encoder"),
                          variant: str | None = None) -> Folder:
    """Map the weights of a diffusers folder and parse its configs; tensor names are left as they are.

    Plain files are preferred, safetensors over .bin, sharded or not; with `variant` ("fp16"), that variant where a
    component has it. If a component has no plain files, its only variant is read. In a folder without model_index.json,
    weights at the top level (a VAE alone) are the component "". Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_dir():
        state = "is a file, a diffusers folder is needed here" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {state}")
    configs = {}
    for file in sorted([*path.glob("model_index.json"), *path.glob("*config.json"), *path.glob("*/*config.json")]):
        configs[file.relative_to(path).as_posix()] = read_json(file)
    found: dict[str, TensorFile] = {}
    variants: set[str] = set()
    for name in components if "model_index.json" in configs else ("", *components):
        files = _weight_files(path / name)
        own = {key for key in files if key}
        variants |= own
        chosen = variant if variant in files else None
        if None not in files and chosen is None and files:
            if len(files) > 1 or variant is not None:
                raise CheckpointError(f"{path / name}: has only the variants {', '.join(map(repr, sorted(own)))}; "
                                      f"variant= is {variant!r}")
            chosen = next(iter(files))
        if files:
            found[name] = _read_weights(path / name, files[chosen])
    if not found:
        raise CheckpointError(f"{path}: not a diffusers folder: no weights in it, nor in {', '.join(components)}")
    if variant is not None and variant not in variants:
        raise CheckpointError(f"{path}: no component has the variant {variant!r}; there are "
                              f"{', '.join(map(repr, sorted(variants))) or 'none'}")
    return Folder(path, configs, found)


_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers, transformers today, transformers before


def _weight_files(folder: Path) -> dict[str | None, str]:
    """Variant (None: plain) -> the weight file or shard index to read."""
    files: dict[str | None, str] = {}
    present = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    for kind in ("safetensors", "bin"):
        for stem in _STEMS:
            # x.safetensors, x.fp16.safetensors, and indexes x.safetensors.index.json, x.safetensors.index.fp16.json
            single = re.compile(rf"{stem}(?:\.(?P<variant>[\w-]+))?\.{kind}")
            index = re.compile(rf"{stem}\.{kind}\.index(?:\.(?P<variant>[\w-]+))?\.json")
            for pattern in (single, index):
                for name in present:
                    match = pattern.fullmatch(name)
                    if match and "-of-" not in name:
                        files.setdefault(match["variant"], name)
    return files


def _read_weights(folder: Path, name: str) -> TensorFile:
    if not name.endswith(".json"):
        return read_tensors(folder / name)
    index = read_json(folder / name).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) and v == os.path.basename(v) for v in index.values()):
        raise CheckpointError(f"{folder / name}: its weight_map does not name files of this folder")
    merged = TensorFile(folder / name, {})
    for shard in sorted(set(index.values())):
        part = read_tensors(folder / shard)
        merged.update(part)
        merged.metadata.update(part.metadata)
    missing = [key for key in index if key not in merged]
    if missing:
        raise CheckpointError(f"{folder / name}: {len(missing)} of {len(index)} tensors are not in the shards, "
                              f"first: {missing[0]!r}")
    return merged


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not a {type(content).__name__}")
    return content
