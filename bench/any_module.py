"""Time of a foreign model with tasks, against the bare model and PEFT: python -m bench.lora --any-module --full."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import torch
import torch.nn as nn

from bench.common import Options, alternate, block, difference, duration, isolated
from sd.any_model.tasks import LoRAModel
from sd.lora import lora_layers

NAMES = ["a", "b", "c", "d"]
LAYERS = ["query", "key", "value", "dense"]
RANKS = (4, 16, 64)
BATCH = 8
SIZES = {True: (768, 4), False: (64, 2)}  # width and layers

NOTES = """A BERT encoder from transformers (width {width}, {layers} layers, {batch} samples of {tokens} tokens, random weights,
frozen, no dropout) with tasks on all linear layers: `sd.any_model.LoRAModel` against PEFT's model on a copy of the same
weights, with the same factors. One task: `task="a"`; theirs `set_adapter("a")` once, untimed. Four at once: `tasks=[...]`;
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


def pair(options: Options, rank: int):
    """The bare model, ours, PEFT's, and their factors, which have equal values: [(task, ours, theirs)]."""
    import peft
    bare = bert(options)
    ours = LoRAModel(copy.deepcopy(bare))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS)
    theirs = peft.get_peft_model(copy.deepcopy(bare), config, adapter_name=NAMES[0], autocast_adapter_dtype=False).eval()
    for name in NAMES[1:]:
        theirs.add_adapter(name, config)
    generator, factors = torch.Generator().manual_seed(1), []
    for name in NAMES:
        ours.add_task(name, rank, 2 * rank, LAYERS)
        for path, layer in lora_layers(ours.model).items():
            peer, adapter = theirs.base_model.model.get_submodule(path), layer.adapter(name)
            for mine, other in ((adapter.down, peer.lora_A[name].weight), (adapter.up, peer.lora_B[name].weight)):
                with torch.no_grad():
                    mine.copy_(torch.randn(mine.shape, generator=generator) * 0.05)
                    other.copy_(mine)
                factors.append((name, mine, other))
    return bare, ours, theirs, factors


def time_rank(options: Options, rank: int) -> list[list]:
    bare, ours, theirs, factors = pair(options, rank)
    x = torch.randint(0, 1000, (BATCH, tokens(options)), generator=torch.Generator().manual_seed(2)).to(options.device)
    with torch.no_grad():
        out = bare(x).last_hidden_state
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    routed = [NAMES[i % 4] for i in range(BATCH)]
    cases: dict[str, tuple[Callable, Callable, list[str]]] = {
        "one task": (lambda: ours(x, task="a"), lambda: theirs(x), ["a"]),
        "four at once": (lambda: ours(x, tasks=NAMES), lambda: theirs(x), NAMES),
        "routed over four": (lambda: ours(x, task=routed), lambda: theirs(x, adapter_names=routed), NAMES)}
    rows = []
    for backward in (False, True):
        one = None
        for case, (mine, other, used) in cases.items():
            theirs.base_model.set_adapter(NAMES if backward and "routed" in case else used)

            def runs(call: Callable, backward=backward) -> Callable:
                def forward():
                    with torch.no_grad():
                        return call().last_hidden_state

                def both():
                    for _, a, b in factors:
                        a.grad = b.grad = None
                    (call().last_hidden_state * target).sum().backward()
                return both if backward else forward

            sides = {"bare": lambda: bare(x), "ours": mine, "theirs": other}
            times, results = alternate({k: runs(call) for k, call in sides.items() if k != "bare" or not backward}, options)
            if backward:
                results = {}
                for side, call in (("ours", mine), ("theirs", other)):
                    runs(call)()
                    index = 1 if side == "ours" else 2
                    results[side] = torch.cat([row[index].grad.flatten() for row in factors if row[0] in used])
            medians = {k: statistics.median(v) for k, v in times.items()}
            one = medians["ours"] if one is None else one
            base = f"{medians['ours'] / medians['bare']:.2f}" if "bare" in medians else "-"
            rows.append(["forward + backward" if backward else "forward", rank, case, duration(medians["ours"]),
                         duration(medians["theirs"]), f"{medians['ours'] / medians['theirs']:.2f}", base,
                         f"{medians['ours'] / one:.2f}", f"{difference(results['ours'], results['theirs']):.1e}"])
    return rows


def main(options: Options) -> str:
    rows = [row for rank in RANKS for row in isolated(options, time_rank, options, rank).result]
    rows.sort(key=lambda row: row[0])  # a stable sort
    width, layers = SIZES[options.full]
    notes = NOTES.format(width=width, layers=layers, batch=BATCH, tokens=tokens(options))
    header = ["any module", "rank", "tasks", "ours", "PEFT's", "ours / PEFT's", "ours / bare", "/ one task", "difference"]
    return block("Tasks on any model", options, [notes], (header, rows), model=f"BERT {width}x{layers}")
