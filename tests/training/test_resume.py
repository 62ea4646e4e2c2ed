"""N steps are k steps, a kill at any instant, and N - k steps, bit for bit: the files of the two runs are the same."""

import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sd.files.tensors import read_tensors, write_safetensors
from sd.lora import adapter_names
from sd.model_loader import new_models
from sd.training import PictureSet, TrainConfig, TrainError, train
from tests.training.tiny import SMALL, changed, copy_of, pictures

loop = importlib.import_module("sd.training.loop")

LORA = TrainConfig(rank=2, alpha=2.0, steps=7, batch_size=2, accumulate=2, save_every=2, progress=False,
                   dropout=0.3, rank_dropout=0.2, module_dropout=0.1, text_encoder=True, ema=0.9,
                   schedule="cosine", warmup=2, learning_rate=0.01)
FULL = changed(LORA, train="full", accumulate=1, checkpointing=True)
VAE = changed(LORA, train="vae", accumulate=1)
RUNS = {"lora": LORA, "full": FULL, "vae": VAE}


@pytest.fixture(scope="module")
def untrained():
    return new_models(SMALL, seed=1)


@pytest.fixture
def models(untrained):
    return copy_of(untrained)


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves behind, without the picture and with its own folder's name taken out."""
    found = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix != ".png" and f.name != "timing.jsonl"}
    found["config.json"] = found["config.json"].replace(folder.name.encode(), b"")
    return found


def stopped(config: TrainConfig, models, monkeypatch, k: int = 3) -> None:
    """A run that ends before step k is computed, as if somebody had pulled the plug."""
    original = loop.seed_of

    def power_cut(seed, stream, number):
        if number == k * config.accumulate:
            raise KeyboardInterrupt
        return original(seed, stream, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "seed_of", power_cut)
        train(config, models, pictures())


