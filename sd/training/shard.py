"""FSDP2: each process holds a part of the trained networks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sd.models import Models
from sd.training.dist import _groups, _sharded, chief, world


def shard(models: Models, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Split the networks that have these parameters over the processes, block by block; returns this process's parts.

    A block is whole only while it computes. Each process must call a network equally often, in samples and validation too.
    What is done to each number of a part alone, such as an optimizer's step, needs no word of the sharding.
    """
    if not _groups:
        return dict(parameters)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here is written to in place
    mesh = init_device_mesh(next(iter(parameters.values())).device.type, (world(),))
    for key in dict.fromkeys(name.partition(".")[0] for name in parameters):
        network = models[key].to(memory_format=torch.contiguous_format)  # FSDP takes no other
        empty = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in network.parameters()}
        vars(network)["plain"] = deepcopy(network, empty)  # not as a module of it
        for child in network.children():
            for block in child if isinstance(child, nn.ModuleList) else [child] if list(child.children()) else []:
                fully_shard(block, mesh=mesh)
        # Else what no block holds would stay as a forward without a backward, such as a sample's, has left it.
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
    parts = {}
    for name in parameters:
        key, _, path = name.partition(".")
        p = models[key].get_parameter(path)
        parts[name] = nn.Parameter(p.detach().to_local())  # the same memory
        parts[name].part_of = p
    return parts


def whole(p: nn.Parameter, value: Tensor) -> Tensor:
    """A tensor that belongs to p, for the chief to write: of a part of its shape the whole, on the CPU; else as it is.

    All processes must call it; what the others get is of no use.
    """
    if not _sharded(p) or value.shape != p.shape:
        return value
    padded = value.new_zeros(_rows(p), *p.shape[1:])
    padded[:len(value)] = value
    parts = [torch.empty_like(padded) for _ in range(world())] if chief() else None
    dist.gather(padded, parts)
    return torch.cat(parts)[:len(p.part_of)].cpu() if parts else value


def own_part(p: nn.Parameter, value: Tensor) -> Tensor:
    """A copy on the device of p of what `whole` gave."""
    if _sharded(p) and value.shape == p.part_of.shape:
        value = value[dist.get_rank() * _rows(p):][:_rows(p)]
    return value.to(p.device, copy=True)


def _rows(p: nn.Parameter) -> int:
    return -(-len(p.part_of) // world())  # of a part, as torch.chunk; the last ones have fewer, or none


@torch.no_grad()
def unshard(models: Models) -> None:
    """Put plain networks with the whole weights in the place of the sharded ones, in every process."""
    for key, network in models.items():
        plain = vars(network).get("plain")
        if plain is not None:
            plain.load_state_dict({name: value.full_tensor() for name, value in network.state_dict().items()}, assign=True)
            models[key] = plain.eval().requires_grad_(False)
