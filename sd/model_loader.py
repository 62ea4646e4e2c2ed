"""Models from files and back: LDM checkpoints, diffusers folders, LoRA files; device and dtype are decided here."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sd.checkpoint import (
    CheckpointError,
    TensorFile,
    former_folder,
    keep_sources,
    model_hash,
    old_model_hash,
    read_folder,
    read_tensors,
)
from sd.clip import CLIP
from sd.config import CONFIG_KEY, SD15, CLIPConfig, ConfigError, ModelConfig, UNetConfig, VAEConfig
from sd.embedded import embedded_loras, split_embedded
from sd.embeddings import EmbeddingError, LearnedWords, read_embeddings, write_embedding
from sd.lora import (
    LoadReport,
    LoRAError,
    adapter_names,
    apply_lora_to_model,
    exclusive,
    load_lora_weights,
    lora_layers,
    lora_state,
    save_lora_weights,
)
from sd.lora_writers import lora_metadata
from sd.model_saver import check_target, ldm_state, save_checkpoint, save_merged  # noqa: F401
from sd.names import (
    COMPONENTS,
    FOLDERS,
    HARMLESS,
    LDM_PREFIX,
    Name,
    component_names,
    guess_checkpoint,
    ldm_facts,
    model_names,
    modern_key,
)
from sd.tokenizer import data_dir, load_tokenizer
from sd.unet import UNet
from sd.vae import build_vae

log = logging.getLogger("sd")

SD15_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
BASE_HASH = "ss_new_sd_model_hash"  # SHA-256 of the base, whole or its first digits


class DeviceError(ValueError):
    """A device that is not here."""


class Models(dict):
    """The networks under "clip", "encoder", "decoder", "diffusion", with what belongs to them.

    `config`, `tokenizer`, `source` (the file or folder they came from) and `lora_reports` (name -> LoadReport).
    """

    def __init__(self, networks: Mapping[str, nn.Module], config: ModelConfig, tokenizer=None, source: Path | None = None):
        super().__init__(networks)
        self.config, self.source = config, source
        self.lora_reports: dict[str, LoadReport] = {}
        self._tokenizer = tokenizer

    @property
    def tokenizer(self):
        """Built when first needed: importing transformers takes longer than loading a model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer()
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return self["diffusion"].conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self["diffusion"].conv_in.weight.dtype

    @property
    def model_hash(self) -> str | None:
        """First ten hex digits of the checkpoint's SHA-256; None for models that are not from one file."""
        return model_hash(self.source) if self.source is not None and Path(self.source).is_file() else None

    def to(self, device) -> Models:
        for network in self.values():
            network.to(device)
        return self


def default_device() -> torch.device:
    """The best device present: CUDA, Apple MPS, CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable_device(name) -> torch.device:
    """The device of that name. Raises DeviceError for one that is not here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise DeviceError(f"device {str(name)!r} cannot be used ({str(error).splitlines()[0]}); the best one here is "
                          f"{default_device()}") from None
    if device.type == "meta":
        raise DeviceError(f"device 'meta' holds no data, so nothing runs on it; the best one here is {default_device()}")
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """fp32 on the CPU; elsewhere bf16 where the hardware has it, else fp16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16


def model_path(ckpt_path: str | os.PathLike | None) -> Path:
    """The checkpoint that is meant: None is the model that ships with the program, a bare name that is no file here one of
    the models in data/ ("emoji", "digits")."""
    path = Path("emoji" if ckpt_path is None else ckpt_path)
    shipped = data_dir() / f"{path}.safetensors"
    bare = ckpt_path is None or path.parent == Path(".") and not path.exists()
    return shipped if bare and shipped.exists() else path


# ---- loading ---------------------------------------------------------------------------------------------------------

def build_networks(config: ModelConfig) -> dict[str, nn.Module]:
    """The four networks with torch's random initial weights (on the meta device inside `with torch.device("meta")`)."""
    return {"clip": CLIP(config.clip), **build_vae(config.vae), "diffusion": UNet(config.unet)}


