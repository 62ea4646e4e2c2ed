"""Stable Diffusion 1.5 with LoRA on one GPU, in at most eight minutes, ours and diffusers in one run.

    python -m bench.gpu                                        # or `make gpu`: any CUDA machine with torch and this tree
    python -m bench.gpu --tiny --device cpu --budget 60        # tries the program

Random weights of the true size are made on the device; nothing is read but the tokenizer's vocabulary. Each row is printed
when it is measured and appended to OUT.jsonl; at the end a table of all rows is printed and written to OUT.md. A section
that fails says why, and the next one begins. Without diffusers, PEFT, transformers or pytest, what needs them is left out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd import graphs
from sd.adapters.low_rank import LowRank
from sd.config import SD15, TINY, ModelConfig
from sd.lora import find_targets, lora_layers, merge, set_adapters, unmerge, use_adapters
from sd.models import Models, build_networks
from sd.training.config import TrainConfig
from sd.training.loss import MicroLoss
from sd.training.optim import make_optimizer
from sd.training.work import Work

ROOT = Path(__file__).parents[1]
RANK, ALPHA = 8, 6.0
NAMES = ("a0", "a1", "a2", "a3")
STEPS = 20  # of a whole picture
EMOJI = 30  # seconds of training that are worth a start
STARTS = {"compiled": 150, "emoji": EMOJI + 30}  # seconds without which a section is not begun; 10 for others
SAMPLED, TRAINED = (1, 4, 8), (1, 4, 16)  # batches
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class OutOfTime(Exception):
    """The budget is used up."""


@dataclass
class Bench:
    """What is measured on, the time that is left, and the rows so far."""

    device: torch.device
    dtype: torch.dtype
    config: ModelConfig
    budget: float
    out: Path
    n: int
    start: float = field(default_factory=time.monotonic)
    rows: list[dict] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    @property
    def side(self) -> int:
        """Latents on each side at the model's own size."""
        return self.config.image_size // self.config.vae.factor

    def say(self, section: str, what: str, **row) -> None:
        row = {"section": section, "what": what, **row, "at_s": round(time.monotonic() - self.start, 1)}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        with open(self.out.with_suffix(".jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], Any], n: int | None = None) -> dict:
        """ms, and its range, of n calls after some that warm up; and the peak memory of all. Raises OutOfTime."""
        n = n or self.n
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3 if self.cuda else 1):  # a graph is captured in the second call
            call()
        taken = []
        for _ in range(n):
            if self.left < 0:
                raise OutOfTime
            self.synchronize()
            begin = time.perf_counter()
            call()
            self.synchronize()
            taken.append(1e3 * (time.perf_counter() - begin))
        row = {"ms": round(statistics.median(taken), 3), "range": [round(min(taken), 3), round(max(taken), 3)], "n": n}
        return row | self.memory()

    def memory(self) -> dict:
        if not self.cuda:
            return {}
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()  # a replay allocates nothing
        return {"gib": round(peak / 2**30, 2), "reserved_gib": round(reserved / 2**30, 2)}


# ---- what is run -----------------------------------------------------------------------------------------------------

def random_models(b: Bench) -> Models:
    """The four networks with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device("meta"):
        networks = build_networks(b.config)
    for key, network in networks.items():
        network.to_empty(device=b.device).requires_grad_(False).eval()
        for name, p in network.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0, p[0].numel() ** -0.5)
            else:
                nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.1)
        network.to(torch.float32 if b.dtype == torch.float16 and key in ("encoder", "decoder") else b.dtype)
        if b.cuda:
            network.to(memory_format=torch.channels_last)
    return Models(networks, b.config)


def add_loras(unet: nn.Module, names=NAMES) -> None:
    """Random LoRAs on q, k, v and out of every attention (128 layers in SD 1.5), not yet active."""
    for layer in find_targets({"diffusion": unet}, "attn").values():
        for name in names:
            adapter = LowRank(layer.lora_shape(), RANK, ALPHA)
            for p in adapter.parameters():
                nn.init.normal_(p, 0, 0.02)
            layer.add_adapter(name, adapter.requires_grad_(False), 0.0)
    set_adapters(unet, {})


def inputs(b: Bench, rows: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and context of a UNet call."""
    g = torch.Generator().manual_seed(rows)
    c = b.config.unet
    x = torch.randn(rows, c.in_channels, b.side, b.side, generator=g)
    context = torch.randn(rows, b.config.clip.max_tokens, c.context_width, generator=g)
    dtype = dtype or b.dtype
    return x.to(b.device, dtype), torch.full((rows,), 500.0, device=b.device), context.to(b.device, dtype)


class Again:
    """A tape for trying the program on a CPU: it runs the call again."""

    def capture(self, run):
        self.run, self.output = run, run()
        return self.output

    def replay(self):
        self.output.copy_(self.run())


def images(batch: int) -> Tensor:
    """The image of each row of a guided call."""
    return torch.arange(batch).repeat(2)


def routed(batch: int) -> dict[str, Tensor]:
    return {name: (torch.arange(batch) % len(NAMES) == i).float() for i, name in enumerate(NAMES)}


@contextmanager
def case(unet: nn.Module, name: str, batch: int) -> Iterator[None]:
    """The UNet as it is in a case, for calls of 2 · batch rows."""
    chosen = {} if name == "base" else routed(batch) if name == "four routed" else {NAMES[0]: 1.0}
    with use_adapters(unet, chosen, rows=images(batch) if name == "four routed" else None):
        if name == "merged":
            merge(unet)
        yield
    unmerge(unet)


CASES = ("base", "adapters", "merged", "four routed")


# ---- sections --------------------------------------------------------------------------------------------------------

def ceilings(b: Bench) -> None:
    n, size = (8192, 2**31) if b.cuda else (512, 2**22)
    x, y = (torch.randn(n, n, device=b.device, dtype=b.dtype) for _ in range(2))
    row = b.time(lambda: x @ y)
    b.say("ceilings", f"product {n} x {n} x {n}", **row, tflops=round(2 * n**3 / row["ms"] / 1e9, 1))
    source = torch.empty(size, device=b.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    row = b.time(lambda: target.copy_(source))
    b.say("ceilings", f"copy of {size} bytes", **row, tb_s=round(2 * size / row["ms"] / 1e9, 2))


@torch.no_grad()
def inference(b: Bench) -> None:
    """A UNet call with guidance, from Python and from a graph."""
    unet = random_models(b)["diffusion"]
    add_loras(unet)
    for batch in SAMPLED if b.cuda else SAMPLED[:2]:
        given = inputs(b, 2 * batch)
        for name in CASES:
            if name == "four routed" and batch < len(NAMES):
                continue
            with case(unet, name, batch):
                plain = unet(*given)
                for mode in ("eager", "graph"):
                    with graphs.repeated(unet) if mode == "graph" else nullcontext():
                        row = b.time(partial(unet, *given))
                        difference = float((unet(*given) - plain).abs().max() / plain.abs().max())
                    b.say("inference", name, mode=mode, batch=batch, **row, it_s=per_second(row), difference=difference)
        graphs.forget(unet)
    # What half precision costs in exactness, against the same weights in fp32.
    half = unet(*inputs(b, 2)).float()
    exact = unet.float()(*inputs(b, 2, torch.float32))
    b.say("inference", "error against fp32", batch=1, error=float((half - exact).abs().max() / exact.abs().max()))


@torch.no_grad()
def switching(b: Bench) -> None:
    """A step after a switch, against a step: both from a graph. No switch captures anew."""
    unet = random_models(b)["diffusion"]
    add_loras(unet)
    given, turn = inputs(b, 2), count()

    def step(switch: bool, merged: bool) -> None:
        if switch:
            i = next(turn)
            set_adapters(unet, {NAMES[i % len(NAMES)]: 0.5 + 0.01 * (i % 5)})
        if merged:
            merge(unet)
        unet(*given)

    with graphs.repeated(unet):
        for merged in (False, True):
            set_adapters(unet, {NAMES[0]: 1.0})
            same = b.time(partial(step, False, merged))
            unet(*given)
            captured = len(graphs.captured(unet))
            other = b.time(partial(step, True, merged))
            b.say("switching", "merged" if merged else "adapters", mode="graph", batch=1, **other,
                  same_ms=same["ms"], captured_anew=len(graphs.captured(unet)) - captured)
            unmerge(unet)


def pictures(b: Bench) -> None:
    """From a prompt to the finished picture, without and with graphs."""
    from sd.pipeline import generate  # needs packages that the other sections do not
    models = random_models(b)
    add_loras(models["diffusion"])
    for name, lora in (("base", {}), ("adapters", {NAMES[0]: 1.0})):
        for batch in (1, 4) if b.cuda else (1,):
            def picture(batch=batch, lora=lora) -> None:
                generate(["a red apple"] * batch, models=models, seed=1, lora=lora, n_inference_steps=STEPS if b.cuda else 3,
                         sampler_name="dpmpp_2m")
            for mode in ("eager", "graph"):
                with without_graphs() if mode == "eager" else nullcontext():
                    row = b.time(picture, 3 if b.cuda else 1)
                b.say("pictures", name, mode=mode, batch=batch, **row, img_s=per_second(row, batch))


def per_second(row: dict, images: int = 1) -> float:
    return round(1e3 * images / row["ms"], 2)


@contextmanager
def without_graphs() -> Iterator[None]:
    os.environ["SD_CUDA_GRAPHS"] = "0"
    try:
        yield
    finally:
        del os.environ["SD_CUDA_GRAPHS"]


def training(b: Bench) -> None:
    """A step of LoRA training, forward, backward, clipping and AdamW, with cached inputs: base in half, factors in fp32."""
    models = random_models(b)
    unet: Any = models["diffusion"]
    add_loras(unet, NAMES[:1])
    set_adapters(unet, {NAMES[0]: 1.0})
    factors = [p.requires_grad_(True) for layer in lora_layers(unet).values() for p in layer.adapters.parameters()]
    for batch, checkpointing in product(TRAINED if b.cuda else (1,), (False, True)):
        unet.checkpointing = checkpointing
        for mode in ("eager",) if checkpointing else ("eager", "graph"):  # what is recomputed is not captured
            with without_graphs() if mode == "eager" else nullcontext():
                row = b.time(own_step(b, models, factors, batch, checkpointing), 8 if b.cuda else 1)
            b.say("training", "LoRA, rank 8", mode=mode, who="ours", batch=batch, checkpointing=checkpointing, **row,
                  img_s=per_second(row, batch))
            for p in factors:
                p.grad = None


def own_step(b: Bench, models: Models, factors: list[nn.Parameter], batch: int, checkpointing: bool) -> Callable[[], None]:
    """A step as the training loop takes it."""
    precision: Any = next(name for name, dtype in DTYPES.items() if dtype == b.dtype)
    config = TrainConfig(batch_size=batch, checkpointing=checkpointing, precision=precision, learning_rate=1e-4)
    parameters, (x, t, context) = {str(i): p for i, p in enumerate(factors)}, inputs(b, batch, torch.float32)
    given, numbers = {"x": x, "t": t, "context": context, "target": torch.randn_like(x)}, count()

    def loss(x: Tensor, t: Tensor, context: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(models["diffusion"](x.to(b.dtype), t, context.to(b.dtype)).float(), target)

    work = Work(config, models, parameters, make_optimizer(parameters, config), {}, MicroLoss(lambda number: given, loss),
                torch.tensor([1.0, 0.0], device=b.device))

    def step() -> None:
        number = next(numbers)
        work.update(work.add_gradients(number), number)
    return step


def train_rows(b: Bench, call: Callable[..., Tensor], factors: list[nn.Parameter], batch: int, checkpointing: bool, who: str,
               encode: Callable[[int], tuple[Tensor, Tensor]] | None = None) -> None:
    """Time a peer's step. `encode`: what makes latents and context in each step, uncached."""
    x, t, context = inputs(b, batch, torch.float32)
    target, optimizer = torch.randn_like(x), torch.optim.AdamW(factors, lr=1e-4, fused=b.cuda)

    def step() -> None:
        given = (x, context) if encode is None else encode(batch)
        with torch.autocast(b.device.type, b.dtype, enabled=b.dtype != torch.float32):
            loss = F.mse_loss(call(given[0].to(b.dtype), t, given[1].to(b.dtype)).float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    row = b.time(step, 8 if b.cuda else 1)
    b.say("training", "LoRA, rank 8" + (", encoding in each step" if encode else ""), mode="eager", who=who, batch=batch,
          checkpointing=checkpointing, **row, img_s=per_second(row, batch))
    for p in factors:
        p.grad = None


def peers(b: Bench) -> None:
    """diffusers and PEFT: the same cases, its pictures, and the step of its training script."""
    peer = importlib.import_module("bench.gpu_peers")
    peer.steps(b, inputs)
    peer.training(b, train_rows)


@torch.no_grad()
def compiled(b: Bench) -> None:
    """torch.compile of our UNet; the first call is the compilation."""
    for name in ("base", "adapters"):
        unet = random_models(b)["diffusion"]
        add_loras(unet)
        given = inputs(b, 2)
        with case(unet, name, 1):
            begin = time.monotonic()
            unet.compile(dynamic=False, **({"mode": "reduce-overhead"} if b.cuda else {"backend": "eager"}))
            unet(*given)
            b.synchronize()
            first = time.monotonic() - begin
            row = b.time(partial(unet, *given))
            b.say("compiled", name, mode="compiled", batch=1, **row, it_s=per_second(row), first_call_s=round(first, 1))
        if b.left < first + 20:
            raise OutOfTime


def cuda_tests(b: Bench) -> None:
    """The tests that need a GPU, one by one; they need no pytest."""
    module = importlib.import_module("tests.pipeline.test_cuda")
    for name, test in vars(module).items():
        if name.startswith("test_") and b.cuda:
            try:
                test()
                b.say("tests", name, result="passed")
            except Exception as error:  # each test says what it found, and the next one runs
                b.say("tests", name, result=f"FAILED {type(error).__name__}: {error}"[:300])
    if not b.cuda:
        b.say("tests", "tests/pipeline/test_cuda.py", result="needs a GPU")


def emoji(b: Bench) -> None:
    """Train the shipped model on for the time that is left, and stop it as a person does. It needs out/emoji/pictures-64."""
    if not (ROOT / "out/emoji/pictures-64.safetensors").exists():
        return b.say("emoji", "training", result="no pictures: python -m recipes.emoji.data draws them")
    run = f"gpu-{int(time.time())}"
    command = [sys.executable, "-m", "recipes.emoji.train", "unet", "--run", run, "--start", "data/emoji.safetensors",
               "--device", b.device.type]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        process.wait(timeout=max(b.left - 30, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # saves after the step
        try:
            process.wait(timeout=25)
        except subprocess.TimeoutExpired:
            process.kill()
    timing = (ROOT / "out/emoji" / run / "timing.jsonl")
    last = json.loads(timing.read_text().splitlines()[-1]) if timing.exists() else {}
    b.say("emoji", "training", result=f"exit {process.wait()}", **last)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings, "inference": inference, "tests": cuda_tests, "switching": switching, "pictures": pictures,
    "training": training, "peers": peers, "compiled": compiled, "emoji": emoji}


def run_section(b: Bench, name: str) -> None:
    if b.left < (STARTS.get(name, 10) if b.cuda else 1):
        return b.say(name, "not begun", result="no time is left")
    try:
        SECTIONS[name](b)
    except OutOfTime:
        b.say(name, "cut short", result="no time is left")
    except ImportError as error:
        b.say(name, "left out", result=str(error))
    except Exception as error:  # whatever it is, the other sections are worth having
        b.say(name, "failed", result=f"{type(error).__name__}: {error}"[:400])
    gc.collect()
    if b.cuda:
        torch.cuda.empty_cache()


# ---- what is printed -------------------------------------------------------------------------------------------------

def environment(b: Bench) -> dict:
    packages = {name: importlib.metadata.version(name) for name in ("diffusers", "peft", "transformers")
                if importlib.util.find_spec(name)}
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True)
    return {"device": torch.cuda.get_device_name() if b.cuda else "cpu", "python": platform.python_version(),
            "torch": torch.__version__, **packages, "commit": commit.stdout.strip() or "unknown", "model": b.config.name,
            "dtype": str(b.dtype).removeprefix("torch."), "pixels": b.config.image_size}


COLUMNS = ("section", "who", "what", "mode", "batch", "checkpointing", "ms", "range", "it_s", "img_s", "gib")


def table(rows: list[dict]) -> str:
    """The rows as markdown, with all that has no column in the last one."""
    lines = ["| " + " | ".join((*COLUMNS, "more")) + " |", "| " + " | ".join(["---"] * (len(COLUMNS) + 1)) + " |"]
    for row in rows:
        more = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                         if k not in (*COLUMNS, "at_s", "n"))
        cells = [row.get(column, "") for column in COLUMNS] + [more]
        lines.append("| " + " | ".join(" to ".join(map(str, c)) if isinstance(c, list) else str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def aims(rows: list[dict]) -> list[tuple[str, str]]:
    """(aim, what was measured) of docs/benchmarks.md."""
    def ms(section: str, what: str, batch: int, mode: str = "graph", **facts) -> float:
        wanted = {"section": section, "what": what, "batch": batch, "mode": mode, **facts}
        return next((r["ms"] for r in rows if all(r.get(k) == v for k, v in wanted.items())), math.nan)

    step, script = ms("inference", "base", 1), "LoRA, rank 8, encoding in each step"
    ours = min(ms("training", "LoRA, rank 8", 1, mode, who="ours", checkpointing=False) for mode in ("eager", "graph"))
    memory = [r["gib"] for r in rows if "gib" in r and (r["section"], r.get("who"), r.get("mode"), r.get("batch"))
              == ("training", "ours", "eager", 1)]
    return [
        (">= 150 it/s at batch 1", f"{1e3 / step:.0f}"),
        ("merged <= 1.05 of the base", f"{ms('inference', 'merged', 1) / step:.3f}"),
        ("four routed at batch 4 <= 1.1 of the base", f"{ms('inference', 'four routed', 4) / ms('inference', 'base', 4):.3f}"),
        ("training >= 3 times the images a second of diffusers' script",
         f"{ms('training', script, 1, 'eager', who='diffusers + PEFT', checkpointing=False) / ours:.2f}"),
        ("training at batch 1 under 4 GB", f"{min(memory, default=math.nan)} to {max(memory, default=math.nan)} GiB")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, on a CPU fp32")
    parser.add_argument("--tiny", action="store_true", help="a small model of the same topology")
    parser.add_argument("--budget", type=float, default=460, help="seconds; what is not done by then is left out")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="OUT.jsonl is appended to, OUT.md written")
    parser.add_argument("--n", type=int, default=20, help="calls that are timed")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(2, "error: torch finds no CUDA device; --tiny --device cpu --budget 60 tries the program without one\n")
    dtype = DTYPES[args.dtype or ("bf16" if args.device.startswith("cuda") else "fp32")]
    b = Bench(torch.device(args.device), dtype, TINY if args.tiny else SD15, args.budget, args.out, args.n)
    if not b.cuda:
        graphs.TAPES["cpu"] = lambda: Again
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts = environment(b)
    b.say("environment", "machine", **facts)

    def over(*_):
        raise OutOfTime
    signal.signal(signal.SIGALRM, over)
    for name in args.only:
        signal.setitimer(signal.ITIMER_REAL, max(b.left + 5, 1))  # also where a section does not look at the time
        try:
            run_section(b, name)
        except OutOfTime:  # on its way out
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    text = (f"{', '.join(f'{k} {v}' for k, v in facts.items())}; {b.budget - b.left:.0f} s in all.\n\n"
            + "".join(f"- {aim}: {value}\n" for aim, value in aims(b.rows)) + "\n" + table(b.rows[1:]))
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print("\n" + text, end="")


if __name__ == "__main__":
    main()
