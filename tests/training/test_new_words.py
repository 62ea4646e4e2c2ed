"""New words of the prompt (textual inversion): trained as rows of a resized table are, and saved."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from sd.commands.main import main
from sd.files.tensors import read_tensors
from sd.lora import adapter_names
from sd.lora_files.embedding_files import read_embeddings
from sd.model_loader import Models, load_embedding, load_lora_into_models, new_models, save_checkpoint
from sd.prompts.learned_words import word_key
from sd.prompts.tokenizer import tokenize
from sd.training import PictureSet, TrainConfig, TrainError, train
from sd.training import step as batches
from sd.training.dataset.batches import Batches, batch_captions
from sd.training.optim import make_optimizer
from sd.training.rules import file_name, parse_word
from sd.training.trained import training
from tests.peers import ours_and_peers
from tests.training.tiny import SMALL, changed, copy_of, pictures

WORDS = TrainConfig(train="words", new_words=("<toy>:2=number",), prefix="<toy>", steps=4, batch_size=2, accumulate=2,
                    save_every=2, learning_rate=0.02, progress=False)
LORA = replace(WORDS, train="lora", rank=2, alpha=3.0, new_words=("<toy>:2=number", "my.style"), suffix="my.style", ema=0.9,
               dropout=0.2, word_learning_rate=0.05)
FULL = changed(LORA, train="full", text_encoder=True, dropout=0.0)


@pytest.mark.parametrize("weighting", [0.0, 0.01])
def test_vectors_move_as_rows_of_a_resized_table_in_transformers_and_diffusers(weighting, tmp_path, monkeypatch):
    ours, peers = ours_and_peers(SMALL)
    models = Models(ours, SMALL, new_models(SMALL).tokenizer)
    config = replace(WORDS, accumulate=1, steps=3, clip_norm=0.0, weight_decay=weighting, out=str(tmp_path))
    seen, original = [], batches.diffusion_loss

    def recorded(models, latents, context, t, noise, **more):
        seen.append((latents, t, noise))
        return original(models, latents, context, t, noise, **more)

    monkeypatch.setattr(batches, "diffusion_loss", recorded)
    trained = train(config, models, pictures())["clip"].learned.of("<toy>")

    encoder, schedule = peers["text_encoder"], DDPMScheduler(beta_schedule="scaled_linear", beta_start=SMALL.beta_start,
                                                             beta_end=SMALL.beta_end)
    table = encoder.resize_token_embeddings(49410, mean_resizing=False).weight
    row = models.tokenizer("number", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        table[49408:] = table[row]
    start = table.detach().clone()
    optimizer = torch.optim.AdamW([table], lr=0.02, betas=config.betas, weight_decay=0.0)  # new words do not decay
    captions = Batches(pictures(), config)
    for step, (latents, t, noise) in enumerate(seen):
        texts = batch_captions(pictures(), captions(step), config, step)
        context = encoder(tokenize(models.tokenizer, texts, 77, {"<toy>": range(49408, 49410)}))[0]
        F.mse_loss(peers["unet"](schedule.add_noise(latents, noise, t), t, context).sample, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[:49408] = start[:49408]
    assert (trained - start[49408:]).abs().max() > 0.02 and torch.allclose(trained, table[49408:], atol=1e-4)


def test_the_base_keeps_its_bits_and_what_is_trained_is_frozen_afterwards(untrained, tmp_path):
    models = train(replace(LORA, out=str(tmp_path)), copy_of(untrained), pictures())
    for key, network in untrained.items():
        now = models[key].state_dict()
        assert all(torch.equal(tensor, now[name]) for name, tensor in network.state_dict().items())
    assert not any(p.requires_grad for p in models["clip"].learned.values())
    assert list(models["clip"].words) == ["<toy>", "my.style"]


def test_the_files_of_a_run_give_another_model_the_same_words_and_lora(untrained, tmp_path):
    trained = train(replace(LORA, out=str(tmp_path)), copy_of(untrained), pictures())
    assert read_tensors(tmp_path / "lora.safetensors").metadata["modelspec.trigger_phrase"] == "<toy>, my.style"
    again = copy_of(untrained)
    load_lora_into_models(again, tmp_path / "lora.safetensors")
    for name in ("toy", "my.style"):
        load_embedding(again, tmp_path / f"{name}.safetensors")
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        outputs = [m["diffusion"](x, t, m["clip"](tokenize(m.tokenizer, ["<toy> 3, my.style"], 77, m["clip"].words)))
                   for m in (trained, again)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("spec, k, rows", [
    ("<t>=red cat", 2, [0, 1]), ("<t>:5=red cat", 5, [0, 0, 0, 1, 1]), ("<t>:3=cat", 3, [1] * 3)])
def test_words_start_from_the_tokens_of_their_text(spec, k, rows, models):
    table = models["clip"].token_embedding.weight
    both = table[models.tokenizer("red cat", add_special_tokens=False)["input_ids"]]
    with training(replace(WORDS, new_words=(spec,)), models) as parameters:
        ((name, p),) = parameters.items()
        assert name == "clip.learned." + word_key("<t>") and p.shape == (k, 8) and torch.equal(p, both[rows])


def test_words_without_a_text_start_at_random_with_the_spread_of_the_vocabulary(models):
    starts = []
    for seed in (0, 0, 1):
        with training(replace(WORDS, new_words=("<a>:75", "<b>:75"), seed=seed), copy_of(models)) as parameters:
            starts.append(torch.cat([p.detach().clone() for p in parameters.values()]))
    assert torch.equal(starts[0], starts[1]) and not torch.isclose(starts[0], starts[2]).any(-1).all()
    assert not torch.equal(starts[0][:75], starts[0][75:])
    assert starts[0].std().item() == pytest.approx(models["clip"].token_embedding.weight.std().item(), rel=0.1)


def test_a_loaded_word_is_trained_further(models, tmp_path):
    start = torch.ones(2, 8)
    models["clip"].learn({"<toy>": start, "<other>": start})
    with pytest.raises(TrainError, match="'<TOY>', which is loaded already"):
        train(replace(WORDS, new_words=("<TOY>=x",), out=str(tmp_path)), models, pictures())
    train(replace(WORDS, new_words=("<TOY>",), out=str(tmp_path)), models, pictures())
    moved = (models["clip"].learned.of("<toy>") - start).abs().max()
    assert 0 < moved < 0.2 and torch.equal(models["clip"].learned.of("<other>"), start)
    assert torch.equal(read_embeddings(tmp_path / "TOY.safetensors")["<TOY>"], models["clip"].learned.of("<toy>"))


def test_words_that_are_only_loaded_stay_as_they_are_while_the_text_encoder_is_trained(models, tmp_path):
    models["clip"].learn({"<other>": torch.ones(2, 8)})
    train(replace(FULL, suffix="my.style <other>", steps=2, out=str(tmp_path)), models, pictures())
    assert torch.equal(models["clip"].learned.of("<other>"), torch.ones(2, 8))
    assert not {"other.safetensors"} & {f.name for f in tmp_path.iterdir()}


def test_contexts_are_not_cached_while_a_word_is_trained(untrained, tmp_path):
    train(replace(WORDS, cache=str(tmp_path / "cache"), out=str(tmp_path / "out")), copy_of(untrained), pictures())
    assert (tmp_path / "cache" / "latents").exists() and not (tmp_path / "cache" / "text").exists()


def test_words_have_a_rate_of_their_own_and_do_not_decay(models):
    config = replace(LORA, text_encoder=True, learning_rate=1e-3, text_learning_rate=2e-3, word_learning_rate=3e-3)
    for rate, expected in ((3e-3, 3e-3), (None, 2e-3)):
        with training(replace(config, word_learning_rate=rate), copy_of(models)) as parameters:
            groups = make_optimizer(parameters, replace(config, word_learning_rate=rate)).param_groups
            of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
            rates = {name.split(".")[1]: of[id(p)] for name, p in parameters.items()}
            assert (rates["learned"], rates["layers"], rates["down_blocks"]) == ((expected, 0.0), (2e-3, 0.01), (1e-3, 0.01))


@pytest.mark.parametrize("change, message", [
    ({"new_words": ("=cat",)}, "new_words is .*; allowed: WORD=text or WORD:VECTORS=text"),
    ({"new_words": ("",)}, "allowed: WORD=text"),
    ({"new_words": ("<a>:0=cat",)}, "1 to 75 vectors"),
    ({"new_words": ("<a>:76=cat",)}, "1 to 75 vectors"),
    ({"new_words": ("<a>", "a")}, "words that differ in letters"),
    ({"new_words": ("<lora>",)}, "not called lora.safetensors, model.safetensors, state.safetensors"),
    ({"new_words": ()}, "new_words is .*; allowed: one or more, where train is words"),
    ({"train": "vae"}, "none, where the autoencoder is trained"),
    ({"text_encoder": True}, "text_encoder is True; allowed: off, where train is words"),
    ({"word_learning_rate": -1.0}, "word_learning_rate is -1.0; allowed: 0 or more"),
])
def test_what_cannot_be_is_refused_before_anything_is_read(change, message):
    with pytest.raises(TrainError, match=message):
        replace(WORDS, **change)


@pytest.mark.parametrize("change, message", [
    ({"prefix": ""}, "new_words has '<toy>', which is in no caption"),
    ({"new_words": ("cat=dog",)}, "new_words: 'cat' cannot be a learned word: the vocabulary has it"),
    ({"new_words": ("<toy>:1=a red cat",)}, "'<toy>' with 1 vectors, and its text 'a red cat' has 3 tokens"),
])
def test_a_run_that_cannot_start_leaves_the_models_as_they_were(change, message, models, tmp_path):
    keys = list(models["clip"].state_dict())
    with pytest.raises(TrainError, match=message):
        train(replace(LORA, **({"new_words": ("<toy>:2=number",)} | change), out=str(tmp_path)), models, pictures())
    assert list(models["clip"].state_dict()) == keys and not adapter_names(models) and not models["clip"].words


def test_a_word_may_stand_in_a_trigger_or_in_a_part_of_a_wildcard(untrained, tmp_path):
    shown = PictureSet(pictures().pictures, [("a {<toy>|cat}",)] * 5)
    for i, (change, data) in enumerate((({"trigger": "<toy>"}, pictures()), ({"wildcards": True}, shown))):
        train(replace(WORDS, prefix="", steps=1, out=str(tmp_path / str(i)), **change), copy_of(untrained), data)


@pytest.mark.parametrize("text, expected", [
    ("<toy>=a cat", ("<toy>", None, "a cat")), ("<toy>:4=cat", ("<toy>", 4, "cat")), ("<toy>", ("<toy>", None, "")),
    ("<a:b>=x=y", ("<a:b>", None, "x=y")), (" <toy> : 12 = cat ", ("<toy>", 12, "cat")), ("=x", None), ("", None)])
def test_a_new_word_is_written_with_its_number_of_vectors_and_its_text(text, expected):
    assert parse_word(text) == expected


def test_the_command_line_trains_a_word_and_says_where_it_is(tmp_path, monkeypatch, capsys):
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    save_checkpoint(new_models(SMALL), "m.safetensors")
    (tmp_path / "data").mkdir()
    for i in range(2):
        Image.new("L", (16, 16), 100 * i).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text("a <cat-toy>")
    command = ["train", "--data", "data", "--model", "m.safetensors", "--train", "words", "--new-words", "<cat-toy>:2=toy",
               "--steps", "2", "--batch-size", "1", "--out", "run"]
    assert main(command) == 0 and capsys.readouterr().out == "run/cat-toy.safetensors\n"
    assert file_name("<cat-toy>") == "cat-toy.safetensors" and list(read_embeddings("run/cat-toy.safetensors")) == ["<cat-toy>"]
    assert main(["generate", "a <cat-toy>", "--model", "m.safetensors", "--steps", "2", "--embedding",
                 "run/cat-toy.safetensors", "--out", "a.png"]) == 0


def test_names_of_files_are_fit_for_every_system():
    assert [file_name(w) for w in ("<cat-toy>", "a/b\\c", "..", "v1.3", "日本")] == [
        "cat-toy.safetensors", "a-b-c.safetensors", "word.safetensors", "v1.3.safetensors", "日本.safetensors"]
