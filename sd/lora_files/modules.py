"""A model's modules as readers and writers of LoRA files see them: shapes, and every name that a file may use."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch.nn as nn

from sd.adapters.targets import adaptable_layers, components, nominal_shape
from sd.checkpoints.names import LDM_PREFIX, Name, component_names

WRAPPERS = ("base_model.model.",)  # PEFT's prefix to the names of the model it wraps


@dataclass(frozen=True)
class Modules:
    """The modules of a model. `shapes`: path -> shape of the weight, in the model's order."""

    names: list[Name]  # empty for foreign models
    shapes: dict[str, tuple[int, ...]]
    embeddings: frozenset[str] = frozenset()  # paths of nn.Embedding layers

    @cached_property
    def lookup(self) -> dict[str, str]:
        """Every spelling of a module's name -> its path."""
        return module_lookup(self.names) | {path: path for path in self.shapes}

    def find(self, spelling: str) -> str | None:
        """The module path for a name in a file; None if the model has no such module."""
        for prefix in ("", *WRAPPERS):
            if spelling.startswith(prefix) and spelling[len(prefix):] in self.lookup:
                return self.lookup[spelling[len(prefix):]]
        return None


def module_lookup(names: Iterable[Name]) -> dict[str, str]:
    """Every name that a LoRA file may use for a module -> module path."""
    table: dict[str, str] = {}
    for name in names:
        inside = name.ldm.removeprefix(LDM_PREFIX[name.component])
        dotted = [name.path, name.ldm, name.diffusers]
        flat = [name.kohya] if name.kohya else []
        if name.component == "diffusion":
            dotted += [f"unet.{name.diffusers}", f"diffusion_model.{inside}"]
            flat += ["lora_unet_" + inside.replace(".", "_"), "lycoris_" + name.diffusers.replace(".", "_")]
        elif name.component == "clip":
            bare = name.diffusers.removeprefix("text_model.")  # transformers >= 5.6
            old = bare  # diffusers' first text encoder LoRAs use the UNet's names for attention
            for ours, theirs in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out.0")):
                old = re.sub(rf"\.{ours}$", f".{theirs}", old)
            comfy = "text_encoders.clip_l.transformer."
            dotted += [bare, f"{comfy}{name.diffusers}", f"{comfy}{bare}", f"clip_l.transformer.{name.diffusers}"]
            dotted += [f"text_encoder.{start}{end}" for start in ("", "text_model.") for end in (bare, old)]
            # writers that also support SDXL number the only text encoder
            flat += [start + end.replace(".", "_") for start in ("lora_te_", "lora_te1_") for end in (name.diffusers, bare)]
        else:
            dotted.append(f"vae.{name.diffusers}")
        table |= dict.fromkeys((*dotted, *flat), name.path)
    return table


def modules_of(models) -> Modules:
    """The modules of these models, which may be on the meta device."""
    layers = {path: m for path, m in adaptable_layers(models).items() if m.weight is not None}
    return Modules(_names(models), {path: nominal_shape(m).weight for path, m in layers.items()},
                   frozenset(path for path, m in layers.items() if isinstance(m, nn.Embedding)))


def _names(models):
    return [name for component, network in components(models).items() if getattr(network, "component", None) == component
            for name in component_names(component, network.config)]
