"""The JSON files of a diffusers folder to a ModelConfig and back, from one table of their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sd.config import SD15, CLIPConfig, ConfigError, ModelConfig, UNetConfig, VAEConfig
from sd.files.tensor_file import CheckpointError
from sd.sampling.noise import alphas_cumprod


class Field(NamedTuple):
    """A JSON key for the ModelConfig field at `path`: `write` converts our value to theirs, `read` theirs to ours."""

    path: str
    write: Callable[[Any], Any] = lambda ours: list(ours) if isinstance(ours, tuple) else ours
    read: Callable[[Any], Any] = lambda theirs: tuple(theirs) if isinstance(theirs, list) else theirs


def _blocks(kind: str, attention: tuple[bool, ...]) -> list[str]:
    return [f"CrossAttn{kind}" if a else kind for a in attention]


def _attention(kinds: list[str]) -> tuple[bool, ...]:
    return tuple("CrossAttn" in kind for kind in kinds)


PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


def _prediction(theirs: str) -> str:
    return next((ours for ours, name in PREDICTIONS.items() if name == theirs), "?")


def _scheduler(c: ModelConfig) -> str:
    """PNDM, as in SD 1.x; DDIM for a zero terminal SNR, where PNDM cannot start."""
    return "DDIMScheduler" if c.zero_terminal_snr else "PNDMScheduler"


def _trained_betas(c: ModelConfig) -> list[float] | None:
    """The cosine schedule as explicit betas, since diffusers does not know its name; `trained_betas` overrides it."""
    if c.beta_schedule != "cosine":
        return None
    abar = alphas_cumprod(c)
    return (1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).tolist()


VERSION = {"_diffusers_version": "0.30.0"}  # the oldest version that reads them like this; the inpainting pipeline checks it

# File -> key -> a Field (written and read), or a function of the config or a constant (only written), in file order.
# Keys whose value is None are omitted.
FILES: dict[str, dict[str, object]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline", **VERSION, "feature_extractor": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False, "safety_checker": [None, None],
        "scheduler": lambda c: ["diffusers", _scheduler(c)], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"]},
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel", **VERSION,
        "sample_size": lambda c: c.image_size // c.vae.factor,
        "in_channels": Field("unet.in_channels"),
        "out_channels": Field("unet.out_channels"),
        "block_out_channels": Field("unet.widths"),
        "down_block_types": Field("unet.attention", partial(_blocks, "DownBlock2D"), _attention),
        "up_block_types": lambda c: _blocks("UpBlock2D", c.unet.attention[::-1]),
        "layers_per_block": Field("unet.layers_per_block"),
        "attention_head_dim": Field("unet.heads"),
        "cross_attention_dim": Field("unet.context_width"),
        "norm_num_groups": Field("unet.norm_groups")},
    "vae/config.json": {
        "_class_name": "AutoencoderKL", **VERSION,
        "sample_size": lambda c: c.image_size,
        "in_channels": Field("vae.image_channels"),
        "out_channels": lambda c: c.vae.image_channels,
        "latent_channels": Field("vae.latent_channels"),
        "block_out_channels": Field("vae.widths"),
        "down_block_types": lambda c: ["DownEncoderBlock2D"] * len(c.vae.widths),
        "up_block_types": lambda c: ["UpDecoderBlock2D"] * len(c.vae.widths),
        "layers_per_block": Field("vae.layers_per_block"),
        "norm_num_groups": Field("vae.norm_groups"),
        "scaling_factor": Field("vae.scale")},
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
        "vocab_size": Field("clip.vocab_size"),
        "hidden_size": Field("clip.width"),
        "intermediate_size": Field("clip.mlp_width"),
        "num_hidden_layers": Field("clip.layers"),
        "num_attention_heads": Field("clip.heads"),
        "max_position_embeddings": Field("clip.max_tokens"),
        "hidden_act": Field("clip.activation"),
        "projection_dim": lambda c: c.clip.width,
        "layer_norm_eps": 1e-5, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407},
    "scheduler/scheduler_config.json": {
        **VERSION, "_class_name": _scheduler,
        "rescale_betas_zero_snr": Field("zero_terminal_snr", lambda zero: zero or None),
        "timestep_spacing": lambda c: "trailing" if c.zero_terminal_snr else None,
        "skip_prk_steps": lambda c: None if c.zero_terminal_snr else True,
        "beta_start": Field("beta_start"),
        "beta_end": Field("beta_end"),
        "beta_schedule": Field("beta_schedule"),
        "trained_betas": _trained_betas,
        "num_train_timesteps": Field("train_timesteps"),
        "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
        "prediction_type": Field("prediction", PREDICTIONS.get, _prediction)},
    "tokenizer/tokenizer_config.json": {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": lambda c: c.clip.max_tokens, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
}

# UNet keys in which later models differ, with the values allowed for SD 1.x.
OF_SD1 = {"use_linear_projection": (None, False), "addition_embed_type": (None,), "class_embed_type": (None,),
          "transformer_layers_per_block": (None, 1), "num_class_embeds": (None,)}


def folder_configs(config: ModelConfig) -> dict[str, dict]:
    """File name -> content of the JSON files that StableDiffusionPipeline.from_pretrained needs."""
    written = {file: {key: _theirs(value, config) for key, value in keys.items()} for file, keys in FILES.items()}
    return {file: {key: value for key, value in keys.items() if value is not None} for file, keys in written.items()}


def _theirs(value: object, config: ModelConfig) -> object:
    if isinstance(value, Field):
        return value.write(attrgetter(value.path)(config))
    return value(config) if callable(value) else value


def config_of_folder(configs: Mapping[str, dict], path: Path) -> ModelConfig:
    """ModelConfig from the JSON files of a diffusers folder; missing keys default to SD 1.5.

    Raises CheckpointError for other families and invalid values.
    """
    if "unet/config.json" not in configs:
        raise CheckpointError(f"{path}: has no unet/config.json, so its heads and activation are unknown: "
                              f"pass config=ModelConfig(...)")
    unet = configs["unet/config.json"]
    foreign = [f"unet {key} = {unet[key]!r}" for key, allowed in OF_SD1.items() if unet.get(key) not in allowed]
    if foreign:
        raise CheckpointError(f"{path}: not Stable Diffusion 1.x: {', '.join(foreign)}")
    try:
        found = _ours(configs)
        vae, size = VAEConfig(**found["vae"]), unet.get("sample_size")
        size = size if isinstance(size, int) else SD15.image_size // SD15.vae.factor
        return ModelConfig(name=path.name, clip=CLIPConfig(**found["clip"]), vae=vae, unet=UNetConfig(**found["unet"]),
                           image_size=size * vae.factor, **found[""])
    except (ConfigError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: its config files describe no model of this kind: {error}") from None


def _ours(configs: Mapping[str, dict]) -> dict[str, dict[str, Any]]:
    """Part of ModelConfig ("" for ModelConfig itself) -> field -> value, for every Field that the files have."""
    found: dict[str, dict[str, Any]] = {"clip": {}, "vae": {}, "unet": {}, "": {}}
    for file, keys in FILES.items():
        for key, field in keys.items():
            value = configs.get(file, {}).get(key)
            if not isinstance(field, Field) or value is None:
                continue
            if isinstance(value, list) != isinstance(attrgetter(field.path)(SD15), tuple):
                raise ConfigError(f"{key} is {value!r}")  # a list: SD 2 and others vary it per block
            part, _, name = field.path.rpartition(".")
            found[part][name] = field.read(value)
    return found
