"""sdlora generate."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sd.commands.args import ModelArgs, PictureArgs, Positional, load, picture_paths
from sd.errors import SDError


@dataclass(frozen=True)
class Generate:
    """Make pictures from prompts; each file says what made it."""

    prompts: Positional[tuple[str, ...]] = ()
    """What the pictures show."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    how: Annotated[PictureArgs, tyro.conf.arg(name="")] = field(default_factory=PictureArgs)
    embedding: tuple[str, ...] = ()
    """Files or folders of learned words (textual inversion) as PATH, or PATH:WORD for another word than the file's."""
    count: int = 1
    """Pictures for each prompt."""
    input: str | None = None
    """Picture to start from (img2img)."""
    mask: str | None = None
    """Where to repaint it (white)."""
    strength: float = 0.8
    """How much of it is noised: 0 nothing, 1 all."""
    no_lora: bool = False
    """Leave all LoRAs off: the bare base."""
    again: str | None = None
    """A picture made here: make it once more with the prompt, seed, settings and multipliers that it holds."""
    out: str = "out"
    """Folder, or a file ending in .png, .jpg or .webp."""

    def __post_init__(self):
        if self.again is None and not self.prompts:
            raise SDError("no prompt is given; prompts stand before the flags: python -m sd generate \"a cat\" --seed 1")
        if self.again is not None and (self.prompts or self.how != PictureArgs() or self.count != 1):
            raise SDError("--again takes prompt, seed and settings from the picture; leave them out")
        if self.input is None and (self.mask is not None or self.strength != Generate.strength):
            raise SDError(f"--{'strength' if self.mask is None else 'mask'} needs --input: the picture to start from")


def generate(args: Generate) -> None:
    from sd import pipeline
    from sd.pictures.image_io import read_parameters, save_image
    again = {} if args.again is None else read_parameters(args.again)
    paths = picture_paths(args.out, args.count * max(1, len(args.prompts)))
    models = load(args.on, args.embedding)
    arguments, prompts = args.how.arguments(), list(args.prompts)
    seed = secrets.randbits(32) if args.how.seed is None else args.how.seed
    if args.again is not None:
        prompts, seed, arguments = _again(again, args.again, models, args.input)
    if args.input is not None:
        arguments |= {"input_image": args.input, "mask": args.mask, "strength": again.get("strength", args.strength)}
    with ThreadPoolExecutor(1) as beside:  # hashing gigabytes takes seconds, which the sampler takes too
        beside.submit(lambda: models.model_hash)
        pictures = pipeline.generate(prompts, models=models, seed=seed, images_per_prompt=args.count,
                                     use_lora=not args.no_lora, **arguments)
    for i, (picture, path) in enumerate(zip(pictures, paths)):
        about = pipeline.describe(models, prompts[i // args.count], seed=seed + i, use_lora=not args.no_lora, **arguments)
        save_image(picture, path, about)
        print(f"{path}  seed {seed + i}  {prompts[i // args.count]}")


def _again(about: dict, path: str, models, picture: str | None) -> tuple[list[str], int, dict]:
    """Prompts, seed and arguments from a picture's own parameters. Raises ValueError for another model or LoRA."""
    from sd.pipeline import used_embeddings
    kinds = {"prompt": str, "uncond_prompt": str, "seed": int, "n_inference_steps": int, "sampler_name": str,
             "cfg_scale": float, "width": int, "height": int}
    for key, kind in kinds.items():
        if type(about.get(key)) is not kind:
            raise SDError(f"{path}: cannot be made again: what it says of itself has no {key} that is a {kind.__name__}")
    if not isinstance(about.get("lora", {}), dict) or not isinstance(about.get("lora_hashes", {}), dict):
        raise SDError(f"{path}: cannot be made again: what it says of its LoRAs is damaged")
    if "strength" in about and picture is None:
        raise SDError(f"{path}: made from another picture, which it does not hold; name it with --input")
    if about.get("model_hash", models.model_hash) != models.model_hash:
        raise SDError(f"{path}: made with model {about.get('model')!r} of hash {about['model_hash']}; "
                         f"this one has {models.model_hash}; name it with --model")
    missing = sorted(set(about.get("lora", {})) - set(models.lora_reports))
    if missing:
        raise SDError(f"{path}: made with the LoRA {missing[0]!r}; load it with --lora")
    for name, digest in about.get("lora_hashes", {}).items():
        if name in models.lora_reports and models.lora_reports[name].hash != digest:
            raise SDError(f"{path}: made with another LoRA {name!r}, of hash {digest}; "
                             f"this one has {models.lora_reports[name].hash}")
    then, now = about.get("embeddings") or {}, used_embeddings(models, about["prompt"], about["uncond_prompt"])
    if then != now:
        raise SDError(f"{path}: made with the embeddings {then or 'none'} (word: hash) in its prompts; this one has "
                         f"{now or 'none'}; name them with --embedding")
    for key, what in (("lora_blocks", "blocks"), ("lora_skipped", "skipped")):
        for name in about.get("lora", {}):
            then, now = (about.get(key) or {}).get(name) or None, getattr(models.lora_reports[name], what) or None
            if then != now:
                raise SDError(f"{path}: made with {what} {then} of the LoRA {name!r}; this one has {now}; "
                                 f"say so with --lora PATH:MULTIPLIER:BLOCKS and --skip")
    keys = ("uncond_prompt", "n_inference_steps", "sampler_name", "cfg_scale", "width", "height", "spacing", "clip_skip", "eta")
    return [about["prompt"]], about["seed"], {k: about[k] for k in keys if k in about} | {"lora": about.get("lora", {})}
