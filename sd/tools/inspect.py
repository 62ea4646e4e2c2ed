"""What a file is: a checkpoint, a LoRA, or a picture with the parameters that made it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path

import torch

from sd.checkpoint import TensorFile, lora_hash, model_hash, read_folder, read_tensors, sniff
from sd.image_io import FORMATS, read_parameters
from sd.lora_formats import KOHYA_TENSORS, component_of, guess_file
from sd.model_loader import CONFIG_KEY
from sd.names import guess_checkpoint, ldm_facts


def inspect_file(path: str | os.PathLike) -> dict:
    """Facts of a file or a diffusers folder, read from its header where there is one. Raises CheckpointError, ImageError."""
    path = Path(path)
    if path.is_dir():
        folder = read_folder(path)
        parts = {name or "weights": _tensors(file) for name, file in folder.components.items()}
        return {"kind": "diffusers folder", "components": parts, "configs": sorted(folder.configs)}
    if path.suffix.lower() in FORMATS and sniff(path).startswith("a "):
        return {"kind": "picture", "parameters": read_parameters(path)}
    file = read_tensors(path)
    if any(key.endswith(tuple(KOHYA_TENSORS)) or "lora" in key.lower() for key in file):
        return _lora(file, path)
    facts = {"kind": "checkpoint", **_tensors(file), "hash": model_hash(path)}
    if CONFIG_KEY in file.metadata:
        facts["config"] = json.loads(file.metadata[CONFIG_KEY])
    else:
        facts |= {"UNet": ldm_facts(file.shapes)} if ldm_facts(file.shapes) else {"seems": guess_checkpoint(file)}
    return facts | _metadata(file)


def _lora(file: TensorFile, path: Path) -> dict:
    modules = Counter(component_of(key) for key in {key.split(".lora_")[0].removesuffix(".alpha") for key in file})
    ranks = sorted({t.shape[0] for key, t in file.items() if key.endswith("lora_down.weight")})
    alphas = sorted({float(t) for key, t in file.items() if key.endswith(".alpha") and t.numel() == 1})
    return {"kind": "LoRA", **_tensors(file), "hash": lora_hash(path), "modules": dict(modules), "ranks": ranks,
            "alphas": alphas, "format": "kohya" if ranks or alphas else guess_file(file)} | _metadata(file)


def _tensors(file: TensorFile) -> dict:
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in file.values())
    bad = sum(not bool(torch.isfinite(t).all()) for t in file.values() if t.is_floating_point() and t.itemsize > 1)
    return {"tensors": len(file), "parameters": sum(math.prod(s) for s in file.shapes.values()), "dtypes": dict(dtypes),
            **({"tensors with NaN or infinity": bad} if bad else {})}


def _metadata(file: TensorFile) -> dict:
    shown = {k: v if len(v) <= 300 else f"{v[:300]}... ({len(v)} characters)" for k, v in file.metadata.items()}
    shown.pop(CONFIG_KEY, None)
    return {"metadata": shown} if shown else {}
