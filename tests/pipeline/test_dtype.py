"""dtype="auto", and that a picture says in which dtype it was made; each text is encoded once."""

import numpy as np
import pytest
import torch

from sd.config import TINY
from sd.errors import SDError
from sd.files.tensors import read_tensors
from sd.lora import apply_lora_to_model, lora_layers
from sd.model_loader import preload_models_from_standard_weights, save_checkpoint
from sd.models import new_models
from sd.pipeline import describe, generate
from sd.request import GenerateError, made_in


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    models = new_models(TINY)
    models["decoder"].conv_out.weight.mul_(30)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_checkpoint(models, path)
    return path


@pytest.fixture
def fast(monkeypatch):
    """A processor that multiplies bf16, and a model large enough for it."""
    monkeypatch.setattr("sd.models.has_bf16", lambda: True)
    monkeypatch.setattr("sd.models.LARGE", 0)


def test_auto_is_bfloat16_but_for_the_vae_where_the_processor_has_it(file, fast):
    models, plain = (preload_models_from_standard_weights(file, "cpu", dtype=dtype) for dtype in ("auto", None))
    assert models.dtype == models["clip"].final_norm.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for part in ("encoder", "decoder") for p in models[part].parameters())
    kernels = [m.weight for m in models["diffusion"].modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
    arguments = dict(seed=1, n_inference_steps=3)
    ours, exact = generate("a cat", models=models, **arguments), generate("a cat", models=plain, **arguments)
    assert 0 < np.abs(ours.astype(float) - exact).mean() < 4 and exact.std() > 20


def test_auto_is_the_default_for_small_models_and_other_processors(file, monkeypatch):
    monkeypatch.setattr("sd.models.has_bf16", lambda: True)
    assert preload_models_from_standard_weights(file, "cpu", dtype="auto").dtype == torch.float32
    monkeypatch.setattr("sd.models.has_bf16", lambda: False)
    monkeypatch.setattr("sd.models.LARGE", 0)
    assert preload_models_from_standard_weights(file, "cpu", dtype="auto").dtype == torch.float32


def test_a_dtype_that_is_none_is_refused(file):
    with pytest.raises(SDError, match="dtype is 'fast'; allowed: a torch.dtype, 'auto', 'stored', or None"):
        preload_models_from_standard_weights(file, "cpu", dtype="fast")


def test_a_model_in_channels_last_is_saved_as_any_other(file, fast, tmp_path):
    models = preload_models_from_standard_weights(file, "cpu", dtype="auto")
    save_checkpoint(models, tmp_path / "again.safetensors")
    saved, original = read_tensors(tmp_path / "again.safetensors"), read_tensors(file)
    assert saved.keys() == original.keys()
    for key, tensor in saved.items():
        assert torch.equal(tensor.float(), original[key].to(tensor.dtype).float()), key


def test_a_picture_says_its_dtype(file):
    models = preload_models_from_standard_weights(file, "cpu", dtype=torch.bfloat16)
    assert describe(models, "a cat", seed=1)["dtype"] == "bfloat16"
    assert made_in({"dtype": "bfloat16"}, "x.png") == "bfloat16" and made_in({}, "x.png") is None
    with pytest.raises(GenerateError, match="x.png: cannot be made again: its dtype is 'int3'; allowed: float32"):
        made_in({"dtype": "int3"}, "x.png")


def test_each_text_is_encoded_once(file):
    models, rows = preload_models_from_standard_weights(file, "cpu"), []
    models["clip"].register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    batch = generate(["a cat", "a dog"], "blurry", models=models, seed=[1, 2, 3, 4], images_per_prompt=2, n_inference_steps=2)
    alone = [generate(prompt, "blurry", models=models, seed=seed, n_inference_steps=2)
             for prompt, seed in (("a cat", 1), ("a cat", 2), ("a dog", 3), ("a dog", 4))]
    assert rows == [3, 2, 2, 2, 2] and max(np.abs(a.astype(int) - b).max() for a, b in zip(batch, alone)) <= 1


def test_a_text_is_encoded_for_each_lora_of_the_text_encoder(file):
    models, rows = preload_models_from_standard_weights(file, "cpu"), []
    apply_lora_to_model({"clip": models["clip"]}, 4, 40.0, target_modules="attn")
    for layer in lora_layers(models).values():
        torch.nn.init.normal_(layer.adapter("default").up, std=0.5, generator=torch.Generator().manual_seed(1))
    models["clip"].register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    loras = [{"default": 1.0}, {}, {"default": 1.0}, {"default": -1.0}]
    batch = generate("a cat", models=models, seed=[1, 1, 1, 1], images_per_prompt=4, n_inference_steps=2, lora=loras)
    alone = [generate("a cat", models=models, seed=1, n_inference_steps=2, lora=lora, merged=False) for lora in loras]
    assert rows == [6, 2, 2, 2, 2] and max(np.abs(a.astype(int) - b).max() for a, b in zip(batch, alone)) <= 1
    assert np.array_equal(batch[0], batch[2]) and np.abs(batch[0].astype(int) - batch[1]).max() > 5
