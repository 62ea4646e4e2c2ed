"""Two processes on gloo do what one does: gradients, data, saves, sharded weights; and how they end when one is lost.

torchrun starts this file too: `trainings` and `killed_then_interrupted` are what each of the processes does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from sd.commands.main import main
from sd.files.tensors import read_tensors
from sd.model_loader import Models, new_models, save_checkpoint
from sd.training import TrainConfig, TrainError, train, vae_loss
from sd.training.dataset.batches import batch_noise
from sd.training.dataset.cache import Posteriors
from sd.training.dataset.contexts import Contexts
from sd.training.dist import all_reduce, check_accumulate, own_micro_batches, own_share_first, processes, world
from sd.training.errors import ProcessError
from tests.training.tiny import SMALL, changed, copy_of, metrics, pictures

ROOT = Path(__file__).parents[2]
LORA = TrainConfig(rank=2, alpha=1.0, steps=4, batch_size=2, accumulate=2, save_every=3, progress=False, dropout=0.3,
                   rank_dropout=0.2, module_dropout=0.2, text_encoder=True, ema=0.9, schedule="cosine", warmup=2,
                   learning_rate=0.01, clip_norm=0.05)
CACHED = replace(LORA, text_encoder=False)
WATCHED = {"sample_prompts": ("a",), "sample_steps": 2, "sample_every": 3, "validate_every": 3}
FULL = changed(LORA, train="full", learning_rate=1e-3, dropout=0.0, rank_dropout=0.0, module_dropout=0.0)
SHARD = replace(FULL, shard=True)
VAE = changed(SHARD, train="vae", accumulate=4, learning_rate=1e-4)
RUNS = {"lora": replace(LORA, **WATCHED), "lora in four, one then two": replace(LORA, accumulate=4, max_norm=0.1),
        "lora in fp16, two then one": replace(LORA, precision="fp16"), "full": FULL,
        "sharded, one then two": replace(SHARD, checkpointing=True, **WATCHED),
        "relora and a word": replace(LORA, relora_every=2, relora_warmup=1, ema=0.0, new_words=("number 0=a",)),
        "sharded, two then one": replace(SHARD, optimizer="schedule_free", ema=0.0, schedule="constant", text_encoder=False),
        "sharded vae, bad loss": VAE}


class Letters:
    """A tokenizer for these captions, quicker to build than the real one."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 1

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) for c in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def small_models() -> Models:
    return Models(new_models(SMALL, seed=1), SMALL, Letters())


def run(name: str, folder: Path, models: Models, config: TrainConfig | None = None) -> Models:
    """The training of that name in RUNS, in a folder of that name."""
    config, models = replace(config or RUNS[name], out=str(folder / name)), copy_of(models)
    if config.shard and "RANK" in os.environ:
        models["diffusion"].to(memory_format=torch.channels_last)  # as on CUDA, and as FSDP does not take it
    options = {"autoencoder_loss": sometimes_bad} if "bad" in name else {}
    return train(config, models, pictures(), held_out=pictures(2) if config.sample_prompts else None, **options)


def sometimes_bad(models, x, noise, kl_weight):
    """NaN for micro-batch 5, which is in step 1, and which the second of two processes computes."""
    bad = torch.equal(noise, batch_noise(noise.shape, VAE, 5, "posterior"))
    return vae_loss(models, x, noise, kl_weight) * (float("nan") if bad else 1.0)


@contextmanager
def before_step(k: int, action):
    """Inside, a training does `action`, once, before it computes step k."""
    loop, todo = sys.modules["sd.training.loop"], [action]
    original = loop.lr_factor

    def patched(step, *more):
        if step == k and todo:
            todo.pop()()
        return original(step, *more)

    loop.lr_factor = patched
    try:
        yield
    finally:
        loop.lr_factor = original


def half_a_run(name: str, folder: Path, models: Models) -> None:
    def power_cut():
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt), before_step(3, power_cut):
        run(name, folder, models)


# ---- what the processes do -------------------------------------------------------------------------------------------

