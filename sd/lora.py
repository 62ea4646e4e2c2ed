"""LoRA on whole models: the face of all of it, and merging, saving and loading.

`models` everywhere below is an nn.Module (the whole of it, or one network) or the Models that a loader returns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor

from sd import checkpoint as files
from sd.embeddings import EmbeddingError
from sd.lora_active import ActiveSet, LoRAError  # noqa: F401 (what is not used here is part of this module's face)
from sd.lora_attach import (  # noqa: F401
    active_multipliers,
    adapter_names,
    apply_lora_to_model,
    are_known,
    attach_adapters,
    check_known,
    checkpoint,
    exclusive,
    get_lora_parameters,
    names_on,
    recomputation,
    refuse_bypassed,
    remove_lora,
    set_adapters,
    set_lora_enabled,
    unreached_layers,
    use_adapters,
    use_rows,
)
from sd.lora_attention import convert_hosts
from sd.lora_blocks import BlockWeights, block_multipliers
from sd.lora_core import LoRALayer, exact  # noqa: F401
from sd.lora_files import LoRAFile, read_lora
from sd.lora_formats import AdapterWeights, LoRAFormatError, guess_file
from sd.lora_kinds import KINDS
from sd.lora_layers import (  # noqa: F401
    LORA_CLASSES,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAEmbedding,
    LoRAGroupNorm,
    LoRALayerNorm,
    LoRALinear,
    as_lora_layer,
    check_rank,
    register_lora_layer,
    shape_of,
)
from sd.lora_targets import (  # noqa: F401
    NORMS,
    TARGET_PRESETS,
    adaptable_layers,
    components,
    find_targets,
    layer_shapes,
    lora_layers,
    modules_of,
    named_layers,
)
from sd.lora_variants import Adapter, Full, LayerShape, LowRank  # noqa: F401
from sd.lora_writers import write_lora

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


def tied_layers(models) -> dict[str, list[str]]:
    """Path of an adapted layer -> the other modules that share a parameter with it, which its adapters do not change."""
    owners: dict[int, dict[int, str]] = {}  # parameter -> its modules
    for path, module in named_layers(models):
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), {})[id(module)] = path
    found: dict[str, list[str]] = {}
    for path, layer in lora_layers(models).items():
        base = getattr(layer, "attention", layer)  # of a projection, who has its parameters
        others = {other: at for p in layer.base_tensors() for other, at in owners.get(id(p), {}).items() if other != id(base)}
        if others:
            found[path] = sorted(others.values())
    return found


def merge_lora_weights(models, *, untie: bool = False):
    """Merge the active set for good and remove all adapters: a plain model with the base checkpoint's keys. Returns it.

    Raises LoRAError when nothing is active, when LoRA is switched off, when multipliers differ by image, or where a layer
    shares its weight with another module (`tied_layers`), unless `untie` lets it have one of its own from then on.
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
    names = names_on(layers.values())
    if name is None:
        if len(names) != 1:
            raise LoRAError(f"name the adapter to save; there {are_known(names)}")
        name = names[0]
    check_known(layers.values(), [name])
    return {path: layer.adapter(name).weights() for path, layer in layers.items() if name in layer.adapter_names}


@torch.inference_mode(False)
def attach_state(models, state: Mapping[str, AdapterWeights], name: str, multiplier: float = 1.0,
                 where: str = "the LoRA") -> None:
    """Attach loaded weights as adapter `name`, active; one of that name is replaced. Raises before it changes."""
    if not math.isfinite(multiplier):
        raise LoRAError(f"the multiplier of {name!r} is {multiplier}; a finite number is needed")
    by_path = adaptable_layers(models)
    refuse_bypassed(models, {path: by_path[path] for path in state})
    new, misfits = {}, []
    for path, weights in state.items():
        try:
            new[path] = loaded_adapter(weights, by_path[path], path)
        except ValueError as error:
            misfits.append(f"{path}: {error}")
    if misfits:
        raise LoRAFormatError(f"{where}: {len(misfits)} of {len(state)} LoRA modules do not fit this model, "
                              f"first: {misfits[0]}")
    attach_adapters(models, by_path, new, name, multiplier)


def loaded_adapter(weights: AdapterWeights, layer: nn.Module, path: str) -> Adapter:
    """A frozen adapter for the layer. Raises ValueError, such as LoRAFormatError, where the weights do not fit it."""
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


def _stamp(path) -> tuple[int, int] | None:
    return (os.stat(path).st_size, os.stat(path).st_mtime_ns) if os.path.isfile(path) else None
