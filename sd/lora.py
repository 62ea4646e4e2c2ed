"""LoRA on whole models: attach adapters by name, choose the active set, merge and unmerge, save and load.

`models` everywhere below is an nn.Module (the whole of it, or one network) or the Models that a loader returns.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch import Tensor

from sd import checkpoint as files
from sd.embeddings import EmbeddingError
from sd.lora_blocks import BlockWeights, block_multipliers
from sd.lora_files import LoRAFile, read_lora
from sd.lora_formats import AdapterWeights, LoRAFormatError, Modules, guess_file
from sd.lora_kinds import KINDS
from sd.lora_layers import (  # noqa: F401 (the layers are part of this module's face)
    LORA_CLASSES,
    NOTHING,
    ActiveSet,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRAError,
    LoRAGroupNorm,
    LoRALayer,
    LoRALayerNorm,
    LoRALinear,
    as_lora_layer,
    check_rank,
    exact,
    shape_of,
)
from sd.lora_variants import Adapter, Full, LayerShape, LowRank  # noqa: F401
from sd.lora_writers import write_lora
from sd.names import component_names

NORMS = (nn.GroupNorm, nn.LayerNorm)

# Which layers a preset means, as regular expressions over canonical module paths.
TARGET_PRESETS = {
    "attn": r"\.(attn1|attn2|attention)\.(q|k|v|out)_proj$",  # 128 layers of the UNet of SD 1.x
    "kohya": r"\.(attn1|attn2|attention)\.(q|k|v|out)_proj$|\.(ff|mlp)\.fc[12]$|\.attentions\.\d+\.proj_(in|out)$",
    "full": r"^(?!.*\.conv_(in|out)$).*$",  # every linear layer and convolution but the first and the last
}


# ---- which layers ----------------------------------------------------------------------------------------------------

def components(models) -> dict[str, nn.Module]:
    """The networks of `models` under the prefix of their paths: {"diffusion": UNet, ...}; a foreign module has none."""
    if isinstance(models, nn.Module):
        return {getattr(models, "component", ""): models}
    return {key: m for key, m in models.items() if isinstance(m, nn.Module)}


def named_layers(models) -> Iterator[tuple[str, nn.Module]]:
    """(canonical path, module) of every module, such as "diffusion.mid_block.attentions.0.proj_in"."""
    for component, network in components(models).items():
        for name, module in network.named_modules():
            yield ".".join(part for part in (component, name) if part), module


def lora_layers(models) -> dict[str, LoRALayer]:
    """Canonical path -> every layer that carries an adapter."""
    return {path: m for path, m in named_layers(models) if isinstance(m, LoRALayer) and m.adapters}


def adapter_names(models) -> list[str]:
    """Names of all adapters, active or not, in order."""
    return _names_on(lora_layers(models).values())


def _names_on(layers: Iterable[LoRALayer]) -> list[str]:
    return sorted({name for layer in layers for name in layer.adapter_names})


def find_targets(models, target_modules: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Layers that the targets mean: a preset ("attn", "kohya", "full"), names of whole path components, or regular expressions.

    A plain name such as "q_proj" or "down_blocks.0" matches whole components of the path, never a part of one; norms
    and embeddings are taken only when a target names them at the end of their path. None is "attn".
    Raises LoRAError for a target that matches nothing.
    """
    targets = [target_modules or "attn"] if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    if not targets:
        raise LoRAError("target_modules is empty; name a preset (attn, kohya, full), module names or regular expressions")
    layers = {path: m for path, m in named_layers(models) if isinstance(m, (*LORA_CLASSES, LoRALayer))}
    vae_is_meant = components(models).keys() <= {"encoder", "decoder"}  # a preset on a whole model leaves the VAE alone
    found: dict[str, nn.Module] = {}
    for target in targets:
        matched = {path: m for path, m in layers.items() if _matches(target, path, m)
                   and (vae_is_meant or target not in TARGET_PRESETS or not path.startswith(("encoder.", "decoder.")))}
        if not matched:
            parts = sorted({part for path in layers for part in path.split(".") if not part.isdigit()})
            near = difflib.get_close_matches(target, parts, n=3) or parts[:12]
            raise LoRAError(f"target {target!r} matches no layer; names in this model are such as {', '.join(near)}; "
                            f"presets are {', '.join(TARGET_PRESETS)}")
        found |= matched
    return {path: m for path, m in layers.items() if path in found}  # in the model's order


