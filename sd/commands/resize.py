"""sdlora resize."""

from __future__ import annotations

from dataclasses import dataclass

from sd.commands.args import DType, Format, Positional, dtype, writes


@dataclass(frozen=True)
class Resize:
    """Give a LoRA another rank: the best approximation of its change. Give exactly one rule."""

    source: Positional[str]
    """A LoRA of any program."""
    out: Positional[str]
    """The LoRA file to write."""
    rank: int | None = None
    """The same rank everywhere."""
    ratio: float | None = None
    """Keep singular values of at least the largest / ratio."""
    cumulative: float | None = None
    """Keep the fewest values whose sum is this share of all."""
    frobenius: float | None = None
    """Keep the fewest values whose squares are this share of all."""
    threshold: float | None = None
    """Keep the singular values above this share of a layer's largest."""
    max_rank: int | None = None
    """Upper limit of the rules that choose a rank for each layer."""
    model: str | None = None
    """The base, for models other than SD 1.x whose LoRA does not say so."""
    format: Format = "kohya"
    """Whose names the file has."""
    skip: bool = False
    """Leave modules of kinds other than LoRA as they are."""
    dtype: DType | None = None
    """None: that of the source."""

    @writes
    def run(self) -> None:
        from sd.tools.resize import resize_file
        report = resize_file(self.source, self.out, rank=self.rank, ratio=self.ratio, cumulative=self.cumulative,
                             frobenius=self.frobenius, threshold=self.threshold, max_rank=self.max_rank, skip=self.skip,
                             format=self.format, base=self.model, dtype=dtype(self.dtype))
        print(f"{self.out}: {report}")
