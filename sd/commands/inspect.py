"""sdlora inspect."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tyro.conf import Positional

from sd.errors import SDError


@dataclass(frozen=True)
class Inspect:
    """Show what is in a file: a checkpoint, a LoRA from any program, or a picture with its parameters."""

    paths: Positional[tuple[str, ...]]
    """Files, diffusers folders or PEFT folders."""
    model: str | None = None
    """Base checkpoint, to measure a LoRA's change relative to its weights."""
    verify: bool = False
    """Fail unless every tensor of the LoRA fits its base."""
    json: bool = False
    """Print one JSON object, {path: facts}."""

    def run(self) -> None:
        if not self.paths:
            raise SDError("nothing to inspect: name files or folders")
        from sd.tools.inspect import as_text, inspect_file
        facts = {path: inspect_file(path, self.model, verify=self.verify) for path in self.paths}
        if self.json:
            print(json.dumps(facts, indent=2, ensure_ascii=False))
        else:
            print("\n".join(as_text(path, found) for path, found in facts.items()))
            if self.verify:
                print("every tensor fits")
