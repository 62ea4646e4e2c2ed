"""What a command loads before it answers: torch takes seconds, transformers too."""

import subprocess
import sys

from tests.docs.reading import ROOT

MISTAKES = (
    ["generat", "x"], ["generate"], ["generate", "x", "--stps", "3"], ["generate", "x", "--steps", "many"],
    ["generate", "x", "--steps", "-3"], ["generate", "x", "--sampler", "foo"], ["generate", "x", "--cfg", "nan"],
    ["generate", "x", "--mask", "m.png"], ["generate", "x", "--out", "x.gif"], ["generate", "x", "--dtype", "int4"],
    ["generate", "x", "--lora", ""], ["generate", "x", "--skip", "mid"], ["generate", "--again", "nowhere.png"],
    ["compare"], ["compare", "x", "--steps", "0"], ["compare", "x", "--lora", "nowhere:strong"],
    ["train", "--kind", "foo"], ["train", "--rank"], ["train", "--rank", "0"], ["train", "--name", "state"],
    ["train", "--learning-rate", "7"], ["train", "--config", "nowhere.toml"], ["train", "--new-words", "<a>:99=toy"],
    ["merge", "m.safetensors"], ["merge", "m.safetensors", "--lora", "a", "--method", "best"], ["extract", "x.safetensors"],
    ["resize", "x.safetensors"], ["convert", "a", "b", "--format", "webui"], ["embed", "x.safetensors"], ["inspect"],
)
DAY = (["generate", "7", "--model", "digits", "--steps", "1"],
       ["compare", "7", "--model", "digits", "--steps", "1", "--lora", "digits-inverted"],
       ["train", "--model", "digits", "--data", str(ROOT / "data/digits-thick"), "--steps", "1", "--batch-size", "1",
        "--sample-prompts", "7", "--sample-steps", "1", "--no-progress", "--out", "run"],
       ["merge", "m.safetensors", "--model", "digits", "--lora", "run/lora.safetensors"],
       ["convert", "run/lora.safetensors", "peft", "--format", "peft", "--model", str(ROOT / "data/digits.safetensors")],
       ["inspect", "run/lora.safetensors", "out/0001.png"])


def answers(tmp_path, commands, heavy: set[str]) -> list[int]:
    """The exit statuses of commands, run in one new process that must load none of `heavy`."""
    code = f"""if 1:
        import sys
        from sd.commands.main import main
        found = []
        for words in {list(commands)}:
            try:
                found.append(main(words))
            except SystemExit as stop:
                found.append(stop.code)
            assert not {heavy} & set(sys.modules), words
        print("\\nexit statuses:", *found)
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [int(status) for status in run.stdout.rpartition("exit statuses: ")[2].split()]


def test_help_comes_without_torch(tmp_path):
    from sd.commands.main import COMMANDS

    helps = [["--help"], *([name, "--help"] for name in COMMANDS)]
    assert answers(tmp_path, helps, {"torch", "transformers", "numpy", "PIL"}) == [0] * len(helps)


def test_what_is_wrong_with_the_arguments_alone_is_said_without_torch(tmp_path):
    assert answers(tmp_path, MISTAKES, {"torch", "transformers"}) == [2] * len(MISTAKES)


def test_pictures_training_and_tools_do_without_transformers(tmp_path):
    assert answers(tmp_path, DAY, {"transformers"}) == [0] * len(DAY)
