"""LoRA on any model from a config in the format of lora_wrapper or LoRAW, with the same adapters as everywhere else."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sd.adapters.adapter import Adapter, at_least_fp32
from sd.adapters.attach import apply_lora_to_model, attach_state, lora_state, remove_lora
from sd.adapters.layer import LoRALayer
from sd.adapters.layers import as_lora_layer, shape_of
from sd.adapters.low_rank import LowRank
from sd.adapters.switch import adapter_names, exclusive, set_adapters
from sd.adapters.targets import NORMS, TARGET_PRESETS, adaptable_layers, components, find_targets, layer_shapes, lora_layers
from sd.adapters.weights import AdapterWeights, LayerShape, LoRAError
from sd.errors import SDError
from sd.lora_files.modules import modules_of
from sd.lora_files.read import LoadReport, read_lora, report_of
from sd.tools.decompose import Approximation, RankRule
from sd.tools.extract import ExtractReport, Layer, extract
from sd.tools.merge import merge_loras

MODULE = ("r", "scale", "trainable_scale", "hard", "lr")
LORAW_FIELDS = ("component_whitelist", "multiplier", "rank", "alpha", "dropout", "module_dropout", "lr", "weight_decompose")


@dataclass
class AppliedConfig:
    """What a config did; stored in `models.lora_configs` under the adapter's name."""

    modules: dict[str, str]  # path of each layer -> the name in the config that applies to it
    rates: dict[str, float | None]  # path -> its learning rate; None where the config has none
    train_base: bool = False
    clipped: dict[str, int] = field(default_factory=dict)  # path -> its rank, where the layer's size limits it


class ScaledLowRank(LowRank):
    """LoRA with a trained factor: ΔW = scale · alpha / R · up · down. In files the factor is part of `up`."""

    def __init__(self, shape: LayerShape, rank: int, alpha: float | None = None, **options):
        super().__init__(shape, rank, alpha, **options)
        self.trained_scale = nn.Parameter(torch.ones(()))

    @classmethod
    @torch.inference_mode(False)
    def of(cls, adapter: Adapter, shape: LayerShape, scale: float) -> ScaledLowRank:
        """Copy another LoRA and add the factor."""
        weights = adapter.weights()
        weights.tensors["trained_scale"] = torch.tensor(scale, device=weights.tensors["up"].device)
        return cls.from_weights(weights, shape)

    @torch.no_grad()
    def restart(self, shape: LayerShape) -> None:
        """Keep the factor: at 0 neither it nor `up`, which starts at 0, would ever learn."""
        scale = self.trained_scale.clone()
        super().restart(shape)
        self.trained_scale.copy_(scale)

    def whole_up(self, dtype: torch.dtype) -> Tensor:
        return super().whole_up(dtype) * self.trained_scale.to(dtype)

    def weights(self) -> AdapterWeights:
        weights = super().weights()
        scale = weights.tensors.pop("trained_scale")
        weights.tensors["up"] = weights.tensors["up"] * scale
        return weights


# ---- wrapping ----------------------------------------------------------------------------------------------------------

def apply_lora_config(models, config: str | os.PathLike | Mapping, name: str = "default") -> AppliedConfig:
    """Attach the new adapter `name` that a config, a JSON file or its content, describes; outputs stay bit-identical.

    lora_wrapper's format: {"trainable_model": 0, "attn.to_v": {"r": 8, "scale": 1, "trainable_scale": 0, "hard": 1}}, with
    ΔW = scale · up · down. A name matches whole components of the path, at its end or around the layer; the name with
    more components wins, r = 0 leaves a layer out, an optional `lr` is the learning rate of these layers. `hard` and
    soft are the same function here: a kernel [out, in·k] that is a product of two matrices is a convolution of the
    layer's own form to R channels, followed by a 1x1.
    LoRAW's format: `component_whitelist`, `rank`, and `multiplier`, `alpha`, `dropout`, `module_dropout`, `lr`,
    `weight_decompose`, with ΔW = multiplier · alpha / R · up · down; alpha absent or 0 means the rank, and R is limited by
    the layer's size. Either may be the `lora` section of a larger config.
    Raises LoRAError, before anything changes, for an unknown or missing option, a value of the wrong type, a name that
    applies to no layer, two names of equal length for one layer, and whatever `apply_lora_to_model` raises it for.
    """
    where, config = _read(config)
    section = config.get("lora")
    if isinstance(section, Mapping) and "r" not in section:
        config = section
    if name in adapter_names(models):
        raise LoRAError(f"an adapter named {name!r} already exists; remove_lora it first, or choose another name")
    loraw = any(not isinstance(value, Mapping) for key, value in config.items() if key in LORAW_FIELDS)  # else a module
    try:
        applied = (_apply_loraw if loraw else _apply_wrapper)(models, config, name)
    except LoRAError as error:
        raise LoRAError(f"{where}: {error}") from None
    models.lora_configs = getattr(models, "lora_configs", {}) | {name: applied}
    return applied


