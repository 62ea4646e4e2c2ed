"""Merging LoRAs into a checkpoint: values against fp64, bytes of what no LoRA touches, and the memory that it takes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from sd.checkpoints.names import model_names
from sd.checkpoints.writer import ldm_state, save_merged
from sd.config import TINY, CLIPConfig, ModelConfig, UNetConfig
from sd.files.tensor_file import CheckpointError, Lazy
from sd.files.tensors import write_safetensors
from sd.lora import LoRAError, adapter_names, use_adapters
from sd.model_loader import (
    Models,
    load_lora_into_models,
    merge_lora_into_checkpoint,
    new_models,
    preload_models_from_standard_weights,
    save_checkpoint,
)
from sd.models import build_networks
from tests.checkpoints.cases import DTYPES, IN, ONE, PROJ, TWO, Q, as_ldm, assert_merged, expected, write


def in_dtypes(unet, vae):
    """New models: the UNet and the text encoder in one dtype, the VAE in another; every zero is a -0.0."""
    models = new_models(TINY, seed=4)
    for network in models.values():
        for p in network.parameters():
            p.data = torch.where(p == 0, -0.0, p)
    for key, network in models.items():
        network.to(vae if key in ("encoder", "decoder") else unet)
    return models


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """dtype -> (folder with the model as `m.safetensors`, `m.ckpt` and `m`; its tensors): fp16 with a VAE in fp32."""
    found = {}
    for dtype in DTYPES:
        folder = tmp_path_factory.mktemp("base")
        models = in_dtypes(dtype, torch.float32 if dtype == torch.float16 else dtype)
        save_checkpoint(models, folder / "m.safetensors")
        save_checkpoint(models, folder / "m")
        torch.save({"state_dict": ldm_state(models)}, folder / "m.ckpt")
        found[dtype] = folder, safetensors.torch.load_file(folder / "m.safetensors")
    return found


@pytest.fixture
def loras(tmp_path):
    (tmp_path / "other").mkdir()  # two files of one stem
    return {write(tmp_path / "x.safetensors", ONE): 0.8, write(tmp_path / "other/x.safetensors", TWO): -1.3}


# ---- values ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source, target", [("m.safetensors", "o.safetensors"), ("m.safetensors", "o"), ("m.ckpt", "o"),
                                            ("m", "o.safetensors"), ("m", "o")])
def test_every_tensor_is_its_sum_rounded_once_and_the_rest_keeps_its_bytes(bases, loras, tmp_path, dtype, source, target):
    folder, base = bases[dtype]
    merged = merge_lora_into_checkpoint(folder / source, loras, tmp_path / target, config=TINY)
    assert_merged(as_ldm(tmp_path / target), base, expected(base, [(ONE, 0.8), (TWO, -1.3)]))
    assert adapter_names(merged) == [] and merged.source == tmp_path / target
    assert {str(p.dtype) for p in merged["decoder"].parameters()} == {str(torch.float32 if dtype == torch.float16 else dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ["o.safetensors", "o"])
def test_a_dtype_that_is_named_is_that_of_every_tensor(bases, loras, tmp_path, dtype, target):
    folder, base = bases[torch.float32]
    merge_lora_into_checkpoint(folder / "m.safetensors", loras, tmp_path / target, dtype=dtype)
    assert_merged(as_ldm(tmp_path / target), base, expected(base, [(ONE, 0.8), (TWO, -1.3)]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_multiplier_of_0_gives_the_bases_bytes(bases, loras, tmp_path, dtype):
    folder, _ = bases[dtype]
    merge_lora_into_checkpoint(folder / "m.safetensors", dict.fromkeys(loras, 0.0), tmp_path / "o.safetensors")
    assert (tmp_path / "o.safetensors").read_bytes() == (folder / "m.safetensors").read_bytes()


def test_the_same_path_as_text_and_as_path_counts_twice(bases, tmp_path):
    folder, base = bases[torch.float32]
    path = write(tmp_path / "x.safetensors", ONE)
    merge_lora_into_checkpoint(folder / "m", {path: 0.5, str(path): 0.25}, tmp_path / "o.safetensors")
    assert_merged(as_ldm(tmp_path / "o.safetensors"), base, expected(base, [(ONE, 0.75)]))


def test_block_weights_and_skip_are_those_of_loading(bases, loras, tmp_path):
    folder, base = bases[torch.float32]
    one, two = loras
    merge_lora_into_checkpoint(folder / "m", loras, tmp_path / "o.safetensors", skip="mlp.fc1|norm1",
                               block_weights={one: {"down_blocks.0": 0.25}, two: {"mid_block": 0.0, "down_blocks": -2.0}})
    one_down = {key: tensor for key, tensor in ONE.items() if key.startswith(Q)}
    one_rest = {key: tensor for key, tensor in ONE.items() if key.startswith(IN)}
    two_down = {key: tensor for key, tensor in TWO.items() if key.startswith(Q)}
    sums = expected(base, [(one_down, 0.8 * 0.25), (one_rest, 0.8), (two_down, 2.6)])
    assert_merged(as_ldm(tmp_path / "o.safetensors"), base, sums)
    with pytest.raises(LoRAError, match="block weights are given for 'elsewhere'"):
        merge_lora_into_checkpoint(folder / "m", loras, tmp_path / "p.safetensors", block_weights={"elsewhere": "mid_block=0"})


def test_the_merged_models_that_come_back_are_those_of_the_file(bases, loras, tmp_path):
    merged = merge_lora_into_checkpoint(bases[torch.float32][0] / "m", loras, tmp_path / "o.safetensors")
    written = safetensors.torch.load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(tensor, written[key]) for key, tensor in ldm_state(merged).items())
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 32, generator=g)
    adapted = preload_models_from_standard_weights(bases[torch.float32][0] / "m", "cpu")
    for path, multiplier in loras.items():
        load_lora_into_models(adapted, path, str(path), multiplier)
    with torch.no_grad():
        a, b = (m["diffusion"](x, torch.tensor([3, 700]), context) for m in (merged, adapted))
    assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_models_in_use_are_saved_as_their_active_adapters_make_them_and_stay_as_they_are(bases, loras, tmp_path):
    folder, base = bases[torch.bfloat16]
    models = preload_models_from_standard_weights(folder / "m", "cpu", dtype="stored")
    for name, path in zip("ab", loras):
        load_lora_into_models(models, path, name)
    with use_adapters(models, {"b": 0.5}):
        save_merged(models, tmp_path / "o.safetensors")
    assert_merged(as_ldm(tmp_path / "o.safetensors"), base, expected(base, [(TWO, 0.5)]))
    assert adapter_names(models) == ["a", "b"] and all(torch.equal(t, base[k]) for k, t in ldm_state(models).items())
    with use_adapters(models, {"b": torch.tensor([0.5, 1.0])}), pytest.raises(LoRAError, match="differ from image to image"):
        save_merged(models, tmp_path / "p.safetensors")


# ---- what is refused, and what is left of a merge that ends early ------------------------------------------------------

@pytest.mark.parametrize("target", ["o.safetensors", "o"])
def test_a_value_beyond_the_target_dtype_is_named_and_nothing_is_left(bases, tmp_path, target):
    big = {f"{PROJ}.diff": torch.full((64, 64, 1, 1), 7e4)}
    before = sorted(tmp_path.iterdir())
    path = write(tmp_path.parent / f"{tmp_path.name}.safetensors", big)
    sentence = "diffusion.mid_block.attentions.0.proj_in.weight holds values that are not finite in float16, so the model"
    with pytest.raises(CheckpointError, match=sentence):
        merge_lora_into_checkpoint(bases[torch.float16][0] / "m", {path: 1.0}, tmp_path / target)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("source", ["m.safetensors", "m", "m.ckpt"])
def test_nothing_that_is_read_is_written_over(bases, loras, tmp_path, source):
    folder = bases[torch.float32][0]
    with pytest.raises(CheckpointError, match="is read by this|are written as"):
        merge_lora_into_checkpoint(folder / source, loras, folder / source, config=TINY)
    with pytest.raises(CheckpointError, match="is read by this"):
        merge_lora_into_checkpoint(folder / source, loras, next(iter(loras)), config=TINY)
    with pytest.raises(CheckpointError, match="is read by this"):  # a part of the folder that would be replaced
        merge_lora_into_checkpoint(folder / "m.safetensors", loras, folder / "m", vae=folder / "m" / "vae")
    (tmp_path / "link.safetensors").symlink_to(folder / "m.safetensors")
    with pytest.raises(CheckpointError, match="is read by this"):
        merge_lora_into_checkpoint(folder / "m.safetensors", loras, tmp_path / "link.safetensors")


KILLED = """
import os, signal, sys
import sd.checkpoints.writer as saver
from sd.model_loader import merge_lora_into_checkpoint
made, count = saver._made, 0
def deadly(*args):
    global count
    count += 1
    if count == 300:
        os.kill(os.getpid(), signal.SIGKILL)
    return made(*args)
