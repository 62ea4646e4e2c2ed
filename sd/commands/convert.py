"""sdlora convert."""

from __future__ import annotations

from dataclasses import dataclass

from sd.commands.args import DType, Format, Positional, dtype


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


def convert(args: Convert) -> None:
    from sd.tools.convert import convert as run
    report = run(args.source, args.out, format=args.format, dtype=dtype(args.dtype), approximate=args.approximate,
                 base=args.model, skip=args.skip)
    print(f"{args.out}: {report}")
