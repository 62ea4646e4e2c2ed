"""A tiny model with tasks; as a program, one process of a DistributedDataParallel step on it: RANK WORLD FOLDER."""

import copy
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn

from sd.any_model.tasks import LoRAModel
from tests.adapters.cases import fill

RANK, ALPHA = 2, 3.0
SAMPLES = ["a", None, "a", "a"]


def tokens(*shape):
    return torch.randint(0, 20, shape)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.out = nn.Embedding(20, 6), nn.Conv1d(6, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x, shift=0.0):
        return self.out(self.conv(self.embed(x).mT).mT.relu()) + shift


def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False), tokens(4, 5)


def tasked(names=("a", "b"), **options):
    """(a model with random tasks, the bare model, an input)."""
    bare, x = net()
    model = LoRAModel(copy.deepcopy(bare))
    for i, name in enumerate(names):
        model.add_task(name, **{"rank": RANK, "alpha": ALPHA, "targets": ["full", "embed"]} | options)
        fill(model.model, name, seed=i)
    return model, bare, x


def ddp_gradients(rank: int, world: int, folder) -> list[torch.Tensor]:
    """Gradients of task a after this process's part of the batch; for a process of its own, which must end by os._exit.

    The destructor of gloo's group waits for its thread with the GIL, which that thread may need.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    model, _, x = tasked()
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    ddp(x[part], task=SAMPLES[part]).square().mean().backward()
    assert all(k.startswith("module.") and ".model." not in k for k in ddp.state_dict())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters(task="b"))
    dist.barrier()
    return [p.grad for p in model.parameters(task="a")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = ddp_gradients(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    torch.save(found, f"{sys.argv[3]}/{sys.argv[1]}.pt")
    os._exit(0)
