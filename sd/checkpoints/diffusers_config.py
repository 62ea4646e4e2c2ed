"""The JSON files of a diffusers folder: to a ModelConfig and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sd.config import CLIPConfig, ConfigError, ModelConfig, UNetConfig, VAEConfig
from sd.files.tensor_file import CheckpointError
from sd.sampling.noise import alphas_cumprod

SD15_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)


def config_of_folder(configs: Mapping[str, dict], path: Path) -> ModelConfig:
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


def _scheduler_config(c: ModelConfig) -> dict[str, object]:
    """PNDM, as in SD 1.x; with a zero terminal SNR the one that can begin there."""
    betas = {"beta_start": c.beta_start, "beta_end": c.beta_end, "beta_schedule": c.beta_schedule}
    if c.beta_schedule == "cosine":  # which theirs has not; the betas that it amounts to take precedence over the name
        abar = alphas_cumprod(c)
        betas["trained_betas"] = (1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).tolist()
    kind = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**(kind if c.zero_terminal_snr else {"_class_name": "PNDMScheduler", "skip_prk_steps": True}), **betas,
            "num_train_timesteps": c.train_timesteps, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
            "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[c.prediction]}


def folder_configs(c: ModelConfig) -> dict[str, dict]:
    """The JSON files with which StableDiffusionPipeline.from_pretrained loads the folder."""
    scheduler = _scheduler_config(c)
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.unet.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in c.unet.attention[::-1]]
    n = len(c.vae.widths)
    version = {"_diffusers_version": "0.30.0"}  # what these files say holds since then; the inpainting pipeline asks for it
    return {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline", **version, "feature_extractor": [None, None],
            "image_encoder": [None, None], "requires_safety_checker": False, "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler["_class_name"]], "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"]},
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel", **version, "sample_size": c.image_size // c.vae.factor,
            "in_channels": c.unet.in_channels, "out_channels": c.unet.out_channels, "block_out_channels": list(c.unet.widths),
            "down_block_types": down, "up_block_types": up, "layers_per_block": c.unet.layers_per_block,
            "attention_head_dim": c.unet.heads, "cross_attention_dim": c.unet.context_width,
            "norm_num_groups": c.unet.norm_groups},
        "vae/config.json": {
            "_class_name": "AutoencoderKL", **version, "sample_size": c.image_size, "in_channels": c.vae.image_channels,
            "out_channels": c.vae.image_channels, "latent_channels": c.vae.latent_channels,
            "block_out_channels": list(c.vae.widths), "down_block_types": ["DownEncoderBlock2D"] * n,
            "up_block_types": ["UpDecoderBlock2D"] * n, "layers_per_block": c.vae.layers_per_block,
            "norm_num_groups": c.vae.norm_groups, "scaling_factor": c.vae.scale},
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": c.clip.vocab_size,
            "hidden_size": c.clip.width, "intermediate_size": c.clip.mlp_width, "num_hidden_layers": c.clip.layers,
            "num_attention_heads": c.clip.heads, "max_position_embeddings": c.clip.max_tokens,
            "hidden_act": c.clip.activation, "projection_dim": c.clip.width, "layer_norm_eps": 1e-5,
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407},
        "scheduler/scheduler_config.json": version | scheduler,
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": c.clip.max_tokens, "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    }
