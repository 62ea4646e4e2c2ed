"""Block weights against the plain meaning: each module's change, times the number of its block."""

import pytest
import torch

from sd.checkpoints.names import model_names
from sd.config import SD15, TINY
from sd.lora import apply_lora_to_model, load_lora_weights, lora_layers, lora_state, modules_of, save_lora_weights, use_adapters
from sd.lora_files.block_weights import BlockWeightError, block_multipliers
from sd.lora_files.modules import Modules
from sd.model_loader import new_models

SD = Modules(model_names(SD15), {name.path: (1, 1) for name in model_names(SD15)})
LIST26 = [i / 100 for i in range(1, 27)]

# kohya's index of a block (docs/lora-formats.md, section 6), written down apart from the table of names
WHERE = {
    "diffusion.conv_in": 0, "diffusion.down_blocks.0.resnets.0.conv1": 1, "diffusion.down_blocks.0.attentions.1.proj_in": 2,
    "diffusion.down_blocks.0.downsampler.conv": 3, "diffusion.down_blocks.2.attentions.0.proj_out": 7,
    "diffusion.down_blocks.3.resnets.1.conv2": 11, "diffusion.mid_block.resnets.1.conv1": 12,
    "diffusion.mid_block.attentions.0.transformer_blocks.0.attn1.q_proj": 12, "diffusion.up_blocks.0.resnets.0.conv1": 13,
    "diffusion.up_blocks.0.upsampler.conv": 15, "diffusion.up_blocks.1.attentions.2.proj_in": 18,
    "diffusion.up_blocks.3.resnets.2.conv1": 24,
}


def test_a_list_of_26_is_the_text_encoder_and_the_25_blocks_of_kohya():
    weights = block_multipliers(LIST26, SD)
    for path, index in WHERE.items():
        assert weights.of(path) == LIST26[index + 1], path
    assert weights.of("clip.layers.3.mlp.fc1") == LIST26[0]
    assert weights.of("diffusion.time_embedding.linear_1") == weights.of("diffusion.conv_out") == 1.0


def test_a_list_of_25_leaves_the_text_encoder_alone_and_as_text_means_the_same():
    text = block_multipliers(",".join(map(str, LIST26[1:])), SD)
    for weights in (block_multipliers(LIST26[1:], SD), text):
        assert all(weights.of(path) == LIST26[index + 1] for path, index in WHERE.items())
        assert weights.of("clip.layers.3.mlp.fc1") == 1.0


def test_a_list_of_17_names_the_blocks_with_attention_and_switches_the_others_off():
    weights = block_multipliers([0.5, *range(1, 7), 7, *range(8, 17)], SD)
    expected = {"clip.final_norm": 0.5, "diffusion.down_blocks.0.attentions.0.proj_in": 1,
                "diffusion.down_blocks.2.attentions.1.proj_in": 6, "diffusion.mid_block.attentions.0.proj_in": 7,
                "diffusion.up_blocks.1.attentions.0.proj_in": 8, "diffusion.up_blocks.3.attentions.2.proj_in": 16,
                "diffusion.conv_in": 0, "diffusion.down_blocks.0.downsampler.conv": 0,
                "diffusion.up_blocks.0.resnets.1.conv1": 0}
    assert {path: weights.of(path) for path in expected} == expected


@pytest.mark.parametrize("given", [
    {"unet": 0.5, "down_blocks.1": 2, "down_blocks.1.attentions.0": -1, "text_encoder": 0},
    {"diffusion": 0.5, "diffusion.down_blocks.1": 2, "unet.down_blocks.1.attentions.0": -1, "clip": 0},
    "unet=0.5, down_blocks.1=2, down_blocks.1.attentions.0=-1, clip=0",
])
def test_named_blocks_in_any_spelling_and_the_longest_name_counts(given):
    weights = block_multipliers(given, SD)
    expected = {"diffusion.mid_block.attentions.0.proj_in": 0.5, "diffusion.down_blocks.1.resnets.0.conv1": 2,
                "diffusion.down_blocks.1.attentions.0.proj_in": -1, "diffusion.down_blocks.1.attentions.1.proj_in": 2,
                "clip.layers.0.mlp.fc1": 0, "decoder.conv_in": 1}
    assert {path: weights.of(path) for path in expected} == expected


@pytest.mark.parametrize("given, words", [
    ([1, 2, 3], "list of 3 .* 17 .* 25 .* 26"), ({"down_block.1": 1}, "'down_block.1'.*does not have.*down_blocks.0"),
    ({"mid": 1}, "'mid'"), ({"mid_block": float("nan")}, "'mid_block' is nan"), ({"mid_block": "strong"}, "strong"),
    ("mid_block=1=2", "block=number"), ("mid_block=1,mid_block=2", "'mid_block' twice"), ([1] * 16 + ["x"], "number 17 is 'x'"),
])
def test_what_means_nothing_is_refused_by_name(given, words):
    with pytest.raises(BlockWeightError, match=words):
        block_multipliers(given, SD)


def test_lists_are_refused_for_a_model_with_other_blocks():
    modules = Modules(model_names(TINY), {name.path: (1, 1) for name in model_names(TINY)})
    with pytest.raises(BlockWeightError, match="12 . 1 . 12 blocks"):
        block_multipliers([1] * 26, modules)


def test_a_loaded_lora_changes_each_block_by_its_number(tmp_path):
    models = new_models(TINY)
    apply_lora_to_model(models, 2, 3.0, target_modules="kohya", name="x")
    for i, layer in enumerate(lora_layers(models).values()):
        torch.nn.init.normal_(layer.adapter("x").up, generator=torch.Generator().manual_seed(i))
    deltas = {path: layer.adapter("x").delta(layer.weight) for path, layer in lora_layers(models).items()}
    before = {path: layer.weight.clone() for path, layer in lora_layers(models).items()}
    save_lora_weights(models, tmp_path / "x.safetensors", "x")
    report = load_lora_weights(models, tmp_path / "x.safetensors", "x", 0.5,
                               block_weights={"text_encoder": 0.25, "mid_block": 0, "down_blocks.0.attentions.0": -2})
    assert report.blocks == {"text_encoder": 0.25, "mid_block": 0, "down_blocks.0.attentions.0": -2}
    factors = set()
    for path, layer in lora_layers(models).items():
        factor = (0.25 if path.startswith("clip") else 0 if "mid_block" in path else
                  -2 if "down_blocks.0.attentions.0" in path else 1)
        factors.add(factor)
        merged, _ = layer.merged_sum()
        expected = before[path].double() + 0.5 * factor * deltas[path].double()
        assert (merged - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert factor or torch.equal(merged, before[path])
    assert factors == {0.25, 0, -2, 1}
    with use_adapters(models, {"x": 1.0}):  # the user's multiplier is another knob
        layer = models["clip"].layers[0].attention.q_proj
        path = "clip.layers.0.attention.q_proj"
        assert torch.allclose(layer.merged_sum()[0], before[path] + 0.25 * deltas[path], atol=1e-6)
    again = lora_state(models, "x")  # and the file's own values are what is saved
    assert all(torch.equal(again[path].tensors["up"], layer.adapter("x").up) and again[path].alpha == 3.0
               for path, layer in lora_layers(models).items())
    assert modules_of(models).shapes.keys() >= deltas.keys()
