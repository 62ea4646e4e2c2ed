"""Data-parallel training in several processes (ranks), as torchrun starts them; a no-op with a single process.

All ranks have the same weights. Each computes its share of a step's micro-batches; gradients are summed over the ranks, so
that all take the same step. Only rank 0 writes files. With `shard` (FSDP2) a rank has a part of each trained weight, of its
gradient and of the optimizer's state.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sd.files.hashes import digest
from sd.training.errors import ProcessError

STEP = timedelta(minutes=30)  # the longest wait of one rank for another within a step
WORK = timedelta(days=2)  # and while a cache is filled or a file is written
_groups: dict[str, dist.ProcessGroup] = {}  # on the CPU; empty outside of `processes`
_joined = count()

if TYPE_CHECKING:
    class Part(nn.Parameter):
        """This rank's part, a plain tensor, of the sharded parameter (a DTensor) `part_of`."""

        part_of: Any


# ---- start and end ---------------------------------------------------------------------------------------------------

@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, each on its own GPU if there are any, for the duration of the block.

    A process group that the caller has initialised is used. Raises ProcessError if another process is lost.
    """
    if _groups or int(os.environ.get("WORLD_SIZE", "1")) == 1 and not (dist.is_available() and dist.is_initialized()):
        yield
        return
    ours, former, failed = not dist.is_initialized(), None, True
    try:
        if ours:
            _join()
        _groups.update(step=dist.new_group(backend="gloo", timeout=STEP), work=dist.new_group(backend="gloo", timeout=WORK))
        if threading.current_thread() is threading.main_thread():  # torchrun sends it when a process is lost
            former = signal.signal(signal.SIGTERM, _on_sigterm)
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
        if dist.is_initialized() and not (failed and torch.cuda.is_available()):  # NCCL might wait for the lost process
            for group in groups:
                dist.destroy_process_group(group)


def _join() -> None:
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    options: dict[str, Any] = {"backend": "gloo"}
    if torch.cuda.is_available():
        if local >= gpus:
            raise ProcessError(f"process {local} of this machine has no GPU of its own; start at most {gpus}: "
                               f"torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(local)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", local)}
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store keeps the addresses of processes that have ended, so each start and each group gets a prefix.
    store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{next(_joined)}", store)
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=STEP, **options)


def _on_sigterm(number, frame):
    raise _lost()


def _lost() -> ProcessError:
    return ProcessError(f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')} ends, because another "
                        f"process of this training was lost or all of them were stopped; the same command resumes from the "
                        f"last save, on any number of processes that divides accumulate")


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if _groups else 1


def rank() -> int:
    return dist.get_rank() if _groups else 0


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files."""
    return rank() == 0


def is_joined() -> bool:
    """Whether there is a process group, even one of a single process."""
    return bool(_groups)


def wait() -> None:
    """A barrier, after what rank 0 does alone."""
    if _groups:
        dist.barrier(group=_groups["work"])


def from_rank0(value: bool) -> bool:
    """Broadcast rank 0's answer, so that all ranks take the same branch."""
    if not _groups:
        return value
    answer = torch.tensor(int(value))
    dist.broadcast(answer, 0, group=_groups["step"])
    return bool(answer)


def devices() -> list[int]:
    """This rank's GPU, for `torch.random.fork_rng`, which would initialise every GPU of the machine by default."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def check_accumulate(accumulate: int) -> None:
    """Raises ProcessError unless the micro-batches of a step divide evenly among the ranks."""
    n = world()
    if accumulate % n:
        raise ProcessError(f"accumulate is {accumulate} with {n} processes; it is the number of micro-batches in an optimizer "
                           f"step, over all processes, so allowed are {n}, {2 * n}, {3 * n}, ..")


def check_same(parameters: Mapping[str, Tensor], **facts: object) -> None:
    """Raises ProcessError, on all ranks, if a fact (as JSON) or the trained weights differ between ranks."""
    if not _groups:
        return
    facts |= {"trained weights": digest(p for p in parameters.values() if not is_sharded(p))[:16]}
    found: list = [None] * world()
    dist.all_gather_object(found, (socket.gethostname(), json.loads(json.dumps(facts))), group=_groups["step"])
    first_host, first = found[0]
    for number, (host, other) in enumerate(found):
        differs = [f"{key} is {other.get(key)!r} there, {first.get(key)!r} here" for key in {**first, **other}
                   if first.get(key) != other.get(key)]
        if differs:
            raise ProcessError(f"process {number} on {host} differs from process 0 on {first_host}: {'; '.join(differs)}; all "
                               f"need the same data, out folder, program and kind of device")


# ---- the work of a step ----------------------------------------------------------------------------------------------

def own_micro_batches(step: int, accumulate: int) -> range:
    """The micro-batches of a step that this rank computes, every `world()`-th, by their numbers in the whole run."""
    return range(step * accumulate, (step + 1) * accumulate)[rank()::world()]


def own_share_first(items: Sequence) -> Iterator:
    """This rank's share of the items and then, after a barrier, the rest, whose results the other ranks have left on disk."""
    if not _groups:
        yield from items
        return
    mine = range(rank(), len(items), world())
    yield from (items[i] for i in mine)
    wait()
    yield from (item for i, item in enumerate(items) if i not in mine)


@torch.no_grad()
def all_reduce(parameters: Iterable[nn.Parameter], loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
    """Sum gradients, in place, and the scalar `loss` over all ranks; also returns whether any rank received a stop signal.

    All gradients share one flat fp32 buffer. A weight without a gradient on any rank keeps none.
    """
    if not _groups:
        return loss, stop
    parameters = list(parameters)
    parts = [p for p in parameters if is_sharded(p)]
    for part in parts:  # FSDP has averaged them
        whole = part.part_of
        part.grad, whole.grad = None if whole.grad is None else whole.grad.to_local().mul_(world()), None
    parameters = [p for p in parameters if not is_sharded(p)]
    # First a reduction on the CPU: no device has to wait for it, and a lost process is noticed at once.
    flags = torch.tensor([stop, *(p.grad is not None for p in parameters)], dtype=torch.int32)
    dist.all_reduce(flags, group=_groups["step"])
    stops, *counts = flags.tolist()  # ranks with a stop signal, and with a gradient of each parameter
    parameters = [p for p, n in zip(parameters, counts) if n]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([loss.float().reshape(1), *(grad.reshape(-1).float() for grad in grads)])
    dist.all_reduce(flat)
    total, *pieces = flat.split([1, *(grad.numel() for grad in grads)])
    if grads:
        torch._foreach_copy_(grads, [piece.view_as(grad) for piece, grad in zip(pieces, grads)])
    return total[0], stops > 0


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Clip the global norm of the gradients, in place, to `most` (0: no limit); returns the norm before."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if any(map(is_sharded, parameters)):
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    if most:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def is_sharded(p: Tensor) -> TypeGuard[Part]:
    """Whether p is this rank's part, a plain tensor, of the sharded parameter `p.part_of`."""
    return hasattr(p, "part_of")
