"""On which device a network is inside and after a block."""

import pytest
import torch
from torch import nn

from sd.placement import Networks, at, placed


class Traveller(nn.Linear):
    """A layer whose moves are written down; "meta" is the second device that every machine has."""

    def __init__(self):
        super().__init__(2, 2)
        self.moves = []

    def to(self, device):
        self.moves.append(str(device))
        return self.to_empty(device=device)


def test_a_network_comes_back_also_after_an_error():
    network = Traveller()
    with at(network, "meta") as inside:
        assert inside is network and network.weight.device.type == "meta"
    assert network.moves == ["meta", "cpu"]
    with pytest.raises(KeyError), at(network, "meta"):
        raise KeyError
    assert network.moves == ["meta", "cpu"] * 2


def test_a_network_that_is_there_already_is_not_touched():
    network, weightless = Traveller(), nn.Identity()
    with at(network, "cpu"), at(weightless, "meta"), at(network, "cpu", torch.device("cpu")):
        pass
    assert network.moves == []


def test_networks_wait_on_the_idle_device_after_use():
    models = {"clip": Traveller(), "encoder": Traveller()}
    with Networks(models, torch.device("cpu"), torch.device("meta")).use("clip") as clip:
        assert clip is models["clip"] and clip.moves == []
    assert models["clip"].moves == ["meta"] and models["encoder"].moves == []


def test_several_networks_come_back_to_where_each_was():
    models = {"clip": Traveller(), "encoder": Traveller()}
    models["encoder"].to("meta")
    with pytest.raises(KeyError), placed(models, models, "meta"):
        assert [m.weight.device.type for m in models.values()] == ["meta", "meta"]
        raise KeyError
    assert models["clip"].moves == ["meta", "cpu"] and models["encoder"].moves == ["meta"]
