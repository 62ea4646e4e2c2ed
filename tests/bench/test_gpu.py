"""The program for a GPU runs on a CPU, at the size of a test, to its end; nothing is asserted on time."""

import json
import os
import subprocess
import sys

import pytest

from bench.gpu import SECTIONS, aims, table
from tests.docs.reading import ROOT

QUICK = [section for section in SECTIONS if section != "compiled"]  # which takes minutes on a CPU

# The packages of a program of Stable Diffusion that a GPU machine may lack, or hide.
HIDE = "import runpy, sys; sys.modules.update(dict.fromkeys({hidden!r})); runpy.run_module('bench.gpu', run_name='__main__')"


def rows_of(tmp_path, *arguments, hidden=()):
    command = [sys.executable, "-c", HIDE.format(hidden=hidden), "--tiny", "--device", "cpu", "--n", "1",
               "--out", str(tmp_path / "gpu"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert printed == rows and (tmp_path / "gpu.md").read_text() in done.stdout
    return rows


def of(rows, section):
    return [row for row in rows if row["section"] == section]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return rows_of(tmp_path_factory.mktemp("gpu"), "--budget", "600", "--only", *QUICK)


def test_every_section_runs_and_none_fails(rows):
    assert [section for section in QUICK if not of(rows, section)] == []
    assert [row for row in rows if row["what"] in ("failed", "cut short", "not begun", "left out")] == []


def test_graphs_compute_what_the_network_does_and_no_switch_captures_anew(rows):
    found = [(row["what"], row["mode"], row["batch"]) for row in of(rows, "inference") if "mode" in row]
    assert found == [(what, mode, batch) for batch in (1, 4) for what in ("base", "adapters", "merged", "four routed")
                     for mode in ("eager", "graph") if (what, batch) != ("four routed", 1)]
    assert all(row["difference"] == 0 for row in of(rows, "inference") if "mode" in row)
    assert [row["captured_anew"] for row in of(rows, "switching")] == [0, 0]


def test_training_is_timed_on_both_sides(rows):
    assert {row["checkpointing"] for row in of(rows, "training")} == {False, True}
    assert len([row for row in of(rows, "training") if row["who"] == "diffusers + PEFT"]) == 4
    assert dict(aims(rows))["training >= 3 times the images a second of diffusers' script"] != "nan"


def test_what_needs_other_packages_is_left_out_without_them(tmp_path):
    hidden = ("diffusers", "peft", "transformers", "tyro", "pytest", "hypothesis", "yaml", "tqdm", "PIL", "accelerate")
    rows = rows_of(tmp_path, "--budget", "600", "--only", "ceilings", "switching", "pictures", "peers", "tests", hidden=hidden)
    assert [row["what"] for row in rows if row["section"] in ("pictures", "peers")] == ["left out"] * 2
    assert len(of(rows, "switching")) == 2 and not [row for row in rows if row["what"] == "failed"]


def test_a_section_that_fails_stops_nothing_and_the_budget_is_kept(tmp_path, monkeypatch, capsys):
    from bench import gpu

    def broken(b):
        raise ValueError("on purpose")

    def slow(b):
        b.time(lambda: None, 10**9)

    monkeypatch.setattr(gpu.graphs, "TAPES", dict(gpu.graphs.TAPES))  # the stand-in is for this run alone
    monkeypatch.setattr(gpu, "SECTIONS", {"one": broken, "two": slow, "three": broken})
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--device", "cpu", "--budget", "2", "--out", str(tmp_path / "x"),
                                      "--only", "one", "two", "three"])
    gpu.main()
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()][1:]
    assert [(row["section"], row["what"]) for row in rows] == [
        ("one", "failed"), ("two", "cut short"), ("three", "not begun")]
    assert rows[0]["result"] == "ValueError: on purpose" and rows[1]["at_s"] < 10


def test_the_table_has_a_row_for_each_and_what_has_no_column_is_in_the_last():
    text = table([{"section": "a", "what": "b", "ms": 1.5, "range": [1, 2], "error": 0.25, "n": 3}])
    assert text.splitlines()[-1] == "| a |  | b |  |  |  | 1.5 | 1 to 2 |  |  |  | error 0.25 |"


def test_without_a_gpu_it_says_how_to_try_it(monkeypatch, capsys):
    from bench import gpu
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "--tiny --device cpu" in capsys.readouterr().err
