"""sdlora merge."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from sd.commands.args import ModelArgs, dtype, lora, writes
from sd.errors import SDError

METHOD_HELP = ("Into lora: concat is exact, and ranks add up; svd is the best approximation of --rank; ties, dare and "
               "magnitude prune each LoRA's change first; full is exact and stores whole differences.")


@dataclass(frozen=True)
class Merge:
    """Merge LoRAs into a model, as one plain checkpoint that any program loads, or several LoRAs into one."""

    out: Positional[str]
    """File to write, ending in .safetensors; with --into model also a new diffusers folder."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    into: Literal["model", "lora"] = "model"
    """What to write. For lora, --model is needed only with kinds that depend on weights (DoRA, IA3, GLoRA, OFT, BOFT, HRA)."""
    method: Annotated[Literal["concat", "svd", "ties", "dare", "magnitude", "full"], tyro.conf.arg(help=METHOD_HELP)] = "concat"
    rank: int | None = None
    """Into lora: rank of the result of svd, ties, dare and magnitude."""
    density: float = 0.5
    """Into lora: fraction of the values that ties, dare and magnitude keep."""
    seed: int = 0
    """Into lora: seed for dare's random choice."""
    randomized: bool = False
    """Into lora: use a faster, slightly less accurate SVD; the error is printed."""

    def __post_init__(self):
        if not self.on.lora:
            raise SDError("nothing to merge: name at least one LoRA with --lora PATH:MULTIPLIER")
        if self.into == "model" and (self.method != "concat" or self.rank is not None or self.randomized):
            raise SDError("--method, --rank and --randomized are for --into lora; merging into a model is always exact")
        if self.into == "lora" and (self.on.vae or self.on.device):
            raise SDError("--vae and --device are for --into model; merging LoRAs needs neither")
        if (self.density != Merge.density and self.method not in ("ties", "dare", "magnitude")
                or self.seed != Merge.seed and self.method != "dare"):
            raise SDError("--density is for ties, dare and magnitude, --seed for dare")
        if self.on.dtype == "auto":
            raise SDError("--dtype auto is for running a model; for a file: float32, bfloat16 or float16")

    @writes
    def run(self) -> None:
        on, chosen = self.on, [lora(text) for text in self.on.lora]
        if len({path for path, *_ in chosen}) < len(chosen):
            raise SDError("the same LoRA is given twice; give it once, with the sum of the multipliers")
        names = " + ".join(f"{m:g} x {path.name}" for path, m, _ in chosen)
        multipliers: dict[str | os.PathLike, float] = {path: m for path, m, _ in chosen}
        blocks: dict[str | os.PathLike, object] = {path: b for path, _, b in chosen if b is not None}
        if self.into == "lora":
            from sd.tools.merge import merge_lora_files
            report = merge_lora_files(multipliers, self.out, method=self.method, rank=self.rank, density=self.density,
                                      seed=self.seed, randomized=self.randomized, base=on.model, dtype=dtype(on.dtype),
                                      skip=on.skip, block_weights=blocks)
            print(f"{self.out}: {names}; {report}")
        else:
            from sd.model_loader import merge_lora_into_checkpoint
            merge_lora_into_checkpoint(on.model, multipliers, self.out, dtype=dtype(on.dtype), vae=on.vae,
                                       device=on.device or "cpu", skip=on.skip, block_weights=blocks)
            print(f"{self.out}: the model with {names} merged into it")
