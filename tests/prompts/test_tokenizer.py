"""Token ids, against transformers' own calls and the ids that CLIP is known for."""

import copy
import hashlib
import json
import operator
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from sd.prompts.tokenizer import data_dir, find_words, load_tokenizer, tokenize, tokens_of, vocabulary
from tests.prompts.texts import texts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def reference():
    return CLIPTokenizer.from_pretrained(str(data_dir()), model_max_length=77, local_files_only=True)


def test_the_vocabulary_is_that_of_clip():
    vocab = json.loads((data_dir() / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocab) == 49408 and sorted(vocab.values()) == list(range(49408))
    assert vocab["<|startoftext|>"] == 49406 and vocab["<|endoftext|>"] == 49407 and vocab["cat</w>"] == 2368
    assert hashlib.sha256((data_dir() / "merges.txt").read_bytes()).hexdigest() == \
        "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def test_a_photo_of_a_cat_has_the_ids_of_clip(tokenizer):
    ids = tokenize(tokenizer, ["a photo of a cat"], 77)
    assert ids.dtype == torch.long and ids.tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407] + [49407] * 70]


def test_ids_and_offsets_are_those_of_transformers(tokenizer, reference):
    """3,000 of the texts; 100,000 were compared once."""
    for text in texts(3000):
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        ours, theirs = tokenizer(text, **options), reference(text, **options, verbose=False)
        assert ours["input_ids"] == theirs["input_ids"] and ours["offset_mapping"] == theirs["offset_mapping"], text


@pytest.mark.parametrize("options", [
    {}, {"return_offsets_mapping": True}, {"truncation": True}, {"truncation": True, "max_length": 5}, {"padding": True},
    {"padding": "max_length", "max_length": 20, "truncation": True, "return_tensors": "pt", "return_offsets_mapping": True},
    {"add_special_tokens": False, "padding": "max_length", "truncation": True, "max_length": 3}], ids=str)
def test_a_call_returns_what_that_of_transformers_does(tokenizer, reference, options):
    cases = [["a red cat", "", "it's <|endoftext|>", "7 " * 99]]
    if "padding" not in options or "max_length" in options:
        cases += cases[0]
    for case in cases:
        ours, theirs = tokenizer(case, **options), reference(case, **options)
        assert ours.keys() == theirs.keys()
        for name in ours:
            same = torch.equal if "return_tensors" in options else operator.eq
            assert same(ours[name], theirs[name]) and same(getattr(ours, name), theirs[name])


def test_texts_come_back_from_ids_as_with_transformers(tokenizer, reference):
    for text in texts(300, seed=1):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text) and tokenizer.tokenize(text) == reference.tokenize(text)
        assert tokenizer.convert_ids_to_tokens(ids) == reference.convert_ids_to_tokens(ids)
        for skipped in (False, True):
            assert tokenizer.decode(ids, skipped) == reference.decode(ids, skip_special_tokens=skipped)
    assert tokenizer.convert_tokens_to_ids(["cat</w>", "nothing"]) == reference.convert_tokens_to_ids(["cat</w>", "nothing"])
    for fact in ("bos", "eos", "pad", "unk"):
        for name in (f"{fact}_token", f"{fact}_token_id"):
            assert getattr(tokenizer, name) == getattr(reference, name)
    assert (len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length) == (len(reference), reference.vocab_size, 77)


def test_a_copied_and_a_pickled_tokenizer_are_as_good(tokenizer):
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other("a red cat") == tokenizer("a red cat")
    assert copy.deepcopy(tokenizer("a")).input_ids == tokenizer("a").input_ids


def test_a_folder_is_read_with_all_that_transformers_saved_in_it(tokenizer, tmp_path):
    for kept in (["tokenizer_config.json"], ["tokenizer.json"], ["tokenizer_config.json", "tokenizer.json"]):
        folder = tmp_path / "-".join(kept)
        theirs = CLIPTokenizer.from_pretrained(str(data_dir()), pad_token="!", model_max_length=77)  # as in SD 2.x
        theirs.add_tokens(["<toy>"])
        theirs.save_pretrained(folder)
        for name in {file.name for file in folder.iterdir()} - set(kept):
            (folder / name).unlink()
        for name in ("vocab.json", "merges.txt"):
            (folder / name).write_bytes((data_dir() / name).read_bytes())
        theirs, ours = CLIPTokenizer.from_pretrained(str(folder), model_max_length=77), load_tokenizer(folder)
        expected = theirs(["a <toy>!"], padding="max_length", return_tensors="pt").input_ids
        assert torch.equal(tokenize(ours, ["a <toy>!"], 77), expected)
        assert not torch.equal(tokenize(tokenizer, ["a <toy>!"], 77), expected)


