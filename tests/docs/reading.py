"""Code blocks of the documents, made short enough for a test."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"--steps": "2", "--validate-every": "1", "--sample-every": "2", "--relora-every": "1", "--batch-size": "1"}


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(), re.S | re.M)


def quick_code(block: str) -> str:
    """The same with a training of 2 small steps, and pictures of 8."""
    return re.sub(r"\bn_inference_steps=\d+", "n_inference_steps=8",
                  re.sub(r"\bbatch_size=\d+", "batch_size=1", re.sub(r"\bsteps=\d+", "steps=2", block)))


def quick_command(words: list[str]) -> list[str]:
    """The same with 2 small steps where it trains, and few for pictures."""
    words = list(words)
    if words[0] in ("generate", "compare") and "--steps" not in words:
        return [*words, "--steps", "8"]
    if words[0] != "train":
        return words
    for flag, value in QUICK.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    words += [word for flag in ("--steps", "--batch-size") if flag not in words for word in (flag, QUICK[flag])]
    words += ["--relora-warmup", "1"] if "--relora-every" in words else []
    words += ["--sample-steps", "2"] if "--sample-every" in words else []
    return [*words, "--no-progress"]
