"""Models to files: one .safetensors in LDM layout, or a diffusers folder; atomic, and one tensor at a time.

`models` is the Models that a loader returns. Active adapters are merged into what is written, tensor by tensor, when its
turn to be written comes: a merge needs little more memory than the base that it reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from sd.checkpoint import CheckpointError, Lazy, all_finite, atomic_folder, atomic_write, write_safetensors
from sd.config import CONFIG_KEY, ModelConfig
from sd.lora import LoRAError, LoRALayer, adapter_names, exact, exclusive, lora_layers
from sd.names import Name, component_names
from sd.noise import alphas_cumprod
from sd.quant import quantized_kinds
from sd.tokenizer import data_dir

Reader = Callable[[nn.Module, str], Tensor]  # (layer, "weight" or "bias") -> the tensor that is to be written


def save_checkpoint(models, path: str | os.PathLike, *, dtype: torch.dtype | None = None,
                    metadata: Mapping[str, str] | None = None) -> None:
    """Write the whole model: a path ending in .safetensors in LDM layout, any other path as a diffusers folder. Atomic.

    Raises LoRAError while adapters are attached: merge_lora_weights makes them part of the model, remove_lora drops them,
    save_merged leaves them and writes the model as they make it.
    """
    path = check_target(path)
    if adapter_names(models):
        raise LoRAError(f"the model carries the adapters {', '.join(map(repr, adapter_names(models)))}; "
                        f"merge_lora_weights(models) or remove_lora(models) before saving the checkpoint")
    _save(models, path, dtype, metadata, _base)


def save_merged(models, path: str | os.PathLike, *, dtype: torch.dtype | None = None,
                metadata: Mapping[str, str] | None = None) -> None:
    """As save_checkpoint, with the active adapters merged into what is written; the models stay as they are.

    Each tensor is round(W + Σ mᵢ ΔWᵢ) in `dtype` (None: its own), summed in fp32 and made when its turn comes; one that no
    adapter changes is written bit for bit. Raises CheckpointError, and writes nothing, for values that overflow `dtype`.
    """
    path = check_target(path)
    with exclusive(models):
        if any(layer.active.per_image for layer in lora_layers(models).values()):
            raise LoRAError("multipliers that differ from image to image cannot be merged into one weight")
        _save(models, path, dtype, metadata, _merged)


def check_target(path: str | os.PathLike) -> Path:
    """Raises CheckpointError where nothing could be saved: better before a long computation than after it."""
    path = Path(path)
    if path.suffix.lower() == ".safetensors":
        return path
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise CheckpointError(f"{path}: checkpoints are written as .safetensors or as a diffusers folder, not as {path.suffix}")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; name a new folder, or a .safetensors file")
    there = {file.name for file in path.iterdir()} if path.exists() else set()
    if there and ("model_index.json" not in there or there - FOLDER_ENTRIES):
        first = min(there - FOLDER_ENTRIES, default=min(there))
        raise CheckpointError(f"{path}: is a folder with other things in it, such as {first}; "
                              f"name a new folder, or a .safetensors file")
    return path


def ldm_state(models, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """{LDM key: tensor} of the whole model, without adapters."""
    return {key: lazy.make() for key, lazy in ldm_tensors(models, dtype).items()}


def ldm_tensors(models, dtype: torch.dtype | None = None, read: Reader | None = None) -> dict[str, Lazy]:
    """As ldm_state, made when they are written."""
    return {f"{name.ldm}.{tail}": lazy for network in models.values()
            for name, tail, lazy in _tensors(network, dtype, read or _base, ldm=True)}


def ldm_metadata(models) -> dict[str, str]:
    """What the header of a file in LDM layout says of the model."""
    quantized = {"sdlora.base_quantization": kind} if (kind := ",".join(quantized_kinds(models))) else {}
    return {"format": "pt", CONFIG_KEY: json.dumps(models.config.to_dict()), **quantized}


def _tensors(network: nn.Module, dtype: torch.dtype | None, read: Reader,
             ldm: bool = False) -> Iterator[tuple[Name, str, Lazy]]:
    """(name, "weight" or "bias", what is to be written) of all, as LDM or as diffusers shapes it."""
    for name in component_names(network.component, network.config):
        layer = network.get_submodule(name.ours)
        for tail in ("weight", "bias"):
            tensor = getattr(layer, tail, None)
            if tensor is not None:
                ones = (1, 1) if ldm and name.ldm_conv and tail == "weight" else ()
                shape, kind = (*tensor.shape, *ones), dtype or tensor.dtype
                yield name, tail, Lazy(shape, kind, partial(_made, layer, tail, read, shape, kind, f"{name.path}.{tail}"))


def _made(layer: nn.Module, tail: str, read: Reader, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
    tensor = read(layer, tail).to(dtype)
    if not tensor.is_meta and not all_finite(tensor):
        raise CheckpointError(f"{what} holds values that are not finite in {str(dtype).removeprefix('torch.')}, "
                              f"so the model is not written")
    return tensor.reshape(shape)


def _base(layer: nn.Module, tail: str) -> Tensor:
    return getattr(layer, tail).detach()


def _merged(layer: nn.Module, tail: str) -> Tensor:
    """The layer's weight or bias with what its active adapters add, in fp32; where that is nothing, its own bits."""
    base = _base(layer, tail)
    if not isinstance(layer, LoRALayer) or not layer.lora_enabled:
        return base
    adapters = [layer.adapter(name) for name in layer.multipliers]
    if tail == "bias":
        adapters = [adapter for adapter in adapters if adapter.bias_delta(layer.base_bias()) is not None]
    if not adapters:
        return base
    with exact():
        merged = layer.merged_sum()[tail == "bias"]
    unchanged = merged is None or torch.equal(merged, base.to(merged.dtype))
    return base if unchanged else merged  # -0.0 + 0.0 would be 0.0


# All that stands in a folder of ours; nothing else is ever deleted by a save.
FOLDER_ENTRIES = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def _save(models, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None, read: Reader) -> None:
    if path.suffix.lower() == ".safetensors":
        write_safetensors(path, ldm_tensors(models, dtype, read), ldm_metadata(models) | dict(metadata or {}))
    else:
        _save_folder(models, path, dtype, read)


def _save_folder(models, path: Path, dtype: torch.dtype | None, read: Reader) -> None:
    if not models.config.vae.widths:
        raise CheckpointError(f"{path}: a diffusers folder has a VAE, this model of pixels has none; save it as .safetensors")
    with atomic_folder(path) as new:
        for folder, file, networks in (("unet", "diffusion_pytorch_model", ("diffusion",)),
                                       ("vae", "diffusion_pytorch_model", ("encoder", "decoder")),
                                       ("text_encoder", "model", ("clip",))):
            tensors = {f"{name.diffusers}.{tail}": lazy
                       for key in networks for name, tail, lazy in _tensors(models[key], dtype, read)}
            (new / folder).mkdir()
            write_safetensors(new / folder / f"{file}.safetensors", tensors, {"format": "pt"})
        texts = {name: json.dumps(content, indent=2) + "\n" for name, content in _folder_configs(models.config).items()}
        texts |= {f"tokenizer/{n}": (data_dir() / n).read_text(encoding="utf-8") for n in ("vocab.json", "merges.txt")}
        for name, text in texts.items():
            (new / name).parent.mkdir(exist_ok=True)
            with atomic_write(new / name) as file:
                file.write(text.encode("utf-8"))


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


def _folder_configs(c: ModelConfig) -> dict[str, dict]:
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
