"""Learned words: files of every program, the text encoder with them, pictures; against diffusers and transformers."""

import copy
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from sd.adapters.weights import LoRAFormatError
from sd.commands.main import main
from sd.files.tensor_file import CheckpointError
from sd.files.tensors import read_tensors
from sd.lora import adapter_names, apply_lora_to_model, load_lora_weights, modules_of, remove_lora
from sd.lora_files.embedding_files import read_embeddings
from sd.lora_files.read import read_lora
from sd.model_loader import (
    Models,
    count_parameters,
    load_embedding,
    load_lora_into_models,
    merge_lora_into_checkpoint,
    new_models,
    remove_embedding,
    save_checkpoint,
    save_embedding,
)
from sd.pictures.image_io import read_parameters
from sd.pipeline import describe, generate
from sd.prompts.learned_words import EmbeddingError, word_key
from sd.prompts.tokenizer import data_dir, tokenize
from sd.tools.inspect import inspect_file
from tests.lora_files.cases import random
from tests.peers import ours_and_peers
from tests.training.tiny import SMALL

D = SMALL.clip.width


@pytest.fixture(scope="module")
def made():
    return ours_and_peers(SMALL)


@pytest.fixture
def models(made, tokenizer):
    return Models(copy.deepcopy(made[0]), SMALL, tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return new_models(SMALL).tokenizer


@pytest.fixture
def peer(made):
    """diffusers' pipeline of the same weights."""
    parts = {key: copy.deepcopy(network) for key, network in made[1].items()}
    tokenizer = CLIPTokenizer.from_pretrained(str(data_dir()), model_max_length=77)
    return StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=DDIMScheduler(), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)


def context(models, *prompts):
    with torch.no_grad():
        return models["clip"](tokenize(models.tokenizer, list(prompts), 77, models["clip"].words))


def theirs(peer, *prompts):
    with torch.no_grad():
        return peer.encode_prompt(list(prompts), "cpu", 1, False)[0]


# ---- files of every program ----------------------------------------------------------------------------------------------

ONE, TWO = random(1, D, seed=1), random(2, D, seed=2)
FORMS = {  # how it is saved -> (file name, content, the words that it holds)
    "A1111": ("easyneg.pt", {"string_to_token": {"*": 265}, "string_to_param": {"*": TWO}, "name": "other", "step": 7,
                          "sd_checkpoint": None, "sd_checkpoint_name": None}, {"easyneg": TWO}),
    "LDM": ("easyneg.pt", {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.nn.Parameter(ONE)}},
            {"easyneg": ONE}),
    "kohya": ("bad_v1.3.safetensors", {"emb_params": TWO}, {"bad_v1.3": TWO}),
    "ComfyUI": ("easyneg.safetensors", {"clip_l": TWO}, {"easyneg": TWO}),
    "diffusers": ("learned_embeds.safetensors", {"<toy>": ONE[0]}, {"<toy>": ONE}),
    "diffusers .bin": ("learned_embeds.bin", {"<toy>": TWO}, {"<toy>": TWO}),
    "several words": ("s.safetensors", {"<s0>": ONE[0], "<s1>": TWO[0]}, {"<s0>": ONE, "<s1>": TWO[:1]}),
    "a tensor": ("easyneg.pt", TWO, {"easyneg": TWO}),
    "LDM, first ones": ("old_style.pt", {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(TWO)})},
                        {"old_style": TWO}),
    "half": ("easyneg.safetensors", {"emb_params": TWO.half()}, {"easyneg": TWO.half().float()}),
}


def saved(folder, form):
    name, content, words = FORMS[form] if isinstance(form, str) else form
    save = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
    save(content, folder / name)
    return folder / name, words


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_any_program_gives_its_words(form, tmp_path, models):
    path, words = saved(tmp_path, form)
    assert load_embedding(models, path) == list(words)
    learned = models["clip"].learned
    assert list(learned.ids) == list(words) and all(torch.equal(learned.of(word), v) for word, v in words.items())
    if len(words) == 1:
        assert list(read_embeddings(path, "<mine>")) == ["<mine>"]


