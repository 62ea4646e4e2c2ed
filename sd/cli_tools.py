"""The commands that work on files: merge, extract, resize, convert, embed, inspect."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sd.cli_args import DType, ModelArgs, dtype, lora

Positional = tyro.conf.Positional
Format = Literal["kohya", "diffusers", "peft", "comfyui"]


@dataclass(frozen=True)
class Merge:
    """Merge LoRAs into a model for deployment, one plain checkpoint that any program loads; or several into one LoRA."""

    out: Positional[str]
    """A file ending in .safetensors, or (--into model) a new folder for diffusers."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)
    into: Literal["model", "lora"] = "model"
    """What comes out; with lora, --model is needed only for kinds that depend on the weights (DoRA, OFT, IA3, GLoRA)."""
    method: Literal["concat", "svd", "ties", "dare", "magnitude", "full"] = "concat"
    """Into lora. concat: exact, ranks add up; svd: the best of --rank; ties, dare, magnitude: on the changes; full: exact."""
    rank: int | None = None
    """Into lora: rank of what svd, ties, dare and magnitude make."""
    density: float = 0.5
    """Into lora: share of the values that ties, dare and magnitude keep."""
    seed: int = 0
    """Into lora: of what dare drops."""
    randomized: bool = False
    """Into lora: a faster SVD that is not quite the best; its error is printed."""

    def __post_init__(self):
        if not self.on.lora:
            raise ValueError("nothing to merge: name at least one LoRA with --lora PATH:MULTIPLIER")
        if self.into == "model" and (self.method != "concat" or self.rank is not None or self.randomized):
            raise ValueError("--method, --rank and --randomized are for --into lora; into a model the sum is exact")
        if self.into == "lora" and (self.on.vae or self.on.device):
            raise ValueError("--vae and --device are for --into model; merging LoRAs needs neither")
        if (self.density != Merge.density and self.method not in ("ties", "dare", "magnitude")
                or self.seed != Merge.seed and self.method != "dare"):
            raise ValueError("--density is for ties, dare and magnitude, --seed for dare")


@dataclass(frozen=True)
class Extract:
    """Take the LoRA out of a fine-tuned checkpoint (--tuned), or the LoRAs that lie inside one checkpoint (--model alone)."""

    out: Positional[str]
    """The LoRA file to write; without --tuned the folder to write them to."""
    model: str | None = None
    """The base; none: the small model that ships with the program."""
    tuned: str | None = None
    """The checkpoint that was made from it."""
    rank: int | None = 32
    """Rank of the LoRA, at most; with --threshold it bounds the rank that each layer needs."""
    conv_rank: int | None = None
    """Rank of 3x3 convolutions; none: --rank."""
    threshold: float | None = None
    """Keep the singular values above this share of a layer's largest."""
    frobenius: float | None = None
    """Keep the fewest singular values whose squares are this share of all."""
    randomized: bool = False
    """A faster SVD; its error is printed."""
    vae: bool = False
    """Take the VAE's difference too, which other programs do not read."""
    format: Format = "kohya"
    """Whose names the file has."""
    dtype: DType = "float32"
    """Of the LoRA."""

    def __post_init__(self):
        if self.tuned is None and any(getattr(self, f.name) != f.default for f in fields(self)[2:]):
            raise ValueError("without --tuned the LoRAs inside a checkpoint are taken out as they are; leave out all flags but "
                             "--model")


@dataclass(frozen=True)
class Resize:
    """Give a LoRA another rank: the best approximation of its change. Give exactly one rule."""

    source: Positional[str]
    """A LoRA of any program."""
    out: Positional[str]
    """The LoRA file to write."""
    rank: int | None = None
    """The same rank everywhere."""
    ratio: float | None = None
    """Keep singular values of at least the largest / ratio."""
    cumulative: float | None = None
    """Keep the fewest values whose sum is this share of all."""
    frobenius: float | None = None
    """Keep the fewest values whose squares are this share of all."""
    threshold: float | None = None
    """Keep the singular values above this share of a layer's largest."""
    max_rank: int | None = None
    """Upper limit of the rules that choose a rank for each layer."""
    model: str | None = None
    """The base, for models other than SD 1.x whose LoRA does not say so."""
    format: Format = "kohya"
    """Whose names the file has."""
    skip: bool = False
    """Leave modules of kinds other than LoRA as they are."""
    dtype: DType | None = None
    """None: that of the source."""


@dataclass(frozen=True)
class Convert:
    """Write a LoRA in another program's format; its metadata and every alpha survive."""

    source: Positional[str]
    """A LoRA of any program: a file, or a folder of PEFT."""
    out: Positional[str]
    """The file to write; for peft a new folder."""
    format: Format
    """Whose."""
    dtype: DType | None = None
    """None: that of the source."""
    approximate: int | None = None
    """Modules of a kind that the format cannot hold become LoRA of this rank; the error is printed."""
    model: str | None = None
    """The base, for models other than SD 1.x and for kinds that depend on the weights."""
    skip: str | None = None
    """Leave out what this regular expression matches."""


