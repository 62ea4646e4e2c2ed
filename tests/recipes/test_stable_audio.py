"""LoRA on Stable Audio's transformer, of diffusers and of stable-audio-tools: LoRAW's config and files, and the recipe."""

import copy
import json
import math
import re
import shlex
import wave
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, StableAudioDiTModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from recipes.stable_audio import model as audio
from recipes.stable_audio.__main__ import CONFIG, main
from recipes.stable_audio.tones import PATCH, RATE, SOUNDS, harmonics, to_latents, to_wave, tones
from recipes.stable_audio.train import micro_batch, read_config, settings, train_base, train_lora
from sd.adapters.quant import dequantize_base, quantize_base, quantized_kinds
from sd.adapters.weights import LoRAFormatError
from sd.any_model.config import apply_lora_config
from sd.any_model.tasks import LoRAModel
from sd.files.tensors import read_tensors
from sd.lora import (
    LoRAError,
    apply_lora_to_model,
    lora_layers,
    merge,
    merge_lora_weights,
    save_lora_weights,
    unmerge,
    unreached_layers,
    use_adapters,
)
from tests.any_model.tiny import fill

TINY = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_key_value_attention_heads": 1,
        "cross_attention_dim": 8, "time_proj_dim": 8}
LORA = {"component_whitelist": ["transformer"], "multiplier": 0.5, "rank": 3, "alpha": 12, "dropout": 0, "module_dropout": 0,
        "lr": 2e-2, "weight_decompose": False}
CONFIGS = {"model": TINY, "lora": LORA, "base": {"steps": 2, "batch_size": 4},
           "training": {"sound": "octave", "steps": 4, "batch_size": 8}}
WAYS = {"lora": {}, "dora": {"lora": LORA | {"weight_decompose": True}},
        "relora": {"training": CONFIGS["training"] | {"relora_every": 2, "relora_warmup": 1}},
        "qlora": {"training": CONFIGS["training"] | {"quantize": "nf4"}}}
README = CONFIG.with_name("README.md").read_text()


def inputs(model=None):
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, PATCH, 6, generator=g), torch.rand(3, generator=g), torch.tensor([1, 4, 2])


def run(model):
    with torch.no_grad():
        return model(*inputs())


def bare(model):
    """diffusers' own network with the same weights, called as its pipeline does."""
    net = StableAudioDiTModel(in_channels=PATCH, out_channels=PATCH, cross_attention_input_dim=8, global_states_input_dim=1,
                              **TINY).eval()
    state = LoRAModel(copy.deepcopy(model)).state_dict(task=None)
    net.load_state_dict({key.removeprefix("transformer."): value for key, value in state.items()})
    return net


