"""Several processes that train together, as torchrun starts them; with one process everything here does nothing.

Every process holds the same weights and computes its share of each step's micro-batches; the sums of their gradients are the
same everywhere, so each makes the same step. Process 0, the chief, alone writes. With `shard` (FSDP2) a process holds a part
of each trained weight, of its gradient and of the optimizer's state.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sd.files.hashes import digest
from sd.training.errors import ProcessError

STEP = timedelta(minutes=30)  # the longest that one process waits for another within a step
WORK = timedelta(days=2)  # and while a cache is filled, or a file is written
_groups: dict[str, dist.ProcessGroup] = {}  # on the CPU, inside `processes`
_joined = count()


# ---- start and end ---------------------------------------------------------------------------------------------------

@contextmanager
def processes() -> Iterator[None]:
    """Inside, the processes that torchrun started are joined, each on a GPU of its own if there are any.

    A group that the caller has made is used. What a lost process makes of the others is a ProcessError.
    """
    if _groups or int(os.environ.get("WORLD_SIZE", "1")) == 1 and not (dist.is_available() and dist.is_initialized()):
        yield
        return
    ours, former, failed = not dist.is_initialized(), None, True
    try:
        if ours:
            _join()
        _groups.update(step=dist.new_group(backend="gloo", timeout=STEP), work=dist.new_group(backend="gloo", timeout=WORK))
        if threading.current_thread() is threading.main_thread():  # torchrun's word when a process was lost
            former = signal.signal(signal.SIGTERM, _told_to_end)
        yield
        wait()
        failed = False
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise _lost() from None
    finally:
        groups = [dist.group.WORLD] if ours else [*_groups.values()]
        _groups.clear()
        if former is not None:
            signal.signal(signal.SIGTERM, former)
        if dist.is_initialized() and not (failed and torch.cuda.is_available()):  # NCCL may wait for the lost one
            for group in groups:
                dist.destroy_process_group(group)


def _join() -> None:
    gpus, local, options = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0")), {"backend": "gloo"}
    if torch.cuda.is_available():
        if local >= gpus:
            raise ProcessError(f"process {local} of this machine has no GPU of its own; start at most {gpus}: "
                               f"torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", local)}
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store still holds the addresses of processes that ended: a prefix for each start, and each group of one.
    store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{next(_joined)}", store)
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=STEP, **options)


def _told_to_end(number, frame):
    raise _lost()


def _lost() -> ProcessError:
    return ProcessError(f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')} ends, because another "
                        f"one of this training was lost or all were told to end; the same command goes on from the last save, "
                        f"on any number of processes that divides accumulate")


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _groups else 1


def chief() -> bool:
    """Whether this is the process that writes."""
    return not _groups or dist.get_rank() == 0


def wait() -> None:
    """Until all processes are here: after what the chief does alone."""
    if _groups:
        dist.barrier(group=_groups["work"])


def of_chief(value: bool) -> bool:
    """What the chief has as `value`: of a question whose answer may differ by the time that each process asks it."""
    if not _groups:
        return value
    answer = torch.tensor(int(value))
    dist.broadcast(answer, 0, group=_groups["step"])
    return bool(answer)


def devices() -> list[int]:
    """The GPU of this process, for `torch.random.fork_rng`, which else wakes all of the machine."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def check_accumulate(accumulate: int) -> None:
    """Raises ProcessError unless each step's micro-batches are shared out evenly."""
    n = world()
    if accumulate % n:
        raise ProcessError(f"accumulate is {accumulate} with {n} processes; it is the number of micro-batches in an optimizer "
                           f"step, of all processes together, so allowed are {n}, {2 * n}, {3 * n}, ..")


def check_same(parameters: Mapping[str, nn.Parameter], **facts: object) -> None:
    """Raises ProcessError, in all processes alike, when a fact (as JSON) or the trained weights differ between them."""
    if not _groups:
        return
    facts |= {"trained weights": digest(p for p in parameters.values() if not _sharded(p))[:16]}
    found: list = [None] * world()
    dist.all_gather_object(found, (socket.gethostname(), json.loads(json.dumps(facts))), group=_groups["step"])
    first_host, first = found[0]
    for rank, (host, other) in enumerate(found):
        differs = [f"{key} is {other.get(key)!r} there, {first.get(key)!r} here" for key in {**first, **other}
                   if first.get(key) != other.get(key)]
        if differs:
            raise ProcessError(f"process {rank} on {host} differs from process 0 on {first_host}: {'; '.join(differs)}; all "
                               f"need the same data, out folder, program and kind of device")


# ---- the work of a step ----------------------------------------------------------------------------------------------

def own_numbers(step: int, accumulate: int) -> range:
    """The micro-batches that this process computes of a step's: one of every `world()`, by their number in the whole run."""
    return range(step * accumulate, (step + 1) * accumulate)[dist.get_rank() if _groups else 0::world()]


def own_first(items: Sequence) -> Iterator:
    """This process's share of the items and, when all have done theirs, the rest: it finds done what they leave on disk."""
    if not _groups:
        yield from items
        return
    mine = range(dist.get_rank(), len(items), world())
    yield from (items[i] for i in mine)
    wait()
    yield from (item for i, item in enumerate(items) if i not in mine)


@torch.no_grad()
def add_up(parameters: Iterable[nn.Parameter], loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
    """Sum all processes' gradients, in place, and their `loss`, a scalar; and whether any of them was told to stop.

    One flat fp32 buffer for all gradients, of whatever network. A weight that no process has a gradient for keeps none.
    """
    if not _groups:
        return loss, stop
    parameters = list(parameters)
    parts = [p for p in parameters if _sharded(p)]
    for p in parts:  # FSDP has averaged them
        p.grad, p.part_of.grad = None if p.part_of.grad is None else p.part_of.grad.to_local().mul_(world()), None
    parameters = [p for p in parameters if not _sharded(p)]
    # First a word on the CPU: no device waits for it, and there a lost process is seen at once.
    words = torch.tensor([stop, *(p.grad is not None for p in parameters)], dtype=torch.int32)
    dist.all_reduce(words, group=_groups["step"])
    stops, *held = words.tolist()
    parameters = [p for p, n in zip(parameters, held) if n]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters]
    flat = torch.cat([loss.float().reshape(1), *(grad.reshape(-1).float() for grad in grads)])
    dist.all_reduce(flat)
    total, *pieces = flat.split([1, *(grad.numel() for grad in grads)])
    if grads:
        torch._foreach_copy_(grads, [piece.view_as(grad) for piece, grad in zip(pieces, grads)])
    return total[0], stops > 0


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients down to a norm of `most`, all together (0: leave them); returns the norm that they had."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if any(map(_sharded, parameters)):
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, most or math.inf, norm)
    return norm


# ---- sharded weights: the trained parameters are plain tensors, this process's parts, as their gradients and moments are -----

def _sharded(p: Tensor) -> bool:
    return hasattr(p, "part_of")
