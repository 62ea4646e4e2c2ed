"""A LoRA file in another format. What the format cannot hold is an error, or on request a low rank in its place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from sd.adapters.kinds import needs_base
from sd.adapters.weights import AdapterWeights, LoRAFormatError
from sd.config import CONFIG_KEY, SD15
from sd.files.atomic import keep_sources
from sd.lora_files.write import NAMELESS, check_format, refusals, write_lora
from sd.tools.base import Base, fit, load_base, load_lora_file
from sd.tools.decompose import Approximation, RankRule, Report, approximate


@dataclass
class Converted:
    """What became of a file. `approximated`: the modules that a low rank stands for, with its error."""

    source_format: str
    format: str
    modules: int
    approximated: Report = field(default_factory=Report)
    skipped: list[str] = field(default_factory=list)  # keys of the source that `skip` left out

    def __str__(self) -> str:
        text = f"{self.source_format} -> {self.format}, {self.modules} modules"
        if self.approximated.modules:
            text += f"; approximated: {self.approximated}"
        return text + (f"; {len(self.skipped)} tensors skipped as asked" if self.skipped else "")


def convert(source: str | os.PathLike, target: str | os.PathLike, *, format: str, dtype: torch.dtype | None = None,
            approximate: int | None = None, base: str | os.PathLike | None = None, skip: str | None = None) -> Converted:
    """Write the LoRA `source`, of any program, as `target` in one of FORMATS; its metadata and every alpha survive.

    `approximate`: the rank of the LoRA, by truncated SVD of ΔW, that stands for a module of a kind that the format cannot
    hold. `base`: the checkpoint that the LoRA is for; needed where the source does not say of what family it is, and to
    approximate kinds whose ΔW depends on the base's weight. `skip`: as in `read_lora`. Raises LoRAFormatError.
    """
    keep_sources(target, source)
    found, model = load_lora_file(source, None if base is None else load_base(base), skip=skip)
    state, report = found.state, Report()
    if approximate is None:
        check_format(state, model.modules, format)
    else:
        state, report = approximated(state, model, format, RankRule(approximate))
    changed = report.modules or found.skipped
    kept = {key: value for key, value in found.metadata.items() if not (changed and key.startswith("ss_network_"))}
    if model.config != SD15 and base is not None:  # else the file would be taken for one of SD 1.x
        kept = {CONFIG_KEY: json.dumps(model.config.to_dict())} | kept
    write_lora(target, state, model.modules, format=format, dtype=dtype, metadata=kept)
    return Converted(found.format, format, len(state), report, found.skipped)


def approximated(state: Mapping[str, AdapterWeights], base: Base, format: str,
                 rule: RankRule) -> tuple[dict[str, AdapterWeights], Report]:
    """`state` with the best low rank for each module that `format` cannot hold. Raises LoRAFormatError where none can stand."""
    state, report = dict(state), Report()
    while refused := refusals(state, base.modules, format):  # again, since PEFT's switches are for a whole network
        for path, what in refused.items():
            flat = len(base.layers[path].weight) < 2 or state[path].tensors.keys() == {"diff_b"}
            if path in report.modules or what == NAMELESS or flat:
                raise LoRAFormatError(f"{format} cannot hold {path}, {what}, and a low rank cannot stand for it; "
                                      f"leave it out with skip")
            state[path], report.modules[path] = _low_rank(path, state[path], base, rule)
    return state, report


def _low_rank(path: str, weights: AdapterWeights, base: Base, rule: RankRule) -> tuple[AdapterWeights, Approximation]:
    shape = base.layers[path]
    W = base.weight(path) if needs_base(weights) else torch.zeros(shape.weight)
    delta = fit(weights, shape).effective_delta(W).detach()
    dtype = next(t.dtype for t in weights.tensors.values() if t.is_floating_point())
    bias = {name: tensor for name, tensor in weights.tensors.items() if name == "diff_b"}
    low, found = approximate(delta, rule, embedding=shape.embedding, dtype=dtype, **bias)
    return low, found._replace(old_rank=weights.rank)
