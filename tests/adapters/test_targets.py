"""Which layers an adapter is put on, the names of targets and adapters, and what is refused before anything changes."""


import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from sd.attention import CrossAttention, SelfAttention
from sd.clip import CLIP
from sd.config import SD15, TINY
from sd.lora import (
    KINDS,
    LoRAError,
    LoRALayer,
    LoRALinear,
    adapter_names,
    apply_lora_to_model,
    find_targets,
    get_lora_parameters,
    lora_layers,
    remove_lora,
    unreached_layers,
    use_adapters,
)
from sd.unet import UNet
from tests.adapters.cases import fill, model_and_input


def sd15_unet():
    with torch.device("meta"):
        return UNet(SD15.unet)


def test_trainable_parameters_on_sd15_are_those_of_the_papers_tables():
    counts = {}
    for rank, targets in ((8, ["q_proj", "v_proj"]), (4, None), (8, "attn"), (16, "attn")):
        unet = apply_lora_to_model(sd15_unet(), rank=rank, target_modules=targets)
        counts[rank, str(targets)] = sum(p.numel() for p in get_lora_parameters(unet))
    assert counts == {(8, "['q_proj', 'v_proj']"): 797_184, (4, "None"): 797_184, (8, "attn"): 1_594_368,
                      (16, "attn"): 3_188_736}
    assert sum(p.numel() for p in get_lora_parameters(
        apply_lora_to_model(sd15_unet(), rank=8, target_modules=[r"attn2\.[qv]_proj$"]))) == 397_824


def test_presets_reach_the_layers_they_promise():
    with torch.device("meta"):
        clip = CLIP(SD15.clip)
    assert len(find_targets(sd15_unet())) == 128
    assert len(find_targets(sd15_unet(), "kohya")) == 192
    assert len(find_targets(clip, "kohya")) == 72
    everything = {n for n, m in sd15_unet().named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {p.removeprefix("diffusion.") for p in find_targets(sd15_unet(), "full")} == everything - {"conv_in", "conv_out"}


def test_a_plain_name_matches_whole_components_only():
    unet = UNet(TINY.unet)
    assert find_targets(unet, ["conv1"]).keys() == find_targets(unet, [r"\.conv1$"]).keys()
    assert all(".attn1." in p for p in find_targets(unet, ["attn1"]))
    assert all(p.startswith("diffusion.down_blocks.0.") for p in find_targets(unet, ["down_blocks.0"]))
    assert not any(isinstance(m, nn.GroupNorm) for m in find_targets(unet, ["resnets"]).values())
    for wrong in ("con", "q_pro", "proj"):
        with pytest.raises(LoRAError, match=f"target '{wrong}' matches no layer"):
            find_targets(unet, [wrong])
    with pytest.raises(LoRAError, match="not a regular expression"):
        find_targets(unet, ["q_proj("])


def test_q_and_v_reach_self_and_cross_attention():
    paths = list(find_targets(UNet(TINY.unet), ["q_proj", "v_proj"]))
    assert {p.split(".")[-2] for p in paths} == {"attn1", "attn2"} and {p.split(".")[-1] for p in paths} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", ["train", "type", "v1.5", "", "a b/ü%2E", "_", ".", "apply", "modules", "_call__"])
def test_any_text_is_a_name(name):
    model, x = model_and_input("linear")
    apply_lora_to_model(model, rank=2, target_modules=["0"], name=name)
    fill(model)
    assert adapter_names(model) == [name] and len(get_lora_parameters(model, name)) == 2
    with use_adapters(model, {name: 2.0}):
        model(x)
    model.load_state_dict(model.state_dict())
    remove_lora(model, name)
    assert not lora_layers(model)


@given(st.lists(st.text(max_size=6), min_size=2, max_size=4, unique=True))
@settings(max_examples=30, deadline=None)
def test_different_names_never_meet(names):
    layer = LoRALinear(4, 4)
    for i, name in enumerate(names):
        layer.add_adapter(name, KINDS["lora"](layer.lora_shape(), 1 + i % 4))
    assert layer.adapter_names == names


@pytest.mark.parametrize("arguments, sentence", [
    (dict(rank=0), r"rank 0 does not fit 0, which maps 12 to 8 values; allowed: 1 to 8"),
    (dict(rank=9), r"rank 9 does not fit"),
    (dict(rank=2.0), r"rank 2.0 does not fit"),
    (dict(name="taken"), r"an adapter named 'taken' already exists"),
    (dict(kind="loraa"), r"kind 'loraa' is unknown; allowed: lora, full"),
    (dict(dropout=1.0), r"dropout is 1.0; allowed: 0 <= dropout < 1"),
    (dict(alpha=float("nan")), r"alpha is nan"),
    (dict(target_modules=[]), r"target_modules is empty"),
    (dict(target_modules=["1"]), r"target '1' matches no layer"),
])
def test_bad_arguments_are_one_sentence_and_change_nothing(arguments, sentence):
    model, x = model_and_input("linear")
    apply_lora_to_model(model, rank=2, target_modules=["0"], name="taken")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(LoRAError, match=sentence):
        apply_lora_to_model(model, **(dict(rank=2, target_modules=["0"], name="new") | arguments))
    assert model.state_dict().keys() == state.keys() and adapter_names(model) == ["taken"]


def test_a_failed_attach_converts_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(LoRAError, match="rank 4 does not fit 1"):
        apply_lora_to_model(model, rank=4, target_modules=["0", "1"])
    assert [type(m) for m in model] == [nn.Linear, nn.Linear] and not hasattr(model[0], "adapters")


def test_layers_whose_forward_can_be_bypassed_are_refused():
    class MyEncoder(nn.TransformerEncoderLayer):
        pass

    for target in ("linear1", "out_proj"):
        with pytest.raises(LoRAError, match="lies in a MyEncoder, which can bypass"):
            apply_lora_to_model(MyEncoder(8, 2, 16), rank=2, target_modules=[target])

    class Mine(nn.Linear):
        pass

    with pytest.raises(LoRAError, match="0 is a Mine, which has no LoRA form"):
        apply_lora_to_model(nn.Sequential(Mine(4, 4)), rank=2, target_modules=["0"])
    with pytest.raises(LoRAError, match="max_norm"):
        apply_lora_to_model(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), rank=2, target_modules=["0"])


def test_a_probe_names_the_adapted_layers_that_are_not_reached():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    apply_lora_to_model(model, rank=2, target_modules=["used", "idle"])
    assert unreached_layers(model, lambda: model["used"](torch.randn(1, 4))) == ["idle"]


def test_a_layer_with_a_forward_of_its_own_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    old = model[0].forward
    model[0].forward = lambda x: old(x)
    with pytest.raises(LoRAError, match="0 has a forward of its own"):
        apply_lora_to_model(model, rank=2, target_modules=["0"])


def test_attention_projects_with_lora_layers():
    for attention in (SelfAttention(2, 8), CrossAttention(2, 8, 12)):
        assert all(isinstance(getattr(attention, p), LoRALinear) for p in ("q_proj", "k_proj", "v_proj", "out_proj"))
    assert all(isinstance(m, LoRALayer) for m in find_targets(sd15_unet()).values())
