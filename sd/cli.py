"""`python -m sd <command>`: parse, call one function, show the result. The tools for files are in cli_tools."""

from __future__ import annotations

import io
import logging
import os
import re
import secrets
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import tyro

from sd.cli_args import ModelArgs, load, shipped
from sd.cli_tools import TOOLS, Positional

NO_MEMORY = "there is not enough memory for pictures of this size and number; make fewer or smaller ones"


@dataclass(frozen=True)
class PictureArgs:
    """How a picture is made; the same for generate and compare."""

    negative: str = ""
    """What the picture should not show."""
    steps: int = 30
    """Sampler steps."""
    sampler: str = "dpmpp_2m"
    """ddpm, ddim, pndm, euler, euler_a, heun, dpmpp_2m, dpmpp_2m_sde, unipc, lcm."""
    spacing: str | None = None
    """leading, trailing, linspace, karras, exponential; none: the sampler's own."""
    cfg: float = 7.5
    """Guidance scale; 1 is none."""
    width: int | None = None
    """Pixels; none: what the model is made for."""
    height: int | None = None
    """Pixels; none: what the model is made for."""
    clip_skip: int = 1
    """1: last layer of the text encoder, 2: the one before."""
    seed: int | None = None
    """Image i has seed + i; none: a random one, which is printed."""

    def arguments(self) -> dict:
        """For `sd.pipeline.generate`."""
        return {"uncond_prompt": self.negative, "n_inference_steps": self.steps, "sampler_name": self.sampler,
                "spacing": self.spacing, "cfg_scale": self.cfg, "width": self.width, "height": self.height,
                "clip_skip": self.clip_skip}


@dataclass(frozen=True)
class Generate:
    """Make pictures from prompts; each file says what made it."""

    prompts: Positional[tuple[str, ...]] = ()
    """What the pictures show."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    how: Annotated[PictureArgs, tyro.conf.arg(name="")] = field(default_factory=PictureArgs)
    embedding: tuple[str, ...] = ()
    """Files or folders of learned words (textual inversion) as PATH, or PATH:WORD for another word than the file's."""
    count: int = 1
    """Pictures for each prompt."""
    input: str | None = None
    """Picture to start from (img2img)."""
    mask: str | None = None
    """Where to repaint it (white)."""
    strength: float = 0.8
    """How much of it is noised: 0 nothing, 1 all."""
    no_lora: bool = False
    """Leave all LoRAs off: the bare base."""
    again: str | None = None
    """A picture made here: make it once more with the prompt, seed, settings and multipliers that it holds."""
    out: str = "out"
    """Folder, or a file ending in .png, .jpg or .webp."""

    def __post_init__(self):
        if self.again is None and not self.prompts:
            raise ValueError("no prompt is given; prompts stand before the flags: python -m sd generate \"a cat\" --seed 1")
        if self.again is not None and (self.prompts or self.how != PictureArgs() or self.count != 1):
            raise ValueError("--again takes prompt, seed and settings from the picture; leave them out")
        if self.input is None and (self.mask is not None or self.strength != Generate.strength):
            raise ValueError(f"--{'strength' if self.mask is None else 'mask'} needs --input: the picture to start from")


