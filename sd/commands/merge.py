"""sdlora merge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from sd.commands.args import ModelArgs, Positional, dtype, lora, writes
from sd.errors import SDError


@dataclass(frozen=True)
class Merge:
    """Merge LoRAs into a model for deployment, one plain checkpoint that any program loads; or several into one LoRA."""

    out: Positional[str]
    """A file ending in .safetensors, or (--into model) a new folder for diffusers."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    into: Literal["model", "lora"] = "model"
    """What comes out; with lora, --model is needed only for kinds that depend on the weights (DoRA, OFT, IA3, GLoRA)."""
    method: Literal["concat", "svd", "ties", "dare", "magnitude", "full"] = "concat"
    """Into lora. concat: exact, ranks add up; svd: the best of --rank; ties, dare, magnitude: on the changes; full: exact."""
    rank: int | None = None
    """Into lora: rank of what svd, ties, dare and magnitude make."""
    density: float = 0.5
    """Into lora: share of the values that ties, dare and magnitude keep."""
    seed: int = 0
    """Into lora: of what dare drops."""
    randomized: bool = False
    """Into lora: a faster SVD that is not quite the best; its error is printed."""

    def __post_init__(self):
        if not self.on.lora:
            raise SDError("nothing to merge: name at least one LoRA with --lora PATH:MULTIPLIER")
        if self.into == "model" and (self.method != "concat" or self.rank is not None or self.randomized):
            raise SDError("--method, --rank and --randomized are for --into lora; into a model the sum is exact")
        if self.into == "lora" and (self.on.vae or self.on.device):
            raise SDError("--vae and --device are for --into model; merging LoRAs needs neither")
        if (self.density != Merge.density and self.method not in ("ties", "dare", "magnitude")
                or self.seed != Merge.seed and self.method != "dare"):
            raise SDError("--density is for ties, dare and magnitude, --seed for dare")

    @writes
    def run(self) -> None:
        from sd.model_loader import merge_lora_into_checkpoint
        on, chosen = self.on, [lora(text) for text in self.on.lora]
        if len({path for path, *_ in chosen}) < len(chosen):
            raise SDError("the same LoRA is named twice; give it once, with the sum of the multipliers")
        names = " + ".join(f"{m:g} x {path.name}" for path, m, _ in chosen)
        multipliers, blocks = {path: m for path, m, _ in chosen}, {path: b for path, _, b in chosen if b is not None}
        if self.into == "lora":
            from sd.tools.merge import merge_lora_files
            report = merge_lora_files(multipliers, self.out, method=self.method, rank=self.rank, density=self.density,
                                      seed=self.seed, randomized=self.randomized, base=on.model, dtype=dtype(on.dtype),
                                      skip=on.skip, block_weights=blocks)
            print(f"{self.out}: {names}; {report}")
        else:
            merge_lora_into_checkpoint(on.model, multipliers, self.out, dtype=dtype(on.dtype), vae=on.vae,
                                       device=on.device or "cpu", skip=on.skip, block_weights=blocks)
            print(f"{self.out}: the model with {names} merged into it")
