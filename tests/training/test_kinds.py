"""Every kind of adapter is trained, saved and loaded; a quantised base is trained on and never written."""

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch

from sd.adapters.kinds import KINDS
from sd.adapters.quant import dequantize_base, quantize_base, quantized_kinds
from sd.files.tensors import read_tensors
from sd.lora import lora_layers, lora_state, merge_loss, remove_lora
from sd.model_loader import load_lora_into_models, save_checkpoint
from sd.pipeline import generate
from sd.training import TrainConfig, TrainError, train
from tests.training.tiny import changed, copy_of, metrics, output, pictures

QUICK = TrainConfig(rank=2, alpha=2.0, steps=6, batch_size=2, save_every=100, progress=False, learning_rate=1e-2)


def base_of(models):
    return {f"{key}.{name}": t.clone() for key, m in models.items() for name, t in m.state_dict().items()
            if ".adapters." not in name}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_its_file_does_what_the_trained_model_does(untrained, tmp_path, kind):
    models = copy_of(untrained)
    before, plain = base_of(models), output(models)
    train(changed(QUICK, kind=kind, out=str(tmp_path)), models, pictures())
    assert {w.kind for w in lora_state(models, "lora").values()} == {kind} and not torch.equal(output(models), plain)
    after = base_of(models)
    assert after.keys() == before.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = load_lora_into_models(copy_of(untrained), tmp_path / "lora.safetensors")
    assert torch.equal(output(again), output(models))
    header = read_tensors(tmp_path / "lora.safetensors").metadata
    module = "networks.lora" if kind == "lora" else "lycoris.kohya" if KINDS[kind].lycoris_name else None
    assert header["ss_steps"] == "6" and header.get("ss_network_module") == module


def test_the_flag_takes_every_kind_and_another_is_one_sentence():
    assert get_args(get_type_hints(TrainConfig)["kind"]) == tuple(KINDS)
    with pytest.raises(TrainError, match=f"kind is 'lorra'; allowed: {', '.join(KINDS)}$"):
        TrainConfig(kind="lorra")


def test_rslora_scales_by_the_root_of_the_rank(untrained, tmp_path):
    models = train(replace(QUICK, rank=4, alpha=3.0, rslora=True, out=str(tmp_path)), copy_of(untrained), pictures())
    (alpha,) = {w.alpha for w in lora_state(models, "lora").values()}
    assert alpha == 3.0 * 2.0
    assert {layer.adapter("lora").scale for layer in lora_layers(models).values()} == {3.0 / 2.0}  # alpha / sqrt(rank)


@pytest.mark.parametrize("quantize", ["nf4", "nf4-double", "int8", "fp8"])
def test_a_lora_trained_on_a_quantised_base_is_that_of_a_plain_base_with_its_values(untrained, tmp_path, quantize):
    config = replace(QUICK, quantize=quantize, targets=("kohya",))
    models = train(replace(config, out=str(tmp_path / "q")), copy_of(untrained), pictures())
    assert quantized_kinds(models) == [quantize]
    plain = dequantize_base(quantize_base(copy_of(untrained), quantize))
    train(replace(config, quantize="none", out=str(tmp_path / "p")), plain, pictures())
    losses = [[row["loss"] for row in metrics(tmp_path / side)] for side in "qp"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for path, weights in lora_state(models, "lora").items():
        other = lora_state(plain, "lora")[path]
        assert all(torch.allclose(t, other.tensors[name], atol=1e-3) for name, t in weights.tensors.items()), path
    assert merge_loss(models) < 1e-4
    assert json.loads(read_tensors(tmp_path / "q/lora.safetensors").metadata["sdlora.training"])["quantize"] == quantize


def test_the_weights_of_a_quantised_base_are_not_trained(untrained, tmp_path):
    models = quantize_base(copy_of(untrained))
    with pytest.raises(TrainError, match=r"quantised \(nf4\), so its weights cannot be trained"):
        train(changed(QUICK, train="full", out=str(tmp_path)), models, pictures())


def test_pictures_of_a_quantised_base_are_made_without_whole_merged_weights(untrained, tmp_path):
    models = quantize_base(copy_of(untrained))
    train(replace(QUICK, out=str(tmp_path)), models, pictures())
    header = read_tensors(tmp_path / "lora.safetensors").metadata
    assert header["sdlora.base_quantization"] == "nf4" and json.loads(header["sdlora.training"])["quantize"] == "none"
    how = {"models": models, "seed": 1, "n_inference_steps": 2}
    picture = generate("x", **how)
    assert all(layer.merged_weight is None for layer in lora_layers(models).values())
    assert abs(picture.astype(int) - generate("x", merged=True, **how)).max() <= 1
    remove_lora(models)
    save_checkpoint(models, tmp_path / "m.safetensors")
    assert read_tensors(tmp_path / "m.safetensors").metadata["sdlora.base_quantization"] == "nf4"


@pytest.mark.parametrize("options", [{"kind": "loha"}, {"rslora": True}, {"quantize": "nf4"}], ids=str)
def test_what_belongs_to_a_lora_is_refused_for_a_full_training(options):
    with pytest.raises(TrainError, match="train is 'full'; allowed: lora, where"):
        TrainConfig(train="full", **options)