def call_bare(net):
    x, t, pitch = inputs()
    rotary = get_1d_rotary_pos_embed(net.config.attention_head_dim // 2, 7, use_real=True, repeat_interleave_real=False)
    tokens = 8 * torch.eye(8)[pitch][:, None]
    seconds = torch.full((3, 1, 1), 6 * PATCH / RATE)
    return net(x, timestep=t, encoder_hidden_states=tokens, global_hidden_states=seconds, rotary_embedding=rotary).sample


def run_bare(net):
    with torch.no_grad():
        return call_bare(net)


def held_out(model):
    """The loss of what no step has seen."""
    config, sound = settings({"batch_size": 64, "seed": 9})
    with torch.no_grad():
        return audio.v_loss(model, *micro_batch("octave", config, 0)).item()


# ---- sounds and diffusion ------------------------------------------------------------------------------------------------

def test_patches_of_a_waveform_are_it_without_a_loss():
    sound = torch.randn(2, 5 * PATCH)
    assert torch.equal(to_wave(to_latents(sound)), sound)
    assert torch.equal(to_latents(sound)[1, :, 3], sound[1, 3 * PATCH:4 * PATCH])


@pytest.mark.parametrize("sound", SOUNDS)
def test_tones_have_the_harmonics_that_they_should(sound):
    pitch = torch.tensor([1, 4])
    made = tones(sound, pitch, torch.tensor([0.1, 0.7]), 4 * PATCH)
    found = np.abs(np.fft.rfft(made.double().numpy())) / (2 * PATCH)
    for row, k, values in zip(found, pitch.tolist(), (harmonics(made[i:i + 1], int(p))[0] for i, p in enumerate(pitch))):
        expected = np.zeros(2 * PATCH + 1)
        for h in SOUNDS[sound]:
            if 4 * h * k < len(expected) - 1:
                expected[4 * h * k] = 0.8 * SOUNDS[sound][0] / h
        np.testing.assert_allclose(row, expected, atol=1e-6)
        np.testing.assert_allclose(values, [row[4 * h * k] if 4 * h * k < len(row) else 0 for h in range(1, 8)], atol=1e-6)


def test_the_loss_is_that_of_the_v_which_diffusers_scheduler_takes():
    scheduler = EDMDPMSolverMultistepScheduler(sigma_data=1.0, prediction_type="v_prediction")
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, PATCH, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)
    sigma = torch.tan(t * math.pi / 2)[:, None, None]

    def exact(x, t, pitch):  # x is in VP scale; solved for v, of which the scheduler's x0 is a linear function
        ve = x * (1 + sigma**2).sqrt()
        skip, one = (scheduler.precondition_outputs(a, b, sigma) for a, b in ((ve, 0 * x), (0 * x, 0 * x + 1)))
        return (x0 - skip) / one

    assert audio.v_loss(exact, x0, noise, t, None) < 1e-20
    assert audio.v_loss(lambda *a: exact(*a) + 0.5, x0, noise, t, None).item() == pytest.approx(0.25)


def test_samples_of_a_network_that_knows_the_sound_are_the_sound():
    sound, noise = torch.randn(2, PATCH, 3, dtype=torch.float64), torch.randn(2, PATCH, 3, dtype=torch.float64)

    def knowing(x, t, pitch):
        a, s = (f(t * math.pi / 2)[:, None, None] for f in (torch.cos, torch.sin))
        return (a * x - sound) / s
    assert torch.allclose(audio.sample(knowing, noise, None, steps=6), sound, atol=1e-9)


# ---- LoRA on diffusers' network ------------------------------------------------------------------------------------------

def test_the_network_is_diffusers_own():
    model = audio.new_model(CONFIGS)
    assert torch.equal(run(model), run_bare(bare(model)))


@pytest.mark.parametrize("way", WAYS)
def test_each_way_learns_leaves_the_base_alone_and_can_be_saved_merged_and_switched_off(way, tmp_path):
    config = CONFIGS | WAYS[way]
    model, fresh = audio.new_model(config), audio.new_model(config)
    if way == "qlora":
        quantize_base(fresh, "nf4")
    keys, base = audio.new_model(config).state_dict().keys(), copy.deepcopy(fresh.state_dict())
    before, loss = run(fresh), held_out(fresh)
    losses = train_lora(model, config)
    assert all(map(math.isfinite, losses)) and held_out(model) < 0.99 * loss
    assert unreached_layers(model, lambda: run(model)) == []
    assert quantized_kinds(model) == (["nf4"] if way == "qlora" else [])

    after = run(model)
    assert not torch.allclose(after, before, atol=1e-2)
    kept = LoRAModel(model).state_dict(task=None)
    assert kept.keys() == base.keys() and all(torch.equal(kept[key], base[key]) for key in base)
    with use_adapters(model, {}):
        assert torch.equal(run(model), before) and torch.equal(run_bare(bare(model)), before)

    merge(model)
    assert torch.allclose(run(model), after, atol=1e-5)
    unmerge(model)
    assert torch.equal(run(model), after)

    save_lora_weights(model, tmp_path / "x.safetensors")
    file = read_tensors(tmp_path / "x.safetensors")
    assert any(key.endswith("dora_scale") for key in file) == (way == "dora")
    assert audio.load_lora(fresh, tmp_path / "x.safetensors").tensors == len(file)
    assert torch.allclose(run(fresh), after, atol=1e-6)

    merged = merge_lora_weights(fresh)
    dequantize_base(merged)
    assert merged.state_dict().keys() == keys and type(merged.transformer.proj_in) is torch.nn.Linear
    assert torch.allclose(run(merged), after, atol=1e-5)
    audio.save_model(merged, tmp_path / "merged.safetensors")
    assert torch.equal(run(audio.load_model(tmp_path / "merged.safetensors")), run(merged))
    assert torch.equal(run_bare(bare(merged)), run(merged))


