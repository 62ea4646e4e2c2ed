"""A LoRA of another rank: each module's ΔW approximated by the rank that one rule chooses."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from sd.adapters.weights import AdapterWeights, LoRAError
from sd.files.atomic import keep_sources
from sd.lora_files.header import lora_metadata
from sd.lora_files.write import write_lora
from sd.tools.base import load_base, load_lora_file
from sd.tools.decompose import Approximation, RankRule, Report, flat_factors, lora_weights, store, svd_of_product

MODIFIERS = ("magnitude", "diff_b")  # tensors that any kind may have; they have no rank and stay as they are


def resize(state: Mapping[str, AdapterWeights], *, rank: int | None = None, ratio: float | None = None,
           threshold: float | None = None, cumulative: float | None = None, frobenius: float | None = None,
           max_rank: int | None = None, skip: bool = False) -> tuple[dict[str, AdapterWeights], Report]:
    """The best approximation of every module's ΔW by the rank that exactly one rule of `RankRule` chooses.

    Each module keeps its scale alpha / rank. A rank is never raised: a module that is to keep its rank, or more, stays
    as it is, and so do full differences, DoRA magnitudes and biases; the error of a DoRA module is that of its ΔW.
    Raises LoRAError for a module of another kind, unless `skip`: then it stays as it is.
    """
    rule = RankRule(rank, ratio, threshold, cumulative, frobenius, max_rank)
    resized, report = {}, Report()
    for path, weights in state.items():
        if weights.kind != "lora":
            if weights.kind != "full" and not skip:
                raise LoRAError(f"{path} is of the kind {weights.kind}, which cannot be resized; only lora can. "
                                f"Leave such modules as they are with skip")
            resized[path] = weights
            continue
        up, down, inner = flat_factors(weights, path)
        scale = weights.alpha / weights.rank
        found = svd_of_product(up, down, rule)
        new = found.down.shape[0]
        if new >= weights.rank:
            resized[path], new, error = weights, weights.rank, 0.0
        else:
            kept = {name: weights.tensors[name] for name in MODIFIERS if name in weights.tensors}
            resized[path], error = lora_weights(found.up, found.down, inner, scale, **kept), found.error if scale else 0.0
        report.modules[path] = Approximation(new, abs(scale) * found.norm, error, weights.rank)
    return resized, report


def resize_file(source: str | os.PathLike, out: str | os.PathLike, *, rank: int | None = None, ratio: float | None = None,
                threshold: float | None = None, cumulative: float | None = None, frobenius: float | None = None,
                max_rank: int | None = None, skip: bool = False, format: str = "kohya",
                dtype: torch.dtype | None = None, base: str | os.PathLike | None = None) -> Report:
    """`resize` on a file of any program; its metadata goes along. `dtype` None: each module keeps that of the source.

    `base`: the checkpoint that it is for, where the file does not say of what family it is.
    """
    keep_sources(out, source)
    file, base = load_lora_file(source, None if base is None else load_base(base))
    state, report = resize(file.state, rank=rank, ratio=ratio, threshold=threshold, cumulative=cumulative,
                           frobenius=frobenius, max_rank=max_rank, skip=skip)
    if dtype is None:
        dtype = {path: file.state[path].tensors["down"].dtype for path, w in state.items() if w is not file.state[path]}
    state = store(state, dtype, report)
    told = {key: value for key, value in file.metadata.items() if not key.startswith("ss_network_")}
    write_lora(out, state, base.modules, format=format, metadata=lora_metadata(state, base.config) | told)
    return report
