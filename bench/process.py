"""Processes that measure: fresh ones, long-lived ones that are asked in turn, and their time and memory.

The process that prints never computes. It forks, so each measurement has its own memory, threads and CUDA context, with all
imports done and nothing else; or it starts another interpreter, which needs torch and this file alone.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]


class Measured(NamedTuple):
    result: Any
    peak: int  # peak growth of the process in bytes since it began; on CUDA, peak memory allocated by torch


def isolated(options, function: Callable, *args, **where) -> Measured:
    """Run function(*args) in a process of its own with `options.threads` threads; `where`: see Worker. Raises RuntimeError with
    its traceback."""
    with Worker(options, _Call, function, args, **where) as worker:
        return Measured(worker.ask("result"), worker.peak())


class _Call:
    def __init__(self, function: Callable, args: tuple):
        self.value = function(*args)

    def result(self):
        return self.value


class Worker:
    """One side of a comparison, in a process of its own: what it sets for the whole process, such as the allocator and the
    library of matrix products, does not reach the other side.

    It makes `make(*args)` there, whose methods are then called one at a time. By default the process is forked. With
    `checkout` it is a new one that imports `sd` from that folder and all else from here; with `python`, one of another
    environment. Raises RuntimeError with the traceback of whatever fails there.
    """

    def __init__(self, options, make: Callable, *args, checkout: Path | None = None, python: Path | None = None):
        self.name = make.__name__
        self.connection, theirs = multiprocessing.Pipe()
        self.stop: Callable[[], object]
        sys.stdout.flush()
        if checkout is None and python is None:
            process = multiprocessing.get_context("fork").Process(
                target=_serve, args=(theirs, options.threads, options.device, (make, args)), daemon=True)
            process.start()
            self.stop = process.join
        else:
            self.stop = _new_process(theirs, options, checkout or ROOT, python or Path(sys.executable)).wait
            self.connection.send((make, args))
        theirs.close()
        try:
            self._receive("the start")
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *args):
        """What the method returns; tensors arrive as arrays on the CPU, fp32 if they were narrower."""
        self._send((method, args, False))
        return self._receive(method)

    def timed(self, method: str, *args) -> tuple[float, Any]:
        """(seconds, result) of the function that the method returns: what the method itself does is not timed."""
        self._send((method, args, True))
        return self._receive(method)

    def peak(self) -> int:
        """Peak growth of the process in bytes since it began or `reset_peak` was called; see `Measured`."""
        return self.ask("__peak__")

    def reset_peak(self) -> None:
        self.ask("__reset_peak__")

    def _send(self, request) -> None:
        with suppress(BrokenPipeError):  # the answer will say so
            self.connection.send(request)

    def _receive(self, what: str):
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            result, error = None, "it died"
        if error:
            raise RuntimeError(f"{self.name}, {what} failed: {error}")
        return result

    def close(self) -> None:
        self._send(None)
        self.stop()
        self.connection.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()


FRESH = """
import sys
checkout, root, connection, threads, device = sys.argv[1:]
sys.path[0] = checkout
import sd                 # the program that is measured, from its own checkout,
sys.path[0] = root
from bench.process import serve_fresh   # and what measures it, from this one
serve_fresh(int(connection), int(threads), device)
"""


def _new_process(connection: Connection, options, checkout: Path, python: Path) -> subprocess.Popen:
    fd = connection.fileno()
    command = [python, "-c", FRESH, checkout.resolve(), ROOT, str(fd), str(options.threads), options.device]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.Popen(command, pass_fds=[fd], stdout=sys.stderr, env=environment)


def serve_fresh(descriptor: int, threads: int, device: str) -> None:
    connection = Connection(descriptor)
    _serve(connection, threads, device, connection.recv())  # receiving it does the imports


def _serve(connection: Connection, threads: int, device: str, made: tuple[Callable, tuple]) -> None:
    """Make the side, then answer one request after the other, until None."""
    torch.set_num_threads(threads)
    reset_peak()
    make, args = made
    side = _answer(connection, lambda: make(*args), keep=True)
    with suppress(EOFError):  # the parent is gone
        while side is not None and (request := connection.recv()) is not None:
            method, args, is_timed = request
            _answer(connection, partial(_call, side, method, args, is_timed, device))


def _answer(connection: Connection, function: Callable, keep: bool = False):
    """Send (result, None) or (None, traceback); with `keep` the result stays here."""
    try:
        result = function()
        connection.send((None if keep else _portable(result), None))
        return result
    except BaseException:  # noqa: B036 (the parent reports it)
        connection.send((None, traceback.format_exc()))


def _call(side, method: str, args: tuple, is_timed: bool, device: str):
    if method == "__peak__":
        return peak(device)
    if method == "__reset_peak__":
        return reset_peak()
    result = getattr(side, method)(*args)
    return timed(result, device) if is_timed else result


def _portable(result):
    """Without tensors, which two versions of torch need not pickle alike."""
    if isinstance(result, torch.Tensor):
        result = result.detach().cpu()
        return (result.float() if result.dtype in (torch.float16, torch.bfloat16) else result).numpy()
    if isinstance(result, tuple) and type(result) is tuple:
        return tuple(map(_portable, result))
    return result


@contextmanager
def workers(started: Mapping[Any, Callable[[], Worker]]):
    """The workers under their names, closed at the end."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(start()) for name, start in started.items()}


# ---- time ------------------------------------------------------------------------------------------------------------

def timed(function: Callable, device: str) -> tuple[float, Any]:
    """(seconds, result)."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def alternate(runs: Mapping[Any, Callable[[], tuple[float, Any]]], n: int, *,
              warm_up: bool = True) -> tuple[dict[Any, list[float]], dict[Any, Any]]:
    """Do each of `runs` n times, in alternating order, once before that if `warm_up`; returns the seconds and the last
    results."""
    times, results = {name: [] for name in runs}, {}
    for i in range(0 if warm_up else 1, n + 1):
        for name in list(runs) if i % 2 else list(runs)[::-1]:
            results.pop(name, None)  # free it before the next is made
            taken, results[name] = runs[name]()
            if i:
                times[name].append(taken)
    return times, results


# ---- memory and files ------------------------------------------------------------------------------------------------

_start = 0


def reset_peak() -> None:
    """Measure peak memory from here on."""
    global _start
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS (proc(5))
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    _start = _status("VmRSS")


def peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") - _start


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def read_from_disk() -> int:
    """Bytes that this process read from storage; 0 if all were in the page cache."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes:"))
    return int(line.split()[1])


def set_page_cache(path: Path, warm: bool) -> None:
    """Read a file or folder into the page cache, or ask the kernel to drop it from the cache."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as f:
            if warm:
                while f.read(2**24):
                    pass
            else:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
