"""Sharding (FSDP2): each rank has a part of every weight of the trained networks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sd.models import Models
from sd.training.dist import is_joined, is_main, is_sharded, rank, world

if TYPE_CHECKING:
    from sd.training.dist import Part


def shard(models: Models, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Shard the networks that own these parameters, block by block; returns this rank's parts, as plain tensors.

    A block is gathered only while it computes. All ranks must call a network equally often, in samples and validation too.
    Elementwise work on the parts, such as an optimizer's step, need not know about the sharding.
    """
    if not is_joined():
        return dict(parameters)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # no such view is written to in place
    mesh = init_device_mesh(next(iter(parameters.values())).device.type, (world(),))
    for key in dict.fromkeys(name.partition(".")[0] for name in parameters):
        network = models[key].to(memory_format=torch.contiguous_format)  # the only one that FSDP supports
        empty = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in network.parameters()}
        vars(network)["plain"] = deepcopy(network, empty)  # past nn.Module, so that it is not a submodule
        for child in network.children():
            for block in child if isinstance(child, nn.ModuleList) else [child] if list(child.children()) else []:
                fully_shard(block, mesh=mesh)
        # Otherwise parameters outside the blocks would stay gathered after a forward without a backward, such as a sample's.
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
    parts: dict[str, nn.Parameter] = {}
    for name in parameters:
        key, _, path = name.partition(".")
        p = models[key].get_parameter(path)
        part = cast("Part", nn.Parameter(p.detach().to_local()))  # the same memory
        part.part_of = p
        parts[name] = part
    return parts


def whole(p: Tensor, value: Tensor) -> Tensor:
    """Gather a value of p's shape, such as a moment, on rank 0's CPU; returned as it is if p is not sharded.

    All ranks must call it; only rank 0's result is meaningful.
    """
    if not is_sharded(p) or value.shape != p.shape:
        return value
    padded = value.new_zeros(_rows(p), *p.shape[1:])
    padded[:len(value)] = value
    parts = [torch.empty_like(padded) for _ in range(world())] if is_main() else None
    dist.gather(padded, parts)
    return torch.cat(parts)[:len(p.part_of)].cpu() if parts else value


def own_part(p: Tensor, value: Tensor) -> Tensor:
    """The inverse of `whole`: a copy of this rank's part on the device of p."""
    if is_sharded(p) and value.shape == p.part_of.shape:
        value = value[rank() * _rows(p):][:_rows(p)]
    return value.to(p.device, copy=True)


def _rows(p: Part) -> int:
    return -(-len(p.part_of) // world())  # of a part, as torch.chunk makes them; the last ones have fewer or none


@torch.no_grad()
def unshard(models: Models) -> None:
    """Replace sharded networks by plain ones with the full weights, on every rank."""
    for key, network in models.items():
        plain = vars(network).get("plain")
        if plain is not None:
            plain.load_state_dict({name: value.full_tensor() for name, value in network.state_dict().items()}, assign=True)
            models[key] = plain.eval().requires_grad_(False)
