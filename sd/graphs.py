"""Calls as CUDA graphs: a call like one before it is one launch, not a thousand.

A graph repeats the kernels that were captured, on the addresses that they had; no Python runs. So a call is repeated only
where everything at those addresses is what the call would read now: the base's tensors, what the adapters come down to
(merged, or fused; see `LoRALayer.hold`), and the inputs, which are copied into tensors of the graph's own. Values may change
at will, so neither a switch to another LoRA of the same form nor another multiplier captures anew; other addresses or
shapes are another graph. A network that is trained, compiled, hooked or under autocast is called as it is; a training repeats
its whole steps instead (sd/training/work.py).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from sd.adapters.adapter import Adapter
from sd.adapters.derived import exact
from sd.adapters.layer import MERGED, LoRALayer

GRAPHS_KEPT = 8  # for each network; the memory in which they compute is shared


class Tape(Protocol):
    """What records one call and repeats it. A test's stand-in for CUDA's checks the rules that a graph lives by."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Record `run()`; returns its output, a tensor into which each `replay` writes."""

    def replay(self) -> None:
        """Repeat what was recorded, with the values that are now at its addresses."""


class CudaTape:
    """A torch.cuda.CUDAGraph. Tapes with one pool share memory, so their outputs are read before another is played."""

    def __init__(self, pool):
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):  # other threads go on
            output = run()
        self.graph.replay()  # a capture computes nothing
        return output

    def replay(self) -> None:
        self.graph.replay()


def _cuda_tapes() -> Callable[[], Tape]:
    return partial(CudaTape, torch.cuda.graph_pool_handle())


TAPES: dict[str, Callable[[], Callable[[], Tape]]] = {"cuda": _cuda_tapes}  # device type -> a maker of tapes for one network


def tapes_on(device: torch.device) -> Callable[[], Tape] | None:
    """A maker of tapes whose memory is shared; None on a device without graphs, and with SD_CUDA_GRAPHS=0."""
    return TAPES[device.type]() if device.type in TAPES and os.environ.get("SD_CUDA_GRAPHS") != "0" else None


@dataclass
class Graph:
    """One captured call: its own inputs and output, and the tape between them."""

    inputs: list[Tensor]
    output: Tensor
    tape: Tape


class Checked:
    """What a network's adapters were at a check, in plain numbers, since a check of everything takes longer than a step."""

    def __init__(self, layers: list[LoRALayer]):
        self.layers = layers
        self.tensors = [t for layer in layers if layer.is_on for t in layer.sources() if not t.is_inference()]
        self.numbers = self._numbers()

    def still_valid(self) -> bool:
        return self.numbers == self._numbers()

    def _numbers(self) -> list[int]:
        return [*(layer.derived.changes for layer in self.layers), *(layer.lora_enabled for layer in self.layers),
                *(t._version for t in self.tensors)]


