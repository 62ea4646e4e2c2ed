"""Reads embedding files (learned words) of any program, and writes them. Facts: docs/lora-formats.md."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from sd.checkpoints.names import guess_checkpoint
from sd.files.tensor_file import CheckpointError, all_finite
from sd.files.tensors import read_tensors, write_tensors
from sd.prompts.learned_words import EmbeddingError

# Keys of the only tensor in files that do not name the word, which is then the file's name: of A1111 (and LDM), kohya,
# ComfyUI and diffusers' training scripts, and of a bare tensor.
NAMELESS = re.compile(r"string_to_param\.[^.]*|emb_params|clip_l|0")
UNUSED = re.compile(r"string_to_token\.[^.]*")  # the word's token id during its training
OTHER_ENCODERS = re.compile(r"clip_[gh]|t5(xxl)?|text_encoders?_[1-9]")
FOLDER_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")


def read_embeddings(path: str | os.PathLike, word: str | None = None) -> dict[str, Tensor]:
    """Read {word: vectors, [k, D] or [D]} from an embedding file or folder of any program.

    Reads .pt of A1111 and LDM, kohya's and ComfyUI's .safetensors, and diffusers' `learned_embeds`; no file can run code.
    If the file does not name the word, its own name is used. `word` overrides both.
    Raises CheckpointError for a file that holds no tensors, EmbeddingError for one that holds no word.
    """
    path = Path(path)
    if path.is_dir():
        inside = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if inside is None:
            raise CheckpointError(f"{path}: is a folder without an embedding in it; looked for {' and '.join(FOLDER_FILES)}")
        path = inside
    file = read_tensors(path)
    words = words_in(file, path.stem, str(path))
    if word is not None and len(words) > 1:
        raise EmbeddingError(f"{path}: holds {len(words)} words, {', '.join(map(repr, words))}; they cannot all be {word!r}")
    return words if word is None else {word: next(iter(words.values()))}


def words_in(tensors: Mapping[str, Tensor], name: str, where: str) -> dict[str, Tensor]:
    """The words in the tensors of one file; `name`: the word if no key names it. Raises EmbeddingError."""
    found = {key: tensor for key, tensor in tensors.items() if not UNUSED.fullmatch(key)}
    others = [key for key in found if OTHER_ENCODERS.fullmatch(key)]
    if others:
        raise EmbeddingError(f"{where}: the word {name!r} is for a model with several text encoders, such as SDXL: it has "
                             f"vectors for {others[0]}")
    nameless = [key for key in found if NAMELESS.fullmatch(key)]
    if len(found) == 1 and nameless:
        return {name: found[nameless[0]]}
    odd = nameless or [key for key, t in found.items() if t.dim() not in (1, 2) or len(found) > 1 and "." in key]
    if odd or not found:
        raise EmbeddingError(f"{where}: holds no learned word: its {len(tensors)} tensors are not those of an embedding; "
                             f"{guess_checkpoint(tensors)}")
    return found


def beside_lora(folder: Path) -> Iterator[Path]:
    """The embedding files in the folder of a LoRA, which diffusers' scripts name NAME_emb.safetensors."""
    yield from sorted(folder.glob("*_emb.safetensors"))
    yield from (folder / name for name in FOLDER_FILES if (folder / name).is_file())


def write_embedding(path: str | os.PathLike, word: str, vectors: Tensor, metadata: Mapping[str, str] | None = None) -> None:
    """Write {word: vectors} as safetensors, or with torch.save to a path ending in .pt: the form that all programs read.

    A1111, ComfyUI and kohya take the word from the file's name, diffusers from its key. Raises EmbeddingError.
    """
    if Path(path).suffix.lower() not in (".safetensors", ".pt"):
        raise EmbeddingError(f"{path}: embeddings are written as .safetensors or .pt")
    if not all_finite(vectors):
        raise EmbeddingError(f"the word {word!r} holds values that are not finite in "
                             f"{str(vectors.dtype).removeprefix('torch.')}, so it is not written")
    write_tensors(path, {word: vectors}, dict(metadata or {}))
