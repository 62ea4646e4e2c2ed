"""The lesson of digits at a tiny size: every command of its text, all its configs, and what stops it."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from recipes.digits import data, evaluate, lesson, lesson_judge
from recipes.digits.lesson import LessonError, digit_pictures, load_base, load_both, main, read_lesson
from sd.commands import main as cli
from sd.config import ModelConfig
from sd.files.tensors import read_tensors
from sd.lora import remove_lora
from sd.pipeline import generate

loop = importlib.import_module("sd.training.loop")
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("recipes/digits")
LESSONS = sorted(path.name for path in (ROOT / FOLDER).glob("lesson-*.yaml"))
TINY = {"clip": {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "max_tokens": 16}}
TINY_UNET = {"widths": [16, 16], "attention": [False, False], "heads": 2, "context_width": 16, "norm_groups": 4}
FEW = {"steps": 2, "batch_size": 4, "warmup": 0, "save_every": 1, "progress": False}


@pytest.fixture
def class_room(tmp_path, monkeypatch):
    """A folder with the configs at a tiny size, 20 digits of noise, and nobody's out/digits."""
    for name in LESSONS:
        told = yaml.safe_load((ROOT / FOLDER / name).read_text())
        told["model"] |= TINY
        told["model"]["unet"] |= TINY_UNET
        told["train"] |= FEW
        told["lora"] |= FEW
        told["sample"]["n_inference_steps"] = 1
        (tmp_path / FOLDER).mkdir(parents=True, exist_ok=True)
        (tmp_path / FOLDER / name).write_text(yaml.safe_dump(told))
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    x = torch.rand(20, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    digits = torch.arange(20) % 10
    for module in (data, evaluate, lesson, lesson_judge):
        monkeypatch.setattr(module, "load_mnist", lambda: (x, digits))
        monkeypatch.setattr(module, "split", lambda digits: (torch.arange(20), torch.arange(0)))
    monkeypatch.setattr(lesson_judge, "train_classifier", lambda *_: evaluate.classifier().eval())
    monkeypatch.setattr(lesson_judge, "EACH", 1)
    return tmp_path


def config(name: str = "lesson-pixels.yaml") -> list[str]:
    return ["--config", str(FOLDER / name)]


def weights(path: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in read_tensors(path).items()}


@pytest.mark.parametrize("name", LESSONS)
def test_each_lesson_trains_a_base_and_a_lora_on_it_and_draws_both(class_room, name):
    told = read_lesson(config(name)[1])
    main(config(name))
    before = weights(f"{told['out']}/base/model.safetensors")
    main([*config(name), "--use-lora"])
    main([*config(name), "--sample"])
    assert Path(told["out"], "inverted.png").stat().st_size > 0
    after = weights(f"{told['out']}/base/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    models = load_base(told)
    assert (models.config.prediction, models.config.beta_schedule) == ("v", "cosine")
    assert bool(models.config.vae.widths) == ("autoencoder" in told)
    arguments = {"seed": 3, **told["sample"]}
    base = generate("7", models=models, **arguments)
    both, lora = load_both(told)
    changed = generate("7", models=both, lora={lora: 1.0}, **arguments)
    assert not np.array_equal(changed, base)
    assert np.array_equal(generate("7", models=both, lora={lora: 0.0}, **arguments), base)
    remove_lora(both, lora)
    assert np.array_equal(generate("7", models=both, **arguments), base)


def test_there_are_lessons_of_one_channel_of_three_and_of_latents():
    told = [yaml.safe_load((ROOT / FOLDER / name).read_text()) for name in LESSONS]
    assert sorted(one["model"].get("vae", {}).get("image_channels", 0) for one in told) == [0, 1, 3]


def test_colours_and_captions_belong_to_the_pictures(class_room):
    grey = digit_pictures(ModelConfig.from_dict(read_lesson(config()[1])["model"]))[0]
    told = read_lesson(config("lesson-colours.yaml")[1])
    pictures, texts = digit_pictures(ModelConfig.from_dict(told["model"]))
    assert pictures.shape == (20, 3, 28, 28) and pictures.min() >= -1 and pictures.max() <= 1
    assert texts[0] == ("a red zero", "a red 0") and texts[7][0] == "a yellow seven"
    assert torch.equal(pictures[0, :1], (grey[0] + 1) - 1) and (pictures[0, 1:] == -1).all()
    assert torch.equal(pictures[7, 0], pictures[7, 1]) and (pictures[7, 2] == -1).all()


def test_the_lora_sees_the_digits_of_the_base_inverted_with_the_same_captions(class_room, monkeypatch):
    seen = []
    main(config())
    monkeypatch.setattr(lesson, "train", lambda config, models, dataset: seen.append((config, dataset)))
    main(config())
    main([*config(), "--use-lora"])
    (base, white), (lora, black) = seen
    assert torch.equal(white.pictures, -black.pictures) and white.captions == black.captions and len(white) == 20
    assert (base.train, base.unet, base.text_encoder, lora.train, lora.name) == ("full", True, True, "lora", "inverted")


def stopped(monkeypatch, arguments: list[str]) -> None:
    """The command, killed when it begins its step 2."""
    original = loop.seed_of

    def power_cut(seed, stream, number):
        if number == 2:
            raise KeyboardInterrupt
        return original(seed, stream, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "seed_of", power_cut)
        main(arguments)


def test_a_training_that_was_stopped_ends_with_the_same_bits(class_room, monkeypatch):
    changes = ["--set", "train.steps=4", "lora.steps=4"]
    main([*config(), *changes])
    main([*config(), *changes, "--use-lora"])
    whole = Path("out/lesson/pixels").rename("whole")
    stopped(monkeypatch, [*config(), *changes])
    main([*config(), *changes])
    stopped(monkeypatch, [*config(), *changes, "--use-lora"])
    main([*config(), *changes, "--use-lora"])
    for file in ("base/model.safetensors", "inverted/inverted.safetensors"):
        assert (whole / file).read_bytes() == Path("out/lesson/pixels", file).read_bytes(), file


def test_a_step_before_its_turn_is_one_sentence(class_room):
    run = subprocess.run([sys.executable, "-m", "recipes.digits.lesson", *config(), "--use-lora"], capture_output=True,
                         text=True, env=os.environ | {"PYTHONPATH": str(Path(lesson.__file__).parents[2])})
    assert (run.returncode, run.stdout) == (1, "") and run.stderr == (
        "out/lesson/pixels/base/model.safetensors: no such file; first train the base: the same command without --use-lora or "
        "--sample\n")
    with pytest.raises(LessonError, match="first train the base"):
        main([*config(), "--sample"])
    main(config())
    with pytest.raises(LessonError, match="inverted.safetensors: no such file; first train the LoRA: the same command with"):
        main([*config(), "--sample"])


@pytest.mark.parametrize("change, message", [
    ("train.stepz=3", "train: 'stepz' is not a training option; did you mean 'steps'"),
    ("lora.rank=many", "lora: rank is 'many'; it must be a whole number"),
    ("model.prediction=w", "prediction 'w' is unknown; allowed: 'eps', 'v'"),
    ("model.widths=3", "unknown field 'widths' in the model config; known: .*unet"),
    ("lora.rank", "--set lora.rank: is not of the form section.name=value, such as lora.rank=16, or out=folder"),
    ("words.rank=3", "--set words.rank=3: is not of the form"),
    ("train=3", "--set train=3: is not of the form"),
])
def test_a_word_that_no_lesson_knows_is_named(class_room, change, message):
    flags = ["--use-lora"] if change.startswith("lora") else []
    if flags:
        main(config())
    with pytest.raises(ValueError, match=message):
        main([*config(), *flags, "--set", change])


def test_a_section_too_many_or_too_few_is_named(class_room):
    for text in ("model: {}", "steps: 3", ""):
        Path("other.yaml").write_text(text)
        with pytest.raises(ValueError, match="other.yaml: "):
            main(["--config", "other.yaml"])


def test_the_judge_tells_a_right_digit_from_an_inverted_one_and_red_from_blue():
    class Judge(torch.nn.Module):
        def forward(self, x):  # 1 for a bright middle in a black frame of 32 x 32, else 0
            assert x.shape[1:] == (1, 32, 32) and (x[:, :, 0] == -1).all()
            return torch.nn.functional.one_hot((x[:, 0, 16, 16] > 0.9).long(), 10)

    red = np.zeros((2, 28, 28, 3), np.uint8)
    red[:, 10:18, 10:18, 0] = 255
    grey = red.max(axis=3, keepdims=True).repeat(3, axis=3)
    ones = torch.tensor([1, 1])
    assert lesson_judge.share(Judge(), grey, ones, [None, None]) == "100.0%"
    assert lesson_judge.share(Judge(), 255 - grey, ones, [None, None]) == "0.0%"
    assert lesson_judge.share(Judge(), red, ones, ["red", "blue"]) == "100.0%, colour 50.0%"


@pytest.mark.smoke
def test_every_command_of_the_text_runs(class_room):
    text = (ROOT / "docs/lesson.md").read_text()
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M) for line in block.splitlines()]
    assert {name for name in LESSONS if f"--config {FOLDER / name}" in text} == set(LESSONS)
    runs = {"recipes.digits.lesson": main, "recipes.digits.lesson_judge": lesson_judge.main, "sd": cli.main}
    for line in lines:
        python, m, module, *words = shlex.split(line)
        assert (python, m) == ("python", "-m") and runs[module](words) in (None, 0), line
    assert {line.split()[2] for line in lines} == set(runs) and Path("out/lesson/pixels/inverted.png").exists()
