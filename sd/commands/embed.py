"""sdlora embed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sd.commands.args import ModelArgs, Positional, lora, writes
from sd.errors import SDError


@dataclass(frozen=True)
class Embed:
    """Put LoRAs inside a checkpoint: one file, the weights untouched. extract takes them out, merge melts them in."""

    out: Positional[str]
    """A file ending in .safetensors."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)

    @writes
    def run(self) -> None:
        from sd.tools.embed import embed as run
        if not self.on.lora:
            raise SDError("nothing to embed: name at least one LoRA with --lora PATH:MULTIPLIER")
        chosen = [lora(text) for text in self.on.lora]
        if any(blocks is not None for *_, blocks in chosen) or self.on != ModelArgs(self.on.model, self.on.lora):
            raise SDError("the base's tensors stay as they are, and a LoRA is embedded whole, with one multiplier; leave out "
                             "block weights and all flags but --model and --lora")
        run(self.on.model, {path: m for path, m, _ in chosen}, self.out)
        print(f"{self.out}: the model with {', '.join(path.stem for path, *_ in chosen)} inside")
