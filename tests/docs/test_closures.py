"""How much of sd/ must be loaded for a module: its closure, by the imports at the top of files.

pytest tests/docs/test_closures.py -s      prints the table
"""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.docs.reading import ROOT

# A module -> how many lines of definitions its closure may have.
LIMITS = {"adapters/layer": 1120, "attention": 1350, "unet": 2100, "training/loss": 1900, "training/config": 550,
          "pipeline": 5000}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def file_of(name: str) -> Path | None:
    """The file of a module; none for a name that is defined in a module, and for what is not ours."""
    if name.split(".")[0] != "sd":
        return None
    path = ROOT / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def at_top(node: ast.AST):
    """Statements that run when a file is loaded, also those in if and try."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from at_top(child)


def imported(path: Path) -> set[Path]:
    """The files of sd/ whose definitions a file imports when it is loaded.

    The __init__ of a folder that is only on the way counts for nothing: it defines nothing, and is there for users.
    """
    files = set()
    for node in at_top(tree(path)):
        if isinstance(node, ast.Import):
            files |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            files |= {file_of(f"{node.module}.{alias.name}") or file_of(node.module) for alias in node.names}
    return files - {None}


def closure(name: str) -> set[Path]:
    found, waiting = set(), [ROOT / "sd" / f"{name}.py"]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported(path)
    return found


def lines(path: Path) -> int:
    """Lines of functions, classes and constants."""
    passed = ast.Import | ast.ImportFrom | ast.Expr
    return sum(node.end_lineno - min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) + 1
               for node in tree(path).body if not isinstance(node, passed))


@pytest.mark.parametrize("name", LIMITS)
def test_a_module_loads_few_files_and_lines(name):
    files = closure(name)
    count = sum(lines(path) for path in files)
    print(f"\n{name:16} {len(files):3} files {count:5} lines of definitions, at most {LIMITS[name]}", end="")
    assert count <= LIMITS[name], sorted(str(path.relative_to(ROOT / "sd")) for path in files)


def test_adapters_import_torch_the_base_error_and_the_escape_of_names_alone():
    files = set((ROOT / "sd/adapters").glob("*.py"))
    for path in files:
        assert imported(path) <= files | {ROOT / "sd/errors.py", ROOT / "sd/escape.py"}, path.name
        others = {name.split(".")[0] for node in at_top(tree(path)) if isinstance(node, ast.Import | ast.ImportFrom)
                  for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])}
        known = {"torch", "sd"} | ({"transformers"} if path.name == "transformers_conv1d.py" else set())  # loaded on demand
        assert others - sys.stdlib_module_names <= known, path.name
