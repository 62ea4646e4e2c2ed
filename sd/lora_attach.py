"""Adapters on whole models: attach and remove them by name, and choose the active set.

`models` everywhere below is an nn.Module (the whole of it, or one network) or the Models that a loader returns.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch import Tensor

from sd.lora_active import NOTHING, ActiveSet, LoRAError
from sd.lora_attention import HOSTS, convert_hosts
from sd.lora_core import LoRALayer
from sd.lora_kinds import KINDS
from sd.lora_layers import as_lora_layer, check_rank, shape_of
from sd.lora_targets import NORMS, components, find_targets, lora_layers, named_layers
from sd.lora_variants import Adapter, Full


def adapter_names(models) -> list[str]:
    """Names of all adapters, active or not, in order."""
    return names_on(lora_layers(models).values())


def names_on(layers: Iterable[LoRALayer]) -> list[str]:
    return sorted({name for layer in layers for name in layer.adapter_names})


# ---- adding and removing ---------------------------------------------------------------------------------------------

@torch.inference_mode(False)  # whatever the caller is in, what is attached can be trained
def apply_lora_to_model(models, rank: int | Mapping[str, int] = 4, alpha: float | Mapping[str, float] = 1.0,
                        dropout: float = 0.0, target_modules=None, name: str = "default", *, kind: str = "lora",
                        dora: bool = False, rank_dropout: float = 0.0, module_dropout: float = 0.0, **options):
    """Attach a new, trainable adapter to every target layer, active at multiplier 1; no output changes by a bit.

    Of kind "lora", ΔW = alpha / rank · up · down, with up = 0 at the start; the other kinds and their options (such as
    `tucker` or `factor`) stand in KINDS. Norms, which have no low rank, get a full difference. `rank` bounds the rows of
    a block of oft and boft, whose constraint is `alpha`; ia3 and full have neither. Either may be a table {path: value},
    which has one for every target; a layer of rank 0 gets none. `dora` adds a trained magnitude.
    Returns `models`. Raises LoRAError, before anything changes, for a name in use, a rank below 1 or above
    min(in, out) of a layer, a target that matches nothing, or a layer without a LoRA form or without one of this kind.
    """
    _check_name(name)
    targets = find_targets(models, target_modules)
    if kind not in KINDS:
        raise LoRAError(f"adapter kind {kind!r} is unknown; allowed: {', '.join(KINDS)}")
    if dora and not KINDS[kind].takes_dora:
        having = ", ".join(k for k in KINDS if KINDS[k].takes_dora)
        raise LoRAError(f"dora does not go with kind {kind!r}; allowed: {having}")
    unknown = [option for option in options if option not in KINDS[kind].options]
    if unknown:
        raise LoRAError(f"kind {kind!r} has no option {unknown[0]!r}; it has {', '.join(KINDS[kind].options) or 'none'}")
    ranks, alphas = (value if isinstance(value, Mapping) else dict.fromkeys(targets, value) for value in (rank, alpha))
    targets = {path: layer for path, layer in targets.items() if not isinstance(rank, Mapping) or ranks[path] != 0}
    if name in adapter_names(models):
        raise LoRAError(f"an adapter named {name!r} is there already; remove_lora it first, or choose another name")
    refuse_bypassed(models, targets)
    new = {}
    for path, layer in targets.items():
        norm, shape = isinstance(layer, NORMS), shape_of(layer, path)
        if KINDS[kind].low_rank and not norm:
            check_rank(ranks[path], shape, path)
        if not _is_finite(alphas[path]):
            raise LoRAError(f"alpha is {alphas[path]!r}; a finite number is needed")
        try:
            if norm:  # it has no ranks to drop
                new[path] = Full(shape, dropout=dropout, module_dropout=module_dropout)
            else:
                new[path] = KINDS[kind](shape, ranks[path], alphas[path], dropout=dropout, rank_dropout=rank_dropout,
                                        module_dropout=module_dropout, **options)
        except ValueError as error:
            raise LoRAError(f"{path}: {error}") from None
    for path, adapter in new.items():
        if dora and not isinstance(targets[path], NORMS):
            adapter.start_magnitude(as_lora_layer(targets[path], path).base_weight())
    attach_adapters(models, targets, new, name, 1.0)
    return models


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise LoRAError(f"the name of an adapter is {name!r}; a string is needed")


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def attach_adapters(models, layers: Mapping[str, nn.Module], adapters: Mapping[str, Adapter], name: str,
                    multiplier: float) -> None:
    """Put the adapters on the layers of the same paths, as `name`, active; one of that name is replaced."""
    _check_name(name)
    with exclusive(models), torch.inference_mode(False):
        enabled = all(layer.lora_enabled for layer in lora_layers(models).values())
        if name in adapter_names(models):
            remove_lora(models, name)
        for path, adapter in adapters.items():
            as_lora_layer(layers[path], path).add_adapter(name, adapter, multiplier)
        for network in components(models).values():
            convert_hosts(network)
        set_lora_enabled(models, enabled)  # also on layers that had no adapter when it was switched


def refuse_bypassed(models, targets: Mapping[str, nn.Module]) -> None:
    """torch's own attention reads these layers' weights without calling them; where it has no LoRA class to prevent it, as a
    class of one's own made from it, an adapter would be ignored in silence."""
    for path, module in named_layers(models):
        if isinstance(module, tuple(HOSTS)) and type(module) not in (*HOSTS, *HOSTS.values()):
            for target in targets:
                if not path or target.startswith(path + "."):
                    raise LoRAError(f"{target} lies in a {type(module).__name__}, which can bypass its layers' forward; "
                                    f"LoRA on it would be ignored")


