"""Time of a foreign model with tasks, against the bare model and PEFT: python -m bench.lora --any-module --full."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from bench.common import Options, block, difference, duration
from bench.process import Worker, alternate, workers
from sd.any_model.tasks import LoRAModel
from sd.lora import lora_layers

NAMES = ["a", "b", "c", "d"]
LAYERS = ["query", "key", "value", "dense"]
RANKS = (4, 16, 64)
BATCH = 8
ROUTED = [NAMES[i % 4] for i in range(BATCH)]
CASES = {"one task": ["a"], "four at once": NAMES, "routed over four": NAMES}  # and the tasks with gradients
SIZES = {True: (768, 4), False: (64, 2)}  # width and layers

NOTES = """A BERT encoder from transformers (width {width}, {layers} layers, {batch} samples of {tokens} tokens, random weights,
frozen, no dropout) with tasks on all linear layers: `sd.any_model.LoRAModel` against PEFT's model on a copy of the same
weights, with the same factors, each in a process of its own. One task: `task="a"`; theirs `set_adapter("a")` once,
untimed. Four at once: `tasks=[...]`;
theirs `set_adapter` with all four. Routed: each sample has one of the four tasks; theirs `adapter_names=[...]`. Ours
chooses its tasks in every call, which is timed. Backward: of a random weighting of the output, with gradients for the
factors only. Difference: max |ours - theirs| / max |theirs|, of the output or of all gradients."""


def bert(options: Options) -> nn.Module:
    from transformers import BertConfig, BertModel
    width, layers = SIZES[options.full]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=1000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
                        intermediate_size=4 * width)
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False).to(options.device, options.torch_dtype)


def tokens(options: Options) -> int:
    return 64 if options.full else 8


def factors(options: Options, rank: int) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """(task, path of the layer, down, up), the same in all processes."""
    generator = torch.Generator().manual_seed(1)
    layers = {path: m for path, m in bert(options).named_modules()
              if isinstance(m, nn.Linear) and path.split(".")[-1] in LAYERS}
    for name in NAMES:
        for path, layer in layers.items():
            down, up = (torch.randn(shape, generator=generator) * 0.05 for shape in (
                (rank, layer.in_features), (layer.out_features, rank)))
            yield name, path, down, up


class Side:
    """A BERT, whose `use` says how it is called with the tasks of a case."""

    def __init__(self, options: Options):
        self.x = torch.randint(0, 1000, (BATCH, tokens(options)), generator=torch.Generator().manual_seed(2)).to(options.device)
        self.model, self.given = bert(options), {}  # task -> its factors
        with torch.no_grad():
            out = self.model(self.x).last_hidden_state
        self.target = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)

    def fill(self, rank: int, options: Options, find: Callable[[str, str], tuple]) -> None:
        """Copy the factors into those that `find` returns for a task and a path."""
        for name, path, *values in factors(options, rank):
            for mine, value in zip(find(name, path), values):
                with torch.no_grad():
                    mine.copy_(value)
                self.given.setdefault(name, []).append(mine)

    def use(self, case: str, backward: bool) -> Callable:
        return lambda: self.model(self.x)

    def call(self, case: str, backward: bool) -> Callable:
        forward = self.use(case, backward)

        def both() -> None:
            for p in (p for own in self.given.values() for p in own):
                p.grad = None
            (forward().last_hidden_state * self.target).sum().backward()
        return both if backward else torch.no_grad()(lambda: forward().last_hidden_state)

    def gradients(self, case: str) -> torch.Tensor:
        self.call(case, backward=True)()
        return torch.cat([p.grad.flatten() for name in CASES[case] for p in self.given[name]])


class Ours(Side):
    def __init__(self, options: Options, rank: int):
        super().__init__(options)
        self.tasks = LoRAModel(self.model)
        for name in NAMES:
            self.tasks.add_task(name, rank, 2 * rank, LAYERS)

        def find(name: str, path: str) -> tuple:
            adapter: Any = lora_layers(self.tasks.model)[path].adapter(name)
            return adapter.down, adapter.up
        self.fill(rank, options, find)

    def use(self, case: str, backward: bool) -> Callable:
        how = {"one task": {"task": "a"}, "four at once": {"tasks": NAMES}, "routed over four": {"task": ROUTED}}[case]
        return lambda: self.tasks(self.x, **how)


class Theirs(Side):
    def __init__(self, options: Options, rank: int):
        import peft
        super().__init__(options)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS)
        self.peft = peft.get_peft_model(self.model, config, adapter_name=NAMES[0], autocast_adapter_dtype=False).eval()
        for name in NAMES[1:]:
            self.peft.add_adapter(name, config)

        def find(name: str, path: str) -> tuple:
            peer = self.peft.base_model.model.get_submodule(path)
            return peer.lora_A[name].weight, peer.lora_B[name].weight
        self.fill(rank, options, find)

    def use(self, case: str, backward: bool) -> Callable:
        self.peft.base_model.set_adapter(CASES[case])
        how = {"adapter_names": ROUTED} if "routed" in case else {}
        return lambda: self.peft(self.x, **how)


def time_rank(options: Options, rank: int) -> list[list]:
    rows = []
    with workers({"bare": partial(Worker, options, Side, options), "ours": partial(Worker, options, Ours, options, rank),
                  "theirs": partial(Worker, options, Theirs, options, rank)}) as sides:
        for backward in (False, True):
            one = None
            for case in CASES:
                runs = {side: partial(worker.timed, "call", case, backward) for side, worker in sides.items()
                        if side != "bare" or not backward}
                times, results = alternate(runs, options.n)
                if backward:
                    results = {side: sides[side].ask("gradients", case) for side in ("ours", "theirs")}
                medians = {side: statistics.median(taken) for side, taken in times.items()}
                one = medians["ours"] if one is None else one
                base = f"{medians['ours'] / medians['bare']:.2f}" if "bare" in medians else "-"
                rows.append(["forward + backward" if backward else "forward", rank, case, duration(medians["ours"]),
                             duration(medians["theirs"]), f"{medians['ours'] / medians['theirs']:.2f}", base,
                             f"{medians['ours'] / one:.2f}", f"{difference(results['ours'], results['theirs']):.1e}"])
    return rows


def main(options: Options) -> str:
    rows = [row for rank in RANKS for row in time_rank(options, rank)]
    rows.sort(key=lambda row: row[0])  # a stable sort
    width, layers = SIZES[options.full]
    notes = NOTES.format(width=width, layers=layers, batch=BATCH, tokens=tokens(options))
    header = ["any module", "rank", "tasks", "ours", "PEFT's", "ours / PEFT's", "ours / bare", "/ one task", "difference"]
    return block("Tasks on any model", options, [notes], (header, rows), model=f"BERT {width}x{layers}")
