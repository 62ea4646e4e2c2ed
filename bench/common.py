"""Shared by the benchmarks: flags, random models on disk, medians, the markdown block. What measures is in process.py."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from numpy.typing import ArrayLike

from bench.process import isolated
from sd.adapters.weights import AdapterWeights
from sd.checkpoints.names import model_names
from sd.config import SD15, TINY, ModelConfig
from sd.files.tensors import write_safetensors
from sd.lora import find_targets
from sd.lora_files.write import write_kohya
from sd.model_loader import Models, save_checkpoint
from sd.models import build_networks
from tests.peers import randomize

CACHE = Path("out/bench")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RANK, ALPHA = 8, 6.0
GIB = 2**30


@dataclass(frozen=True)
class Options:
    """Flags shared by all programs in bench/."""

    full: bool = False  # use the size of SD 1.5 instead of a tiny model of the same topology
    device: str = "cpu"
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    n: int = 3  # repetitions after one warm-up; medians are printed
    threads: int = os.cpu_count() or 1
    size: int = 0  # pixels on each side; 0: the model's native size
    out: Path | None = None  # file to append the output to

    @property
    def config(self) -> ModelConfig:
        return SD15 if self.full else TINY

    @property
    def latent(self) -> int:
        return (self.size or self.config.image_size) // self.config.vae.factor

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def run(main: Callable[[Any], str], flags: type[Options] = Options) -> None:
    """Parse the flags, print the block that `main` returns, and append it to `--out`."""
    options = tyro.cli(flags)
    text = main(options)
    print(text, end="")
    if options.out is not None:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(text)


# ---- figures ---------------------------------------------------------------------------------------------------------

def ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[str]:
    """Three cells: median of ours, median of theirs, ours / theirs."""
    a, b = statistics.median(ours), statistics.median(theirs)
    return [duration(a), duration(b), f"{a / b:.2f}" if b else "-"]


def duration(s: float) -> str:
    return f"{s:.2f} s" if s >= 1 else f"{s * 1e3:.1f} ms" if s >= 1e-3 else f"{s * 1e6:.0f} µs"


def difference(a: ArrayLike | torch.Tensor, b: ArrayLike | torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- what is printed -------------------------------------------------------------------------------------------------

Table = tuple[Sequence[str], Sequence[Sequence[object]]]  # header, rows


def block(title: str, options: Options, notes: Sequence[str], *tables: Table, model: str | None = None) -> str:
    """A markdown section: title, environment, notes, tables. `model` None: the options' model."""
    parts = [f"## {title}", environment(options, model), *notes, *(table(*t) for t in tables)]
    return "\n\n".join(parts) + "\n"


def environment(options: Options, model: str | None = None) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "peft"))
    device = isolated(options, _device_name, options.device).result
    return (f"{date.today()}, commit {_commit()}, Python {platform.python_version()}, {packages}; {device}, threads: "
            f"{options.threads}, {options.dtype}, model {model or options.config.name}, n = {options.n} after a warm-up.")


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{device} ({name}, {os.cpu_count()} cores)"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- random models and LoRAs, cached ---------------------------------------------------------------------------------

def checkpoints(options: Options, dtype: str = "fp32") -> tuple[Path, Path]:
    """The same random weights as an LDM file and as a diffusers folder; cached."""
    name = f"{options.config.name}-{dtype}"
    file, folder = CACHE / f"{name}.safetensors", CACHE / name
    if not (file.exists() and folder.exists()):
        isolated(options, _make_checkpoints, options.config, file, folder, DTYPES[dtype])
    return file, folder


def _make_checkpoints(config: ModelConfig, file: Path, folder: Path, dtype: torch.dtype) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        networks = build_networks(config)
    models = Models({k: randomize(m.to_empty(device="cpu"), i) for i, (k, m) in enumerate(networks.items())}, config)
    save_checkpoint(models, file, dtype=dtype)
    save_checkpoint(models, folder, dtype=dtype)


def lora_file(options: Options, seed: int) -> Path:
    """A random LoRA of rank 8 on q, k, v and out of the UNet (128 layers in SD 1.5), in kohya's format; cached."""
    path = CACHE / f"{options.config.name}-lora-{seed}.safetensors"
    if not path.exists():
        isolated(options, make_lora, options.config, seed, path)
    return path


def make_lora(config: ModelConfig, seed: int, path: Path, targets: str = "attn", rank: int = RANK, alpha: float = ALPHA,
              dtype: torch.dtype = torch.float32) -> None:
    """Write a random LoRA on the layers of a preset in kohya's format; presets other than attn include the text encoder."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        networks = build_networks(config)
    wanted = {"diffusion": networks["diffusion"]} if targets == "attn" else networks
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, layer in find_targets(wanted, targets).items():
        out, inner, *kernel = layer.weight.shape
        down = torch.randn(rank, inner, *kernel, generator=generator) * inner**-0.5
        up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator) * 0.05
        state[name] = AdapterWeights("lora", {"down": down, "up": up}, alpha=alpha)
    family = "sd_v1" if config == SD15 else config.name
    write_safetensors(path, write_kohya(state, model_names(config), dtype), {"format": "pt", "ss_base_model_version": family})
