"""Evaluate the emoji model and its LoRAs; writes contact sheets to out/emoji/sheets/.

    python -m recipes.emoji.evaluate                       # everything
    python -m recipes.emoji.evaluate --part base --each 60 # some of it, with fewer pictures from each split
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.emoji.data import BASE, HIGH_CONTRAST, OUT, STYLES, Row, build, caption, to_float
from recipes.emoji.train import CONCEPT, CONCEPT_CODE, CONCEPT_STYLES, LORAS, MODEL, STYLE
from sd.files.tensors import read_tensors, write_safetensors
from sd.model_loader import Models, load_lora_into_models, preload_models_from_standard_weights
from sd.pictures.image_io import save_image
from sd.pictures.sheets import contact_sheet
from sd.pipeline import generate

SAMPLING = {"sampler_name": "dpmpp_2m", "n_inference_steps": 20, "cfg_scale": 3.0}
SEEN = 400  # training pictures to evaluate on, always the same
BATCH = 40
FREE = ("blue heart on fire, twemoji style", "green apple with a face, noto style", "purple dog, twemoji style",
        "robot cat, fluent 3d style", "red car in the rain, emojione style", "smiling sun with sunglasses, noto style",
        "pink octopus, fluent flat style", "house made of ice, blob style", "woman astronaut crying, twemoji style",
        "yellow fish, fluent 3d style", "angry pumpkin, noto style", "black star, twemoji style",
        "green book, fluent flat style", "cake with a red flag, emojione style", "sleepy moon, blob style",
        "orange balloon, twemoji style", "crown, blue, fluent 3d style", "frog", "a tree", "rocket")


def make(models: Models, prompts: list[str], **options) -> np.ndarray:
    """Generate uint8 [N, H, W, 3]; picture i has seed i."""
    return np.concatenate([generate(prompts[i:i + BATCH], models=models, seed=i, **(SAMPLING | options))
                           for i in range(0, len(prompts), BATCH)])


def to_tensor(made: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to [N, 3, H, W]."""
    return torch.from_numpy(made).permute(0, 3, 1, 2)


# ---- measures --------------------------------------------------------------------------------------------------------

def small(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to [N, 3 * 32 * 32], by averaging."""
    return F.adaptive_avg_pool2d(to_float(pictures), 32).flatten(1)


def ranks(made: Tensor, truth: list[int], gallery: Tensor) -> Tensor:
    """For each i, the number of gallery pictures closer to made[i] than gallery[truth[i]]: 0 if the true one is closest.

    made: uint8 [N, 3, H, W], gallery: uint8 [M, 3, H, W]; the distance is Euclidean, between pixels at 32 x 32.
    """
    distance = torch.cdist(small(made), small(gallery), compute_mode="donot_use_mm_for_euclid_dist")
    return (distance < distance.gather(1, torch.tensor(truth)[:, None])).sum(1)


def retrieve(made: Tensor, asked: list[Row], pictures: Tensor, rows: list[Row]) -> Tensor:
    """For each generated picture, the rank of the true one among all real pictures of its style."""
    found = torch.empty(len(made), dtype=torch.long)
    for style in {row.style for row in asked}:
        gallery = [row.index for row in rows if row.style == style]
        mine = [i for i, row in enumerate(asked) if row.style == style]
        found[mine] = ranks(made[mine], [gallery.index(asked[i].index) for i in mine], pictures[gallery])
    return found


def accuracies(found: Tensor) -> str:
    return f"top-1 {(found == 0).float().mean():.1%}, top-10 {(found < 10).float().mean():.1%} of {len(found)}"


def style_classifier(pictures: Tensor, rows: list[Row], epochs: int = 3, batch: int = 64) -> nn.Module:
    """A classifier of the seven styles at 32 x 32 pixels, trained on real pictures of the train split; kept in out/emoji."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(48, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 16, len(STYLES)))
    path = OUT / "style-classifier.safetensors"
    if path.exists():
        model.load_state_dict(read_tensors(path))
        return model.eval()
    chosen = torch.tensor([row.index for row in rows if row.split == "train"])
    labels = torch.tensor([list(STYLES).index(row.style) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    for _ in range(epochs):
        for indices in chosen[torch.randperm(len(chosen))].split(batch):
            F.cross_entropy(model(halved(pictures[indices])), labels[indices]).backward()
            optimizer.step()
            optimizer.zero_grad()
    write_safetensors(path, model.state_dict())
    return model.eval()


def halved(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to the classifier's input, [N, 3, 32, 32] in [-1, 1]."""
    return F.adaptive_avg_pool2d(to_float(pictures), 32)


@torch.no_grad()
def share(judge: nn.Module, made: Tensor, style: str) -> float:
    """Share of pictures that the classifier assigns to `style`."""
    return (judge(halved(made)).argmax(1) == list(STYLES).index(style)).float().mean().item()


@torch.no_grad()
def psnr(models: Models, pictures: Tensor) -> float:
    """PSNR in dB of pictures decoded from the mean of their posterior, averaged over pictures."""
    ratios = []
    for part in to_float(pictures).split(32):
        rebuilt = models["decoder"](models["encoder"](part)[0]).clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (rebuilt - part).square().mean(dim=(1, 2, 3))))
    return torch.cat(ratios).mean().item()


# ---- evaluations -----------------------------------------------------------------------------------------------------

def pick(rows: list[Row], most: int) -> list[Row]:
    """A fixed random selection of at most `most` rows."""
    return [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:most])]


