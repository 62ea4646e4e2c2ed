"""Command line of the recipe: base, train, sample, merge. See README.md in this folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch
import tyro

from recipes.stable_audio import model as audio
from recipes.stable_audio.tones import PATCH, PITCHES, RATE, harmonics, to_wave, write_wav
from recipes.stable_audio.train import read_config, train_base, train_lora
from sd.files.tensors import keep_sources
from sd.lora import merge_lora_weights, save_lora_weights

OUT = Path("out/stable_audio")
CONFIG, BASE, LORA = Path(__file__).with_name("config.json"), OUT / "base.safetensors", OUT / "octave.safetensors"


def base(config: Path = CONFIG, out: Path = BASE, *, steps: int | None = None) -> None:
    """Train a small model from random weights on sine tones."""
    options = _prepared(config, out, "base", steps=steps)
    model = audio.new_model(options)
    _print_losses(train_base(model, options))
    audio.save_model(model, out)
    print(out)


def train(config: Path = CONFIG, model: Path = BASE, out: Path = LORA, *, steps: int | None = None, dora: bool = False,
          relora_every: int | None = None, quantize: Literal["nf4", "nf4-double", "int8", "fp8"] | None = None) -> None:
    """Train the LoRA of the config; optionally DoRA, ReLoRA (with restarts) or QLoRA (on a quantised base)."""
    options = _prepared(config, out, "training", model, steps=steps, relora_every=relora_every, quantize=quantize)
    if dora:
        options["lora"] = options.get("lora", {}) | {"weight_decompose": True}
    network = audio.load_model(model)
    _print_losses(train_lora(network, options))
    save_lora_weights(network, out)
    print(out)


def sample(model: Path = BASE, out: Path = OUT / "tone.wav", *, lora: Path | None = None, multiplier: float = 1.0,
           scale: float = 1.0, pitch: int = 2, seconds: float = 1.0, seed: int = 0) -> None:
    """Write a tone of pitch x 250 Hz and print the amplitudes of its harmonics. Scale: alpha / rank of a LoRAW file."""
    if pitch not in PITCHES:
        raise ValueError(f"pitch is {pitch}; allowed: {PITCHES.start} to {PITCHES.stop - 1}")
    if not PATCH / RATE <= seconds <= 60:
        raise ValueError(f"seconds is {seconds}; allowed: {PATCH / RATE} to 60")
    if lora is None and (multiplier, scale) != (1.0, 1.0):
        raise ValueError("multiplier and scale are those of a LoRA; name one with --lora")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; allowed: 0 to 2^63 - 1")
    _ready(out, model, *([] if lora is None else [lora]))
    network = audio.load_model(model)
    if lora is not None:
        print(audio.load_lora(network, lora, multiplier=multiplier, scale=scale))
    noise = torch.randn(1, PATCH, round(seconds * RATE / PATCH), generator=torch.Generator().manual_seed(seed))
    wave = to_wave(audio.sample(network, noise, torch.tensor([pitch])))
    write_wav(out, wave[0])
    print(f"{out}: " + ", ".join(f"{(k + 1) * pitch * 250} Hz {a:.2f}" for k, a in enumerate(harmonics(wave, pitch, 4)[0])))


def merge(model: Path = BASE, lora: Path = LORA, out: Path = OUT / "merged.safetensors", *, multiplier: float = 1.0,
          scale: float = 1.0) -> None:
    """Merge a LoRA into the weights and write a model like that of `base`. Scale: alpha / rank of a LoRAW file."""
    _ready(out, model, lora)
    network = audio.load_model(model)
    print(audio.load_lora(network, lora, multiplier=multiplier, scale=scale))
    audio.save_model(merge_lora_weights(network), out)
    print(out)


def _prepared(config: Path, out: Path, section: str, *sources: Path, **given) -> dict:
    """Read the config, with values from the command line in one section."""
    _ready(out, config, *sources)
    options = read_config(config)
    if not isinstance(options.get(section, {}), dict):
        raise ValueError(f"{config}: the section `{section}` is {options[section]!r}; it needs names with values")
    options[section] = options.get(section, {}) | {key: value for key, value in given.items() if value is not None}
    return options


def _ready(out: Path, *sources: Path) -> None:
    keep_sources(out, *sources)
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file to write")
    out.parent.mkdir(parents=True, exist_ok=True)


def _print_losses(losses: list[float]) -> None:
    n = max(1, len(losses) // 10)
    print(f"{len(losses)} steps: loss {sum(losses[:n]) / n:.4f} at first, {sum(losses[-n:]) / n:.4f} at last")


def main(words: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    torch.set_num_threads(1)  # several threads would sum in another order
    try:
        tyro.extras.subcommand_cli_from_dict({f.__name__: f for f in (base, train, sample, merge)}, args=words,
                                             prog="python -m recipes.stable_audio")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