@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_are_those_of_peft(dora):
    model = audio.new_model(CONFIGS)
    net = bare(model)
    apply_lora_config(model, LORA | {"weight_decompose": dora, "component_whitelist": ["transformer_blocks"]})
    fill(model)
    layers = lora_layers(model)
    names = [path.removeprefix("transformer.") for path in layers]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, use_dora=dora)  # 6 = multiplier * alpha
    theirs = peft.inject_adapter_in_model(config, net).eval()
    for name, path in zip(names, layers):
        a, b = layers[path].adapter("default"), theirs.get_submodule(name)
        b.lora_A["default"].weight.data.copy_(a.down)
        b.lora_B["default"].weight.data.copy_(a.up)
        if dora:
            b.lora_magnitude_vector["default"].weight.data.copy_(a.magnitude.flatten())
    assert torch.allclose(run(model), run_bare(theirs), atol=1e-5)

    model(*inputs()).square().mean().backward()
    call_bare(theirs).square().mean().backward()
    for name, path in zip(names, layers):
        a, b = layers[path].adapter("default"), theirs.get_submodule(name)
        assert torch.allclose(a.up.grad, b.lora_B["default"].weight.grad, atol=1e-6, rtol=1e-4), path
        assert torch.allclose(a.down.grad, b.lora_A["default"].weight.grad, atol=1e-6, rtol=1e-4), path


@pytest.mark.smoke
def test_training_twice_gives_the_same_bits():
    models = [audio.new_model(CONFIGS) for _ in range(2)]
    assert train_base(models[0], CONFIGS) == train_base(models[1], CONFIGS)
    assert train_lora(models[0], CONFIGS) == train_lora(models[1], CONFIGS) and torch.equal(*map(run, models))


# ---- LoRAW's files -------------------------------------------------------------------------------------------------------

# Layers of stable-audio-tools' network -> diffusers' layers, whose rows are side by side in it.
LORAW = {"to_timestep_embed.0": ["timestep_proj.0"], "to_cond_embed.2": ["cross_attention_proj.2"],
         "to_global_embed.2": ["global_proj.2"], "transformer.project_in": ["proj_in"], "transformer.project_out": ["proj_out"],
         "transformer.layers.0.self_attn.to_qkv": [f"transformer_blocks.0.attn1.to_{x}" for x in "qkv"],
         "transformer.layers.0.self_attn.to_out": ["transformer_blocks.0.attn1.to_out.0"],
         "transformer.layers.0.cross_attn.to_q": ["transformer_blocks.0.attn2.to_q"],
         "transformer.layers.0.cross_attn.to_kv": [f"transformer_blocks.0.attn2.to_{x}" for x in "kv"],
         "transformer.layers.0.cross_attn.to_out": ["transformer_blocks.0.attn2.to_out.0"],
         "transformer.layers.0.ff.ff.0.proj": ["transformer_blocks.0.ff.net.0.proj"],
         "transformer.layers.0.ff.ff.2": ["transformer_blocks.0.ff.net.2"],
         "preprocess_conv": ["preprocess_conv"], "postprocess_conv": ["postprocess_conv"]}


