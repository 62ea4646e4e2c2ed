"""The active set: which adapters are on, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActiveSet:
    """Which adapters are on: name -> one multiplier, or one for each image of the batch; and the image of each row."""

    multipliers: dict[str, float | tuple[float, ...]]
    rows: tuple[int, ...] | None = None

    def __hash__(self) -> int:
        return hash((frozenset(self.multipliers.items()), self.rows))

    def only(self, names: Iterable[str]) -> ActiveSet:
        """Restrict the set to a layer's adapters, sorted by name, so that the order of loading does not matter."""
        names = tuple(names)
        return self if self._sorted and self.multipliers.keys() <= set(names) else _part(self, names)

    def times(self, factors: Mapping[str, float]) -> ActiveSet:
        """Scale every multiplier by its adapter's factor; a factor of 0 turns the adapter off."""
        if all(factor == 1 for factor in factors.values()):
            return self
        return ActiveSet({n: tuple(v * factors[n] for v in m) if isinstance(m, tuple) else m * factors[n]
                          for n, m in self.multipliers.items() if factors[n]}, self.rows)

    @cached_property
    def _sorted(self) -> bool:
        return list(self.multipliers) == sorted(self.multipliers)

    @cached_property
    def fingerprint(self) -> int:
        """A hash of 63 bits; Python's own is the same for -1.0 and -2.0."""
        digest = blake2b(repr((self.multipliers, self.rows)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    @cached_property
    def mark(self) -> Tensor:
        """The fingerprint as a tensor on the CPU, made once; `frombuffer`, since another constructor would give that of a
        tracing, a transform or a default device when the first forward happens to be inside one."""
        with torch.inference_mode(False):
            return torch.frombuffer(bytearray(self.fingerprint.to_bytes(8, "little")), dtype=torch.int64)

    @cached_property
    def per_image(self) -> bool:
        return any(isinstance(m, tuple) for m in self.multipliers.values())

    @cached_property
    def _table(self) -> list[tuple[float, ...]]:
        """For each row the multipliers in order of names; only where they differ by image."""
        images = max(len(m) for m in self.multipliers.values() if isinstance(m, tuple))
        by_image = list(zip(*(m if isinstance(m, tuple) else (m,) * images for m in self.multipliers.values())))
        return by_image if self.rows is None else [by_image[row] for row in self.rows]

    def table(self) -> Tensor:
        """Multipliers as [names] or, where images differ, [rows, names], fp32."""
        return torch.tensor(self._table if self.per_image else list(self.multipliers.values()))

    @cached_property
    def routes(self) -> list[int] | None:
        """For each row the index of its only active name (0 if it has none); None where rows share a set or mix adapters."""
        if not self.per_image or any(sum(map(bool, row)) > 1 for row in self._table):
            return None
        return [next((i for i, m in enumerate(row) if m), 0) for row in self._table]


@lru_cache(maxsize=64)  # a model's layers have few distinct lists of adapters, and each set goes to all layers in turn
def _part(whole: ActiveSet, names: tuple[str, ...]) -> ActiveSet:
    return ActiveSet({n: whole.multipliers[n] for n in sorted(whole.multipliers) if n in names}, whole.rows)


NOTHING = ActiveSet({})
