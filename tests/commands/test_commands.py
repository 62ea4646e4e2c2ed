"""The command line: what it makes, and how it answers mistakes."""

import json
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd.commands.args import FLAGS, PictureFlags
from sd.commands.main import COMMANDS, main
from sd.commands.parse import parse, sentence_in
from sd.config import TINY
from sd.errors import NotFiniteError, SDError
from sd.lora import apply_lora_to_model, get_lora_parameters
from sd.model_loader import new_models, preload_models_from_standard_weights, save_checkpoint, save_models_lora
from sd.pictures.image_io import read_parameters, save_image
from sd.pipeline import generate
from sd.prompts.tokenizer import data_dir
from sd.sampling.samplers import SAMPLERS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and two LoRAs for it, in one folder."""
    folder = tmp_path_factory.mktemp("files")
    models = new_models(TINY)
    save_checkpoint(models, folder / "tiny.safetensors")
    for i, name in enumerate(("ink", "wash")):
        apply_lora_to_model(models["diffusion"], rank=2 + i, alpha=3.0, name=name)
        for p in get_lora_parameters(models, name):
            p.data.normal_(generator=torch.Generator().manual_seed(i))
        save_models_lora(models, folder / f"{name}.safetensors", name)
    return folder


@pytest.fixture
def run(files, tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*words):
        words = [str(w).replace("@", str(files) + "/") for w in words]
        try:
            status = main(words)
        except SystemExit as stop:  # argparse's own way out, for --help and for unknown flags
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return command


MODEL = ("--model", "@tiny.safetensors", "--steps", "2")


def test_generate_writes_what_the_function_returns_with_its_parameters(run, files):
    status, out, _ = run("generate", "a cat", "a dog", *MODEL, "--seed", "5", "--count", "2", "--out", "here",
                         "--lora", "@ink.safetensors:0.5")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == [f"here/000{i}.png" for i in (1, 2, 3, 4)]
    about = read_parameters("here/0003.png")
    assert (about["prompt"], about["seed"], about["lora"]) == ("a dog", 7, {"ink": 0.5})
    assert about["model_hash"] and set(about["lora_hashes"]) == {"ink"}
    models = preload_models_from_standard_weights(files / "tiny.safetensors", "cpu")
    expected = generate(["a cat", "a dog"], models=models, seed=5, images_per_prompt=2, n_inference_steps=2,
                        sampler_name="dpmpp_2m", use_lora=False)
    run("generate", "a cat", "a dog", *MODEL, "--seed", "5", "--count", "2", "--out", "here", "--lora",
        "@ink.safetensors:0.5", "--no-lora")
    assert np.array_equal(np.asarray(Image.open("here/0007.png")), expected[2])
    assert "lora" not in read_parameters("here/0007.png")


def test_a_picture_is_made_again_from_what_it_says(run):
    lora = ("--lora", "@ink.safetensors:0.5", "@wash.safetensors:-0.25")
    assert run("generate", 'a "cat",\n: ü', *MODEL, "--negative", "x, y: z", "--seed", "3", *lora, "--out", "one.png",
               "--sampler", "euler_a", "--cfg", "3.5", "--width", "72")[0] == 0
    assert run("generate", "--again", "one.png", "--model", "@tiny.safetensors", *lora, "--out", "two.png")[0] == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()
    status, _, err = run("generate", "--again", "one.png", "--model", "@tiny.safetensors", "--out", "two.png")
    assert status == 2 and "made with the LoRA 'ink'; load it with --lora" in err


def test_a_picture_is_not_made_again_with_another_lora_of_that_name(run, files):
    assert run("generate", "x", *MODEL, "--lora", "@ink.safetensors", "--out", "one.png")[0] == 0
    Path("ink.safetensors").write_bytes((files / "wash.safetensors").read_bytes())
    status, _, err = run("generate", "--again", "one.png", "--model", "@tiny.safetensors", "--lora", "./ink.safetensors")
    assert status == 2 and "made with another LoRA 'ink', of hash" in err
    assert run("compare", "a cat", *MODEL, "--lora", "@ink.safetensors", "--out", "sheet.png")[0] == 0
    status, _, err = run("generate", "--again", "sheet.png", "--model", "@tiny.safetensors")
    assert status == 2 and "cannot be made again" in err


def test_compare_merge_and_inspect(run, files):
    assert run("compare", "a cat", *MODEL, "--lora", "@ink.safetensors", "@wash.safetensors", "--out", "sheet.png")[0] == 0
    assert Image.open("sheet.png").size[0] > 4 * 64
    assert run("merge", "new/merged.safetensors", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors:0.5")[0] == 0
    assert run("generate", "a cat", "--model", "new/merged.safetensors", "--steps", "2", "--seed", "1",
               "--out", "a.png")[0] == 0
    assert run("generate", "a cat", *MODEL, "--lora", "@ink.safetensors:0.5", "--seed", "1", "--out", "b.png")[0] == 0
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    for path, kind in (("@ink.safetensors", "LoRA"), ("@tiny.safetensors", "checkpoint"), ("a.png", "picture")):
        status, out, _ = run("inspect", path, "--json")
        (facts,) = json.loads(out).values()
        assert status == 0 and facts["kind"] == kind
        if kind == "LoRA":
            assert facts["ranks"] == {"2": 80} and facts["alphas"] == {"3": 80} and facts["modules"] == {"unet": 80}
    assert run("merge", "folder", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors")[0] == 0
    assert run("inspect", "folder")[1].startswith("folder: diffusers folder\n")


def pictures(run, *words):
    """The picture of a command line, as an array."""
    status, _, err = run("generate", "a cat", *MODEL, "--seed", "4", "--out", "p.png", *words)
    assert status == 0, err
    return np.asarray(Image.open("p.png")).astype(int)


def test_block_weights_and_skip_on_the_command_line(run):
    plain, whole = pictures(run), pictures(run, "--lora", "@ink.safetensors:1.5")
    part = pictures(run, "--lora", "@ink.safetensors:1.5:mid_block=0,up_blocks.1=0.5")
    assert np.abs(whole - plain).max() > 8 and np.abs(part - whole).max() > 2 and np.abs(part - plain).max() > 2
    about = read_parameters("p.png")
    assert about["lora"] == {"ink": 1.5} and about["lora_blocks"] == {"ink": {"mid_block": 0.0, "up_blocks.1": 0.5}}
    again = ("generate", "--again", "p.png", "--model", "@tiny.safetensors", "--out", "q.png", "--lora")
    status, _, err = run(*again, "@ink.safetensors:1.5")
    assert status == 2 and "made with blocks" in err
    assert run(*again, "@ink.safetensors:1.5:mid_block=0,up_blocks.1=0.5")[0] == 0
    assert Path("p.png").read_bytes() == Path("q.png").read_bytes()
    assert np.array_equal(pictures(run, "--lora", "@ink.safetensors:1.5:unet=0"), plain)
    skipped = pictures(run, "--lora", "@ink.safetensors:1.5", "--skip", "up_blocks")
    assert np.array_equal(skipped, pictures(run, "--lora", "@ink.safetensors:1.5:up_blocks.0=0,up_blocks.1=0,up_blocks.2=0"
                                                                         ",up_blocks.3=0"))
    status, _, err = run("generate", "x", *MODEL, "--lora", "@ink.safetensors:1:1,2,3")
    assert status == 2 and "a list of 3 block weights" in err


def near(a, b, plain) -> bool:
    """Equal but for what random networks make of the last bits: a small part of what the LoRA does."""
    assert np.abs(b - plain).mean() > 2
    return np.abs(a - b).mean() < 0.1 * np.abs(b - plain).mean()


def test_several_loras_become_one_that_does_what_they_do_together(run):
    both = ("--lora", "@ink.safetensors:0.2", "@wash.safetensors:-0.1")
    expected, plain = pictures(run, *both), pictures(run)
    assert run("merge", "one.safetensors", "--into", "lora", *both)[0] == 0
    assert near(pictures(run, "--lora", "one.safetensors"), expected, plain)
    status, out, _ = run("merge", "two.safetensors", "--into", "lora", *both, "--method", "svd", "--rank", "5")
    assert status == 0 and "rank 5, relative error 0" in out
    assert near(pictures(run, "--lora", "two.safetensors"), expected, plain)
    assert run("merge", "three.safetensors", "--into", "lora", *both, "--method", "ties", "--rank", "3")[0] == 0
    (facts,) = json.loads(run("inspect", "three.safetensors", "--json")[1]).values()
    assert facts["ranks"] == {"3": 80} and json.loads(facts["metadata"]["sdlora.merged"])["method"] == "ties"


@pytest.mark.parametrize("kind", ["kohya", "diffusers", "comfyui", "peft"])
def test_a_converted_lora_makes_the_same_picture(run, kind):
    out = "made" if kind == "peft" else "made.safetensors"
    assert run("convert", "@ink.safetensors", out, "--format", kind)[0] == 0
    assert np.array_equal(pictures(run, "--lora", f"{out}:1.5"), pictures(run, "--lora", "@ink.safetensors:1.5"))
    status, text, _ = run("inspect", out, "--verify", "--model", "@tiny.safetensors")
    assert status == 0 and "every tensor fits" in text and "of the weights" in text


def test_a_lora_is_extracted_resized_embedded_and_taken_out(run):
    assert run("merge", "tuned.safetensors", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors:0.2")[0] == 0
    status, out, _ = run("extract", "got.safetensors", "--model", "@tiny.safetensors", "--tuned", "tuned.safetensors",
                         "--rank", "2")
    assert status == 0 and "80 modules, rank 2, relative error" in out
    assert near(pictures(run, "--lora", "got.safetensors"), pictures(run, "--lora", "@ink.safetensors:0.2"), pictures(run))
    status, out, _ = run("resize", "@wash.safetensors", "small.safetensors", "--rank", "1")
    assert status == 0 and "rank 1, relative error" in out
    assert run("embed", "all.safetensors", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors:0.5",
               "@wash.safetensors")[0] == 0
    status, out, _ = run("inspect", "all.safetensors")
    assert status == 0 and "all.safetensors: checkpoint" in out and "ink" in out and "wash" in out
    assert run("extract", "taken", "--model", "all.safetensors")[0] == 0
    for name in ("ink", "wash"):
        taken = pictures(run, "--lora", f"taken/{name}.safetensors")
        assert np.array_equal(taken, pictures(run, "--lora", f"@{name}.safetensors"))


def broken(kind: str, files: Path) -> Path:
    path = Path(f"{kind}.safetensors")
    good = (files / "tiny.safetensors").read_bytes()
    content = {"truncated": good[: len(good) // 2], "empty": b"", "text": b"hello world\n" * 9,
               "page": b"<!doctype html><html>", "lfs": b"version https://git-lfs.github.com/spec/v1\n"}
    path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize("kind, sentence", [("truncated", "truncated safetensors file"), ("empty", "is empty"),
                                            ("text", "a text file"), ("page", "a web page"), ("lfs", "git-lfs pointer")])
@pytest.mark.parametrize("flag", ["--model", "--lora"])
def test_a_damaged_file_is_one_sentence(run, files, kind, sentence, flag):
    other = () if flag == "--model" else MODEL
    status, out, err = run("generate", "x", flag, broken(kind, files), *other)
    assert status == 2 and out == "" and re.fullmatch(rf"error: {kind}.safetensors: .*{sentence}.*\n", err)


@pytest.mark.parametrize("words, sentence", [
    (("generate",), "no prompt is given"),
    (("generate", "x", "--model", "nowhere.ckpt"), "nowhere.ckpt: no such file"),
    (("generate", "x", *MODEL, "--lora", "nowhere:0.5"), "nowhere: no such file"),
    (("generate", "x", *MODEL, "--lora", "@ink.safetensors", "@ink.safetensors:2"), "two LoRAs are named 'ink'"),
    (("generate", "x", *MODEL, "--lora", "@tiny.safetensors"), "whole checkpoint, not a LoRA"),
    (("generate", "x", "--model", "@ink.safetensors"), "it seems to be a LoRA, not a checkpoint"),
    (("generate", "x", *MODEL, "--sampler", "foo"), "sampler 'foo' is unknown; allowed: ddpm"),
    (("generate", "x", "--model", "@tiny.safetensors", "--steps", "-3"), "n_inference_steps is -3; allowed: whole"),
    (("generate", "x", *MODEL, "--width", "65"), "width is 65, no multiple of 8; the nearest are 64 and 72"),
    (("generate", "x", *MODEL, "--mask", "m.png"), "--mask needs --input"),
    (("generate", "x", *MODEL, "--input", "m.png"), "m.png: no such file"),
    (("generate", "x", *MODEL, "--out", "picture.gif"), "pictures are not saved as '.gif'"),
    (("generate", "x", *MODEL, "--out", "/proc/nothing/here"), "/proc/nothing"),
    (("generate", "--again", "@tiny.safetensors", "--model", "@tiny.safetensors"), "tiny.safetensors"),
    (("generate", "x", "--again", "y.png"), "--again takes prompt, seed and settings from the picture"),
    (("generate", "x", *MODEL, "--strength", "0.5"), "--strength needs --input"),
    (("generate", "x", *MODEL, "--lora", "@ink.safetensors", "--lora", "@wash.safetensors"), "--lora is given twice"),
    (("generate", "x", *MODEL, "--device", "cuda:77"), "device 'cuda:77' cannot be used"),
    (("generate", "x", *MODEL, "--device", "toaster"), "device 'toaster' cannot be used"),
    (("generate", "x", *MODEL, "--count", "5000000"), "5000000 pictures are asked for; allowed: up to 4096"),
    (("generate", "x", *MODEL, "--out", ""), "--out is empty"),
    (("generate", "x", *MODEL, "--stps", "3"), "Unrecognized options: --stps"),
    (("merge", "@tiny.safetensors", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors"), "is read by this"),
    (("merge", "@ink.safetensors", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors"), "is read by this"),
    (("merge", "m.safetensors", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors:1e9", "--dtype", "float16"),
     "values that are not finite in float16, so the model is not written"),
    (("inspect",), "nothing to inspect"),
    (("inspect", "@ink.safetensors", "--verify", "--model", str(data_dir() / "digits.safetensors")), "are unknown to this"),
    (("inspect", "@tiny.safetensors", "--verify"), "is not a LoRA"),
    (("merge", "m.safetensors", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors", "--rank", "3"),
     "--rank and --randomized are for --into lora"),
    (("merge", "m.safetensors", "--into", "lora", "--lora", "@ink.safetensors", "--method", "svd"), "svd needs a rank"),
    (("merge", "m.safetensors", "--into", "lora", "--lora", "@ink.safetensors", "--device", "cpu"), "are for --into model"),
    (("merge", "m.safetensors", "--into", "lora", "--lora", "@ink.safetensors", "--density", "0.2"), "--density is for ties"),
    (("embed", "m.safetensors", "--lora", "@ink.safetensors", "--dtype", "float16"), "leave out block weights"),
    (("extract", "x.safetensors", "--model", "@tiny.safetensors", "--rank", "3"), "without --tuned"),
    (("resize", "@ink.safetensors", "@ink.safetensors", "--rank", "1"), "is read by this and would be lost"),
    (("convert", "@ink.safetensors", "@ink.safetensors", "--format", "kohya"), "is read by this and would be lost"),
    (("merge", "@ink.safetensors", "--into", "lora", "--lora", "@ink.safetensors"), "is read by this and would be lost"),
    (("extract", "x.safetensors"), "nothing to extract from"),
    (("extract", "x", "--model", "@tiny.safetensors"), "has no LoRA inside"),
    (("extract", "x.safetensors", "--model", "@tiny.safetensors", "--tuned", "@tiny.safetensors"), "nothing to extract"),
    (("resize", "@ink.safetensors", "x.safetensors"), "exactly one"),
    (("convert", "@ink.safetensors", "x.safetensors", "--format", "webui"), "webui"),
    (("embed", "x.safetensors", "--model", "@tiny.safetensors"), "nothing to embed"),
    (("generate", "x", *MODEL, "--lora", ""), "--lora is empty"),
    (("generate", "x", *MODEL, "--lora", "@ink.safetensors:strong"), "a LoRA is named as PATH, PATH:MULTIPLIER"),
    (("merge", "m.safetensors", "--into", "lora", "--lora", "@ink.safetensors:1e-12", "--dtype", "float16"), "is 0 in float16"),
    (("merge", ".", "--into", "lora", "--lora", "@ink.safetensors"), "is a folder; the format kohya is one file"),
    (("resize", "@ink.safetensors", "new/folder/x.safetensors", "--rank", "0"), "rank is 0"),
    (("train", "--steps", "0"), "steps is 0; allowed: 1 or more"),
    (("train", "--name", "state"), "name is 'state'"),
    (("train", "--name", "../evil"), "name is '../evil'"),
    (("train", "--name", ""), "name is ''"),
    (("compare", "x", *MODEL), "name at least one LoRA with --lora"),
    (("merge", "m.safetensors", "--model", "@tiny.safetensors"), "nothing to merge"),
    (("merge", "m.ckpt", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors"), "not as .ckpt"),
    (("inspect", "nowhere"), "nowhere: no such file"),
    (("train", "--data", "nowhere", "--model", "@tiny.safetensors"), "nowhere"),
])
def test_a_mistake_is_one_sentence_and_exit_status_2(run, words, sentence):
    status, _, err = run(*words)
    lines = [line for line in err.splitlines() if not line.startswith("LoRA ")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and sentence in lines[0], err


def test_unknown_flags_and_commands_are_refused_and_help_helps(run):
    assert run("generat", "x")[0] == 2
    status, out, _ = run("--help")
    assert status == 0 and all(command in out for command in COMMANDS)
    for command in COMMANDS:
        status, out, _ = run(command, "--help")
        assert status == 0 and "usage: python -m sd " + command in out


def test_a_training_starts_from_a_lora_that_ships_by_its_name(run):
    data = data_dir() / "digits-thick"
    status, out, err = run("train", "--model", "digits", "--data", str(data), "--from-lora", "digits-inverted", "--dry-run")
    assert status == 0 and "trained" in out, err
    status, _, err = run("train", "--model", "digits", "--data", str(data), "--from-lora", "digits-nowhere", "--dry-run")
    assert status == 2 and "digits-nowhere" in err


# ---- mistakes and faults -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, status, last", [
    (SDError("the rank is 0"), 2, "error: the rank is 0"),
    (FileNotFoundError(2, "No such file or directory", "x.png"), 2, "error: x.png: No such file or directory"),
    (NotFiniteError("the picture is not finite"), 2, "error: the picture is not finite"),
    (MemoryError(), 2, "error: there is not enough memory for pictures"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), 2, "error: there is not enough memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"), 2, "error: there is not enough"),
    (KeyboardInterrupt(), 130, "stopped"),
    (ValueError("invalid literal"), 1, "this is a fault of the program"),
    (KeyError("weight"), 1, "this is a fault of the program"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied, values are not finite, memory format"), 1, "this is a fault"),
])
def test_a_mistake_is_a_sentence_and_a_fault_of_the_program_shows_its_traceback(run, monkeypatch, error, status, last):
    def broken(*args, **how):
        raise error
    monkeypatch.setattr("sd.tools.inspect.inspect_file", broken)
    got, _, err = run("inspect", "@ink.safetensors")
    assert got == status and err.splitlines()[-1].startswith(last)
    if status == 1:
        assert err.startswith("Traceback") and "in broken" in err and "please report it" in err.splitlines()[-1]
        assert err.splitlines()[-2] == f"{type(error).__name__}: {error}"
    else:
        assert len(err.splitlines()) == 1


def test_lack_of_memory_on_the_cpu_is_recognised(run, monkeypatch):
    monkeypatch.setattr("sd.tools.inspect.inspect_file", lambda *args, **how: torch.empty(2**55))
    status, _, err = run("inspect", "@ink.safetensors")
    assert status == 2 and err.startswith("error: there is not enough memory")


def test_a_command_leaves_warnings_and_logging_as_they_were(run):
    root, show = logging.getLogger(), warnings.showwarning
    before = (root.handlers[:], root.level)
    for words in (("inspect", "@ink.safetensors"), ("inspect", "nowhere"), ("--help",)):
        run(*words)
        assert (root.handlers[:], root.level) == before and warnings.showwarning is show


def test_a_warning_of_a_command_is_one_line(run):
    status, _, err = run("generate", "a photograph of " * 99, *MODEL, "--out", "a.png")
    assert status == 0 and len([line for line in err.splitlines() if line.startswith("the prompt has ")]) == 1
    assert "UserWarning" not in err


def test_the_flags_of_a_picture_are_those_of_the_request(run):
    flags = {flag: getattr(PictureFlags(), flag) for flag, *_ in FLAGS.values()}
    assert flags == {"negative": "", "steps": 30, "sampler": "dpmpp_2m", "spacing": None, "cfg": 7.5, "width": None,
                     "height": None, "clip_skip": 1, "seed": None}
    for command in ("generate", "compare"):
        text = " ".join(run(command, "--help")[1].replace("│", " ").split())
        assert f"{', '.join(SAMPLERS)}. (default: dpmpp_2m)" in text
        assert "leading, trailing, linspace, karras, exponential; none: the sampler's own." in text


def test_tyros_box_becomes_a_sentence():
    box = ("╭─ Parsing error ───────────────────────────────╮\n"
           "│ Error parsing --steps: invalid literal 'abc'   │\n"
           "│ ────────────────────────────────────────────── │\n"
           "│ For full helptext, run python -m sd --help     │\n"
           "╰────────────────────────────────────────────────╯\n")
    assert sentence_in(box).endswith("Error parsing --steps: invalid literal 'abc'")
    assert sentence_in("╭─ Unrecognized options ──╮\n│ Unrecognized options: --stps │\n╰───╯") == "Unrecognized options: --stps"


def test_a_hint_names_a_flag_of_the_same_command():
    for words, hint in ((["generate", "x", "--stps", "3"], "Perhaps you meant: --steps"),
                        (["merge", "m", "--stps", "3"], "--stps, 3")):
        with pytest.raises(SDError) as refused:
            parse(words, COMMANDS)
        assert str(refused.value).endswith(hint)


@pytest.mark.parametrize("words", [("generate", "x", *MODEL, "--out", "\0"), ("inspect", "a\0"), ("generate", "\0", *MODEL)])
def test_a_character_of_code_0_is_refused(run, words):
    status, _, err = run(*words)
    assert status == 2 and "holds a character of code 0" in err


@pytest.mark.parametrize("change, sentence", [
    ({"spacing": [1]}, "spacing [1] is not possible"), ({"lora": 3}, "its record of LoRAs is damaged"),
    ({"lora": {"ink": 1.0}, "lora_blocks": [2]}, "its record of LoRAs is damaged"), ({"eta": "x"}, "eta is 'x'"),
    ({"lora": {"ink": "x"}}, "the multiplier of 'ink' is 'x'"), ({"seed": -1}, "seed -1 is not allowed"),
    ({"seed": "1"}, "records no seed of type int"), ({"strength": 0.5}, "name it with --input"),
])
def test_a_picture_that_says_nonsense_of_itself_is_not_made_again(run, change, sentence):
    about = {"prompt": "x", "uncond_prompt": "", "n_inference_steps": 2, "sampler_name": "euler", "cfg_scale": 3.0, "seed": 1,
             "width": 64, "height": 64}
    save_image(np.zeros((64, 64, 3), np.uint8), "odd.png", about | change)
    status, _, err = run("generate", "--again", "odd.png", "--model", "@tiny.safetensors", "--lora", "@ink.safetensors")
    assert status == 2 and err.splitlines()[-1].startswith("error: ") and sentence in err


def test_a_training_that_finds_no_pictures_leaves_no_folder(tmp_path, capsys):
    assert main(["train", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_file_where_a_folder_is_needed_is_a_sentence(tmp_path, capsys):
    (tmp_path / "notes").write_text("x")
    assert main(["generate", "a", "--out", str(tmp_path / "notes/a.png")]) == 2
    assert "is a file; a folder is needed there" in capsys.readouterr().err
