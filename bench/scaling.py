"""How cost grows: each row doubles one thing again and again, and says how the cost grew beside the work.

    python -m bench.scaling            (the tiny model: some minutes)
    python -m bench.scaling --full     (the size of SD 1.5, with fewer points)
"""

from __future__ import annotations

import io
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from PIL import Image

from bench.common import GIB, Options, block, duration, make_lora, run
from bench.process import isolated, peak, reset_peak, timed
from sd.adapters.targets import find_targets
from sd.lora import apply_lora_to_model, get_lora_parameters, merge, remove_lora, set_adapters, unmerge
from sd.model_loader import load_lora_into_models, merge_lora_into_checkpoint, save_checkpoint
from sd.models import new_models
from sd.tools.extract import extract_lora
from sd.training.config import TrainConfig
from sd.training.dataset.cache import Posteriors
from sd.training.dataset.contexts import Contexts, TextStore, all_captions
from sd.training.dataset.open import open_pictures
from sd.training.step import diffusion_batches


@dataclass(frozen=True)
class ScalingOptions(Options):
    only: tuple[str, ...] = ()  # names of sections, see SECTIONS; (): all
    most: int = 100_000  # pictures in the largest cache
    quick: bool = False  # two values of each thing, to try the program


NOTES = """Each row changes one thing over the listed values. "Cost" is the exponent of the time in that thing, fitted by least
squares over all values (0: no growth, 1: in proportion, 2: with the square), "work" that of what has to be done, which is
stated in words. Each value is measured {n} times after a warm-up, all of a section in one process; medians are shown. At small
values fixed costs hide the growth, so a cost below its work is no merit. A row is marked "above" where the last time is more
than {fault} times what the first and the work predict. Memory: what a call adds to its process at its peak. Pictures in the
cache are of 32 pixels with the tiny model, and their latents, which are all alike, are in the format of real ones."""
FAULT = 1.5
HEADER = ("what grows", "values", "first", "last", "cost", "work", "the work is", "", "memory, first .. last")


@dataclass(frozen=True)
class Series:
    """One row: `start(value)` returns the function that is timed, `work(value)` what has to be done."""

    name: str
    values: Sequence[int]
    start: Callable[[int], Callable[[], object]]
    work: Callable[[int], float]
    said: str

    def measure(self, options: Options) -> list[object]:
        seconds, peaks = [], []
        for value in self.values:
            function = self.start(value)
            function()
            reset_peak()
            seconds.append(statistics.median(timed(function, options.device)[0] for _ in range(options.n)))
            peaks.append(peak(options.device) / GIB)
        work = [self.work(value) for value in self.values]
        above = seconds[-1] / seconds[0] > FAULT * max(1.0, work[-1] / work[0])
        shown = ", ".join(f"{value:,}" for value in self.values)
        return [self.name, shown, duration(seconds[0]), duration(seconds[-1]), f"{exponent(self.values, seconds):.2f}",
                f"{exponent(self.values, work):.2f}", self.said, "above" if above else "",
                f"{peaks[0]:.2f} .. {peaks[-1]:.2f} GiB"]


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log(cost) over log(value), by least squares."""
    x, y = [math.log(v) for v in values], [math.log(c) for c in costs]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def same(value: int) -> float:
    return 1.0


# ---- a step ----------------------------------------------------------------------------------------------------------

def unet_step(options: Options, models, rows: int, latent: int) -> Callable[[], object]:
    c, g = options.config.unet, torch.Generator().manual_seed(1)
    to = {"device": options.device, "dtype": options.torch_dtype}
    given = (torch.randn(rows, c.in_channels, latent, latent, generator=g).to(**to),
             torch.full((rows,), 500, device=options.device), torch.randn(rows, 77, c.context_width, generator=g).to(**to))
    return torch.no_grad()(partial(models["diffusion"], *given))


def models_of(options: Options):
    models = new_models(options.config, seed=1)
    for network in models.values():
        network.to(options.device, options.torch_dtype)
    return models


def steps(options: Options, scratch: Path) -> list[Series]:
    models, side = models_of(options), 16 if not options.full else 32

    def of(rows: int, latent: int) -> Callable[[], object]:
        remove_lora(models)
        return unet_step(options, models, rows, latent)

    def active(count: int, rank: int = 8, modules: int | None = None, loaded: int = 0) -> Callable[[], object]:
        remove_lora(models)
        for k in range(max(count, loaded)):
            attach(models, rank, f"a{k}", modules)
        set_adapters(models, {f"a{k}": 1.0 for k in range(count)})
        return unet_step(options, models, 2, side)

    unet, work = models["diffusion"], adapter_work(models["diffusion"], options, side)
    all_modules = len(find_targets({"diffusion": unet}, "attn"))
    sizes, rows = (16, 32, 64), ((1, 2, 4) if options.full else (1, 2, 4, 8, 16))
    return [
        Series("step: side of the latents", sizes, lambda n: of(2, n), step_work(unet, options), "products, attention's too"),
        Series("step: rows", rows, lambda n: of(n, side), float, "rows"),
        Series("step: active LoRAs of rank 8", (1, 2, 4, 8), active, lambda n: work(8, n), "base and factors"),
        Series("step: loaded LoRAs, one active", (1, 4, 16, 64), lambda n: active(1, loaded=n), same, "the same"),
        Series("step: rank of one LoRA", (4, 16, 64, 256), lambda n: active(1, rank=n), work, "base and factors"),
        Series("step: modules with a LoRA", tuple(all_modules // k for k in (8, 4, 2, 1)), lambda n: active(1, modules=n),
               lambda n: work(8, n / all_modules), "base and factors"),
    ]


def attach(models, rank: int, name: str, modules: int | None = None, trained: bool = False) -> None:
    """A LoRA on the first `modules` layers of the attentions (None: all), of `rank` or the largest that a layer has."""
    layers = find_targets({"diffusion": models["diffusion"]}, "attn")
    ranks = {path: min(rank, *layer.weight.shape) if modules is None or k < modules else 0
             for k, (path, layer) in enumerate(layers.items())}
    apply_lora_to_model({"diffusion": models["diffusion"]}, ranks, 4.0, 0.0, "attn", name)
    for p in get_lora_parameters(models, name):
        p.requires_grad_(trained)
        p.data.normal_(std=0.01)


def step_work(unet, options: Options) -> Callable[[int], float]:
    """Multiplications of a step by the side of the latents, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def products(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_, **__) -> int:
        return sdpa_flop_count(q, k, v)
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: products}  # torch does not count it

    def count(side: int) -> float:
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            unet_step(options, {"diffusion": unet}, 2, side)()
        return counter.get_total_flops()
    return count


