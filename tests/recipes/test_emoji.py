"""The emoji recipe at a tiny size: names, captions and split of the data, every stage once, and the judges."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recipes.emoji import data, evaluate, text, train
from recipes.emoji.data import BASE, HELD_OUT, HIGH_CONTRAST, POOL, STYLES, Concept, EmojiSet, IconSet, Row
from recipes.emoji.text import train_text
from sd.config import CLIPConfig, UNetConfig, VAEConfig
from sd.files.tensors import read_tensors
from sd.model_loader import load_lora_into_models, preload_models_from_standard_weights
from sd.pipeline import generate
from sd.prompts.tokenizer import load_tokenizer, tokenize
from sd.training.dataset.cache import Posteriors
from sd.training.optim import lr_factor

TINY = replace(train.EMOJI, clip=CLIPConfig(max_tokens=32, width=16, layers=1, heads=2, mlp_width=32),
               vae=VAEConfig(widths=(8, 8, 16), layers_per_block=1, norm_groups=4),
               unet=UNetConfig(widths=(8, 16), attention=(False, True), layers_per_block=1, heads=2, context_width=16,
                               norm_groups=4), image_size=16)
LABELS = ("red apple", "grinning face", "blue book", "black cat")


@pytest.fixture
def rows():
    styles = ("noto", "twemoji", HIGH_CONTRAST)
    return [Row(4 * s + k, f"CODE{k}", label, ("fruit", "happy"), style)
            for s, style in enumerate(styles) for k, label in enumerate(LABELS)]


@pytest.fixture
def pictures(rows):
    return torch.randint(0, 256, (len(rows), 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def recipe(monkeypatch, tmp_path, rows, pictures):
    """The stages on 12 pictures of noise, in a folder of their own."""
    for module in (train, evaluate):
        monkeypatch.setattr(module, "OUT", tmp_path)
        monkeypatch.setattr(module, "build", lambda size=16: (pictures, rows))
    monkeypatch.setattr(train, "EMOJI", TINY)
    monkeypatch.setattr(train, "START", tmp_path / "start.safetensors")
    monkeypatch.setattr(train, "READS", tmp_path / "reads.safetensors")
    few = {"steps": 2, "save_every": 2, "batch_size": 4}
    for name in ("VAE", "TEXT", "UNET", "FINISH", "STYLE", "CONCEPT"):
        config = getattr(train, name)
        monkeypatch.setattr(train, name, replace(config, out=str(tmp_path / name.lower()), **few))
    monkeypatch.setattr(train, "CONCEPT_CODE", "CODE1")
    return tmp_path


def test_a_drawing_is_found_by_code_points_by_label_and_by_an_older_name(monkeypatch):
    files = {("new", "icons.json"): {"icons": {"robot": {"body": "r"}, "bear": {"body": "b"}, "hand-left": {"body": "h"}},
                                     "aliases": {"robot-face": {"parent": "robot"}}},
             ("new", "chars.json"): {"1f916": "robot", "00a9-fe0f": "copy", "1f43b": "bear"},
             ("old", "icons.json"): {"icons": {"robot-face": {"body": "x"}, "polar-bear": {"body": "y"},
                                               "hidden-thing": {"body": "z", "hidden": True}}}}
    monkeypatch.setattr(data, "package", lambda name, file: files.get((name.removeprefix("@iconify-json/"), file), {}))
    aliases = data.aliases_of(files["new", "icons.json"])
    assert aliases == {"robot": ["robot", "robot-face"], "bear": ["bear"], "hand-left": ["hand-left"]}
    concepts = [Concept("1F916", "robot", ()), Concept("1F43B", "polar bear", ()), Concept("1", "hidden thing", ()),
                Concept("2", "nothing like it", ())]
    assert {c.label: n for c, n in IconSet("new").match(concepts, {}).items()} == {"robot": "robot", "polar bear": "bear"}
    names = {"1F916": aliases["robot"]}
    assert {c.label: n for c, n in IconSet("old").match(concepts, names).items()} == {
        "robot": "robot-face", "polar bear": "polar-bear"}


@pytest.mark.parametrize("label, name", [("keycap: 5", "keycap-5"), ("Japanese “here” button", "japanese-here-button"),
                                         ("woman’s hat", "womans-hat"), ("red heart", "red-heart")])
def test_a_label_becomes_the_name_of_a_drawing(label, name):
    assert data.slug(label) == name


@pytest.mark.parametrize("code, plain", [("0032-fe0f-20e3", "32-20E3"), ("1f468-200d-2764-fe0f-200d-1f468",
                                                                         "1F468-200D-2764-200D-1F468")])
def test_code_points_are_written_as_in_the_split(code, plain):
    assert data.plain(code) == plain


def test_a_drawing_that_is_not_square_stands_in_the_middle_of_a_square(monkeypatch):
    icons = {"icons": {"wide": {"body": "<b/>", "width": 40, "height": 30, "left": 2}}, "width": 16, "height": 16,
             "aliases": {"turned": {"parent": "wide", "hFlip": True}}}
    monkeypatch.setattr(data, "package", lambda name, file: icons if file == "icons.json" else {})
    svg = IconSet("set").svg("wide", 128)
    assert re.search(r'viewBox="([^"]*)"', svg)[1].split() == ["2.0", "-5.0", "40", "40"]
    assert 'width="128"' in svg and "scale(-1 1)" not in svg
    assert 'transform="translate(44 0) scale(-1 1)"' in IconSet("set").svg("turned", 128)  # x -> 44 - x keeps 2..42


def test_the_split_is_the_one_that_the_figures_are_of():
    assert (len(HELD_OUT["concepts"]), len(HELD_OUT["pairs"])) == (82, 363)
    assert not {code for code, _ in HELD_OUT["pairs"]} & set(HELD_OUT["concepts"])
    assert {style for _, style in HELD_OUT["pairs"]} == set(BASE)
    code, style = HELD_OUT["pairs"][0]
    others = {Row(0, code, "", (), s).split for s in STYLES if [code, s] not in HELD_OUT["pairs"]}
    assert Row(0, code, "", (), style).split == "pair" and others == {"train"}
    assert {Row(0, HELD_OUT["concepts"][0], "", (), s).split for s in STYLES} == {"concept"}


def test_captions_name_the_style_nine_times_in_ten_and_tags_every_second_time(rows):
    pool = data.captions(replace(rows[0], tags=("fruit", "sweet", "round", "juicy", "snack")))
    assert pool == data.captions(replace(rows[0], tags=("fruit", "sweet", "round", "juicy", "snack")))
    assert len(pool) == POOL and all(text.startswith("red apple") for text in pool)
    assert sum(text.endswith(", noto style") for text in pool) == 0.9 * POOL
    assert sum(text.count(",") > text.endswith("style") for text in pool) == 0.5 * POOL
    assert max(text.count(",") for text in pool) <= 5
    assert data.captions(replace(rows[0], tags=()))[-1] == "red apple, noto style"


def test_the_black_and_white_style_is_told_no_colours(rows):
    texts = [data.caption(row) for row in rows if row.style == HIGH_CONTRAST]
    assert texts == ["apple, high contrast style", "grinning face, high contrast style", "book, high contrast style",
                     "cat, high contrast style"]
    assert data.caption(replace(rows[-1], label="red", tags=()), ("light blue thing",)) == (
        "red, thing, high contrast style")


def test_long_captions_fit_into_the_context():
    row = Row(0, "1F468", "man in motorized wheelchair", ("accessibility", "wheelchair", "disability", "handicapped"),
              "fluent-emoji-flat")
    tokens = tokenize(load_tokenizer(), list(data.captions(row)), train.EMOJI.clip.max_tokens)  # warns where it cuts
    assert tokens.shape == (POOL, 32)


def test_folding_makes_latents_of_mean_0_and_variance_1_and_changes_no_picture(pictures, rows):
    models = train.fresh_models(TINY)
    chosen = data.choose(pictures, rows)
    x = data.to_float(pictures)
    before, logvar = models["encoder"](x)
    rebuilt, noise = models["decoder"](before), torch.randn_like(before)
    sampled = models["decoder"](before + (0.5 * logvar).exp() * noise)
    train.fold_statistics(models, chosen)
    after, logvar = models["encoder"](x)
    torch.testing.assert_close(models["decoder"](after), rebuilt, rtol=0, atol=1e-4)
    torch.testing.assert_close(models["decoder"](after + (0.5 * logvar).exp() * noise), sampled, rtol=0, atol=1e-4)
    mean, std = Posteriors(models, chosen)(range(len(chosen)))
    assert mean.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(mean.var(dim=(0, 2, 3)) + std.square().mean(dim=(0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.smoke
def test_every_stage_leaves_what_the_next_one_needs(recipe, rows, monkeypatch):
    train.train_vae("vae", None)
    train.train_text_encoder("text")
    train.train_unet("unet", None)
    train.finish_unet("finish", "unet")
    model = recipe / "emoji.safetensors"
    train.export("finish", model)
    metadata = read_tensors(model).metadata
    assert "data/NOTICE" in metadata["license"] and "@iconify-json/noto@1.2.9" in metadata["sdlora.provenance"]
    assert metadata["sdlora.steps"] == "2"

    models = preload_models_from_standard_weights(model, "cpu", dtype=torch.float32)
    assert models.config == TINY
    average = read_tensors(recipe / "finish/state.safetensors")["ema/diffusion.conv_out.weight"]
    assert torch.equal(models["diffusion"].conv_out.weight, average.half().float())

    table = models["clip"].token_embedding.weight
    texts = [text for row in rows if row.style in BASE for text in data.captions(row)]
    used = tokenize(models.tokenizer, [*texts, ""], 32).unique()
    unused = torch.ones(len(table), dtype=torch.bool).index_fill(0, used, False)
    assert (table[unused] == table[unused][0]).all()
    torch.testing.assert_close(table[unused][0], table[used].mean(0), rtol=0, atol=1e-3)  # rounded to fp16

    for stage, name in ((train.train_style, "emoji-high-contrast"), (train.train_concept, "emoji-cat-face")):
        stage(model, recipe / "loras")
        load_lora_into_models(models, recipe / f"loras/{name}.safetensors", name)
    options = {"models": models, "seed": 3, "n_inference_steps": 2}
    bare = generate("red apple, noto style", use_lora=False, **options)
    assert np.array_equal(generate("red apple, noto style", lora={"emoji-high-contrast": 0.0}, **options), bare)


def test_a_run_that_has_begun_goes_on_and_another_may_start_from_a_checkpoint(recipe):
    train.train_vae("vae", None)
    train.train_text_encoder("text")
    train.train_unet("unet", None)
    train.export("unet", recipe / "first.safetensors")
    train.train_unet("unet", None)
    train.export("unet", recipe / "again.safetensors")
    assert (recipe / "first.safetensors").read_bytes() == (recipe / "again.safetensors").read_bytes()
    (recipe / "start.safetensors").unlink()  # whoever has only the model that ships
    train.train_unet("more", recipe / "first.safetensors")
    begun = json.loads((recipe / "more/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert begun != json.loads((recipe / "unet/metrics.jsonl").read_text().splitlines()[0])["loss"]
    train.finish_unet("finish", "more", recipe / "first.safetensors")
    train.export("finish", recipe / "more.safetensors", recipe / "first.safetensors")
    assert (recipe / "first.safetensors").read_bytes() != (recipe / "more.safetensors").read_bytes()


def test_the_text_encoder_learns_what_pictures_look_like_and_goes_on_where_it_was_stopped(recipe, pictures, rows, monkeypatch):
    train.train_vae("vae", None)
    chosen = data.choose(pictures, train.base_rows(rows))
    latents = torch.randn(len(chosen), 4, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(text, "Posteriors", lambda *_: lambda indices: (latents, None))
    config = replace(train.TEXT, steps=150, batch_size=8, warmup=5, learning_rate=5e-3,
                     caption_dropout=0.0, precision="fp32", save_every=20)

    def run(name):
        models = preload_models_from_standard_weights(recipe / "start.safetensors", "cpu", dtype=torch.float32)
        drawer = train_text(replace(config, out=str(recipe / name)), models, chosen)
        return models, drawer

    models, drawer = run("whole")
    texts = [data.caption(row) for row in train.base_rows(rows)]
    with torch.no_grad():
        drawn = drawer(models["clip"](tokenize(models.tokenizer, texts, 32)))
    apart = torch.cdist(drawn.flatten(1), latents.flatten(1))
    assert apart.argmin(1).tolist() == list(range(len(texts)))  # each caption draws its own picture

    calls = iter(range(10**6))
    monkeypatch.setattr(text, "lr_factor", lambda *a: lr_factor(*a) if next(calls) < 25 else stop())
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    monkeypatch.setattr(text, "lr_factor", lr_factor)
    again, _ = run("broken")
    for (name, a), b in zip(models["clip"].named_parameters(), again["clip"].parameters()):
        assert torch.equal(a, b), name


def stop():
    raise KeyboardInterrupt


def test_an_autoencoder_is_trained_further(recipe):
    train.train_vae("vae", None)
    trained = preload_models_from_standard_weights(recipe / "vae/model.safetensors", "cpu", dtype=torch.float32)
    train.train_vae("more", recipe / "vae/model.safetensors")
    changed = preload_models_from_standard_weights(recipe / "more/model.safetensors", "cpu", dtype=torch.float32)
    fresh = train.fresh_models(TINY)
    for path in ("conv_in.weight", "conv_out.weight"):
        to_trained, to_fresh = ((changed["encoder"].get_parameter(path) - m["encoder"].get_parameter(path)).norm()
                                for m in (trained, fresh))
        assert 0 < to_trained < to_fresh
    assert torch.equal(changed["diffusion"].conv_in.weight, fresh["diffusion"].conv_in.weight)


def test_the_style_lora_sees_no_held_out_concept_and_few_pictures(monkeypatch):
    codes = [*HELD_OUT["concepts"], *(f"CODE{k}" for k in range(300))]
    rows = [Row(k, code, "thing", (), style) for k, (code, style) in enumerate((c, s) for c in codes for s in STYLES)]
    chosen = train.style_rows(rows)
    assert len(chosen) == train.MOST and chosen == train.style_rows(rows)
    assert {row.style for row in chosen} == {HIGH_CONTRAST} and not {row.code for row in chosen} & set(HELD_OUT["concepts"])
    assert {row.style for row in train.base_rows(rows)} == set(BASE)
    assert not {row.code for row in train.base_rows(rows)} & set(HELD_OUT["concepts"])
    assert train.CONCEPT_CODE in HELD_OUT["concepts"]


@pytest.mark.parametrize("pixels", train.SHIFTS)
def test_a_picture_is_moved_on_white(pictures, pixels):
    expected = np.full(pictures.shape, 255, dtype=np.uint8)
    for x in range(16):
        if 0 <= x + pixels < 16:
            expected[..., x + pixels] = pictures[..., x]
    assert np.array_equal(train.shifted(pictures, pixels).numpy(), expected)


def test_the_rank_of_a_picture_is_the_number_of_nearer_ones(rows):
    rng = torch.Generator().manual_seed(1)
    gallery = torch.randint(0, 256, (9, 3, 64, 64), generator=rng, dtype=torch.uint8)
    made = torch.randint(0, 256, (5, 3, 64, 64), generator=rng, dtype=torch.uint8)
    truth = [3, 0, 8, 8, 2]
    a, b = (np.asarray(p, dtype=np.float64).reshape(-1, 3, 32, 2, 32, 2).mean(axis=(3, 5)) for p in (made, gallery))
    distance = ((a[:, None] - b[None]) ** 2).sum(axis=(2, 3, 4))
    expected = [int((distance[i] < distance[i, k]).sum()) for i, k in enumerate(truth)]
    assert evaluate.ranks(made, truth, gallery).tolist() == expected and len(set(expected)) > 1


def test_a_picture_is_sought_among_those_of_its_own_style(rows, pictures):
    pictures = F.interpolate(pictures, 64)
    asked = rows[::-1]
    assert evaluate.retrieve(pictures.flip(0), asked, pictures, rows).tolist() == [0] * len(rows)
    swapped = evaluate.retrieve(pictures[[1, 0, 5]], rows[:2] + rows[8:9], pictures, rows)
    assert swapped[0] > 0 and swapped[1] > 0


def test_psnr_is_the_mean_over_pictures_in_decibels(pictures):
    models = train.fresh_models(TINY)
    x = data.to_float(pictures)
    with torch.no_grad():
        y = models["decoder"](models["encoder"](x)[0]).clamp(-1, 1)
    each = [10 * np.log10(2.0**2 / np.mean((a.double().numpy() - b.double().numpy()) ** 2)) for a, b in zip(x, y)]
    assert evaluate.psnr(models, pictures) == pytest.approx(np.mean(each), abs=1e-3)


def test_a_data_set_differs_when_a_picture_or_a_caption_does(pictures, rows):
    base = data.choose(pictures, rows)
    other = pictures.clone()
    other[0, 0, 0, 0] += 1
    assert base.fingerprint() == data.choose(pictures, rows).fingerprint()
    assert len({base.fingerprint(), data.choose(other, rows).fingerprint(),
                EmojiSet(pictures, [("x",)] * len(rows)).fingerprint()}) == 3
    assert base.picture(0).dtype == torch.float32 and -1 <= base.picture(0).min() and base.picture(0).max() <= 1
