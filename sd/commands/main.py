"""`python -m sd <command>`: parse the arguments, run the command, report errors. Each command has its own file."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from sd.commands.compare import Compare
from sd.commands.convert import Convert
from sd.commands.embed import Embed
from sd.commands.extract import Extract
from sd.commands.generate import Generate
from sd.commands.inspect import Inspect
from sd.commands.merge import Merge
from sd.commands.parse import parse
from sd.commands.resize import Resize
from sd.commands.train import Train
from sd.errors import NotFiniteError, SDError

COMMANDS = {"generate": Generate, "compare": Compare, "train": Train, "merge": Merge, "extract": Extract, "resize": Resize,
            "convert": Convert, "embed": Embed, "inspect": Inspect}
NO_MEMORY = "there is not enough memory for pictures of this size and number; make fewer or smaller ones"
FAULT = "this is a fault of the program, not of your command; please report it with the lines above"


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: success; 1: a bug, with its traceback; 2: a mistake in the command, one sentence on stderr; 130: stopped by Ctrl-C.
    """
    with messages_on_stderr():
        try:
            return parse(sys.argv[1:] if argv is None else list(argv), COMMANDS).run() or 0
        except KeyboardInterrupt as stop:
            print(str(stop) or "stopped", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (SDError, OSError, NotFiniteError) as error:
            print(f"error: {_sentence(error)}", file=sys.stderr)
            return 2
        except Exception as error:  # nothing is swallowed: the traceback is shown, and the exit status says so
            if lacks_memory(error):
                print(f"error: {NO_MEMORY}", file=sys.stderr)
                return 2
            traceback.print_exc()
            print(FAULT, file=sys.stderr)
            return 1


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Print log messages and warnings as plain lines on stderr inside the block."""
    root, show = logging.getLogger(), warnings.showwarning
    handlers, level = root.handlers[:], root.level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    warnings.showwarning = lambda message, *where, **more: logging.getLogger("sd").warning("%s", message)
    try:
        yield
    finally:
        root.handlers[:], warnings.showwarning = handlers, show
        root.setLevel(level)


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch raises some such errors as a plain RuntimeError, recognised by its text."""
    signs = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
