"""A training whose steps are repeated from graphs leaves, bit for bit, the files of one whose steps are plain calls.

The graphs are the stand-in's, which refuses whatever a CUDA graph would refuse or repeat wrongly.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from sd import graphs
from sd.adapters.kinds import KINDS
from sd.lora import adapter_names, apply_lora_to_model, get_lora_parameters
from sd.training import TrainConfig, train
from sd.training.dataset.data import PictureData
from sd.training.loss import MicroLoss, diffusion_loss
from sd.training.optim import make_optimizer
from sd.training.work import CAPTURED, Work
from tests.pipeline.checked_tape import CheckedTape
from tests.training.tiny import a_lora, changed, copy_of, files, held_out, metrics, pictures, stopped

CONFIG = TrainConfig(rank=2, alpha=3.0, steps=6, batch_size=1, save_every=100, progress=False, ema=0.9, schedule="cosine",
                     warmup=2, learning_rate=0.01, caption_dropout=0.5)
WATCHED = {"steps": 9, "validate_every": 6, "sample_every": 6, "sample_prompts": ("number 1",), "sample_steps": 2,
           "sample_cfg": 2.0}
RUNS = {
    "plain factors": {}, "accumulated": {"accumulate": 2, "precision": "bf16"}, "watched": WATCHED,
    "watched in fp16": WATCHED | {"precision": "fp16"}, "dora from pissa": {"dora": True, "init": "pissa"},
    "with options": {"max_norm": 0.05, "lora_plus": 4.0, "block_rates": ("mid_block=0.5",), "ema": 0.0, "loss": "huber",
                     "weighting": "min_snr", "noise_offset": 0.1, "input_perturbation": 0.1,
                     "targets": ("q_proj", "(conv|norm)1")},
    **{kind: {"kind": kind} for kind in CAPTURED if kind != "lora"},
}


class TwoSizes(PictureData):
    """Pictures of two sizes, one of which is not a number."""

    captions = [(f"number {i}", f"{i}") for i in range(6)]
    bucket_of = [0, 0, 0, 1, 1, 1]

    def picture(self, i, variant=0):
        shown = torch.rand(1, 16, 16 if i < 3 else 24, generator=torch.Generator().manual_seed(i)) * 2 - 1
        return shown * float("nan") if i == 2 else shown

    def fingerprint(self):
        return "two sizes"


class Tape(CheckedTape):
    made: list["Tape"] = []

    def __init__(self):
        self.made.append(self)
        self.replays = 0

    def replay(self):
        super().replay()
        self.replays += 1


@pytest.fixture
def taped(monkeypatch):
    """Graphs on the CPU; returns the list of those that were captured."""
    Tape.made.clear()
    monkeypatch.setitem(graphs.TAPES, "cpu", lambda: Tape)
    monkeypatch.setattr("sd.placement.pack", lambda network: None)  # of the CPU alone
    yield Tape.made
    Tape.made.clear()


def plainly(monkeypatch, *args, **options):
    """A training without graphs."""
    with monkeypatch.context() as patch:
        patch.setenv("SD_CUDA_GRAPHS", "0")
        return train(*args, **options)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_from_graphs_leaves_the_files_of_a_plain_run(untrained, tmp_path, monkeypatch, taped, name):
    config, seen = changed(CONFIG, **RUNS[name]), held_out() if name.startswith("watched") else None
    plainly(monkeypatch, replace(config, out=str(tmp_path / "called")), copy_of(untrained), TwoSizes(), held_out=seen)
    assert not taped
    train(replace(config, out=str(tmp_path / "captured")), copy_of(untrained), TwoSizes(), held_out=seen)
    assert sum(tape.replays > 0 for tape in taped) >= 3, "two sizes and the update"
    assert files(tmp_path / "called") == files(tmp_path / "captured")
    assert any(row.get("loss", 0) is None for row in metrics(tmp_path / "captured")), "a bad step"


def test_a_run_from_graphs_may_be_killed_and_ends_with_the_same_files(untrained, tmp_path, monkeypatch, taped):
    config = replace(CONFIG, save_every=4, steps=7)
    train(replace(config, out=str(tmp_path / "whole")), copy_of(untrained), pictures())
    stopped(replace(config, out=str(tmp_path / "dead")), copy_of(untrained), monkeypatch, 6)
    train(replace(config, out=str(tmp_path / "dead")), copy_of(untrained), pictures())
    assert len(taped) == 6 and files(tmp_path / "dead") == files(tmp_path / "whole")


def test_a_run_that_was_saved_where_there_are_no_graphs_goes_on_from_graphs(untrained, tmp_path, monkeypatch):
    config = replace(CONFIG, schedule="constant", out=str(tmp_path / "a"))
    train(replace(config, steps=4), copy_of(untrained), pictures())
    rates = []
    with monkeypatch.context() as patch:
        patch.setitem(graphs.TAPES, "cpu", lambda: Tape)
        patch.setattr("sd.training.work.step_unless", lambda bad, optimizer: rates.append(
            [(group["lr"], group["capturable"]) for group in optimizer.param_groups]))
        train(config, copy_of(untrained), pictures())
    assert rates and all(isinstance(lr, torch.Tensor) and capturable for row in rates for lr, capturable in row)


PLAIN = {
    "text": {"text_encoder": True}, "dropout": {"dropout": 0.1}, "rank dropout": {"rank_dropout": 0.1},
    "module dropout": {"module_dropout": 0.1}, "checkpointing": {"checkpointing": True}, "nf4": {"quantize": "nf4"},
    "relora": {"relora_every": 2, "ema": 0.0}, "words": {"new_words": ("<toy>=number",), "prefix": "<toy>"},
    "lion": {"optimizer": "lion"}, "full": {"train": "full"}, "vae": {"train": "vae"},
    **{kind: {"kind": kind, "rank": 8 if kind == "boft" else 2} for kind in KINDS if kind not in CAPTURED},
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_graph_cannot_repeat_is_never_captured(untrained, tmp_path, taped, name):
    train(changed(CONFIG, **PLAIN[name], steps=3, out=str(tmp_path)), copy_of(untrained), pictures())
    assert not taped


def test_a_lora_from_a_file_is_judged_by_what_it_is_and_a_hook_is_never_left_out(untrained, tmp_path, taped):
    path, _ = a_lora(untrained, tmp_path / "old.safetensors", kind="oft", target_modules=["q_proj"])
    config = changed(CONFIG, steps=3, from_lora=str(path), rank=TrainConfig.rank, alpha=TrainConfig.alpha)
    train(replace(config, out=str(tmp_path / "a")), copy_of(untrained), pictures())
    assert not taped
    models, calls = copy_of(untrained), []
    models["diffusion"].mid_block.register_forward_hook(lambda *args: calls.append(1))
    train(changed(CONFIG, steps=4, out=str(tmp_path / "b")), models, pictures())
    assert not taped and len(calls) == 4
    train(changed(CONFIG, steps=4, out=str(tmp_path / "c")), copy_of(untrained), pictures())
    assert taped


def test_a_training_leaves_no_gradients_and_its_lora_is_what_was_saved(untrained, tmp_path, taped):
    models = copy_of(untrained)
    train(replace(CONFIG, out=str(tmp_path)), models, pictures())
    assert taped and adapter_names(models) == ["lora"]
    assert all(p.grad is None for network in models.values() for p in network.parameters())


def test_a_graph_reads_nothing_but_what_stays(models, taped):
    """The weights, gradients, moments, learning rates, moving average, loss scale, and tables of the process."""
    models["diffusion"].requires_grad_(False)
    apply_lora_to_model({"diffusion": models["diffusion"]}, rank=2, alpha=3.0)
    parameters = {str(i): p for i, p in enumerate(get_lora_parameters(models))}
    optimizer, scale = make_optimizer(parameters, CONFIG), torch.tensor([1.0, 0.0])
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    g = torch.Generator().manual_seed(0)

    def inputs(number):
        return {"latents": torch.randn(1, 4, 8, 8, generator=g), "context": torch.randn(1, 7, 8, generator=g),
                "t": torch.randint(0, 1000, (1,), generator=g), "noise": torch.randn(1, 4, 8, 8, generator=g)}

    work = Work(CONFIG, models, parameters, optimizer, ema, MicroLoss(inputs, partial(diffusion_loss, models)), scale)
    for step in range(3):
        work.update(work.add_gradients(step), step)
    kept = [graph for graph in work.graphs.kept.values() if graph]
    stays = [*models["diffusion"].parameters(), *models["diffusion"].buffers(), *ema.values(), scale, work.rate,
             *(p.grad for p in parameters.values()), *(group["lr"] for group in optimizer.param_groups),
             *(t for state in optimizer.state.values() for t in state.values()),
             *(own for graph in kept for own in graph.inputs)]
    read = set().union(*(graph.tape.outside for graph in kept))
    assert len(kept) == 2
    assert len(read - {t.untyped_storage().data_ptr() for t in stays}) <= 3  # noise levels, frequencies, the set's mark
