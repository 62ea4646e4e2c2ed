"""The training loop, for a LoRA, for whole networks and for the autoencoder. To resume, run the same command again.

Everything random in micro-batch number n is a pure function of (seed, stream, n), so no random state is saved, and N steps
give the same bits as k steps, a kill at any instant and N - k steps (with the same number of threads).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.adapters.quant import quantize_base, quantized_kinds
from sd.files.atomic import atomic_write
from sd.lora_files.modules import modules_of
from sd.model_loader import preload_models_from_standard_weights
from sd.models import Models
from sd.placement import placed, run_as
from sd.training.config import TrainConfig
from sd.training.dataset.open import open_pictures
from sd.training.dataset.randomness import seed_of
from sd.training.dist import (
    all_reduce,
    check_accumulate,
    check_same,
    devices,
    is_main,
    own_micro_batches,
    processes,
)
from sd.training.errors import TrainError
from sd.training.half_base import HalfBase, half_base
from sd.training.interrupt import asked_to_stop
from sd.training.loss import MicroLoss, vae_loss
from sd.training.optim import lr_factor, make_optimizer, set_learning_rate, settle
from sd.training.relora import fold, restart
from sd.training.result import save_result
from sd.training.run_state import (
    Progress,
    alone_in,
    fingerprint,
    load_state,
    made_with,
    open_folder,
    run_facts,
    save_state,
)
from sd.training.shard import shard, unshard
from sd.training.step import diffusion_batches, idle_networks, vae_batches
from sd.training.trained import frozen_parts, start_hash, training
from sd.training.watch.estimate import announce, dry_run
from sd.training.watch.monitor import MONITOR_FIELDS, Monitor, as_result, finite
from sd.training.work import Work

MAX_SKIPPED = 20  # bad steps in a row, then the training stops
READ_EVERY = 10  # steps between readings of the losses: a reading waits for the device

# Options that may differ when a run is resumed: where files are, and those that change no bit of the result.
FREE = ("data", "reg_data", "cache", "out", "model", "save_every", "progress", "checkpointing", "shard",
        *MONITOR_FIELDS)


@processes()
def train(config: TrainConfig, models: Models | None = None, dataset=None, *, held_out=None,
          autoencoder_loss=vae_loss) -> Models:
    """Train `models` (none: `config.model`) on `dataset` (none: `config.data`), in place; returns the models.

    The result is written to `config.out` as `<name>.safetensors` or model.safetensors. A LoRA is left attached and active;
    with `quantize` the base stays quantised. `held_out` is a data set for the validation loss (none: by `config.validation`
    or `config.validation_data`). `autoencoder_loss` has the arguments of `vae_loss`, which it replaces. Ctrl-C saves
    after the current step, then raises KeyboardInterrupt. Raises TrainError, DataError or ProcessError, before the first step
    wherever possible.
    """
    check_accumulate(config.accumulate)
    config = replace(config, progress=config.progress and is_main())
    folder = None if config.dry_run else open_folder(config.out)
    if models is None:
        models = preload_models_from_standard_weights(config.model, dtype=torch.float32)
    dataset, held_out = open_pictures(config, models, dataset, held_out)
    if config.quantize != "none" and quantized_kinds(models) != [config.quantize]:
        quantize_base(models, config.quantize)
    if folder is None:  # a dry run
        text = dry_run(config, models, dataset, held_out)
        if is_main():
            print(text)
        return models
    with alone_in(folder), torch.random.fork_rng(devices()), training(config, models) as parameters, run_as(config, models):
        run = _start_or_resume(config, models, folder, dataset, held_out, parameters)
        with half_base(config, models) as base:
            micro_loss = (vae_batches(config, models, dataset, autoencoder_loss) if config.train == "vae" else
                          diffusion_batches(config, models, dataset))
            watch = Monitor(config, models, folder, run.done.step, held_out, autoencoder_loss)
            # Before asked_to_stop, Ctrl-C ends the program at once; whatever is cached by then is kept.
            with placed(models, idle_networks(config, models, dataset), "cpu"), asked_to_stop() as stop:
                _run_steps(run, config, models, base, micro_loss, watch, stop)
                watch.close()
                base.restore()
                _finish(run, config, models, pictures=len(dataset))
    return models


@dataclass
class _Run:
    """The state of a run, apart from config and models."""

    folder: Path
    parameters: dict[str, nn.Parameter]  # trained, by name
    weights: dict[str, Tensor]  # the same and the frozen parts of the LoRA: what is saved
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    facts: dict[str, object]  # that a resumed run must share
    done: Progress


def _start_or_resume(config: TrainConfig, models: Models, folder: Path, dataset, held_out,
                     parameters: dict[str, nn.Parameter]) -> _Run:
    """The run from its last save, or from step 0. Raises TrainError if the folder has another run, or more steps."""
    facts = run_facts(config, FREE, dataset=dataset.fingerprint(), base=fingerprint(models, parameters),
                      held_out=held_out and held_out.fingerprint(), from_lora=start_hash(config, models))
    if config.shard:
        parameters = shard(models, parameters)
    optimizer = make_optimizer(parameters, config, modules_of(models))
    ema = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
    weights = parameters | frozen_parts(config, models)
    done = load_state(folder, weights, optimizer, ema, facts, run_facts(TrainConfig(), FREE),
                      ("steps",) if config.schedule == "constant" else (), made_with(models.device))
    if done.step > config.steps:
        raise TrainError(f"steps is {config.steps}, and {folder} has done {done.step}; allowed: {done.step} or more")
    check_same(weights, **facts, step=done.step)
    if is_main():
        with atomic_write(folder / "config.json") as file:
            file.write((json.dumps(asdict(config), indent=2) + "\n").encode())
    if config.progress and not config.shard and done.step < config.steps:
        announce(config, models, dataset, parameters, steps=config.steps - done.step)
    return _Run(folder, parameters, weights, optimizer, ema, facts, done)


def _run_steps(run: _Run, config: TrainConfig, models: Models, base: HalfBase, micro_loss: MicroLoss,
               watch: Monitor, stop: Callable[[], bool]) -> None:
    """Run from the last save to the last step. Saves and samples come before a step, so the loop runs once more at the end."""
    parameters, optimizer, ema, done = run.parameters, run.optimizer, run.ema, run.done
    device = next(iter(parameters.values())).device
    scale = torch.tensor([done.loss_scale if config.precision == "fp16" else 1.0, done.good_steps], device=device)
    work = Work(config, models, parameters, optimizer, ema, micro_loss, scale)
    unread: list[Tensor] = []  # (loss, gradient norm, whether they are bad) of recent steps, on the device
    stopping = False
    for step in range(done.step, config.steps + 1):
        last = step == config.steps
        save = stopping or last or (step % config.save_every == 0 and step > done.step)
        look = watch.due(step) and not stopping
        if save or look or len(unread) == READ_EVERY:
            _read(unread, step, done, watch, config)
        if look or last or stopping:
            work.release()
        if look:
            plain = config.precision == "fp16"  # samples run without autocast then
            with as_result(models, parameters, optimizer, ema), base.restored() if plain else nullcontext():
                watch.look(step)
        if save:
            check_same(run.weights, step=step)
            watch.save(step)
            done.step, done.loss_scale, done.good_steps = step, *scale.tolist()
            save_state(run.folder, done, run.weights, optimizer, ema, run.facts, made_with(device))
        if last:
            return
        if stopping:
            raise KeyboardInterrupt(f"stopped after {step} of {config.steps} steps; the same command goes on from there")

        restart(step, config, models, optimizer)
        set_learning_rate(optimizer, lr_factor(step, config))
        loss = torch.zeros((), device=device)
        for number in own_micro_batches(step, config.accumulate):
            torch.manual_seed(seed_of(config.seed, "layers", number))  # dropout inside the layers
            loss += work.add_gradients(number)
        loss, stopping = all_reduce(parameters.values(), loss, stop())
        unread.append(work.update(loss, step))
        watch.bar.update()


def _finish(run: _Run, config: TrainConfig, models: Models, pictures: int) -> None:
    """Bring the models into their final form, and write the result."""
    settle(run.optimizer)
    with torch.no_grad():
        for name, value in run.ema.items():
            run.parameters[name].copy_(value)
    fold(config, models)
    unshard(models)
    if is_main():
        save_result(config, models, run.folder, run.facts, pictures)


def _read(unread: list[Tensor], step: int, done: Progress, watch: Monitor, config: TrainConfig) -> None:
    """Record the losses of the steps before `step`, and count the bad ones. Raises TrainError after too many in a row."""
    rows = torch.stack(unread).tolist() if unread else []
    unread.clear()
    for i, (loss, norm, bad) in enumerate(rows, step - len(rows)):
        done.skipped += int(bad)
        done.skipped_in_a_row = done.skipped_in_a_row + 1 if bad else 0
        watch.add(step=i, loss=finite(loss), grad_norm=finite(norm), lr=config.learning_rate * lr_factor(i, config),
                  skipped=done.skipped)
        if done.skipped_in_a_row >= MAX_SKIPPED:
            raise TrainError(f"{MAX_SKIPPED} steps in a row, to step {i}, had no usable loss or gradient (the last loss "
                             f"is {loss:g}): the training has diverged; use a lower learning rate than "
                             f"{config.learning_rate:g} and another out folder")
    watch.show()