@dataclass(frozen=True)
class Embed:
    """Put LoRAs inside a checkpoint: one file, the weights untouched. extract takes them out, merge melts them in."""

    out: Positional[str]
    """A file ending in .safetensors."""
    on: Annotated[ModelArgs, tyro.conf.arg(name="")] = field(default_factory=ModelArgs)


@dataclass(frozen=True)
class Inspect:
    """Say what a file is: a checkpoint, a LoRA of any program, or a picture with the parameters that made it."""

    paths: Positional[tuple[str, ...]]
    """Files, diffusers or PEFT folders."""
    model: str | None = None
    """A base to look at LoRAs on: what they change in its weights."""
    verify: bool = False
    """Fail unless every tensor of the LoRA fits its base."""
    json: bool = False
    """One JSON object, {path: facts}."""


# ---- the commands ----------------------------------------------------------------------------------------------------

def merge(args: Merge) -> None:
    from sd.model_loader import merge_lora_into_checkpoint
    on, chosen = args.on, [lora(text) for text in args.on.lora]
    if len({path for path, *_ in chosen}) < len(chosen):
        raise ValueError("the same LoRA is named twice; give it once, with the sum of the multipliers")
    names = " + ".join(f"{m:g} x {path.name}" for path, m, _ in chosen)
    multipliers, blocks = {path: m for path, m, _ in chosen}, {path: b for path, _, b in chosen if b is not None}
    if args.into == "lora":
        from sd.tools.merge import merge_lora_files
        report = merge_lora_files(multipliers, args.out, method=args.method, rank=args.rank, density=args.density,
                                  seed=args.seed, randomized=args.randomized, base=on.model, dtype=dtype(on.dtype),
                                  skip=on.skip, block_weights=blocks)
        print(f"{args.out}: {names}; {report}")
    else:
        merge_lora_into_checkpoint(on.model, multipliers, args.out, dtype=dtype(on.dtype), vae=on.vae,
                                   device=on.device or "cpu", skip=on.skip, block_weights=blocks)
        print(f"{args.out}: the model with {names} merged into it")


def extract(args: Extract) -> None:
    from sd.tools.embed import take_out
    from sd.tools.extract import extract_lora
    if args.tuned is None:
        if args.model is None:
            raise ValueError("nothing to extract from: name the fine-tuned checkpoint with --tuned and its base with --model, "
                             "or with --model alone a checkpoint that has LoRAs inside")
        for path in take_out(args.model, args.out):
            print(path)
        return
    report = extract_lora(args.model, args.tuned, args.out, rank=args.rank, conv_rank=args.conv_rank, threshold=args.threshold,
                          frobenius=args.frobenius, randomized=args.randomized, vae=args.vae, format=args.format,
                          dtype=dtype(args.dtype))
    print(f"{args.out}: {report}")


def resize(args: Resize) -> None:
    from sd.tools.resize import resize_file
    report = resize_file(args.source, args.out, rank=args.rank, ratio=args.ratio, cumulative=args.cumulative,
                         frobenius=args.frobenius, threshold=args.threshold, max_rank=args.max_rank, skip=args.skip,
                         format=args.format, base=args.model, dtype=dtype(args.dtype))
    print(f"{args.out}: {report}")


def convert(args: Convert) -> None:
    from sd.tools.convert import convert as run
    report = run(args.source, args.out, format=args.format, dtype=dtype(args.dtype), approximate=args.approximate,
                 base=args.model, skip=args.skip)
    print(f"{args.out}: {report}")


def embed(args: Embed) -> None:
    from sd.tools.embed import embed as run
    if not args.on.lora:
        raise ValueError("nothing to embed: name at least one LoRA with --lora PATH:MULTIPLIER")
    chosen = [lora(text) for text in args.on.lora]
    if any(blocks is not None for *_, blocks in chosen) or args.on != ModelArgs(args.on.model, args.on.lora):
        raise ValueError("the base's tensors stay as they are, and a LoRA is embedded whole, with one multiplier; leave out "
                         "block weights and all flags but --model and --lora")
    run(args.on.model, {path: m for path, m, _ in chosen}, args.out)
    print(f"{args.out}: the model with {', '.join(path.stem for path, *_ in chosen)} inside")


def inspect(args: Inspect) -> None:
    from sd.tools.inspect import as_text, inspect_file
    if not args.paths:
        raise ValueError("nothing to inspect: name files or folders")
    facts = {path: inspect_file(path, args.model, verify=args.verify) for path in args.paths}
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print("\n".join(as_text(path, found) for path, found in facts.items()))
        if args.verify:
            print("every tensor fits")


def _writes(tool: Callable) -> Callable:
    """With the folder of `--out` made first, and taken away again when the tool fails."""
    def run(args) -> None:
        missing = [folder for folder in Path(args.out).absolute().parents if not folder.exists()]
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            tool(args)
        except BaseException:
            for folder in missing:  # the innermost first
                with suppress(OSError):
                    folder.rmdir()
            raise
    return run


# command -> (its arguments, what it does)
TOOLS = {"merge": (Merge, _writes(merge)), "extract": (Extract, _writes(extract)), "resize": (Resize, _writes(resize)),
         "convert": (Convert, _writes(convert)), "embed": (Embed, _writes(embed)), "inspect": (Inspect, inspect)}
