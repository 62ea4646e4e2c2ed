"""N steps are k steps, a kill at any instant, and N - k steps, bit for bit: the files of the two runs are the same.

A new way to train is a row of RUNS; optimizers are in it by themselves.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from sd.files.tensors import read_tensors, write_safetensors
from sd.lora import adapter_names
from sd.training import PictureSet, TrainConfig, TrainError, train, trained
from sd.training.optim import OPTIMIZERS
from tests.training.tiny import LORA, SMALL, a_lora, changed, copy_of, files, held_out, metrics, pictures, stopped

loop = importlib.import_module("sd.training.loop")

FULL = changed(LORA, train="full", accumulate=1, checkpointing=True)
VAE = changed(LORA, train="vae", accumulate=1)
SHORT = replace(LORA, steps=5, accumulate=1)
RELORA = replace(LORA, accumulate=1, ema=0.0, relora_every=3, relora_warmup=2)
WATCHED = replace(LORA, steps=4, accumulate=1, validate_every=2, sample_every=2, sample_prompts=("number 1", "4"),
                  sample_steps=2, sample_cfg=2.0)
WORDS = TrainConfig(train="words", new_words=("<toy>:2=number",), prefix="<toy>", steps=4, batch_size=2, accumulate=2,
                    save_every=2, learning_rate=0.02, progress=False)
LORA_AND_WORDS = replace(WORDS, train="lora", rank=2, alpha=3.0, new_words=("<toy>:2=number", "my.style"), suffix="my.style",
                         ema=0.9, dropout=0.2, word_learning_rate=0.05)
OLD = {"lora": {}, "loha": {"kind": "loha"}, "dora": {"dora": True}}  # LoRAs that runs start from
FROM = {"rank": TrainConfig.rank, "alpha": TrainConfig.alpha}  # the file says what they are
NEEDS = {"prodigy": {"learning_rate": 1.0}, "schedule_free": {"schedule": "constant", "ema": 0.0}}
# A name -> (config, before which steps it is stopped; x.5: between the two micro-batches of step x).
RUNS = {
    "lora": (LORA, (1, 4.5, 5, 6)), "full": (FULL, (1, 5, 6)), "vae": (VAE, (1, 5, 6)),
    **{name: (replace(SHORT, optimizer=name, **NEEDS.get(name, {})), (3,)) for name in OPTIMIZERS},
    "bf16": (replace(LORA, precision="bf16"), (5,)), "fp16": (replace(LORA, precision="fp16"), (4.5,)),
    "objective": (replace(LORA, loss="huber", weighting="min_snr", noise_offset=0.1, pyramid_noise=0.3, input_perturbation=0.1,
                          min_timestep=10, max_timestep=900, timestep_bias=1.5), (4.5,)),
    "deterministic": (replace(SHORT, deterministic=True), (3,)),
    "rates": (replace(LORA, schedule="cosine_restarts", cycles=2, lora_plus=4.0, block_rates=("mid_block=0.5",), max_norm=0.05,
                      text_learning_rate=1e-3), (5,)),
    "nf4": (replace(SHORT, quantize="nf4"), (3,)),
    "relora": (RELORA, (3, 5)), "relora on nf4": (replace(RELORA, quantize="nf4"), (5,)),
    "relora with adafactor": (replace(RELORA, optimizer="adafactor"), (5,)),
    "relora in fp16": (replace(RELORA, precision="fp16"), (5,)),
    "relora, svd": (replace(RELORA, relora_save="svd", save_every=3), (3, 5)),
    "relora of norms": (replace(RELORA, targets=("norm1", "q_proj")), (5,)),
    "relora from a file": (replace(RELORA, from_lora="lora", **FROM), (3, 5)),
    "pissa": (replace(SHORT, init="pissa"), (3,)),
    "pissa dora": (replace(SHORT, init="pissa", dora=True, rank_dropout=0.0), (3,)),
    "pissa on nf4": (replace(SHORT, init="pissa", quantize="nf4"), (3,)),
    "block ranks": (replace(SHORT, block_ranks=("mid_block=1",), text_encoder=False), (3,)),
    "from a file": (replace(SHORT, from_lora="loha", rank_dropout=0.0, **FROM), (3,)),
    "from a file, unet alone": (replace(SHORT, from_lora="dora", rank_dropout=0.0, text_encoder=False, **FROM), (3,)),
    "words": (WORDS, (1,)), "lora and words": (LORA_AND_WORDS, (3,)),
    "lora of both and words": (replace(LORA_AND_WORDS, text_encoder=True, checkpointing=True), (1,)),
    "full and words": (changed(LORA_AND_WORDS, train="full", text_encoder=True, dropout=0.0), (3,)),
    "watched": (WATCHED, (3,)), "watched full": (changed(WATCHED, train="full"), (3,)),
    "watched schedule_free": (replace(WATCHED, optimizer="schedule_free", schedule="constant", ema=0.0), (2,)),
    "watched vae": (changed(WATCHED, train="vae", sample_prompts=()), (3,)),
}


@pytest.fixture(scope="module")
def unbroken(untrained, tmp_path_factory):
    """name -> (the config of that row of RUNS, the models that it ends with when nothing stops it)."""
    @cache
    def run(name: str):
        folder, (config, _) = tmp_path_factory.mktemp("run"), RUNS[name]
        if config.from_lora:
            old, _ = a_lora(untrained, folder / "old.safetensors", **OLD[config.from_lora])
            config = replace(config, from_lora=str(old))
        config = replace(config, out=str(folder / "whole"))
        models = train(config, copy_of(untrained), pictures(), held_out=watched_by(config))
        assert any(row.get("loss") is not None and not row["skipped"] for row in metrics(folder / "whole"))
        return config, models

    return run


def watched_by(config: TrainConfig) -> PictureSet | None:
    return held_out() if config.validate_every == WATCHED.validate_every else None


@pytest.mark.parametrize("name, k", [(name, k) for name, (_, stops) in RUNS.items() for k in stops])
def test_a_run_stopped_at_step_k_ends_as_if_it_had_never_been(unbroken, untrained, name, k, monkeypatch):
    config, result = unbroken(name)
    whole = Path(config.out)
    broken, interrupted = whole.with_name(f"broken at {k}"), copy_of(untrained)
    config = replace(config, out=str(broken))
    stopped(config, interrupted, monkeypatch, k, watched_by(config))
    assert not interrupted["clip"].words and not adapter_names(interrupted)
    assert [m.state_dict().keys() for m in interrupted.values()] == [m.state_dict().keys() for m in untrained.values()]

    torch.manual_seed(int(k))  # torch's own random state is another one now
    if config.init == "pissa":  # the frozen start is that of the state: another machine's SVD may end in other bits
        original = trained.truncated_svd
        monkeypatch.setattr(trained, "truncated_svd", lambda D, rule: original(D * 1.5, rule))
    again = train(config, copy_of(untrained), pictures(), held_out=watched_by(config))

    assert files(whole).keys() == files(broken).keys()
    for name, content in files(whole).items():
        assert files(broken)[name] == content, name
    for key in result:
        for (name, a), b in zip(result[key].state_dict().items(), again[key].state_dict().values(), strict=True):
            assert torch.equal(a, b), f"{key}.{name}"
    for word in result["clip"].words:
        assert torch.equal(result["clip"].learned.of(word), again["clip"].learned.of(word)), word


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
    monkeypatch.setattr("sd.training.step.diffusion_loss", lambda *a, **k: pytest.fail("a loss is computed"))
    second = train(config, copy_of(untrained), pictures())
    assert files(tmp_path) == before
    a, b = (dict(m["diffusion"].named_parameters()) for m in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("what, between", [(LORA, 4), (LORA, 5), (FULL, 4)], ids=["lora-4", "lora-5", "full-4"])
def test_a_finished_run_with_a_constant_rate_goes_on_with_more_steps(tmp_path, untrained, what, between):
    config = replace(what, schedule="constant", out=str(tmp_path / "whole"))
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
    ({"quantize": "nf4"}, "quantize was 'none', now 'nf4'"),
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
    with pytest.raises(TrainError, match=r"training \(the pictures or captions changed\)"):
        train(config, models, data)
    other = copy_of(untrained)
    other["decoder"].conv_in.weight.data[0] += 1
    with pytest.raises(TrainError, match="the base model changed"):
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