def adapter_work(unet, options: Options, side: int) -> Callable[..., float]:
    """Multiplications of a step by rank and number of LoRAs. A layer sees at most as many positions as there are latents."""
    base, shapes = step_work(unet, options)(side), [layer.weight.shape for layer in find_targets(unet, "attn").values()]

    def count(rank: int, loras: float = 1.0) -> float:
        return base + loras * 2 * 2 * side**2 * sum(min(rank, *shape) * sum(shape) for shape in shapes)
    return count


# ---- LoRAs -----------------------------------------------------------------------------------------------------------

def loras(options: Options, scratch: Path) -> list[Series]:
    models, file = models_of(options), scratch / "lora.safetensors"
    make_lora(options.config, 0, file, "kohya", 4, 4.0)

    def beside(count: int) -> None:
        remove_lora(models)
        for k in range(count):
            load_lora_into_models(models, file, f"a{k}")
            set_adapters(models, {})

    def load(count: int) -> Callable[[], object]:
        beside(count)
        return lambda: (load_lora_into_models(models, file, "new"), remove_lora(models, "new"))

    def switch(count: int) -> Callable[[], object]:
        beside(count)
        return lambda: (set_adapters(models, {"a0": 1.0}), set_adapters(models, {}))

    def merged(rank: int) -> Callable[[], object]:
        remove_lora(models)
        attach(models, rank, "a0")
        return lambda: (unmerge(models), merge(models))

    def merged_many(count: int) -> Callable[[], object]:
        beside(count)
        set_adapters(models, {f"a{k}": 1.0 for k in range(count)})
        return lambda: (unmerge(models), merge(models))

    counts = (1, 4, 16, 64)
    return [
        Series("loading a LoRA: others loaded", counts, load, same, "one file"),
        Series("switching a LoRA: others loaded", counts, switch, same, "one LoRA"),
        Series("merging: active LoRAs", (1, 2, 4, 8), merged_many, float, "one product each"),
        Series("merging: rank", (4, 16, 64, 256), merged, merge_work(models), "weights and products of factors"),
    ]


def merge_work(models) -> Callable[[int], float]:
    shapes = [layer.weight.shape for layer in find_targets(models["diffusion"], "attn").values()]
    return lambda rank: sum(a * b * (1 + min(rank, a, b)) for a, b in shapes)


def tools(options: Options, scratch: Path) -> list[Series]:
    """Merging and extraction against the size of the model."""
    widths = (1, 2, 4) if not options.full else (1, 2)
    out = scratch / "out.safetensors"

    @lru_cache
    def files(factor: int) -> tuple[Path, Path, Path]:
        """Base, tuned and LoRA of a model whose UNet is `factor` times as wide."""
        unet = replace(options.config.unet, widths=tuple(width * factor for width in options.config.unet.widths))
        config = replace(options.config, name=f"width-{factor}", unet=unet)
        base, tuned, lora = (scratch / f"{config.name}-{what}.safetensors" for what in ("base", "tuned", "lora"))
        for seed, file in enumerate((base, tuned)):
            save_checkpoint(new_models(config, seed), file)
        make_lora(config, 0, lora, rank=4, alpha=4.0)
        return base, tuned, lora

    def extract(factor: int) -> Callable[[], object]:
        base, tuned, _ = files(factor)
        return lambda: extract_lora(base, tuned, out, rank=4, randomized=True, progress=False)

    def merged(factor: int) -> Callable[[], object]:
        base, _, lora = files(factor)
        return lambda: merge_lora_into_checkpoint(base, {lora: 1.0}, out)

    def size(factor: int) -> float:
        return files(factor)[0].stat().st_size
    return [Series("extracting at rank 4: width of the UNet", widths, extract, size, "bytes of a checkpoint"),
            Series("merging into a checkpoint: width of the UNet", widths, merged, size, "bytes of the checkpoint")]


