"""Build CLIP's data/vocab.json and data/merges.txt from the BPE file in the open-clip-torch wheel.

    pip download --no-deps --only-binary :all: -d /tmp/wheels open-clip-torch
    python -m recipes.clip_vocab /tmp/wheels/open_clip_torch-*.whl
"""

import gzip
import hashlib
import json
import sys
import zipfile
from pathlib import Path

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48_894  # CLIP uses the first 49,152 - 256 - 2 of the file's 262,144
MERGES_SHA256 = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def byte_symbols() -> list[str]:
    """A printable character for each byte, in the order of the vocabulary, as in GPT-2.

    Bytes that are printable in Latin-1 represent themselves; the other 68 follow as code points from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Token -> id: bytes, bytes at the end of a word, one token per merge, start and end."""
    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + [m.replace(" ", "") for m in merges]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def main(wheel: str, folder: str = "data") -> None:
    """Read the BPE file from the wheel and write both files; raises SystemExit if it is not CLIP's."""
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith("/" + BPE_FILE))
        lines = gzip.decompress(archive.read(member)).decode("utf-8").split("\n")
    merges = lines[1:MERGES + 1]
    text = "\n".join(["#version: 0.2", *merges, ""]).encode("utf-8")
    vocab = vocabulary(merges)
    if hashlib.sha256(text).hexdigest() != MERGES_SHA256 or len(vocab) != 49_408:
        raise SystemExit(f"{wheel}: its {member} is not the BPE file of CLIP")
    Path(folder, "merges.txt").write_bytes(text)
    Path(folder, "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    print(f"{folder}/merges.txt: {len(merges):,} merges; {folder}/vocab.json: {len(vocab):,} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
