"""Ctrl-C lets the step end and the state be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sd.training.dist import world


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only makes the yielded function true; the second ends the program at once,
    unless there are several processes: Slurm tells each of them, and then torchrun does.

    Outside of the main thread, where Python allows no handlers, it stays false.
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