def judge_vae(models: Models, pictures: Tensor, rows: list[Row]) -> None:
    values = {style: psnr(models, pictures[[row.index for row in rows if row.style == style and row.split != "train"]])
              for style in STYLES}
    each = ", ".join(f"{STYLES[style]} {value:.1f}" for style, value in values.items())
    print(f"VAE: PSNR {np.mean([values[style] for style in BASE]):.1f} dB on held-out pictures of the base ({each})")


def judge_base(models: Models, pictures: Tensor, rows: list[Row], each: int) -> None:
    base = [row for row in rows if row.style in BASE]
    for split, name, most in (("train", "seen", SEEN), ("pair", "held-out pairs", len(base)),
                              ("concept", "held-out concepts", len(base))):
        asked = pick([row for row in base if row.split == split], min(most, each))
        made = to_tensor(make(models, [caption(row) for row in asked]))
        print(f"{name}: {accuracies(retrieve(made, asked, pictures, rows))}", flush=True)
        beside(OUT / f"sheets/{name.replace(' ', '-')}.png", made, asked, pictures)


def beside(path: Path, made: Tensor, asked: list[Row], pictures: Tensor, most: int = 40) -> None:
    """Write a sheet of generated pictures, each beside the real one, four pairs per row."""
    cells = [image for row, picture in list(zip(asked, made))[:most] for image in (grid(picture), grid(pictures[row.index]))]
    sheet([cells[i:i + 8] for i in range(0, len(cells), 8)], path)


def grid(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).numpy()


def sheet(cells: list[list], path: Path, **labels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(contact_sheet(cells, tile=64, **labels), path)


def draw_free(models: Models) -> None:
    """Write a sheet with four pictures of each free prompt."""
    made = make(models, [prompt for prompt in FREE for _ in range(4)])
    sheet([list(made[i:i + 4]) for i in range(0, len(made), 4)], OUT / "sheets/free.png", row_labels=list(FREE))


def judge_style(models: Models, pictures: Tensor, rows: list[Row], path: Path, each: int) -> None:
    judge = style_classifier(pictures, rows)
    labels = torch.tensor([list(STYLES).index(row.style) for row in rows])
    held_out = [row.index for row in rows if row.split != "train"]
    with torch.no_grad():
        right = (judge(halved(pictures[held_out])).argmax(1) == labels[held_out]).float().mean()
    print(f"style classifier: {right:.1%} of {len(held_out)} held-out pictures are right")

    asked = pick([row for row in rows if row.style == HIGH_CONTRAST and row.split == "concept"], each)
    prompts = [caption(row) for row in asked]
    bare = make(models, prompts)
    load_lora_into_models(models, path, "style")
    made = {m: make(models, prompts, lora={"style": m}) for m in (0.0, 0.5, 1.0, 1.5)}
    print(f"multiplier 0: {'bit-identical to the base' if np.array_equal(made[0.0], bare) else 'DIFFERS FROM THE BASE'}")
    for m, shown in made.items():
        colour = (shown.max(axis=-1).astype(int) - shown.min(axis=-1)).mean()
        print(f"style LoRA at {m}: {share(judge, to_tensor(shown), HIGH_CONTRAST):.1%} high contrast, mean colour "
              f"{colour:.0f} of 255, {accuracies(retrieve(to_tensor(shown), asked, pictures, rows))}", flush=True)
    cells = [[*(made[m][i] for m in made), grid(pictures[row.index])] for i, row in enumerate(asked[:20])]
    sheet(cells, OUT / "sheets/style-lora.png", row_labels=[row.label for row in asked[:20]],
          column_labels=[*map(str, made), "real"])


def judge_concept(models: Models, pictures: Tensor, rows: list[Row], path: Path) -> None:
    """Compare the concept without and with the LoRA in each style of the base; the LoRA was trained on CONCEPT_STYLES."""
    load_lora_into_models(models, path, "concept")
    asked = [row for row in rows if row.code == CONCEPT_CODE and row.style in BASE]
    made = {m: make(models, [caption(row) for row in asked], lora={"concept": m}) for m in (0.0, 1.0)}
    for m, shown in made.items():
        found = retrieve(to_tensor(shown), asked, pictures, rows)
        each = ", ".join(f"{STYLES[row.style]}{'' if row.style in CONCEPT_STYLES else ' (not seen)'} {rank + 1}"
                         for row, rank in zip(asked, found.tolist()))
        print(f"concept LoRA at {m}: rank of the real {asked[0].label}: {each}")
    sheet([*(list(shown) for shown in made.values()), [grid(pictures[row.index]) for row in asked]],
          OUT / "sheets/concept-lora.png", row_labels=["base", "with the LoRA", "real"],
          column_labels=[STYLES[row.style] for row in asked])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--loras", type=Path, default=LORAS)
    parser.add_argument("--part", nargs="+", choices=("vae", "base", "free", "style", "concept"),
                        default=("vae", "base", "free", "style", "concept"))
    parser.add_argument("--each", type=int, default=10_000, help="largest number of pictures from each split")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pictures, rows = build()
    models = preload_models_from_standard_weights(args.model, "cpu", dtype=torch.float32)
    style, concept = args.loras / f"{STYLE.name}.safetensors", args.loras / f"{CONCEPT.name}.safetensors"
    if "vae" in args.part:
        judge_vae(models, pictures, rows)
    if "base" in args.part:
        print(", ".join(f"{key} {value}" for key, value in SAMPLING.items()))
        judge_base(models, pictures, rows, args.each)
    if "free" in args.part:
        draw_free(models)
    if "style" in args.part and style.exists():
        judge_style(models, pictures, rows, style, args.each)
    if "concept" in args.part and concept.exists():
        judge_concept(models, pictures, rows, concept)


if __name__ == "__main__":
    main()