def _read(config: str | os.PathLike | Mapping) -> tuple[str, Mapping]:
    if isinstance(config, Mapping):
        return "the LoRA config", config
    if not isinstance(config, str | os.PathLike):
        raise LoRAError(f"the LoRA config is {config!r}; a JSON file or its content, a dict, is needed")
    where = os.fspath(config)
    try:
        with open(where, encoding="utf-8") as file:
            found = json.load(file, object_pairs_hook=_once)
    except OSError as error:
        raise LoRAError(f"{where}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise LoRAError(f"{where}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise LoRAError(f"{where}: holds no names with values")
    return where, found


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise SDError(f"{next(n for n in names if names.count(n) > 1)!r} is given twice")
    return found


def _apply_wrapper(models, config: Mapping, name: str) -> AppliedConfig:
    train_base = _flag(config, "trainable_model", "")
    modules = {key: value for key, value in config.items() if key != "trainable_model"}
    if not modules:
        raise LoRAError(f"it names no module and is not a LoRAW config ({', '.join(LORAW_FIELDS)})")
    options = {key: _module(key, value) for key, value in modules.items()}
    owners = _owners({key: _named(models, key) for key in modules})
    owners = {path: key for path, key in owners.items() if options[key]["r"]}
    if not owners:
        raise LoRAError("every r is 0, so no layer gets a LoRA")
    ranks = {path: options[key]["r"] for path, key in owners.items()}
    scales = {path: options[key]["scale"] for path, key in owners.items()}
    trained = {path for path, key in owners.items() if options[key]["trainable_scale"]}
    targets = find_targets(models, _exactly(owners))
    for path in sorted(owners):
        if isinstance(targets[path], NORMS) and (path in trained or scales[path] != 1):
            raise LoRAError(f"{owners[path]!r} is a norm, whose change is a full difference without a factor; "
                            f"trainable_scale must be 0 and scale 1")
    alphas = {path: float(r) if path in trained else r * scales[path] for path, r in ranks.items()}
    apply_lora_to_model(models, ranks, alphas, target_modules=_exactly(owners), name=name)
    layers = lora_layers(models)
    for path in trained:
        layer = layers[path]
        layer.add_adapter(name, ScaledLowRank.of(layer.adapter(name), layer.lora_shape(), scales[path]))
    return AppliedConfig(owners, {path: options[key]["lr"] for path, key in owners.items()}, train_base)


def _module(key: str, options: object) -> dict:
    if not isinstance(options, Mapping):
        raise LoRAError(f"{key!r} is {options!r}; a module's options are needed: {', '.join(MODULE)}")
    _known(options, MODULE, f"{key!r}: ")
    r, scale = options.get("r"), _number(options, "scale", 1.0, f"{key!r}: ")
    if type(r) is not int or r < 0:
        raise LoRAError(f"{key!r}: r is {r!r}; allowed: whole numbers from 1, and 0 to leave the module out")
    if not scale:
        raise LoRAError(f"{key!r}: scale is 0, with which nothing can be learned; another number is needed")
    _flag(options, "hard", f"{key!r}: ")
    return {"r": r, "scale": scale, "trainable_scale": _flag(options, "trainable_scale", f"{key!r}: "),
            "lr": _rate(options, f"{key!r}: ")}


def _named(models, key: str) -> dict[str, nn.Module]:
    """Layers that a module name matches; norms and embeddings only if it is their own."""
    if not isinstance(key, str) or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise LoRAError(f"{key!r} is not a module name; a hierarchical name such as 'attn.q_proj' is needed")
    found = find_targets(models, [rf"(^|\.){re.escape(key)}(\.|$)" if key in TARGET_PRESETS else key])
    return {path: layer for path, layer in found.items()
            if not isinstance(layer, (nn.Embedding, *NORMS)) or f".{path}".endswith(f".{key}")}


def _owners(found: Mapping[str, Mapping[str, nn.Module]]) -> dict[str, str]:
    """Path -> the name that applies to it."""
    owners: dict[str, list[str]] = {}
    for key, layers in found.items():
        for path in layers:
            owners.setdefault(path, []).append(key)
    for path, keys in owners.items():
        longest = max(key.count(".") for key in keys)
        keys[:] = [key for key in keys if key.count(".") == longest]
        if len(keys) > 1:
            raise LoRAError(f"{' and '.join(map(repr, keys))} both match {path} and have the same length; make one of them "
                            f"longer, or leave it out")
    decided = {keys[0] for keys in owners.values()}
    if idle := [key for key in found if key not in decided]:
        raise LoRAError(f"{idle[0]!r} applies to no layer: longer names take precedence on all that it matches")
    return {path: keys[0] for path, keys in owners.items()}


def _apply_loraw(models, config: Mapping, name: str) -> AppliedConfig:
    _known(config, LORAW_FIELDS, "")
    names, rank = config.get("component_whitelist"), config.get("rank")
    if not isinstance(names, (list, tuple)) or not names:
        raise LoRAError(f"component_whitelist is {names!r}; a list of module names is needed")
    if type(rank) is not int or rank < 1:
        raise LoRAError(f"rank is {rank!r}; allowed: whole numbers from 1")
    multiplier = _number(config, "multiplier", 1.0)
    if not multiplier:
        raise LoRAError("multiplier is 0, with which nothing can be learned; another number is needed")
    alpha = _number(config, "alpha", 0.0) or float(rank)
    rate = _rate(config)
    modules = {path: key for key in names for path in _named(models, key)}
    layers = adaptable_layers(models)
    shapes = {path: shape_of(layers[path], path) for path in modules if not isinstance(layers[path], NORMS)}
    limits = {path: min(shape.fan_in * shape.groups, shape.fan_out) for path, shape in shapes.items()}
    ranks = {path: min(rank, limits.get(path, rank)) for path in modules}
    apply_lora_to_model(models, ranks, dict.fromkeys(modules, multiplier * alpha), target_modules=_exactly(modules), name=name,
                        dropout=_number(config, "dropout", 0.0), module_dropout=_number(config, "module_dropout", 0.0),
                        dora=_flag(config, "weight_decompose", ""))
    return AppliedConfig(modules, dict.fromkeys(modules, rate), clipped={path: r for path, r in ranks.items() if r < rank})


def _exactly(paths) -> list[str]:
    return [f"^({'|'.join(map(re.escape, paths))})$"]


def _known(options: Mapping, allowed: tuple[str, ...], where: str) -> None:
    if unknown := [key for key in options if key not in allowed]:
        raise LoRAError(f"{where}{unknown[0]!r} is not an option; allowed: {', '.join(allowed)}")


def _number(options: Mapping, key: str, default: float, where: str = "") -> float:
    value = options.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LoRAError(f"{where}{key} is {value!r}; a finite number is needed")
    return float(value)


def _rate(options: Mapping, where: str = "") -> float | None:
    rate = _number(options, "lr", math.nan, where)
    if rate < 0:
        raise LoRAError(f"{where}lr is {rate}; allowed: 0 or more")
    return None if math.isnan(rate) else rate


def _flag(options: Mapping, key: str, where: str) -> bool:
    value = options.get(key, False)
    if value not in (0, 1):
        raise LoRAError(f"{where}{key} is {value!r}; allowed: 0, 1, true, false")
    return bool(value)


# ---- training ----------------------------------------------------------------------------------------------------------

def prepare_for_training(models, name: str | None = None) -> list[dict]:
    """Freeze all but what the config of adapter `name` (None: the only one) trains, and return that as optimizer groups.

    One group per learning rate of the config, without `lr` where it has none, so that the optimizer's own applies.
    With `trainable_model` the base is a group too, except for the weights that carry the adapter, as in lora_wrapper.
    """
    name, applied = _applied(models, name)
    layers = lora_layers(models)
    groups: dict[float | str | None, list[nn.Parameter]] = {}
    base = [p for network in components(models).values() for p in network.parameters()]
    for p in base:
        p.requires_grad_(False)
    carrying = {id(t) for layer in layers.values() if name in layer.adapter_names for t in layer.base_tensors()}
    carrying |= {id(p) for layer in layers.values() for p in layer.adapters.parameters()}
    if applied.train_base:
        groups["base"] = [p for p in base if id(p) not in carrying and p.is_floating_point()]
    for path, layer in layers.items():
        if name in layer.adapter_names:
            groups.setdefault(applied.rates.get(path), []).extend(layer.adapter(name).parameters())
    for p in (p for group in groups.values() for p in group):
        p.requires_grad_(True)
    return [{"params": ps} | ({"lr": rate} if isinstance(rate, float) else {}) for rate, ps in groups.items() if ps]


def _applied(models, name: str | None) -> tuple[str, AppliedConfig]:
    there = set(adapter_names(models))
    configs = {n: applied for n, applied in getattr(models, "lora_configs", {}).items() if n in there}
    if name is None and len(configs) == 1:
        (name,) = configs
    if name is None or name not in configs:
        what = "name the adapter" if name is None else f"no adapter named {name!r} was made by apply_lora_config"
        raise LoRAError(f"{what}; adapters with a config: {', '.join(map(repr, sorted(configs))) or 'none'}")
    return name, configs[name]


def merge_weights(models, path: str | os.PathLike | Mapping[str, Tensor], multiplier: float = 1.0,
                  name: str | None = None) -> LoadReport:
    """Add multiplier · ΔW of another checkpoint to adapter `name` (None: the only one), exactly.

    Ranks add up; modules that only the checkpoint has are added. Active sets, dropouts and what is trained stay, but the
    parameters are new: make the optimizer afterwards. A trained scale, now part of `up`, starts again at 1.
    Raises as `load_lora_weights` and `merge_loras` do, before anything changes.
    """
    with exclusive(models):
        found, present = read_lora(path, modules_of(models)), lora_state(models, name)
        layers = lora_layers(models)
        name = adapter_names(models)[0] if name is None else name
        old = {p: layers[p].adapter(name) for p in present}
        active = {n: torch.tensor(m, dtype=torch.float64) if isinstance(m, tuple) else m
                  for layer in layers.values() for n, m in layer.multipliers.items()}
        both = {p: weights for p, weights in present.items() if p in found.state}
        merged, _ = merge_loras([both, found.state], [1.0, multiplier], shapes=layer_shapes(models))
        attach_state(models, present | merged, name, where=found.path.name)
        for p, layer in lora_layers(models).items():
            if name in layer.adapter_names:
                if isinstance(old.get(p), ScaledLowRank):
                    layer.add_adapter(name, ScaledLowRank.of(layer.adapter(name), layer.lora_shape(), 1.0))
                _continue(layer.adapter(name), old.get(p, next(iter(old.values()))))
                layer.set_block_multiplier(name, old[p].block_multiplier if p in old else 1.0)
        set_adapters(models, active)
    return report_of(found, name, components(models))


def _continue(adapter: Adapter, before: Adapter) -> None:
    """Give an adapter the dropouts and the trainability of the one before."""
    adapter.set_dropouts(before.dropout, before.rank_dropout if adapter.drops_ranks else 0.0, before.module_dropout)
    adapter.from_file = before.from_file
    adapter.requires_grad_(any(p.requires_grad for p in before.parameters()))


# ---- two models --------------------------------------------------------------------------------------------------------

def extract_diff(tuned, base, rank: int | None = None, *, skip: str | None = None,
                 **rules: Any) -> tuple[dict[str, AdapterWeights], ExtractReport]:
    """The LoRA that turns the model `base` into `tuned` (a model, or a state dict), for `attach_state` or `write_lora`.

    Its rank is `rank`, or follows a rule of `RankRule` with `rank` as the upper limit; with neither, and always for norms
    and grouped convolutions, it is a full difference, which is exact. `skip`: a regular expression over names of layers,
    parameters and buffers to leave out although they may differ.
    Raises LoRAError if shapes differ, `tuned` has LoRAs attached, nothing differs, or something differs that no adapter
    can change.
    """
    if isinstance(base, nn.Module) and isinstance(tuned, Mapping):
        tuned = _with_weights(base, tuned)
    for what, given in (("tuned", tuned), ("base", base)):
        networks = given.values() if isinstance(given, Mapping) else [given]
        if not all(isinstance(network, nn.Module) for network in networks):
            raise LoRAError(f"{what} is not a model; {'a model, or the state dict of one,' if what == 'tuned' else 'a model'} "
                            f"is needed")
    if adapter_names(tuned):
        raise LoRAError(f"the tuned model has the LoRAs {', '.join(map(repr, adapter_names(tuned)))} attached; "
                        f"merge_lora_weights, or remove_lora, first")
    shapes = layer_shapes(base)
    if shapes != layer_shapes(tuned):
        raise LoRAError("the two models have layers of different names or shapes")
    ours, theirs = adaptable_layers(base), adaptable_layers(tuned)
    if any(getattr(layer, "is_quantized", False) for layer in (*ours.values(), *theirs.values())):
        raise LoRAError("a quantised model has no weights of its own to compare; dequantize_base it first")
    _check_rest(base, tuned, [ours[path] for path in shapes], skip)
    wanted = [path for path in shapes if not (skip and re.search(skip, path))]
    low = [path for path in wanted if shapes[path].groups == 1] if rules or rank is not None else []
    found, report = _full(_pair(path, ours[path], theirs[path]) for path in wanted if path not in low)
    if low:
        rule = RankRule(**rules, max_rank=rank) if rules else RankRule(rank)
        lows, of_low = extract((_pair(path, ours[path], theirs[path]) for path in low), rule)
        found |= lows
        report = replace(of_low, modules=report.modules | of_low.modules, equal=report.equal + of_low.equal)
    if not found:
        raise LoRAError("there is nothing to extract: no weight differs")
    return {path: found[path] for path in shapes if path in found}, report


def _with_weights(base: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(base)
    remove_lora(model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise LoRAError(f"the tuned weights do not fit the base: {' '.join(str(error).split())}") from None
    return model


def _check_rest(base, tuned, layers: list[nn.Module], skip: str | None) -> None:
    """Require that what no adapter can change is equal in both, or matches `skip`."""
    done = {id(p) for layer in layers
            for p in (layer.base_tensors() if isinstance(layer, LoRALayer) else layer._parameters.values())}
    done |= {id(p) for layer in lora_layers(base).values() for p in layer.adapters.parameters()}
    for component, network in components(base).items():
        theirs = components(tuned)[component].state_dict()
        for key, value in network.state_dict(keep_vars=True).items():
            if id(value) not in done and not (skip and re.search(skip, key)) and not _same(value, theirs.get(key)):
                raise LoRAError(f"{key} differs, which no adapter can change; skip={key!r} would leave it out")


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and bool((a == b).all())


def _pair(path: str, base: nn.Module, tuned: nn.Module) -> Layer:
    """Both as adapters see them: a plain layer is read from a converted copy."""
    ours, theirs = (layer if isinstance(layer, LoRALayer) else as_lora_layer(copy.deepcopy(layer), path)
                    for layer in (base, tuned))
    bias, tuned_bias = (None if layer.bias is None else layer.bias.detach() for layer in (ours, theirs))
    return Layer(path, ours.plain_weight().detach(), theirs.plain_weight().detach(), bias, tuned_bias,
                 ours.lora_shape().embedding)


def _full(layers: Iterable[Layer]) -> tuple[dict[str, AdapterWeights], ExtractReport]:
    state, report = {}, ExtractReport()
    for layer in layers:
        pairs: dict[str, tuple[Any, Any]] = {"diff": (layer.base, layer.tuned), "diff_b": (layer.base_bias, layer.tuned_bias)}
        changes = {key: at_least_fp32(b) - at_least_fp32(a) for key, (a, b) in pairs.items() if a is not None}
        changes = {key: D for key, D in changes.items() if D.any()}
        if not all(torch.isfinite(D).all() for D in changes.values()):
            raise LoRAError(f"{layer.path}: the difference holds values that are not finite (NaN or infinity)")
        if changes:
            state[layer.path] = AdapterWeights("full", changes)
            norm = float(changes["diff"].double().norm()) if "diff" in changes else 0.0
            report.modules[layer.path] = Approximation(None, norm, 0.0)
        else:
            report.equal += 1
    return state, report
