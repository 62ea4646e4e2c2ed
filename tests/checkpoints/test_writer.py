"""Base models as they are saved: bit for bit, for diffusers, and whole or not at all."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline

import sd.checkpoints.writer as saver
from sd.config import DIGITS, TINY
from sd.files.tensor_file import CheckpointError
from sd.lora import LoRAError, apply_lora_to_model, remove_lora
from sd.model_loader import new_models, save_checkpoint
from tests.checkpoints.cases import DTYPES, assert_close, assert_same, load, our_outputs, outputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["again.safetensors", "again"])
def test_load_save_load_is_equal_bit_for_bit(files, tmp_path, dtype, name):
    models = load(files / ("theirs" if name.endswith("s") else "tiny.safetensors"), dtype=dtype)
    for as_dtype in (None, dtype):
        save_checkpoint(models, tmp_path / name, dtype=as_dtype)
        again = load(tmp_path / name, dtype=dtype)
        assert_same(models, again, only=("clip", "diffusion"))
        if as_dtype != torch.float16:  # an fp16 model has an fp32 VAE
            assert_same(models, again, only=("encoder", "decoder"))
    save_checkpoint(again, tmp_path / f"twice {name}", dtype=dtype)
    assert_same(again, load(tmp_path / f"twice {name}", dtype=dtype))


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_diffusers_runs_the_saved_file_and_the_saved_folder(pair, files, tmp_path, dtype):
    """This is also the proof of our LDM names: diffusers' own conversion reads them."""
    models, peers = pair
    save_checkpoint(models, tmp_path / "m.safetensors", dtype=dtype)
    save_checkpoint(models, tmp_path / "m", dtype=dtype)
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / "m.safetensors").values()} == {dtype or torch.float32}
    expected = outputs(*peers.values())
    if dtype is not None:
        half = {k: m.to(torch.float16).float() for k, m in load(files / "ours").items()}
        expected = our_outputs(half)
    for pipe in (StableDiffusionPipeline.from_pretrained(tmp_path / "m", torch_dtype=torch.float32),
                 StableDiffusionPipeline.from_single_file(str(tmp_path / "m.safetensors"), config=str(tmp_path / "m"),
                                                          local_files_only=True, torch_dtype=torch.float32)):
        assert_close(outputs(pipe.unet, pipe.vae, pipe.text_encoder), expected)
    assert_close(our_outputs(load(tmp_path / "m")), expected)
    assert pipe.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_model_with_adapters_is_not_saved_as_a_checkpoint(files, tmp_path):
    models = load(files / "ours")
    apply_lora_to_model(models, 2, name="style")
    for name in ("m.safetensors", "m"):
        with pytest.raises(LoRAError, match="the model carries the adapters 'style'; merge_lora_weights"):
            save_checkpoint(models, tmp_path / name)
    assert not list(tmp_path.iterdir())
    remove_lora(models)
    save_checkpoint(models, tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.bin", "M.CKPT"])
def test_checkpoints_are_never_pickled(pair, tmp_path, name):
    with pytest.raises(CheckpointError, match="written as .safetensors or as a diffusers folder"):
        save_checkpoint(pair[0], tmp_path / name)


@pytest.mark.parametrize("foreign", ["notes.txt", "loras/style.safetensors", ".git/HEAD"])
@pytest.mark.parametrize("with_model", [True, False])
def test_a_folder_with_other_things_in_it_is_left_alone(pair, copy, tmp_path, foreign, with_model):
    folder = copy if with_model else tmp_path / "plain"
    (folder / foreign).parent.mkdir(parents=True, exist_ok=True)
    (folder / foreign).write_text("precious")
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=f"other things in it, such as {foreign.split('/')[0]}"):
        save_checkpoint(pair[0], folder)
    assert sorted(folder.rglob("*")) == before and not list(tmp_path.glob(".*"))


def test_a_file_in_the_place_of_the_folder_is_left_alone(pair, tmp_path):
    (tmp_path / "m").write_text("precious")
    with pytest.raises(CheckpointError, match="is a file; name a new folder"):
        save_checkpoint(pair[0], tmp_path / "m")


def test_an_old_model_folder_is_replaced_also_through_a_link(pair, files, copy, tmp_path):
    (copy / "unet/diffusion_pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "link").symlink_to(copy)
    save_checkpoint(pair[0], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and not (copy / "unet/diffusion_pytorch_model.bin").exists()
    assert_same(load(tmp_path / "link"), pair[0])
    assert {file.name for file in tmp_path.iterdir()} == {"copy", "link"}


@pytest.mark.parametrize("step", ["write_safetensors", "atomic_write", "atomic_folder"])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(pair, files, tmp_path, monkeypatch, step):
    other = new_models(TINY, seed=3)
    save_checkpoint(other, tmp_path / "m")
    save_checkpoint(other, tmp_path / "m.safetensors")
    before = sorted(tmp_path.rglob("*"))

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, step, fails)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(pair[0], tmp_path / "m")
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    assert_same(load(tmp_path / "m"), other)


def test_a_rename_that_fails_puts_the_old_folder_back(pair, tmp_path, monkeypatch):
    other = new_models(TINY, seed=3)
    save_checkpoint(other, tmp_path / "m")
    rename = saver.Path.rename
    monkeypatch.setattr(saver.Path, "rename", lambda self, to: rename(self, to) if ".new" not in self.name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(pair[0], tmp_path / "m")
    monkeypatch.undo()
    assert_same(load(tmp_path / "m"), other)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


SAVE = """
import os, shutil, signal, sys
import sd.model_loader as loader
from sd.config import DIGITS
from sd.files.atomic import former_folder
from sd.files.tensor_file import CheckpointError
path, done, swap, deadly = sys.argv[1], 0, 0, 0
def counted(name, real):
    def change(*args, **kwargs):
        global done, swap
        done += 1
        if name == "rename" and not swap:
            swap = done
        if done == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return change
for name in ("fsync", "replace", "rename", "rmdir", "unlink", "mkdir"):  # all that changes a folder
    setattr(os, name, counted(name, getattr(os, name)))
models = loader.new_models(DIGITS, seed=2)
loader.save_checkpoint(loader.new_models(DIGITS, seed=1), path)
done = swap = 0
loader.save_checkpoint(loader.new_models(DIGITS, seed=1), path)
last = done
for step in (1, swap // 2, swap - 1, swap, swap + 1, swap + 2, swap + 3, last, last + 1):
    deadly = 0
    shutil.rmtree(former_folder(path), ignore_errors=True)
    deadly = step
    if not (child := os.fork()):
        done = 0
        loader.save_checkpoint(models, path)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    try:
        found = loader.preload_models_from_standard_weights(path, "cpu")
    except CheckpointError as error:
        assert "rename that back" in str(error), error
        os.rename(str(error).split("intact in ")[1].split(":")[0], path)
        found = loader.preload_models_from_standard_weights(path, "cpu")
    print(status, found["diffusion"].conv_in.weight.sum().item())
"""


def test_a_save_killed_at_any_step_leaves_the_old_folder_or_the_new_one(tmp_path):
    old, new = (new_models(DIGITS, seed=s)["diffusion"].conv_in.weight.sum().item() for s in (1, 2))
    run = subprocess.run([sys.executable, "-c", SAVE, tmp_path / "m"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    status, values = zip(*(line.split() for line in run.stdout.splitlines()))
    values = [float(value) for value in values]
    assert set(status[:-1]) == {"9"} and status[-1] == "0" and values[0] == old and values[-1] == new
    assert values == sorted(values, key=[old, new].index), "old, then new"
