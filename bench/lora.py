"""Time and memory of loading a model, and of loading, switching, merging and unmerging LoRAs.

    python -m bench.lora --full
    python -m bench.lora --full --any-module   (tasks on a foreign model, see bench/any_module.py)
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch

from bench import any_module, peers
from bench.common import Options, block, checkpoints, difference, duration, lora_file, ratio, run
from bench.process import (
    Worker,
    alternate,
    isolated,
    peak,
    read_from_disk,
    reset_peak,
    set_page_cache,
    timed,
    workers,
)
from sd.lora import lora_layers, merge, remove_lora, set_adapters, unmerge
from sd.model_loader import load_lora_into_models, preload_models_from_standard_weights
from sd.prompts.tokenizer import tokenize

LOADING_NOTES = """Loading: from the call to the end of the first pass through tokenizer, text encoder, UNet (latents
[1, 4, 8, 8]), VAE encoder and decoder (64 pixels), so that every weight is used. Each time in a new process, imports
excluded: the same calls load the tiny model first. Cold: the files are dropped from the page cache (`posix_fadvise`);
"from disk" is what the process then reads. Peak is the growth of the process, relative to the size of the weight files.
Ours is lazy: mapped weights are read on first use."""
LORA_NOTES = """LoRAs of rank 8 on q, k, v and out of every attention of the UNet. "+ step" includes one UNet call with
latents [2, 4, 8, 8], since each side leaves some work to the next step; the step alone is listed for comparison. Each side is
a process of its own; the two are asked in turn. A new
file is in the page cache and is loaded into models without LoRA. Merging: ours `merge` / `unmerge`, theirs `fuse_lora` /
`unfuse_lora`. Exactness: max |W - W0| over all adapted weights at the end."""
SIDES = {"ours, file": "file", "theirs, from_single_file": "file",
         "ours, folder": "folder", "theirs, from_pretrained": "folder"}


# ---- loading ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def load(options: Options, side: str, file: Path, folder: Path) -> torch.Tensor:
    """Load a model and run each network once; returns the decoded picture."""
    to, c = {"device": options.device, "dtype": options.torch_dtype}, options.config
    vae = {**to, "dtype": torch.float32} if options.dtype == "fp16" and side.startswith("ours") else to
    x = torch.linspace(-1, 1, c.unet.in_channels * 64).view(1, -1, 8, 8)
    pixels = torch.linspace(-1, 1, c.vae.image_channels * 64 * 64).view(1, -1, 64, 64).to(**vae)
    t = torch.tensor([500], device=options.device)
    if side.startswith("ours"):
        models = preload_models_from_standard_weights(file if side == "ours, file" else folder, options.device,
                                                      dtype=options.torch_dtype)
        context = models["clip"](tokenize(models.tokenizer, ["a cat"], c.clip.max_tokens).to(options.device))
        out, mean = models["diffusion"](x.to(**to), t, context), models["encoder"](pixels)[0]
        return models["decoder"](out.to(**vae) + mean).cpu()
    single = side == "theirs, from_single_file"
    pipe = peers.from_single_file(options, file, folder) if single else peers.from_pretrained(options, folder)
    tokens = pipe.tokenizer(["a cat"], padding="max_length", max_length=c.clip.max_tokens, return_tensors="pt")
    context = pipe.text_encoder(tokens.input_ids.to(options.device)).last_hidden_state
    out, mean = pipe.unet(x.to(**to), t, context).sample, pipe.vae.encode(pixels).latent_dist.mean
    return pipe.vae.decode(out + mean).sample.cpu()


def time_loading(options: Options, side: str, tiny: tuple[Path, Path], paths: tuple[Path, Path], warm: bool) -> dict:
    load(replace(options, full=False), side, *tiny)
    set_page_cache(paths[SIDES[side] == "folder"], warm)
    reset_peak()
    before, start = read_from_disk(), time.perf_counter()
    picture = load(options, side, *paths)
    return {"seconds": time.perf_counter() - start, "peak": peak(options.device), "disk": read_from_disk() - before,
            "picture": picture.float().numpy()}


def loading(options: Options) -> tuple[list, list[list]]:
    """Header and rows of the loading table."""
    tiny, paths = checkpoints(replace(options, full=False)), checkpoints(options)
    sizes = {"file": paths[0].stat().st_size, "folder": sum(p.stat().st_size for p in paths[1].rglob("*.safetensors"))}
    rows, reference = [], None
    for warm in (True, False):
        found: dict[str, list[dict]] = {side: [] for side in SIDES}
        for i in range(options.n):
            for side in list(SIDES) if i % 2 else list(SIDES)[::-1]:
                found[side].append(isolated(options, time_loading, options, side, tiny, paths, warm).result)
        reference = found["theirs, from_pretrained"][0]["picture"] if reference is None else reference
        medians = {side: statistics.median(r["seconds"] for r in results) for side, results in found.items()}
        for side, results in found.items():
            peer = medians["theirs, from_single_file" if SIDES[side] == "file" else "theirs, from_pretrained"]
            apart = difference(torch.from_numpy(results[-1]["picture"]), torch.from_numpy(reference))
            rows.append([side, "warm" if warm else "cold", duration(medians[side]), f"{medians[side] / peer:.2f}",
                         f"{max(r['disk'] for r in results) / sizes[SIDES[side]]:.2f} x file",
                         f"{max(r['peak'] for r in results) / sizes[SIDES[side]]:.2f} x file", f"{apart:.1e}"])
    return ["loading", "page cache", "median", "/ theirs", "from disk", "peak", "difference of the picture"], rows


def start_times(options: Options) -> str:
    """A note on start-up time, which the loading table excludes."""
    folder = str(checkpoints(replace(options, full=False))[1])
    ours = f"from sd.model_loader import *; preload_models_from_standard_weights({folder!r}, 'cpu').tokenizer"
    theirs = f"from diffusers import StableDiffusionPipeline as P; P.from_pretrained({folder!r})"
    taken = [duration(timed(partial(_python, code), "cpu")[0]) for code in (ours, theirs)]
    return ("A new Python process that imports, loads the tiny model from its folder and ends, once each: "
            f"ours {taken[0]}, theirs {taken[1]}.")


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- LoRA ------------------------------------------------------------------------------------------------------------

class Side:
    """A model whose LoRAs change. A subclass has `unet` and the changes, each a method of the number of the call."""

    names = ["a", "b", "c", "d"]

    def __init__(self, options: Options, files: list[Path]):
        """`files`: enough for each load to use a new one."""
        to, g = {"device": options.device, "dtype": options.torch_dtype}, torch.Generator().manual_seed(1)
        x = torch.randn(2, options.config.unet.in_channels, 8, 8, generator=g).to(**to)
        context = torch.randn(2, 77, options.config.unet.context_width, generator=g).to(**to)
        self.files, self.given = files, (x, torch.tensor([500, 500], device=options.device), context)

    def change(self, what: str, i: int, step: bool) -> Callable:
        """A change, which may be followed by a step; both are timed."""
        @torch.no_grad()
        def both():
            getattr(self, what)(i)
            return self.unet(*self.given) if step else None
        return both

    def nothing(self, i: int) -> None:
        pass

    def new(self, i: int) -> None:
        self.load(self.files[i], "new")

    def load_some(self, count: int) -> None:
        for name, file in zip(self.names[:count], self.files):
            self.load(file, name)
        self.strength(7)


class Ours(Side):
    def __init__(self, options: Options, folder: Path, files: list[Path]):
        super().__init__(options, files)
        self.models = preload_models_from_standard_weights(folder, options.device, dtype=options.torch_dtype)
        self.unet = self.models["diffusion"]

    def load(self, file: Path, name: str) -> None:
        load_lora_into_models(self.models, file, name)

    def remove(self) -> None:
        remove_lora(self.models)

    def switch(self, i: int) -> None:
        set_adapters(self.models, {self.names[i % 4]: 1.0})

    def strength(self, i: int) -> None:
        set_adapters(self.models, {"a": (i + 1) / 8})

    def remember(self) -> int:
        """Keep the weights as they are now; returns the number of layers."""
        self.before = {path: layer.weight.clone() for path, layer in lora_layers(self.models).items()}
        return len(self.before)

    def drift(self) -> float:
        return max((layer.weight - self.before[path]).abs().max().item() for path, layer in lora_layers(self.models).items())

    def merge(self, i: int) -> None:
        merge(self.models)

    def unmerge(self, i: int) -> None:
        unmerge(self.models)


class Theirs(Side):
    def __init__(self, options: Options, folder: Path, files: list[Path]):
        super().__init__(options, files)
        self.pipe = peers.from_pretrained(options, folder)

    def unet(self, *given) -> torch.Tensor:
        return self.pipe.unet(*given).sample

    def load(self, file: Path, name: str) -> None:
        peers.load_lora(self.pipe, file, name)

    def remove(self) -> None:
        self.pipe.unload_lora_weights()

    def switch(self, i: int) -> None:
        self.pipe.set_adapters(self.names[i % 4])

    def strength(self, i: int) -> None:
        self.pipe.set_adapters("a", (i + 1) / 8)

    def remember(self) -> int:
        self.before = peers.attention_weights(self.pipe)
        return len(self.before)

    def drift(self) -> float:
        return max((p - self.before[key]).abs().max().item() for key, p in peers.attention_weights(self.pipe).items())

    def merge(self, i: int) -> None:
        self.pipe.fuse_lora(components=["unet"])

    def unmerge(self, i: int) -> None:
        self.pipe.unfuse_lora(components=["unet"])


def time_loras(options: Options, sides: dict[str, Worker]) -> list[list]:
    """Rows of the LoRA table."""
    rows = []

    def compare(what: str, change: str, step: bool = True, undo: str | None = None) -> None:
        """Add a row: the change number 0, 1, 2, ... on each side, followed by a step if `step`; `undo` is not timed."""
        def call(worker: Worker, counts: Iterator[int]):
            found = worker.timed("change", change, next(counts), step)
            if undo:
                worker.ask(undo)
            return found
        times, out = alternate({side: partial(call, worker, count()) for side, worker in sides.items()}, options.n)
        apart = f"{difference(out['ours'], out['theirs']):.1e}" if step else ""
        rows.append([what, *ratio(times["ours"], times["theirs"]), apart])

    compare("a step, no LoRA", "nothing")
    compare("a new LoRA file + step", "new", undo="remove")
    for worker in sides.values():
        worker.ask("load_some", 4)
    compare("a step, one of four LoRAs active", "nothing")
    for step, tail in ((False, ""), (True, " + step")):
        compare("switch to another of four LoRAs" + tail, "switch", step)
    for step, tail in ((False, ""), (True, " + step")):
        compare("change the multiplier" + tail, "strength", step)
    return rows


def merging(options: Options, sides: dict[str, Worker]) -> list[list]:
    """Rows on merging. Ours the first time and again into the same buffers; theirs makes no such difference."""
    for worker in sides.values():
        worker.ask("remove")
        worker.ask("load_some", 1)
    layers = [f"{worker.ask('remember')} layers" for worker in sides.values()][0]
    times: dict[str, list[float]] = {}

    def take(what: str, side: str, change: str) -> None:
        times.setdefault(what, []).append(sides[side].timed("change", change, 0, False)[0])
    for i in range(options.n + 1):
        sides["ours"].ask("strength", 7)
        take("first", "ours", "merge")
        sides["ours"].ask("strength", 8 + i)
        take("again", "ours", "merge")
        take("unmerge", "ours", "unmerge")
        take("fuse", "theirs", "merge")
        take("unfuse", "theirs", "unmerge")
    times = {what: taken[1:] for what, taken in times.items()}
    kept, drift = (worker.ask("drift") for worker in sides.values())
    return [[f"merge, {layers}, first", *ratio(times["first"], times["fuse"]), ""],
            [f"merge, {layers}, again in place", *ratio(times["again"], times["fuse"]), ""],
            [f"unmerge, {layers}", *ratio(times["unmerge"], times["unfuse"]), f"ours {kept:g}, theirs {drift:.1e}"]]


@dataclass(frozen=True)
class LoRAOptions(Options):
    any_module: bool = False  # measure tasks on a foreign model instead


def main(options: Options) -> str:
    if isinstance(options, LoRAOptions) and options.any_module:
        return any_module.main(options)
    _, folder = checkpoints(options)
    files = [lora_file(options, seed) for seed in range(max(4, options.n + 1))]
    tables = [loading(options)]
    started = {side: partial(Worker, options, make, options, folder, files)
               for side, make in (("ours", Ours), ("theirs", Theirs))}
    with workers(started) as sides:
        tables.append((["LoRA", "ours", "theirs", "ours / theirs", "difference of the step"], time_loras(options, sides)))
        tables.append((["merging", "ours", "theirs", "ours / theirs", "max abs(W - W0) after it"], merging(options, sides)))
    return block("Loading, and LoRA files", options, [LOADING_NOTES, start_times(options), LORA_NOTES], *tables)


if __name__ == "__main__":
    run(main, LoRAOptions)
