"""A run's folder: state.safetensors, to resume from, and a lock. The state is written atomically."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from sd.adapters.layer import MERGED
from sd.cpu import products
from sd.files.atomic import atomic_write
from sd.files.hashes import digest, headed
from sd.files.tensor_file import CheckpointError
from sd.files.tensors import read_tensors, write_safetensors
from sd.models import Models
from sd.training.dist import is_main, wait
from sd.training.errors import TrainError
from sd.training.shard import own_part, whole

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("sd")

STATE = "state.safetensors"
# Facts that are hashes, whose values tell a reader nothing.
HASHED = {"dataset": "the pictures or captions", "held_out": "the pictures or captions for validation",
          "base": "the base model", "from_lora": "the LoRA that it starts from"}


@dataclass
class Progress:
    """Progress of a run: finished steps, and steps skipped because of a bad loss or gradient."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    loss_scale: float = 65536.0  # of fp16
    good_steps: int = 0  # since the loss scale changed


def open_folder(path: str | os.PathLike) -> Path:
    """The run's folder, created if missing. Raises TrainError if it is not writable."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_main():
            with atomic_write(folder / ".writable"):
                pass
            (folder / ".writable").unlink()
    except OSError as error:
        raise TrainError(f"{folder}: cannot write there ({error.strerror})") from None
    return folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock the run's folder, so that a second training in it is refused. The lock ends with the process, however that ends."""
    if sys.platform == "win32" or not is_main():  # Windows has no such locks
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise TrainError(f"{folder}: another training is running in this folder; wait for it, or name another out "
                         f"folder") from None
    finally:
        os.close(lock)


# ---- state -----------------------------------------------------------------------------------------------------------

def save_state(folder: Path, progress: Progress, parameters: Mapping[str, Tensor],
               optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor], facts: Mapping[str, object],
               made_with: Mapping[str, str] | None = None) -> None:
    """Write the run's state atomically: weights, optimizer, moving average, progress, facts of the run, `made_with()`."""
    tensors = {f"weights/{name}": whole(p, p.detach()) for name, p in parameters.items()}
    tensors |= {f"ema/{name}": whole(parameters[name], value) for name, value in ema.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer/{name}/{key}": whole(p, v) for key, v in optimizer.state[p].items() if isinstance(v, Tensor)}
    # The optimizer's counters and estimates that are not tensors, such as Prodigy's d.
    numbers = {"groups": [_numbers(group) for group in optimizer.param_groups],
               "states": {name: _numbers(optimizer.state[p]) for name, p in parameters.items()}}
    if is_main():
        write_safetensors(folder / STATE, tensors, {"progress": json.dumps(asdict(progress)), "facts": json.dumps(facts),
                                                    "made_with": json.dumps(made_with or {}, sort_keys=True),
                                                    "optimizer": json.dumps(numbers, sort_keys=True)})
    wait()


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float))}


@torch.no_grad()
def load_state(folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
               ema: dict[str, Tensor], facts: Mapping[str, object], defaults: Mapping[str, object] | None = None,
               free: Collection[str] = (), made_with: Mapping[str, str] | None = None) -> Progress:
    """Restore the last save of a run, in place; without one the run starts at step 0.

    defaults: values assumed for options that older versions did not save. free: facts that may differ. made_with: warn if it
    is not what the save was made with. Raises TrainError, with everything that differs, if the folder has another run.
    """
    path = folder / STATE
    if not path.exists():
        return Progress()
    try:
        tensors = read_tensors(path)
        progress, saved = Progress(**json.loads(tensors.metadata["progress"])), json.loads(tensors.metadata["facts"])
        numbers = json.loads(tensors.metadata.get("optimizer", '{"groups": [], "states": {}}'))
        before = json.loads(tensors.metadata.get("made_with", "{}"))
    except (CheckpointError, KeyError, ValueError, TypeError) as error:
        raise TrainError(f"{path}: is not the state of a training ({error}); remove it, or choose another out "
                         f"folder") from None
    facts, saved = json.loads(json.dumps(facts)), json.loads(json.dumps(defaults or {})) | saved
    differs = [f"{HASHED[key]} changed" if key in HASHED else f"{key} was {saved.get(key)!r}, now {facts.get(key)!r}"
               for key in {**saved, **facts} if saved.get(key) != facts.get(key) and key not in free]
    if differs:
        raise TrainError(f"{folder}: holds another training ({'; '.join(differs)}); go on with its values, "
                         f"or choose another out folder")
    if {key.split("/")[1] for key in tensors} != set(parameters):
        raise TrainError(f"{path}: holds other weights than those that are trained now; choose another out folder")
    if others := [f"{key} {before[key]}, now {now}" for key, now in (made_with or {}).items() if before.get(key, now) != now]:
        log.warning("%s: the run was made with %s; it goes on, but not to the same last bits", folder, "; ".join(others))
    for name, p in parameters.items():
        p.copy_(own_part(p, tensors[f"weights/{name}"]))
        state = {key.rsplit("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"optimizer/{name}/")}
        # own_part copies: the tensors read are views of the mapped file.
        optimizer.state[p] = {key: own_part(p, value) for key, value in state.items()}
        optimizer.state[p] |= numbers["states"].get(name, {})
        if name in ema:
            ema[name].copy_(own_part(p, tensors[f"ema/{name}"]))
    for group, values in zip(optimizer.param_groups, numbers["groups"]):
        # The device decides what is capturable; a learning rate that is a tensor is set by each step.
        group.update((key, value) for key, value in values.items()
                     if key != "capturable" and not isinstance(group.get(key), Tensor))
    return progress


def fingerprint(models: Models, trained: Mapping[str, nn.Parameter]) -> str:
    """Hash of the model's config and of all weights that are not trained, which a resumed run must share."""
    config = models.config.to_dict()
    if not config["zero_terminal_snr"]:
        del config["zero_terminal_snr"]  # older versions did not have it, and their runs must still resume
    skip = {id(p) for p in trained.values()}
    parts: list[str | Tensor] = [json.dumps(config, sort_keys=True)]
    for component in sorted(models):  # quantised weights are buffers
        for name, p in chain(models[component].named_parameters(), models[component].named_buffers()):
            if id(p) not in skip and ".adapters." not in name and not name.endswith(MERGED):
                parts += headed(f"{component}.{name}", p)
    return digest(parts)[:16]


def run_facts(config, free: tuple[str, ...], **more: object) -> dict[str, object]:
    """The facts that a resumed run must share: every field of its config except the `free` ones, and more."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in free} | more


def made_with(device: torch.device) -> dict[str, str]:
    """What the last bits of a run depend on besides its facts. A run may go on with another value, but not in silence."""
    return {"device": device.type, "torch": torch.__version__,
            **({"threads": str(torch.get_num_threads()), "fp32 products": products()} if device.type == "cpu" else {})}
