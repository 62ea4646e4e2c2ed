"""The programs of bench/ run at tiny size, and what they compare is equal. Nothing is asserted on time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.common import Options, duration, ratio, table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What `python -m bench` prints: in a process of its own, since it forks before any computation."""
    folder = tmp_path_factory.mktemp("bench")  # the programs keep their models in out/bench of where they are started
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench", "--threads", "1", "--n", "1", "--size", "32", "--out", "block.md"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "block.md").read_text() == done.stdout
    return done.stdout


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose header starts with `first`."""
    lines = text.split(f"| {first} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_block_says_where_and_how_it_was_measured(text):
    lines = [line for line in text.splitlines() if "commit " in line]
    assert len(lines) == 4
    for line in lines:
        assert re.search(r"commit \w+.*, torch [\d.]+.*, diffusers [\d.]+, ", line)
        assert re.search("threads: 1, fp32( and bf16)?, model tiny, n = 1", line)


def test_parity_is_printed_for_every_network_and_within_its_limit(text):
    found = rows(text, "network")
    assert [row[0] for row in found] == ["CLIP", "VAE encode, mean", "VAE encode, logvar", "VAE decode", "UNet"]
    for row in found:
        ours_theirs, limit, ours_exact, theirs_exact, exact = map(float, row[2:7])
        assert ours_theirs <= limit and exact < 1e-9
        assert ours_exact <= 2 * theirs_exact + 1e-7 and theirs_exact > 0


def test_steps_are_timed_in_every_case_and_both_sides_compute_the_same(text):
    cases = ["base", "adapters", "merged", "four calls", "four routed"]
    found = rows(text, "dtype | pixels | case")
    assert [row[:3] for row in found] == [[dtype, "32", case] for dtype in ("fp32", "bf16") for case in cases]
    for row in found:
        assert float(row[5]) > 0 and float(row[6]) > 0
        assert float(row[8]) < {"fp32": 1e-5, "bf16": 5e-2}[row[0]]
    assert [row[7].partition(" ")[2] for row in found] == ["", "of base", "of base", "", "of four calls"] * 2
    memory = rows(text, "dtype | case, memory")
    assert [row[1] for row in memory] == [case for case in cases if case != "four calls"] * 2
    assert all(float(cell) >= 0 for row in memory for cell in row[2:])
    pictures = rows(text, "dtype | pixels, whole picture")
    assert [row[:2] for row in pictures] == [["fp32", "32"], ["bf16", "32"]]
    assert float(pictures[0][6]) < 1 and float(pictures[1][6]) < 8  # levels of 255


def test_tools_are_timed_and_a_loaded_file_gives_what_the_peer_gives(text):
    loading = rows(text, "loading a LoRA")
    assert [row[0] for row in loading] == ["load 132 modules", "load 132 modules + step", "a step without LoRA"]
    assert all(float(row[3]) > 0 for row in loading) and float(loading[1][4]) < 1e-5
    tools = {row[0]: row[1:] for row in rows(text, "tool")}
    assert len(tools) == 9
    assert all(re.match(r"[\d.]+ (m?s|µs)", row[0]) and float(row[1].split()[0]) >= 0 for row in tools.values())
    assert "132 modules" in tools["extract, rank 32, randomized SVD"][2]


def test_loading_and_loras_are_timed_and_both_sides_compute_the_same(text):
    loads = rows(text, "loading")
    assert [row[:2] for row in loads] == [[f"{side}", cache] for cache in ("warm", "cold") for side in (
        "ours, file", "theirs, from_single_file", "ours, folder", "theirs, from_pretrained")]
    assert all(float(row[6]) < 1e-5 for row in loads)
    steps = [row for row in rows(text, "LoRA") if "step" in row[0]]
    assert len(steps) == 5 and all(float(row[4]) < 1e-5 for row in steps)
    assert rows(text, "merging")[-1][4].startswith("ours 0, ")


def test_a_ratio_is_that_of_the_medians():
    assert ratio([3.0, 1.0, 2.0], [4.0, 100.0, 4.0]) == ["2.00 s", "4.00 s", "0.50"]
    assert [duration(s) for s in (12.345, 0.0123, 4e-6)] == ["12.35 s", "12.3 ms", "4 µs"]
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_the_size_of_latents_follows_the_model():
    assert (Options(full=True).latent, Options(full=True, size=256).latent, Options().latent) == (64, 32, 8)