class Graphs:
    """The last calls of one kind, by what they read, in memory that is shared."""

    def __init__(self, tapes: Callable[[], Tape], most: int = GRAPHS_KEPT):
        self.tapes, self.most = tapes, most
        self.kept: dict[Hashable, Graph | None] = {}  # None: called once, which warms up what libraries set up lazily
        self.full = False  # the device has no memory for graphs

    def repeat(self, key: Hashable, run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """run(*inputs), from a graph from the second such call on. The key says where everything else is that it reads."""
        if self.full:
            return run(*inputs)
        key = key, tuple(map(_form, inputs)), torch.are_deterministic_algorithms_enabled()
        seen = key in self.kept
        graph = self.kept[key] = self.kept.pop(key, None)  # the latest is the last
        if len(self.kept) > self.most:
            del self.kept[next(iter(self.kept))]
        if graph is None and seen:
            graph = self.kept[key] = self._captured(run, inputs)
        elif graph is not None:
            for own, given in zip(graph.inputs, inputs):
                own.copy_(given)
            graph.tape.replay()
        return run(*inputs) if graph is None else graph.output.clone()  # the next replay overwrites it

    def _captured(self, run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Graph | None:
        """A graph of this call, which has computed it; None, for good, if there is no memory for it."""
        tape = self.tapes()
        try:
            with exact(), torch.cuda.device_of(inputs[0]):
                own = [x.clone() for x in inputs]
                return Graph(own, tape.capture(lambda: run(*own)), tape)
        except torch.OutOfMemoryError:
            self.full, self.kept = True, {}
            return None


class NetworkGraphs(Graphs):
    """The last calls of one network. It does not know the network, which it would keep alive."""

    def __init__(self, tapes: Callable[[], Tape]):
        super().__init__(tapes)
        self.base: Hashable = None  # the base's tensors, by address: when they move, nothing that was captured is valid
        self.reads: Hashable = None  # what the adapters come down to, by address; None: the network is called as it is
        self.checked: Checked | None = None  # when these two were found

    def call(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """network(*inputs), repeated from a graph from the second call of its form on."""
        if self.full or torch.is_grad_enabled() or torch.is_autocast_enabled(inputs[0].device.type):
            return network._call_impl(*inputs)
        if self.checked is None or not self.checked.still_valid():
            self._check(network)
        return network._call_impl(*inputs) if self.reads is None else self.repeat(self.reads, network._call_impl, inputs)

    def _check(self, network: nn.Module) -> None:
        """Find what the network reads, and fix where that is."""
        base, layers = _base(network), [m for m in network.modules() if isinstance(m, LoRALayer)]
        held = [tensors for layer in layers if (tensors := layer.hold()) is not None]
        whole = base is not None and len(held) == len(layers)
        self.reads = tuple(_place(t) for tensors in held for t in tensors) if whole else None
        if base != self.base:
            self.base, self.kept = base, {}
        self.checked = Checked(layers)


_GRAPHS: weakref.WeakKeyDictionary[nn.Module, NetworkGraphs] = weakref.WeakKeyDictionary()


@contextmanager
def repeated(network: nn.Module) -> Iterator[None]:
    """Inside the block, calls of the network with tensors alone are repeated from graphs, which stay for later blocks.

    The caller holds the network's lock. Inside the block adapters may be switched, merged and written; layers must not be
    replaced or hooked. On a device without graphs, and with SD_CUDA_GRAPHS=0, this does nothing.
    """
    weight = next(network.parameters(), None)
    tapes = None if weight is None or network._compiled_call_impl is not None else tapes_on(weight.device)
    if tapes is None:
        yield
        return
    graphs = _GRAPHS.setdefault(network, NetworkGraphs(tapes))
    network._compiled_call_impl = partial(graphs.call, network)  # where torch's own compile() puts what it made
    try:
        yield
    finally:
        network._compiled_call_impl, graphs.checked = None, None


def forget(network: nn.Module) -> None:
    """Free the network's graphs, before it moves: they would keep their memory until the next call."""
    graphs = _GRAPHS.pop(network, None)
    if graphs is not None:
        graphs.kept, graphs.checked = {}, None


def captured(network: nn.Module) -> list[Graph]:
    """The graphs that the network has."""
    return [graph for graph in _GRAPHS[network].kept.values() if graph is not None] if network in _GRAPHS else []


def _base(network: nn.Module) -> Hashable | None:
    """Where all tensors but those of adapters are; None if the network is trained, or has hooks, which a graph would omit."""
    places, waiting = [], [network]
    while waiting:
        module = waiting.pop()
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in MERGED:
                if tensor.requires_grad:
                    return None
                places.append(_place(tensor))
        waiting += [child for child in module._modules.values() if child is not None and not isinstance(child, Adapter)]
    return tuple(places)


def _place(tensor: Tensor) -> Hashable:
    return tensor.data_ptr(), _form(tensor)


def _form(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
