"""Compare ways to train a LoRA with full fine-tuning: held-out loss on digits with thick strokes, three seeds each.

    python -m recipes.digits.learning        # about half an hour on one core; finished runs are skipped

Each run learns 200 digits with thick strokes and is measured on 200 others; the command line can repeat it (its config.json
is in its folder below out/digits/learning). All LoRAs have the same learning rate, full fine-tuning a tenth of it; none was
tuned. loha and lokr have the rank at which their number of parameters is nearest to that of a LoRA of rank 4.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from PIL import ImageFilter

from recipes.digits.data import OUT, WORDS, captions, load_mnist, split, to_image
from sd.files.tensors import read_tensors
from sd.lora import apply_lora_to_model, get_lora_parameters, remove_lora
from sd.model_loader import preload_models_from_standard_weights
from sd.pictures.image_io import save_image
from sd.pictures.sheets import line_plot
from sd.prompts.tokenizer import data_dir
from sd.training import TrainConfig, train

MODEL, FOLDER, EACH = data_dir() / "digits.safetensors", OUT / "learning", 20
COMMON = {"model": str(MODEL), "data": str(FOLDER / "learn"), "validation_data": str(FOLDER / "measure"), "validate_every": 25,
          "steps": 300, "batch_size": 16, "warmup": 20, "schedule": "cosine", "progress": False, "save_every": 100,
          "rank": 4, "alpha": 4.0, "learning_rate": 2e-3}
WAYS = {
    "full": {"train": "full", "learning_rate": 2e-4},
    "lora": {},
    "dora": {"dora": True},
    "loha": {"kind": "loha"},
    "lokr": {"kind": "lokr"},
    "qlora": {"quantize": "nf4"},
    "relora": {"relora_every": 100, "relora_warmup": 10},
}
SEEDS = (0, 1, 2)


def write_pictures(folder: Path, thick: torch.Tensor, pictures: torch.Tensor, digits: torch.Tensor) -> None:
    """Write EACH pictures of every digit with thick strokes, as PNG and .txt caption."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for d in range(10):
        for k, i in enumerate(thick[digits[thick] == d][4:4 + EACH].tolist()):
            to_image(pictures[i]).filter(ImageFilter.MaxFilter(3)).save(folder / f"{WORDS[d]}-{k}.png")
            (folder / f"{WORDS[d]}-{k}.txt").write_text(captions(d)[(k + d) % 6] + "\n", encoding="utf-8")


def count(models, **options) -> int:
    apply_lora_to_model({"diffusion": models["diffusion"]}, name="counted", target_modules="attn", **options)
    number = sum(p.numel() for p in get_lora_parameters(models))
    remove_lora(models, "counted")
    return number


def equal_rank(models, kind: str, wanted: int) -> int:
    """The rank at which the number of parameters of a kind is closest to `wanted`."""
    return min(range(1, 17), key=lambda rank: abs(count(models, rank=rank, alpha=float(rank), kind=kind) - wanted))


def learn(way: str, seed: int, models) -> tuple[int, list[tuple[int, float]]]:
    """(number of trained parameters, held-out loss by step)."""
    out, options = FOLDER / f"{way}-{seed}", COMMON | WAYS[way]
    if "kind" in options:
        rank = equal_rank(models, options["kind"], count(models, rank=4, alpha=4.0))
        options |= {"rank": rank, "alpha": float(rank)}
    config = TrainConfig(**options, seed=seed, out=str(out))
    if not (out / f"{'model' if config.train == 'full' else config.name}.safetensors").exists():
        train(config)
    shapes = read_tensors(out / "state.safetensors").shapes
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (sum(torch.Size(shape).numel() for key, shape in shapes.items()
                if key.startswith("weights/") and ".merged." not in key),  # ReLoRA's frozen part
            [(row["step"], row["validation"]) for row in rows if "validation" in row])


def main() -> None:
    pictures, digits = load_mnist()
    learned, measured = split(digits)
    write_pictures(FOLDER / "learn", learned, pictures, digits)
    write_pictures(FOLDER / "measure", measured, pictures, digits)
    models = preload_models_from_standard_weights(MODEL, "cpu")
    found = {way: [learn(way, seed, models) for seed in SEEDS] for way in WAYS}
    base = found["full"][0][1][0][1]
    last = {way: [curve[-1][1] for _, curve in runs] for way, runs in found.items()}
    gap = base - statistics.mean(last["full"])
    print(f"base: {base:.4f}\n\n| way | parameters | held-out loss, seeds {SEEDS} | of the gap | against lora |\n"
          "| --- | --- | --- | --- | --- |")
    closed = {way: (base - statistics.mean(losses)) / gap for way, losses in last.items()}
    for way, losses in last.items():
        print(f"| {way} | {found[way][0][0]:,} | {', '.join(f'{x:.4f}' for x in losses)} | {closed[way]:.0%} | "
              f"{closed[way] / closed['lora']:.2f} |")
    curves = {way: [(step, statistics.mean(curve[k][1] for _, curve in runs)) for k, (step, _) in enumerate(runs[0][1])]
              for way, runs in found.items()}
    plot = line_plot(curves, f"held-out loss, mean of {len(SEEDS)} seeds", "step", "loss")
    save_image(plot, Path("docs/images/learning.png"))


if __name__ == "__main__":
    main()
