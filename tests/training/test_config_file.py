"""Options of a training from a file, from flags, and from both."""

import json
from dataclasses import asdict, fields

import pytest

from sd.commands.main import COMMANDS, main
from sd.commands.parse import parse
from sd.training import TrainConfig, TrainError
from sd.training.config_file import config_flags, read_config

TOML = """
data = "pictures"
steps = 50
[lora]
rank = 8
alpha = 4
targets = ["attn", "conv1"]
dora = true
[optimizer]
learning_rate = 2e-4
betas = [0.9, 0.95]
schedule = "cosine"
"""
YAML = """
data: pictures
steps: 50
lora: {rank: 8, alpha: 4, targets: [attn, conv1], dora: true}
optimizer:
  learning_rate: 2e-4
  betas: [0.9, 0.95]
  schedule: cosine
"""
JSON = json.dumps({"data": "pictures", "training": {"steps": 50}, "rank": 8, "alpha": 4, "targets": ["attn", "conv1"],
                   "dora": True, "optimizer": {"learning_rate": 2e-4, "betas": [0.9, 0.95], "schedule": "cosine"}})
EXPECTED = TrainConfig(data="pictures", steps=50, rank=8, alpha=4.0, targets=("attn", "conv1"), dora=True, learning_rate=2e-4,
                       betas=(0.9, 0.95), schedule="cosine")


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name, text", [("a.toml", TOML), ("a.yaml", YAML), ("a.YML", YAML), ("a.json", JSON)])
def test_a_file_flat_or_in_sections_is_the_config(tmp_path, name, text):
    path = write(tmp_path, name, text)
    assert TrainConfig(**read_config(path)) == EXPECTED
    assert parsed("train", "--config", path) == EXPECTED


def parsed(*argv) -> TrainConfig:
    args = parse([str(word) for word in argv], COMMANDS)
    return TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})


def test_flags_win_over_the_file_wherever_they_stand(tmp_path):
    path = write(tmp_path, "a.toml", TOML + "flip = true\n")  # in the section of the optimizer, which only groups
    for argv in (["train", "--rank", "2", "--no-dora", "--config", path, "--targets", "kohya"],
                 ["train", f"--config={path}", "--targets", "kohya", "--no-dora", "--rank=2"]):
        config = parsed(*argv)
        assert (config.rank, config.dora, config.targets, config.alpha, config.flip) == (2, False, ("kohya",), 4.0, True)


def test_the_config_that_a_run_saves_is_such_a_file(tmp_path):
    path = write(tmp_path, "config.json", json.dumps(asdict(EXPECTED)))
    assert TrainConfig(**read_config(path)) == EXPECTED == parsed("train", "--config", path)


def test_every_field_survives_the_way_through_flags():
    changed = {f.name: not f.default for f in fields(TrainConfig) if isinstance(f.default, bool)}
    changed |= {"text_learning_rate": 1e-5, "size": 64, "prefix": "-a b", "cache": "a folder", "betas": (0.5, 0.25)}
    changed.pop("zero_terminal_snr"), changed.pop("rslora"), changed.pop("shard")
    config = TrainConfig(**(changed | {"unet": True}))
    assert parsed("train", *config_flags(asdict(config))) == config


def test_loraws_section_is_read(tmp_path):
    section = {"component_whitelist": ["unet", "attn2"], "multiplier": 0.5, "rank": 16, "alpha": 8, "dropout": 0.1,
               "module_dropout": 0.2, "lr": 1e-4, "weight_decompose": True}
    config = TrainConfig(**read_config(write(tmp_path, "a.json", json.dumps({"lora": section}))))
    assert (config.rank, config.alpha, config.dropout, config.module_dropout) == (16, 4.0, 0.1, 0.2)
    assert (config.learning_rate, config.dora, config.targets) == (1e-4, True, ("attn2",))
    assert config.unet and not config.text_encoder


@pytest.mark.parametrize("name, text, message", [
    ("a.toml", "rnk = 8", "'rnk' is not a training option; did you mean 'rank'?"),
    ("a.toml", "[net]\nrank = 8", "has a section 'net'; allowed: data, model, lora"),
    ("a.toml", "rank = 8\n[lora]\nrank = 4", "rank is given twice"),
    ("a.toml", "rank = 8.5", "rank is 8.5; it must be a whole number"),
    ("a.toml", "rank = '8'", "rank is '8'; it must be a whole number"),
    ("a.toml", "dora = 1", "dora is 1; it must be true or false"),
    ("a.toml", "alpha = true", "alpha is True; it must be a number"),
    ("a.toml", "betas = 0.9", "betas is 0.9; it must be a list"),
    ("a.json", '{"betas": [0.9]}', "betas is [0.9]; it must be a list of 2"),
    ("a.toml", "schedule = 'cos'", "schedule is 'cos'; allowed: constant, cosine"),
    ("a.toml", "[lora]\nmultiplier = 'x'", "multiplier is 'x'; it must be a number"),
    ("a.toml", "[lora]\ncomponent_whitelist = 3", "component_whitelist is 3; it must be a list"),
    ("a.toml", "rank = ", "cannot be read: Invalid value"),
    ("a.json", "[1]", "has no names with values"),
    ("a.yaml", "a: [", "cannot be read: while parsing"),
    ("a.yaml", "!!python/object/apply:os.system ['false']", "cannot be read: could not determine a constructor"),
    ("a.ini", "", "a config is a .toml, .json, .yaml, .yml file"),
])
def test_what_is_wrong_in_a_file_is_named(tmp_path, name, text, message, capsys):
    path = write(tmp_path, name, text)
    with pytest.raises(TrainError) as error:
        read_config(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert main(["train", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_a_sentence(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "no.toml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'no.toml'}: No such file or directory\n"