def _matches(target: str, path: str, module: nn.Module) -> bool:
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if target in TARGET_PRESETS:
        return isinstance(module, plain) and re.search(TARGET_PRESETS[target], path) is not None
    if re.fullmatch(r"[\w.-]+", target):
        if f".{path}".endswith(f".{target}"):
            return True
        return isinstance(module, plain) and f".{target}." in f".{path}."
    try:
        return re.search(target, path) is not None
    except re.error as error:
        raise LoRAError(f"target {target!r} is not a regular expression: {error}") from None


# ---- adding and removing ---------------------------------------------------------------------------------------------

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
    for value in {alphas[path]: None for path in targets}:
        if not math.isfinite(value):
            raise LoRAError(f"alpha is {value}; a finite number is needed")
    if name in adapter_names(models):
        raise LoRAError(f"an adapter named {name!r} is there already; remove_lora it first, or choose another name")
    _refuse_bypassed(models, targets)
    new = {}
    for path, layer in targets.items():
        norm, shape = isinstance(layer, NORMS), shape_of(layer, path)
        if KINDS[kind].low_rank and not norm:
            check_rank(ranks[path], shape, path)
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
    _attach(models, targets, new, name, 1.0)
    return models


def _attach(models, layers: Mapping[str, nn.Module], adapters: Mapping[str, Adapter], name: str, multiplier: float) -> None:
    with exclusive(models), torch.inference_mode(False):
        enabled = all(layer.lora_enabled for layer in lora_layers(models).values())
        if name in adapter_names(models):
            remove_lora(models, name)
        for path, adapter in adapters.items():
            as_lora_layer(layers[path], path).add_adapter(name, adapter, multiplier)
        set_lora_enabled(models, enabled)  # also on layers that had no adapter when it was switched


def _refuse_bypassed(models, targets: Mapping[str, nn.Module]) -> None:
    """torch's own attention reads these layers' weights without calling them: an adapter would be ignored in silence."""
    for path, module in named_layers(models):
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            for target in targets:
                if not path or target.startswith(path + "."):
                    raise LoRAError(f"{target} lies in a {type(module).__name__}, which can bypass its layers' forward; "
                                    f"LoRA on it would be ignored")


def remove_lora(models, name: str | None = None) -> None:
    """Take an adapter (None: all) off; the weights were never changed. Converted foreign layers become plain again."""
    with exclusive(models):
        layers = lora_layers(models).values()
        if name is not None:
            _check_known(layers, [name])
        for layer in layers:
            for known in layer.adapter_names if name is None else [name]:
                if known in layer.adapter_names:
                    layer.remove_adapter(known)
        reports = getattr(models, "lora_reports", {})
        for gone in list(reports) if name is None else [name]:
            reports.pop(gone, None)


def get_lora_parameters(models, name: str | None = None) -> list[nn.Parameter]:
    """Parameters of one adapter; None: of all that were created here, not of those loaded from files."""
    layers = lora_layers(models).values()
    if name is not None:
        _check_known(layers, [name])
    adapters = [(n, layer.adapter(n)) for layer in layers for n in layer.adapter_names]
    return [p for n, a in adapters if (n == name if name is not None else not a.from_file) for p in a.parameters()]