class _NoInitialValues(TorchFunctionMode):
    """Skips torch.nn.init: its values would be replaced at once, and on the meta device its normal_ imports for seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def new_models(config: ModelConfig, seed: int = 0) -> Models:
    """Untrained models on the CPU in fp32, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Models({k: m.eval().requires_grad_(False) for k, m in build_networks(config).items()}, config)


def preload_models_from_standard_weights(ckpt_path: str | os.PathLike | None = None, device=None, *,
                                         dtype: torch.dtype | str | None = None, config: ModelConfig | None = None,
                                         vae: str | os.PathLike | None = None,
                                         text_encoder: str | os.PathLike | None = None,
                                         ema: bool = False, variant: str | None = None) -> Models:
    """Load a Stable Diffusion model: an LDM .ckpt or .safetensors, or a diffusers folder; or a model of data/ by its name,
    None is "emoji".

    `dtype`: None is the device's default (in fp16 the VAE stays fp32); "stored" leaves each tensor as it lies in its file,
    and on the CPU where it lies: mapped, without a copy. LoRAs inside a checkpoint (sd.embedded) are attached, active at
    their multipliers. `vae`, `text_encoder`: files or folders to take these from instead. `ema`: the averaged UNet of an
    LDM file. `variant`: such as "fp16", of a diffusers folder. `config` is needed only for a checkpoint of no known family.
    The networks come in eval mode and frozen. Raises CheckpointError: every tensor of the model must be in the file, in
    its shape, and nothing unknown beside it.
    """
    path = model_path(ckpt_path)
    device = default_device() if device is None else usable_device(device)
    dtype = default_dtype(device) if dtype is None else dtype
    if dtype != "stored" and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; allowed: a torch.dtype, 'stored', or None for the device's default")
    if former_folder(path).exists() and not path.exists():
        raise CheckpointError(f"{path}: a save of this folder was killed at its last step; what it was before "
                              f"lies whole in {former_folder(path)}: rename that back")
    inside = TensorFile(path, {})
    if path.is_dir():
        folder = read_folder(path, variant=variant)
        sources, configs = {c: folder.components.get(FOLDERS[c]) for c in COMPONENTS}, folder.configs
    else:
        file, inside = split_embedded(read_tensors(path))
        sources, configs = dict.fromkeys(COMPONENTS, file), {}
    for given, replaced in ((vae, ("encoder", "decoder")), (text_encoder, ("clip",))):
        if given is not None:
            part, own = _part(Path(given), FOLDERS[replaced[0]])
            sources, configs = sources | dict.fromkeys(replaced, part), configs | own
    for component, source in sources.items():
        if source is None:
            kind = configs.get("model_index.json", {}).get("_class_name", "without a model_index.json")
            raise CheckpointError(f"{path}: has no {FOLDERS[component]} in it{_hint(component)} (the folder is a {kind})")
    if config is None:
        config = _config_of_folder(configs, path) if path.is_dir() else config_of_file(file)

    with torch.device("meta"), _NoInitialValues():
        networks = build_networks(config)
    taken: dict[int, set[str]] = {}
    for component, network in networks.items():
        source = sources[component]
        state, used = _state_for(network, source, ema and component == "diffusion")
        taken.setdefault(id(source), set()).update(used)
        # The VAE overflows in fp16; it is a small part of a generation's time, so it stays fp32 there.
        kind = torch.float32 if dtype == torch.float16 and component in ("encoder", "decoder") else dtype
        state = {k: t.to(device=device, dtype=t.dtype if kind == "stored" else kind) for k, t in state.items()}
        network.load_state_dict(state, strict=True, assign=True)
        network.eval().requires_grad_(False)
    for source in {id(s): s for s in sources.values()}.values():
        elsewhere = tuple(LDM_PREFIX[c] for c in COMPONENTS if sources[c] is not source)
        _refuse_unexpected(source, taken[id(source)], elsewhere)
    whole = vae is None and text_encoder is None
    models = Models(networks, config, source=path if whole else None)  # its name and hash must tell what the models are
    for lora in embedded_loras(inside, model_names(config)):
        tensors = TensorFile(path / lora.name, dict(lora.tensors), lora.metadata)  # as if the checkpoint were a folder of them
        models.lora_reports[lora.name] = load_lora_weights(models, tensors, lora.name, lora.multiplier)
        log.info("%s", models.lora_reports[lora.name])
    return models


