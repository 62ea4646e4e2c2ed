"""Seconds to load the model that ships and to draw with it, ours against diffusers, and against ours of a former checkout.

    python -m bench.emoji
    python -m bench.emoji --former ../sdlora-before
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from bench import peers
from bench.common import CACHE, Options, block, duration, run
from bench.process import ROOT, Worker, alternate, isolated, timed, workers
from sd.model_loader import preload_models_from_standard_weights, save_checkpoint
from sd.pipeline import generate


@dataclass(frozen=True)
class EmojiOptions(Options):
    former: Path | None = None  # a folder with an earlier state of this repository, to compare with


NOTES = """The model in `data/emoji.safetensors`, 64 pixels, DPM-Solver++ (2M), 20 steps, guidance 3, fp32, from prompt to
finished picture. Ours loads the file, diffusers the folder that `save_checkpoint` writes from it in fp16; the files are in the
page cache, imports are excluded, the tokenizer is included on both sides. Each side is a process of its own, and they are asked
in turn. The last row is a new process each time: `python -m sd generate` against a script with diffusers, 4 steps, imports
included, until the picture is in a file. Difference: mean of |ours - theirs|, of 255."""
PROMPTS = ["red apple, twemoji style", "grinning face, noto style", "blue book, fluent flat style", "snail, fluent 3d style",
           "rocket, emojione style", "two hearts, blob style", "pizza, noto style", "black cat, twemoji style"]
CASES = {"one picture": [PROMPTS[:1]], "eight in one batch": [PROMPTS], "eight one by one": [[p] for p in PROMPTS]}
HOW = {"n_inference_steps": 20, "cfg_scale": 3.0}
COLD_STEPS = 4
COLD = """
import sys, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
folder, prompt, steps, file = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
noise = torch.Generator().manual_seed(0)
pipe(prompt, num_inference_steps=int(steps), guidance_scale=3.0, generator=noise).images[0].save(file)
"""


def export(folder: Path) -> None:
    save_checkpoint(preload_models_from_standard_weights(None, "cpu", dtype="stored"), folder)


class Ours:
    def __init__(self, options: Options):
        self.options = options
        self.load()()

    def load(self) -> Callable:
        def now() -> None:
            self.models = preload_models_from_standard_weights(None, self.options.device, dtype=self.options.torch_dtype)
            self.models.tokenizer  # noqa: B018 (loads it)
        return now

    def draw(self, parts: list[list[str]]) -> Callable:
        return lambda: np.concatenate([generate(part, models=self.models, seed=PROMPTS.index(part[0]), sampler_name="dpmpp_2m",
                                                **HOW) for part in parts])


class Theirs:
    def __init__(self, options: Options, folder: Path):
        self.options, self.folder = options, folder
        self.load()()

    def load(self) -> Callable:
        def now() -> None:
            self.pipe = peers.from_pretrained(self.options, self.folder)
            self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
            self.pipe.set_progress_bar_config(disable=True)
        return now

    def draw(self, parts: list[list[str]]) -> Callable:
        return lambda: np.concatenate([
            self.pipe(part, num_inference_steps=HOW["n_inference_steps"], guidance_scale=HOW["cfg_scale"], output_type="np",
                      generator=[torch.Generator().manual_seed(PROMPTS.index(p)) for p in part]).images * 255
            for part in parts])


def cold(options: Options, command: list, checkout: Path) -> tuple[float, None]:
    """Seconds of a new process that makes the first picture."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": str(options.threads)}
        arguments = [sys.executable, *command, Path(folder, "picture.png")]
        taken, _ = timed(partial(subprocess.run, arguments, check=True, capture_output=True, env=environment,
                                 cwd=checkout), "cpu")  # -m looks in the current folder first
        assert Path(folder, "picture.png").exists()
    return taken, None


def cells(times: Mapping[str, list[float]]) -> list[str]:
    """Ours, diffusers, their ratio; with a former checkout also its time and the ratio to it."""
    ours, *others = (statistics.median(taken) for taken in times.values())
    return [duration(ours), *(cell for other in others for cell in (duration(other), f"{ours / other:.2f}"))]


def main(options: Options) -> str:
    folder, former = CACHE.resolve() / "emoji", getattr(options, "former", None)
    isolated(options, export, folder)
    started = {"ours": partial(Worker, options, Ours, options), "theirs": partial(Worker, options, Theirs, options, folder)}
    if former:
        started["former"] = partial(Worker, options, Ours, Options(device=options.device, dtype=options.dtype), checkout=former)
    with workers(started) as sides:
        loading = alternate({side: partial(worker.timed, "load") for side, worker in sides.items()}, options.n)[0]
        rows = [["loading", *cells(loading)]]
        for case, parts in CASES.items():
            times, made = alternate({side: partial(worker.timed, "draw", parts) for side, worker in sides.items()}, options.n)
            rows.append([case, *cells(times)])
    ours = ["-m", "sd", "generate", PROMPTS[0], "--cfg", 3, "--steps", COLD_STEPS, "--device", options.device, "--out"]
    runs = {"ours": partial(cold, options, list(map(str, ours)), ROOT),
            "theirs": partial(cold, options, ["-c", COLD, folder, PROMPTS[0], str(COLD_STEPS)], ROOT)}
    if former:
        runs["former"] = partial(cold, options, list(map(str, ours)), former)
    rows.append([f"first picture of a process, {COLD_STEPS} steps", *cells(alternate(runs, options.n)[0])])
    apart = np.abs(np.asarray(made["ours"], float).reshape(made["theirs"].shape) - made["theirs"]).mean()
    header = ["case", "ours", "diffusers", "ours / diffusers", *(["ours before", "ours / before"] if former else [])]
    return block("The model that ships", options, [NOTES, f"Difference: {apart:.2f}."], (header, rows), model="emoji")


if __name__ == "__main__":
    from bench import emoji  # a new process finds its classes there, and none in __main__
    run(emoji.main, emoji.EmojiOptions)
