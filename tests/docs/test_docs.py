"""The rules of docs/design.md that are about the code as it stands: imports, names, size."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.docs.reading import ROOT

<<<<<<< HEAD
from sd.commands.main import COMMANDS, main
from sd.lora import active_multipliers, adapter_names, lora_layers, remove_lora
from sd.model_loader import preload_models_from_standard_weights
from sd.pictures.image_io import read_parameters
from sd.training.dataset.sources import read_sources

ROOT = Path(__file__).resolve().parents[2]
||||||| 029fefc
from sd.commands.main import TOOLS, main
from sd.lora import active_multipliers, adapter_names, lora_layers, remove_lora
from sd.model_loader import preload_models_from_standard_weights
from sd.pictures.image_io import read_parameters
from sd.training.dataset.sources import read_sources

ROOT = Path(__file__).resolve().parents[2]
=======
>>>>>>> tests
# A file imports from its own folder, and from files and folders on lower floors; the ground floor comes first.
FLOORS = (
    ("errors", "escape"),
    ("config", "adapters", "files"),
    ("attention", "prompts", "sampling", "pictures"),
    ("clip", "unet", "vae", "checkpoints"),
    ("lora_files",),
    ("models", "lora"),
    ("request", "placement", "model_loader"),
    ("pipeline", "tools"),
    ("training", "any_model"),
    ("commands",),
)


<<<<<<< HEAD
def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(), re.S | re.M)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with data/ in it, so that what the documents write does not land in the project."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seen(name):
    return lambda v: v[name].shape == (64, 64, 3) and v[name].std() > 30


def colour(picture):
    return np.mean(picture.max(axis=-1).astype(int) - picture.min(axis=-1))


def greyer(a, b):
    return colour(a) < 0.5 * colour(b)


# One check for each block of LORA_README.md, in order: what the block promises.
CHECKS = [
    lambda v: active_multipliers(v["models"]) == {"contrast": 1.0} and v["models"].lora_reports["contrast"].tensors > 0,
    lambda v: (v["models"].lora_reports["half"].blocks == {"mid_block": 0, "up_blocks.1": 0.5}
               and len(v["models"].lora_reports["half"].skipped) == 21 and not remove_lora(v["models"], "half")),
    lambda v: (greyer(v["with_lora"], v["without"]) and seen("without")(v)
               and read_parameters("apple.png")["lora"] == {"contrast": 1.0}),
    lambda v: v["sheet"].ndim == 3 and Path("sheet.png").stat().st_size > 0,
    lambda v: (colour(v["without"]) > colour(v["half"]) > colour(v["with_lora"]) and greyer(v["four"][1], v["four"][0])
               and np.abs(v["four"][1].astype(int) - v["four"][0]).max() > 100),
    lambda v: (np.array_equal(v["off"], v["without"]) and greyer(v["pair"][1], v["pair"][0])
               and colour(v["without"]) > colour(v["blended"]) and active_multipliers(v["models"]) == {"contrast": 1.0}),
    lambda v: all((Path("out/guide") / n).exists() for n in ("delft.safetensors", "metrics.jsonl", "loss.png")),
    lambda v: torch.isfinite(v["loss"]) and any(p.any() for p in v["parameters"][1::2]) and Path("mine.safetensors").exists(),
    lambda v: list(v["models"]["clip"].words) == ["<tile>"],
    lambda v: v["words"] == ["<tile>"] and seen("tile")(v) and not v["models"]["clip"].words,
    lambda v: adapter_names(v["mine"]) == ["convs", "default", "qv"],
    lambda v: all(layer.merged_weight is None for layer in lora_layers(v["models"]).values()),
    lambda v: (np.array_equal(v["same"], v["with_lora"]) and not lora_layers(v["deployed"])
               and preload_models_from_standard_weights("merged-folder").config.unet == v["deployed"].config.unet),
    lambda v: (v["facts"]["modules"] == {"unet": 131}
               and all(Path(f"{n}.safetensors").exists() for n in ("sum", "best", "small", "found", "diffusers"))),
    lambda v: (torch.equal(v["same"], v["base"]) and torch.allclose(v["routed"][1], v["base"][1], atol=1e-6)
               and not torch.allclose(v["routed"][0], v["base"][0]) and type(v["deployed"]) is nn.TransformerEncoder
               and not adapter_names(v["deployed"])),
    lambda v: ({group["lr"] for group in v["optimizer"].param_groups} == {1e-4, 1e-3}
               and not v["wrapped"]["ff"].weight.requires_grad
               and set(lora_layers(v["wrapped"])) == {"attn.to_q", "attn.to_v"}),
]


def test_every_block_of_the_guide_runs_and_does_what_it_says(elsewhere):
    code = blocks("LORA_README.md", "python")
    assert len(code) == len(CHECKS)
    values: dict = {}
    for block, check in zip(code, CHECKS):
        exec(compile(block, "LORA_README.md", "exec"), values)
        assert check(values), block


def test_the_python_of_the_readme_runs(elsewhere):
    (code,) = blocks("README.md", "python")
    values: dict = {}
    exec(compile(code, "README.md", "exec"), values)
    assert greyer(values["picture"], values["plain"]) and values["sheet"].ndim == 3


def commands() -> list[str]:
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m sd") and "v1-5" not in line]


def test_the_commands_of_the_readme_run(elsewhere, capsys):
    assert {line.split()[3] for line in commands()} == set(COMMANDS)
    for line in commands():
        line = line.replace("--steps 300", "--steps 4")  # what is shown is the command, not the training
        assert main(shlex.split(line)[3:]) == 0, line
    for file in ("out/apple.png", "out/compare.png", "out/delft/lora.safetensors", "out/merged.safetensors"):
        assert Path(file).stat().st_size > 0
    assert main(["generate", "--again", "out/apple.png", "--out", "out/again.png"]) == 0
    assert Path("out/again.png").read_bytes() == Path("out/apple.png").read_bytes()


def test_the_commands_of_the_training_guide_run(elsewhere):
    config, sources = blocks("docs/training.md", "toml")
    Path("train.toml").write_text(config)
    Path("sources.toml").write_text(sources)
    for name in ("photos", "drawings"):
        shutil.copytree(ROOT / "data/emoji-delft", name)
    assert len(read_sources("sources.toml")) == 80
    lines = [line for block in blocks("docs/training.md", "sh") for line in block.splitlines() if line.startswith("python")]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line)[3:]
        for flag in ("--steps", "--validate-every", "--sample-every", "--relora-every", "--relora-warmup"):
            if flag in words:  # what is shown is the command, not the training
                words[words.index(flag) + 1:words.index(flag) + 2] = ["2"]
        quick = ["--no-progress", *([] if "--steps" in words else ["--steps", "3"])] if words[0] == "train" else []
        quick += ["--relora-warmup", "1"] if "--relora-every" in words else []
        quick += ["--sample-steps", "2"] if "--sample-every" in words else []
        assert main(words + quick) == 0, line
    assert Path("out/relora/lora.safetensors").exists() and Path("out/watched/samples.png").exists()


def test_the_program_runs_as_a_module_and_a_mistake_is_one_sentence(elsewhere):
||||||| 029fefc
def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(), re.S | re.M)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with data/ in it, so that what the documents write does not land in the project."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seen(name):
    return lambda v: v[name].shape == (64, 64, 3) and v[name].std() > 30


def colour(picture):
    return np.mean(picture.max(axis=-1).astype(int) - picture.min(axis=-1))


def greyer(a, b):
    return colour(a) < 0.5 * colour(b)


# One check for each block of LORA_README.md, in order: what the block promises.
CHECKS = [
    lambda v: active_multipliers(v["models"]) == {"contrast": 1.0} and v["models"].lora_reports["contrast"].tensors > 0,
    lambda v: (v["models"].lora_reports["half"].blocks == {"mid_block": 0, "up_blocks.1": 0.5}
               and len(v["models"].lora_reports["half"].skipped) == 21 and not remove_lora(v["models"], "half")),
    lambda v: (greyer(v["with_lora"], v["without"]) and seen("without")(v)
               and read_parameters("apple.png")["lora"] == {"contrast": 1.0}),
    lambda v: v["sheet"].ndim == 3 and Path("sheet.png").stat().st_size > 0,
    lambda v: (colour(v["without"]) > colour(v["half"]) > colour(v["with_lora"]) and greyer(v["four"][1], v["four"][0])
               and np.abs(v["four"][1].astype(int) - v["four"][0]).max() > 100),
    lambda v: (np.array_equal(v["off"], v["without"]) and greyer(v["pair"][1], v["pair"][0])
               and colour(v["without"]) > colour(v["blended"]) and active_multipliers(v["models"]) == {"contrast": 1.0}),
    lambda v: all((Path("out/guide") / n).exists() for n in ("delft.safetensors", "metrics.jsonl", "loss.png")),
    lambda v: torch.isfinite(v["loss"]) and any(p.any() for p in v["parameters"][1::2]) and Path("mine.safetensors").exists(),
    lambda v: list(v["models"]["clip"].words) == ["<tile>"],
    lambda v: v["words"] == ["<tile>"] and seen("tile")(v) and not v["models"]["clip"].words,
    lambda v: adapter_names(v["mine"]) == ["convs", "default", "qv"],
    lambda v: all(layer.merged_weight is None for layer in lora_layers(v["models"]).values()),
    lambda v: (np.array_equal(v["same"], v["with_lora"]) and not lora_layers(v["deployed"])
               and preload_models_from_standard_weights("merged-folder").config.unet == v["deployed"].config.unet),
    lambda v: (v["facts"]["modules"] == {"unet": 131}
               and all(Path(f"{n}.safetensors").exists() for n in ("sum", "best", "small", "found", "diffusers"))),
    lambda v: (torch.equal(v["same"], v["base"]) and torch.allclose(v["routed"][1], v["base"][1], atol=1e-6)
               and not torch.allclose(v["routed"][0], v["base"][0]) and type(v["deployed"]) is nn.TransformerEncoder
               and not adapter_names(v["deployed"])),
    lambda v: ({group["lr"] for group in v["optimizer"].param_groups} == {1e-4, 1e-3}
               and not v["wrapped"]["ff"].weight.requires_grad
               and set(lora_layers(v["wrapped"])) == {"attn.to_q", "attn.to_v"}),
]


def test_every_block_of_the_guide_runs_and_does_what_it_says(elsewhere):
    code = blocks("LORA_README.md", "python")
    assert len(code) == len(CHECKS)
    values: dict = {}
    for block, check in zip(code, CHECKS):
        exec(compile(block, "LORA_README.md", "exec"), values)
        assert check(values), block


def test_the_python_of_the_readme_runs(elsewhere):
    (code,) = blocks("README.md", "python")
    values: dict = {}
    exec(compile(code, "README.md", "exec"), values)
    assert greyer(values["picture"], values["plain"]) and values["sheet"].ndim == 3


def commands() -> list[str]:
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m sd") and "v1-5" not in line]


def test_the_commands_of_the_readme_run(elsewhere, capsys):
    assert {line.split()[3] for line in commands()} == {"generate", "compare", "train", *TOOLS}
    for line in commands():
        line = line.replace("--steps 300", "--steps 4")  # what is shown is the command, not the training
        assert main(shlex.split(line)[3:]) == 0, line
    for file in ("out/apple.png", "out/compare.png", "out/delft/lora.safetensors", "out/merged.safetensors"):
        assert Path(file).stat().st_size > 0
    assert main(["generate", "--again", "out/apple.png", "--out", "out/again.png"]) == 0
    assert Path("out/again.png").read_bytes() == Path("out/apple.png").read_bytes()


def test_the_commands_of_the_training_guide_run(elsewhere):
    config, sources = blocks("docs/training.md", "toml")
    Path("train.toml").write_text(config)
    Path("sources.toml").write_text(sources)
    for name in ("photos", "drawings"):
        shutil.copytree(ROOT / "data/emoji-delft", name)
    assert len(read_sources("sources.toml")) == 80
    lines = [line for block in blocks("docs/training.md", "sh") for line in block.splitlines() if line.startswith("python")]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line)[3:]
        for flag in ("--steps", "--validate-every", "--sample-every", "--relora-every", "--relora-warmup"):
            if flag in words:  # what is shown is the command, not the training
                words[words.index(flag) + 1:words.index(flag) + 2] = ["2"]
        quick = ["--no-progress", *([] if "--steps" in words else ["--steps", "3"])] if words[0] == "train" else []
        quick += ["--relora-warmup", "1"] if "--relora-every" in words else []
        quick += ["--sample-steps", "2"] if "--sample-every" in words else []
        assert main(words + quick) == 0, line
    assert Path("out/relora/lora.safetensors").exists() and Path("out/watched/samples.png").exists()


def test_the_program_runs_as_a_module_and_a_mistake_is_one_sentence(elsewhere):
=======
def test_the_program_runs_as_a_module_and_a_mistake_is_one_sentence():
>>>>>>> tests
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
