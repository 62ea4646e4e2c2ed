"""sdlora convert."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from sd.commands.args import DType, LoRAFormat, dtype, writes


@dataclass(frozen=True)
class Convert:
    """Convert a LoRA to another program's format, keeping its metadata and every alpha."""

    source: Positional[str]
    """LoRA to read: a file from any program, or a PEFT folder."""
    out: Positional[str]
    """File to write; for peft, a new folder."""
    format: LoRAFormat
    """Program whose format to write."""
    dtype: DType | None = None
    """Precision of the result; none: that of the source."""
    approximate: int | None = None
    """Replace modules that the format cannot express by a LoRA of this rank; the error is printed."""
    model: str | None = None
    """Base checkpoint; needed for models other than SD 1.x and for kinds of adapter that depend on its weights."""
    skip: str | None = None
    """Regular expression; tensors whose key or module path matches are left out."""

    @writes
    def run(self) -> None:
        from sd.tools.convert import convert as run
        report = run(self.source, self.out, format=self.format, dtype=dtype(self.dtype), approximate=self.approximate,
                     base=self.model, skip=self.skip)
        print(f"{self.out}: {report}")