@dataclass(frozen=True)
class Compare:
    """One contact sheet: a row for each prompt, a column for the base and for each LoRA at each multiplier."""

    prompts: Positional[tuple[str, ...]]
    """What the pictures show."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    how: Annotated[PictureArgs, tyro.conf.arg(name="")] = field(default_factory=PictureArgs)
    embedding: tuple[str, ...] = ()
    """Files or folders of learned words (textual inversion) as PATH, or PATH:WORD for another word than the file's."""
    multipliers: tuple[float, ...] = ()
    """One column for each, instead of the multiplier given with the LoRA."""
    out: str = "out/compare.png"
    """File of the contact sheet."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake (one sentence on stderr), 130 for Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    warnings.showwarning = lambda message, *where, **more: logging.getLogger("sd").warning("%s", message)
    commands = {"generate": generate, "compare": compare, "train": train} | {name: run for name, (_, run) in TOOLS.items()}
    try:
        args = _parse(sys.argv[1:] if argv is None else list(argv))
        return commands[type(args).__name__.lower().removesuffix("config")](args) or 0
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"error: {NO_MEMORY}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # torch says so when memory is short; what else it says is a fault of ours
        if "not finite" not in str(error) and "memory" not in str(error):
            raise
        print(f"error: {error if 'not finite' in str(error) else NO_MEMORY}", file=sys.stderr)
        return 2


def _parse(argv: list[str]):
    """The command's dataclass. A mistake ends in ValueError with tyro's answer, which is a box, as one sentence."""
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise ValueError(f"{flag} is given twice; name all of its values after one {flag}")
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(_commands(), prog="python -m sd", args=_with_config(argv, flags),
                            config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        text = re.sub(r"([╭╮╰╯│─\s]|-{5,})+", " ", box.getvalue()).partition("For full helptext")[0].partition(" in python ")[0]
        text = text.replace("Unrecognized options Unrecognized", "Unrecognized").strip()
        raise ValueError(re.sub(r"^.*Error parsing \w+: ", "", text)) from None


def _with_config(argv: list[str], flags: list[str]) -> list[str]:
    """What the file of `train --config` says is put before the flags, less what flags say themselves."""
    if argv[:1] != ["train"] or "--config" not in flags:
        return argv
    from sd.training.config_file import config_flags, read_config
    at = next(i for i, word in enumerate(argv) if word.partition("=")[0] == "--config")
    path = argv[at].partition("=")[2] or "".join(argv[at + 1:at + 2])
    said = {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}
    return ["train", *config_flags({name: v for name, v in read_config(path).items() if name not in said}), *argv[1:]]


def _commands():
    from sd.training import TrainConfig

    @dataclass(frozen=True)
    class Train(TrainConfig):
        __doc__ = TrainConfig.__doc__
        config: str | None = None
        """TOML, JSON or YAML file with these options; flags win over it."""

    kinds = {"generate": Generate, "compare": Compare, "train": Train} | {name: cls for name, (cls, _) in TOOLS.items()}
    union = None
    for command, cls in kinds.items():
        flags = cls if cls is Train else tyro.conf.FlagCreatePairsOff[cls]  # --no-x against a config file's x
        one = Annotated[flags, tyro.conf.subcommand(command, description=(cls.__doc__ or "").splitlines()[0])]
        union = one if union is None else union | one
    return union


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ---- the commands ----------------------------------------------------------------------------------------------------

def generate(args: Generate) -> None:
    from sd import pipeline
    from sd.image_io import read_parameters, save_image
    again = {} if args.again is None else read_parameters(args.again)
    paths = _paths(args.out, args.count * max(1, len(args.prompts)))
    models = load(args.on, args.embedding)
    arguments, prompts = args.how.arguments(), list(args.prompts)
    seed = secrets.randbits(32) if args.how.seed is None else args.how.seed
    if args.again is not None:
        prompts, seed, arguments = _again(again, args.again, models, args.input)
    if args.input is not None:
        arguments |= {"input_image": args.input, "mask": args.mask, "strength": again.get("strength", args.strength)}
    with ThreadPoolExecutor(1) as beside:  # hashing gigabytes takes seconds, which the sampler takes too
        beside.submit(lambda: models.model_hash)
        pictures = pipeline.generate(prompts, models=models, seed=seed, images_per_prompt=args.count,
                                     use_lora=not args.no_lora, **arguments)
    for i, (picture, path) in enumerate(zip(pictures, paths)):
        about = pipeline.describe(models, prompts[i // args.count], seed=seed + i, use_lora=not args.no_lora, **arguments)
        save_image(picture, path, about)
        print(f"{path}  seed {seed + i}  {prompts[i // args.count]}")


def _again(about: dict, path: str, models, picture: str | None) -> tuple[list[str], int, dict]:
    """Prompts, seed and arguments from a picture's own parameters. Raises ValueError for another model or LoRA."""
    from sd.pipeline import used_embeddings
    kinds = {"prompt": str, "uncond_prompt": str, "seed": int, "n_inference_steps": int, "sampler_name": str,
             "cfg_scale": float, "width": int, "height": int}
    for key, kind in kinds.items():
        if type(about.get(key)) is not kind:
            raise ValueError(f"{path}: cannot be made again: what it says of itself has no {key} that is a {kind.__name__}")
    if not isinstance(about.get("lora", {}), dict) or not isinstance(about.get("lora_hashes", {}), dict):
        raise ValueError(f"{path}: cannot be made again: what it says of its LoRAs is damaged")
    if "strength" in about and picture is None:
        raise ValueError(f"{path}: made from another picture, which it does not hold; name it with --input")
    if about.get("model_hash", models.model_hash) != models.model_hash:
        raise ValueError(f"{path}: made with model {about.get('model')!r} of hash {about['model_hash']}; "
                         f"this one has {models.model_hash}; name it with --model")
    missing = sorted(set(about.get("lora", {})) - set(models.lora_reports))
    if missing:
        raise ValueError(f"{path}: made with the LoRA {missing[0]!r}; load it with --lora")
    for name, digest in about.get("lora_hashes", {}).items():
        if name in models.lora_reports and models.lora_reports[name].hash != digest:
            raise ValueError(f"{path}: made with another LoRA {name!r}, of hash {digest}; "
                             f"this one has {models.lora_reports[name].hash}")
    then, now = about.get("embeddings") or {}, used_embeddings(models, about["prompt"], about["uncond_prompt"])
    if then != now:
        raise ValueError(f"{path}: made with the embeddings {then or 'none'} (word: hash) in its prompts; this one has "
                         f"{now or 'none'}; name them with --embedding")
    for key, what in (("lora_blocks", "blocks"), ("lora_skipped", "skipped")):
        for name in about.get("lora", {}):
            then, now = (about.get(key) or {}).get(name) or None, getattr(models.lora_reports[name], what) or None
            if then != now:
                raise ValueError(f"{path}: made with {what} {then} of the LoRA {name!r}; this one has {now}; "
                                 f"say so with --lora PATH:MULTIPLIER:BLOCKS and --skip")
    keys = ("uncond_prompt", "n_inference_steps", "sampler_name", "cfg_scale", "width", "height", "spacing", "clip_skip", "eta")
    return [about["prompt"]], about["seed"], {k: about[k] for k in keys if k in about} | {"lora": about.get("lora", {})}