def preload_models_with_lora(ckpt_path: str | os.PathLike | None = None, device=None, lora_rank: int = 4,
                             lora_alpha: float = 1.0, lora_dropout: float = 0.0, apply_to_diffusion: bool = True,
                             apply_to_clip: bool = False, *, target_modules=None, lora_name: str = "default",
                             **load) -> Models:
    """Load a model and attach a new LoRA, ready to train, to the UNet and on request to the text encoder.

    A new LoRA changes no output; its parameters are `get_lora_parameters(models)`, all others are frozen. `load`:
    further arguments of `preload_models_from_standard_weights`.
    """
    models = preload_models_from_standard_weights(ckpt_path, device, **load)
    targets = {k: models[k] for k, wanted in (("diffusion", apply_to_diffusion), ("clip", apply_to_clip)) if wanted}
    if not targets:
        raise LoRAError("apply_to_diffusion and apply_to_clip are both False: there is nothing to put a LoRA on")
    apply_lora_to_model(targets, lora_rank, lora_alpha, lora_dropout, target_modules, lora_name)
    return models


def _hint(component: str) -> str:
    argument = {"clip": "text_encoder", "encoder": "vae", "decoder": "vae"}.get(component)
    return f"; name one with {argument}=" if argument else ""


def _state_for(network: nn.Module, source: TensorFile, ema: bool) -> tuple[dict[str, Tensor], set[str]]:
    """Our state dict from a file's tensors, in whichever spelling the file has, and the file's keys that were used."""
    component, shapes = network.component, {k: tuple(p.shape) for k, p in network.state_dict().items()}
    given = {modern_key(key, FOLDERS[component]): key for key in source}
    names = component_names(component, network.config)
    if not names:  # no autoencoder
        return {}, set()
    spell = max((_ldm, _ldm_flat_clip, _bare_ldm, _diffusers), key=lambda s: sum(s(n) + ".weight" in given for n in names))
    if not any(spell(n) + ".weight" in given for n in names):
        raise CheckpointError(f"{source.path}: has no {FOLDERS[component]} in it{_hint(component)} "
                              f"({guess_checkpoint(source)})")
    state, used, missing, misshapen = {}, set(), [], []
    for name in names:
        for tail in ("weight", "bias"):
            ours, theirs = f"{name.ours}.{tail}", f"{spell(name)}.{tail}"
            if ours not in shapes:
                continue
            key = _ema_key(theirs) if ema else given.get(theirs)
            if key not in source:
                missing.append(key or theirs)
                continue
            used |= {key, given.get(theirs, key)}
            tensor = source[key]
            if tail == "weight" and name.ldm_conv and tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]  # LDM's VAE attention is 1x1 convolutions
            if tuple(tensor.shape) != shapes[ours]:
                misshapen.append(f"{key} is {list(tensor.shape)}, expected {list(shapes[ours])}")
            state[ours] = tensor
    for what, bad in (("missing", missing), ("of another shape", misshapen)):
        if bad:
            hint = " (it has no EMA weights)" if ema and what == "missing" else ""
            raise CheckpointError(f"{source.path}: {len(bad)} of {len(shapes)} tensors of the {component} are {what}, "
                                  f"first: {bad[0]}{hint}; {guess_checkpoint(source)}")
    return state, used


