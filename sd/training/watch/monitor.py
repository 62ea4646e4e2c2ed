"""Output of a run: progress bar, metrics.jsonl, loss.png, samples.png, timing.jsonl, TensorBoard and wandb.

All except the bar and timing.jsonl are pure functions of the run, and therefore the same after a kill and a resume.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sd.files.atomic import atomic_write
from sd.pictures.image_io import load_image, save_image
from sd.pictures.sheets import line_plot
from sd.training.dist import is_main
from sd.training.errors import TrainError
from sd.training.loss import vae_loss
from sd.training.optim import final_weights
from sd.training.watch.samples import Samples
from sd.training.watch.validation import Validation

if sys.platform != "win32":
    import resource

# Fields of a config that may change when a run is resumed, since they do not affect the trained weights.
MONITOR_FIELDS = ("validation_data", "validate_every", "sample_prompts", "sample_every", "sample_seed",
                  "sample_steps", "sample_cfg", "log_to", "dry_run")


class Monitor:
    """Progress bar, files and logs of a run from `step` on, with validation on `held_out` and samples.

    timing.jsonl has a line for each save: seconds since the start of the process, average steps and images per second
    (including saves, samples and validation), and peak memory in bytes. Steps repeated after a kill are listed twice.
    """

    def __init__(self, config, models, folder: Path, step: int, held_out=None, autoencoder_loss=vae_loss):
        self.config, self.folder, self.device = config, folder, models.device
        self.metrics = Metrics(folder, step)
        self.logs = [LOGS[name](config, folder, step) for name in config.log_to if is_main()]
        self.validation = None if held_out is None else Validation(config, models, held_out, autoencoder_loss)
        self.samples = Samples(config, models, folder, step) if config.sample_prompts else None
        self.start, self.first = time.perf_counter(), step
        self.bar = tqdm(total=config.steps, initial=step, unit="step", disable=not config.progress, dynamic_ncols=True)

    def due(self, step: int) -> bool:
        """Whether validation or samples are due before step number `step`."""
        return (self.validation is not None and self._at(step, self.config.validate_every)
                or self.samples is not None and self._at(step, self.config.sample_every))

    def look(self, step: int) -> None:
        """Run validation and samples, if due; call inside `as_result`."""
        if self.validation is not None and self._at(step, self.config.validate_every):
            self.add(step=step, validation=finite(self.validation()))
        if self.samples is not None and self._at(step, self.config.sample_every):
            sheet = self.samples.take(step)
            for log in self.logs:
                log.picture(step, sheet)

    def _at(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.steps

    def add(self, **row: float | int | None) -> None:
        """Add a line to metrics.jsonl, and a point to the logs."""
        self.metrics.add(**row)
        for log in self.logs:
            log.add(row)

    def show(self) -> None:
        """Show loss, images per second and peak memory on the bar."""
        figures = {} if math.isnan(loss := self.metrics.recent_loss()) else {"loss": f"{loss:.4f}"}
        rate = self.bar.format_dict.get("rate") or 0.0  # a moving average; none before the second step
        if rate:
            figures["images/s"] = f"{rate * self.config.batch_size * self.config.accumulate:.3g}"
        if memory := peak_memory(self.device):
            figures["peak"] = size_text(memory)
        self.bar.set_postfix(figures, refresh=False)

    def save(self, step: int) -> None:
        """Flush metrics and logs, plot the loss, and record the timing; call before the state is saved."""
        if not is_main():
            return
        self.metrics.sync()
        for log in self.logs:
            log.flush()
        self.metrics.plot(self.folder / "loss.png")
        seconds, steps = time.perf_counter() - self.start, step - self.first
        with open(self.folder / "timing.jsonl", "a", encoding="utf-8") as file:
            row = {"step": step, "seconds": round(seconds, 3), "steps_per_second": round(steps / seconds, 4),
                   "images_per_second": round(steps * self.config.batch_size * self.config.accumulate / seconds, 4),
                   "peak_memory": peak_memory(self.device)}
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.bar.close()
        for log in self.logs:
            log.close()


@contextmanager
def as_result(models, parameters: Mapping[str, nn.Parameter], optimizer, ema: dict[str, Tensor]) -> Iterator[None]:
    """Bring the networks into their final form inside the block: moving average, no dropout, no gradients.

    Afterwards everything is restored bit by bit.
    """
    def swap() -> None:
        for name, value in ema.items():
            kept = parameters[name].detach().clone()
            parameters[name].copy_(value)
            value.copy_(kept)

    modes = [(module, module.training) for network in models.values() for module in network.modules()]
    with torch.no_grad(), final_weights(optimizer):
        swap()
        try:
            for network in models.values():
                network.eval()
            yield
        finally:
            swap()
            for module, mode in modes:
                module.training = mode


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------

class Metrics:
    """metrics.jsonl: a line for each step, preceded by one with the validation loss if it was measured.

    "step" is the number of steps done before. On resuming, lines from the resumed step on are cut off, so that the file
    becomes that of an uninterrupted run.
    """

    def __init__(self, folder: Path, step: int):
        self.path, self.rows = folder / "metrics.jsonl", []
        try:
            for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
                row = json.loads(line)
                if row["step"] >= step:
                    break
                self.rows.append(row)
        except (ValueError, TypeError, KeyError):
            pass  # a line cut short by a kill is after the last save; any other bad one is detected below
        if [row["step"] for row in self.rows if "loss" in row] != list(range(step)):
            raise TrainError(f"{self.path}: its lines are not the steps 0 to {step - 1}; it was changed or removed after "
                             f"the run; put it back, or choose another out folder")
        if is_main():
            with atomic_write(self.path) as file:
                file.write("".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def add(self, **row: float | int | None) -> None:
        self.rows.append(row)
        if is_main():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def recent_loss(self, n: int = 50) -> float:
        """Mean loss of those of the last n lines that have one."""
        losses = [row["loss"] for row in self.rows[-n:] if row.get("loss") is not None]
        return sum(losses) / len(losses) if losses else math.nan

    def plot(self, path: Path, points: int = 60) -> None:
        """Plot the loss, averaged over equal numbers of steps to about `points` points, and the validation loss."""
        rows = [row for row in self.rows if row.get("loss") is not None]
        n = math.ceil(len(rows) / points) or 1
        bins = [rows[i:i + n] for i in range(0, len(rows), n)]
        curves = {f"training, mean of {n} steps" if n > 1 else "training":
                  [(b[len(b) // 2]["step"], sum(row["loss"] for row in b) / len(b)) for b in bins]}
        if measured := [(row["step"], row["validation"]) for row in self.rows if row.get("validation") is not None]:
            curves["validation"] = measured
        save_image(line_plot(curves, "loss", "step", "loss"), path)

    def sync(self) -> None:
        """fsync: a saved state must not be ahead of its metrics."""
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())


def finite(value: float) -> float | None:
    """The value, or None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


