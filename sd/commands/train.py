"""sdlora train."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from sd.commands.args import shipped


def train(args) -> None:
    from sd.training.config import TrainConfig
    from sd.training.dist import is_main, processes
    from sd.training.loop import train as run
    from sd.training.result import result_files
    options = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    if args.from_lora:
        options["from_lora"] = str(shipped(Path(args.from_lora)))
    with processes():
        run(TrainConfig(**options))
        for file in () if args.dry_run or not is_main() else result_files(args):
            print(Path(args.out) / file)
