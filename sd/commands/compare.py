"""sdlora compare."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from sd.commands.args import ModelArgs, PictureFlags, load, picture_paths, say_how, settings
from sd.errors import SDError
from sd.request import Request


@dataclass(frozen=True)
class Compare:
    """Draw a contact sheet: one row per prompt, one column for the base and for each LoRA at each multiplier."""

    prompts: Positional[tuple[str, ...]]
    """Prompts, each in quotes."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    how: Annotated[PictureFlags, tyro.conf.arg(name="")] = field(default_factory=PictureFlags)
    embedding: tuple[str, ...] = ()
    """Learned words (textual inversion), files or folders as PATH; PATH:WORD renames the word."""
    multipliers: tuple[float, ...] = ()
    """Draw a column at each of these multipliers instead of the one given with --lora."""
    out: str = "out/compare.png"
    """File to write the contact sheet to."""

    def run(self) -> None:
        seed, how = secrets.randbits(32) if self.how.seed is None else self.how.seed, settings(self.how)
        Request(self.prompts, seed=seed, **how)  # what is wrong is said before anything is loaded
        (path,) = picture_paths(self.out, 1)
        models = load(self.on, self.embedding)
        from sd import pipeline
        from sd.adapters.switch import active_multipliers
        from sd.pictures.image_io import save_image
        loaded: dict[str, Any] = active_multipliers(models)
        if not loaded:
            raise SDError("nothing to compare with the base: name at least one LoRA with --lora")
        variants: list[dict[str, float]]
        if self.multipliers:
            variants = [{}, *({name: m} for name in loaded for m in self.multipliers)]
        else:
            variants = [{}, *({name: m} for name, m in loaded.items()), *([loaded] if len(loaded) > 1 else [])]
        sheet = pipeline.compare(self.prompts, models, variants, seed=seed, **how)
        say_how(models, self.on)
        save_image(sheet, path, {"prompts": list(self.prompts), "variants": variants, "seed": seed, **how,
                                 "dtype": models.dtype_name})
        print(f"{path}  {len(self.prompts)} prompts x {len(variants)} variants, seed {seed}")
