"""Seconds and memory of a UNet step with guidance, without LoRA, with adapters, merged, with four LoRAs in one batch; and of
whole pictures.

    python -m bench.generate --full
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from bench import peers
from bench.common import GIB, Options, block, checkpoints, difference, lora_file, ratio, run
from bench.process import Worker, alternate, workers
from sd.lora import merge, remove_lora, set_adapters, use_adapters
from sd.model_loader import load_lora_into_models, preload_models_from_standard_weights
from sd.pipeline import generate
from sd.placement import Networks


@dataclass(frozen=True)
class StepOptions(Options):
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ()  # to compare in one run; (): fp32 and bf16
    sizes: tuple[int, ...] = ()  # pixels on each side; (): --size, else 256 and the model's native size
    pictures: int = 1  # repetitions of whole pictures; 0: none
    steps: int = 20  # of a whole picture

    def all_dtypes(self) -> Sequence[str]:
        return self.dtypes or ("fp32", "bf16")

    def all_sizes(self) -> Sequence[int]:
        return self.sizes or ((self.size,) if self.size else (self.config.image_size // 2, self.config.image_size))


NOTES = """A step is one call of the UNet under `torch.no_grad()` with 2 rows per image (guidance), 77 tokens of context
and random weights. LoRAs have rank 8 on q, k, v and out of every attention of the UNet, alpha 6, multiplier 1, fp32
files. Adapters: ours unmerged, theirs through `load_lora_weights` (PEFT). Merged: ours `merge`, theirs `fuse_lora`.
Four calls: four images of 2 rows, each with a different LoRA, which is switched on before its call. Four routed: the same
in one call of 8 rows; theirs has no such call, so its four calls stand in both rows. Each side and dtype is a process of
its own; they and the cases are taken in turn, each measured step after one that is not. "of base" and "of four calls"
compare ours with ours. Peak memory is measured in further processes (loading, LoRA and one step at the larger size, without
imports; mapped file pages count if they were touched). Difference: max |ours - theirs| / max |theirs| in the same dtype.
A picture is made from a prompt, with text encoder, DDIM and the decoder; the first one, of one step, is not measured. Its
difference is the mean of |ours - theirs|, of 255."""
CASES = {"base": (), "adapters": (0,), "merged": (0,), "four calls": (0, 1, 2, 3), "four routed": (0, 1, 2, 3)}
REFERENCE = {"adapters": "base", "merged": "base", "four routed": "four calls"}  # of ours
STEP_HEADER = ("dtype", "pixels", "case", "ours", "theirs", "ours / theirs", "/ theirs in fp32", "ours / ours", "difference")
MEMORY_HEADER = ("dtype", "case, memory", "ours, peak GiB", "theirs, peak GiB", "ours / theirs")
PICTURE_HEADER = ("dtype", "pixels, whole picture", "ours", "theirs", "ours / theirs", "/ theirs in fp32", "difference")
PROMPT = "a photo of an astronaut riding a horse"


class Side:
    """A model with the LoRAs of one case at a time. A subclass has `use`, and the makers of pictures."""

    def __init__(self, options: Options, loras: list[Path]):
        self.options, self.loras, self.now = options, loras, ("", 0)

    def use(self, case: str) -> Callable:
        """Load the case's LoRAs; returns (x, t, context) -> result."""
        raise NotImplementedError

    def step(self, case: str, size: int, warm: bool = True) -> Callable:
        """A step that can be measured: whatever is made once for a case and a size has been made, if `warm`."""
        if self.now[0] != case:
            self.call = self.use(case)
        call, given = torch.no_grad()(partial(self.call)), inputs(replace(self.options, size=size), case)
        if warm and self.now != (case, size):
            call(*given)
        self.now = case, size
        return partial(call, *given)

    def peak(self, case: str, size: int) -> None:
        self.step(case, size, warm=False)()


class Ours(Side):
    def __init__(self, options: Options, folder: Path, loras: list[Path]):
        super().__init__(options, loras)
        self.models = preload_models_from_standard_weights(folder, options.device, dtype=options.torch_dtype)
        self.stack = ExitStack()

    def use(self, case: str) -> Callable:
        models, names = self.models, [f"a{i}" for i in CASES[case]]
        self.stack.close()
        remove_lora(models)
        for name, file in zip(names, self.loras):
            load_lora_into_models(models, file, name)
        if case == "merged":
            merge(models)
        if case == "four routed":
            self.stack.enter_context(use_adapters(models, dict(zip(names, torch.eye(4))), rows=torch.arange(4).repeat(2)))
        unet = self.stack.enter_context(Networks(models, models.device).use("diffusion"))  # as generate() does
        if case == "four calls":
            return partial(four_calls, unet, lambda name: set_adapters(models, {name: 1.0}), names)
        return unet

    def picture(self, size: int, steps: int) -> Callable:
        return partial(generate, PROMPT, models=self.models, seed=1, sampler_name="ddim", n_inference_steps=steps,
                       cfg_scale=7.5, width=size, height=size)