def loraw_file(net, path, rank=3, dora=False):
    """A checkpoint as LoRAW's save_weights writes it, and the ΔW by diffusers' names, in fp64 and without alpha."""
    tensors, deltas, g = {}, {}, torch.Generator().manual_seed(2)
    for theirs, ours in LORAW.items():
        weights = [net.get_submodule(name).weight.detach() for name in ours]
        one = (1,) * (weights[0].dim() - 2)
        down = torch.randn(rank, weights[0].shape[1], *one, generator=g)
        up = torch.randn(sum(len(W) for W in weights), rank, *one, generator=g) * 0.1
        key = "model/model/" + theirs.replace(".", "/")
        tensors |= {f"{key}/lora_down.weight": down, f"{key}/lora_up.weight": up}
        delta = (up.flatten(1).double() @ down.flatten(1).double()).reshape(-1, *weights[0].shape[1:])
        deltas |= zip(ours, delta.split([len(W) for W in weights]))
        if dora and not one:
            tensors[f"{key}/dora_mag.weight"] = torch.cat(weights).norm(dim=1, keepdim=True) * 1.5
            tensors[f"{key}/dora_mag.bias"] = torch.randn(len(up), generator=g)
    torch.save(tensors, path)
    return tensors, deltas


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_of_loraw_is_w_plus_scale_up_down_in_diffusers_network(dora, tmp_path):
    model, scale = audio.new_model(CONFIGS), 2.5  # alpha 7.5 at rank 3, which the file does not say
    before, net = run(model), bare(model)
    tensors, deltas = loraw_file(net, tmp_path / "a.ckpt", dora=dora)
    for name, delta in deltas.items():
        layer = net.get_submodule(name)
        W = layer.weight.double() + scale * delta
        if dora and W.dim() == 2:
            W = W / W.norm(dim=1, keepdim=True) * layer.weight.double().norm(dim=1, keepdim=True) * 1.5
        layer.weight.data.copy_(W)
    report = audio.load_lora(model, tmp_path / "a.ckpt", "theirs", scale=scale)
    assert report.format == "LoRAW" and report.tensors == len(tensors)
    assert torch.allclose(run(model), run_bare(net), atol=2e-5, rtol=1e-4)
    with use_adapters(model, {}):
        assert torch.equal(run(model), before)
    save_lora_weights(model, tmp_path / "ours.safetensors", "theirs")
    fresh = audio.new_model(CONFIGS)
    audio.load_lora(fresh, tmp_path / "ours.safetensors")
    assert torch.equal(run(fresh), run(model))
    with pytest.raises(ValueError, match="scale is 2.5, but ours.safetensors is not a LoRAW file"):
        audio.load_lora(fresh, tmp_path / "ours.safetensors", "again", scale=scale)


def test_a_layer_that_the_network_does_not_have_is_an_error(tmp_path):
    model = audio.new_model(CONFIGS)
    tensors, _ = loraw_file(bare(model), tmp_path / "a.ckpt")
    torch.save({key.replace("/layers/0/", "/layers/7/"): tensor for key, tensor in tensors.items()}, tmp_path / "b.ckpt")
    with pytest.raises(LoRAFormatError, match="transformer_blocks"):
        audio.load_lora(model, tmp_path / "b.ckpt")
    assert not lora_layers(model)


# ---- stable-audio-tools --------------------------------------------------------------------------------------------------

