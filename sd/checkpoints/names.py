"""The one table of module names: ours, LDM's and diffusers'; kohya's names are derived from it.

One row per module with weights. Foreign names appear only in this folder and in sd/lora_files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sd.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig

COMPONENTS = ("clip", "encoder", "decoder", "diffusion")

# component -> (prefix of its LDM keys, diffusers folder)
LDM_PREFIX = {"clip": "cond_stage_model.transformer.", "encoder": "first_stage_model.", "decoder": "first_stage_model.",
              "diffusion": "model.diffusion_model."}
FOLDERS = {"clip": "text_encoder", "encoder": "vae", "decoder": "vae", "diffusion": "unet"}
KOHYA_PREFIX = {"clip": "lora_te_", "diffusion": "lora_unet_"}  # kohya has no name for the VAE


@dataclass(frozen=True)
class Name:
    """One module: `ours` inside its component, `ldm` with its prefix, `diffusers` inside its folder."""

    component: str
    ours: str
    ldm: str
    diffusers: str
    ldm_conv: bool = False  # LDM stores this linear weight [C, C] as a 1x1 convolution [C, C, 1, 1]

    @property
    def path(self) -> str:
        """The canonical module path, used by LoRA targets and reports."""
        return f"{self.component}.{self.ours}"

    @property
    def kohya(self) -> str | None:
        prefix = KOHYA_PREFIX.get(self.component)
        return prefix and prefix + self.diffusers.replace(".", "_")


def model_names(config: ModelConfig) -> list[Name]:
    """Every module of the model that has weights."""
    configs = {"clip": config.clip, "encoder": config.vae, "decoder": config.vae, "diffusion": config.unet}
    return [name for component in COMPONENTS for name in component_names(component, configs[component])]


def component_names(component: str, config) -> list[Name]:
    """Every module of one component that has weights. `config`: CLIPConfig, VAEConfig or UNetConfig."""
    tables: dict[str, Callable[[Any], Iterator[NameRow]]] = {"clip": _clip, "encoder": _encoder, "decoder": _decoder,
                                                              "diffusion": _unet}
    prefix = LDM_PREFIX[component]
    vae = component in ("encoder", "decoder")
    if vae and not config.widths:
        return []
    return [Name(component, ours, prefix + ldm, diffusers, ldm_conv=vae and "attention." in ours)
            for ours, ldm, diffusers in tables[component](config)]


NameRow = tuple[str, str, str]  # ours, LDM, diffusers


def _unet(config: UNetConfig) -> Iterator[NameRow]:
    n, last = config.layers_per_block, len(config.widths) - 1
    yield "time_embedding.linear_1", "time_embed.0", "time_embedding.linear_1"
    yield "time_embedding.linear_2", "time_embed.2", "time_embedding.linear_2"
    yield "conv_in", "input_blocks.0.0", "conv_in"
    k = 1  # LDM numbers the modules of the down path, then those of the up path
    for i, width in enumerate(config.widths):
        for j in range(n):
            block = f"down_blocks.{i}"
            changes = j == 0 and width != config.widths[max(i - 1, 0)]
            yield from _unet_resnet(f"{block}.resnets.{j}", f"input_blocks.{k}.0", changes)
            if config.attention[i]:
                yield from _transformer(f"{block}.attentions.{j}", f"input_blocks.{k}.1")
            k += 1
        if i < last:
            yield f"{block}.downsampler.conv", f"input_blocks.{k}.0.op", f"{block}.downsamplers.0.conv"
            k += 1
    yield from _unet_resnet("mid_block.resnets.0", "middle_block.0", False)
    yield from _transformer("mid_block.attentions.0", "middle_block.1")
    yield from _unet_resnet("mid_block.resnets.1", "middle_block.2", False)
    for i in range(last + 1):
        block, attention = f"up_blocks.{i}", config.attention[last - i]
        for j in range(n + 1):
            k = i * (n + 1) + j
            yield from _unet_resnet(f"{block}.resnets.{j}", f"output_blocks.{k}.0", True)
            if attention:
                yield from _transformer(f"{block}.attentions.{j}", f"output_blocks.{k}.1")
        if i < last:
            at = 2 if attention else 1
            yield f"{block}.upsampler.conv", f"output_blocks.{k}.{at}.conv", f"{block}.upsamplers.0.conv"
    yield "conv_norm_out", "out.0", "conv_norm_out"
    yield "conv_out", "out.2", "conv_out"


def _unet_resnet(ours: str, ldm: str, shortcut: bool) -> Iterator[NameRow]:
    for name, ldm_name in (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
                           ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")):
        if shortcut or name != "conv_shortcut":
            yield f"{ours}.{name}", f"{ldm}.{ldm_name}", f"{ours}.{name}"


ATTENTION = (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out.0"))


def _transformer(ours: str, ldm: str) -> Iterator[NameRow]:
    names = [("norm", "norm"), ("proj_in", "proj_in"), ("proj_out", "proj_out")]
    names += [(f"transformer_blocks.0.{n}", f"transformer_blocks.0.{n}") for n in ("norm1", "norm2", "norm3")]
    names += [(f"transformer_blocks.0.{attn}.{a}", f"transformer_blocks.0.{attn}.{b}")
              for attn in ("attn1", "attn2") for a, b in ATTENTION]
    names += [("transformer_blocks.0.ff.fc1", "transformer_blocks.0.ff.net.0.proj"),
              ("transformer_blocks.0.ff.fc2", "transformer_blocks.0.ff.net.2")]
    for a, b in names:  # inside a transformer, LDM and diffusers agree
        yield f"{ours}.{a}", f"{ldm}.{b}", f"{ours}.{b}"


def _clip(config: CLIPConfig) -> Iterator[NameRow]:
    def row(ours: str, theirs: str) -> NameRow:
        return ours, "text_model." + theirs, "text_model." + theirs

    yield row("token_embedding", "embeddings.token_embedding")
    yield row("position_embedding", "embeddings.position_embedding")
    for i in range(config.layers):
        for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"),
                             ("mlp.fc2", "mlp.fc2"), *((f"attention.{a}", f"self_attn.{a}") for a, _ in ATTENTION)):
            yield row(f"layers.{i}.{ours}", f"encoder.layers.{i}.{theirs}")
    yield row("final_norm", "final_layer_norm")


def _encoder(config: VAEConfig) -> Iterator[NameRow]:
    yield from _vae_ends("encoder")
    for i, width in enumerate(config.widths):
        for j in range(config.layers_per_block):
            changes = j == 0 and width != config.widths[max(i - 1, 0)]
            yield from _vae_resnet(f"down_blocks.{i}.resnets.{j}", "encoder", f"down.{i}.block.{j}", changes)
        if i < len(config.widths) - 1:
            yield (f"down_blocks.{i}.downsampler.conv", f"encoder.down.{i}.downsample.conv",
                   f"encoder.down_blocks.{i}.downsamplers.0.conv")
    yield "quant_conv", "quant_conv", "quant_conv"


def _decoder(config: VAEConfig) -> Iterator[NameRow]:
    yield "post_quant_conv", "post_quant_conv", "post_quant_conv"
    yield from _vae_ends("decoder")
    widths = config.widths[::-1]
    for i, width in enumerate(widths):
        ldm = f"up.{len(widths) - 1 - i}"  # LDM counts by resolution, so the decoder's first block has the last number
        for j in range(config.layers_per_block + 1):
            changes = j == 0 and width != widths[max(i - 1, 0)]
            yield from _vae_resnet(f"up_blocks.{i}.resnets.{j}", "decoder", f"{ldm}.block.{j}", changes)
        if i < len(widths) - 1:
            yield (f"up_blocks.{i}.upsampler.conv", f"decoder.{ldm}.upsample.conv",
                   f"decoder.up_blocks.{i}.upsamplers.0.conv")


def _vae_ends(side: str) -> Iterator[NameRow]:
    yield "conv_in", f"{side}.conv_in", f"{side}.conv_in"
    for j in range(2):
        yield from _vae_resnet(f"mid_block.resnets.{j}", side, f"mid.block_{j + 1}", False)
    attention = "mid_block.attentions.0"
    yield f"{attention}.norm", f"{side}.mid.attn_1.norm", f"{side}.{attention}.group_norm"
    for (ours, theirs), ldm in zip(ATTENTION, ("q", "k", "v", "proj_out")):
        yield f"{attention}.attention.{ours}", f"{side}.mid.attn_1.{ldm}", f"{side}.{attention}.{theirs}"
    yield "conv_norm_out", f"{side}.norm_out", f"{side}.conv_norm_out"
    yield "conv_out", f"{side}.conv_out", f"{side}.conv_out"


def _vae_resnet(ours: str, side: str, ldm: str, shortcut: bool) -> Iterator[NameRow]:
    for name in ("norm1", "conv1", "norm2", "conv2", "conv_shortcut"):
        if shortcut or name != "conv_shortcut":
            ldm_name = "nin_shortcut" if name == "conv_shortcut" else name
            yield f"{ours}.{name}", f"{side}.{ldm}.{ldm_name}", f"{side}.{ours}.{name}"


# ---- variants of these names in published files ------------------------------------------------------------------------

def modern_key(key: str, folder: str) -> str:
    """A tensor key of a diffusers folder, of any version, in the spelling of today's diffusers."""
    if folder == "vae" and ".attentions." in key:  # before diffusers 0.15
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            key = key.replace(f".{old}.", f".{new}.")
    if folder == "text_encoder" and not key.startswith("text_model."):
        if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")):  # transformers >= 5.6
            key = "text_model." + key
    return key


