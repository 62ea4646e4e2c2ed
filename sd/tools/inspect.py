"""Describe a file: a checkpoint, a LoRA, an embedding, or a picture with its generation parameters."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd.adapters.kinds import needs_base
from sd.adapters.weights import LoRAFormatError
from sd.checkpoints.lora_inside import EMBEDDED, embedded_loras, split_embedded
from sd.checkpoints.names import FOLDERS, guess_checkpoint, ldm_facts, model_names
from sd.checkpoints.reader import config_of_file
from sd.config import CONFIG_KEY
from sd.files.folder import read_diffusers_folder
from sd.files.hashes import lora_hash, model_hash
from sd.files.tensor_file import CheckpointError, TensorFile, all_finite
from sd.files.tensors import read_tensors, sniff
from sd.lora_files.embedding_files import words_in
from sd.lora_files.read import LoRAFile, open_lora, tag_counts
from sd.lora_files.spellings import guess_file, looks_like_lora
from sd.pictures.image_io import PICTURE_FORMATS, read_parameters
from sd.prompts.learned_words import EmbeddingError
from sd.tools.base import Base, fit, load_base, load_lora_file


def inspect_file(path: str | os.PathLike, base: str | os.PathLike | None = None, *, verify: bool = False) -> dict[str, Any]:
    """Facts about a file, a diffusers folder or a PEFT folder. `base`: a checkpoint whose weights a LoRA is compared with.

    `verify`: raise LoRAFormatError for a LoRA with a tensor that does not fit its base; otherwise the facts say why.
    Raises CheckpointError, ImageError.
    """
    path = Path(path)
    if not path.is_dir() and path.suffix.lower() in PICTURE_FORMATS and sniff(path).startswith("a "):
        return {"kind": "picture", "parameters": read_parameters(path)}
    if path.is_dir() and ((path / "model_index.json").exists() or not _is_lora_folder(path)):
        folder = read_diffusers_folder(path)
        parts = {name or "weights": _tensors(file) for name, file in folder.components.items()}
        return {"kind": "diffusers folder", "components": parts, "configs": sorted(folder.configs)}
    file = open_lora(path)[0] if path.is_dir() else read_tensors(path)
    file, inside = split_embedded(file)
    if not inside and looks_like_lora(file):
        return _lora(path, file, None if base is None else load_base(base), verify)
    if not inside and len(file) < 100:  # an embedding file never has as many, and a checkpoint always more
        with suppress(EmbeddingError):
            words = _words(words_in(file, path.stem, str(path)))
            return {"kind": "embedding", **_tensors(file), "words": words, **_metadata(file)}
    if verify:
        raise LoRAFormatError(f"{path}: is not a LoRA ({guess_checkpoint(file)}); only a LoRA can be verified")
    facts = {"kind": "checkpoint", **_tensors(file), "hash": model_hash(path)}
    if CONFIG_KEY in file.metadata:
        facts["config"] = config_of_file(file).to_dict()
    else:
        facts |= {"UNet": ldm_facts(file.shapes)} if ldm_facts(file.shapes) else {"seems": guess_checkpoint(file)}
    if inside:
        loras = embedded_loras(inside, model_names(config_of_file(file)))
        facts["LoRAs inside"] = {lora.name: f"multiplier {lora.multiplier:g}, {len(lora.tensors)} tensors" for lora in loras}
    return facts | _metadata(file)


def _words(words: Mapping[str, Tensor]) -> dict[str, str]:
    return {word: f"{vectors[..., 0].numel()} vectors of width {vectors.shape[-1]}" for word, vectors in words.items()}


def _is_lora_folder(path: Path) -> bool:
    try:
        return bool(open_lora(path)[0])
    except CheckpointError:
        return False


def _lora(path: Path, file: TensorFile, base: Base | None, verify: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": "LoRA", **_tensors(file), **({} if path.is_dir() else {"hash": lora_hash(path)})}
    try:
        lora, base = load_lora_file(path, base, words=True)
    except LoRAFormatError as error:
        if verify:
            raise
        return facts | {"seems": guess_file(file), "problem": str(error)} | _metadata(file)
    state = lora.state
    facts |= {"format": lora.format, "base": lora.base or "not named", "fits": base.config.name}
    facts["modules"] = dict(Counter(FOLDERS[p.split(".")[0]] for p in state))
    facts["targets"] = dict(Counter(_target(p) for p in state))
    facts["kinds"] = dict(Counter(w.kind + (" with DoRA" if "magnitude" in w.tensors else "") for w in state.values()))
    facts["ranks"] = _counts(w.rank for w in state.values())
    facts["alphas"] = _counts(w.alpha for w in state.values())
    facts["norms"] = block_norms(lora, base)
    facts |= {"learned words": _words(lora.words)} if lora.words else {}
    facts["trigger words"] = lora.trigger_words
    tags = tag_counts(lora.metadata)
    facts |= {"trained tags": dict(list(tags.items())[:20])} if tags else {}
    return facts | _metadata(file)


def block_norms(lora: LoRAFile, base: Base) -> dict[str, dict[str, float]]:
    """Block -> Frobenius norm of its ΔW and, if the base's weights are known, the ratio to the weights' norm.

    Without them, modules whose ΔW depends on the weights are left out and counted as "modules without weights".
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    left_out: Counter[str] = Counter()
    for path, weights in lora.state.items():
        adapter = fit(weights, base.layers[path])
        block = block_of(path)
        if base.models is None and needs_base(weights):
            left_out[block] += 1
            continue
        W = torch.zeros(base.layers[path].weight) if base.models is None else base.weight(path)
        with torch.no_grad():
            sums[block][0] += adapter.effective_delta(W).double().square().sum().item()
        sums[block][1] += W.double().square().sum().item()
    norms = {}
    for block in sorted({*sums, *left_out}, key=_block_order):
        norms[block] = {"norm": round(math.sqrt(sums[block][0]), 4)}
        if base.models is not None:
            norms[block]["of the weights"] = round(math.sqrt(sums[block][0] / sums[block][1]), 5) if sums[block][1] else 0.0
        if left_out[block]:
            norms[block]["modules without weights"] = left_out[block]
    return norms


