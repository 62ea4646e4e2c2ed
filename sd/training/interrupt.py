"""Ctrl-C: finish the step and save the state before stopping."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sd.training.dist import world


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Inside the block, the yielded function returns True after the first Ctrl-C or SIGTERM; a second one raises at once.

    With several processes a second signal is ignored, since both Slurm and torchrun send one to each. Outside the main
    thread, where Python allows no handlers, the function always returns False.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def handler(number, frame):
        if asked.is_set() and world() == 1:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, former in before.items():
            signal.signal(number, former)
