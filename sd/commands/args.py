"""Flags that several commands share (model, LoRAs, device, dtype, picture settings), and the paths that commands write."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sd.errors import SDError
from sd.request import MAX_IMAGES, Request

if TYPE_CHECKING:
    import torch

    from sd.models import Models

DType = Literal["float32", "bfloat16", "float16"]
RunDType = Literal["auto", DType]
# Longer than a line, at which tyro would break a docstring.
LORA_HELP = ("LoRA files or folders, each as PATH, PATH:MULTIPLIER or PATH:MULTIPLIER:BLOCKS. BLOCKS sets block "
             "weights: text_encoder=0.5,mid_block=0, or a list of 17, 25 or 26 numbers. LoRAs in data/loras need only a name.")
DTYPE_HELP = ("Precision of the networks; none: float32 on the CPU, half precision elsewhere; auto: bfloat16 also on a CPU "
              "that multiplies it, for models of SD 1.x's size. For merge, precision of the file; none: the base's, or float32 "
              "with --into lora.")


@dataclass(frozen=True)
class ModelArgs:
    """The model, the LoRAs loaded on it, and where it runs."""

    model: str | None = None
    """Checkpoint (.safetensors, .ckpt), diffusers folder, or name of a model in data/; none: emoji."""
    lora: Annotated[tuple[str, ...], tyro.conf.arg(help=LORA_HELP)] = ()
    skip: str | None = None
    """Regular expression; LoRA tensors whose key or module path matches are not loaded."""
    vae: str | None = None
    """VAE to use instead of the model's own: a file or folder."""
    device: str | None = None
    """cuda, mps or cpu; none: the best available (for merge: cpu)."""
    dtype: Annotated[RunDType | None, tyro.conf.arg(help=DTYPE_HELP)] = None
    verbose: bool = False
    """Print how the networks run."""


def load(on: ModelArgs, embeddings: tuple[str, ...] = ()) -> Models:
    """Load the model, its LoRAs (active at their multipliers) and its learned words."""
    if on.skip is not None and not on.lora:
        raise SDError("--skip needs --lora: it leaves out parts of the LoRAs")
    loras, words = [lora(text) for text in on.lora], [embedding(text) for text in embeddings]
    from sd.model_loader import load_embedding, load_lora_into_models, preload_models_from_standard_weights
    chosen = "auto" if on.dtype == "auto" else dtype(on.dtype)
    models = preload_models_from_standard_weights(on.model, on.device, dtype=chosen, vae=on.vae)
    for path, multiplier, blocks in loras:
        if path.stem in models.lora_reports:
            raise SDError(f"two LoRAs are named {path.stem!r}; rename one of the files")
        load_lora_into_models(models, path, multiplier=multiplier, skip=on.skip, block_weights=blocks)
    for path, word in words:
        load_embedding(models, path, word)
    return models


def say_how(models: Models, on: ModelArgs) -> None:
    """Log the dtype and device that pictures were made in; with --verbose, all that decides their speed and last bits."""
    from sd.placement import running
    more = f" ({running(models.device)})" if on.verbose else ""
    logging.getLogger("sd").info("%s on %s%s", models.dtype_name, models.device, more)


def lora(text: str) -> tuple[Path, float, str | None]:
    """Parse PATH[:MULTIPLIER[:BLOCKS]] into (file, multiplier, block weights); a bare name is looked up in data/loras."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|[-+]?inf"  # anything else belongs to the path
    match = re.fullmatch(rf"(.+?)(?::({number})(?::([^:/\\]*[,=][^:/\\]*))?)?", text, re.S)
    if not text:
        raise SDError("--lora is empty; give a file as PATH, PATH:MULTIPLIER or PATH:MULTIPLIER:BLOCKS")
    if Path(text).exists():  # file names may contain colons
        return Path(text), 1.0, None
    path, multiplier, blocks = (Path(match[1]), float(match[2] or 1), match[3]) if match else (Path(text), 1.0, None)
    found = shipped(path)
    if not found.exists() and ":" in path.name:
        raise SDError(f"{path}: no such file; a LoRA is named as PATH, PATH:MULTIPLIER or PATH:MULTIPLIER:BLOCKS, where "
                      f"BLOCKS is 17, 25 or 26 numbers, or pairs such as text_encoder=0.5,mid_block=0")
    return found, multiplier, blocks


def shipped(path: Path) -> Path:
    """Resolve the bare name of a LoRA in data/loras; a path that exists, or anything else, is returned as it is."""
    from sd.prompts.tokenizer import data_dir
    file = data_dir() / "loras" / f"{path.name}.safetensors"
    return file if not path.exists() and path.parent == Path(".") and file.exists() else path


def embedding(text: str) -> tuple[Path, str | None]:
    """Parse PATH[:WORD] into (file, word)."""
    if not text:
        raise SDError("--embedding is empty; give a file as PATH or PATH:WORD")
    parts = text.split(":")  # both paths and words may contain colons
    splits = [(":".join(parts[:n]), ":".join(parts[n:])) for n in range(len(parts), 0, -1)]
    path, word = next(((path, word) for path, word in splits if Path(path).exists()), (text, ""))
    return Path(path), word or None


def dtype(name: str | None) -> torch.dtype | None:
    """torch's dtype of that name."""
    if name is None:
        return None
    import torch
    return getattr(torch, name)