def _refuse_unexpected(source: TensorFile, used: set[str], elsewhere: tuple[str, ...]) -> None:
    """`elsewhere`: prefixes of the parts that are taken from another file."""
    unexpected = [key for key in source if key not in used and not key.startswith(elsewhere)
                  and not any(re.fullmatch(pattern, key) for pattern in HARMLESS)]
    if unexpected:
        raise CheckpointError(f"{source.path}: {len(unexpected)} tensors belong to no part of this model, "
                              f"first: {unexpected[0]!r}; {guess_checkpoint(source)}")


def _ldm(name: Name) -> str:
    return name.ldm


def _ldm_flat_clip(name: Name) -> str:
    return name.ldm.replace(".text_model.", ".")  # CompVis files from before transformers 4.20


def _bare_ldm(name: Name) -> str:
    return name.ldm.removeprefix(LDM_PREFIX[name.component])  # a VAE alone


def _diffusers(name: Name) -> str:
    return name.diffusers


def _ema_key(key: str) -> str:
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def _part(path: Path, folder: str) -> tuple[TensorFile, dict[str, dict]]:
    """Tensors and config of a VAE or a text encoder named on its own: a file, its folder, or a whole model of any kind."""
    if not path.is_dir():
        return read_tensors(path), {}
    found = read_folder(path, components=(folder,))
    where = folder if folder in found.components else ""
    config = found.configs.get(f"{where}/config.json".lstrip("/"))
    return found.components[where], {} if config is None else {f"{folder}/config.json": config}


def config_of_file(file: TensorFile) -> ModelConfig:
    """Of a plain checkpoint: from our own metadata, else the known family that its shapes tell. Raises CheckpointError."""
    path = file.path
    if CONFIG_KEY in file.metadata:
        try:
            return ModelConfig.from_dict(json.loads(file.metadata[CONFIG_KEY]))
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{path}: its {CONFIG_KEY} metadata is not a model config: {error}") from None
    facts = ldm_facts(file.shapes)
    if not facts:
        raise CheckpointError(f"{path}: not a Stable Diffusion 1.x checkpoint: {guess_checkpoint(file)}")
    family = replace(SD15, unet=replace(SD15.unet, in_channels=facts["in_channels"]))
    differs = [f"{k} {v}" for k, v in facts.items() if getattr(family.unet, k) != v]
    if differs:
        raise CheckpointError(f"{path}: no known family: its UNet has {', '.join(differs)}; {guess_checkpoint(file)}; heads, "
                              f"activation, prediction and noise schedule are not in the file: pass config=ModelConfig(...)")
    return family


