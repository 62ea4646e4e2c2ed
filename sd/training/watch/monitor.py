"""What a person sees of a run: bar, metrics.jsonl, loss.png, samples.png, timing.jsonl, TensorBoard and wandb.

All but the bar and timing.jsonl are pure functions of the run, so one that was killed and resumed leaves the same.
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

try:
    import resource
except ImportError:  # Windows
    resource = None


# Fields of a config that may be others when a run is resumed: they change no bit of what is trained.
MONITOR_FIELDS = ("validation_data", "validate_every", "sample_prompts", "sample_every", "sample_seed",
                  "sample_steps", "sample_cfg", "log_to", "dry_run")


class Monitor:
    """Bar, files and logs of a run that goes on at `step`; `held_out` pictures are measured, the sample prompts drawn.

    timing.jsonl has a line for each save: seconds since this start, steps and images a second on average in them (saves,
    samples and validation included), and the peak memory in bytes. Steps that a kill took back are in it twice.
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
        """Whether `look` has something to do before step number `step`: every so many steps, and at the end."""
        return self._validates(step) or self._samples(step)

    def look(self, step: int) -> None:
        """Validation and samples, inside `as_result`."""
        if self._validates(step):
            self.add(step=step, validation=finite(self.validation()))
        if self._samples(step):
            sheet = self.samples.take(step)
            for log in self.logs:
                log.picture(step, sheet)

    def _validates(self, step: int) -> bool:
        return self.validation is not None and (step % self.config.validate_every == 0 or step == self.config.steps)

    def _samples(self, step: int) -> bool:
        return self.samples is not None and (step % self.config.sample_every == 0 or step == self.config.steps)

    def add(self, **row: float | int | None) -> None:
        """A line of metrics.jsonl, and a point in the logs."""
        self.metrics.add(**row)
        for log in self.logs:
            log.add(row)

    def show(self) -> None:
        """Loss, images a second and peak memory, on the bar."""
        figures = {} if math.isnan(loss := self.metrics.recent_loss()) else {"loss": f"{loss:.4f}"}
        rate = self.bar.format_dict.get("rate") or 0.0  # of the last steps; none before the second
        if rate:
            figures["images/s"] = f"{rate * self.config.batch_size * self.config.accumulate:.3g}"
        if memory := peak_memory(self.device):
            figures["peak"] = size_text(memory)
        self.bar.set_postfix(figures, refresh=False)

    def save(self, step: int) -> None:
        """Before a state is saved: metrics to the disk, the plot anew, and what the clock says."""
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
    """Inside, the networks are what the result would be if it ended now: moving average, no dropout, no gradients.

    Afterwards all is as it was, to the bit.
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
    """metrics.jsonl: a line for each step, and before it one with the validation loss where that was measured.

    Of both, "step" is the number of steps that were done before. Lines from the resumed step on are cut off: the file ends
    as that of an unbroken run.
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
            pass  # a line that was cut short by a kill lies behind the last save, or else is missed now
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
        """Mean over the last n lines that have one."""
        losses = [row["loss"] for row in self.rows[-n:] if row.get("loss") is not None]
        return sum(losses) / len(losses) if losses else math.nan

    def plot(self, path: Path, points: int = 60) -> None:
        """The loss as a curve, each point the mean of as many steps as there are too many; and the validation loss."""
        rows = [row for row in self.rows if row.get("loss") is not None]
        n = math.ceil(len(rows) / points) or 1
        bins = [rows[i:i + n] for i in range(0, len(rows), n)]
        curves = {f"training, mean of {n} steps" if n > 1 else "training":
                  [(b[len(b) // 2]["step"], sum(row["loss"] for row in b) / len(b)) for b in bins]}
        if measured := [(row["step"], row["validation"]) for row in self.rows if row.get("validation") is not None]:
            curves["validation"] = measured
        save_image(line_plot(curves, "loss", "step", "loss"), path)

    def sync(self) -> None:
        """To the disk: before a state is saved, its lines must be there."""
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())


def finite(value: float) -> float | None:
    """None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


# ---- TensorBoard, wandb: x is the step, and a resumed run has no twin points -----------------------------------------

class TensorBoard:
    """Event files in <out>/tensorboard; a reader drops what an earlier start wrote of the resumed step and later."""

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
    """A run of the project sdlora, whose id stands in <out>/wandb.txt; what was logged before is not logged again."""

    def __init__(self, config, folder: Path, step: int):
        import wandb
        name = folder / "wandb.txt"
        if step == 0 or not name.exists():
            name.write_text(secrets.token_hex(4), encoding="utf-8")
        self.image = wandb.Image
        self.run = wandb.init(project="sdlora", id=name.read_text(encoding="utf-8"), name=folder.name, dir=str(folder),
                              config=asdict(config), resume="allow")

    def add(self, row: Mapping[str, object]) -> None:
        if row["step"] >= self.run.step:  # of a resumed run the first one that it has no values of
            self.run.log({name: value for name, value in row.items() if name != "step" and value is not None}, step=row["step"])

    def picture(self, step: int, path: Path) -> None:
        self.add({"step": step, "samples": self.image(str(path))})

    def flush(self) -> None:
        """Nothing: what was logged lies with wandb's own process, which outlives this one."""

    def close(self) -> None:
        self.run.finish()


LOGS = {"tensorboard": TensorBoard, "wandb": Wandb}


# ---- figures ---------------------------------------------------------------------------------------------------------

def peak_memory(device: torch.device) -> int | None:
    """Bytes: of CUDA's allocator, else of the process (its largest resident size), where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_text(n: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.2f} GB"
