"""Seconds and memory of a UNet step with guidance: without LoRA, with adapters, merged, four LoRAs in one batch.

    python -m bench.generate --full
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import peers
from bench.common import (
    GIB,
    Options,
    alternate,
    block,
    checkpoints,
    difference,
    isolated,
    lora_file,
    peak,
    ratio,
    reset_peak,
    run,
)
from sd.lora import merge, remove_lora, set_adapters, use_adapters
from sd.model_loader import load_lora_into_models, preload_models_from_standard_weights

NOTES = """A step is one call of the UNet under `torch.no_grad()` with 2 rows per image (guidance), 77 tokens of context
and random weights. LoRAs have rank 8 on q, k, v and out of every attention of the UNet, alpha 6, multiplier 1, fp32
files. Adapters: ours unmerged, theirs through `load_lora_weights` (PEFT). Merged: ours `merge`, theirs `fuse_lora`
followed by `unload_lora_weights`. Routed: a batch of four images, each with a different LoRA; ours in one call of
8 rows, theirs in four calls of 2 rows with `set_adapters` before each. Both sides run in one process, in alternating
order. Peak memory is measured in a separate process (loading, LoRA and 2 steps, without imports; mapped file pages
count if they were touched). Difference: max |ours - theirs| / max |theirs| of the step's result."""
CASES = {"base": 0, "adapters": 1, "merged": 1, "four routed": 4}  # case -> number of LoRAs loaded
HEADER = ("case", "latents", "ours", "theirs", "ours / theirs", "ours, peak GiB", "theirs, peak GiB", "difference")


class Ours:
    def __init__(self, options: Options, folder: Path):
        self.models = preload_models_from_standard_weights(folder, options.device, dtype=options.torch_dtype)
        self.stack = ExitStack()

    def step(self, case: str, loras: list[Path]) -> Callable:
        """Prepare the models for a case; returns (x, t, context) -> result."""
        self.stack.close()
        remove_lora(self.models)
        names = [f"a{i}" for i in range(CASES[case])]
        for name, file in zip(names, loras):
            load_lora_into_models(self.models, file, name)
        if case == "merged":
            set_adapters(self.models, {"a0": 1.0})
            merge(self.models)
        if case == "four routed":
            table = dict(zip(names, torch.eye(4)))
            self.stack.enter_context(use_adapters(self.models, table, rows=torch.arange(4).repeat(2)))
        return self.models["diffusion"]


class Theirs:
    def __init__(self, options: Options, folder: Path):
        self.pipe = peers.from_pretrained(options, folder)

    def step(self, case: str, loras: list[Path]) -> Callable:
        pipe, unet = self.pipe, self.pipe.unet
        pipe.unload_lora_weights()
        names = [f"a{i}" for i in range(CASES[case])]
        for name, file in zip(names, loras):
            peers.load_lora(pipe, file, name)
        if case == "merged":  # the last case, because it changes the weights permanently
            pipe.fuse_lora(components=["unet"])
            pipe.unload_lora_weights()
        if case == "four routed":
            def routed(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
                out = torch.empty_like(x)
                for i, name in enumerate(names):
                    pipe.set_adapters(name)
                    out[i::4] = unet(x[i::4], t[i::4], context[i::4]).sample
                return out
            return routed
        return lambda x, t, context: unet(x, t, context).sample


def inputs(options: Options, case: str) -> tuple[Tensor, Tensor, Tensor]:
    g, to = torch.Generator().manual_seed(1), {"device": options.device, "dtype": options.torch_dtype}
    x = torch.randn(latent_shape(options, case), generator=g)
    context = torch.randn(len(x), 77, options.config.unet.context_width, generator=g)
    return x.to(**to), torch.full((len(x),), 500, device=options.device), context.to(**to)


def latent_shape(options: Options, case: str) -> list[int]:
    return [2 * max(CASES[case], 1), options.config.unet.in_channels, options.latent, options.latent]


@torch.no_grad()
def time_all(options: Options, folder: Path, loras: list[Path]) -> dict[str, tuple[list[str], float]]:
    """case -> (cells of the times, difference)."""
    ours, theirs, found = Ours(options, folder), Theirs(options, folder), {}
    for case in sorted(CASES, key="merged".__eq__):
        given = inputs(options, case)
        steps = {"ours": partial(ours.step(case, loras), *given), "theirs": partial(theirs.step(case, loras), *given)}
        times, out = alternate(steps, options)
        found[case] = ratio(times["ours"], times["theirs"]), difference(out["ours"], out["theirs"])
    return found


@torch.no_grad()
def peak_of(options: Options, side: type, folder: Path, loras: list[Path], case: str) -> int:
    reset_peak()
    step = side(options, folder).step(case, loras)
    for _ in range(2):
        step(*inputs(options, case))
    return peak(options.device)


def main(options: Options) -> str:
    _, folder = checkpoints(options)
    loras = [lora_file(options, seed) for seed in range(4)]
    times = isolated(options, time_all, options, folder, loras).result
    rows = []
    for case in CASES:
        cells, apart = times[case]
        memory = [isolated(options, peak_of, options, side, folder, loras, case).result for side in (Ours, Theirs)]
        rows.append([case, latent_shape(options, case), *cells, *(f"{m / GIB:.2f}" for m in memory), f"{apart:.1e}"])
    return block("A step of the UNet", options, [NOTES], (HEADER, rows))


if __name__ == "__main__":
    run(main)
