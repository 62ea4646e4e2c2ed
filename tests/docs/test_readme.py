"""Every command of README.md, and its Python, runs and does what it says."""

import shlex
from pathlib import Path

from sd.commands.main import COMMANDS, main
from tests.docs.reading import blocks, quick_command
from tests.docs.test_guide import greyer


def test_the_python_of_the_readme_runs(elsewhere):
    (code,) = blocks("README.md", "python")
    values: dict = {}
    exec(compile(code.replace("seed=1", "seed=1, n_inference_steps=8"), "README.md", "exec"), values)
    assert greyer(values["picture"], values["plain"]) and values["sheet"].ndim == 3


def commands() -> list[str]:
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m sd") and "v1-5" not in line]


def test_the_commands_of_the_readme_run(elsewhere):
    assert {line.split()[3] for line in commands()} == set(COMMANDS)
    for line in commands():
        assert main(quick_command(shlex.split(line)[3:])) == 0, line
    for file in ("out/apple.png", "out/compare.png", "out/delft/lora.safetensors", "out/merged.safetensors"):
        assert Path(file).stat().st_size > 0
    assert main(["generate", "--again", "out/apple.png", "--out", "out/again.png"]) == 0
    assert Path("out/again.png").read_bytes() == Path("out/apple.png").read_bytes()
