"""Parse a command line into the dataclass of its command, and mistakes in it into one sentence."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from functools import reduce
from operator import or_
from typing import Annotated, Any

import tyro

from sd.commands.train import Train
from sd.errors import SDError


def parse(argv: list[str], commands: Mapping[str, type]):
    """An instance of one of `commands` (name -> dataclass). Raises SDError for a mistake, SystemExit for --help."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise SDError(f"{flag} is given twice; give all values after one {flag}")
    words = _with_config(argv, flags)
    for word in words:
        if "\0" in word:
            raise SDError(f"{word!r} holds a character of code 0, which paths, names and prompts cannot contain")
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return _parsed(words, commands)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise SDError(sentence_in(box.getvalue())) from None


def sentence_in(box: str) -> str:
    """tyro's error message without its box, title and hints."""
    text = re.sub(r"^╭─.*╮$", "", box, flags=re.M)
    text = re.sub(r"([╭╮╰╯│─\s]|-{5,})+", " ", text)
    text = re.split("For full helptext|Argument helptext:| in python ", text)[0].strip()
    text = re.sub(r"(Perhaps you meant: --[\w-]+).*", r"\1", text)  # not the whole help of that flag
    return re.sub(r"^Error parsing \w+: ", "", text)  # a command's own sentence


def _with_config(argv: list[str], flags: list[str]) -> list[str]:
    """Insert the options from `train --config FILE` before the flags; flags win."""
    if argv[:1] != ["train"] or "--config" not in flags:
        return argv
    from sd.training.config_file import config_flags, read_config
    at = next(i for i, word in enumerate(argv) if word.partition("=")[0] == "--config")
    path = argv[at].partition("=")[2] or "".join(argv[at + 1:at + 2])
    said = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    return ["train", *config_flags({name: v for name, v in read_config(path).items() if name not in said}), *argv[1:]]


def _parsed(words: list[str], commands: Mapping[str, type]):
    """What tyro makes of the words."""
    about = {name: (command.__doc__ or "").splitlines()[0] for name, command in commands.items()}
    config: list = [tyro.conf.OmitArgPrefixes]
    if not words or words[0] not in commands:  # --help, or a mistake
        any_of: Any = reduce(or_, (Annotated[command, tyro.conf.subcommand(name, description=about[name])]
                                   for name, command in commands.items()))
        return tyro.cli(any_of, prog="python -m sd", args=words, config=config)
    name = words[0]
    if commands[name] is not Train:  # train: --no-x overrides its config file's x
        config.append(tyro.conf.FlagCreatePairsOff)
    return tyro.cli(commands[name], prog=f"python -m sd {name}", description=about[name], args=words[1:], config=config)