# Keys that a checkpoint may have besides the model's weights: known, harmless, and listed here only.
HARMLESS = (
    r"model_ema\..+",  # averaged weights, read only on request, and their counters
    r"(first_stage_model\.)?loss\..+",  # discriminator and perceptual loss of the VAE's training
    r"betas|alphas_cumprod(_prev)?|(sqrt|sqrt_one_minus|log_one_minus|sqrt_recip|sqrt_recipm1)_alphas_cumprod",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|scale_factor",
    r"(cond_stage_model\.transformer\.)?(text_model\.)?embeddings\.position_ids",  # 0, 1, 2, ...
    r"cond_stage_model\.(logit_scale|text_projection|transformer\.text_projection\.weight)",  # as ComfyUI saves SD 1.x
    r"logit_scale|text_projection\.weight|visual_projection\.weight|vision_model\..+",  # the rest of a whole CLIP
)


# ---- what kind of model a checkpoint is ---------------------------------------------------------------------------------

def ldm_facts(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """UNetConfig fields inferred from the shapes of an LDM checkpoint: in_channels, widths, layers_per_block, context_width.

    Empty if it has no such UNet.
    """
    prefix = re.escape(LDM_PREFIX["diffusion"])

    def widths(pattern: str, dims: int, axis: int) -> dict[int, int]:  # number of the input block -> width
        found = {key: re.fullmatch(prefix + pattern, key) for key, shape in shapes.items() if len(shape) == dims}
        return {int(match[1]): shapes[key][axis] for key, match in found.items() if match}

    convs, downs = (widths(rf"input_blocks\.(\d+)\.0\.{name}\.weight", 4, 0) for name in (r"in_layers\.2", "op"))
    contexts = widths(r"input_blocks\.(\d+)\.1\.transformer_blocks\.0\.attn2\.to_k\.weight", 2, 1)
    conv_in = widths(r"input_blocks\.(0)\.0\.weight", 4, 1)
    if not (convs and contexts and conv_in):
        return {}
    ends = [0, *sorted(downs), max(convs) + 1]
    steps = [[width for k, width in sorted(convs.items()) if low < k < high] for low, high in zip(ends, ends[1:])]
    return {"in_channels": conv_in[0], "widths": tuple(step[0] for step in steps if step),
            "layers_per_block": len(steps[0]), "context_width": contexts[min(contexts)]}


def guess_checkpoint(keys) -> str:
    """A clause for messages that says what a checkpoint with these keys seems to be."""
    keys = list(keys)
    for pattern, what in (
        (r"lora_(unet|te\d?)_|.*[._]lora[._](A|B|up|down)\b", "it seems to be a LoRA, not a checkpoint"),
        (r"conditioner\.embedders\.", "it seems to be SDXL"),
        (r"cond_stage_model\.model\.", "it seems to be Stable Diffusion 2 (OpenCLIP text encoder)"),
        (r"(model\.diffusion_model\.)?double_blocks\.|single_transformer_blocks\.", "it seems to be Flux"),
        (r"(model\.diffusion_model\.)?joint_blocks\.", "it seems to be Stable Diffusion 3"),
        (r"control_model\.|controlnet_", "it seems to be a ControlNet"),
        (r"model\.diffusion_model\.", "it is some latent diffusion model"),
        (r"down_blocks\.", "it seems to be a UNet of diffusers"),
        (r"first_stage_model\.|(encoder|decoder)\.(conv_in|mid)", "it seems to be a VAE"),
        (r"(cond_stage_model\.transformer\.)?(text_model|encoder\.layers)\.", "it seems to be a CLIP text encoder"),
    ):
        if any(re.match(pattern, key) for key in keys):
            return what
    return f"its first tensor is {keys[0]!r}" if keys else "it is empty"
