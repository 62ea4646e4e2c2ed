"""What is seen of a training is a pure function of the run, changes nothing in it, and is there once after a kill."""

import importlib
import json
import logging
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image

from sd.files.tensors import read_tensors
from sd.lora import adapter_names, remove_lora
from sd.model_loader import new_models
from sd.pictures.image_io import read_parameters
from sd.pipeline import NotFiniteError, generate
from sd.training import PictureFolder, TrainConfig, TrainError, train
from sd.training.dataset.open import is_held_out, open_pictures
from sd.training.dataset.sources import read_folder
from sd.training.optim import make_optimizer
from sd.training.trained import training
from sd.training.watch.monitor import Metrics, Monitor, as_result, peak_memory, size_text
from sd.training.watch.validation import TIMESTEPS, Validation
from tests.training.tiny import SMALL, changed, copy_of, held_out, metrics, pictures, stopped

loop = importlib.import_module("sd.training.loop")

WATCHED = TrainConfig(rank=2, alpha=3.0, steps=4, batch_size=2, save_every=2, progress=False, dropout=0.3, learning_rate=0.02,
                      ema=0.9, validate_every=2, sample_every=2, sample_prompts=("number 1", "4"), sample_steps=2,
                      sample_cfg=2.0)
FULL = changed(WATCHED, train="full", text_encoder=True)
FREE = replace(WATCHED, optimizer="schedule_free", ema=0.0, text_encoder=True)
VAE = changed(WATCHED, train="vae", sample_prompts=())
HELD_OUT = held_out()


def write_pictures(folder: Path, n: int, start: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(start, start + n):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"number {i}")
    return folder


