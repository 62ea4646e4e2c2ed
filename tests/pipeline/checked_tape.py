"""A stand-in for a CUDA graph on the CPU. It repeats a call by running it again, and refuses what a graph could not have done.

A graph runs the same kernels, on the same addresses, with the same numbers that are not in tensors; nothing goes to the host or
comes from it. If a second run of the Python code keeps to that, the graph's replay would have computed the same.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd.adapters.derived import exact

aten = torch.ops.aten
FROM_THE_HOST = {aten.lift_fresh.default, aten.lift_fresh_copy.default}  # torch.tensor, torch.as_tensor, from_numpy
TO_THE_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}  # on the CPU, these reach no kernel
HOST_DATA = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray}


class BrokenRule(AssertionError):
    """What a CUDA graph would refuse to capture, or would silently repeat wrongly."""


class CheckedTape:
    """A `sd.graphs.Tape`."""

    def capture(self, run):
        self.run = run
        self.output, self.first = _recorded(run)
        return self.output

    def replay(self):
        output, again = _recorded(self.run)
        for i, (before, now) in enumerate(zip(self.first.ops, again.ops)):
            if before != now:
                raise BrokenRule(f"kernel {i} was {before}, and would be {now}")
        if len(self.first.ops) != len(again.ops):
            raise BrokenRule(f"there were {len(self.first.ops)} kernels, and would be {len(again.ops)}")
        self.output.copy_(output)

    @property
    def outside(self) -> set[int]:
        """Addresses that are read and were not made by the run itself."""
        return self.first.outside


def _recorded(run):
    with exact(), _Kernels() as kernels, _NothingToTheHost():  # in inference mode, views are other kernels
        return run(), kernels


class _NothingToTheHost(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in TO_THE_HOST or func in HOST_DATA:
            raise BrokenRule(f"{func.__name__} copies between host and device")
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """The kernels of a run: name, numbers, and for each tensor its form and which kernel made it, or its address."""

    def __init__(self):
        super().__init__()
        self.ops: list[tuple] = []
        self.outside: set[int] = set()
        self.made: dict[int, str] = {}  # address of memory -> the kernel that made it
        self.alive: list = []  # so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        if func in FROM_THE_HOST:
            raise BrokenRule("a tensor is made from numbers of the host")
        if torch.Tag.data_dependent_output in func.tags:
            raise BrokenRule(f"{func} brings a value to the host")
        by_mask = func is aten.index.Tensor and any(t.dtype in (torch.bool, torch.uint8) for t in given[1:]
                                                    if isinstance(t, Tensor))
        if by_mask or torch.Tag.dynamic_output_shape in func.tags and func is not aten.index.Tensor:
            raise BrokenRule(f"{func} has an output whose shape depends on values")
        self.ops.append((str(func), *(self._named(value) for value in given)))
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.alive.append(t)
                address = t.untyped_storage().data_ptr()
                if address not in self.outside:
                    self.made.setdefault(address, f"kernel {len(self.ops) - 1}")
        return out

    def _named(self, value):
        if not isinstance(value, Tensor):
            return value if isinstance(value, int | float | str | bool | None) else str(value)
        address = value.untyped_storage().data_ptr()
        if address not in self.made:
            self.outside.add(address)
        form = tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
        return self.made.get(address, address), *form
