"""sdlora compare."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sd.commands.args import ModelArgs, PictureArgs, Positional, load, picture_paths
from sd.errors import SDError


@dataclass(frozen=True)
class Compare:
    """One contact sheet: a row for each prompt, a column for the base and for each LoRA at each multiplier."""

    prompts: Positional[tuple[str, ...]]
    """What the pictures show."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    how: Annotated[PictureArgs, tyro.conf.arg(name="")] = field(default_factory=PictureArgs)
    embedding: tuple[str, ...] = ()
    """Files or folders of learned words (textual inversion) as PATH, or PATH:WORD for another word than the file's."""
    multipliers: tuple[float, ...] = ()
    """One column for each, instead of the multiplier given with the LoRA."""
    out: str = "out/compare.png"
    """File of the contact sheet."""


def compare(args: Compare) -> None:
    from sd import pipeline
    from sd.adapters.switch import active_multipliers
    from sd.pictures.image_io import save_image
    models = load(args.on, args.embedding)
    loaded = active_multipliers(models)
    if not loaded:
        raise SDError("nothing to compare with the base: name at least one LoRA with --lora")
    if args.multipliers:
        variants = [{}, *({name: m} for name in loaded for m in args.multipliers)]
    else:
        variants = [{}, *({name: m} for name, m in loaded.items()), *([loaded] if len(loaded) > 1 else [])]
    seed = secrets.randbits(32) if args.how.seed is None else args.how.seed
    (path,) = picture_paths(args.out, 1)
    sheet = pipeline.compare(args.prompts, models, variants, seed=seed, **args.how.arguments())
    save_image(sheet, path, {"prompts": list(args.prompts), "variants": variants, "seed": seed, **args.how.arguments()})
    print(f"{path}  {len(args.prompts)} prompts x {len(variants)} variants, seed {seed}")