def unreached_layers(models, run: Callable[[], object]) -> list[str]:
    """Adapted layers that a probe forward `run()` does not call: their adapters would be ignored in silence."""
    layers, reached = lora_layers(models), set()
    hooks = [layer.register_forward_pre_hook(lambda module, args, path=path: reached.add(path))
             for path, layer in layers.items()]
    try:
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
        active = _active_set(layers, multipliers, rows)
        try:
            with _restoring(layers):
                for layer in layers:
                    layer.lora_enabled = True
                    layer.set_active(active)
                yield
        finally:
            for layer in lora_layers(models).values():
                if layer not in layers:  # it got its first adapter inside, which was not active before
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
        active = _active_set(layers, multipliers, None)
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


def _active_set(layers: Iterable[LoRALayer], multipliers: Mapping[str, float | Tensor], rows: Tensor | None) -> ActiveSet:
    _check_known(layers, multipliers)
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
    values = {n: v for n, v in values.items() if (any(v) if isinstance(v, tuple) else v)}  # at 0 a layer is its base
    return ActiveSet(values, None if rows is None else tuple(rows.tolist()))


def _check_known(layers: Iterable[LoRALayer], names: Iterable[str]) -> None:
    known = _names_on(layers)
    for name in names:
        if name not in known:
            raise LoRAError(f"no adapter is named {name!r}; there {_are(known)}")


def _are(names: list[str]) -> str:
    return "are " + ", ".join(map(repr, names)) if names else "is none"


def checkpoint(function: Callable, *args):
    """Activation checkpointing that recomputes with the active sets of the forward, whatever is active by then."""
    layers = list(lora_layers(function).values()) if isinstance(function, nn.Module) else []
    sets = [(layer, layer.active, layer.lora_enabled) for layer in layers]

    @contextmanager
    def as_in_forward():
        with _restoring(layers):
            for layer, active, enabled in sets:
                layer.set_active(active)
                layer.lora_enabled = enabled
            yield

    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False,
                                             context_fn=lambda: (nullcontext(), as_in_forward()))


# ---- merging ---------------------------------------------------------------------------------------------------------

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
    """‖round(W + ΔW) - W - ΔW‖ / ‖ΔW‖ over all active layers: what merging in the weights' dtype loses of the change."""
    lost = change = 0.0
    with exact():
        for layer in lora_layers(models).values():
            if layer.effective.multipliers and layer.lora_enabled:
                W, (total, _) = layer.base_weight(), layer.merged_sum()
                delta = sum(m * layer.adapter(name).effective_delta(W).double()
                            for name, m in layer.effective.multipliers.items())
                lost += (total.to(layer.weight.dtype).double() - W.double() - delta).square().sum().item()
                change += delta.square().sum().item()
    return math.sqrt(lost / change) if change else 0.0


def merge_lora_weights(models):
    """Merge the active set for good and remove all adapters: a plain model with the base checkpoint's keys. Returns it.

    Raises LoRAError when nothing is active, when LoRA is switched off, or when multipliers differ by image.
    """
    with exclusive(models):
        layers = lora_layers(models)
        if not any(layer.multipliers for layer in layers.values()):
            raise LoRAError("there is nothing to merge: no adapter is active")
        if not all(layer.lora_enabled for layer in layers.values()):
            raise LoRAError("LoRA is switched off; set_lora_enabled(models, True) before merging, or remove_lora to drop it")
        if any(layer.active.per_image for layer in layers.values()):
            raise LoRAError("multipliers that differ from image to image cannot be merged into one weight")
        for layer in layers.values():
            with exact():
                weight, bias = layer.merged_sum()
            # New parameters, not writes into the old: a tensor tied to another layer stays what it was there.
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
            for name in layer.adapter_names:
                layer.remove_adapter(name)
    if hasattr(models, "source"):
        models.source = None  # they are no longer what that file holds
    return models


# ---- files -----------------------------------------------------------------------------------------------------------

