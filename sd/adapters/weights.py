"""One weight change as plain data, the shape of its layer, and the errors raised when the two do not fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from sd.errors import SDError


class LoRAError(SDError):
    """A LoRA that cannot be attached or used as asked; the message names it and what exists."""


class LoRAFormatError(LoRAError):
    """A LoRA file that cannot be read or written as asked; the message names the offending entries."""


@dataclass
class AdapterWeights:
    """The tensors of one adapter under its kind's own names. alpha None: the kind has no scale."""

    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None for kinds without one."""
        from sd.adapters.kinds import KINDS  # here, since the kinds import this file
        return KINDS[self.kind].rank_of(self.tensors)


class LayerShape(NamedTuple):
    """All that an adapter needs to know about its layer."""

    weight: tuple[int, ...]
    groups: int = 1
    embedding: bool = False

    @property
    def has_kernel(self) -> bool:
        return any(n != 1 for n in self.weight[2:])

    @property
    def fan_in(self) -> int:
        return self.weight[0] if self.embedding else math.prod(self.weight[1:])

    @property
    def fan_out(self) -> int:
        return self.weight[1] if self.embedding else self.weight[0]
