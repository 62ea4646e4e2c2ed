"""Time and memory of the tools for LoRA files: load, merge, extract, convert, resize.

    python -m bench.lora_files --full
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench import peers
from bench.common import CACHE, DTYPES, Options, block, checkpoints, difference, duration, make_lora, ratio, run
from bench.process import Worker, alternate, isolated, peak, reset_peak, set_page_cache, workers
from sd.lora import lora_layers, remove_lora
from sd.model_loader import load_lora_into_models, merge_lora_into_checkpoint, preload_models_from_standard_weights
from sd.tools.convert import convert
from sd.tools.extract import extract_lora
from sd.tools.merge import merge_lora_files
from sd.tools.resize import resize_file

RANK = 32
NOTES = f"""LoRAs of rank {RANK} in fp16 on the layers of kohya's preset (in SD 1.5, 192 modules of the UNet and 72 of the text
encoder), alpha {RANK // 2}. Loading: a file in the page cache into models without LoRA, until it can be used; theirs is
`load_lora_weights`; "+ step" adds one pass of text encoder and UNet (latents [2, 4, 8, 8]) on each side. Each side is a
process of its own, and the two are asked in turn. Each other row runs
in a separate process, imports excluded; peak is the growth of the process, mapped file pages included, relative to the base
file if one is read. The base is fp16; the tuned checkpoint is the base with one of the LoRAs merged into it."""


class Side:
    """A model into which a file is loaded, used for one pass, and removed from."""

    def __init__(self, options: Options):
        g, to = torch.Generator().manual_seed(1), {"device": options.device, "dtype": options.torch_dtype}
        self.tokens = torch.randint(0, 49406, (2, 77), generator=g).to(options.device)
        self.x = torch.randn(2, options.config.unet.in_channels, 8, 8, generator=g).to(**to)
        self.t = torch.tensor([500, 500], device=options.device)

    def step(self) -> Callable:
        return torch.no_grad()(self.forward)


class Ours(Side):
    def __init__(self, options: Options, folder: Path):
        super().__init__(options)
        self.models = preload_models_from_standard_weights(folder, options.device, dtype=options.torch_dtype)

    def load(self, file: Path) -> Callable:
        def now() -> None:  # the models stay here
            load_lora_into_models(self.models, file, "new")
        return now

    def forward(self) -> torch.Tensor:
        return self.models["diffusion"](self.x, self.t, self.models["clip"](self.tokens))

    def remove(self) -> int:
        """The number of modules that the LoRA changed."""
        modules = len(lora_layers(self.models))
        remove_lora(self.models)
        return modules


class Theirs(Side):
    def __init__(self, options: Options, folder: Path):
        super().__init__(options)
        self.pipe = peers.from_pretrained(options, folder)

    def load(self, file: Path) -> Callable:
        return partial(peers.load_lora, self.pipe, file, "new")

    def forward(self) -> torch.Tensor:
        return self.pipe.unet(self.x, self.t, self.pipe.text_encoder(self.tokens).last_hidden_state).sample

    def remove(self) -> None:
        self.pipe.unload_lora_weights()


def time_loading(options: Options, folder: Path, files: list[Path]) -> list[list]:
    """Rows of the loading table: a new file each time, alone and with the first step."""
    loads: dict[str, list[float]] = {"ours": [], "theirs": []}
    both: dict[str, list[float]] = {"ours": [], "theirs": []}
    with workers({"ours": partial(Worker, options, Ours, options, folder),
                  "theirs": partial(Worker, options, Theirs, options, folder)}) as sides:
        for i in range(options.n + 1):
            out = {}
            for side in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
                taken, _ = sides[side].timed("load", files[i % len(files)])
                then, out[side] = sides[side].timed("step")
                loads[side].append(taken)
                both[side].append(taken + then)
            modules, _ = sides["ours"].ask("remove"), sides["theirs"].ask("remove")
        alone = alternate({side: partial(worker.timed, "step") for side, worker in sides.items()}, options.n)[0]
    apart = f"{difference(out['ours'], out['theirs']):.1e}"
    return [[f"load {modules} modules", *ratio(loads["ours"][1:], loads["theirs"][1:]), ""],
            [f"load {modules} modules + step", *ratio(both["ours"][1:], both["theirs"][1:]), apart],
            ["a step without LoRA", *ratio(alone["ours"], alone["theirs"]), ""]]


def into_base(base: Path, loras: dict[Path, float], out: Path) -> None:
    merge_lora_into_checkpoint(base, loras, out)  # returns models, which need not leave the process


def fuse_with_the_peer(options: Options, folder: Path, file: Path, out: Path) -> None:
    """Merge a LoRA into a base and write it, as users of diffusers do."""
    pipe = peers.from_pretrained(replace(options, dtype="fp16", device="cpu"), folder)
    peers.load_lora(pipe, file, "a")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(out)


def measure(options: Options, function: Callable, warm: list[Path]) -> tuple[float, int, str]:
    """Median seconds, peak bytes and the result of the last call, each call in its own process."""
    for path in warm:
        set_page_cache(path, warm=True)
    found = [isolated(options, _once, function).result for _ in range(options.n)]
    return statistics.median(s for s, *_ in found), max(p for _, p, _ in found), found[-1][2]


def _once(function: Callable) -> tuple[float, int, str]:
    reset_peak()
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, peak("cpu"), "" if result is None else str(result)


def tools(options: Options) -> list[list]:
    """Rows: tool, median, peak, report of the tool."""
    file, folder = checkpoints(options, "fp16")
    base, size = file, file.stat().st_size
    loras = [lora_file(options, seed) for seed in range(3)]
    three = dict(zip(loras, (1.0, 0.7, -0.4)))
    tuned, out, out_folder = CACHE / "tuned.safetensors", CACHE / "made.safetensors", CACHE / "made"
    isolated(options, into_base, base, {loras[0]: 1.0}, tuned)
    whole = [base, folder, tuned, *loras]
    rows = []

    def row(what: str, function: Callable, reads_base: bool) -> None:
        seconds, bytes_, said = measure(options, function, whole)
        share = f"{bytes_ / size:.2f} x base" if reads_base else f"{bytes_ / 2**20:.0f} MiB"
        rows.append([what, duration(seconds), share, said.partition("\n")[0]])
        shutil.rmtree(out_folder, ignore_errors=True)

    row("one LoRA into the base, written as a folder", lambda: into_base(base, {loras[0]: 1.0}, out_folder), True)
    row("theirs: from_pretrained, load, fuse, save_pretrained",
        lambda: fuse_with_the_peer(options, folder, loras[0], out_folder), True)
    row("three LoRAs into the base, written as one file", lambda: into_base(base, three, out), True)
    row("three LoRAs into one, concat (exact)", lambda: merge_lora_files(three, out), False)
    row(f"three LoRAs into one, svd, rank {RANK}", lambda: merge_lora_files(three, out, method="svd", rank=RANK), False)
    row(f"extract, rank {RANK}, exact SVD",
        lambda: extract_lora(base, tuned, out, rank=RANK, progress=False), True)
    row(f"extract, rank {RANK}, randomized SVD",
        lambda: extract_lora(base, tuned, out, rank=RANK, randomized=True, progress=False), True)
    row("convert kohya to diffusers", lambda: convert(loras[0], out, format="diffusers"), False)
    row("resize to rank 8", lambda: resize_file(loras[0], out, rank=8), False)
    for path in (tuned, out):
        path.unlink(missing_ok=True)
    return rows


def lora_file(options: Options, seed: int) -> Path:
    path = CACHE / f"{options.config.name}-lora-kohya-{RANK}-{seed}.safetensors"
    if not path.exists():
        rank = RANK if options.full else 4
        isolated(options, make_lora, options.config, seed, path, "kohya", rank, rank / 2, DTYPES["fp16"])
    return path


def main(options: Options) -> str:
    _, folder = checkpoints(options)
    files = [lora_file(options, seed) for seed in range(options.n + 1)]
    return block("Tools for LoRA files", options, [NOTES],
                 (["loading a LoRA", "ours", "theirs", "ours / theirs", "difference of the step"],
                  time_loading(options, folder, files)),
                 (["tool", "median", "peak", "report"], tools(options)))


if __name__ == "__main__":
    run(main)
