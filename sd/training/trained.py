"""Selects the trained weights: a LoRA's adapters, whole networks, new words. Everything else is frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from sd.adapters.adapter import Adapter
from sd.adapters.attach import apply_lora_to_model, attach_state, lora_state, remove_lora
from sd.adapters.derived import exact
from sd.adapters.layer import LoRALayer
from sd.adapters.low_rank import LowRank
from sd.adapters.quant import quantized_kinds
from sd.adapters.switch import adapter_names, use_adapters
from sd.adapters.targets import find_targets, lora_layers
from sd.errors import SDError
from sd.files.hashes import digest
from sd.lora_files.block_weights import BlockWeightError, block_multipliers
from sd.lora_files.modules import Modules, modules_of
from sd.lora_files.read import read_lora
from sd.models import Models
from sd.packed import unpack
from sd.tools.decompose import RankRule, truncated_svd
from sd.training.dataset.randomness import seed_of
from sd.training.errors import TrainError
from sd.training.new_words import new_words
from sd.training.relora import adapters_in_training, attach_merged, merged_name
from sd.training.rules import kinds_with


@contextmanager
def training(config, models: Models) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the trained weights by name; only they require gradients inside the block. All modes are restored afterwards."""
    before = [(p, p.requires_grad) for network in models.values() for p in network.parameters()]
    modes = [(module, module.training) for network in models.values() for module in network.modules()]
    unet, checkpointing, adapters = models["diffusion"], models["diffusion"].checkpointing, adapter_names(models)
    learned, words = models["clip"].learned, set(models["clip"].words)
    try:
        unpack(models)
        for network in models.values():
            network.eval().requires_grad_(False)
        parameters = trained_parameters(config, models)
        unet.checkpointing = config.checkpointing
        with use_adapters(models, dict.fromkeys(adapters_in_training(config), 1.0)):
            yield parameters
    except BaseException:
        for name in adapters_in_training(config):
            if name in adapter_names(models) and name not in adapters:
                remove_lora(models, name)  # an unfinished training is kept in its folder, not in the models
        for word in set(learned.ids) - words:
            learned.forget(word)
        raise
    finally:
        learned.requires_grad_(False)
        unet.checkpointing = checkpointing
        for module, mode in modes:
            module.training = mode
        for p, trainable in before:
            p.requires_grad_(trainable)
        for layer in lora_layers(models).values():
            layer.adapters.eval()


def trained_parameters(config, models: Models) -> dict[str, nn.Parameter]:
    """Attach the LoRA or unfreeze the networks, and add new words; returns the trained parameters by canonical name."""
    if config.train == "lora":
        chosen = _attach_lora(config, models)
    elif config.train == "words":
        chosen = {}
    else:
        if quantized_kinds(models):
            raise TrainError(f"the base is quantised ({quantized_kinds(models)[0]}), so its weights cannot be trained; load it "
                             f"anew, or dequantize_base(models)")
        if adapter_names(models):
            raise TrainError(f"the model carries the adapters {', '.join(map(repr, adapter_names(models)))}; merge or "
                             f"remove them before all of its weights are trained")
        vae = config.train == "vae"
        if vae and not models.config.vae.widths:
            raise TrainError("train is 'vae', and this model works on pixels: it has no autoencoder")
        on = {"encoder": vae, "decoder": vae, "diffusion": config.unet and not vae,
              "clip": config.text_encoder and not vae}
        chosen = {key: models[key] for key in on if on[key]}
    parameters = {f"{path}.{name}": p for path, module in chosen.items() for name, p in module.train().named_parameters()
                  if not name.startswith("learned.")}  # loaded words are not trained
    parameters |= new_words(config, models)
    for p in parameters.values():
        p.requires_grad_(True)
    return parameters


def frozen_parts(config, models: Models) -> dict[str, Tensor]:
    """Frozen tensors of the LoRA, by canonical name, which the saved state must include.

    These are the subtracted start of PiSSA, the moved changes of ReLoRA, and modules of `from_lora` in untrained networks.
    """
    parts: dict[str, Tensor] = {}
    for path, layer in lora_layers(models).items():
        for name in adapters_in_training(config):
            if name in layer.adapter_names:
                adapter, where = layer.adapter(name), path + name.removeprefix(config.name)
                parts |= {f"{where}.{key}": tensor for key, tensor in chain(adapter.named_parameters(), adapter.named_buffers())
                          if not tensor.requires_grad}
    return parts


# ---- a LoRA ----------------------------------------------------------------------------------------------------------

