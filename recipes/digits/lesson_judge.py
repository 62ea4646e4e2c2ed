"""Evaluate a lesson with a classifier: accuracy of its pictures, as they are and inverted, at several LoRA multipliers.

    python -m recipes.digits.lesson_judge --config recipes/digits/lesson-pixels.yaml --multipliers 0 0.5 1
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recipes.digits.data import load_mnist, split
from recipes.digits.evaluate import correct, train_classifier
from recipes.digits.lesson import COLOURS, captions_of, colours, load_both, parser, read_lesson, resized
from sd.config import ModelConfig
from sd.pipeline import generate

EACH = 20  # pictures of each digit


def asked(config: ModelConfig) -> list[tuple[str, int, str | None]]:
    """EACH rows (caption, digit, colour) for every digit, cycling through its captions and colours."""
    texts = [[(text, d, name) for name in colours(config) for text in captions_of(d, name)] for d in range(10)]
    return [texts[d][k % len(texts[d])] for d in range(10) for k in range(EACH)]


def judge(lesson: dict, multipliers: Sequence[float]) -> str:
    """A table with a row for the base and one for each multiplier."""
    pictures, digits = load_mnist()
    chosen, _ = split(digits)
    network = train_classifier(pictures[chosen], digits[chosen])
    models, name = load_both(lesson)
    texts, digits, names = zip(*asked(models.config))
    base = generate(texts, models=models, use_lora=False, seed=0, **lesson["sample"])
    rows = {"base": base}
    for m in multipliers:
        rows[f"{name} at {m:g}"] = generate(texts, models=models, lora={name: m}, seed=0, **lesson["sample"])
    lines = ["| drawn with | right | right when inverted | brightness |", "| --- | --- | --- | --- |"]
    for row, made in rows.items():
        shares = " | ".join(share(network, x, torch.tensor(digits), names) for x in (made, 255 - made))
        same = " bit-identical to the base" if made is not base and np.array_equal(made, base) else ""
        lines.append(f"| {row} | {shares} | {made.mean():.0f} |{same}")
    return "\n".join(lines)


def share(network: nn.Module, made: np.ndarray, digits: Tensor, names: Sequence[str | None]) -> str:
    """Shares of pictures, uint8 [B, S, S, 3], with the right digit and, if colours are given, the right colour."""
    brightest = torch.from_numpy(made.max(axis=3)).float()[:, None] / 127.5 - 1
    text = f"{correct(network, resized(brightest, 32), digits):.1%}"
    if names[0] is None:
        return text
    means = made.mean(axis=(1, 2)).clip(1)  # [B, 3]
    near = [min(COLOURS, key=lambda name: np.abs(COLOURS[name] - mean / mean.max()).sum()) for mean in means]
    return f"{text}, colour {np.mean([a == b for a, b in zip(near, names)]):.1%}"


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    print(judge(read_lesson(args.config, args.set), args.multipliers))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