def trainings(folder: Path) -> None:
    models, rank, found = small_models(), int(os.environ["RANK"]), {}
    if rank:
        sys.addaudithook(lambda event, args: only_process_0_writes(folder / "runs", event, args))
    for name in RUNS:
        (half_a_run if "two then one" in name else run)(name, folder / "runs", models)
    half_a_run("lora", folder / "runs" / "again", models)
    result = run("lora", folder / "runs" / "again", models)
    assert world() == 1 and not dist.is_initialized()
    dist.init_process_group("gloo")  # the rest is in a group of the caller's

    found["accumulate"] = refused("accumulate", folder, models, replace(LORA, accumulate=3))
    data = pictures()
    data.captions[0] = (f"seen by {rank}",)
    found["data"] = refused("data", folder, models, LORA, data)
    found["drift"] = drifted(folder, models, rank)

    for cls in (Posteriors, Contexts):
        count_calls(cls, found)
    run("cached", folder / "runs", models, replace(CACHED, cache=str(folder / "cache")))

    with processes():
        a, b, c = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
        a.grad, b.grad = torch.full((2, 3), 1.0 + rank), torch.full((2, 3), 5.0) if rank else None
        loss, stop = all_reduce([a, b, c], torch.tensor(0.5), stop=rank == 1)
        assert (a.grad == 3).all() and (b.grad == 5).all() and c.grad is None and loss == 1 and stop is True
        assert all_reduce([a], torch.tensor(0.5), stop=False)[1] is False
        assert own_micro_batches(3, 4) == range(12 + rank, 16, 2) and world() == 2
        assert list(own_share_first("abcde")) == list("bdace" if rank else "acebd")
    dist.destroy_process_group()  # it is still there
    found["trained"] = [p.sum().item() for p in result["diffusion"].parameters()]
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


def only_process_0_writes(folder: Path, event: str, args) -> None:
    if event == "open" and str(args[0]).startswith(str(folder)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise AssertionError(f"process 1 writes {args[0]}")


def refused(name: str, folder: Path, models: Models, config: TrainConfig, data=None) -> str:
    try:
        train(replace(config, out=str(folder / "runs" / name)), copy_of(models), data or pictures())
    except ProcessError as error:
        return str(error)
    return "nothing"


def drifted(folder: Path, models: Models, rank: int) -> str:
    models = copy_of(models)

    def drift():
        if rank:
            next(p for name, p in models["diffusion"].named_parameters() if name.endswith("up")).data[0, 0] += 1e-7

    with before_step(1, drift):
        try:
            train(replace(LORA, out=str(folder / "runs" / "drift")), models, pictures())
        except ProcessError as error:
            return str(error)
    return "nothing"


def count_calls(cls, found: dict) -> None:
    original = cls._encode

    def counted(self, *args):
        found[cls.__name__] = found.get(cls.__name__, 0) + 1
        return original(self, *args)

    cls._encode = counted


def killed_then_interrupted(folder: Path) -> None:
    """The second process dies before step 3; torchrun starts both again, and hears Ctrl-C in step 5."""
    def ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)  # as Slurm does
        os.kill(os.getppid(), signal.SIGINT)  # torchrun, which tells its processes
        time.sleep(1)

    def dies():
        os.kill(os.getpid(), signal.SIGKILL)

    step, action = (3, dies) if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else (5, ctrl_c)
    with before_step(step, action if os.environ["RANK"] == "1" else lambda: None):
        status = main(command(folder))
    with open(folder.parent / "ends", "a") as file:
        file.write(f"process {os.environ['RANK']} status {status} step {saved_step(folder)}\n")
    sys.exit(status)


def command(folder: Path) -> list[str]:
    model, data = folder.parent / "model.safetensors", folder.parent / "data"
    return ["train", "--train", "vae", "--model", str(model), "--data", str(data), "--out", str(folder), "--steps", "8",
            "--accumulate", "2", "--batch-size", "2", "--save-every", "2", "--learning-rate", "1e-4"]


def saved_step(folder: Path) -> int:
    return json.loads(read_tensors(folder / "state.safetensors").metadata["progress"])["step"]


def torchrun(script, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Two processes, as a user starts them."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options,
                           "-m", "tests.training.test_dist", script.__name__, str(folder)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


# ---- what they must be -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def both(tmp_path_factory) -> SimpleNamespace:
    """The folders of all RUNS in one process and in two, and what each of the two has found."""
    torch.set_num_threads(1)
    models, one, two = small_models(), tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for name in RUNS:
        run(name, one, models)
        if "one then two" in name:
            half_a_run(name, two / "runs", models)
    run("cached", one, models, replace(CACHED, cache=str(one / "cache")))
    done = torchrun(trainings, two)
    assert done.returncode == 0, done.stderr
    for name in RUNS:
        if "two then one" in name:
            run(name, two / "runs", models)
    return SimpleNamespace(one=one, two=two / "runs",
                           found=[json.loads((two / f"found-{rank}.json").read_text()) for rank in (0, 1)])


def same_to_1e_6(a: Path, b: Path) -> None:
    a, b = read_tensors(a), read_tensors(b)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*RUNS, "cached"])