def remove_lora(models, name: str | None = None) -> None:
    """Take an adapter (None: all) off; the weights were never changed. Converted foreign layers become plain again."""
    with exclusive(models):
        layers = lora_layers(models).values()
        if name is not None:
            check_known(layers, [name])
        for layer in layers:
            for known in layer.adapter_names if name is None else [name]:
                if known in layer.adapter_names:
                    layer.remove_adapter(known)
        for network in components(models).values():
            convert_hosts(network)
        reports = getattr(models, "lora_reports", {})
        for gone in list(reports) if name is None else [name]:
            reports.pop(gone, None)


def get_lora_parameters(models, name: str | None = None) -> list[nn.Parameter]:
    """Parameters of one adapter; None: of all that were created here, not of those loaded from files."""
    layers = lora_layers(models).values()
    if name is not None:
        check_known(layers, [name])
    adapters = [(n, layer.adapter(n)) for layer in layers for n in layer.adapter_names]
    return [p for n, a in adapters if (n == name if name is not None else not a.from_file) for p in a.parameters()]


def unreached_layers(models, run: Callable[[], object]) -> list[str]:
    """Adapted layers that a probe forward `run()`, with all adapters on, does not call: they would be ignored in silence."""
    layers, reached = lora_layers(models), set()
    hooks = [layer.register_forward_pre_hook(lambda module, args, path=path: reached.add(path))
             for path, layer in layers.items()]
    try:
        with use_adapters(models, dict.fromkeys(adapter_names(models), 1.0)):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path in layers if path not in reached]


# ---- the active set --------------------------------------------------------------------------------------------------

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
    """Make exactly these adapters active, {"line": 0.8, "anime": Tensor[B]}; what was active returns at the end.

    A tensor holds one multiplier for each image of the batch; `rows` (long) says which image each row of a network
    call belongs to, by default row i is image i. Overrides `set_lora_enabled`. Raises LoRAError for an unknown name.
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
                if layer not in before:  # it got its first adapter inside, which was not active before
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
    """As `use_adapters`, but it stays."""
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
    """Hide all adapters, or bring them back with the multipliers they had."""
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
        values[name] = tuple(number.flatten().tolist()) if number.dim() else number.item()
        if not all(math.isfinite(v) for v in (values[name] if isinstance(values[name], tuple) else (values[name],))):
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
    values = {n: v for n, v in values.items() if (any(v) if isinstance(v, tuple) else v)}  # at 0 a layer is its base
    return ActiveSet(values, None if rows is None else tuple(rows.tolist()))


def check_known(layers: Iterable[LoRALayer], names: Iterable[str]) -> None:
    known = names_on(layers)
    for name in names:
        if name not in known:
            raise LoRAError(f"no adapter is named {name!r}; there {are_known(known)}")


def are_known(names: list[str]) -> str:
    return "are " + ", ".join(map(repr, names)) if names else "is none"


def checkpoint(function: Callable, *args):
    """Activation checkpointing that recomputes with the active sets of the forward, whatever is active by then."""
    contexts = (lambda: recomputation(function)) if isinstance(function, nn.Module) else torch.utils.checkpoint.noop_context_fn
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def recomputation(models):
    """The `context_fn` of torch's own checkpointing, for models that do it themselves: as in `checkpoint`."""
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
