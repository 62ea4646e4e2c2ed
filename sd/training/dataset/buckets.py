"""Aspect-ratio buckets: sizes for pictures that are not square (NovelAI 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from sd.training.errors import DataError


@dataclass(frozen=True)
class Buckets:
    """All sizes whose sides are multiples of `step` from `low` to `high`, with an area of at most `size` x `size` pixels."""

    size: int
    low: int
    high: int
    step: int = 64
    upscale: bool = True

    def sizes(self, size: int | None = None) -> list[tuple[int, int]]:
        """(width, height): each side with the longest other side that fits into the area. `size`: for a smaller area."""
        return _sizes(self.size if size is None else size, self.low, self.high, self.step)

    def choose(self, width: int, height: int, name: str = "a picture") -> tuple[int, int]:
        """The bucket with the nearest aspect ratio, on a log scale; the narrower of two equally near ones.

        Without `upscale`, the areas of size, size - step, .. are tried until the picture covers its bucket. Raises DataError
        if the picture is smaller than the smallest bucket.
        """
        if (chosen := self._chosen(width, height)) is not None:
            return chosen
        raise DataError(f"{name}: has {width} x {height} pixels, less than its smallest bucket; allow upscale, or remove "
                        f"the picture")

    @lru_cache(maxsize=4096)  # noqa: B019 (few buckets are made; data sets have few sizes and many pictures)
    def _chosen(self, width: int, height: int) -> tuple[int, int] | None:
        size = self.size
        while sizes := self.sizes(size):
            w, h = min(sizes, key=lambda s: round(abs(math.log(s[0] * height / (s[1] * width))), 9))
            if self.upscale or (w <= width and h <= height):
                return w, h
            size -= self.step
        return None


@lru_cache(maxsize=256)
def _sizes(size: int, low: int, high: int, step: int) -> list[tuple[int, int]]:
    sides = range(-(-low // step) * step, high // step * step + 1, step)
    longest = [(side, min(size * size // side, high) // step * step) for side in sides]
    pairs = [pair for pair in longest if pair[1] >= low]
    return sorted({*pairs, *((h, w) for w, h in pairs)})


def make_buckets(size: int, *, factor: int, low: int | None = None, high: int | None = None, step: int = 64,
                 upscale: bool = True) -> Buckets:
    """Buckets for pictures of about `size` x `size` pixels; by default with sides from size / 2 to 2 size.

    Raises DataError if the step is not a multiple of the VAE's `factor`, or no bucket fits.
    """
    if step < factor or step % factor:
        raise DataError(f"bucket_step is {step}; allowed: multiples of {factor}, the factor of the VAE")
    low, high = max(step, size // 2 if low is None else low), 2 * size if high is None else high
    if not 0 < low <= size <= high:
        raise DataError(f"bucket_min is {low} and bucket_max is {high}; size, which is {size}, must lie between them")
    buckets = Buckets(size, low, high, step, upscale)
    if not buckets.sizes():
        raise DataError(f"no bucket has sides of {low} to {high} pixels in steps of {step} and at most {size} x {size} "
                        f"pixels; use a smaller bucket_step or bucket_min")
    return buckets
