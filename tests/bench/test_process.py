"""The sides of a comparison: each in a process of its own, asked in turn, from another checkout if wanted."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.common import Options
from bench.process import Worker, alternate, isolated, workers

OPTIONS = Options(threads=1)


class Counter:
    """Counts in its process, and says where it is."""

    def __init__(self, start: int):
        self.count, self.kept = start, []

    def add(self, by: int):
        def now():
            self.count += by
            return torch.tensor([self.count], dtype=torch.bfloat16), os.getpid()
        return now

    def where(self) -> tuple[int, str]:
        import sd
        return os.getpid(), str(Path(sd.__file__).parents[1])

    def fail(self):
        raise ValueError("no more")

    def die(self):
        os._exit(3)

    def allocate(self, count: int) -> None:
        self.kept.append(np.ones(count, dtype=np.uint8))


def test_each_side_is_a_process_that_keeps_its_state_and_is_asked_in_turn():
    with workers({"a": lambda: Worker(OPTIONS, Counter, 0), "b": lambda: Worker(OPTIONS, Counter, 10)}) as sides:
        asked = []

        def run(side):
            asked.append(side)
            return sides[side].timed("add", 1)
        times, results = alternate({side: lambda side=side: run(side) for side in sides}, 2)
        places = {side: worker.ask("where")[0] for side, worker in sides.items()}
    assert asked == ["b", "a", "a", "b", "b", "a"] and [len(taken) for taken in times.values()] == [2, 2]
    assert {side: int(value[0]) for side, (value, _) in results.items()} == {"a": 3, "b": 13}
    assert {side: process for side, (_, process) in results.items()} == places
    assert len({*places.values(), os.getpid()}) == 3
    assert all(value.dtype == np.float32 for value, _ in results.values())


def test_what_fails_in_a_process_is_an_error_with_its_traceback():
    with Worker(OPTIONS, Counter, 0) as worker:
        with pytest.raises(RuntimeError, match=r"Counter, fail failed: (.|\n)*ValueError: no more"):
            worker.ask("fail")
        assert worker.ask("where")[0] != os.getpid()  # it goes on
        with pytest.raises(RuntimeError, match="it died"):
            worker.ask("die")
    with pytest.raises(RuntimeError, match="missing 1 required positional argument"):
        Worker(OPTIONS, Counter)


def test_the_peak_is_that_of_the_process_since_its_begin_or_the_reset():
    with Worker(OPTIONS, Counter, 0, python=Path(sys.executable)) as worker:  # a fork has free memory of ours
        worker.ask("allocate", 64 << 20)
        assert 64 << 20 <= worker.peak() < 96 << 20
        worker.reset_peak()
        assert worker.peak() < 32 << 20
    assert isolated(OPTIONS, np.ones, 3).result.tolist() == [1, 1, 1]


@pytest.mark.parametrize("own", [False, True])
def test_a_new_process_takes_sd_from_the_checkout_and_the_rest_from_here(own, tmp_path):
    if own:
        (tmp_path / "sd").mkdir()
        (tmp_path / "sd" / "__init__.py").touch()
    root = Path(__file__).parents[2]
    where = {"checkout": tmp_path} if own else {"python": Path(sys.executable)}
    with Worker(OPTIONS, Counter, 0, **where) as worker:
        assert worker.ask("where")[1] == str(tmp_path if own else root)
        assert int(worker.timed("add", 5)[1][0][0]) == 5