@dataclass
class LoadReport:
    """What became of a LoRA file: every tensor of it is counted, in `tensors` (applied) or in `skipped` (asked for)."""

    name: str
    file: str
    format: str
    base: str  # the family that the file's metadata names, or ""
    modules: dict[str, int]  # component -> modules matched
    kinds: list[str]
    ranks: list[int]
    alphas: list[float]
    tensors: int
    skipped: list[str] = field(default_factory=list)
    trigger_words: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)  # block -> its multiplier, where it is not 1
    words: list[str] = field(default_factory=list)  # learned words that it brought for prompts
    stamp: tuple[int, int] | None = None  # size and time of the file when it was read

    @property
    def hash(self) -> str | None:
        """That of the file that was loaded; None once another lies in its place, or it never was a file."""
        return files.lora_hash(self.file) if self.stamp is not None and self.stamp == _stamp(self.file) else None

    def __str__(self) -> str:
        where = ", ".join(f"{n} in {component or 'the model'}" for component, n in self.modules.items())
        ranks, alphas = ("/".join(f"{v:g}" for v in values) or "-" for values in (self.ranks, self.alphas))
        kinds = "" if self.kinds == ["lora"] else f" ({', '.join(self.kinds)})"
        text = f"LoRA {self.name!r}: {self.format}{kinds}{f' for {self.base}' if self.base else ''}, {where}, rank {ranks}, " \
               f"alpha {alphas}, {self.tensors} tensors applied"
        if self.skipped:
            text += f", {len(self.skipped)} skipped as asked"
        if self.blocks:
            text += ", blocks " + ", ".join(f"{block} {m:g}" for block, m in self.blocks.items())
        if self.words:
            text += f", learned words: {', '.join(self.words)}"
        return text + (f", trigger words: {', '.join(self.trigger_words)}" if self.trigger_words else "")


def lora_state(models, name: str | None = None) -> dict[str, AdapterWeights]:
    """{canonical module path: weights} of one adapter; None: the only one there is."""
    layers = lora_layers(models)
    names = _names_on(layers.values())
    if name is None:
        if len(names) != 1:
            raise LoRAError(f"name the adapter to save; there {_are(names)}")
        name = names[0]
    _check_known(layers.values(), [name])
    return {path: layer.adapter(name).weights() for path, layer in layers.items() if name in layer.adapter_names}


def attach_state(models, state: Mapping[str, AdapterWeights], name: str, multiplier: float = 1.0,
                 where: str = "the LoRA") -> None:
    """Attach loaded weights as adapter `name`, active; one of that name is replaced. Raises before it changes."""
    if not math.isfinite(multiplier):
        raise LoRAError(f"the multiplier of {name!r} is {multiplier}; a finite number is needed")
    by_path = dict(named_layers(models))
    _refuse_bypassed(models, {path: by_path[path] for path in state})
    new, misfits = {}, []
    for path, weights in state.items():
        try:
            new[path] = _loaded_adapter(weights, by_path[path], path)
        except ValueError as error:
            misfits.append(f"{path}: {error}")
    if misfits:
        raise LoRAFormatError(f"{where}: {len(misfits)} of {len(state)} LoRA modules do not fit this model, "
                              f"first: {misfits[0]}")
    _attach(models, by_path, new, name, multiplier)


def _loaded_adapter(weights: AdapterWeights, layer: nn.Module, path: str) -> Adapter:
    shape = shape_of(layer, path)
    adapter = KINDS[weights.kind].from_weights(weights, shape)
    bias = getattr(layer, "bias", None)
    if bias is None and adapter.bias_delta(bias) is not None:
        raise LoRAFormatError("it changes a bias that the layer does not have")
    adapter.from_file = True
    return adapter.requires_grad_(False)


def save_lora_weights(models, path: str | os.PathLike, name: str | None = None, *, metadata: Mapping[str, str] | None = None,
                      dtype: torch.dtype | None = None, format: str = "kohya") -> None:
    """Write one adapter (None: the only one), alpha and metadata included; atomic. `format`: see `sd.lora_writers`.

    The file is safetensors; in kohya's spelling a path that ends in `.pt` is written as a flat dict of tensors by
    torch.save, readable with weights_only.
    """
    write_lora(path, lora_state(models, name), modules_of(models), format=format, dtype=dtype, metadata=metadata)


