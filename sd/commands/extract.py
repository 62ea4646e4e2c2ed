"""sdlora extract."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sd.commands.args import DType, Format, Positional, dtype, writes
from sd.errors import SDError


@dataclass(frozen=True)
class Extract:
    """Take the LoRA out of a fine-tuned checkpoint (--tuned), or the LoRAs that lie inside one checkpoint (--model alone)."""

    out: Positional[str]
    """The LoRA file to write; without --tuned the folder to write them to."""
    model: str | None = None
    """The base; none: the small model that ships with the program."""
    tuned: str | None = None
    """The checkpoint that was made from it."""
    rank: int | None = 32
    """Rank of the LoRA, at most; with --threshold it bounds the rank that each layer needs."""
    conv_rank: int | None = None
    """Rank of 3x3 convolutions; none: --rank."""
    threshold: float | None = None
    """Keep the singular values above this share of a layer's largest."""
    frobenius: float | None = None
    """Keep the fewest singular values whose squares are this share of all."""
    randomized: bool = False
    """A faster SVD; its error is printed."""
    vae: bool = False
    """Take the VAE's difference too, which other programs do not read."""
    format: Format = "kohya"
    """Whose names the file has."""
    dtype: DType = "float32"
    """Of the LoRA."""

    def __post_init__(self):
        if self.tuned is None and any(getattr(self, f.name) != f.default for f in fields(self)[2:]):
            raise SDError("without --tuned the LoRAs inside a checkpoint are taken out as they are; leave out all flags but "
                             "--model")

    @writes
    def run(self) -> None:
        from sd.tools.embed import take_out
        from sd.tools.extract import extract_lora
        if self.tuned is None:
            if self.model is None:
                raise SDError("nothing to extract from: name the fine-tuned checkpoint with --tuned and its base with --model, "
                                 "or with --model alone a checkpoint that has LoRAs inside")
            for path in take_out(self.model, self.out):
                print(path)
            return
        report = extract_lora(self.model, self.tuned, self.out, rank=self.rank, conv_rank=self.conv_rank,
                              threshold=self.threshold, frobenius=self.frobenius, randomized=self.randomized, vae=self.vae,
                              format=self.format, dtype=dtype(self.dtype))
        print(f"{self.out}: {report}")
