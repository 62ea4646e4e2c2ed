"""Seconds to load the model that ships and to draw with it, ours against diffusers.

    python -m bench.emoji
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from bench import peers
from bench.common import CACHE, Options, alternate, block, isolated, ratio, run
from sd.model_loader import preload_models_from_standard_weights, save_checkpoint
from sd.pipeline import generate

NOTES = """The model in `data/emoji.safetensors`, 64 pixels, DPM-Solver++ (2M), 20 steps, guidance 3, fp32, from prompt to
finished picture. Ours loads the file, diffusers the folder that `save_checkpoint` writes from it in fp16; the files are in the
page cache, imports are excluded, the tokenizer is included on both sides. Difference: mean of |ours - theirs|, of 255."""
HEADER = ("case", "ours", "diffusers", "ours / diffusers")
PROMPTS = ["red apple, twemoji style", "grinning face, noto style", "blue book, fluent flat style", "snail, fluent 3d style",
           "rocket, emojione style", "two hearts, blob style", "pizza, noto style", "black cat, twemoji style"]
HOW = {"n_inference_steps": 20, "cfg_scale": 3.0}


def export(folder: Path) -> None:
    save_checkpoint(preload_models_from_standard_weights(None, "cpu", dtype="stored"), folder)


def load_ours(options: Options):
    models = preload_models_from_standard_weights(None, options.device, dtype=options.torch_dtype)
    models.tokenizer  # noqa: B018 (loads it)
    return models


def load_theirs(options: Options, folder: Path):
    pipe = peers.from_pretrained(options, folder)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def time_loading(options: Options, folder: Path) -> list[str]:
    times, _ = alternate({"ours": partial(load_ours, options), "theirs": partial(load_theirs, options, folder)}, options)
    return ratio(times["ours"], times["theirs"])


def time_drawing(options: Options, folder: Path) -> tuple[dict[str, list[str]], float]:
    """(case -> cells of the times, difference of the pictures)."""
    models, pipe = load_ours(options), load_theirs(options, folder)

    def ours(*parts: list[str]) -> np.ndarray:
        made = [generate(part, models=models, seed=PROMPTS.index(part[0]), sampler_name="dpmpp_2m", **HOW) for part in parts]
        return np.concatenate(made)

    def theirs(*parts: list[str]) -> np.ndarray:
        made = [pipe(part, num_inference_steps=HOW["n_inference_steps"], guidance_scale=HOW["cfg_scale"], output_type="np",
                     generator=[torch.Generator().manual_seed(PROMPTS.index(p)) for p in part]).images for part in parts]
        return np.concatenate(made) * 255

    cases = {"one picture": [PROMPTS[:1]], "eight in one batch": [PROMPTS], "eight one by one": [[p] for p in PROMPTS]}
    cells = {}
    for case, parts in cases.items():
        times, made = alternate({"ours": partial(ours, *parts), "theirs": partial(theirs, *parts)}, options)
        cells[case] = ratio(times["ours"], times["theirs"])
    return cells, np.abs(made["ours"].astype(float).reshape(made["theirs"].shape) - made["theirs"]).mean()


def main(options: Options) -> str:
    folder = CACHE / "emoji"
    isolated(options, export, folder)
    loading = isolated(options, time_loading, options, folder).result
    cells, apart = isolated(options, time_drawing, options, folder).result
    rows = [["loading", *loading], *([case, *row] for case, row in cells.items())]
    return block("The model that ships", options, [NOTES, f"Difference: {apart:.2f}."], (HEADER, rows), model="emoji")


if __name__ == "__main__":
    run(main)
