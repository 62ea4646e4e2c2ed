"""One UNet step in ours, diffusers and OpenVINO, each a new process, in turn: make bench-peers

    python -m bench.openvino --full --former ../sdlora-before
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from bench.common import CACHE, GIB, Options, block, checkpoints, duration, run
from bench.process import ROOT, Worker, isolated
from bench.unets import Diffusers, OpenVINO, Ours, Shape, convert


@dataclass(frozen=True)
class PeerOptions(Options):
    former: Path | None = None  # a folder with an earlier state of this repository, to compare with
    python: Path = ROOT / ".venv-peers/bin/python"  # of the environment with OpenVINO
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")  # of ours and diffusers
    sizes: tuple[int, ...] = ()  # pixels on each side; (): --size, else 256 and the model's native size


NOTES = """A step is one call of the UNet with 2 rows and 77 tokens; random weights, the same in all programs. Every row is
a new process each time, n times in turn (A B C A B C); it loads, makes a first call and then {steps} more, of which the
median of all processes is listed. OpenVINO {version} in an environment of its own: diffusers' UNet is converted once for each
size (fp32, fixed shapes), each process reads and compiles that; "default" is the precision that it chooses on this processor.
Only ours sets anything for its process. Loading: until the model can be called, without imports. Peak: growth of the process,
loading included; mapped file pages count if they were touched. Error: max and mean of |a - b| / max |b|, b being diffusers in
fp32."""
STEPS = 3
HEADER = ("program", "pixels", "converting", "loading", "first call", "step", "/ diffusers fp32", "/ OpenVINO default",
          "/ before", "error, largest", "mean", "peak GiB")


class Program(NamedTuple):
    name: str
    start: Callable[[], Worker]


class Found(NamedTuple):
    loading: float
    first: float
    steps: list[float]
    result: np.ndarray
    peak: int
    precision: str


def measure(program: Program, size: int) -> Found:
    """One process: load, a first call, steps."""
    with program.start() as worker:
        worker.reset_peak()
        loading, _ = worker.timed("load", size)
        (first, _), *rest = (worker.timed("step", size) for _ in range(1 + STEPS))
        precision = worker.ask("precision") if program.name.startswith("OpenVINO") else ""
        return Found(loading, first, [seconds for seconds, _ in rest], rest[-1][1], worker.peak(), precision)


def converted(options: PeerOptions, folder: Path, shape: Shape,
              sizes: tuple[int, ...]) -> tuple[dict[int, Path], dict[int, float]]:
    """(size -> OpenVINO model, size -> seconds of its conversion), cached."""
    files = {size: CACHE.resolve() / f"openvino-{options.config.name}-{size}.xml" for size in sizes}
    seconds = {}
    for size, file in files.items():
        note = file.with_suffix(".json")
        if not note.exists():
            taken = isolated(options, convert, folder, file, shape, size, python=options.python).result
            note.write_text(json.dumps(taken))
        seconds[size] = json.loads(note.read_text())
    return files, seconds


def main(options: PeerOptions) -> str:
    if not options.python.exists():
        raise SystemExit(f"{options.python}: no such interpreter; `make bench-peers` builds the environment with OpenVINO")
    c, folder = options.config, checkpoints(options)[1].resolve()
    shape = (c.unet.in_channels, 77, c.unet.context_width, c.vae.factor)
    sizes = options.sizes or ((options.size,) if options.size else (c.image_size // 2, c.image_size))
    files, seconds = converted(options, folder, shape, sizes)
    start = partial(partial, Worker, replace(options, device="cpu"))
    programs = []
    for dtype in options.dtypes:
        programs.append(Program(f"ours, {dtype}", start(Ours, folder, shape, dtype)))
        if options.former:
            programs.append(Program(f"ours before, {dtype}", start(Ours, folder, shape, dtype, checkout=options.former)))
        programs.append(Program(f"diffusers, {dtype}", start(Diffusers, folder, shape, dtype)))
    for name, precision in (("OpenVINO, f32", "f32"), ("OpenVINO, default", None)):
        programs.append(Program(name, start(OpenVINO, files, shape, precision, options.threads, python=options.python)))

    rows = []
    for size in sizes:
        found: dict[str, list[Found]] = {program.name: [] for program in programs}
        for _ in range(options.n):
            for program in programs:
                found[program.name].append(measure(program, size))
        rows += [row_of(name, size, found, seconds[size]) for name in found]
    found_version = isolated(options, version, "openvino", python=options.python).result
    note = NOTES.format(steps=STEPS, version=found_version)
    return block("A step in several programs", replace(options, dtype=" and ".join(options.dtypes)), [note], (HEADER, rows))


def row_of(name: str, size: int, found: dict[str, list[Found]], converting: float) -> list:
    runs, peer = found[name], name.startswith("OpenVINO")
    step = median_step(runs)

    def against(other: str) -> str:
        return f"{step / median_step(found[other]):.2f}" if other in found and other != name else ""
    exact = found["diffusers, float32"][-1].result.astype(float)
    apart = np.abs(runs[-1].result - exact) / np.abs(exact).max()
    return [f"{name} ({runs[-1].precision})" if name.endswith("default") else name, size,
            duration(converting) if peer else "", duration(statistics.median(r.loading for r in runs)),
            duration(statistics.median(r.first for r in runs)), duration(step), against("diffusers, float32"),
            against("OpenVINO, default"), against(name.replace("ours,", "ours before,")) if name.startswith("ours,") else "",
            f"{apart.max():.1e}", f"{apart.mean():.1e}", f"{max(r.peak for r in runs) / GIB:.2f}"]


def median_step(runs: list[Found]) -> float:
    return statistics.median(seconds for r in runs for seconds in r.steps)


if __name__ == "__main__":
    from bench import openvino  # a new process finds its functions there, and none in __main__
    run(openvino.main, openvino.PeerOptions)