@pytest.mark.parametrize("what", RUNS)
@pytest.mark.parametrize("k", [1, 5, 6])
def test_a_run_stopped_at_step_k_ends_as_if_it_had_never_been(tmp_path, untrained, what, k, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train(replace(RUNS[what], out=str(whole)), copy_of(untrained), pictures())

    stopped(replace(RUNS[what], out=str(broken)), copy_of(untrained), monkeypatch, k)
    torch.manual_seed(k)  # torch's own random state is another one now
    again = train(replace(RUNS[what], out=str(broken)), copy_of(untrained), pictures())

    assert files(whole).keys() == files(broken).keys()
    for name, content in files(whole).items():
        assert files(broken)[name] == content, name
    for key in result:
        for (name, a), b in zip(result[key].state_dict().items(), again[key].state_dict().values()):
            assert torch.equal(a, b), f"{key}.{name}"


def interrupt(monkeypatch, config, at: int, times: int = 1) -> None:
    """Ctrl-C while step `at` is computed."""
    original = loop.seed_of

    def pressed(seed, stream, number):
        for _ in range(times * (number == at * config.accumulate)):
            os.kill(os.getpid(), signal.SIGINT)
        return original(seed, stream, number)

    monkeypatch.setattr(loop, "seed_of", pressed)


def test_ctrl_c_saves_after_the_step_and_a_second_one_ends_it_at_once(tmp_path, untrained, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config, handler = replace(LORA, save_every=100), signal.getsignal(signal.SIGINT)
    train(replace(config, out=str(whole)), copy_of(untrained), pictures())
    for at, times, saved in ((2, 1, 3), (4, 2, 3)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after 3 of 7 steps" if times == 1 else ""):
            interrupt(patch, config, at, times)
            train(replace(config, out=str(broken)), copy_of(untrained), pictures())
        assert json.loads(read_tensors(broken / "state.safetensors").metadata["progress"])["step"] == saved
        assert signal.getsignal(signal.SIGINT) is handler
    train(replace(config, out=str(broken)), copy_of(untrained), pictures())
    assert files(whole) == files(broken)


def test_a_finished_run_started_again_gives_its_result_at_once(tmp_path, untrained, monkeypatch):
    config = replace(LORA, out=str(tmp_path))
    first = train(config, copy_of(untrained), pictures())
    before = files(tmp_path)
    monkeypatch.setattr("sd.training.step.diffusion_loss", None)  # nothing is computed
    second = train(config, copy_of(untrained), pictures())
    assert files(tmp_path) == before
    a, b = (dict(m["diffusion"].named_parameters()) for m in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("what, between", [("lora", 4), ("lora", 5), ("full", 4)])
def test_a_finished_run_with_a_constant_rate_goes_on_with_more_steps(tmp_path, untrained, what, between):
    config = replace(RUNS[what], schedule="constant", out=str(tmp_path / "whole"))
    train(config, copy_of(untrained), pictures())
    for steps in (between, 7):
        train(replace(config, steps=steps, out=str(tmp_path / "broken")), copy_of(untrained), pictures())
    whole, broken = files(tmp_path / "whole"), files(tmp_path / "broken")
    assert whole == broken
    with pytest.raises(TrainError, match="steps is 6, and .*broken has done 7; allowed: 7 or more"):
        train(replace(config, steps=6, out=str(tmp_path / "broken")), copy_of(untrained), pictures())
    assert files(tmp_path / "broken") == broken


def test_a_run_killed_at_random_instants_and_inside_writes_loses_nothing(tmp_path):
    """`python -m tests.training.kill_training` is the same with 200 kills."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-m", "tests.training.kill_training", str(tmp_path), "4", "6"], env=environment,
                          cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("change, difference", [
    ({"learning_rate": 0.02}, "learning_rate was 0.01, now 0.02"), ({"rank": 3}, "rank was 2, now 3"),
    ({"targets": ("q_proj",)}, r"targets was \['attn'\], now \['q_proj'\]"), ({"steps": 9}, "steps was 7, now 9"),
    ({"seed": 1, "dropout": 0.0}, "dropout was 0.3, now 0.0; seed was 0, now 1")])
def test_a_config_that_cannot_continue_the_run_is_refused_with_the_difference(
        tmp_path, models, change, difference, monkeypatch):
    config = replace(LORA, out=str(tmp_path))
    stopped(config, models, monkeypatch)
    before = files(tmp_path)
    with pytest.raises(TrainError, match=f"holds another training .*{difference}"):
        train(replace(config, **change), models, pictures())
    assert files(tmp_path) == before
    assert adapter_names(models) == []


def test_other_pictures_or_another_base_are_refused_and_what_does_not_matter_may_change(
        tmp_path, models, untrained, monkeypatch):
    config = replace(LORA, out=str(tmp_path))
    stopped(config, models, monkeypatch)
    data = pictures()
    data.captions[0] = ("another",)
    with pytest.raises(TrainError, match="dataset was"):
        train(config, models, data)
    other = copy_of(untrained)
    other["decoder"].conv_in.weight.data[0] += 1
    with pytest.raises(TrainError, match="base was"):
        train(config, other, pictures())
    os.rename(tmp_path, tmp_path.with_name("moved"))
    moved = tmp_path.with_name("moved")
    train(replace(config, out=str(moved), save_every=5, checkpointing=True), models, pictures())
    assert json.loads(read_tensors(moved / "state.safetensors").metadata["progress"])["step"] == 7


def test_a_run_of_a_program_that_lacked_an_option_goes_on_with_the_options_default(tmp_path, models, monkeypatch):
    config = replace(LORA, out=str(tmp_path))
    stopped(config, models, monkeypatch)
    file = read_tensors(tmp_path / "state.safetensors")
    facts = json.loads(file.metadata["facts"])
    del facts["betas"]
    tensors = {name: tensor.clone() for name, tensor in file.items()}
    write_safetensors(tmp_path / "state.safetensors", tensors, file.metadata | {"facts": json.dumps(facts)})
    with pytest.raises(TrainError, match=r"betas was \[0.9, 0.99\], now \[0.8, 0.9\]"):
        train(replace(config, betas=(0.8, 0.9)), models, pictures())
    train(config, models, pictures())


def test_a_damaged_state_or_changed_metrics_are_a_sentence(tmp_path, models, monkeypatch):
    config = replace(LORA, out=str(tmp_path))
    stopped(config, models, monkeypatch)
    lines = (tmp_path / "metrics.jsonl").read_text()
    for content in ("", lines.replace('"step": 1', '"step": 5'), "{\n" + lines):
        (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(TrainError, match="its lines are not the steps 0 to 1"):
            train(config, models, pictures())
    state = (tmp_path / "state.safetensors").read_bytes()
    for content in (state[: len(state) // 2], b"", b"no state at all"):
        (tmp_path / "state.safetensors").write_bytes(content)
        with pytest.raises(TrainError, match="is not the state of a training"):
            train(config, models, pictures())
    assert adapter_names(models) == []


def test_a_full_disk_stops_with_the_last_good_state_intact(tmp_path, models, monkeypatch):
    config = replace(LORA, out=str(tmp_path))
    stopped(config, models, monkeypatch)
    state = (tmp_path / "state.safetensors").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.Monitor, "save", lambda self, step: monkeypatch.setattr(os, "fsync", full))
    with pytest.raises(OSError, match="No space left on device"):
        train(config, models, pictures())
    assert (tmp_path / "state.safetensors").read_bytes() == state
    assert not list(tmp_path.glob(".*"))


def test_a_dataset_in_memory_needs_a_caption_for_each_picture():
    with pytest.raises(ValueError, match="5 pictures are given with 4 captions"):
        PictureSet(torch.zeros(5, 1, 16, 16), ["a"] * 4)
    assert SMALL.image_size == 16