# ---- it changes nothing --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [WATCHED, FREE, FULL, VAE], ids=["lora", "schedule_free", "full", "vae"])
def test_watching_changes_no_bit_of_what_is_trained(tmp_path, untrained, config):
    seen = train(replace(config, out=str(tmp_path / "seen")), copy_of(untrained), pictures(), held_out=HELD_OUT)
    alone = train(changed(config, out=str(tmp_path / "alone"), sample_prompts=()), copy_of(untrained), pictures())
    for key in seen:
        for (name, a), b in zip(seen[key].state_dict().items(), alone[key].state_dict().values(), strict=True):
            assert torch.equal(a, b), f"{key}.{name}"
    a, b = (read_tensors(tmp_path / name / "state.safetensors") for name in ("seen", "alone"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [row for row in metrics(tmp_path / "seen") if "loss" in row] == metrics(tmp_path / "alone")


def test_a_look_leaves_random_states_modes_weights_and_flags_as_they_were(tmp_path, models):
    config = replace(FREE, out=str(tmp_path))
    with training(config, models) as parameters:
        optimizer = make_optimizer(parameters, config)
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
        ema = {name: torch.full_like(p, 0.01) for name, p in parameters.items()}
        watch = Monitor(config, models, tmp_path, 0, HELD_OUT)

        def state():
            return ([torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],
                    [m.training for network in models.values() for m in network.modules()],
                    [p.tolist() for p in [*parameters.values(), *ema.values()]], [p.requires_grad for p in parameters.values()],
                    [g["train_mode"] for g in optimizer.param_groups], torch.is_grad_enabled())

        before = state()
        assert any(before[1])
        with as_result(models, parameters, optimizer, ema):
            assert all((p == 0.01).all() for p in parameters.values()) and not any(state()[1])
            watch.look(0)
        assert state() == before
        with pytest.raises(ZeroDivisionError), as_result(models, parameters, optimizer, ema):
            raise ZeroDivisionError
        assert state() == before
        watch.close()


# ---- validation ------------------------------------------------------------------------------------------------------

def test_the_validation_loss_is_that_of_diffusers_noise_at_evenly_spread_timesteps(models):
    config = replace(WATCHED, batch_size=5, weighting="min_snr", loss="huber", min_timestep=100, seed=7)
    validation = Validation(config, models, HELD_OUT)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    errors = []
    for i in range(2):
        posterior, noise, timesteps = validation._draw(i, (4, 8, 8))
        with torch.no_grad():
            mean, logvar = models["encoder"](HELD_OUT.picture(i)[None])
            latents = SMALL.vae.scale * (mean + (0.5 * logvar).exp() * posterior)
            context = models["clip"](validation.contexts.tokens([HELD_OUT.captions[i][0]]))
            for k, t in enumerate(timesteps):
                assert 100 + int(112.5 * k) <= t < 100 + 112.5 * (k + 1)
                t = torch.tensor([t])
                out = models["diffusion"](scheduler.add_noise(latents, noise[k][None], t), t, context)
                errors.append(F.mse_loss(out, noise[k][None]).item())
    assert len(errors) == 2 * TIMESTEPS
    assert validation() == pytest.approx(np.mean(errors), rel=1e-5)
    assert validation() == validation()
    others = Validation(replace(config, seed=8, batch_size=2, caption_dropout=0.5), models, HELD_OUT)
    assert others() == pytest.approx(validation(), rel=1e-5)


@pytest.mark.parametrize("config", [WATCHED, FREE, FULL, VAE], ids=["lora", "schedule_free", "full", "vae"])
def test_the_last_validation_loss_is_that_of_the_result_and_the_first_that_of_the_base(tmp_path, untrained, config):
    config = replace(config, out=str(tmp_path))
    trained = train(config, copy_of(untrained), pictures(), held_out=HELD_OUT)
    rows = [row["validation"] for row in metrics(tmp_path) if "validation" in row]
    for models, expected in ((copy_of(untrained), rows[0]), (trained, rows[-1])):
        assert Validation(config, models, HELD_OUT, loop.vae_loss)() == pytest.approx(expected, rel=1e-6)
    assert len(set(rows)) == len(rows) == 3


def test_pictures_are_held_out_by_their_content_and_more_pictures_move_none(tmp_path):
    folder = write_pictures(tmp_path / "data", 60)
    chosen = {e.name for e in read_folder(folder) if is_held_out(e, 0.3)}
    assert 8 <= len(chosen) <= 28  # 18, give or take three standard deviations
    write_pictures(folder, 60, start=60)
    after = {e.name for e in read_folder(folder) if is_held_out(e, 0.3)}
    assert chosen == {name for name in after if name < "060.png"}
    assert chosen < {e.name for e in read_folder(folder) if is_held_out(e, 0.5)}
    assert not any(is_held_out(replace(e, regular=True), 0.99) for e in read_folder(folder))


def test_held_out_pictures_are_in_no_batch_and_regularisation_is_balanced_without_them(tmp_path, models, monkeypatch):
    data, regular = write_pictures(tmp_path / "data", 20), write_pictures(tmp_path / "reg", 8, start=50)
    config = changed(WATCHED, data=str(data), reg_data=str(regular), prior_weight=0.5, validation=0.3,
                     out=str(tmp_path / "out"), sample_prompts=())
    seen, original = [], loop.diffusion_batches

    def spy(config, models, dataset, *rest):
        seen.append(dataset)
        return original(config, models, dataset, *rest)

    monkeypatch.setattr(loop, "diffusion_batches", spy)
    train(config, models)
    (learned,), (_, held_out) = seen, open_pictures(config, models)
    a, b = ({data.digest(i) for i in range(len(data))} for data in (learned, held_out))
    names = {e.name for e in held_out.entries}
    assert names == {e.name for e in read_folder(data) if is_held_out(e, 0.3)} and names
    assert not a & b and len(a | b) == 28
    uses = [learned.regular[i] for i in learned.uses]
    assert sum(uses) == len(uses) / 2


def test_a_folder_may_be_held_out_and_the_wrong_pictures_are_refused(tmp_path, models):
    data, other = write_pictures(tmp_path / "data", 4), write_pictures(tmp_path / "other", 2, start=10)
    config = changed(WATCHED, data=str(data), out=str(tmp_path / "out"), sample_prompts=())
    train(replace(config, validation_data=str(other)), models)
    rows = [row["validation"] for row in metrics(tmp_path / "out") if "validation" in row]
    remove_lora(models, "lora")
    assert rows[0] == Validation(config, models, PictureFolder(other, size=16, channels=1))()
    write_pictures(other, 1)
    for change, message in (({"validation_data": str(other)}, "other/000.png: is held out and learned from, as .*data/000.png"),
                            ({"validation": 1e-9}, "of 4 pictures none is held out"),
                            ({"validation": 0.999999}, "of 4 pictures none is left to learn from")):
        with pytest.raises(TrainError, match=message):
            train(replace(config, out=str(tmp_path / "new"), **change), models)
    with pytest.raises(TrainError, match="with a dataset of your own give held_out as well"):
        train(replace(config, validation=0.1), models, pictures())
    with pytest.raises(TrainError, match="the pictures or captions for validation changed"):
        train(config, models)
    assert adapter_names(models) == []


# ---- samples ---------------------------------------------------------------------------------------------------------

def sample(models, prompt: str, seed: int) -> np.ndarray:
    return generate(prompt, models=models, merged=False, seed=seed, sampler_name="dpmpp_2m", n_inference_steps=2, cfg_scale=2.0)


@pytest.mark.parametrize("config", [WATCHED, FULL], ids=["lora", "full"])
def test_the_sheet_has_the_base_first_and_the_result_last(tmp_path, untrained, config):
    config = replace(config, out=str(tmp_path))
    trained = train(config, copy_of(untrained), pictures())
    names = sorted(f.name.split("-")[0] for f in (tmp_path / "samples").iterdir())
    assert names == ["00000002"] * 2 + ["00000004"] * 2 + ["base"] * 2
    for row, models in (("base", untrained), ("00000004", trained)):
        for prompt, seed in (("number 1", 0), ("4", 1)):
            (file,) = (f for f in (tmp_path / "samples").glob(f"{row}-*") if read_parameters(f)["prompt"] == prompt)
            assert np.array_equal(np.asarray(Image.open(file)), sample(models, prompt, seed)), (row, prompt)
    height, width = np.asarray(Image.open(tmp_path / "samples.png")).shape[:2]
    assert height > 3 * 160 and width > 2 * 160  # three rows, two columns of enlarged pictures


def test_other_prompts_begin_a_column_of_their_own_and_a_new_run_begins_a_new_sheet(tmp_path, untrained, monkeypatch):
    config, sheets = replace(WATCHED, out=str(tmp_path), steps=6), []
    stopped(config, copy_of(untrained), monkeypatch, 5, HELD_OUT)
    monkeypatch.setattr("sd.training.watch.samples.contact_sheet",
                        lambda rows, labels, columns: sheets.append((rows, labels, columns)) or np.zeros((8, 8, 3), np.uint8))
    train(replace(config, sample_prompts=("number 1", "new")), copy_of(untrained), pictures(), held_out=HELD_OUT)
    rows, labels, columns = sheets[-1]
    assert labels == ["base", "step 2", "step 4", "step 6"] and columns == ("number 1", "new")
    assert [[cell is not None for cell in row] for row in rows] == [[True, True], [True, False], [True, True], [True, True]]
    assert np.array_equal(rows[0][1], sample(untrained, "new", 1))  # made later, when the LoRA was no longer 0
    (tmp_path / "state.safetensors").unlink()
    another = new_models(SMALL, seed=2)
    train(replace(config, steps=2), copy_of(another), pictures(), held_out=HELD_OUT)
    rows, labels, _ = sheets[-1]
    assert labels == ["base", "step 2"] and np.array_equal(rows[0][0], sample(another, "number 1", 0))


def test_a_picture_that_is_not_finite_is_a_gap_and_a_warning(tmp_path, models, monkeypatch, caplog):
    def broken(request, models):
        raise NotFiniteError("a network overflowed")
    monkeypatch.setattr("sd.training.watch.samples.draw", broken)
    with caplog.at_level(logging.WARNING, "sd"):
        train(replace(WATCHED, out=str(tmp_path)), models, pictures())
    assert "no sample of 'number 1': a network overflowed" in caplog.text
    assert not (tmp_path / "samples.png").exists()


# ---- plot, bar, clock ------------------------------------------------------------------------------------------------

def test_the_plot_has_the_validation_loss_and_is_renewed_at_every_save(tmp_path, models, monkeypatch):
    plots = []
    monkeypatch.setattr("sd.training.watch.monitor.line_plot",
                        lambda curves, *rest: plots.append(curves) or Image.new("L", (8, 8)))
    train(changed(WATCHED, out=str(tmp_path), sample_prompts=()), models, pictures(), held_out=HELD_OUT)
    assert [len(curves["training"]) for curves in plots] == [2, 4]
    rows = metrics(tmp_path)
    assert plots[-1]["validation"] == [(row["step"], row["validation"]) for row in rows if "validation" in row]
    assert plots[-1]["training"] == [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_lines_from_the_resumed_step_on_are_cut_off_with_their_validation(tmp_path):
    first = Metrics(tmp_path, 0)
    for step in range(4):
        first.add(step=step, validation=0.5)
        first.add(step=step, loss=float(step))
    with open(first.path, "a") as file:
        file.write('{"step": 4, "lo')  # a kill
    assert [(row["step"], "loss" in row) for row in Metrics(tmp_path, 2).rows] == [
        (0, False), (0, True), (1, False), (1, True)]
    with pytest.raises(TrainError, match="are not the steps 0 to 2"):
        Metrics(tmp_path, 3)


def test_the_bar_shows_loss_speed_and_memory_and_the_clock_has_a_file_of_its_own(tmp_path, models, capfd):
    train(changed(WATCHED, out=str(tmp_path), sample_prompts=(), steps=40, save_every=20, progress=True), models, pictures())
    shown = capfd.readouterr().err
    for part in ("loss=", "images/s=", "peak=", "40/40", "step/s"):
        assert part in shown, shown[-500:]
    rows = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]
    last = rows[-1]
    assert last["steps_per_second"] == pytest.approx(40 / last["seconds"], rel=0.01)
    assert last["images_per_second"] == pytest.approx(2 * last["steps_per_second"], rel=0.01)
    assert not any("second" in key or "memory" in key for row in metrics(tmp_path) for key in row)


def test_the_peak_memory_is_that_of_the_process():
    now = psutil.Process().memory_info().rss
    ballast = torch.ones(50_000_000 // 4)
    peak = peak_memory(ballast.device)
    del ballast
    assert peak >= now and peak <= psutil.virtual_memory().total
    assert peak_memory(torch.device("cpu")) >= peak
    assert [size_text(n) for n in (12, 999, 1000, 1_530_000, 4e9)] == ["12 B", "999 B", "1 kB", "1.53 MB", "4.00 GB"]


# ---- TensorBoard and wandb -------------------------------------------------------------------------------------------

class FakeWriter:
    """A SummaryWriter with what a reader makes of its files: points of `purge_step` and later that others wrote are gone."""

    points: dict[str, list] = {}

    def __init__(self, log_dir, purge_step=None):
        self.kept = FakeWriter.points.setdefault(log_dir, [])
        self.waiting = []
        self.kept[:] = [point for point in self.kept if purge_step is None or point[1] < purge_step]

    def add_scalar(self, name, value, step):
        self.waiting.append((name, step, value))

    def add_image(self, name, picture, step, dataformats):
        assert dataformats == "HWC" and picture.dtype == np.uint8
        self.waiting.append((name, step, picture.shape))

    def flush(self):  # what is not flushed is lost when the process is killed
        self.kept += self.waiting
        self.waiting = []

    close = flush


FAKE_WANDB = """
runs = {}
def Image(path):
    return open(path, "rb").read()
class Run:
    def __init__(self, id, old):
        self.id, self.history, self.step, self.row = id, old, max(old, default=-1) + 1, {}
    def log(self, values, step):
        assert step >= self.step, "wandb drops steps that are past, with a warning"
        if step > self.step:
            self.finish()
        self.step = step
        self.row.update(values)
    def finish(self):  # a row is sent when the next one begins
        if self.row:
            self.history[self.step] = self.row
        self.row = {}
def init(project, id, name, dir, config, resume):
    assert resume == "allow" and config["rank"] == 2
    return Run(id, runs.setdefault(id, {}))
"""


def installed(folder: Path, monkeypatch) -> None:
    """Both packages, as far as they are used here."""
    (folder / "wandb.py").write_text(FAKE_WANDB)
    (folder / "tensorboard.py").write_text("")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(FakeWriter, "points", {})
    fake = type(sys)("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)


@pytest.mark.parametrize("k", [3, 5])  # right after a save, and two steps later
def test_a_resumed_run_logs_each_point_once(tmp_path, untrained, monkeypatch, k):
    installed(tmp_path, monkeypatch)
    config = replace(WATCHED, out=str(tmp_path / "run"), log_to=("tensorboard", "wandb"), steps=6, save_every=3,
                     validate_every=1)
    stopped(config, copy_of(untrained), monkeypatch, k, HELD_OUT)
    train(config, copy_of(untrained), pictures(), held_out=HELD_OUT)
    rows = metrics(tmp_path / "run")
    expected = {(name, row["step"]): value for row in rows for name, value in row.items() if name != "step"}
    (points,) = FakeWriter.points.values()
    scalars = [(name, step) for name, step, _ in points]
    assert sorted(scalars) == sorted([*expected, *(("samples", step) for step in (0, 2, 4, 6))])
    assert {(n, s): v for n, s, v in points if n != "samples"} == expected
    (history,) = sys.modules["wandb"].runs.values()
    values = {(name, step): value for step, row in history.items() for name, value in row.items()}
    assert {key: value for key, value in values.items() if key[0] != "samples"} == expected
    assert {step for name, step in values if name == "samples"} == {0, 2, 4, 6}


def test_a_package_that_is_missing_is_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(TrainError, match=f"log_to is .*; allowed: what is installed; run: pip install {name}"):
            replace(WATCHED, log_to=(name,))


@pytest.mark.parametrize("field, value", [
    ("validation", 1.0), ("validation", -0.1), ("validate_every", 0), ("sample_every", 0), ("sample_steps", 0),
    ("sample_seed", -1), ("sample_cfg", float("nan")), ("sample_prompts", ("a", "a")), ("log_to", ("printer",))])
def test_a_bad_value_is_refused_by_name_and_with_what_is_allowed(field, value):
    with pytest.raises(TrainError, match=f"{field} is .*; allowed: "):
        replace(WATCHED, **{field: value})
