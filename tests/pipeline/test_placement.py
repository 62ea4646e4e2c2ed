"""On which device a network is inside and after a block."""

import numpy as np
import pytest
import torch
from torch import nn

from sd.config import TINY
from sd.lora import apply_lora_to_model, get_lora_parameters, merge
from sd.model_loader import preload_models_from_standard_weights, save_checkpoint
from sd.models import memory_format, new_models
from sd.pipeline import generate
from sd.placement import Networks, at, placed, sent


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


def test_convolutions_are_in_the_layout_of_the_device_and_files_in_their_own(tmp_path, monkeypatch):
    assert memory_format(torch.device("cuda"), torch.float32) == torch.channels_last
    assert memory_format(torch.device("cpu"), torch.bfloat16) == torch.channels_last
    assert memory_format(torch.device("cpu"), torch.float32) == torch.preserve_format
    file, again = tmp_path / "plain.safetensors", tmp_path / "again.safetensors"
    save_checkpoint(new_models(TINY), file)
    plain = preload_models_from_standard_weights(file, "cpu")
    monkeypatch.setattr("sd.model_loader.memory_format", lambda device, dtype: torch.channels_last)
    last = preload_models_from_standard_weights(file, "cpu")
    for key in ("diffusion", "decoder", "encoder"):
        weights = [p for p in last[key].parameters() if p.dim() == 4]
        assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    save_checkpoint(last, again)
    assert again.read_bytes() == file.read_bytes()
    pictures = []
    for models in (plain, last):
        apply_lora_to_model({"diffusion": models["diffusion"]}, rank=2, alpha=2.0, target_modules="full")
        g = torch.Generator().manual_seed(0)
        for p in get_lora_parameters(models):
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)
        merge(models["diffusion"])
        for merged in (False, True):
            pictures.append(generate("a cat", models=models, seed=1, n_inference_steps=2, merged=merged).astype(int))
    assert all(np.abs(picture - pictures[0]).max() <= 1 for picture in pictures)


def test_noise_is_sent_as_it_is():
    x = torch.randn(3)
    assert sent(x, torch.device("cpu")) is x
