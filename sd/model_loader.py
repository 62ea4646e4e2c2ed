"""Load and save models: LDM checkpoints, diffusers folders, LoRA files. Device and dtype are decided here."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sd.adapters.attach import apply_lora_to_model, lora_state
from sd.adapters.switch import adapter_names, exclusive
from sd.adapters.weights import LoRAError
from sd.checkpoints.reader import open_checkpoint
from sd.checkpoints.writer import check_target, save_checkpoint, save_merged
from sd.config import SD15, ModelConfig
from sd.errors import SDError
from sd.files.hashes import old_model_hash
from sd.files.tensor_file import TensorFile
from sd.files.tensors import keep_sources
from sd.lora import load_lora_weights, save_lora_weights
from sd.lora_files.embedding_files import read_embeddings, write_embedding
from sd.lora_files.header import lora_metadata
from sd.models import (
    Models,
    NoInitialValues,
    auto_dtype,
    build_networks,
    count_parameters,
    default_device,
    default_dtype,
    memory_format,
    new_models,
    usable_device,
)
from sd.prompts.learned_words import EmbeddingError
from sd.prompts.tokenizer import data_dir

__all__ = ["Models", "count_parameters", "load_embedding", "load_lora_into_models", "merge_lora_into_checkpoint", "model_path",
           "new_models", "preload_models_from_standard_weights", "preload_models_with_lora", "remove_embedding",
           "save_checkpoint", "save_embedding", "save_merged", "save_models_lora"]

log = logging.getLogger("sd")

BASE_HASH = "ss_new_sd_model_hash"  # SHA-256 of the base, or its first digits


def model_path(ckpt_path: str | os.PathLike | None) -> Path:
    """Resolve a checkpoint: None is the model that ships with the program; a bare name ("emoji", "digits") is a model in
    data/, unless a file of that name exists here."""
    path = Path("emoji" if ckpt_path is None else ckpt_path)
    shipped = data_dir() / f"{path}.safetensors"
    bare = ckpt_path is None or path.parent == Path(".") and not path.exists()
    return shipped if bare and shipped.exists() else path


# ---- loading ---------------------------------------------------------------------------------------------------------


def preload_models_from_standard_weights(ckpt_path: str | os.PathLike | None = None, device=None, *,
                                         dtype: torch.dtype | str | None = None, config: ModelConfig | None = None,
                                         vae: str | os.PathLike | None = None,
                                         text_encoder: str | os.PathLike | None = None,
                                         ema: bool = False, variant: str | None = None) -> Models:
    """Load a Stable Diffusion model: an LDM .ckpt or .safetensors, a diffusers folder, or a model in data/ by name (None:
    "emoji").

    `dtype`: None is the device's default (in fp16 the VAE stays fp32); "auto" is bf16 on a CPU that multiplies it, for models
    of SD 1.x's size (the VAE stays fp32), else the default; "stored" keeps each tensor's dtype from the file, and on the CPU
    also maps it from the file without a copy. LoRAs inside a checkpoint are attached, active at their
    multipliers. `vae`, `text_encoder`: files or folders to load these from instead. `ema`: use the averaged UNet of an LDM
    file. `variant`: of a diffusers folder, such as "fp16". `config`: needed only for a checkpoint of an unknown family.
    The networks are in eval mode and frozen. Raises CheckpointError unless the file holds every tensor of the model in its
    shape, and no unknown ones.
    """
    path = model_path(ckpt_path)
    device = default_device() if device is None else usable_device(device)
    dtype = default_dtype(device) if dtype is None else dtype
    if dtype not in ("stored", "auto") and not isinstance(dtype, torch.dtype):
        raise SDError(f"dtype is {dtype!r}; allowed: a torch.dtype, 'auto', 'stored', or None for the device's default")
    checkpoint = open_checkpoint(path, config=config, vae=vae, text_encoder=text_encoder, variant=variant)
    with torch.device("meta"), NoInitialValues():
        networks = build_networks(checkpoint.config)
    fast = auto_dtype(device, networks["diffusion"]) if dtype == "auto" else dtype
    for component, state in checkpoint.states(networks, ema=ema).items():
        # The VAE overflows in fp16, and takes a small part of the time of a picture.
        wide = component in ("encoder", "decoder") and (fast == torch.float16 or dtype == "auto" and device.type == "cpu")
        state = _placed(state, device, torch.float32 if wide else fast)
        networks[component].load_state_dict(state, strict=True, assign=True)
        networks[component].eval().requires_grad_(False)
    whole = vae is None and text_encoder is None
    models = Models(networks, checkpoint.config, source=path if whole else None)  # a source must identify all weights
    for lora in checkpoint.loras:
        tensors = TensorFile(path / lora.name, dict(lora.tensors), lora.metadata)  # as if the checkpoint were a folder
        models.lora_reports[lora.name] = load_lora_weights(models, tensors, lora.name, lora.multiplier)
        log.info("%s", models.lora_reports[lora.name])
    return models


def _placed(state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | str) -> dict[str, Tensor]:
    """The tensors on the device, in the layout of its fastest convolutions."""
    def placed(t: Tensor) -> Tensor:
        to = dtype if isinstance(dtype, torch.dtype) else t.dtype
        return t.to(device=device, dtype=to, memory_format=memory_format(device, to) if t.dim() == 4 else torch.preserve_format)

    return {k: placed(t) for k, t in state.items()}


def preload_models_with_lora(ckpt_path: str | os.PathLike | None = None, device=None, lora_rank: int = 4,
                             lora_alpha: float = 1.0, lora_dropout: float = 0.0, apply_to_diffusion: bool = True,
                             apply_to_clip: bool = False, *, target_modules=None, lora_name: str = "default",
                             **load) -> Models:
    """Load a model and attach a new, trainable LoRA to the UNet and/or the text encoder.

    A new LoRA does not change the output; its parameters are `get_lora_parameters(models)`, all others are frozen.
    `load`: further arguments of `preload_models_from_standard_weights`.
    """
    models = preload_models_from_standard_weights(ckpt_path, device, **load)
    targets = {k: models[k] for k, wanted in (("diffusion", apply_to_diffusion), ("clip", apply_to_clip)) if wanted}
    if not targets:
        raise LoRAError("apply_to_diffusion and apply_to_clip are both False: there is nothing to attach a LoRA to")
    apply_lora_to_model(targets, lora_rank, lora_alpha, lora_dropout, target_modules, lora_name)
    return models


# ---- LoRA files ------------------------------------------------------------------------------------------------------

def load_lora_into_models(models: Models, path: str | os.PathLike, name: str | None = None, multiplier: float = 1.0, *,
                          skip: str | None = None, block_weights=None) -> Models:
    """Load a LoRA from any program, a file or a folder, and make it active; name None: after the file.

    An adapter of that name is replaced, whatever its rank. `skip`: a regular expression; tensors whose key or module path
    matches are left out. `block_weights`: {"text_encoder": 0.5, "mid_block": 0, ...} or a list of 17, 25 or 26 numbers
    (sd.lora_files.block_weights). The report is `models.lora_reports[name]`. Raises CheckpointError, LoRAFormatError or
    BlockWeightError; every tensor is applied, skipped, or named in the error.
    """
    name = Path(path).stem if name is None else name
    models.lora_reports[name] = load_lora_weights(models, path, name, multiplier, skip=skip, block_weights=block_weights)
    log.info("%s", models.lora_reports[name])
    base = models.lora_reports[name].metadata.get(BASE_HASH)
    if base and log.isEnabledFor(logging.INFO) and models.model_hash and not base.startswith(models.model_hash):
        log.info("LoRA %r was made on a base with hash %s; this one has %s", name, base, models.model_hash)
    return models


def save_models_lora(models: Models, path: str | os.PathLike, name: str | None = None, *,
                     metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None,
                     format: str = "kohya") -> None:
    """Write one adapter (None: the only one) of all networks, with the base's name and hash in its metadata.

    `format`: kohya, diffusers, comfyui (one file each) or peft (a folder). Raises LoRAFormatError for a kind of adapter that
    the format cannot express.
    """
    header = lora_metadata(lora_state(models, name), models.config) | _base_facts(models)
    header["ss_base_model_version"] = header.get("ss_base_model_version", models.config.name)
    save_lora_weights(models, path, name, metadata=header | dict(metadata or {}), dtype=dtype, format=format)


def _base_facts(models: Models) -> dict[str, str]:
    """Header entries that identify the base model."""
    facts = {} if models.source is None else {"ss_sd_model_name": Path(models.source).name}
    if models.source is not None and models.model_hash is not None:
        facts |= {BASE_HASH: models.model_hash, "ss_sd_model_hash": old_model_hash(models.source)}
    return facts


def load_embedding(models: Models, path: str | os.PathLike, word: str | None = None) -> list[str]:
    """Load learned words (textual inversion) from a file or folder of any program; returns the words to use in prompts.

    `word`: another name for the word in the file, such as "<s0><s1>". Prompts match whole words, in any case. Raises
    CheckpointError, or EmbeddingError for vectors that do not fit and for a word already loaded with other vectors;
    `models` are then unchanged.
    """
    words = read_embeddings(path, word)
    try:
        with exclusive(models):
            models["clip"].learn(words)
    except EmbeddingError as error:
        raise EmbeddingError(f"{path}: {error}") from None
    log.info("embedding %s: %s", path, ", ".join(f"{w!r}, {t[..., 0].numel()} vectors" for w, t in words.items()))
    return list(words)


def remove_embedding(models: Models, word: str) -> None:
    """Remove a learned word. Raises EmbeddingError if it is not loaded."""
    with exclusive(models):
        models["clip"].learned.forget(word)


def save_embedding(models: Models, path: str | os.PathLike, word: str | None = None, *,
                   metadata: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Write a learned word (None: the only one) as .safetensors, or as .pt, which every program reads, without metadata."""
    learned = models["clip"].learned
    if word is None and len(learned.ids) != 1:
        raise EmbeddingError(f"name the word to save; loaded: {', '.join(map(repr, learned.ids)) or 'none'}")
    word = next(iter(learned.ids)) if word is None else word
    header = {"modelspec.title": word, "modelspec.trigger_phrase": word} | _base_facts(models)
    if models.config.clip.width == SD15.clip.width:
        header["modelspec.architecture"] = "stable-diffusion-v1/textual-inversion"
    write_embedding(path, word, learned.of(word).detach().to(dtype), header | dict(metadata or {}))


