"""`python -m sd <command>`: parse, call one function, show the result. Each command has a file of its own."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Annotated

import tyro

from sd.commands.args import writes
from sd.commands.compare import Compare, compare
from sd.commands.convert import Convert, convert
from sd.commands.embed import Embed, embed
from sd.commands.extract import Extract, extract
from sd.commands.generate import Generate, generate
from sd.commands.inspect import Inspect, inspect
from sd.commands.merge import Merge, merge
from sd.commands.resize import Resize, resize
from sd.commands.train import train
from sd.errors import SDError

NO_MEMORY = "there is not enough memory for pictures of this size and number; make fewer or smaller ones"


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake (one sentence on stderr), 130 for Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    warnings.showwarning = lambda message, *where, **more: logging.getLogger("sd").warning("%s", message)
    commands = {"generate": generate, "compare": compare, "train": train} | {name: run for name, (_, run) in TOOLS.items()}
    try:
        args = _parse(sys.argv[1:] if argv is None else list(argv))
        return commands[type(args).__name__.lower().removesuffix("config")](args) or 0
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"error: {NO_MEMORY}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # torch says so when memory is short; what else it says is a fault of ours
        if "not finite" not in str(error) and "memory" not in str(error):
            raise
        print(f"error: {error if 'not finite' in str(error) else NO_MEMORY}", file=sys.stderr)
        return 2


def _parse(argv: list[str]):
    """The command's dataclass. A mistake ends in ValueError with tyro's answer, which is a box, as one sentence."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise SDError(f"{flag} is given twice; name all of its values after one {flag}")
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(_commands(), prog="python -m sd", args=_with_config(argv, flags),
                            config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        text = re.sub(r"([╭╮╰╯│─\s]|-{5,})+", " ", box.getvalue()).partition("For full helptext")[0].partition(" in python ")[0]
        text = text.replace("Unrecognized options Unrecognized", "Unrecognized").strip()
        raise SDError(re.sub(r"^.*Error parsing \w+: ", "", text)) from None


def _with_config(argv: list[str], flags: list[str]) -> list[str]:
    """What the file of `train --config` says is put before the flags, less what flags say themselves."""
    if argv[:1] != ["train"] or "--config" not in flags:
        return argv
    from sd.training.config_file import config_flags, read_config
    at = next(i for i, word in enumerate(argv) if word.partition("=")[0] == "--config")
    path = argv[at].partition("=")[2] or "".join(argv[at + 1:at + 2])
    said = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    return ["train", *config_flags({name: v for name, v in read_config(path).items() if name not in said}), *argv[1:]]


def _commands():
    from sd.training.config import TrainConfig

    @dataclass(frozen=True)
    class Train(TrainConfig):
        __doc__ = TrainConfig.__doc__
        config: str | None = None
        """TOML, JSON or YAML file with these options; flags win over it."""

    kinds = {"generate": Generate, "compare": Compare, "train": Train} | {name: cls for name, (cls, _) in TOOLS.items()}
    union = None
    for command, cls in kinds.items():
        flags = cls if cls is Train else tyro.conf.FlagCreatePairsOff[cls]  # --no-x against a config file's x
        one = Annotated[flags, tyro.conf.subcommand(command, description=(cls.__doc__ or "").splitlines()[0])]
        union = one if union is None else union | one
    return union


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# command -> (its arguments, what it does)
TOOLS = {"merge": (Merge, writes(merge)), "extract": (Extract, writes(extract)), "resize": (Resize, writes(resize)),
         "convert": (Convert, writes(convert)), "embed": (Embed, writes(embed)), "inspect": (Inspect, inspect)}
