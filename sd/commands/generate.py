"""sdlora generate."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sd.commands.args import ModelArgs, PictureFlags, Positional, load, picture_paths, settings
from sd.errors import SDError
from sd.request import Request, again, parameters_of


@dataclass(frozen=True)
class Generate:
    """Make pictures from prompts; each file says what made it."""

    prompts: Positional[tuple[str, ...]] = ()
    """What the pictures show."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    how: Annotated[PictureFlags, tyro.conf.arg(name="")] = field(default_factory=PictureFlags)
    embedding: tuple[str, ...] = ()
    """Files or folders of learned words (textual inversion) as PATH, or PATH:WORD for another word than the file's."""
    count: int = 1
    """Pictures for each prompt."""
    input: str | None = None
    """Picture to start from (img2img)."""
    mask: str | None = None
    """Where to repaint it (white)."""
    strength: float = Request.strength
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
        if self.again is not None and (self.prompts or self.how != PictureFlags() or self.count != 1):
            raise SDError("--again takes prompt, seed and settings from the picture; leave them out")
        if self.input is None and (self.mask is not None or self.strength != Request.strength):
            raise SDError(f"--{'strength' if self.mask is None else 'mask'} needs --input: the picture to start from")

    def run(self) -> None:
        from sd.pictures.image_io import read_parameters, save_image
        from sd.pipeline import draw
        about = {} if self.again is None else read_parameters(self.again)
        paths = picture_paths(self.out, self.count * max(1, len(self.prompts)))
        given = {"use_lora": not self.no_lora}
        if self.input is not None:
            given |= {"input_image": self.input, "mask": self.mask, "strength": self.strength}
        seed = secrets.randbits(32) if self.how.seed is None else self.how.seed
        if self.again is None:
            request = Request(self.prompts, seed=seed, images_per_prompt=self.count, **settings(self.how), **given)
            models = load(self.on, self.embedding)
        else:
            models = load(self.on, self.embedding)
            request = again(about, self.again, models, **given)
        with ThreadPoolExecutor(1) as beside:  # hashing gigabytes takes seconds, which the sampler takes too
            beside.submit(lambda: models.model_hash)
            pictures = draw(request, models)
        for one, picture, path in zip(request.singles(), pictures, paths):
            save_image(picture, path, parameters_of(one, models))
            print(f"{path}  seed {one.seed}  {one.prompt}")
