"""Resize a LoRA: approximate each module's ΔW at the rank that a rule chooses."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from sd.adapters.adapter import MODIFIERS
from sd.adapters.weights import AdapterWeights, LoRAError
from sd.files.tensors import keep_sources
from sd.lora_files.header import lora_metadata
from sd.lora_files.write import write_lora
from sd.tools.base import load_base, load_lora_file
from sd.tools.decompose import (
    Approximation,
    RankRule,
    Report,
    alpha_and_rank,
    flat_factors,
    lora_weights,
    store,
    svd_of_product,
)


def resize(state: Mapping[str, AdapterWeights], *, rank: int | None = None, ratio: float | None = None,
           threshold: float | None = None, cumulative: float | None = None, frobenius: float | None = None,
           max_rank: int | None = None, skip: bool = False) -> tuple[dict[str, AdapterWeights], Report]:
    """The best approximation of every module's ΔW at the rank that one rule of `RankRule` chooses.

    Each module keeps its scale alpha / rank. Ranks are never raised: a module whose rank is not above the chosen one is
    unchanged, and so are full differences, DoRA magnitudes and biases; the error of a DoRA module is that of its ΔW.
    Raises LoRAError for a module of another kind, or with `skip` leaves it unchanged.
    """
    rule = RankRule(rank, ratio, threshold, cumulative, frobenius, max_rank)
    resized: dict[str, AdapterWeights] = {}
    report = Report()
    for path, weights in state.items():
        if weights.kind != "lora":
            if weights.kind != "full" and not skip:
                raise LoRAError(f"{path} is of the kind {weights.kind}, which cannot be resized; only lora can. "
                                f"Leave such modules as they are with skip")
            resized[path] = weights
            continue
        up, down, inner = flat_factors(weights, path)
        alpha, old = alpha_and_rank(weights)
        scale = alpha / old
        found = svd_of_product(up, down, rule)
        new = found.down.shape[0]
        if new >= old:
            resized[path], new, error = weights, old, 0.0
        else:
            kept = {name: weights.tensors[name] for name in MODIFIERS if name in weights.tensors}
            resized[path], error = lora_weights(found.up, found.down, inner, scale, **kept), found.error if scale else 0.0
        report.modules[path] = Approximation(new, abs(scale) * found.norm, error, old)
    return resized, report


def resize_file(source: str | os.PathLike, out: str | os.PathLike, *, rank: int | None = None, ratio: float | None = None,
                threshold: float | None = None, cumulative: float | None = None, frobenius: float | None = None,
                max_rank: int | None = None, skip: bool = False, format: str = "kohya",
                dtype: torch.dtype | None = None, base: str | os.PathLike | None = None) -> Report:
    """`resize` a file of any program, keeping its metadata. `dtype` None: each module keeps its own.

    `base`: the checkpoint that the LoRA is for; needed if the file does not name its model family.
    """
    keep_sources(out, source)
    file, model = load_lora_file(source, None if base is None else load_base(base))
    state, report = resize(file.state, rank=rank, ratio=ratio, threshold=threshold, cumulative=cumulative,
                           frobenius=frobenius, max_rank=max_rank, skip=skip)
    before = {path: file.state[path].tensors["down"].dtype for path, w in state.items() if w is not file.state[path]}
    state = store(state, before if dtype is None else dtype, report)
    kept = {key: value for key, value in file.metadata.items() if not key.startswith("ss_network_")}
    write_lora(out, state, model.modules, format=format, metadata=lora_metadata(state, model.config) | kept)
    return report
