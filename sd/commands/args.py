"""What several commands share: which model, its LoRAs, device and dtype; the settings of a picture; paths to write."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sd.errors import SDError
from sd.request import MAX_IMAGES, Request

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelArgs:
    """Which model, where it runs, and what is loaded on it."""

    model: str | None = None
    """Checkpoint (.safetensors, .ckpt) or diffusers folder, or the name of a model in data/; none: emoji."""
    lora: tuple[str, ...] = ()
    """LoRA files or folders as PATH, PATH:MULTIPLIER or PATH:MULTIPLIER:BLOCKS (text_encoder=0.5,mid_block=0 or 17, 25 or 26
    numbers); names of data/loras need no path."""
    skip: str | None = None
    """Leave out the parts of the LoRAs whose key or module path this regular expression matches."""
    vae: str | None = None
    """VAE to use instead of the model's own."""
    device: str | None = None
    """cuda, mps, cpu; none: the best present (merge: cpu)."""
    dtype: DType | None = None
    """Of the networks, or of what is written; none: float32 on the CPU, half precision elsewhere (merge: as it is in the base;
    of LoRAs float32)."""


def load(on: ModelArgs, embeddings: tuple[str, ...] = ()):
    """The models with their LoRAs active and their learned words known."""
    from sd.model_loader import load_embedding, load_lora_into_models, preload_models_from_standard_weights
    models = preload_models_from_standard_weights(on.model, on.device, dtype=dtype(on.dtype), vae=on.vae)
    if on.skip is not None and not on.lora:
        raise SDError("--skip needs --lora: it says what of the LoRAs to leave out")
    for path, multiplier, blocks in map(lora, on.lora):
        if path.stem in models.lora_reports:
            raise SDError(f"two LoRAs are named {path.stem!r}; rename one of the files")
        load_lora_into_models(models, path, multiplier=multiplier, skip=on.skip, block_weights=blocks)
    for path, word in map(embedding, embeddings):
        load_embedding(models, path, word)
    return models


def lora(text: str) -> tuple[Path, float, str | None]:
    """(file, multiplier, block weights) of PATH[:MULTIPLIER[:BLOCKS]]; a bare name is looked up in data/loras."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|[-+]?inf"  # what is no number belongs to the path
    match = re.fullmatch(rf"(.+?)(?::({number})(?::([^:/\\]*[,=][^:/\\]*))?)?", text, re.S)
    if not text:
        raise SDError("--lora is empty; name a file as PATH, PATH:MULTIPLIER or PATH:MULTIPLIER:BLOCKS")
    if Path(text).exists():  # a colon may belong to the name
        return Path(text), 1.0, None
    path, multiplier, blocks = (Path(match[1]), float(match[2] or 1), match[3]) if match else (Path(text), 1.0, None)
    found = shipped(path)
    if not found.exists() and ":" in path.name:
        raise SDError(f"{path}: no such file; a LoRA is named as PATH, PATH:MULTIPLIER or PATH:MULTIPLIER:BLOCKS, with "
                      f"BLOCKS as 17, 25 or 26 numbers or as in text_encoder=0.5,mid_block=0")
    return found, multiplier, blocks


def shipped(path: Path) -> Path:
    """The file in data/loras for a bare name that is no file itself; else the path."""
    from sd.prompts.tokenizer import data_dir
    file = data_dir() / "loras" / f"{path.name}.safetensors"
    return file if not path.exists() and path.parent == Path(".") and file.exists() else path


def embedding(text: str) -> tuple[Path, str | None]:
    """(file, word) of PATH[:WORD]."""
    if not text:
        raise SDError("--embedding is empty; name a file as PATH or PATH:WORD")
    parts = text.split(":")  # a path may hold colons, and so may a word
    splits = [(":".join(parts[:n]), ":".join(parts[n:])) for n in range(len(parts), 0, -1)]
    path, word = next(((path, word) for path, word in splits if Path(path).exists()), (text, ""))
    return Path(path), word or None


def dtype(name: str | None):
    import torch
    return None if name is None else getattr(torch, name)


Positional = tyro.conf.Positional
Format = Literal["kohya", "diffusers", "peft", "comfyui"]

# The flags of generate and compare: a field of Request -> (flag, type, default where it is not the field's own).
FLAGS = {"uncond_prompt": ("negative", str, ""), "n_inference_steps": ("steps", int, 30),
         "sampler_name": ("sampler", str, "dpmpp_2m"), "spacing": ("spacing", str | None), "cfg_scale": ("cfg", float),
         "width": ("width", int | None), "height": ("height", int | None), "clip_skip": ("clip_skip", int),
         "seed": ("seed", int | None)}


def _flag(name: str, flag: str, type_, *default):
    """A field for make_dataclass."""
    setting = Request.__dataclass_fields__[name]
    return flag, Annotated[type_, tyro.conf.arg(help=setting.metadata["help"])], field(default=(*default, setting.default)[0])


PictureFlags = make_dataclass("PictureFlags", [_flag(name, *flag) for name, flag in FLAGS.items()], frozen=True)


def settings(flags: PictureFlags) -> dict:
    """The fields of Request that these flags set, without the seed."""
    return {name: getattr(flags, flag) for name, (flag, *_) in FLAGS.items() if name != "seed"}


def writes(tool: Callable) -> Callable:
    """With the folder of `--out` made first, and taken away again when the tool fails."""
    @wraps(tool)
    def run(args) -> None:
        missing = [folder for folder in Path(args.out).absolute().parents if not folder.exists()]
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            tool(args)
        except BaseException:
            for folder in missing:  # the innermost first
                with suppress(OSError):
                    folder.rmdir()
            raise
    return run


def picture_paths(out: str, count: int) -> list[Path]:
    """Where pictures go: the file that is named, numbered if there are several, or the next free numbers of a folder."""
    from sd.pictures.image_io import FORMATS
    path = Path(out)
    if not out:
        raise SDError("--out is empty; name a folder or a file")
    if count > MAX_IMAGES:
        raise SDError(f"{count} pictures are asked for; allowed: up to {MAX_IMAGES}")
    if path.suffix and not path.is_dir():
        if path.suffix.lower() not in FORMATS:
            raise SDError(f"{path}: pictures are not saved as {path.suffix!r}; allowed: {', '.join(FORMATS)}, or a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        _try_writing(path.parent)
        return [path if count == 1 else path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
    path.mkdir(parents=True, exist_ok=True)
    _try_writing(path)
    used = [int(p.stem) for p in path.glob("*.png") if p.stem.isdigit()]
    return [path / f"{max(used, default=0) + 1 + i:04d}.png" for i in range(count)]


def _try_writing(folder: Path) -> None:
    """Raises OSError now, not after the pictures are made."""
    from sd.files.atomic import atomic_write
    probe = folder / ".sd-probe"
    with atomic_write(probe):
        pass
    probe.unlink()
