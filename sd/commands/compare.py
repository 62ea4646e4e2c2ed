"""sdlora compare."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sd.commands.args import ModelArgs, PictureFlags, Positional, load, picture_paths, settings
from sd.errors import SDError


@dataclass(frozen=True)
class Compare:
    """One contact sheet: a row for each prompt, a column for the base and for each LoRA at each multiplier."""

    prompts: Positional[tuple[str, ...]]
    """What the pictures show."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    how: Annotated[PictureFlags, tyro.conf.arg(name="")] = field(default_factory=PictureFlags)
    embedding: tuple[str, ...] = ()
    """Files or folders of learned words (textual inversion) as PATH, or PATH:WORD for another word than the file's."""
    multipliers: tuple[float, ...] = ()
    """One column for each, instead of the multiplier given with the LoRA."""
    out: str = "out/compare.png"
    """File of the contact sheet."""

    def run(self) -> None:
        from sd import pipeline
        from sd.adapters.switch import active_multipliers
        from sd.pictures.image_io import save_image
        models = load(self.on, self.embedding)
        loaded = active_multipliers(models)
        if not loaded:
            raise SDError("nothing to compare with the base: name at least one LoRA with --lora")
        if self.multipliers:
            variants = [{}, *({name: m} for name in loaded for m in self.multipliers)]
        else:
            variants = [{}, *({name: m} for name, m in loaded.items()), *([loaded] if len(loaded) > 1 else [])]
        seed, how = secrets.randbits(32) if self.how.seed is None else self.how.seed, settings(self.how)
        (path,) = picture_paths(self.out, 1)
        sheet = pipeline.compare(self.prompts, models, variants, seed=seed, **how)
        save_image(sheet, path, {"prompts": list(self.prompts), "variants": variants, "seed": seed, **how})
        print(f"{path}  {len(self.prompts)} prompts x {len(variants)} variants, seed {seed}")