@pytest.mark.parametrize("form", ["A1111", "diffusers", "diffusers .bin"])
def test_prompts_with_learned_words_have_the_context_of_diffusers(form, tmp_path, models, peer):
    path, words = saved(tmp_path, form)
    (word,) = words
    peer.load_textual_inversion(str(path), token=word)
    load_embedding(models, path)
    prompts = [f"a photo of {word} in a box", f"({word}), {word}", "no such word", f"{word} " * 20]
    ours = context(models, *prompts)
    assert (ours - theirs(peer, *prompts)).abs().max() < 1e-5 * ours.abs().max()
    assert not torch.allclose(ours[0], context(models, "a photo of this in a box")[0], atol=1e-2)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.filterwarnings("ignore:.*a .pt file holds no metadata")
def test_diffusers_loads_what_is_saved_under_the_same_word(suffix, tmp_path, models, peer):
    models["clip"].learn({"<toy>": TWO})
    save_embedding(models, tmp_path / f"toy{suffix}")
    peer.load_textual_inversion(str(tmp_path), weight_name=f"toy{suffix}")
    ours = context(models, "a <toy> here")
    assert (ours - theirs(peer, "a <toy> here")).abs().max() < 1e-5 * ours.abs().max()
    plain = torch.load(tmp_path / "toy.pt", weights_only=True) if suffix == ".pt" else \
        safetensors.torch.load_file(tmp_path / "toy.safetensors")
    assert plain.keys() == {"<toy>"} and torch.equal(plain["<toy>"], TWO)  # one tensor, all that A1111 asks for
    if suffix == ".safetensors":
        assert read_tensors(tmp_path / "toy.safetensors").metadata["modelspec.trigger_phrase"] == "<toy>"