def compare(args: Compare) -> None:
    from sd import pipeline
    from sd.image_io import save_image
    from sd.lora import active_multipliers
    models = load(args.on, args.embedding)
    loaded = active_multipliers(models)
    if not loaded:
        raise ValueError("nothing to compare with the base: name at least one LoRA with --lora")
    if args.multipliers:
        variants = [{}, *({name: m} for name in loaded for m in args.multipliers)]
    else:
        variants = [{}, *({name: m} for name, m in loaded.items()), *([loaded] if len(loaded) > 1 else [])]
    seed = secrets.randbits(32) if args.how.seed is None else args.how.seed
    (path,) = _paths(args.out, 1)
    sheet = pipeline.compare(args.prompts, models, variants, seed=seed, **args.how.arguments())
    save_image(sheet, path, {"prompts": list(args.prompts), "variants": variants, "seed": seed, **args.how.arguments()})
    print(f"{path}  {len(args.prompts)} prompts x {len(variants)} variants, seed {seed}")


def train(args) -> None:
    from sd.training import TrainConfig
    from sd.training import train as run
    from sd.training.dist import chief, processes
    from sd.training.result import result_files
    options = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    if args.from_lora:
        options["from_lora"] = str(shipped(Path(args.from_lora)))
    with processes():
        run(TrainConfig(**options))
        for file in () if args.dry_run or not chief() else result_files(args):
            print(Path(args.out) / file)


def _paths(out: str, count: int) -> list[Path]:
    """Where pictures go: the file that is named, numbered if there are several, or the next free numbers of a folder."""
    from sd.image_io import FORMATS
    from sd.pipeline import MAX_IMAGES
    path = Path(out)
    if not out:
        raise ValueError("--out is empty; name a folder or a file")
    if count > MAX_IMAGES:
        raise ValueError(f"{count} pictures are asked for; allowed: up to {MAX_IMAGES}")
    if path.suffix and not path.is_dir():
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"{path}: pictures are not saved as {path.suffix!r}; allowed: {', '.join(FORMATS)}, or a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        _try_writing(path.parent)
        return [path if count == 1 else path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]
    path.mkdir(parents=True, exist_ok=True)
    _try_writing(path)
    used = [int(p.stem) for p in path.glob("*.png") if p.stem.isdigit()]
    return [path / f"{max(used, default=0) + 1 + i:04d}.png" for i in range(count)]


def _try_writing(folder: Path) -> None:
    """Raises OSError now, not after the pictures are made."""
    from sd.checkpoint import atomic_write
    probe = folder / ".sd-probe"
    with atomic_write(probe):
        pass
    probe.unlink()
