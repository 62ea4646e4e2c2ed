"""The rules of docs/design.md that are about the code as it stands: imports, names, size."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.docs.reading import ROOT

# A file imports from its own folder, and from files and folders on lower floors; the ground floor comes first.
FLOORS = (
    ("errors", "escape", "cpu"),
    ("config", "adapters", "files"),
    ("attention", "graphs", "prompts", "sampling", "pictures"),
    ("clip", "unet", "vae", "checkpoints"),
    ("lora_files",),
    ("models", "lora", "packed"),
    ("request", "placement", "model_loader"),
    ("pipeline", "tools"),
    ("training", "any_model"),
    ("commands",),
)


def test_the_program_runs_as_a_module_and_a_mistake_is_one_sentence():
    run = subprocess.run([sys.executable, "-m", "sd", "generate", "7", "--model", "nowhere.safetensors"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr == "error: nowhere.safetensors: no such file\n" and run.stdout == ""


def imports(path: Path) -> set[str]:
    """The files and folders of sd/ that a file imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "sd" else {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name.split(".")[1] for name in found if name.startswith("sd.")}


def test_a_file_imports_only_from_its_own_folder_and_from_lower_floors():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for path in (ROOT / "sd").rglob("*.py"):
        room = path.relative_to(ROOT / "sd").with_suffix("").parts[0]
        if room.startswith("__"):
            continue
        above = {other for other in imports(path) if other != room and floor[other] >= floor[room]}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_importing_the_package_is_quick_and_silent_and_leaves_transformers_alone():
    code = ("import sys, sd.pipeline, sd.model_loader; "
            "assert not {'transformers', 'diffusers', 'peft', 'matplotlib'} & set(sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == run.stderr == ""


def test_foreign_key_names_appear_in_the_files_of_names_and_formats_only():
    for path in (ROOT / "sd").rglob("*.py"):
        if path.parent.name not in ("checkpoints", "lora_files"):
            assert not re.search(r"\bto_q\b|input_blocks|lora_unet_down", path.read_text()), path


def test_the_project_stays_small():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    assert sum((ROOT / f).stat().st_size for f in tracked if f and (ROOT / f).exists()) < 50e6


def test_each_test_that_the_list_of_promises_names_exists():
    named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", (ROOT / "docs/tests.md").read_text())
    assert len(named) > 80
    for file, name in named:
        defined = {node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body
                   if isinstance(node, ast.FunctionDef)}
        assert name in defined, f"tests/{file}::{name}"
