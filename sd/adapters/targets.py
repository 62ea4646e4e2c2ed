"""Which layers of a model can carry adapters, their paths, and which of them a target matches.

`models` below is an nn.Module (a whole model, or one network) or the Models that a loader returns.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.nn as nn

from sd.adapters.layer import LoRALayer
from sd.adapters.layers import is_registered, lora_classes, shape_of
from sd.adapters.torch_attention import projections
from sd.adapters.walk import walk
from sd.adapters.weights import LayerShape, LoRAError

NORMS = (nn.GroupNorm, nn.LayerNorm)

# Presets, as regular expressions over canonical module paths.
TARGET_PRESETS = {
    "attn": r"\.(attn1|attn2|attention)\.(q|k|v|out)_proj$",  # 128 layers of the UNet of SD 1.x
    "kohya": r"\.(attn1|attn2|attention)\.(q|k|v|out)_proj$|\.(ff|mlp)\.fc[12]$|\.attentions\.\d+\.proj_(in|out)$",
    "full": r"^(?!.*\.conv_(in|out)$).*$",  # every linear layer and convolution except the first and the last
}


def components(models) -> dict[str, nn.Module]:
    """The networks of `models` under the prefix of their paths: {"diffusion": UNet, ...}; a foreign module has none."""
    if isinstance(models, nn.Module):
        component = getattr(models, "component", "")  # in a foreign model it may be anything
        return {component if isinstance(component, str) else "": models}
    return {key: m for key, m in models.items() if isinstance(m, nn.Module)}


def named_layers(models) -> Iterator[tuple[str, nn.Module]]:
    """(canonical path, module) of every module but adapters, such as "diffusion.mid_block.attentions.0.proj_in".

    A foreign module that is itself a layer has the path "layer".
    """
    for component, network in components(models).items():
        for name, module in walk(network):
            yield _path(component, name, module), module


ROOT = "layer"  # path of a layer without a name; it may not be empty, since keys in files begin with it


def _path(component: str, name: str, module: nn.Module) -> str:
    path = ".".join(part for part in (component, name) if part)
    return ROOT if not path and isinstance(module, (*lora_classes(), LoRALayer)) else path


def adaptable_layers(models) -> dict[str, nn.Module]:
    """Path -> every layer that can carry adapters; for an nn.MultiheadAttention also q_proj, k_proj and v_proj."""
    found: dict[str, nn.Module] = {}
    classes: tuple[type[nn.Module], ...] = (*lora_classes(), LoRALayer)
    for component, network in components(models).items():
        closed = None  # prefix of a registered module, which is one layer
        for name, module in walk(network):
            if closed is not None and name.startswith(closed):
                continue
            path = _path(component, name, module)
            if isinstance(module, classes):
                found[path] = module
            if is_registered(module):
                closed = name and name + "."
            elif type(module) is nn.MultiheadAttention:
                found |= {f"{path}.{part}" if path else part: layer for part, layer in projections(module).items()}
    return found


def find_targets(models, target_modules: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Layers that the targets match: presets ("attn", "kohya", "full"), names of whole path components, regular expressions.

    A plain name such as "q_proj" or "down_blocks.0" matches whole components of the path, never a part of one; norms
    and embeddings are taken only when a target names them at the end of their path. None is "attn". A layer with
    several names in the model is matched by each of them, and returned once.
    Raises LoRAError for a target that matches nothing.
    """
    targets: list[Any]
    if isinstance(target_modules, Iterable) and not isinstance(target_modules, str):
        targets = list(target_modules)
    else:
        targets = ["attn" if target_modules in (None, "") else target_modules]
    if unfit := [target for target in targets if not isinstance(target, str)]:
        raise LoRAError(f"target {unfit[0]!r} is not a preset (attn, kohya, full), module name or regular expression")
    if not targets:
        raise LoRAError("target_modules is empty; name a preset (attn, kohya, full), module names or regular expressions")
    layers, networks = adaptable_layers(models), components(models)
    paths = {path: {path} for path in layers}
    known = {id(m): path for path, m in layers.items()}
    for component, network in networks.items():
        for name, m in walk(network, remove_duplicate=False):
            if id(m) in known:
                paths[known[id(m)]].add(_path(component, name, m))
    # A preset leaves the VAE of a whole model alone.
    vae = () if networks.keys() <= {"encoder", "decoder"} else tuple(f"{c}." for c in ("encoder", "decoder") if c in networks)
    found: dict[str, nn.Module] = {}
    for target in targets:
        matched = {path: m for path, m in layers.items() if any(_matches(target, p, m) for p in paths[path])
                   and not (target in TARGET_PRESETS and path.startswith(vae))}
        if not matched:
            parts = sorted({part for path in layers for part in path.split(".") if not part.isdigit()})
            near = difflib.get_close_matches(target, parts, n=3) or parts[:12]
            raise LoRAError(f"target {target!r} matches no layer; names in this model include {', '.join(near)}; "
                            f"presets are {', '.join(TARGET_PRESETS)}")
        found |= matched
    return {path: m for path, m in layers.items() if path in found}  # in the model's order


def _matches(target: str, path: str, module: nn.Module) -> bool:
    plain = not isinstance(module, (nn.Embedding, *NORMS))
    if target in TARGET_PRESETS:
        return (plain or path == ROOT) and re.search(TARGET_PRESETS[target], path) is not None
    if re.fullmatch(r"[\w.-]+", target):
        if f".{path}".endswith(f".{target}"):
            return True
        return plain and f".{target}." in f".{path}."
    try:
        return re.search(target, path) is not None
    except re.error as error:
        raise LoRAError(f"target {target!r} is not a regular expression: {error}") from None


def refuse_bypassed(models, targets: Iterable[str], bypasses: Callable[[nn.Module], bool], why: str) -> None:
    """Raise LoRAError for a target inside a module that `bypasses` its layers: torch's own attention reads their weights
    without calling them."""
    for path, module in named_layers(models):
        if bypasses(module):
            for target in targets:
                if not path or target.startswith(path + "."):
                    raise LoRAError(f"{target} lies in a {type(module).__name__}, which can bypass its layers' forward; {why}")


def lora_layers(models) -> dict[str, LoRALayer]:
    """Canonical path -> every layer that carries an adapter."""
    return {_path(component, name, module): module for component, network in components(models).items()
            for name, module in walk(network) if isinstance(module, LoRALayer) and module.adapters}


def nominal_shape(layer: nn.Module) -> LayerShape:
    """Like shape_of, but also for subclasses of known layers, which are rejected later, on attach."""
    known = type(layer) if isinstance(layer, LoRALayer) else lora_classes().get(type(layer), LoRALayer)
    return known.lora_shape(layer)


def layer_shapes(models) -> dict[str, LayerShape]:
    """Path -> LayerShape of every layer that can carry an adapter."""
    classes = lora_classes()
    return {path: shape_of(m, path) for path, m in adaptable_layers(models).items()
            if isinstance(m, LoRALayer) or type(m) in classes and m.weight is not None}