class Theirs(Side):
    def __init__(self, options: Options, folder: Path, loras: list[Path]):
        super().__init__(options, loras)
        self.pipe = peers.from_pretrained(options, folder)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.fused = False

    def use(self, case: str) -> Callable:
        pipe, names = self.pipe, [f"a{i}" for i in CASES[case]]
        if self.fused:
            pipe.unfuse_lora(components=["unet"])
        pipe.unload_lora_weights()
        for name, file in zip(names, self.loras):
            peers.load_lora(pipe, file, name)
        self.fused = case == "merged"
        if self.fused:
            pipe.fuse_lora(components=["unet"])

        def unet(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return pipe.unet(x, t, context).sample
        return partial(four_calls, unet, pipe.set_adapters, names) if case == "four calls" else unet

    def picture(self, size: int, steps: int) -> Callable:
        def draw() -> np.ndarray:
            made = self.pipe(PROMPT, num_inference_steps=steps, guidance_scale=7.5, width=size, height=size, output_type="np",
                             generator=torch.Generator().manual_seed(1))
            return made.images[0] * 255
        return draw


def four_calls(unet: Callable, switch: Callable, names: list[str], x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for i, name in enumerate(names):
        switch(name)
        out[i::4] = unet(x[i::4], t[i::4], context[i::4])
    return out


def inputs(options: Options, case: str) -> tuple[Tensor, Tensor, Tensor]:
    g, to = torch.Generator().manual_seed(1), {"device": options.device, "dtype": options.torch_dtype}
    rows = 2 * max(len(CASES[case]), 1)
    x = torch.randn(rows, options.config.unet.in_channels, options.latent, options.latent, generator=g)
    context = torch.randn(rows, 77, options.config.unet.context_width, generator=g)
    return x.to(**to), torch.full((rows,), 500, device=options.device), context.to(**to)


def start(options: Options, side: type[Side], dtype: str, folder: Path, loras: list[Path]) -> Worker:
    return Worker(options, side, replace(options, dtype=dtype), folder, loras)


def steps(options: StepOptions, sides: dict[tuple[type, str], Worker]) -> list[list]:
    rows = []
    for size in options.all_sizes():
        runs = {(*side, case): partial(worker.timed, "step", case, size) for case in CASES for side, worker in sides.items()
                if (side[0], case) != (Theirs, "four routed")}
        times, out = alternate(runs, options.n, warm_up=False)
        for dtype, case in product(options.all_dtypes(), CASES):
            mine, theirs = (Ours, dtype, case), (Theirs, dtype, "four calls" if case == "four routed" else case)
            rows.append([dtype, size, case, *ratio(times[mine], times[theirs]),
                         against(times, mine, (Theirs, "fp32", theirs[2])),
                         f"{against(times, mine, (Ours, dtype, REFERENCE[case]))} of {REFERENCE[case]}" if case in REFERENCE
                         else "", f"{difference(out[mine], out[theirs]):.1e}"])
    return sorted(rows, key=lambda row: list(options.all_dtypes()).index(row[0]))


def against(times: dict, mine: tuple, other: tuple) -> str:
    return f"{statistics.median(times[mine]) / statistics.median(times[other]):.2f}" if other in times else "-"


def pictures(options: StepOptions, sides: dict[tuple[type, str], Worker]) -> list[list]:
    rows = []
    for worker in sides.values():
        worker.timed("step", "base", min(options.all_sizes()))  # no LoRA is left
    for size in options.all_sizes():
        for worker in sides.values():
            worker.timed("picture", size, 1)
        runs = {side: partial(worker.timed, "picture", size, options.steps) for side, worker in sides.items()}
        times, made = alternate(runs, options.pictures, warm_up=False)
        for dtype in options.all_dtypes():
            mine, theirs = (Ours, dtype), (Theirs, dtype)
            apart = np.abs(np.asarray(made[mine], float) - made[theirs]).mean()
            rows.append([dtype, size, *ratio(times[mine], times[theirs]), against(times, mine, (Theirs, "fp32")),
                         f"{apart:.2f}"])
    return rows


def memory(options: StepOptions, started: dict) -> list[list]:
    rows = []
    for dtype, case in product(options.all_dtypes(), CASES):
        peaks = []
        for side in (Ours, Theirs) if case != "four calls" else ():
            with started[side, dtype]() as worker:
                worker.ask("peak", case if (side, case) != (Theirs, "four routed") else "four calls", max(options.all_sizes()))
                peaks.append(worker.peak() / GIB)
        if peaks:
            rows.append([dtype, case, *(f"{peak:.2f}" for peak in peaks), f"{peaks[0] / peaks[1]:.2f}"])
    return rows


def main(options: Options) -> str:
    if not isinstance(options, StepOptions):
        options = StepOptions(**vars(options))
    _, folder = checkpoints(options)
    loras = [lora_file(options, seed) for seed in range(4)]
    started = {(side, dtype): partial(start, options, side, dtype, folder, loras)
               for dtype in options.all_dtypes() for side in (Ours, Theirs)}
    with workers(started) as sides:
        tables = [(STEP_HEADER, steps(options, sides))]
        if options.pictures:
            tables.append((PICTURE_HEADER, pictures(options, sides)))
    tables.append((MEMORY_HEADER, memory(options, started)))
    shown = replace(options, dtype=" and ".join(options.all_dtypes()))
    return block("A step of the UNet, and pictures", shown, [NOTES, f"Pictures have {options.steps} steps."], *tables)


if __name__ == "__main__":
    run(main, StepOptions)
