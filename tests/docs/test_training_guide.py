"""Every command of docs/training.md runs."""

import shlex
import shutil
from pathlib import Path

from sd.commands.main import main
from sd.training.dataset.sources import read_sources
from tests.docs.reading import blocks, quick_command


def test_the_commands_of_the_training_guide_run(elsewhere):
    config, sources = blocks("docs/training.md", "toml")
    Path("train.toml").write_text(config)
    Path("sources.toml").write_text(sources)
    for name in ("photos", "drawings"):
        shutil.copytree("data/emoji-delft", name)
    assert len(read_sources("sources.toml")) == 16
    lines = [line for block in blocks("docs/training.md", "sh") for line in block.splitlines() if line.startswith("python")]
    assert len(lines) > 10
    for line in lines:
        assert main(quick_command(shlex.split(line)[3:])) == 0, line
    assert Path("out/relora/lora.safetensors").exists() and Path("out/watched/samples.png").exists()
