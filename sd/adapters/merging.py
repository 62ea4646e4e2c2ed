"""Merging adapters into weights: reversibly, beside the weight, or for good.

`models` below is an nn.Module (a whole model, or one network) or the Models that a loader returns.
"""

from __future__ import annotations

import math
from typing import Any

from sd.adapters.derived import exact
from sd.adapters.switch import exclusive
from sd.adapters.targets import components, lora_layers, named_layers
from sd.adapters.torch_attention import convert_hosts
from sd.adapters.weights import LoRAError


def merge(models) -> None:
    """Compute each layer's merged weight for the present active set into a buffer beside `weight`. Reversible, exact."""
    with exclusive(models):
        for layer in lora_layers(models).values():
            if layer.effective.multipliers and layer.lora_enabled:
                layer.merge()


def unmerge(models) -> None:
    """Free the merged weights. `weight` was never written, so this is exact in every dtype."""
    with exclusive(models):
        for layer in lora_layers(models).values():
            layer.unmerge()


def merge_loss(models) -> float:
    """‖round(W + ΔW) - W - ΔW‖ / ‖ΔW‖ over all active layers: the share of the change that rounding loses."""
    lost = change = 0.0
    with exact():
        for layer in lora_layers(models).values():
            if layer.effective.multipliers and layer.lora_enabled:
                multipliers: dict[str, Any] = layer.effective.multipliers
                W, (total, _) = layer.base_weight(), layer.merged_sum()
                delta: Any = sum(m * layer.adapter(name).effective_delta(W).double()
                            for name, m in multipliers.items())
                lost += (total.to(layer.weight.dtype).double() - W.double() - delta).square().sum().item()
                change += delta.square().sum().item()
    return math.sqrt(lost / change) if change else 0.0


def tied_layers(models) -> dict[str, list[str]]:
    """Path of an adapted layer -> the other modules that share a parameter with it, which its adapters do not change."""
    owners: dict[int, dict[int, str]] = {}  # parameter -> its modules
    for path, module in named_layers(models):
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), {})[id(module)] = path
    found: dict[str, list[str]] = {}
    for path, layer in lora_layers(models).items():
        base = getattr(layer, "attention", layer)  # the module whose parameters a projection slices
        others = {other: at for p in layer.base_tensors() for other, at in owners.get(id(p), {}).items() if other != id(base)}
        if others:
            found[path] = sorted(others.values())
    return found


def merge_lora_weights(models, *, untie: bool = False):
    """Merge the active set for good and remove all adapters: a plain model with the base checkpoint's keys. Returns it.

    Raises LoRAError when nothing is active, when LoRA is switched off, when multipliers differ by image, or where a layer
    shares its weight with another module (`tied_layers`), unless `untie` gives it one of its own.
    """
    with exclusive(models):
        layers = lora_layers(models)
        if not any(layer.multipliers for layer in layers.values()):
            raise LoRAError("there is nothing to merge: no adapter is active")
        if not all(layer.lora_enabled for layer in layers.values()):
            raise LoRAError("LoRA is switched off; set_lora_enabled(models, True) before merging, or remove_lora to drop it")
        if any(layer.active.per_image for layer in layers.values()):
            raise LoRAError("multipliers that differ from image to image cannot be merged into one weight")
        for path, others in () if untie else tied_layers(models).items():
            if layers[path].effective.multipliers:
                raise LoRAError(f"{path} shares its weight with {', '.join(others)}, which would not change with it; to give "
                                f"it a weight of its own, merge_lora_weights(models, untie=True)")
        for layer in layers.values():
            if layer.effective.multipliers or layer.is_quantized:
                with exact():
                    layer.set_base(*layer.merged_sum())
            for name in layer.adapter_names:
                layer.remove_adapter(name)
        for network in components(models).values():
            convert_hosts(network)
    if hasattr(models, "source"):
        models.source = None  # they no longer match that file
    return models