def test_ids_are_those_of_a_padded_and_truncated_call_of_transformers(tokenizer, reference):
    prompts = ["", "a", "Ünïcode  и 日本語 🙂🙂", "it's (masterpiece:1.2), <lora:x:0.8>\n\ttwo",
               "<|endoftext|> in the middle", "7 " * 75, "7 " * 76, "word " * 300, "\u200b\u0301", "x" * 10_000]
    for max_tokens in (77, 16, 2):
        expected = reference(prompts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for given in (tokenizer, reference):  # a user may pass one of transformers'
                assert torch.equal(tokenize(given, prompts, max_tokens), expected.input_ids)


def test_what_was_cut_from_a_long_prompt_is_shown_once(tokenizer):
    with pytest.warns(UserWarning) as caught:
        ids = tokenize(tokenizer, ["cat " * 75 + "DOG  and Mouse", "short"], 77)
    assert len(caught) == 1 and "has 78 tokens, the model takes 75; cut: 'DOG  and Mouse'" in str(caught[0].message)
    assert ids[0].tolist() == [49406] + [2368] * 75 + [49407] and ids.shape == (2, 77)
    with pytest.warns(UserWarning) as caught:
        tokenize(tokenizer, ["cat " * 10_000], 77)
    assert len(str(caught[0].message)) < 400


def test_a_prompt_that_just_fits_is_not_warned_about(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenize(tokenizer, ["cat " * 75, ""], 77)[0, 75:].tolist() == [2368, 49407]


@pytest.mark.parametrize("prompt", ["a " * 5000, "a" * 10_000, "é日🙂" * 3334, "\n" * 10_000, "'" * 10_000])
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_prompt_of_10000_characters_is_quick(tokenizer, prompt):
    start = time.perf_counter()
    assert tokenize(tokenizer, [prompt], 77).shape == (1, 77)
    assert time.perf_counter() - start < 1


WORDS = {"<toy>": range(49408, 49410), "mystyle": [49410], "<s0><s1>": [49411], "v1.3 fix": [49412]}


@pytest.mark.parametrize("prompt", [
    "a <toy> in a box", "<toy>", "(<toy>:1.2), mystyle!", "<toy><toy>mystyle", "A <TOY> and MyStyle", "é<toy>🙂",
    "mystyle's\n<toy>", "x <s0><s1>y", "a <toy>\u0301", "V1.3 Fix, v1.3", "", "no word of these", "<toy> " * 40])
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_learned_words_have_the_ids_of_added_tokens_in_transformers(tokenizer, prompt):
    reference = CLIPTokenizer.from_pretrained(str(ROOT / "data"), model_max_length=77)
    reference.add_tokens(["<toy>", "<toy>_1", "mystyle", "<s0><s1>", "v1.3 fix"])
    several = prompt.replace("<toy>", "<toy> <toy>_1").replace("<TOY>", "<toy> <toy>_1")  # as diffusers writes two vectors
    expected = reference([several], padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tokenize(tokenizer, [prompt], 77, WORDS), expected)


def test_learned_words_are_found_whole_the_longest_first_and_in_any_spelling_of_unicode():
    words = dict.fromkeys(["toy", "toy box", "caf\u00e9", "<x>"])
    found = find_words("toys my_toy toy, (TOY:1.1) toy-box a toy\n box", words)
    assert [word for *_, word in found] == ["toy", "toy", "toy", "toy box"]
    assert [word for *_, word in find_words("cafe\u0301 CAF\u00c9 cafe a<x>b", words)] == ["caf\u00e9", "caf\u00e9", "<x>"]
    assert find_words("toy", {}) == []


def test_a_word_of_which_not_all_fits_is_shown_as_cut(tokenizer):
    with pytest.warns(UserWarning, match="has 77 tokens, the model takes 75; cut: '<toy> and'"):
        ids = tokenize(tokenizer, ["cat " * 74 + "<toy> and"], 77, WORDS)
    assert ids[0, 74:].tolist() == [2368, 49408, 49407]


@pytest.mark.parametrize("prompt", ["a <toy> in a box, mystyle", "é日🙂 <TOY>\n x"])
def test_each_token_knows_where_it_begins_in_the_text(tokenizer, prompt):
    ids, starts = tokens_of(tokenizer, prompt, WORDS)
    assert len(ids) == len(starts) and starts == sorted(starts) and starts[0] == 0
    for word, own in WORDS.items():
        places = {start for i, start in zip(ids, starts) if i in own}
        assert all(prompt[start:].lower().startswith(word) for start in places)


def test_the_vocabulary_is_what_the_tokenizer_has(tokenizer):
    assert vocabulary() == tokenizer.get_vocab().keys()


@pytest.mark.parametrize("prompts", ["a cat", [None], ["a", 7], [b"a"], [["a"]]])
def test_anything_but_a_list_of_strings_is_a_type_error_that_shows_it(tokenizer, prompts):
    with pytest.raises(TypeError, match="must be a list of strings"):
        tokenize(tokenizer, prompts, 77)


def test_impossible_lengths_folders_and_characters_are_errors(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="max_tokens is 1"):
        tokenize(tokenizer, ["a"], 1)
    with pytest.raises(FileNotFoundError, match="it has no vocab.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="surrogate"):
        tokenize(tokenizer, ["a \ud800 b"], 77)
    assert tokenize(tokenizer, [], 77).shape == (0, 77)


def test_loading_uses_no_network_and_importing_is_quick():
    code = """if 1:
        import socket, sys
        def refuse(*args, **kwargs):
            raise AssertionError("network")
        socket.socket.connect = socket.getaddrinfo = refuse
        import sd.files.tensors, sd.pictures
        from sd.prompts.tokenizer import load_tokenizer, tokenize
        tokenizer = load_tokenizer()
        print(tokenize(tokenizer, ["cat"], 4).tolist())
        assert not {"transformers", "diffusers", "matplotlib"} & set(sys.modules)
        import warnings
        warnings.simplefilter("ignore")
        tokenize(tokenizer, ["cat " * 100], 77)  # our warning is the only one
    """
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[[49406, 2368, 49407, 49407]]\n", "")
