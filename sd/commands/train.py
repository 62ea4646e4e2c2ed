"""sdlora train."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from sd.commands.args import shipped
from sd.training.config import TrainConfig


@dataclass(frozen=True)
class Train(TrainConfig):
    __doc__ = TrainConfig.__doc__
    config: str | None = None
    """TOML, JSON or YAML file with these options; flags override it."""

    def run(self) -> None:
        from sd.training.dist import is_main, processes
        from sd.training.loop import train
        from sd.training.result import result_files
        options = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        if self.from_lora:
            options["from_lora"] = str(shipped(Path(self.from_lora)))
        out, is_new = Path(self.out), not Path(self.out).exists()
        try:
            with processes():
                train(TrainConfig(**options))
                for file in () if self.dry_run or not is_main() else result_files(self):
                    print(out / file)
        except BaseException:
            with suppress(OSError):  # a run that saved something stays
                if is_new:
                    out.rmdir()
            raise
