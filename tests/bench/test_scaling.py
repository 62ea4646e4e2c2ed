"""The program that measures growth, with the smallest values. Nothing is asserted on time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.scaling import SECTIONS, exponent

ROOT = Path(__file__).parents[2]


def test_an_exponent_is_the_slope_on_two_logarithmic_axes():
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert exponent([10, 100], [5, 5]) == 0


def test_each_section_prints_rows_with_the_growth_of_cost_and_work(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.scaling", "--threads", "1", "--n", "1", "--most", "100", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("| ")]
    rows = rows[2:]
    assert len(rows) == 16 and len({row[0] for row in rows}) == 16 and set(SECTIONS) >= {"steps", "starts"}
    for row in rows:
        assert float(row[4]) < 10 and row[7] in ("", "above")
    work = {row[0]: float(row[5]) for row in rows}
    assert work["step: rows"] == 1 and work["loading a LoRA: others loaded"] == 0
    assert 2 < work["step: side of the latents"] < 4  # layers with the square, attention with its square
    assert 0 < work["step: rank of one LoRA"] < 1
