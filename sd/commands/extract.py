"""sdlora extract."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tyro.conf import Positional

from sd.commands.args import DType, LoRAFormat, dtype, writes
from sd.errors import SDError


@dataclass(frozen=True)
class Extract:
    """Extract a LoRA from a fine-tuned checkpoint (--tuned), or the LoRAs embedded in one (--model alone)."""

    out: Positional[str]
    """LoRA file to write; without --tuned, the folder for the embedded LoRAs."""
    model: str | None = None
    """Base checkpoint; none: emoji. Without --tuned, the checkpoint with LoRAs inside."""
    tuned: str | None = None
    """Checkpoint fine-tuned from the base."""
    rank: int | None = 32
    """Rank of the LoRA; with --threshold or --frobenius, the highest rank of a layer."""
    conv_rank: int | None = None
    """The same for 3x3 convolutions; none: --rank."""
    threshold: float | None = None
    """Choose each layer's rank: keep singular values above this fraction of the largest."""
    frobenius: float | None = None
    """Choose each layer's rank: keep the fewest singular values whose squares add up to this fraction of the total."""
    randomized: bool = False
    """Use a faster, randomized SVD; the error is printed."""
    vae: bool = False
    """Extract the VAE's changes too; other programs ignore them."""
    format: LoRAFormat = "kohya"
    """Program whose format to write."""
    dtype: DType = "float32"
    """Precision of the LoRA."""

    def __post_init__(self):
        if self.tuned is None and any(getattr(self, f.name) != f.default for f in fields(self)[2:]):
            raise SDError("without --tuned the LoRAs inside a checkpoint are extracted as they are; leave out all flags "
                          "except --model")

    @writes
    def run(self) -> None:
        if self.tuned is None:
            if self.model is None:
                raise SDError("nothing to extract from: give the fine-tuned checkpoint with --tuned and its base with "
                              "--model, or only --model for a checkpoint that has LoRAs inside")
            from sd.tools.embed import take_out
            for path in take_out(self.model, self.out):
                print(path)
            return
        from sd.tools.extract import extract_lora
        report = extract_lora(self.model, self.tuned, self.out, rank=self.rank, conv_rank=self.conv_rank,
                              threshold=self.threshold, frobenius=self.frobenius, randomized=self.randomized, vae=self.vae,
                              format=self.format, dtype=dtype(self.dtype))
        print(f"{self.out}: {report}")