def block_of(path: str) -> str:
    """The block of a module in diffusers coordinates: "unet.down_blocks.1", "unet.mid_block", "text_encoder.layers.3"."""
    component, *parts = path.split(".")
    n = 2 if parts[0] in ("down_blocks", "up_blocks", "layers") else 1
    return ".".join([FOLDERS[component], *parts[:n]])


def _block_order(block: str) -> tuple:
    order = ("text_encoder", "conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks")
    rank = next((i for i, name in enumerate(order) if name in block), len(order))
    return rank, [(len(part), part) for part in block.split(".")]


def _target(path: str) -> str:
    """The part of a module's path that names the layer within its block: "attn1.q_proj", "ff.fc1", "resnets.conv1"."""
    parts = [part for part in path.split(".")[1:] if not part.isdigit()]
    return ".".join(parts[-2:])


def _counts(values) -> dict[str, int]:
    found = Counter(f"{value:g}" for value in values if value is not None)
    return dict(sorted(found.items(), key=lambda item: float(item[0])))


def _tensors(file: TensorFile) -> dict[str, Any]:
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in file.values())
    bad = sum(not all_finite(t) for t in file.values())
    return {"tensors": len(file), "parameters": sum(math.prod(s) for s in file.shapes.values()), "dtypes": dict(dtypes),
            **({"tensors with NaN or infinity": bad} if bad else {})}


def _metadata(file: TensorFile) -> dict[str, Any]:
    shown = {k: v if len(v) <= 300 else f"{v[:300]}... ({len(v)} characters)" for k, v in file.metadata.items()}
    for ours in (CONFIG_KEY, EMBEDDED):
        shown.pop(ours, None)
    return {"metadata": dict(sorted(shown.items()))} if shown else {}


def as_text(path: str | os.PathLike, facts: Mapping) -> str:
    """Format the facts for reading: one line each, counts in a row, norms as bars."""
    lines = [f"{path}: {facts['kind']}"]
    for key, value in facts.items():
        if key == "norms":
            lines.append("  norms of the change, by block:")
            longest = max((row["norm"] for row in value.values()), default=0) or 1
            for block, row in value.items():
                share = f"  {100 * row['of the weights']:.2f} % of the weights" if "of the weights" in row else ""
                more = f"  ({row['modules without weights']} modules need the base: --model)" \
                    if "modules without weights" in row else ""
                bar = "#" * round(24 * row["norm"] / longest)
                lines.append(f"    {block:24}{row['norm']:10.4g}  {bar:24}{share}{more}".rstrip())
        elif isinstance(value, Mapping) and value and (key in ("metadata", "parameters", "config") or
                                                       any(isinstance(v, (Mapping, list)) for v in value.values())):
            lines.append(f"  {key}:")
            lines += [f"    {k}: {v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in value.items()]
        elif isinstance(value, Mapping):
            lines.append(f"  {key}: " + (", ".join(f"{k} ({v})" for k, v in value.items()) or "none"))
        elif isinstance(value, list):
            lines.append(f"  {key}: " + (", ".join(map(str, value)) or "none"))
        elif key != "kind":
            lines.append(f"  {key}: {f'{value:,}' if isinstance(value, int) else value}")
    return "\n".join(lines)
