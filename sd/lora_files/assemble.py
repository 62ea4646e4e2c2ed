"""Assembles a LoRA file's entries into the canonical form, {module path: AdapterWeights}, and checks them.

The readers in modern.py and legacy.py yield the entries. No tensor is skipped silently: one that is not used is named in an
error, unless `skip` matches it. Facts: docs/lora-formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd.adapters.kinds import KINDS
from sd.adapters.low_rank import Full
from sd.adapters.weights import AdapterWeights, LoRAFormatError
from sd.files.tensor_file import all_finite
from sd.lora_files.embedding_files import words_in
from sd.lora_files.modules import Modules
from sd.lora_files.spellings import (
    FLAG_TENSORS,
    IGNORED,
    MODIFIER_TENSORS,
    SCALES,
    SPARSE,
    TENSORS,
    TOKEN,
    UP_BIAS,
    Entry,
    guess_clause,
)
from sd.prompts.learned_words import EmbeddingError


@dataclass
class Assembled:
    """The result of `assemble`."""

    state: dict[str, AdapterWeights]
    used: set[str]  # keys of the file, as in `skipped`
    skipped: set[str]
    words: dict[str, Tensor] = field(default_factory=dict)  # learned word -> its vectors


def assemble(entries: Iterable[Entry], strange: Iterable[str], modules: Modules, where: str, *, skip: str | None = None,
             tensors: Mapping[str, Tensor] | None = None, words: bool = False) -> Assembled:
    """Entries to {module path: AdapterWeights}. Every entry is used, matches `skip`, or raises LoRAFormatError.

    `strange`: keys that the reader did not understand. `tensors`: the whole file, for messages. `skip`: a regular expression,
    searched for in the file's keys and in our module paths. `words`: whether to accept learned words of the prompt.
    """
    try:
        leave = re.compile(skip) if skip else None
    except re.error as error:
        raise LoRAFormatError(f"skip={skip!r} is not a regular expression: {error}") from None
    skipped = {key for key in strange if leave and leave.search(key)}
    strange = [key for key in strange if key not in skipped]
    if strange:
        raise LoRAFormatError(f"{where}: {len(strange)} of {len(tensors or strange)} tensors are not understood, "
                              f"first: {strange[0]!r}{guess_clause(tensors)}")
    parts: dict[str, dict[str, Tensor]] = {}
    spelled: dict[str, str] = {}
    learned: dict[str, dict[str, Tensor]] = {}
    unknown, used = [], set()
    for key, module, tail, tensor in entries:
        path = modules.find(module)
        if leave and (leave.search(key) or leave.search(module) or path and leave.search(path)):
            skipped.add(key)
            continue
        if tail == IGNORED:
            used.add(key)
        elif tail == TOKEN and words:
            learned.setdefault(module, {})[key.removeprefix(f"bundle_emb.{module}.")] = tensor
            used.add(key)
        elif tail == TOKEN:
            raise LoRAFormatError(f"{where}: it holds the learned word {module!r}, an embedding of the prompt, not a LoRA; "
                                  f"there is no place here for it; skip={'^' + re.escape(module)!r} leaves it out")
        elif path is None:
            unknown.append(module)
        elif spelled.setdefault(path, module) != module:
            raise LoRAFormatError(f"{where}: {module!r} is a second LoRA for {path}; the file spells it twice "
                                  f"(also as {spelled[path]!r})")
        elif tail in parts.setdefault(path, {}):
            raise LoRAFormatError(f"{where}: {module} has two tensors {tail}, such as {key!r}; if the file holds several "
                                  f"adapters, skip all but one by name")
        else:
            parts[path][tail] = tensor
            used.add(key)
    if unknown:
        names = sorted(set(unknown))
        raise LoRAFormatError(f"{where}: {len(names)} of {len(names) + len(parts)} LoRA modules are unknown to this model, "
                              f"first: {names[0]!r}{guess_clause(tensors)}")
    state = {path: _weights(spelled[path], found, modules.shapes.get(path), where) for path, found in parts.items()}
    for path, weights in state.items():
        if "magnitude" in weights.tensors and path in modules.shapes:
            weights.tensors["magnitude"] = _like_weight(weights.tensors["magnitude"], len(modules.shapes[path]),
                                                        path in modules.embeddings)
    vectors = {word: _vectors(word, found, where) for word, found in learned.items()}
    return Assembled(state, used - {""}, skipped - {""}, vectors)


def _vectors(word: str, found: Mapping[str, Tensor], where: str) -> Tensor:
    try:
        vectors = list(words_in(found, word, where).values())
    except EmbeddingError as error:
        raise LoRAFormatError(str(error)) from None
    if len(vectors) != 1:
        raise LoRAFormatError(f"{where}: the learned word {word!r} has {len(vectors)} tensors: {', '.join(found)}")
    return vectors[0]


def _weights(module: str, found: dict[str, Tensor], shape: tuple[int, ...] | None, where: str) -> AdapterWeights:
    for tail, tensor in found.items():
        if tensor.is_complex():
            raise LoRAFormatError(f"{where}: {module}.{tail} holds complex numbers; real ones are expected")
        if not all_finite(tensor):
            raise LoRAFormatError(f"{where}: {module}.{tail} holds values that are not finite (NaN or infinity)")
        if not tensor.numel() or tensor.dim() == 0 and tail not in (*SCALES, *FLAG_TENSORS):
            raise LoRAFormatError(f"{where}: {module}.{tail} has shape {list(tensor.shape)}, which fits no layer")
    kinds = sorted({TENSORS[tail][0] for tail in found if tail in TENSORS})
    if not kinds and {"diff_b", "b_norm"} & found.keys():
        kinds = [Full.kind]
    if len(kinds) != 1:
        has = " and ".join(kinds) or "only " + ", ".join(sorted(found))
        raise LoRAFormatError(f"{where}: {module} is not an adapter of one kind: it has {has}")
    own = {TENSORS[t][1]: v for t, v in found.items() if t in TENSORS}
    weights = AdapterWeights(KINDS[kinds[0]].kind_of(own), own)
    if missing := KINDS[weights.kind].missing(own):
        raise LoRAFormatError(f"{where}: {module} is half a pair: {', '.join(sorted(found))} without its {missing[0]}")
    for tail, name in MODIFIER_TENSORS.items():
        if tail in found:
            weights.tensors[name] = found[tail]
    weights.alpha = _alpha(module, weights, found, where)
    if UP_BIAS in found:
        bias, rank = found[UP_BIAS], weights.rank
        if weights.alpha is None or rank is None:
            raise LoRAFormatError(f"{where}: {module} has a {UP_BIAS}, whose scale is alpha / rank, but its kind "
                                  f"({weights.kind}) has no rank")
        scaled = bias.double() * (weights.alpha / rank)
        weights.tensors["diff_b"] = scaled.to(bias.dtype if bias.itemsize >= 4 else torch.float32)
    return _with_sparse(module, weights, found, shape, where) if set(SPARSE) & found.keys() else weights


def _like_weight(magnitude: Tensor, dims: int, embedding: bool) -> Tensor:
    """Give a magnitude as many dimensions as the weight; a flat one, as in PEFT, has one value per output."""
    if magnitude.dim() == 1 and embedding:
        return magnitude[None]
    return magnitude.reshape(*magnitude.shape, *(1,) * (dims - magnitude.dim()))


def _alpha(module: str, weights: AdapterWeights, found: Mapping[str, Tensor], where: str) -> float | None:
    for tail in SCALES:
        if tail in found and found[tail].numel() != 1:
            raise LoRAFormatError(f"{where}: {module}.{tail} has shape {list(found[tail].shape)}; one number is expected")
    value = {tail: float(found[tail]) for tail in SCALES if tail in found}
    rank, factor = weights.rank, value.get("scale", 1.0) * value.get("scalar", 1.0)
    if rank is None and factor != 1.0:
        tensors = KINDS[weights.kind].multiplied(weights.tensors, factor)
        if tensors is None:
            raise LoRAFormatError(f"{where}: {module} has a scale, but its kind ({weights.kind}) has none")
        weights.tensors = tensors
    if KINDS[weights.kind].bounded:  # alpha bounds the rotation instead of scaling
        return value.get("alpha") or None  # LyCORIS writes 0 for no bound
    if rank is None:  # LyCORIS writes an alpha for these kinds too, which no program reads
        return None
    # as in kohya, a missing alpha means alpha = rank
    alpha = value["scale"] * rank if "scale" in value else value.get("alpha", float(rank))
    alpha *= value.get("scalar", 1.0)
    if abs(alpha / rank) > torch.finfo(torch.float32).max:
        raise LoRAFormatError(f"{where}: {module} has the alpha {alpha:g}, which overflows fp32")
    return alpha


def _with_sparse(module: str, weights: AdapterWeights, found: Mapping[str, Tensor], shape, where: str) -> AdapterWeights:
    """A full difference from a low-rank pair plus a sparse residual, as LyCORIS extracts them."""
    missing = [tail for tail in SPARSE if tail not in found]
    if missing or weights.kind != "lora" or "mid" in weights.tensors or shape is None:
        raise LoRAFormatError(f"{where}: {module} has a sparse residual " + (f"without its {missing[0]}" if missing else
                              f"beside a {weights.kind} that is only read without one"))
    indices, values, size = (found[tail] for tail in SPARSE)
    try:
        rest = torch.sparse_coo_tensor(indices.long(), values.double(), tuple(size.tolist()), check_invariants=True).to_dense()
        down, up = (weights.tensors[name].double().flatten(1) for name in ("down", "up"))
        diff = (up @ down).reshape(shape) + rest.reshape(shape)
    except (RuntimeError, TypeError) as error:
        raise LoRAFormatError(f"{where}: {module}'s sparse residual does not fit the layer's {list(shape)}: "
                              f"{str(error).splitlines()[0]}") from None
    rank = weights.rank
    assert weights.alpha is not None and rank is not None  # every low-rank pair has both
    kept = {name: t for name, t in weights.tensors.items() if name not in ("down", "up")}
    return AdapterWeights("full", {"diff": (diff * (weights.alpha / rank)).float(), **kept})
