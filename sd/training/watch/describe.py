"""Describes a training before it starts: its data, trained parameters and options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields

from torch import nn

from sd.training.dataset.batches import Batches, batch_captions
from sd.training.dataset.data import PictureData

NAMES = {"diffusion": "UNet", "clip": "text encoder", "encoder": "VAE encoder", "decoder": "VAE decoder"}


def describe_data(dataset: PictureData, config, n: int = 8) -> str:
    """Numbers of pictures by source and size, and the first n captions as the text encoder will see them."""
    batches, uses = Batches(dataset, config), len(dataset.uses)
    lines = [f"{len(dataset)} pictures, {uses} uses and about {uses / config.batch_size:.1f} batches of {config.batch_size} an "
             f"epoch; {config.steps} steps are {config.steps * config.accumulate * config.batch_size / uses:.1f} epochs"]
    if dataset.variants > 1:
        lines.append(f"{dataset.variants} crops and mirror images of each")
    if any(dataset.regular):
        regular_uses = sum(dataset.regular[i] for i in dataset.uses)
        lines.append(f"{sum(dataset.regular)} of them, and {regular_uses} of the uses, are for prior preservation; their loss "
                     f"counts {config.prior_weight:g} times")
    origins = Counter(e.origin for e in dataset.entries)
    if len(origins) > 1:
        used = Counter(dataset.entries[i].origin for i in dataset.uses)
        lines += [f"  {origin}: {count} pictures, {used[origin]} uses" for origin, count in origins.items()]
    if dataset.masked:
        lines.append(f"{sum(e.mask is not None for e in dataset.entries)} have a mask")
    pictures, used = Counter(dataset.sizes), Counter(dataset.sizes[i] for i in dataset.uses)
    lines += ["width x height:", *(f"  {w} x {h}: {pictures[w, h]} pictures, {used[w, h]} uses" for w, h in sorted(pictures))]
    lines.append("captions as they will be seen:")
    shown: list[tuple[int, str]] = []
    number = 0
    while len(shown) < n:
        indices = batches(number)
        shown += zip(indices, batch_captions(dataset, indices, config, number))
        number += 1
    return "\n".join(lines + [f"  {dataset.names[i]}: {text!r}" for i, text in shown[:n]])


def describe_parameters(models, parameters: Mapping[str, nn.Parameter]) -> str:
    """Numbers of trained parameters and layers, by component."""
    lines = []
    for component, network in models.items():
        own = {name: p for name, p in parameters.items() if name.startswith(f"{component}.")}
        if own:
            count, whole = sum(p.numel() for p in own.values()), sum(p.numel() for p in network.parameters())
            layers = len({name.rpartition(".")[0] for name in own})
            lines.append(f"{NAMES[component]:<16}{count:>13,} numbers in {layers} layers; {whole - count:,} are frozen")
    return "\n".join(lines)


def describe_held_out(held_out: PictureData) -> str:
    names = [entry.name for entry in held_out.entries[:8]]
    more = ", ..." if len(names) < len(held_out) and names else ""
    return f"{len(held_out)} pictures, for the validation loss alone" + (f": {', '.join(names)}{more}" if names else "")


def describe_config(config) -> str:
    """Every option that differs from its default, with the default."""
    rows = [(f.name, getattr(config, f.name), f.default) for f in fields(config)]
    rows = [(name, value, default) for name, value, default in rows if default is not MISSING and value != default]
    width = max((len(name) for name, _, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {_value(value)}   (default: {_value(default)})" for name, value, default in rows)


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_value, value)) or "none"
    return "none" if value in (None, "") else str(value)
