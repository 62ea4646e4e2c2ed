"""The modules of a model, without the adapters on its layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn as nn

from sd.adapters.layer import LoRALayer


def walk(network: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, in the same order, but not into the adapters of layers, of which there may be many."""
    todo, seen = [("", network)], set()
    while todo:
        name, module = todo.pop()
        if remove_duplicate and module in seen:
            continue
        seen.add(module)
        yield name, module
        apart = "adapters" if isinstance(module, LoRALayer) else None
        todo += [(f"{name}.{key}" if name else key, child) for key, child in reversed(module._modules.items())
                 if child is not None and key != apart]
