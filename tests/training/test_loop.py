"""Training against references: diffusers' noise and targets, a bare torch loop, and what the files must hold."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image

from sd.files.tensors import read_tensors
from sd.lora import LoRAError, adapter_names, apply_lora_to_model, get_lora_parameters, set_lora_enabled
from sd.model_loader import load_lora_into_models, preload_models_from_standard_weights
from sd.training import DataError, PictureFolder, PictureSet, TrainConfig, TrainError, diffusion_loss, train, vae_loss
from sd.training.dataset.batches import Batches, batch_captions, batch_noise
from sd.training.dataset.cache import Posteriors
from sd.training.dataset.contexts import Contexts
from sd.training.noise import draw_timesteps
from sd.training.optim import ema_rate, lr_factor, update_ema
from tests.training.tiny import SMALL, changed, copy_of, metrics, pictures

loop = importlib.import_module("sd.training.loop")
batches = importlib.import_module("sd.training.step")
work = importlib.import_module("sd.training.work")

QUICK = TrainConfig(rank=2, alpha=2.0, steps=6, batch_size=2, save_every=100, progress=False)


def weights(models) -> dict[str, torch.Tensor]:
    return {f"{key}.{name}": p.detach().clone() for key, m in models.items() for name, p in m.named_parameters()
            if ".adapters." not in name}


# ---- losses ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction, peer_name", [("eps", "epsilon"), ("v", "v_prediction")])
def test_the_loss_is_that_of_diffusers_with_a_timestep_for_each_image(models, prediction, peer_name):
    models.config = replace(SMALL, prediction=prediction)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              prediction_type=peer_name)
    latents, noise, context = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.randn(3, 7, 8)
    t = torch.tensor([0, 500, 999])
    target = noise if prediction == "eps" else scheduler.get_velocity(latents, noise, t)
    out = models["diffusion"](scheduler.add_noise(latents, noise, t), t, context)
    loss = diffusion_loss(models, latents, context, t, noise)
    torch.testing.assert_close(loss, F.mse_loss(out, target), rtol=1e-5, atol=0)
    each = [diffusion_loss(models, *(x[i:i + 1] for x in (latents, context, t, noise))) for i in range(3)]
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=1e-5, atol=0)


def test_one_timestep_for_a_whole_batch_is_refused(models):
    latents = torch.randn(3, 4, 8, 8)
    with pytest.raises(ValueError, match=r"t must be \[3\]"):
        diffusion_loss(models, latents, torch.randn(3, 7, 8), torch.tensor([500]), torch.randn_like(latents))


def test_the_vae_loss_is_reconstruction_and_the_divergence_that_torch_computes(models):
    x, noise = torch.rand(2, 1, 16, 16), torch.randn(2, 4, 8, 8)
    mean, logvar = models["encoder"](x)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    expected = F.mse_loss(models["decoder"](mean + posterior.stddev * noise), x) + 0.1 * kl
    torch.testing.assert_close(vae_loss(models, x, noise, 0.1), expected)


# ---- data ------------------------------------------------------------------------------------------------------------

def test_every_epoch_holds_each_picture_once_in_an_order_of_its_own():
    config = replace(QUICK, batch_size=3)
    places = [i for number in range(10) for i in Batches(pictures(5), config)(number)]
    epochs = [places[k:k + 5] for k in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert Batches(pictures(5), replace(config, seed=1))(0) != Batches(pictures(5), config)(0)


def test_draws_depend_on_seed_purpose_and_number_only():
    a, b = batch_noise((4, 4), QUICK, 7), batch_noise((4, 4), QUICK, 7)
    assert torch.equal(a, b)
    assert not torch.equal(a, batch_noise((4, 4), QUICK, 8))
    assert not torch.equal(a, batch_noise((4, 4), QUICK, 7, "posterior"))
    assert not torch.equal(a, batch_noise((4, 4), replace(QUICK, seed=1), 7))
    t = torch.cat([draw_timesteps(500, SMALL, QUICK, n) for n in range(20)])
    assert t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 9  # three standard errors


def test_captions_are_dropped_as_often_as_asked_and_the_rest_are_drawn_from_all():
    config, data = replace(QUICK, batch_size=1000, caption_dropout=0.1), pictures()
    drawn = batch_captions(data, [2] * 1000, config, 0)
    assert 70 <= drawn.count("") <= 130
    assert abs(drawn.count("2") - drawn.count("number 2")) < 100
    assert set(drawn) == {"", "2", "number 2"}


def test_the_latent_cache_keeps_the_posterior_in_the_scale_of_the_unet(models):
    data = pictures()
    mean, std = Posteriors(models, data)(range(len(data)))
    reference_mean, logvar = models["encoder"](data.pictures)
    torch.testing.assert_close(mean, 0.18215 * reference_mean.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std, 0.18215 * logvar.exp().sqrt().detach(), rtol=1e-5, atol=1e-6)


def test_contexts_are_those_of_the_text_encoder_whether_kept_or_trained(models):
    captions = ["a", "b", "a"]
    kept, trained = (Contexts(models, trained=flag)(captions) for flag in (False, True))
    expected = models["clip"](Contexts(models, trained=True).tokens(captions))
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(trained, expected)
    assert not kept.requires_grad


def write(folder: Path, names=("a.png", "b.png"), captions=("a.txt", "b.txt"), size=(20, 16)) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("L", size, 255).save(folder / name)
    for name in captions:
        (folder / name).write_text(f"caption of {name}\n")
    return folder


def test_a_folder_with_captions_and_one_with_metadata_hold_the_same(tmp_path):
    texts = PictureFolder(write(tmp_path / "texts"), size=16, channels=1)
    other = write(tmp_path / "jsonl", captions=())
    rows = [{"file_name": name, "text": f"caption of {name[0]}.txt"} for name in ("b.png", "a.png")]
    (other / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = PictureFolder(other, size=16, channels=1)
    assert texts.captions == lines.captions == [("caption of a.txt",), ("caption of b.txt",)]
    assert texts.fingerprint() == lines.fingerprint()
    assert torch.equal(texts.picture(0), torch.ones(1, 16, 16))


def test_pictures_are_upright_on_white_and_cut_in_the_middle(tmp_path):
    image = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8)[None] * 8, 16, axis=0))  # 32 wide, 16 high
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "b.png")
    (tmp_path / "a.txt").touch(), (tmp_path / "b.txt").touch()
    data = PictureFolder(tmp_path, size=16, channels=3)
    row = (data.picture(0)[0, 0] + 1) * 127.5
    assert row.round().tolist() == [8.0 * v for v in range(23, 7, -1)]
    assert torch.equal(data.picture(1), torch.ones(3, 16, 16))


@pytest.mark.parametrize("names, captions, message", [
    ((), (), "there are no pictures in it"),
    (("a.png", "b.png", "c.png"), ("a.txt",), "2 of 3 pictures have no caption, first: b.png"),
    (("a.png",), ("a.txt", "z.txt"), "z.txt: a caption without a picture"),
    (("a.png", "a.jpg"), ("a.txt",), "a.jpg and a.png would share the caption a.txt"),
])
def test_a_folder_that_does_not_fit_together_is_refused(tmp_path, names, captions, message):
    with pytest.raises(DataError, match=message):
        PictureFolder(write(tmp_path, names, captions), size=16, channels=1)


@pytest.mark.parametrize("content, message", [
    (b"", "b.png: is empty"), (b"GIF?", "b.png: not a picture"), (b"one pixel", "b.png: has 1 x 1 pixels")])
def test_a_picture_that_cannot_be_used_is_named_before_training(tmp_path, models, content, message):
    folder = write(tmp_path / "data")
    (folder / "b.png").write_bytes(content)
    if content == b"one pixel":
        Image.new("L", (1, 1)).save(folder / "b.png")
    with pytest.raises(DataError, match=message):
        train(replace(QUICK, data=str(folder), out=str(tmp_path / "out")), models)
    assert adapter_names(models) == []


@pytest.mark.parametrize("line, message", [
    ("{", "line 1: expected"), ('{"file_name": "a.png"}', "line 1: expected"), ("[1]", "line 1: expected"),
    ('{"file_name": "z.png", "text": "z"}', "'z.png' is not in the folder"),
    ('{"file_name": "a.png", "text": 5}', "'a.png' has a text that is not a string"),
    ('{"file_name": "a.png", "text": ""}\n{"file_name": "a.png", "text": ""}', "line 2: 'a.png' is listed twice"),
    ('{"file_name": "a.png", "text": ""}', "1 of 2 pictures have no caption, first: b.png")])
def test_a_bad_line_of_metadata_is_named(tmp_path, line, message):
    write(tmp_path, captions=())
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        PictureFolder(tmp_path, size=16, channels=1)


# ---- the step --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["lora", "full"])
def test_steps_are_those_of_a_bare_torch_loop(tmp_path, models, what):
    config = changed(QUICK, train=what, out=str(tmp_path), steps=4, accumulate=2, weight_decay=0.1, warmup=3,
                     schedule="cosine", learning_rate=1e-2, clip_norm=0.05, text_encoder=True)
    data, bare = pictures(), copy_of(models)
    train(config, models, data)

    if what == "lora":
        torch.manual_seed(loop.seed_of(0, "init", 0))
        bare = apply_lora_to_model({k: bare[k] for k in ("diffusion", "clip")}, 2, 2.0, name="lora") and bare
        parameters = get_lora_parameters(bare)
    else:
        parameters = [p for key in ("diffusion", "clip") for p in bare[key].parameters()]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in parameters],
                                  betas=(0.9, 0.99), foreach=False)
    with torch.no_grad():
        mean, logvar = bare["encoder"](data.pictures)
    for step, rate in enumerate([1 / 3, 2 / 3, 1.0, 1.0]):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        optimizer.zero_grad()
        for number in (2 * step, 2 * step + 1):
            chosen = Batches(data, config)(number)
            posterior_noise = batch_noise((2, 4, 8, 8), config, number, "posterior")
            latents = 0.18215 * (mean[chosen] + (logvar[chosen] / 2).exp() * posterior_noise)
            tokens = Contexts(bare, trained=True).tokens(batch_captions(data, chosen, config, number))
            context, noise = bare["clip"](tokens), batch_noise(latents.shape, config, number)
            t = draw_timesteps(config.batch_size, SMALL, config, number)
            (diffusion_loss(bare, latents, context, t, noise) / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()

    trained = (get_lora_parameters(models) if what == "lora" else
               [p for key in ("diffusion", "clip") for p in models[key].parameters()])
    assert len(trained) == len(parameters)
    for ours, reference in zip(trained, parameters):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=5e-5)  # Adam divides rounding by itself


def test_accumulated_micro_batches_are_one_big_batch(tmp_path, models, monkeypatch):
    small, big = copy_of(models), models
    config = changed(QUICK, train="full", steps=2, learning_rate=1e-3)
    train(replace(config, out=str(tmp_path / "a"), accumulate=2), small, pictures())

    half = config  # draws of the micro-batches 2n and 2n + 1, side by side

    def noise(shape, config, number, stream="noise"):
        return torch.cat([batch_noise((2, *shape[1:]), half, 2 * number + i, stream) for i in (0, 1)])

    monkeypatch.setattr(batches, "draw_timesteps", lambda n, model, config, number: torch.cat(
        [draw_timesteps(2, model, half, 2 * number + i) for i in (0, 1)]))
    monkeypatch.setattr(batches, "draw_noise", lambda shape, config, number: (noise(shape, config, number),) * 2)
    monkeypatch.setattr(batches, "batch_noise", noise)
    monkeypatch.setattr(batches, "batch_captions", lambda data, indices, config, number: [
        text for i in (0, 1) for text in batch_captions(data, indices[2 * i:2 * i + 2], half, 2 * number + i)])
    train(replace(config, out=str(tmp_path / "b"), batch_size=4), big, pictures())
    for a, b in zip(weights(small).values(), weights(big).values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)  # Adam divides rounding by itself
    losses = ([row["loss"] for row in metrics(tmp_path / run)] for run in "ab")
    assert next(losses) == pytest.approx(next(losses), rel=1e-5)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_frozen_weights_have_no_gradient_and_stay_bit_identical(tmp_path, models, text_encoder):
    before = weights(models)
    seen = []
    original = work.update_ema

    def spy(*args):
        seen.append({p.grad is None for m in models.values() for n, p in m.named_parameters() if ".adapters." not in n})
        original(*args)

    work.update_ema = spy
    try:
        train(replace(QUICK, out=str(tmp_path), text_encoder=text_encoder, learning_rate=0.1), models, pictures())
    finally:
        work.update_ema = original
    assert seen == [{True}] * 6
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(models).values()))
    assert any(p.abs().max() > 0 for p in get_lora_parameters(models))
    clip_has_lora = any(".adapters." in n for n, _ in models["clip"].named_parameters())
    assert clip_has_lora == text_encoder


def test_a_training_leaves_modes_flags_and_torchs_random_state_as_they_were(tmp_path, models):
    models["decoder"].conv_in.weight.requires_grad_(True)
    models["decoder"].mid_block.train()
    models["diffusion"].checkpointing = True
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(replace(QUICK, out=str(tmp_path), dropout=0.5, checkpointing=False), models, pictures())
    assert torch.equal(torch.get_rng_state(), state)
    assert models["decoder"].conv_in.weight.requires_grad and models["decoder"].mid_block.training
    assert models["diffusion"].checkpointing
    assert not any(m.training for key in ("clip", "encoder", "diffusion") for m in models[key].modules())
    assert not any(p.requires_grad for n, p in models["diffusion"].named_parameters() if ".adapters." not in n)


def test_recomputing_activations_changes_no_gradient(tmp_path, models):
    other = copy_of(models)
    config = replace(QUICK, dropout=0.3, module_dropout=0.2, text_encoder=True)
    train(replace(config, out=str(tmp_path / "a")), models, pictures())
    train(replace(config, out=str(tmp_path / "b"), checkpointing=True), other, pictures())
    for a, b in zip(get_lora_parameters(models), get_lora_parameters(other)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])  # the first decides on the device
def test_a_batch_without_a_finite_loss_is_skipped_and_counted(tmp_path, models, monkeypatch, optimizer):
    seen, update = [], work.update_ema

    def watched(ema, parameters, rate, bad):
        before = {name: value.clone() for name, value in ema.items()}
        update(ema, parameters, rate, bad)
        after = {name: p.detach().clone() for name, p in parameters.items()}
        still = all(torch.equal(p, former) for p, former in zip(after.values(), seen[-1][2].values())) if seen else False
        seen.append((still, all(torch.equal(ema[name], before[name]) for name in ema), after))

    monkeypatch.setattr(work, "update_ema", watched)
    data = pictures(3)
    data.pictures[1] = float("nan")
    train(replace(QUICK, out=str(tmp_path), batch_size=1, steps=9, ema=0.9, optimizer=optimizer), models, data)
    bad = [row["step"] for row in metrics(tmp_path) if row["loss"] is None]
    assert len(bad) == 3 and all(seen[step][1] for step in bad), "the average moved"
    assert [step for step, (still, _, _) in enumerate(seen) if still] == [step for step in bad if step > 0]
    assert metrics(tmp_path)[-1]["skipped"] == 3
    assert all(p.isfinite().all() for p in get_lora_parameters(models))
    assert json.loads(read_tensors(tmp_path / "state.safetensors").metadata["progress"])["skipped"] == 3


def test_a_training_that_has_diverged_stops_with_a_sentence(tmp_path, models):
    data = pictures()
    data.pictures[:] = float("nan")
    with pytest.raises(TrainError, match="20 steps in a row, to step 19, .* use a lower learning rate than 0.001"):
        train(replace(QUICK, out=str(tmp_path), steps=100), models, data)
    assert adapter_names(models) == []


@pytest.mark.parametrize("step, expected", [(0, 0.5), (1, 1.0), (2, 1.0), (6, 0.5), (10, 0.0)])
def test_the_cosine_falls_from_1_after_the_warm_up_to_0_at_the_end(step, expected):
    assert lr_factor(step, replace(QUICK, schedule="cosine", warmup=2, steps=10)) == pytest.approx(expected)
    assert lr_factor(step, replace(QUICK, schedule="constant", warmup=2, steps=10)) == min(1, (step + 1) / 2)


def test_the_average_of_a_constant_rises_to_it_and_is_the_weighted_sum():
    p, ema, expected = torch.nn.Parameter(torch.ones(3)), {"p": torch.zeros(3)}, 0.0
    for step in range(50):
        update_ema(ema, {"p": p}, ema_rate(0.9, step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
    torch.testing.assert_close(ema["p"], torch.full((3,), expected))
    assert expected > 0.99


# ---- results ---------------------------------------------------------------------------------------------------------

def probe(models) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    latents, context = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 7, 8, generator=rng)
    with torch.no_grad():
        return models["diffusion"](latents, torch.tensor([3, 700]), context)


@pytest.mark.parametrize("options", [
    {}, {"dora": True, "targets": ("full",)}, {"rank_dropout": 0.2, "targets": ("kohya",)}])
def test_the_saved_lora_gives_the_output_of_the_trained_one(tmp_path, models, untrained, options):
    train(replace(QUICK, out=str(tmp_path), name="new", learning_rate=0.02, ema=0.5, **options), models, pictures())
    loaded = load_lora_into_models(copy_of(untrained), tmp_path / "new.safetensors")
    assert torch.equal(probe(loaded), probe(models))
    base = probe(untrained)
    assert not torch.allclose(probe(loaded), base, atol=1e-4)
    set_lora_enabled(models, False)
    assert torch.equal(probe(models), base)
    metadata = read_tensors(tmp_path / "new.safetensors").metadata
    assert json.loads(metadata["sdlora.training"])["learning_rate"] == 0.02
    assert metadata["ss_network_dim"] == "2" and metadata["ss_seed"] == "0"
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "new"
    assert Image.open(tmp_path / "loss.png").size[0] > 100


def test_a_model_trained_from_scratch_is_the_average_and_loads_again(tmp_path, models):
    train(changed(QUICK, train="full", text_encoder=True, out=str(tmp_path), ema=0.9), models, pictures())
    loaded = preload_models_from_standard_weights(tmp_path / "model.safetensors", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(weights(models).values(), weights(loaded).values()))
    state = read_tensors(tmp_path / "state.safetensors")
    assert torch.equal(models["diffusion"].conv_in.weight, state["ema/diffusion.conv_in.weight"])
    assert not torch.equal(models["diffusion"].conv_in.weight, state["weights/diffusion.conv_in.weight"])


def test_the_tiny_model_overfits_one_picture(tmp_path, models):
    data = PictureSet(pictures(1).pictures, ["one"])
    train(changed(QUICK, train="full", out=str(tmp_path), steps=150, batch_size=8, learning_rate=5e-3), models, data)
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert np.mean(losses[-20:]) < 0.25 * np.mean(losses[:5])


def test_the_autoencoder_learns_through_the_same_loop(tmp_path, models):
    before = weights(models)
    train(changed(QUICK, train="vae", out=str(tmp_path), steps=40, learning_rate=5e-3), models, pictures(2))
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    touched = {name.split(".")[0] for name, p in weights(models).items() if not torch.equal(p, before[name])}
    assert touched == {"encoder", "decoder"}


def test_other_adapters_are_off_while_one_is_trained_and_back_afterwards(tmp_path, models, untrained):
    train(replace(QUICK, out=str(tmp_path / "a"), name="first", learning_rate=0.05), models, pictures())
    train(replace(QUICK, out=str(tmp_path / "b"), name="second"), models, pictures())
    alone = train(replace(QUICK, out=str(tmp_path / "c"), name="second"), copy_of(untrained), pictures())
    second = [p for n, p in models["diffusion"].named_parameters() if "second" in n]
    assert all(torch.equal(a, b) for a, b in zip(second, get_lora_parameters(alone)))
    assert adapter_names(models) == ["first", "second"]


# ---- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field, value", [
    ("steps", 0), ("batch_size", -1), ("accumulate", 0), ("save_every", 0), ("learning_rate", 0.0),
    ("learning_rate", 3.0), ("learning_rate", float("nan")), ("text_learning_rate", -1e-4), ("caption_dropout", 1.5),
    ("dropout", 1.0), ("ema", 1.0), ("warmup", -1), ("weight_decay", float("inf")), ("clip_norm", -1.0), ("seed", -1),
    ("schedule", "zigzag"),
    ("train", "everything"), ("size", 4), ("betas", (0.9, 1.0))])
def test_a_bad_value_is_refused_by_name_and_with_what_is_allowed(field, value):
    with pytest.raises(TrainError, match=f"{field} is .*; allowed: "):
        replace(QUICK, **{field: value})


@pytest.mark.parametrize("change, message", [
    ({"data": ""}, "no data: name a folder"), ({"data": "no/such/folder"}, "no such folder"),
    ({"data": __file__}, "not a folder"),
    ({"size": 15}, "size is 15; it must be a multiple of 2, such as 14"),
    ({"out": __file__}, "cannot write there"), ({"out": "/proc/nowhere"}, "cannot write there")])
def test_what_cannot_be_read_or_written_is_told_before_training(tmp_path, models, change, message):
    folder = write(tmp_path / "data")
    config = replace(QUICK, **({"data": str(folder), "out": str(tmp_path / "out")} | change))
    with pytest.raises((TrainError, DataError), match=message):
        train(config, models)
    assert adapter_names(models) == []


def test_training_nothing_and_a_bad_rank_are_refused(tmp_path, models):
    with pytest.raises(TrainError, match="nothing is trained"):
        replace(QUICK, unet=False)
    with pytest.raises(LoRAError, match="rank 9 does not fit"):
        train(replace(QUICK, out=str(tmp_path), rank=9), models, pictures())
    assert adapter_names(models) == []
    train(replace(QUICK, out=str(tmp_path)), models, pictures())
    with pytest.raises(TrainError, match="carries the adapters 'lora'"):
        train(changed(QUICK, train="full", out=str(tmp_path / "b")), models, pictures())
    with pytest.raises(LoRAError, match="'lora' already exists"):
        train(replace(QUICK, out=str(tmp_path)), models, pictures())


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    from sd.training.run_state import alone_in
    with alone_in(tmp_path):
        with pytest.raises(TrainError, match="another training is running in this folder"), alone_in(tmp_path):
            raise AssertionError("must not get here")
    with alone_in(tmp_path):
        pass
