"""sdlora generate."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from sd.commands.args import ModelArgs, PictureFlags, load, picture_paths, say_how, settings
from sd.errors import SDError
from sd.request import Request, again, made_in, parameters_of


@dataclass(frozen=True)
class Generate:
    """Make pictures from prompts; each file records its prompt and settings."""

    prompts: Positional[tuple[str, ...]] = ()
    """Prompts, each in quotes."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    how: Annotated[PictureFlags, tyro.conf.arg(name="")] = field(default_factory=PictureFlags)
    embedding: tuple[str, ...] = ()
    """Learned words (textual inversion), files or folders as PATH; PATH:WORD renames the word."""
    count: int = 1
    """Pictures per prompt."""
    input: str | None = None
    """Picture to start from (img2img)."""
    mask: str | None = None
    """Picture that is white where --input is to be repainted (inpainting)."""
    strength: float = Request.strength
    """How much --input may change, from 0 (not at all) to 1 (completely)."""
    no_lora: bool = False
    """Switch all LoRAs off, those inside the checkpoint included."""
    again: str | None = None
    """Make this picture again, with the prompt, seed, settings and multipliers recorded in the file."""
    out: str = "out"
    """Folder, or a file ending in .png, .jpg or .webp."""

    def __post_init__(self):
        if self.again is None and not self.prompts:
            raise SDError("no prompt is given; prompts come before the flags: python -m sd generate \"a cat\" --seed 1")
        if self.again is not None and (self.prompts or self.how != PictureFlags() or self.count != 1):
            raise SDError("--again takes prompt, seed and settings from the picture; leave them out")
        if self.input is None and (self.mask is not None or self.strength != Request.strength):
            raise SDError(f"--{'strength' if self.mask is None else 'mask'} needs --input, the picture to start from")

    def run(self) -> None:
        from sd.pictures.image_io import read_parameters, save_image
        about = {} if self.again is None else read_parameters(self.again)
        paths = picture_paths(self.out, self.count * max(1, len(self.prompts)))
        given: dict[str, Any] = {"use_lora": not self.no_lora}
        if self.input is not None:
            given |= {"input_image": self.input, "mask": self.mask, "strength": self.strength}
        seed = secrets.randbits(32) if self.how.seed is None else self.how.seed
        if self.again is None:
            request = Request(self.prompts, seed=seed, images_per_prompt=self.count, **settings(self.how), **given)
            models = load(self.on, self.embedding)
        else:
            models = load(replace(self.on, dtype=self.on.dtype or made_in(about, self.again)), self.embedding)
            request = again(about, self.again, models, **given)
        from sd.pipeline import draw
        with ThreadPoolExecutor(1) as beside:  # hashing gigabytes takes seconds: do it while the sampler runs
            beside.submit(lambda: models.model_hash)
            pictures = draw(request, models)
        say_how(models, self.on)
        for one, picture, path in zip(request.singles(), pictures, paths):
            save_image(picture, path, parameters_of(one, models))
            print(f"{path}  seed {one.seed}  {one.prompt}")