# ---- training --------------------------------------------------------------------------------------------------------

def training(options: Options, scratch: Path) -> list[Series]:
    models = models_of(replace(options, full=False))
    folder = picture_folder(scratch / "some", 64)

    def step(batch: int = 2, rank: int = 4) -> Callable[[], object]:
        remove_lora(models)
        attach(models, rank, "a", trained=True)
        config = config_of(folder, scratch / "some-cache", batch_size=batch)
        micro_loss = diffusion_batches(config, models, open_pictures(config, models)[0])
        number = iter(range(10**9))

        def one() -> None:
            micro_loss(next(number)).backward()
        return one
    return [Series("training step: batch", (1, 2, 4, 8, 16), step, float, "pictures"),
            Series("training step: rank", (4, 8, 16, 32), lambda n: step(rank=n),
                   adapter_work(models["diffusion"], replace(options, full=False), 4), "base and factors")]


def starts(options: ScalingOptions, scratch: Path) -> list[Series]:
    """A start and a batch against the pictures in the cache."""
    models = models_of(replace(options, full=False))
    counts = [n for n in (10, 100, 1000, 10_000, 100_000) if n <= options.most]
    made: dict[int, TrainConfig] = {}

    def start_of(config: TrainConfig):
        data = open_pictures(config, models)[0]
        data.fingerprint()
        posteriors, contexts = Posteriors(models, data, config.cache), Contexts(models, trained=False,
                                                                               store=TextStore(config.cache, models))
        contexts.fill(all_captions(data, config) or [])
        return posteriors

    def start(count: int) -> Callable[[], object]:
        if count not in made:
            folder = scratch / f"{count}"
            made[count] = config_of(picture_folder(folder / "data", count), folder / "cache")
            without_cost(models, lambda: start_of(made[count]))
        return lambda: start_of(made[count])

    def batch(count: int) -> Callable[[], object]:
        start(count)
        config = made[count]
        micro_loss = diffusion_batches(config, models, open_pictures(config, models)[0])
        number = iter(range(10**9))

        def some() -> None:
            with torch.no_grad():
                for _ in range(8):
                    micro_loss(next(number))
        return some
    return [Series("training: start, pictures in the cache", counts, start, float, "lines of an index"),
            Series("training: 8 batches, pictures in the cache", counts, batch, same, "8 batches")]


def config_of(data: Path, cache: Path, **options) -> TrainConfig:
    return TrainConfig(data=str(data), cache=str(cache), out=str(cache / "run"), size=32, progress=False,
                       caption_dropout=0.0, **options)


def picture_folder(folder: Path, count: int, side: int = 16) -> Path:
    """`count` small pictures that differ, and one list of captions, a hundred in all; written as if an hour ago."""
    folder.mkdir(parents=True)
    picture, old = io.BytesIO(), time.time() - 3600
    Image.new("RGB", (side, side), (1, 2, 3)).save(picture, "PNG")
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for k in range(count):
            name = f"{k:06}.png"
            (folder / name).write_bytes(picture.getvalue() + k.to_bytes(8, "little"))  # readers ignore what follows the end
            os.utime(folder / name, (old, old))
            file.write(json.dumps({"file_name": name, "text": f"picture {k % 100}"}) + "\n")
    return folder


def without_cost(models, start: Callable[[], object]) -> None:
    """A first start that encodes pictures at once, all alike, and leaves the disk to write when it wants."""
    with pytest.MonkeyPatch.context() as patch:
        c = models.config.vae
        patch.setattr(models["encoder"], "forward", lambda x: torch.zeros(2, len(x), c.latent_channels, 4, 4).unbind())
        patch.setattr(os, "fsync", lambda descriptor: None)
        start()


SECTIONS = {"steps": steps, "loras": loras, "tools": tools, "training": training, "starts": starts}


def section(options: ScalingOptions, name: str) -> list[list[object]]:
    with TemporaryDirectory() as scratch:
        found = SECTIONS[name](options, Path(scratch))
        return [(replace(series, values=series.values[:2]) if options.quick else series).measure(options) for series in found]


def main(options: ScalingOptions) -> str:
    names = options.only or tuple(SECTIONS)
    rows = [row for name in names for row in isolated(options, section, options, name).result]
    note = NOTES.format(n=options.n, fault=FAULT)
    return block("How cost grows", options, [note], (HEADER, rows))


if __name__ == "__main__":
    run(main, ScalingOptions)