def test_two_processes_train_what_one_does_to_1e_6(both, name):
    one, two = both.one / name, both.two / name
    assert {f.name for f in two.iterdir()} == {f.name for f in one.iterdir()}
    for file in one.glob("*.safetensors"):
        same_to_1e_6(file, two / file.name)
    rows = metrics(one), metrics(two)
    for a, b in zip(*rows, strict=True):
        assert a == {key: value if value is None else pytest.approx(value, rel=1e-5) for key, value in b.items()}
    assert [row["skipped"] for row in rows[1] if "loss" in row] == ([0, 1, 1, 1] if "bad" in name else [0] * 4)
    assert [row["step"] for row in rows[1] if "validation" in row] == ([0, 3, 4] if (one / "samples").exists() else [])
    assert {f.name for f in one.glob("samples/*")} == {f.name for f in two.glob("samples/*")}


def test_a_resume_on_as_many_processes_is_bit_exact(both):
    for name in ("state.safetensors", "lora.safetensors", "metrics.jsonl"):
        assert (both.two / "lora" / name).read_bytes() == (both.two / "again" / "lora" / name).read_bytes(), name
    assert both.found[0]["trained"] == both.found[1]["trained"]


def test_processes_that_differ_are_refused_in_all_of_them_with_what_differs(both):
    first, second = both.found
    assert all(first[key] == second[key] for key in ("accumulate", "data", "drift"))
    assert "accumulate is 3 with 2 processes; " in first["accumulate"] and "allowed are 2, 4, 6, .." in first["accumulate"]
    assert "process 1 on" in first["data"] and "dataset is '" in first["data"] and "weights" not in first["data"]
    assert "trained weights is '" in first["drift"] and "dataset" not in first["drift"]
    assert not list((both.two / "drift").glob("*.safetensors"))  # nothing of it is saved


def test_the_work_of_a_cache_is_shared(both):
    captions = len({caption for of_one in pictures().captions for caption in of_one} | {""})
    assert [found["Posteriors"] for found in both.found] == [3, 2]
    assert [found["Contexts"] for found in both.found] == [captions - captions // 2, captions // 2]


def test_a_lost_process_and_ctrl_c_end_all_with_a_sentence_and_one_process_finishes_the_run(tmp_path):
    save_checkpoint(small_models(), tmp_path / "model.safetensors")
    (tmp_path / "data").mkdir()
    for i in range(4):
        Image.new("L", (16, 16), 60 * i).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(f"{i}")

    done = torchrun(killed_then_interrupted, tmp_path / "run", "--max-restarts", "1")
    assert done.returncode != 0
    assert done.stderr.count("error: process 0 of 2 ends, because another process of this training was lost") == 1, done.stderr
    ends = (tmp_path / "ends").read_text().splitlines()  # of the first start, torchrun may end what is left before it writes
    assert sorted(ends)[-3:] in ([f"process {r} status {s} step {k}" for r, s, k in of] for of in (
        [(0, 130, 6), (1, 130, 6)], [(0, 130, 6), (0, 2, 2), (1, 130, 6)])), done.stderr

    assert main(command(tmp_path / "run")) == 0 and main(command(tmp_path / "whole")) == 0
    same_to_1e_6(tmp_path / "whole" / "model.safetensors", tmp_path / "run" / "model.safetensors")


def test_alone_nothing_is_shared(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes():
        assert not dist.is_initialized() and world() == 1
        assert own_micro_batches(2, 3) == range(6, 9) and list(own_share_first("abc")) == ["a", "b", "c"]
        check_accumulate(3)
        assert all_reduce([], 1.0, False) == (1.0, False)


@pytest.mark.parametrize("change, message", [
    ({"train": "lora"}, "train is 'lora'; allowed: full, vae with shard"),
    ({"optimizer": "adafactor"}, "optimizer is 'adafactor'; allowed: adamw, lion, schedule_free with shard"),
    ({"compile": True}, "compile is True; allowed: False with shard"),
    ({"new_words": ("<x>",)}, r"new_words is .*; allowed: \(\) with shard")])
def test_what_cannot_be_sharded_is_refused(change, message):
    with pytest.raises(TrainError, match=message):
        replace(SHARD, **change)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