saver._made = deadly
base, lora, out = sys.argv[1:]
merge_lora_into_checkpoint(base, {lora: 1.0}, out)
"""


def test_a_merge_that_is_killed_while_it_writes_leaves_the_old_file(bases, loras, tmp_path):
    out = tmp_path / "o.safetensors"
    out.write_text("precious")
    run = subprocess.run([sys.executable, "-c", KILLED, bases[torch.float32][0] / "m.safetensors", next(iter(loras)), out])
    assert run.returncode == -signal.SIGKILL and out.read_text() == "precious"


@pytest.mark.parametrize("made", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16)], ids=["shape", "dtype"])
def test_a_lazy_tensor_that_is_not_what_its_header_says_is_refused(tmp_path, made):
    with pytest.raises(ValueError, match=r"'w' was made with shape .* its header says \[2, 3\] and torch.float32"):
        write_safetensors(tmp_path / "a.safetensors", {"w": Lazy((2, 3), torch.float32, lambda: made)})
    assert not list(tmp_path.iterdir())


def test_lazy_tensors_are_made_in_the_order_of_the_file_each_when_it_is_written(tmp_path):
    order = []

    def lazy(name, dtype):
        return Lazy((2,), dtype, lambda: order.append(name) or torch.ones(2, dtype=dtype))

    tensors = {"b": lazy("b", torch.float16), "c": torch.zeros(3), "a": lazy("a", torch.float16), "w": lazy("w", torch.float64)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert order == ["w", "a", "b"] and os.listdir(tmp_path) == ["a.safetensors"]
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert found["a"].dtype == torch.float16 and found["w"].tolist() == [1, 1] and found["c"].tolist() == [0, 0, 0]


# ---- memory ----------------------------------------------------------------------------------------------------------

MIDDLE = ModelConfig(name="middle", clip=CLIPConfig(width=256, layers=2, heads=8, mlp_width=1024), vae=TINY.vae,
                     unet=UNetConfig(widths=(128, 128, 256, 256), layers_per_block=1, heads=8, context_width=256))

MEASURE = """
import json, re, sys, torch
from sd.config import ModelConfig
from sd.model_loader import merge_lora_into_checkpoint
def peak():  # ru_maxrss would begin at the size of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
base, out, lora, config = sys.argv[1:]
torch.addmm(torch.ones(8, 8), torch.ones(8, 8), torch.ones(8, 8)).isfinite().all()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = peak()
merge_lora_into_checkpoint(base, {lora: 0.7}, out, config=ModelConfig.from_dict(json.loads(config)))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """A model of some 150 MB in fp32 in every kind of file, and a LoRA on all its linear layers and convolutions."""
    folder = tmp_path_factory.mktemp("middle")
    with torch.device("meta"):
        networks = build_networks(MIDDLE)
    models = Models({k: m.to_empty(device="cpu") for k, m in networks.items()}, MIDDLE)
    lora = {}
    for name in model_names(MIDDLE):
        for tail in ("weight", "bias"):
            p = getattr(models[name.component].get_submodule(name.ours), tail, None)
            if p is not None:
                p.data = torch.rand(p.shape)
        weight = models[name.component].get_submodule(name.ours).weight
        if name.kohya and weight.dim() > 1 and "embedding" not in name.ours:
            lora[f"{name.kohya}.lora_down.weight"] = torch.rand(4, *weight.shape[1:])
            lora[f"{name.kohya}.lora_up.weight"] = torch.rand(weight.shape[0], 4, *[1] * (weight.dim() - 2))
    write(folder / "lora.safetensors", lora)
    save_checkpoint(models, folder / "m.safetensors")
    save_checkpoint(models, folder / "m")
    torch.save(ldm_state(models), folder / "m.ckpt")
    save_checkpoint(models, folder / "half.safetensors", dtype=torch.float16)
    return folder


def measured(folder, source, target):
    run = subprocess.run([sys.executable, "-c", MEASURE, folder / source, target, folder / "lora.safetensors",
                          json.dumps(MIDDLE.to_dict())], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    path = folder / source
    size = sum(f.stat().st_size for f in path.rglob("*.safetensors")) if path.is_dir() else path.stat().st_size
    return int(run.stdout), size


@pytest.mark.parametrize("source, target", [("m.safetensors", "o.safetensors"), ("m.safetensors", "o"), ("m", "o.safetensors"),
                                            ("m.ckpt", "o.safetensors"), ("half.safetensors", "o.safetensors")])
def test_a_merge_needs_little_more_memory_than_its_base(middle, tmp_path, source, target):
    """1.0 is the base, mapped; the rest is what one tensor needs while it is merged, the LoRA and the program itself."""
    peak, size = measured(middle, source, tmp_path / target)
    print(f"{source} -> {target}: {peak / size:.2f} of {size / 1e6:.0f} MB")
    assert size > 70e6 and 0.9 * size < peak < 1.5 * size