def load_lora_weights(models, path: str | os.PathLike | Mapping[str, Tensor], name: str = "default",
                      multiplier: float = 1.0, *, skip: str | None = None,
                      block_weights: Mapping[str, float] | Sequence[float] | str | None = None) -> LoadReport:
    """Read a LoRA of any program and attach it as `name`, active; one of that name is replaced, whatever its rank.

    `path`: a file, a folder of PEFT or diffusers, or tensors in memory. `skip`: a regular expression over keys and module
    paths to leave out. `block_weights`: see `sd.lora_blocks`. Learned words of the prompt beside the LoRA are learned by the
    text encoder and stay until `remove_embedding`. Every tensor is applied or left out by `skip`; else LoRAFormatError names
    the first that cannot be and what the file seems to be.
    """
    modules, clip = modules_of(models), components(models).get("clip")
    found = read_lora(path, modules, skip=skip, words=hasattr(clip, "learned"))
    blocks = block_multipliers(block_weights, modules)
    with exclusive(models):  # until the block weights are set nobody computes with it
        if found.words:
            _check_words(found, clip)
        try:
            attach_state(models, found.state, name, multiplier, found.path.name)
        except LoRAFormatError as error:
            raise LoRAFormatError(f"{error}; {guess_file(found.file)}") from None
        for layer_path, layer in lora_layers(models).items() if blocks else ():
            if layer_path in found.state:
                layer.set_block_multiplier(name, blocks.of(layer_path))
        if found.words:
            clip.learn(found.words)
    return report_of(found, name, components(models), blocks)


def _check_words(found: LoRAFile, clip: nn.Module) -> None:
    """Raises before anything changes."""
    try:
        clip.learned.new(found.words)
    except EmbeddingError as error:
        raise LoRAFormatError(f"{found.path.name}: {error}; skip leaves a word out, by its name") from None


def report_of(found: LoRAFile, name: str, networks: Iterable[str] = (), blocks: BlockWeights | None = None) -> LoadReport:
    """The report on a file that was read."""
    state, counts = found.state, {}
    for module in state:
        component = module.split(".")[0] if module.split(".")[0] in networks else ""
        counts[component] = counts.get(component, 0) + 1
    return LoadReport(name, os.fspath(found.path), found.format, found.base, counts, sorted({w.kind for w in state.values()}),
                      sorted({w.rank for w in state.values() if w.rank}),
                      sorted({w.alpha for w in state.values() if w.alpha is not None}), found.tensors, found.skipped,
                      found.trigger_words, found.metadata, dict(blocks.given) if blocks else {}, list(found.words),
                      _stamp(found.path))


def modules_of(models) -> Modules:
    """What a reader of LoRA files must know of these models (on the meta device they suffice)."""
    layers = {path: m for path, m in named_layers(models) if isinstance(m, (*LORA_CLASSES, LoRALayer)) and m.weight is not None}
    return Modules(_names(models), {path: tuple(m.weight.shape) for path, m in layers.items()},
                   frozenset(path for path, m in layers.items() if isinstance(m, nn.Embedding)))


def layer_shapes(models) -> dict[str, LayerShape]:
    """Path -> LayerShape of every layer that can carry an adapter."""
    return {path: shape_of(m, path) for path, m in named_layers(models)
            if isinstance(m, LoRALayer) or type(m) in LORA_CLASSES and m.weight is not None}


def _stamp(path) -> tuple[int, int] | None:
    return (os.stat(path).st_size, os.stat(path).st_mtime_ns) if os.path.isfile(path) else None


def _names(models):
    return [name for component, network in components(models).items() if getattr(network, "component", None) == component
            for name in component_names(component, network.config)]