@pytest.fixture
def pair():
    """Networks of both libraries with the same weights; heads of 64, of which diffusers turns as many numbers as the other."""
    pytest.importorskip("stable_audio_tools.models.dit", reason="pip install --no-deps stable-audio-tools einops")
    theirs = audio.new_model({"library": "stable_audio_tools", "model": {"embed_dim": 128, "depth": 1, "num_heads": 2}})
    ours = audio.new_model({"model": TINY | {"attention_head_dim": 64, "num_key_value_attention_heads": 2,
                                             "cross_attention_dim": 128, "time_proj_dim": 256}})
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.05 if p.dim() > 1 else 0.5))
        names = LORAW | {"to_timestep_embed.2": ["timestep_proj.2"], "to_cond_embed.0": ["cross_attention_proj.0"],
                         "to_global_embed.0": ["global_proj.0"]}
        names |= {f"transformer.layers.0.{a}": [f"transformer_blocks.0.{b}"]
                  for a, b in (("pre_norm", "norm1"), ("cross_attend_norm", "norm2"), ("ff_norm", "norm3"))}
        for name, parts in names.items():
            source, layers = theirs.model.get_submodule(name), [ours.transformer.get_submodule(part) for part in parts]
            for kind, field in (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"), ("beta", "bias")):
                values = getattr(source, kind, None)
                if isinstance(values, torch.Tensor) and getattr(layers[0], field, None) is not None:
                    for layer, part in zip(layers, values.split([len(getattr(layer, field)) for layer in layers])):
                        getattr(layer, field).copy_(part)
        ours.transformer.time_proj.weight.copy_(theirs.model.timestep_features.weight.flatten())
    return theirs, ours


def test_both_libraries_networks_compute_the_same_with_and_without_a_file_of_loraw(pair, tmp_path):
    theirs, ours = pair
    before = run(theirs)
    assert torch.allclose(before, run(ours), atol=1e-4, rtol=1e-4)
    loraw_file(ours.transformer, tmp_path / "a.ckpt", rank=2)
    for model in pair:
        assert audio.load_lora(model, tmp_path / "a.ckpt", "theirs", 0.5, 3.0).format == "LoRAW"
    assert not torch.allclose(run(theirs), before, atol=1e-2)
    assert torch.allclose(run(theirs), run(ours), atol=1e-4, rtol=1e-4)
    with use_adapters(theirs, {}):
        assert torch.equal(run(theirs), before)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_trains_the_network_of_stable_audio_tools(pair, way, tmp_path):
    model, _ = pair
    before, loss = run(model), held_out(model)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    train_lora(model, CONFIGS | WAYS[way])
    assert held_out(model) < loss and all(".transformer." in path for path in lora_layers(model))
    if way != "qlora":
        assert all(torch.equal(value, base[key]) for key, value in LoRAModel(model).state_dict(task=None).items())
        with use_adapters(model, {}):
            assert torch.equal(run(model), before)
    after = run(model)
    assert torch.allclose(run(dequantize_base(merge_lora_weights(model))), after, atol=1e-5)
    audio.save_model(model, tmp_path / "merged.safetensors")
    assert torch.equal(run(audio.load_model(tmp_path / "merged.safetensors")), run(model))


# ---- the recipe ----------------------------------------------------------------------------------------------------------

def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def test_every_command_and_the_python_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert {line.split()[3] for line in lines} == {"base", "train", "sample", "merge"}
    for line in lines:
        words = shlex.split(line, comments=True)[3:]
        words = ["2" if word == "50" else word for word in words]  # what is shown is the command, not the training
        quick = {"base": ["--steps", "3"], "train": ["--steps", "3"], "sample": ["--seconds", "0.1"], "merge": []}
        assert main(words + quick[words[0]]) == 0, line
    out = tmp_path / "out/stable_audio"
    assert "500 Hz" in capsys.readouterr().out and all(Path(out, line.split()[-1]).stat().st_size for line in
                                                       ["base.safetensors", "dora.safetensors", "relora.safetensors"])
    assert {p.suffix for p in out.iterdir()} == {".safetensors", ".wav"}  # nothing half written
    with wave.open(str(out / "base.wav")) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (RATE, RATE // 10, 1)
    (code,) = blocks("python")
    values = {}
    exec(compile(code, "README.md", "exec"), values)
    assert torch.allclose(values["routed"][0], values["base"][0], atol=1e-4) and not lora_layers(values["deployed"])


def test_the_config_that_ships_is_one():
    config = read_config(CONFIG)
    for section in ("base", "training"):
        settings(config[section])
    assert config["lora"]["alpha"] != config["lora"]["rank"]
    assert sum(p.numel() for p in audio.new_model(config).parameters()) < 250_000


@pytest.mark.parametrize(("change", "said"), [
    ({"library": "jukebox"}, "library is 'jukebox'; allowed: diffusers, stable_audio_tools"),
    ({"model": {"layers": 3}}, "options do not fit diffusers.*layers"),
    ({"lora": None}, "no section `lora`"),
    ({"lora": LORA | {"component_whitelist": ["unet"]}}, "'unet'"),
    ({"training": {"sound": "noise"}}, "sound is 'noise'; allowed: sine, octave, square"),
    ({"training": {"ema": 0.9}}, "'ema' is unknown; allowed: sound, steps"),
    ({"training": {"steps": 0}}, "steps is 0"),
    ({"training": {"steps": "many"}}, "wrong kind"),
    ({"training": {"relora_every": 1}, "lora": LORA | {"weight_decompose": True}}, "dora is True; allowed: off"),
])
def test_what_cannot_be_trained_is_one_clear_sentence(change, said):
    config = CONFIGS | change
    with pytest.raises((ValueError, LoRAError), match=said):
        train_lora(audio.new_model(config), config)


@pytest.mark.parametrize(("words", "said"), [
    ("sample --model base.safetensors --pitch 9", "pitch is 9; allowed: 1 to 4"),
    ("sample --model base.safetensors --seconds 0", "seconds is 0.0; allowed"),
    ("sample --model base.safetensors --out base.safetensors", "is read by this"),
    ("sample --model none.safetensors", "no such file"),
    ("sample --model lora.safetensors", "is not a model of this recipe"),
    ("merge --model base.safetensors --lora base.safetensors", "base.safetensors"),
    ("train --config bad.json --model base.safetensors", "section 'lorra' is unknown; allowed: library, model, base"),
    ("train --config base.safetensors --model base.safetensors", "cannot be read"),
])
def test_a_command_that_cannot_run_says_why_and_writes_nothing(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = audio.new_model(CONFIGS)
    audio.save_model(model, "base.safetensors")
    save_lora_weights(fill(apply_lora_to_model(model, 2, target_modules=["proj_in"])), "lora.safetensors")
    Path("bad.json").write_text(json.dumps({"lorra": LORA}))
    there = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert main(shlex.split(words)) == 1
    assert said in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == there


def test_a_trained_base_that_would_be_lost_is_refused():
    config = read_config(CONFIG) | {"lora": {"transformer_blocks": {"r": 2}, "trainable_model": 1}}
    with pytest.raises(ValueError, match="trainable_model is on in the section `lora`; allowed: 0"):
        train_lora(audio.new_model(config), config)


@pytest.mark.parametrize("words, sentence", [
    (["sample", "--multiplier", "3"], "multiplier and scale are those of a LoRA; name one with --lora"),
    (["sample", "--seed", "9" * 25], "allowed: 0 to 2^63 - 1"), (["train", "--config", "@"], "the section `training` is []")])
def test_what_a_command_would_not_do_is_one_sentence(tmp_path, capsys, words, sentence):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(read_config(CONFIG) | {"training": []}))
    assert main([word.replace("@", str(config)) for word in words]) == 1
    assert sentence in capsys.readouterr().err


def test_a_training_that_diverges_ends_with_a_sentence():
    config = CONFIGS | {"lora": {**LORA, "lr": 1e30}, "training": {"steps": 50, "batch_size": 2}}
    with pytest.raises(ValueError, match="the training has diverged"):
        train_lora(audio.new_model(config), config)
