"""The life of a LoRA on the small real model in data/: load, compare, blend, train, save, load, toggle, merge.

`make demo` runs this in under four minutes on two CPU cores. Each figure is printed with its meaning.
"""

import time
from pathlib import Path

import numpy as np
import torch

from sd.lora import get_lora_parameters, lora_layers, merge_loss, remove_lora, use_adapters
from sd.model_loader import (
    count_parameters,
    load_lora_into_models,
    merge_lora_into_checkpoint,
    preload_models_from_standard_weights,
    preload_models_with_lora,
)
from sd.pictures.image_io import save_image
from sd.pipeline import compare, generate
from sd.prompts.tokenizer import data_dir
from sd.training import TrainConfig, train

OUT = Path("out/demo")
CONTRAST = data_dir() / "loras" / "emoji-high-contrast.safetensors"
EXAMPLES = data_dir() / "emoji-delft"
PROMPTS = ["red apple, twemoji style", "grinning face, noto style", "rocket, fluent flat style", "green heart, fluent 3d style",
           "tomato, noto style", "orange circle, twemoji style", "red heart, twemoji style", "pig face, noto style"]
HOW = dict(sampler_name="dpmpp_2m", n_inference_steps=20, cfg_scale=3.0)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)

    step("1. Load a real Stable Diffusion, with a new LoRA on the attention of its UNet")
    start = time.perf_counter()
    models = preload_models_with_lora(lora_rank=4)
    counts = count_parameters(models)
    say(f"loaded in {time.perf_counter() - start:.2f} s")
    say(f"{counts['base']:,} frozen parameters; {counts['lora']:,} trainable ones of the LoRA, "
        f"in {len(lora_layers(models))} attention projections")
    assert counts["trainable"] == sum(p.numel() for p in get_lora_parameters(models))
    remove_lora(models, "default")  # step 4 makes its own

    step("2. With and without a LoRA: one batch, the same noise in both columns")
    load_lora_into_models(models, CONTRAST, name="contrast")
    say(models.lora_reports["contrast"])
    start = time.perf_counter()
    save("compare.png", compare(PROMPTS[:4], models, [{}, {"contrast": 1.0}], seed=1, **HOW))
    say(f"8 pictures of 20 steps in {time.perf_counter() - start:.1f} s")
    base, lora = (generate(PROMPTS, models=models, seed=1, use_lora=on, **HOW) for on in (False, True))
    say(f"colour (mean of largest - smallest channel): base {colour(base):.0f} of 255, with the LoRA {colour(lora):.0f}")

    step("3. Blend: the multiplier is a dial, set in each call")
    dials = (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    save("multipliers.png", compare(PROMPTS[1:3], models, [{"contrast": m} for m in dials], seed=1, **HOW))
    zero = generate(PROMPTS, models=models, seed=1, lora={"contrast": 0.0}, **HOW)
    say(f"at multiplier 0 the pictures equal the base's, to the bit: {np.array_equal(zero, base)}")

    step("4. Train a new LoRA on a small folder of pictures, in less than a minute")
    pictures = len(list(EXAMPLES.glob("*.png")))
    say(f"{pictures} pictures of emoji in blue with captions, in {EXAMPLES}")
    start = time.perf_counter()
    config = TrainConfig(data=str(EXAMPLES), out=str(OUT / "delft"), name="delft", rank=4, steps=150, batch_size=8,
                         learning_rate=4e-3, schedule="cosine", warmup=20, save_every=50)
    train(config, models)
    say(f"{config.steps} steps in {time.perf_counter() - start:.0f} s (a second run finds them done); "
        f"the loss curve is {OUT}/delft/loss.png")
    save("trained.png", compare(PROMPTS[4:], models, [{}, {"delft": 1.0}, {"delft": 1.0, "contrast": 1.0}], seed=1, **HOW))
    before, after = (generate(PROMPTS, models=models, seed=1, lora=on, **HOW) for on in ({}, {"delft": 1.0}))
    say(f"blue - red, mean over pixels that are not white: before {blueness(before):.0f}, after {blueness(after):.0f}")

    step("5. Save, load into a fresh model, switch off and on")
    file = OUT / "delft" / "delft.safetensors"
    fresh = load_lora_into_models(preload_models_from_standard_weights(), file, name="delft")
    say(f"{file}: {file.stat().st_size / 1e3:.0f} kB beside {fresh.source.name} of "
        f"{fresh.source.stat().st_size / 1e6:.1f} MB")
    again = generate(PROMPTS, models=fresh, seed=1, **HOW)
    say(f"the file gives the same pictures as the trained model, to the bit: {np.array_equal(again, after)}")
    off = generate(PROMPTS, models=fresh, seed=1, use_lora=False, **HOW)
    say(f"switched off, it gives the base's pictures, to the bit: {np.array_equal(off, before)}")

    step("6. Merge for deployment: one plain checkpoint, no LoRA code needed to run it")
    with use_adapters(fresh, {"delft": 1.0}):
        say(f"rounding to float32 loses {merge_loss(fresh):.1e} of the change")
    merged = OUT / "emoji-delft-merged.safetensors"
    merge_lora_into_checkpoint(None, {file: 1.0}, merged, dtype=torch.float32)  # default: the base's float16
    plain = preload_models_from_standard_weights(merged)
    say(f"{merged}: {len(lora_layers(plain))} LoRA layers left")
    deployed = generate(PROMPTS, models=plain, seed=1, **HOW)
    say(f"the merged model makes the same pictures, to the bit: {np.array_equal(deployed, after)}")

    print(f"\nThe pictures are in {OUT}/: compare.png, multipliers.png, trained.png, delft/loss.png")


def colour(pictures: np.ndarray) -> float:
    return float(np.mean(pictures.max(axis=-1).astype(int) - pictures.min(axis=-1)))


def blueness(pictures: np.ndarray) -> float:
    """Mean of blue - red over pixels that are not white."""
    drawn = pictures[pictures.min(axis=-1) < 200].astype(int)
    return float((drawn[:, 2] - drawn[:, 0]).mean())


def step(title: str) -> None:
    print(f"\n{title}")


def say(text) -> None:
    print(f"   {text}")


def save(name: str, sheet: np.ndarray) -> None:
    save_image(sheet, OUT / name)
    say(f"-> {OUT / name}")


if __name__ == "__main__":
    main()