@pytest.mark.parametrize("form, message", [
    (("x.safetensors", {"clip_l": TWO, "clip_g": random(2, 1280)}, {}), "such as SDXL: it has vectors for clip_g"),
    (("x.safetensors", {"emb_params": random(2, 1024)}, {}), "width 1024, as for SD 2.x; this text encoder has 8"),
    (("x.safetensors", {"<x>": random(1, 768)}, {}), "width 768, as for SD 1.x"),
    (("x.safetensors", {"<x>": random(76, D)}, {}), "has 76 vectors; a prompt takes 75"),
    (("x.safetensors", {"<x>": random(2, D) / 0}, {}), "not finite"),
    (("x.safetensors", {"<x>": torch.ones(2, D, dtype=torch.long)}, {}), r"tensor \[2, 8\] of int64"),
    (("x.safetensors", {"<x>": random(1, 2, D)}, {}), "holds no learned word"),
    (("x.safetensors", {"<x>": random(0, D)}, {}), r"tensor \[0, 8\]"),
    (("cat.pt", {"string_to_param": {"*": TWO}}, {}), "'cat' cannot be a learned word: the vocabulary has it"),
    (("x.safetensors", {"<|endoftext|>": TWO}, {}), "the vocabulary has it"),
    (("x.safetensors", {"lora_unet_a.lora_down.weight": TWO, "lora_unet_a.lora_up.weight": ONE}, {}), "it seems to be a LoRA"),
    (("x.pt", {"string_to_param": {"*": TWO, "+": TWO}}, {}), "holds no learned word: its 2 tensors"),
    (("x.safetensors", {"<x>": TWO, "<X>": ONE}, {}), "is there already with other vectors"),
])
def test_what_is_no_embedding_for_this_model_is_refused_and_changes_nothing(form, message, tmp_path, models):
    models["clip"].learn({"<other>": ONE})
    path, _ = saved(tmp_path, form)
    with pytest.raises(EmbeddingError, match=message) as caught:
        load_embedding(models, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and list(models["clip"].words) == ["<other>"]


def test_files_that_are_no_tensors_or_hold_code_are_refused(tmp_path, models):
    class Code:
        def __reduce__(self):
            return print, ("this must not run",)

    torch.save({"string_to_param": {"*": TWO}, "x": Code()}, tmp_path / "code.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.pt").write_bytes(b"\x89PNG" + bytes(100))
    for name, message in (("code.pt", "refused, because its pickle asks for .*builtin.*print"), ("none.pt", "no such file"),
                          ("empty", "a folder without an embedding in it"), ("picture.pt", "a PNG picture")):
        with pytest.raises(CheckpointError, match=message):
            load_embedding(models, tmp_path / name)


def test_several_words_cannot_all_have_one_name_and_a_word_can_be_renamed(tmp_path, models):
    path, _ = saved(tmp_path, "several words")
    with pytest.raises(EmbeddingError, match="holds 2 words, '<s0>', '<s1>'; they cannot all be 'me'"):
        load_embedding(models, path, "me")
    path, _ = saved(tmp_path, "kohya")
    assert load_embedding(models, path, "<s0><s1>") == ["<s0><s1>"]
    both = context(models, "a <s0><s1>")
    remove_embedding(models, "<s0><s1>")
    models["clip"].learn({"<s0>": TWO[0], "<s1>": TWO[1]})  # two words side by side are one word of two vectors
    assert torch.equal(context(models, "a <s0><s1>"), both)


def test_a_folder_of_diffusers_is_read(tmp_path, models):
    saved(tmp_path, "diffusers")
    assert load_embedding(models, tmp_path) == ["<toy>"]


# ---- the text encoder ------------------------------------------------------------------------------------------------------

def test_without_learned_words_the_text_encoder_has_the_keys_and_bits_of_before(models):
    keys, plain = list(models["clip"].state_dict()), context(models, "a photo of a cat", "")
    counts = count_parameters(models)
    assert not any("learned" in key for key in keys)
    models["clip"].learn({"<toy>": TWO, "x.y/z": ONE})
    assert count_parameters(models) == counts
    assert torch.equal(context(models, "a photo of a cat", ""), plain)
    table = models["clip"].state_dict()["token_embedding.weight"].clone()
    context(models, "a <toy>")
    remove_embedding(models, "<TOY>")
    remove_embedding(models, "x.y/z")
    assert list(models["clip"].state_dict()) == keys and torch.equal(models["clip"].token_embedding.weight, table)
    assert torch.equal(context(models, "a photo of a cat", ""), plain)


def test_a_word_with_the_rows_of_other_tokens_is_those_tokens(models):
    rows = models["clip"].token_embedding.weight[models.tokenizer("a red cat", add_special_tokens=False)["input_ids"]]
    models["clip"].learn({"<first>": ONE, "<it>": rows})
    assert torch.equal(context(models, "<it> sleeps, <IT>."), context(models, "a red cat sleeps, a red cat."))


@pytest.mark.parametrize("word", ["a.b/c", "keys", "training", "日本", "two  words", "100%", "_x", "forward", "e\u0301toile"])
def test_words_may_be_any_text(word, models):
    models["clip"].learn({f"<{word}>": ONE, f"{word}*": TWO})
    again = copy.deepcopy(models["clip"])
    assert again.words == models["clip"].words == {again.learned.find(f"<{word}>"): range(49408, 49409),
                                                   again.learned.find(f"{word}*"): range(49409, 49411)}
    assert torch.equal(again.learned.of(f"{word}*"), TWO) and not {"/", "."} & set(word_key(word))
    rows = tokenize(models.tokenizer, [f"x {word}* y <{word}>"], 77, again.words)
    assert [i for i in rows[0].tolist() if i >= 49408] == [49409, 49410, 49408]


@pytest.mark.parametrize("word", ["get_name", "keys_x", "_call__"])  # with a "_" before it, two are attributes of every module
def test_a_word_may_be_called_like_an_attribute(word, models):
    models["clip"].learn({word: ONE})
    assert list(models["clip"].words) == [word] and torch.equal(models["clip"].learned.of(word), ONE)


def test_a_word_is_known_once(models):
    clip = models["clip"]
    assert clip.learn({"<toy>": TWO}) == ["<toy>"] and clip.learn({"<Toy>": TWO}) == []
    with pytest.raises(EmbeddingError, match="'<TOY>' is there already with other vectors; .* remove_embedding"):
        clip.learn({"<new>": ONE, "<TOY>": ONE})
    assert list(clip.words) == ["<toy>"]  # all or none
    for call in (lambda: remove_embedding(models, "<b>"), lambda: save_embedding(models, "x.safetensors", "<b>")):
        with pytest.raises(EmbeddingError, match="'<b>' is not loaded; loaded: '<toy>'"):
            call()
    clip.learn({"<b>": ONE})
    with pytest.raises(EmbeddingError, match="name the word to save; loaded: '<toy>', '<b>'"):
        save_embedding(models, "x.safetensors")
    with pytest.raises(EmbeddingError, match=r"\.safetensors or \.pt"):
        save_embedding(models, "x.bin", "<b>")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_stay_fp32_beside_half_weights(dtype, models):
    clip = models["clip"].to(dtype)
    clip.learn({"<toy>": TWO})
    tokens = torch.tensor([[49406, 49409, 49408, 49407]])
    assert clip.learned.of("<toy>").dtype == torch.float32 and clip(tokens).dtype == dtype
    assert torch.equal(clip.embed(tokens)[0, 1:3], TWO.flip(0).to(dtype))


def test_a_lora_on_the_token_embedding_leaves_learned_words_alone(models):
    clip = models["clip"]
    clip.learn({"<toy>": TWO})
    tokens = torch.tensor([[49406, 5, 49408, 49409]])
    plain = clip.embed(tokens)
    apply_lora_to_model(clip, rank=2, alpha=3.0, target_modules="token_embedding")
    for p in clip.token_embedding.adapters.parameters():
        p.data = random(*p.shape)
    changed = clip.embed(tokens)
    assert torch.equal(changed[0, 2:], TWO) and not torch.isclose(changed[0, :2], plain[0, :2]).all(-1).any()


def test_gradients_reach_the_vectors_as_they_reach_rows_of_a_resized_table(models, peer, tmp_path):
    models["clip"].learn({"<toy>": TWO})
    path, _ = saved(tmp_path, "diffusers .bin")
    peer.load_textual_inversion(str(path))
    table = peer.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    ids = tokenize(models.tokenizer, ["a <toy> and <toy>", "none"], 77, models["clip"].words)
    vectors = models["clip"].learned.of("<toy>").requires_grad_(True)
    weight = random(2, 77, D, seed=5)
    (models["clip"](ids) * weight).sum().backward()
    (peer.text_encoder(ids)[0] * weight).sum().backward()
    assert torch.allclose(vectors.grad, table.grad[49408:], rtol=1e-4, atol=1e-5 * table.grad.abs().max())


# ---- pictures --------------------------------------------------------------------------------------------------------------

def test_pictures_say_which_words_made_them(models):
    models["clip"].learn({"<toy>": TWO, "<bad>": ONE, "<idle>": ONE + 1})
    about = describe(models, "a <TOY>", seed=1, uncond_prompt="<bad>")
    assert about["embeddings"].keys() == {"<toy>", "<bad>"} and len(set(about["embeddings"].values())) == 2
    assert "embeddings" not in describe(models, "a toy", seed=1)
    how = dict(models=models, seed=1, n_inference_steps=2, width=16, height=16)
    picture = generate("a <toy>", "<bad>", **how)
    models["clip"].learned.forget("<bad>")
    assert not np.array_equal(generate("a <toy>", "<bad>", **how), picture)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(new_models(SMALL), "m.safetensors")
    saved(tmp_path, "kohya")
    saved(tmp_path, "diffusers")
    safetensors.torch.save_file({"<toy>": TWO[0]}, "other.safetensors")

    def command(*words):
        status = main([*words, "--model", "m.safetensors"])
        return status, capsys.readouterr().err
    return command


def test_the_command_line_loads_embeddings_and_makes_pictures_again_with_the_same_ones(run, tmp_path):
    words = ("--embedding", "bad_v1.3.safetensors", "learned_embeds.safetensors:<toy>")
    assert run("generate", "a <toy>", "--negative", "bad_v1.3, x", "--steps", "2", "--out", "a.png", *words)[0] == 0
    assert read_parameters("a.png")["embeddings"].keys() == {"<toy>", "bad_v1.3"}
    assert run("generate", "--again", "a.png", "--out", "b.png", *words)[0] == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    other = (*words[:2], "other.safetensors")
    for given in ((), words[:2], other):
        status, err = run("generate", "--again", "a.png", "--out", "b.png", *given)
        assert status == 2 and "made with the embeddings {'<toy>': " in err and "name them with --embedding" in err
    run("generate", "a <toy>", "--steps", "2", "--out", "plain.png")  # without the word it is plain text
    status, err = run("generate", "--again", "plain.png", "--out", "b.png", *words)
    assert status == 2 and "made with the embeddings none" in err
    status, err = run("generate", "a", "--embedding", "nowhere.pt:x")
    assert status == 2 and err == "error: nowhere.pt:x: no such file\n"
    status, err = run("generate", "a", "--embedding", "m.safetensors")
    assert status == 2 and "holds no learned word" in err


# ---- words beside a LoRA ---------------------------------------------------------------------------------------------------

Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
LORA = {f"{Q}.lora_down.weight": random(2, D), f"{Q}.lora_up.weight": random(D, 2), f"{Q}.alpha": torch.tensor(1.0)}
BUNDLES = {
    "A1111": ({"bundle_emb.bad_v1.3.string_to_param.*": TWO, "bundle_emb.bad_v1.3.string_to_token.*": torch.tensor(265)},
              {"bad_v1.3": TWO}),
    "OneTrainer": ({"bundle_emb.<toy>.clip_l": TWO, "bundle_emb.<b>.clip_l": ONE}, {"<toy>": TWO, "<b>": ONE}),
    "emb_params": ({"bundle_emb.a.b.emb_params": ONE[0]}, {"a.b": ONE[0]}),
    "any name": ({"bundle_emb.mytoy.vec": ONE}, {"mytoy": ONE}),
}


@pytest.mark.parametrize("form", BUNDLES)
def test_words_bundled_with_a_lora_are_read_whole(form, models):
    bundle, words = BUNDLES[form]
    found = read_lora(LORA | bundle, modules_of(models), words=True)
    assert found.words.keys() == words.keys() and all(torch.equal(found.words[w], v) for w, v in words.items())
    assert found.tensors == len(LORA | bundle) and list(found.state) == ["clip.layers.0.attention.q_proj"]


def test_words_beside_a_lora_are_refused_where_there_is_no_place_for_them_and_can_be_skipped(models):
    bundle = LORA | BUNDLES["A1111"][0]
    with pytest.raises(LoRAFormatError, match=r"learned word 'bad_v1\.3', .* skip='\^bad_v1"):
        read_lora(bundle, modules_of(models))
    found = read_lora(bundle, modules_of(models), skip=r"^bad_v1\.3")
    assert not found.words and len(found.skipped) == 2 and found.tensors == 3


@pytest.mark.parametrize("bundle, message", [
    ({"bundle_emb.x.clip_l": ONE, "bundle_emb.x.clip_g": random(1, 1280)}, "'x' is for a model with several text encoders"),
    ({"bundle_emb.x.a": ONE, "bundle_emb.x.b": ONE}, "the learned word 'x' has 2 tensors: a, b"),
    ({"bundle_emb.x": ONE}, "1 of 4 tensors are not understood, first: 'bundle_emb.x'"),
])
def test_bundles_that_are_no_words_are_refused(bundle, message, models):
    with pytest.raises(LoRAFormatError, match=message):
        read_lora(LORA | bundle, modules_of(models), words=True)


def test_a_folder_of_diffusers_script_holds_a_lora_and_its_words(models, tmp_path):
    lora = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": LORA[f"{Q}.lora_down.weight"],
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": LORA[f"{Q}.lora_up.weight"]}
    safetensors.torch.save_file(lora, tmp_path / "pytorch_lora_weights.safetensors")
    safetensors.torch.save_file({"clip_l": TWO}, tmp_path / "mine_emb.safetensors")
    found = read_lora(tmp_path, modules_of(models), words=True)
    assert len(found.state) == 1 and found.words.keys() == {"mine_emb"} and torch.equal(found.words["mine_emb"], TWO)


@pytest.mark.parametrize("form", BUNDLES)
def test_a_lora_brings_its_words_for_prompts(form, models, tmp_path):
    bundle, words = BUNDLES[form]
    plain = context(models, "a cat")
    safetensors.torch.save_file(LORA | bundle, tmp_path / "style.safetensors")
    load_lora_into_models(models, tmp_path / "style.safetensors")
    report, learned = models.lora_reports["style"], models["clip"].learned
    assert sorted(report.words) == sorted(words) and f"learned words: {', '.join(report.words)}" in str(report)
    assert all(torch.equal(learned.of(word), vectors.reshape(-1, D)) for word, vectors in words.items())
    assert report.tensors == len(LORA | bundle) and not torch.equal(context(models, "a cat"), plain)
    load_lora_into_models(models, tmp_path / "style.safetensors")  # again: the same words
    remove_lora(models)
    assert set(learned.ids) == set(words) and torch.equal(context(models, "a cat"), plain)


@pytest.mark.parametrize("bundle, message", [
    ({"bundle_emb.<x>.clip_l": random(1, 768)},
     "style.safetensors: the word '<x>' has vectors of width 768, .*leave a word out with skip"),
    ({"bundle_emb.<toy>.clip_l": ONE}, "'<toy>' is there already"),
    ({"bundle_emb.cat.clip_l": ONE}, "'cat' cannot be a learned word"),
    ({"bundle_emb.<x>.clip_l": ONE, "lora_te_y.diff": TWO}, "lora_te_y"),
    ({"bundle_emb.<x>.clip_l": ONE, f"{Q}.lora_down.weight": random(2, 9)}, "do not fit this model"),
])
def test_a_lora_whose_words_do_not_fit_changes_nothing(bundle, message, models, tmp_path):
    models["clip"].learn({"<toy>": TWO})
    safetensors.torch.save_file(LORA | bundle, tmp_path / "style.safetensors")
    with pytest.raises(LoRAFormatError, match=message):
        load_lora_into_models(models, tmp_path / "style.safetensors")
    assert list(models["clip"].words) == ["<toy>"] and not adapter_names(models)


def test_words_of_a_lora_can_be_skipped_and_have_no_place_in_a_unet_alone(models):
    bundle = LORA | BUNDLES["OneTrainer"][0]
    report = load_lora_weights(models, bundle, skip="^<toy>$")
    assert report.words == ["<b>"] and report.skipped == ["bundle_emb.<toy>.clip_l"]
    with pytest.raises(LoRAFormatError, match="learned word '<toy>', .* no place here"):
        load_lora_weights(models["diffusion"], bundle, skip="lora_te")


def test_words_of_cloneofsimos_files_are_used(models, tmp_path):
    pairs = {f"text_encoder:{i}:up": random(D, 2) for i in range(4)}
    pairs |= {f"text_encoder:{i}:down": random(2, D) for i in range(4)}
    safetensors.torch.save_file(pairs | {"<s1>": TWO[0], "<s2>": TWO[1]}, tmp_path / "x.safetensors",
                                {"<s1>": "<embed>", "<s2>": "<embed>", "text_encoder": '["CLIPAttention"]'})
    load_lora_into_models(models, tmp_path / "x.safetensors")
    assert models.lora_reports["x"].words == ["<s1>", "<s2>"]
    assert torch.equal(models["clip"].learned.of("<s2>"), TWO[1:])


def test_a_merge_into_a_checkpoint_does_not_lose_words_in_silence(models, tmp_path):
    save_checkpoint(models, tmp_path / "m.safetensors")
    safetensors.torch.save_file(LORA | BUNDLES["OneTrainer"][0], tmp_path / "style.safetensors")
    merge = partial(merge_lora_into_checkpoint, tmp_path / "m.safetensors", {tmp_path / "style.safetensors": 1.0},
                    tmp_path / "out.safetensors")
    with pytest.raises(EmbeddingError, match="learned words '<b>', '<toy>', which no plain checkpoint holds"):
        merge()
    assert not (tmp_path / "out.safetensors").exists()
    merge(skip="bundle_emb")


def test_inspect_tells_words_of_embeddings_and_of_loras(models, tmp_path):
    path, _ = saved(tmp_path, "several words")
    facts = inspect_file(path)
    assert facts["kind"] == "embedding" and facts["words"] == dict.fromkeys(("<s0>", "<s1>"), f"1 vectors of width {D}")
    save_checkpoint(models, tmp_path / "m.safetensors")
    safetensors.torch.save_file(LORA | BUNDLES["A1111"][0], tmp_path / "style.safetensors")
    facts = inspect_file(tmp_path / "style.safetensors", tmp_path / "m.safetensors")
    assert facts["kind"] == "LoRA" and facts["learned words"] == {"bad_v1.3": f"2 vectors of width {D}"}
    assert inspect_file(tmp_path / "m.safetensors")["kind"] == "checkpoint"
