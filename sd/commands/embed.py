"""sdlora embed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro
from tyro.conf import Positional

from sd.commands.args import ModelArgs, lora, writes
from sd.errors import SDError


@dataclass(frozen=True)
class Embed:
    """Store LoRAs inside a checkpoint file, leaving its weights unchanged; extract takes them out again."""

    out: Positional[str]
    """Checkpoint to write, ending in .safetensors."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)

    @writes
    def run(self) -> None:
        if not self.on.lora:
            raise SDError("nothing to embed: name at least one LoRA with --lora PATH:MULTIPLIER")
        chosen = [lora(text) for text in self.on.lora]
        if any(blocks is not None for *_, blocks in chosen) or self.on != ModelArgs(self.on.model, self.on.lora):
            raise SDError("a LoRA is embedded whole, with one multiplier, and the base's tensors are not changed; leave out "
                          "block weights and all flags except --model and --lora")
        from sd.tools.embed import embed as run
        run(self.on.model, {path: m for path, m, _ in chosen}, self.out)
        print(f"{self.out}: the model with {', '.join(path.stem for path, *_ in chosen)} inside")
