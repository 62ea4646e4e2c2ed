"""Switching adapters: use_adapters, rows of a batch, locks, and activation checkpointing that keeps the active set."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import torch.nn as nn
import torch.utils.checkpoint
from torch import Tensor

from sd.adapters.active import NOTHING, ActiveSet
from sd.adapters.layer import LoRALayer
from sd.adapters.targets import components, lora_layers, named_layers
from sd.adapters.weights import LoRAError


def adapter_names(models) -> list[str]:
    """Names of all adapters, active or not, in order."""
    return names_on(lora_layers(models).values())


def names_on(layers: Iterable[LoRALayer]) -> list[str]:
    return sorted({name for layer in layers for name in layer.adapter_names})


# One lock per network in use, freed with it. Not an attribute of the network, since locks cannot be copied or pickled.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


@contextmanager
def exclusive(models):
    """Hold the networks' locks: a second thread waits, so two users never share an active set. Reentrant."""
    with _LOCKS_GUARD:
        locks = [_LOCKS.setdefault(m, threading.RLock()) for m in sorted(components(models).values(), key=id)]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield


@contextmanager
def use_adapters(models, multipliers: Mapping[str, float | Tensor], *, rows: Tensor | None = None):
    """Make exactly these adapters active, {"line": 0.8, "anime": Tensor[B]}; the previous set is restored at the end.

    A tensor holds one multiplier for each image of the batch; `rows` (long) says which image each row of a network
    call belongs to; by default row i is image i. Overrides `set_lora_enabled`. Raises LoRAError for an unknown name.
    """
    with exclusive(models):
        layers = list(lora_layers(models).values())
        active = _active_set(models, layers, multipliers, rows)
        try:
            with _restoring(layers):
                for layer in layers:
                    layer.lora_enabled = True
                    layer.set_active(active)
                yield
        finally:
            before = set(layers)
            for layer in lora_layers(models).values():
                if layer not in before:  # it got its first adapter inside: nothing was active before
                    layer.set_active(NOTHING)


@contextmanager
def use_rows(models, rows: Tensor):
    """Say which image each row of the network calls inside belongs to; matters only where multipliers differ by image."""
    layers = [layer for layer in lora_layers(models).values() if layer.active.per_image]
    for m in {m for layer in layers for m in layer.multipliers.values() if isinstance(m, tuple)}:
        if int(rows.max()) >= len(m):
            raise LoRAError(f"rows name image {int(rows.max())}, but multipliers are given for {len(m)} images")
    with _restoring(layers):
        for layer in layers:
            layer.set_active(ActiveSet(layer.multipliers, tuple(rows.tolist())))
        yield


@contextmanager
def _restoring(layers: Iterable[LoRALayer]):
    before = [(layer, layer.active, layer.lora_enabled) for layer in layers]
    try:
        yield
    finally:
        for layer, active, enabled in before:
            if isinstance(layer, LoRALayer):  # else its last adapter was removed inside
                layer.set_active(active)
                layer.lora_enabled = enabled


def set_adapters(models, multipliers: Mapping[str, float | Tensor]) -> None:
    """Like `use_adapters`, but permanent."""
    with exclusive(models):
        layers = list(lora_layers(models).values())
        active = _active_set(models, layers, multipliers, None)
        for layer in layers:
            layer.set_active(active)


def active_multipliers(models) -> dict[str, float | tuple[float, ...]]:
    """The present active set over all layers: {} when nothing is active or LoRA is switched off."""
    found: dict[str, float | tuple[float, ...]] = {}
    for layer in lora_layers(models).values():
        if layer.lora_enabled:
            found |= layer.multipliers
    return dict(sorted(found.items()))


def set_lora_enabled(models, enabled: bool) -> None:
    """Hide all adapters, or show them again with the multipliers they had."""
    with exclusive(models):
        for layer in lora_layers(models).values():
            layer.lora_enabled = bool(enabled)


def _active_set(models, layers: Iterable[LoRALayer], multipliers: Mapping[str, float | Tensor],
                rows: Tensor | None) -> ActiveSet:
    check_known(layers, multipliers)
    values: dict[str, float | tuple[float, ...]] = {}
    for name, m in multipliers.items():
        try:
            number = torch.as_tensor(m, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise LoRAError(f"the multiplier of {name!r} is {m!r}; a number is needed, or one for each image") from None
        if not number.numel():
            raise LoRAError(f"the multiplier of {name!r} has no values; a number is needed, or one for each image")
        numbers = number.flatten().tolist()
        values[name] = tuple(numbers) if number.dim() else numbers[0]
        if not all(map(math.isfinite, numbers)):
            raise LoRAError(f"the multiplier of {name!r} is {values[name]}; a finite number is needed")
    lengths = {len(v) for v in values.values() if isinstance(v, tuple)}
    if len(lengths) > 1:
        raise LoRAError(f"multipliers are given for batches of {' and '.join(map(str, sorted(lengths)))} images")
    if rows is not None and lengths and not 0 <= int(rows.min()) <= int(rows.max()) < min(lengths):
        raise LoRAError(f"rows name images {int(rows.min())} to {int(rows.max())}, the batch has {min(lengths)}")
    for path, module in named_layers(models) if lengths else ():
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and not module.batch_first:
            raise LoRAError(f"{path} is made with batch_first=False, so the rows around it are positions and not images; "
                            f"multipliers that differ from image to image need batch_first=True")
    values = {n: v for n, v in values.items() if (any(v) if isinstance(v, tuple) else v)}  # 0 is off
    return ActiveSet(values, None if rows is None else tuple(rows.tolist()))


def check_known(layers: Iterable[LoRALayer], names: Iterable[str]) -> None:
    layers = list(layers)
    for name in names:
        if not any(layer.has_adapter(name) for layer in layers):
            raise LoRAError(f"no adapter is named {name!r}; loaded: {', '.join(map(repr, names_on(layers))) or 'none'}")


def checkpoint(function: Callable, *args):
    """Activation checkpointing that recomputes with the active sets of the forward, whatever is active by then."""
    contexts = (lambda: recomputation(function)) if isinstance(function, nn.Module) else torch.utils.checkpoint.noop_context_fn
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def recomputation(models):
    """The contexts for torch's `context_fn`, for models that checkpoint on their own: as in `checkpoint`."""
    layers = list(lora_layers(models).values())
    sets = [(layer, layer.active, layer.lora_enabled) for layer in layers]

    @contextmanager
    def as_in_forward():
        with _restoring(layers):
            for layer, active, enabled in sets:
                layer.set_active(active)
                layer.lora_enabled = enabled
            yield

    return nullcontext(), as_in_forward()