def merge_lora_into_checkpoint(ckpt_path: str | os.PathLike | None, loras: Mapping[str | os.PathLike, float],
                               out: str | os.PathLike, *, dtype: torch.dtype | None = None, device="cpu",
                               skip: str | None = None, block_weights: Mapping[str | os.PathLike, object] | None = None,
                               **load) -> Models:
    """Write base + Σ multiplier · LoRA as one plain checkpoint for deployment, summed in fp32 and rounded once.

    `dtype=None`: each tensor keeps the base's dtype. LoRAs inside the base are merged too, at their own multipliers. The
    base stays mapped and one tensor at a time is merged and written, so peak memory is little more than the base file.
    `skip` and `block_weights` (path of a LoRA -> its block weights) are those of `load_lora_into_models`. Raises as that
    and `save_merged` do, and CheckpointError if `out` is one of the inputs. Returns the written model, loaded as stored.
    """
    check_target(out)
    block_weights = dict(block_weights or {})
    if stray := [path for path in block_weights if path not in loras]:
        raise LoRAError(f"block weights are given for {os.fspath(stray[0])!r}, which is not among the LoRAs to merge")
    keep_sources(out, model_path(ckpt_path), *loras, *filter(None, (load.get("vae"), load.get("text_encoder"))))
    models = preload_models_from_standard_weights(ckpt_path, device, dtype="stored", **load)
    for path, multiplier in loras.items():
        name = os.fspath(path)
        while name in models.lora_reports:  # taken by a LoRA inside the base, or the same path given as str and as Path
            name += "'"
        load_lora_into_models(models, path, name, multiplier, skip=skip, block_weights=block_weights.get(path))
    if not adapter_names(models):
        raise LoRAError("there is nothing to merge: no LoRA is given, and the base has none inside")
    if words := models["clip"].words:
        raise EmbeddingError(f"the LoRAs bring the learned words {', '.join(map(repr, words))}, which no plain checkpoint "
                             f"holds; leave them out with skip, and save them as separate files with save_embedding")
    save_merged(models, out, dtype=dtype)
    del models  # free the base before the result is mapped
    return preload_models_from_standard_weights(out, device, dtype="stored")
