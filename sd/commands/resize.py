"""sdlora resize."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from sd.commands.args import DType, LoRAFormat, dtype, writes


@dataclass(frozen=True)
class Resize:
    """Reduce the rank of a LoRA by the best approximation; give one of rank, ratio, cumulative, frobenius, threshold."""

    source: Positional[str]
    """LoRA to read, from any program."""
    out: Positional[str]
    """LoRA file to write."""
    rank: int | None = None
    """Use this rank in every layer."""
    ratio: float | None = None
    """Choose each layer's rank: keep singular values of at least the largest / ratio."""
    cumulative: float | None = None
    """Choose each layer's rank: keep the fewest singular values that add up to this fraction of the total."""
    frobenius: float | None = None
    """Choose each layer's rank: keep the fewest singular values whose squares add up to this fraction of the total."""
    threshold: float | None = None
    """Choose each layer's rank: keep singular values above this fraction of the largest."""
    max_rank: int | None = None
    """Highest rank that ratio, cumulative, frobenius and threshold may choose."""
    model: str | None = None
    """Base checkpoint; needed for models other than SD 1.x that the LoRA's metadata does not name."""
    format: LoRAFormat = "kohya"
    """Program whose format to write."""
    skip: bool = False
    """Copy modules that are not plain LoRA unchanged instead of failing."""
    dtype: DType | None = None
    """Precision of the result; none: that of the source."""

    @writes
    def run(self) -> None:
        from sd.tools.resize import resize_file
        report = resize_file(self.source, self.out, rank=self.rank, ratio=self.ratio, cumulative=self.cumulative,
                             frobenius=self.frobenius, threshold=self.threshold, max_rank=self.max_rank, skip=self.skip,
                             format=self.format, base=self.model, dtype=dtype(self.dtype))
        print(f"{self.out}: {report}")