LoRAFormat = Literal["kohya", "diffusers", "peft", "comfyui"]

# Flags of generate and compare: field of Request -> (flag, type[, default, if not the field's]).
FLAGS: dict[str, tuple] = {"uncond_prompt": ("negative", str, ""), "n_inference_steps": ("steps", int, 30),
         "sampler_name": ("sampler", str, "dpmpp_2m"), "spacing": ("spacing", str | None), "cfg_scale": ("cfg", float),
         "width": ("width", int | None), "height": ("height", int | None), "clip_skip": ("clip_skip", int),
         "seed": ("seed", int | None)}


def _flag(name: str, flag: str, type_, *default):
    """(name, type, default) of a field for make_dataclass."""
    setting = Request.__dataclass_fields__[name]
    return flag, Annotated[type_, tyro.conf.arg(help=setting.metadata["help"])], field(default=(*default, setting.default)[0])


if TYPE_CHECKING:
    @dataclass(frozen=True)
    class PictureFlags:
        """A field for each of FLAGS."""

        seed: int | None = None
else:
    PictureFlags = make_dataclass("PictureFlags", [_flag(name, *flag) for name, flag in FLAGS.items()], frozen=True)


def settings(flags: PictureFlags) -> dict[str, Any]:
    """Fields of Request -> values, as the flags have them, without the seed."""
    return {name: getattr(flags, flag) for name, (flag, *_) in FLAGS.items() if name != "seed"}


def writes(tool: Callable) -> Callable:
    """Decorator for a command: create the folder of `--out` first, and remove it again if the command fails."""
    @wraps(tool)
    def run(args) -> None:
        missing = [folder for folder in Path(args.out).absolute().parents if not folder.exists()]
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            tool(args)
        except BaseException:
            for folder in missing:  # innermost first
                with suppress(OSError):
                    folder.rmdir()
            raise
    return run


def picture_paths(out: str, count: int) -> list[Path]:
    """Where `count` pictures are saved: the file `out`, numbered if there are several, or the next free numbers in a folder."""
    from sd.pictures.image_io import PICTURE_FORMATS
    path = Path(out)
    if not out:
        raise SDError("--out is empty; give a folder or a file")
    if count > MAX_IMAGES:
        raise SDError(f"{count} pictures are asked for; allowed: up to {MAX_IMAGES}")
    if file := next((folder for folder in path.parents if folder.is_file()), None):
        raise SDError(f"{path}: {file} is a file; a folder is needed there")
    if path.suffix and not path.is_dir():
        if path.suffix.lower() not in PICTURE_FORMATS:
            raise SDError(f"{path}: pictures are not saved as {path.suffix!r}; allowed: {', '.join(PICTURE_FORMATS)}, "
                          f"or a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        _try_writing(path.parent)
        return [path if count == 1 else path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
    path.mkdir(parents=True, exist_ok=True)
    _try_writing(path)
    used = [int(p.stem) for p in path.glob("*.png") if p.stem.isdigit()]
    return [path / f"{max(used, default=0) + 1 + i:04d}.png" for i in range(count)]


def _try_writing(folder: Path) -> None:
    """Raise OSError now rather than after the pictures are made."""
    from sd.files.atomic import atomic_write
    probe = folder / ".sd-probe"
    with atomic_write(probe):
        pass
    probe.unlink()
