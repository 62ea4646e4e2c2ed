"""sdlora convert."""

from __future__ import annotations

from dataclasses import dataclass

from sd.commands.args import DType, Format, Positional, dtype, writes


@dataclass(frozen=True)
class Convert:
    """Write a LoRA in another program's format; its metadata and every alpha survive."""

    source: Positional[str]
    """A LoRA of any program: a file, or a folder of PEFT."""
    out: Positional[str]
    """The file to write; for peft a new folder."""
    format: Format
    """Whose."""
    dtype: DType | None = None
    """None: that of the source."""
    approximate: int | None = None
    """Modules of a kind that the format cannot hold become LoRA of this rank; the error is printed."""
    model: str | None = None
    """The base, for models other than SD 1.x and for kinds that depend on the weights."""
    skip: str | None = None
    """Leave out what this regular expression matches."""

    @writes
    def run(self) -> None:
        from sd.tools.convert import convert as run
        report = run(self.source, self.out, format=self.format, dtype=dtype(self.dtype), approximate=self.approximate,
                     base=self.model, skip=self.skip)
        print(f"{self.out}: {report}")
