"""Loading, switching and removing an adapter do not take longer with many others loaded. What is counted are instructions of
Python, not seconds."""

import sys

import pytest
import torch
import torch.nn as nn

from sd.adapters.targets import adaptable_layers
from sd.adapters.walk import walk
from sd.lora import AdapterWeights, attach_state, lora_layers, modules_of, remove_lora, set_adapters, use_adapters

LAYERS = 12


def instructions(run) -> int:
    """Number of Python's instructions in run()."""
    count, before = [0], sys.gettrace()

    def seen(frame, event, arg):
        frame.f_trace_opcodes = True
        count[0] += event == "opcode"
        return seen
    sys.settrace(seen)
    try:
        run()
    finally:
        sys.settrace(before)
    return count[0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(LAYERS // 2))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.tied = self.blocks[0][0]


def load(net: Net, name: str) -> None:
    factors = {"down": torch.ones(2, 4), "up": torch.ones(4, 2)}
    paths = [f"blocks.{k}.{i}" for k in range(LAYERS // 2) for i in (0, 2)] + ["attention.q_proj"]
    attach_state(net, {path: AdapterWeights("lora", dict(factors), alpha=2.0) for path in paths}, name)


def with_adapters(count: int) -> Net:
    net = Net()
    for k in range(count):
        load(net, f"a{k}")
        set_adapters(net, {})
    return net


def use(net: Net) -> None:
    with use_adapters(net, {"a0": torch.ones(2)}):
        pass


ACTIONS = {"load": lambda net: load(net, "new"), "replace": lambda net: load(net, "a0"), "use": use, "names": modules_of,
           "set": lambda net: set_adapters(net, {"a0": 1.0}), "remove": lambda net: remove_lora(net, "a0")}


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_takes_as_many_instructions_with_forty_adapters_as_with_two(action):
    nets = [with_adapters(count) for count in (2, 40)]
    for net in nets:  # what is computed once for all is not counted
        with use_adapters(net, {"a1": 1.0}):
            pass
    few, many = (instructions(lambda: ACTIONS[action](net)) for net in nets)  # noqa: B023
    assert many <= 1.02 * few + 20


def test_the_walk_is_that_of_named_modules_without_the_adapters():
    net = with_adapters(3)
    assert len(lora_layers(net)) == LAYERS + 1
    for duplicates in (True, False):
        expected = [(name, m) for name, m in net.named_modules(remove_duplicate=duplicates) if ".adapters" not in f".{name}"]
        found = list(walk(net, remove_duplicate=duplicates))
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert all(a is b for (_, a), (_, b) in zip(found, expected))
    assert ("tied" in dict(walk(net, remove_duplicate=False))) and "tied" not in dict(walk(net))
    assert not any("adapters" in path for path in adaptable_layers(net))
