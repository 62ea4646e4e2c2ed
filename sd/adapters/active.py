"""Which adapters are on: the active set, as plain numbers."""

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
        """The part of it that concerns a layer with these adapters, in an order that does not depend on loading."""
        names = tuple(names)
        return self if self._sorted and self.multipliers.keys() <= set(names) else _part(self, names)

    def times(self, factors: Mapping[str, float]) -> ActiveSet:
        """Every multiplier times its adapter's factor; what has the factor 0 is not on at all."""
        if all(factor == 1 for factor in factors.values()):
            return self
        return ActiveSet({n: tuple(v * factors[n] for v in m) if isinstance(m, tuple) else m * factors[n]
                          for n, m in self.multipliers.items() if factors[n]}, self.rows)

    @cached_property
    def _sorted(self) -> bool:
        return list(self.multipliers) == sorted(self.multipliers)

    @cached_property
    def fingerprint(self) -> int:
        """63 bits that differ where the sets do; Python's own hash is the same for -1.0 and -2.0."""
        digest = blake2b(repr((self.multipliers, self.rows)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    @cached_property
    def per_image(self) -> bool:
        return any(isinstance(m, tuple) for m in self.multipliers.values())

    @cached_property
    def _table(self) -> list[tuple[float, ...]]:
        """Where images differ: for each row the multipliers in order of the names."""
        images = max(len(m) for m in self.multipliers.values() if isinstance(m, tuple))
        by_image = list(zip(*(m if isinstance(m, tuple) else (m,) * images for m in self.multipliers.values())))
        return by_image if self.rows is None else [by_image[row] for row in self.rows]

    def table(self) -> Tensor:
        """Multipliers as [names] or, where images differ, [rows, names], fp32."""
        return torch.tensor(self._table if self.per_image else list(self.multipliers.values()))

    @cached_property
    def routes(self) -> list[int] | None:
        """For each row the number of the one name that is on for it (0 where none is); None where images share or mix."""
        if not self.per_image or any(sum(map(bool, row)) > 1 for row in self._table):
            return None
        return [next((i for i, m in enumerate(row) if m), 0) for row in self._table]


@lru_cache(maxsize=64)  # the layers of a model have few different lists of adapters, and a set comes to all of them in a row
def _part(whole: ActiveSet, names: tuple[str, ...]) -> ActiveSet:
    return ActiveSet({n: whole.multipliers[n] for n in sorted(whole.multipliers) if n in names}, whole.rows)


NOTHING = ActiveSet({})
