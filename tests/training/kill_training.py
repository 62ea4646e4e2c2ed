"""A training is killed again and again, with SIGKILL; in the end its files are those of an unbroken run.

python -m tests.training.kill_training [FOLDER [KILLS INSIDE WRITES [KILLS AT RANDOM]]]      default: a new folder, 30, 170

It imports once, then forks a training for each kill. A kill inside a write comes just before, in the middle of (the file is
cut short) or just after the replacement of a state or of a file of the cache.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sd.model_loader import new_models
from sd.training import train
from tests.training.tiny import LORA, SMALL, copy_of, files

CONFIG = replace(LORA, text_encoder=False, optimizer="adamw", steps=12, save_every=1)


def make_data(folder: Path, n: int = 12) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (20, 24), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}, odd" if i % 2 else f"number {i}")
    return folder


def start(config, models, before=lambda: None) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            before()
            train(config, copy_of(models))
            code = 0
        finally:
            os._exit(code)
    return pid


def die_in_write(n: int, how: str) -> None:
    """SIGKILL to itself in the n-th replacement of a state or of a file of the cache."""
    original, left = os.replace, [n]

    def deadly(source, target):
        left[0] -= str(target).endswith(".safetensors")
        if left[0] == 0 and how == "in":
            os.truncate(source, os.path.getsize(source) // 2)
        if left[0] == 0 and how != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly


def main(folder: str | None = None, in_writes: str = "30", at_random: str = "170") -> None:
    torch.set_num_threads(1)
    root = Path(folder or tempfile.mkdtemp())
    models, data = new_models(SMALL, seed=1), make_data(root / "data")
    assert models.tokenizer is not None  # built before the forks
    whole, broken = (replace(CONFIG, data=str(data), out=str(root / name), cache=str(root / f"cache {name}"))
                     for name in ("whole", "broken"))
    started = time.monotonic()
    _, status = os.waitpid(start(whole, models), 0)
    assert status == 0, status
    length, rng, ends = time.monotonic() - started, random.Random(0), Counter()

    kills = ["write"] * int(in_writes) + ["random"] * int(at_random)
    rng.shuffle(kills)
    while kills:
        kind = kills[-1]
        if (root / "broken" / f"{CONFIG.name}.safetensors").exists():  # it was done: again from the start
            check(root)
            os.rename(root / "broken", root / f"done {ends['run done']}")
            ends["run done"] += 1
        if kind == "write":
            n, how = rng.randint(1, 4), rng.choice(["before", "in", "after"])
            pid = start(broken, models, lambda n=n, how=how: die_in_write(n, how))
        else:
            pid = start(broken, models)
            time.sleep(rng.uniform(0, length / 3))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or status == 0, (kind, status)
        if os.WIFSIGNALED(status):
            ends[f"killed, {kind}"] += 1
            kills.pop()
    _, status = os.waitpid(start(broken, models), 0)
    assert status == 0, status
    check(root)
    print(", ".join(f"{n} {what}" for what, n in sorted(ends.items())), "- all files are those of an unbroken run")


def check(root: Path) -> None:
    """The files of both runs are the same, bit for bit, but for what names the folder, and the plot."""
    whole, broken = ({file: content for file, content in files(root / name).items() if not file.endswith((".png", ".sd-tmp"))}
                     for name in ("whole", "broken"))
    assert whole.keys() == broken.keys(), whole.keys() ^ broken.keys()
    for name, content in whole.items():
        assert broken[name] == content, name


if __name__ == "__main__":
    main(*sys.argv[1:])