def _config_of_folder(configs: Mapping[str, dict], path: Path) -> ModelConfig:
    """From the JSON files of a diffusers folder. Raises CheckpointError for what SD 1.x does not have."""
    parts = ("unet/config.json", "vae/config.json", "text_encoder/config.json")
    if parts[0] not in configs:
        raise CheckpointError(f"{path}: has no {parts[0]}, so its heads and activation are unknown: "
                              f"pass config=ModelConfig(...)")
    unet, vae, text = (configs.get(part, {}) for part in parts)
    scheduler = configs.get("scheduler/scheduler_config.json", {})
    blocks = unet.get("down_block_types", SD15_BLOCKS)
    foreign = [f"unet {k} = {unet[k]!r}" for k, allowed in (
        ("use_linear_projection", (None, False)), ("addition_embed_type", (None,)), ("class_embed_type", (None,)),
        ("transformer_layers_per_block", (None, 1)), ("num_class_embeds", (None,))) if unet.get(k) not in allowed]
    if foreign:
        raise CheckpointError(f"{path}: not Stable Diffusion 1.x: {', '.join(foreign)}")
    try:
        return ModelConfig(
            name=path.name,
            clip=_pick(CLIPConfig, text, vocab_size="vocab_size", max_tokens="max_position_embeddings", width="hidden_size",
                       layers="num_hidden_layers", heads="num_attention_heads", mlp_width="intermediate_size",
                       activation="hidden_act"),
            vae=_pick(VAEConfig, vae, image_channels="in_channels", latent_channels="latent_channels",
                      widths="block_out_channels", layers_per_block="layers_per_block", norm_groups="norm_num_groups",
                      scale="scaling_factor"),
            unet=_pick(UNetConfig, unet | {"attention": ["CrossAttn" in kind for kind in blocks]},
                       in_channels="in_channels", out_channels="out_channels", widths="block_out_channels",
                       attention="attention", layers_per_block="layers_per_block", heads="attention_head_dim",
                       context_width="cross_attention_dim", norm_groups="norm_num_groups"),
            prediction={"epsilon": "eps", "v_prediction": "v"}.get(scheduler.get("prediction_type", "epsilon"), "?"),
            beta_schedule=scheduler.get("beta_schedule", "scaled_linear"), beta_start=scheduler.get("beta_start", 0.00085),
            beta_end=scheduler.get("beta_end", 0.012), train_timesteps=scheduler.get("num_train_timesteps", 1000),
            zero_terminal_snr=scheduler.get("rescale_betas_zero_snr", False),
            image_size=_image_size(unet, vae),
        )
    except (ConfigError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: its config files describe no model of this kind: {error}") from None


def _pick(cls, values: Mapping, **names: str):
    """A config dataclass from a diffusers JSON; what the JSON leaves out is as in SD 1.x."""
    found = {ours: values[theirs] for ours, theirs in names.items() if values.get(theirs) is not None}
    for ours, value in found.items():
        if isinstance(value, list) != isinstance(getattr(cls(), ours), tuple):  # a list: SD 2 and others vary it by block
            raise ConfigError(f"{names[ours]} is {value!r}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


def _image_size(unet: Mapping, vae: Mapping) -> int:
    size = unet.get("sample_size")
    return (size if isinstance(size, int) else 64) * 2 ** (len(vae.get("block_out_channels", "1234")) - 1)


# ---- LoRA files ------------------------------------------------------------------------------------------------------

def load_lora_into_models(models: Models, path: str | os.PathLike, name: str | None = None, multiplier: float = 1.0, *,
                          skip: str | None = None, block_weights=None) -> Models:
    """Load a LoRA of any program, a file or a folder, and make it active; None names it after the file.

    A name in use is replaced, whatever its rank. `skip`: a regular expression over keys and module paths to leave out.
    `block_weights`: {"text_encoder": 0.5, "mid_block": 0, ...} or a list of 17, 25 or 26 numbers (sd.lora_blocks).
    The report is `models.lora_reports[name]`. Raises CheckpointError, LoRAFormatError or BlockWeightError: every tensor is
    applied, skipped as asked, or named.
    """
    name = Path(path).stem if name is None else name
    models.lora_reports[name] = load_lora_weights(models, path, name, multiplier, skip=skip, block_weights=block_weights)
    log.info("%s", models.lora_reports[name])
    base = models.lora_reports[name].metadata.get(BASE_HASH)
    if base and log.isEnabledFor(logging.INFO) and models.model_hash and not base.startswith(models.model_hash):
        log.info("LoRA %r was made on a base with hash %s, this one has %s", name, base, models.model_hash)
    return models


def save_models_lora(models: Models, path: str | os.PathLike, name: str | None = None, *,
                     metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None,
                     format: str = "kohya") -> None:
    """Write one adapter (None: the only one) of all networks, with what is known of the base in its metadata.

    `format`: kohya, diffusers, comfyui (one file each) or peft (a folder). Raises LoRAFormatError for a kind of adapter that
    the format cannot hold.
    """
    header = lora_metadata(lora_state(models, name), models.config) | _base_facts(models)
    header["ss_base_model_version"] = header.get("ss_base_model_version", models.config.name)
    save_lora_weights(models, path, name, metadata=header | dict(metadata or {}), dtype=dtype, format=format)


def _base_facts(models: Models) -> dict[str, str]:
    """What the header of a file says of the base that it was made on."""
    facts = {} if models.source is None else {"ss_sd_model_name": Path(models.source).name}
    if models.model_hash is not None:
        facts |= {BASE_HASH: models.model_hash, "ss_sd_model_hash": old_model_hash(models.source)}
    return facts


def load_embedding(models: Models, path: str | os.PathLike, word: str | None = None) -> list[str]:
    """Load the learned words (textual inversion) of a file or folder of any program; returns them, for use in prompts.

    `word`: another name for the one in the file, such as "<s0><s1>". A prompt holds a word whole and in any case. Raises
    CheckpointError, or EmbeddingError for vectors that do not fit and for a word that is there with others; `models` are
    then as they were.
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
    """Forget a learned word. Raises EmbeddingError for one that is not there."""
    with exclusive(models):
        models["clip"].learned.forget(word)


def save_embedding(models: Models, path: str | os.PathLike, word: str | None = None, *,
                   metadata: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32) -> None:
    """Write a learned word (None: the only one) as .safetensors, or .pt without metadata, which every program reads."""
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
    """Base + Σ multiplier · LoRA, written as one plain checkpoint for deployment; summed in fp32 and rounded once.

    `dtype=None`: each tensor keeps that of the base. LoRAs inside the base are merged too, with their own multipliers.
    The base stays mapped and one tensor at a time is merged and written, so the peak of memory is little above the base
    file. `skip` and `block_weights` (path of a LoRA -> its block weights) are those of `load_lora_into_models`.
    Raises as that and `save_merged` do, and CheckpointError for an `out` that it would read from. Returns what was written,
    loaded as stored.
    """
    check_target(out)
    block_weights = dict(block_weights or {})
    if stray := [path for path in block_weights if path not in loras]:
        raise LoRAError(f"block weights are given for {os.fspath(stray[0])!r}, which is not one of the LoRAs to merge")
    keep_sources(out, model_path(ckpt_path), *loras, *filter(None, (load.get("vae"), load.get("text_encoder"))))
    models = preload_models_from_standard_weights(ckpt_path, device, dtype="stored", **load)
    for path, multiplier in loras.items():
        name = os.fspath(path)
        while name in models.lora_reports:  # of a LoRA inside the base, or the same path as str and as Path
            name += "'"
        load_lora_into_models(models, path, name, multiplier, skip=skip, block_weights=block_weights.get(path))
    if not adapter_names(models):
        raise LoRAError("there is nothing to merge: no LoRA is named, and the base has none inside")
    if words := models["clip"].words:
        raise EmbeddingError(f"the LoRAs bring the learned words {', '.join(map(repr, words))}, which no plain checkpoint "
                             f"holds; leave them out with skip, and save_embedding them as files of their own")
    save_merged(models, out, dtype=dtype)
    del models  # and with it the base, before the next one is mapped
    return preload_models_from_standard_weights(out, device, dtype="stored")


def count_parameters(models) -> dict[str, int]:
    """Parameters of the base (without learned words), of all adapters, and of those that are trainable now."""
    networks = [models] if isinstance(models, nn.Module) else [m for m in models.values() if isinstance(m, nn.Module)]
    adapters = sum(p.numel() for m in networks for layer in lora_layers(m).values() for p in layer.adapters.parameters())
    words = sum(p.numel() for network in networks for m in network.modules() if isinstance(m, LearnedWords) for p in m.values())
    total = sum(p.numel() for m in networks for p in m.parameters()) - words
    trainable = sum(p.numel() for m in networks for p in m.parameters() if p.requires_grad)
    return {"base": total - adapters, "lora": adapters, "trainable": trainable}