def _attach_lora(config, models: Models) -> dict[str, Adapter]:
    """Attach the adapters to train, with a change of 0 (or that of `from_lora`); returns them by path."""
    if merged_name(config.name) in adapter_names(models):
        raise TrainError(f"the model carries an adapter named {merged_name(config.name)!r}; remove it, or choose another name")
    networks = {key: models[key] for key, on in (("diffusion", config.unet), ("clip", config.text_encoder)) if on}
    torch.manual_seed(seed_of(config.seed, "init", 0))
    if config.from_lora is None:
        ranks, alphas = _ranks(config, networks)
        apply_lora_to_model(networks, ranks, alphas, config.dropout, config.targets, config.name, kind=config.kind,
                            dora=config.dora, rank_dropout=config.rank_dropout, module_dropout=config.module_dropout)
    else:
        _attach_file(config, models, networks)
    layers = {path: layer for path, layer in lora_layers(networks).items() if config.name in layer.adapter_names}
    adapters = {path: layer.adapter(config.name) for path, layer in layers.items()}
    if config.init == "pissa":
        for path, adapter in adapters.items():
            if isinstance(adapter, LowRank):  # not a norm's full difference
                start_with_principal(adapter, layers[path], path)
    if config.relora_every:
        attach_merged(config.name, adapters, layers)
    return adapters


def _ranks(config, networks: Mapping[str, nn.Module]) -> tuple[dict[str, int], dict[str, float]]:
    """(path -> rank, path -> alpha) of every target, from rank, alpha, rslora and block_ranks."""
    targets = find_targets(networks, config.targets)
    blocks: dict[str, float] = {}
    if config.block_ranks:
        every = modules_of(networks)
        modules = Modules(every.names, {path: shape for path, shape in every.shapes.items() if path in targets})
        try:
            found = block_multipliers(",".join(config.block_ranks), modules)
        except BlockWeightError as error:
            raise TrainError(f"block_ranks is {config.block_ranks!r}; of the targets: {error}") from None
        blocks = found.table if found else {}
    for value in blocks.values():
        if value < 0 or value != int(value):
            raise TrainError(f"block_ranks is {config.block_ranks!r}; allowed: whole numbers of 0 or more")
    ranks = {path: int(blocks.get(path, config.rank)) for path in targets}
    if not any(ranks.values()):
        raise TrainError(f"block_ranks is {config.block_ranks!r}, so nothing has a LoRA; allowed: above 0 for some block")
    return ranks, {path: _alpha(config, rank) for path, rank in ranks.items()}


def _alpha(config, rank: int) -> float:
    """Keep alpha / rank (with rsLoRA alpha / sqrt(rank)) the same for every rank; leave alpha alone where it is not a scale."""
    if config.kind not in kinds_with("scaled"):
        return config.alpha
    return config.alpha * (math.sqrt(rank) if config.rslora else rank / config.rank)


def start_with_principal(adapter: LowRank, layer: LoRALayer, path: str) -> None:
    """PiSSA (Meng et al. 2024, section 3): initialise alpha / R · up · down to the best rank-R approximation of W."""
    with exact():
        W = layer.base_weight()
        found = truncated_svd((W.T if adapter.embedding else W).flatten(1), RankRule(rank=adapter.rank))
        if not found.norm:
            raise TrainError(f"init is 'pissa', but the weight of {path} is 0 and has no principal part")
        root = math.sqrt(adapter.scale)
        try:
            adapter.start_at(found.up / root, found.down / root)
        except SDError as error:
            raise TrainError(f"{path}: {error}") from None


def _attach_file(config, models: Models, networks: Mapping[str, nn.Module]) -> None:
    """Attach the file `from_lora`. Its modules in networks that are not trained stay as they are, also in the result."""
    if config.name in adapter_names(models):
        raise TrainError(f"an adapter named {config.name!r} is there already; remove it, or choose another name")
    found = read_lora(config.from_lora, modules_of(models))
    for key in networks:
        if not any(path.startswith(f"{key}.") for path in found.state):
            field = {"diffusion": "unet", "clip": "text_encoder"}[key]
            raise TrainError(f"{found.path.name} has nothing for the {field}; leave {field} out of the training")
    attach_state(models, found.state, config.name, where=found.path.name)
    for path, layer in lora_layers(networks).items():
        if config.name in layer.adapter_names:
            _prepare(layer.adapter(config.name), config, f"{found.path.name}: {path}")


def _prepare(adapter: Adapter, config, where: str) -> None:
    """Make an adapter from a file ready for training. Raises TrainError if it cannot be trained with these options."""
    if why := adapter.why_not_trained():
        raise TrainError(f"{where} {why}")
    if config.max_norm and not adapter.is_product:
        raise TrainError(f"{where}: max_norm does not go with kind {adapter.kind!r}; "
                         f"allowed: {', '.join(sorted(kinds_with('is_product')))}")
    adapter.from_file = False
    try:
        full = adapter.kind == "full"  # has no ranks to drop
        adapter.set_dropouts(config.dropout, 0.0 if full else config.rank_dropout, config.module_dropout)
    except SDError as error:
        raise TrainError(f"{where}: {error}") from None


def start_hash(config, models: Models) -> str | None:
    """Hash of the weights of `from_lora`, independent of path and format; None without one. Call before the first step."""
    if config.from_lora is None:
        return None
    parts: list[str | Tensor] = []
    for path, weights in sorted(lora_state(models, config.name).items()):
        parts.append(repr((path, weights.kind, weights.alpha)))
        for name, tensor in sorted(weights.tensors.items()):
            parts += f"{name}{tuple(tensor.shape)}", tensor
    return digest(parts)[:16]
