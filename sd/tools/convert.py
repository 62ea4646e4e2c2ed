"""Convert a LoRA file to another format. Modules that the format cannot express are an error, or approximated on request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sd.adapters.kinds import needs_base
from sd.adapters.weights import AdapterWeights, LoRAFormatError
from sd.config import CONFIG_KEY, SD15
from sd.files.tensors import keep_sources
from sd.lora_files.write import UNNAMED, check_format, refusals, write_lora
from sd.tools.base import Base, fit, load_base, load_lora_file
from sd.tools.decompose import Approximation, RankRule, Report, approximate


@dataclass
class Converted:
    """Report on a conversion. `approximated`: the modules replaced by a low-rank approximation, with the errors."""

    source_format: str
    format: str
    modules: int
    approximated: Report = field(default_factory=Report)
    skipped: list[str] = field(default_factory=list)  # keys left out by `skip`

    def __str__(self) -> str:
        text = f"{self.source_format} -> {self.format}, {self.modules} modules"
        if self.approximated.modules:
            text += f"; approximated: {self.approximated}"
        return text + (f"; {len(self.skipped)} tensors skipped as asked" if self.skipped else "")


def convert(source: str | os.PathLike, target: str | os.PathLike, *, format: str, dtype: torch.dtype | None = None,
            approximate: int | None = None, base: str | os.PathLike | None = None, skip: str | None = None) -> Converted:
    """Write the LoRA `source`, from any program, as `target` in one of FORMATS, keeping its metadata and every alpha.

    `approximate`: rank of the LoRA (truncated SVD of ΔW) that replaces a module of a kind that the format cannot express.
    `base`: the checkpoint that the LoRA is for; needed if the source does not name its model family, and to approximate
    kinds whose ΔW depends on the base's weight. `skip`: as in `read_lora`. Raises LoRAFormatError.
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
    if model.config != SD15 and base is not None:  # otherwise the file would pass for one of SD 1.x
        kept = {CONFIG_KEY: json.dumps(model.config.to_dict())} | kept
    write_lora(target, state, model.modules, format=format, dtype=dtype, metadata=kept)
    return Converted(found.format, format, len(state), report, found.skipped)


def approximated(state: Mapping[str, AdapterWeights], base: Base, format: str,
                 rule: RankRule) -> tuple[dict[str, AdapterWeights], Report]:
    """`state` with each module that `format` cannot express replaced by its best low-rank approximation.

    Raises LoRAFormatError for a module that has none.
    """
    state, report = dict(state), Report()
    while refused := refusals(state, base.modules, format):  # repeat: PEFT's switches are per network, so new ones appear
        for path, what in refused.items():
            flat = len(base.layers[path].weight) < 2 or state[path].tensors.keys() == {"diff_b"}
            if path in report.modules or what == UNNAMED or flat:
                raise LoRAFormatError(f"{format} cannot hold {path}, {what}, and a low rank cannot approximate it; "
                                      f"leave it out with skip")
            state[path], report.modules[path] = _low_rank(path, state[path], base, rule)
    return state, report


def _low_rank(path: str, weights: AdapterWeights, base: Base, rule: RankRule) -> tuple[AdapterWeights, Approximation]:
    shape = base.layers[path]
    W = base.weight(path) if needs_base(weights) else torch.zeros(shape.weight)
    delta = fit(weights, shape).effective_delta(W).detach()
    dtype = next(t.dtype for t in weights.tensors.values() if t.is_floating_point())
    bias: dict[str, Any] = {name: tensor for name, tensor in weights.tensors.items() if name == "diff_b"}
    low, found = approximate(delta, rule, embedding=shape.embedding, dtype=dtype, **bias)
    return low, found._replace(old_rank=weights.rank)