# ---- TensorBoard, wandb: x is the step, and a resumed run has no duplicate points ------------------------------------

class TensorBoard:
    """Event files in <out>/tensorboard; readers drop what an earlier process wrote from the resumed step on."""

    def __init__(self, config, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def add(self, row: Mapping[str, float | int | None]) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, row["step"])

    def picture(self, step: int, path: Path) -> None:
        self.writer.add_image("samples", np.asarray(load_image(path)), step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of the project sdlora, with its id in <out>/wandb.txt; steps already logged are not logged again."""

    def __init__(self, config, folder: Path, step: int):
        import wandb
        name = folder / "wandb.txt"
        if step == 0 or not name.exists():
            name.write_text(secrets.token_hex(4), encoding="utf-8")
        self.image = wandb.Image
        self.run = wandb.init(project="sdlora", id=name.read_text(encoding="utf-8"), name=folder.name, dir=str(folder),
                              config=asdict(config), resume="allow")

    def add(self, row: Mapping[str, object]) -> None:
        if row["step"] >= self.run.step:  # wandb's first step without values, in a resumed run
            self.run.log({name: value for name, value in row.items() if name != "step" and value is not None}, step=row["step"])

    def picture(self, step: int, path: Path) -> None:
        self.add({"step": step, "samples": self.image(str(path))})

    def flush(self) -> None:
        """Nothing to do: wandb's process, which outlives this one, has the values already."""

    def close(self) -> None:
        self.run.finish()


LOGS: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}


# ---- figures ---------------------------------------------------------------------------------------------------------

def peak_memory(device: torch.device) -> int | None:
    """Peak bytes of CUDA's allocator, else of the process (maximum resident set size); None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_text(n: float) -> str:
    """Bytes in decimal units, to three digits."""
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.2f} GB"
