"""Pictures of the same prompts and seeds in the course of a training, in a sheet with a row for the base and for each time.

They are a pure function of the run. The pictures are in samples/, each with its settings; the sheet, samples.png, is made
from them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sd.errors import NotFiniteError
from sd.packed import unpack
from sd.pictures.image_io import load_image, save_image
from sd.pictures.sheets import contact_sheet
from sd.pipeline import draw
from sd.placement import placed
from sd.request import Request
from sd.training.dist import from_rank0, is_main
from sd.training.optim import autocast
from sd.training.relora import adapters_in_training

log = logging.getLogger("sd")

SAMPLER, LARGEST, MOST_ROWS = "dpmpp_2m", 256, 40  # LARGEST: side of a picture in the sheet; MOST_ROWS: more are thinned out
# The fields of its request that a sample's file records. Their hash is in the file's name, so this must not change.
IN_SAMPLES = ("prompt", "seed", "n_inference_steps", "cfg_scale", "sampler_name", "width", "height")


class Samples:
    """The samples of a run that starts or resumes at `step`; those of later steps, from before a kill, are removed.

    All ranks draw them, since a sharded network needs every rank; rank 0 writes them.
    """

    def __init__(self, config, models, folder: Path, step: int):
        self.config, self.models, self.folder, self.sheet = config, models, folder / "samples", folder / "samples.png"
        size = config.size or models.config.image_size
        common = Request("", n_inference_steps=config.sample_steps, cfg_scale=config.sample_cfg, sampler_name=SAMPLER,
                         width=size, height=size, merged=False)
        self.requests = [replace(common, prompt=prompt, seed=config.sample_seed + column)
                         for column, prompt in enumerate(config.sample_prompts)]
        if not is_main():
            return
        self.folder.mkdir(exist_ok=True)
        for file in self.folder.glob("*.png"):
            taken = _step_of(file)
            if step == 0 or taken is not None and taken > step:
                file.unlink()

    def take(self, step: int) -> Path:
        """Draw the pictures of this step and redraw the sheet; returns the sheet's path.

        Missing pictures of the base are drawn too: with the LoRA off or, for whole networks, only before the first step.
        """
        lora = self.config.train == "lora"
        trained = {"lora": dict.fromkeys(adapters_in_training(self.config), 1.0)} if lora else {}
        for column in range(len(self.config.sample_prompts)):
            if (lora or step == 0) and not from_rank0(self._file("base", column).exists()):
                self._make("base", column, {"use_lora": False}, 0)
            if step > 0:
                self._make(f"{step:08d}", column, trained, step)
        if is_main():
            self._draw_sheet()
        return self.sheet

    def _make(self, row: str, column: int, which: dict, step: int) -> None:
        """One at a time: a picture must not depend on the other prompts, and decoding many takes more memory than training."""
        request = replace(self.requests[column], **which)
        # Half precision would overflow in the autoencoder of many models.
        precision = "bf16" if self.config.precision == "bf16" else "fp32"
        try:
            with placed(self.models, self.models, self.models.device), autocast(precision, self.models.device):
                (picture,) = draw(request, self.models)
        except NotFiniteError as error:
            log.warning("step %d: no sample of %r: %s", step, request.prompt, error)
            return
        finally:
            unpack(self.models)  # a step trains on plain weights; packed ones would only take memory
        if is_main():
            save_image(picture, self._file(row, column), self._saved(column) | {"training_step": step})

    def _saved(self, column: int) -> dict:
        return {name: getattr(self.requests[column], name) for name in IN_SAMPLES}

    def _file(self, row: str, column: int) -> Path:
        """Named by prompt, seed and settings, so that after a change of these the sheet has gaps instead of old pictures."""
        settings = hashlib.sha256(json.dumps(self._saved(column), sort_keys=True).encode()).hexdigest()[:8]
        return self.folder / f"{row}-{settings}.png"

    def _draw_sheet(self) -> None:
        columns = range(len(self.config.sample_prompts))
        found = {file.name.split("-")[0] for file in self.folder.glob("*-*.png")}
        names = [name for name in sorted(found, key=lambda name: (name != "base", name))
                 if any(self._file(name, c).exists() for c in columns)]
        if len(names) > MOST_ROWS:
            names = [names[i] for i in np.linspace(0, len(names) - 1, MOST_ROWS).round().astype(int)]
        rows = [[_small(file) if (file := self._file(name, c)).exists() else None for c in columns] for name in names]
        labels = ["base" if name == "base" else f"step {int(name)}" for name in names]
        if rows:
            save_image(contact_sheet(rows, labels, self.config.sample_prompts), self.sheet)


def _step_of(file: Path) -> int | None:
    """The step that a sample was taken at; None for the base and for foreign files."""
    row = file.name.split("-")[0]
    return int(row) if row.isdecimal() else None


def _small(file: Path) -> Image.Image:
    image = load_image(file)
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image
