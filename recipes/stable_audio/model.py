"""Stable Audio's diffusion transformer, from diffusers or stable-audio-tools, with one interface; loss, sampling and files.

Legend: B sounds, N latents in time, t in 0..1 with alpha = cos(t pi / 2) and sigma = sin(t pi / 2).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.stable_audio.tones import PATCH, RATE
from sd.files.tensor_file import CheckpointError, TensorFile
from sd.files.tensors import read_tensors, write_safetensors
from sd.lora import LoadReport, load_lora_weights
from sd.lora_files.read import open_lora
from sd.sampling.noise import Schedule
from sd.sampling.samplers import run

KINDS = 8  # size of the one-hot vector of a pitch
HEADER = "stable_audio"


class DiffusersAudio(nn.Module):
    """diffusers' StableAudioDiTModel, under its name in pipelines, `transformer`."""

    def __init__(self, **options):
        super().__init__()
        from diffusers import StableAudioDiTModel
        self.transformer = StableAudioDiTModel(in_channels=PATCH, out_channels=PATCH, cross_attention_input_dim=KINDS,
                                               global_states_input_dim=1, **options)

    def forward(self, x: Tensor, t: Tensor, pitch: Tensor) -> Tensor:
        """Predict v [B, PATCH, N] from x [B, PATCH, N] at t [B] for pitches [B]."""
        from diffusers.models.embeddings import get_1d_rotary_pos_embed
        tokens, seconds = conditions(pitch, x)
        rotary = get_1d_rotary_pos_embed(self.transformer.config.attention_head_dim // 2, x.shape[2] + 1, use_real=True,
                                         repeat_interleave_real=False)  # + 1: the position of `seconds`
        return self.transformer(x, t, tokens, seconds[:, None], rotary, return_dict=False)[0]


class ToolsAudio(nn.Module):
    """stable-audio-tools' DiffusionTransformer, whose blocks are in its attribute `transformer`."""

    def __init__(self, **options):
        super().__init__()
        from stable_audio_tools.models.dit import DiffusionTransformer
        self.model = DiffusionTransformer(io_channels=PATCH, cond_token_dim=KINDS, global_cond_dim=1, **options)

    def forward(self, x: Tensor, t: Tensor, pitch: Tensor) -> Tensor:
        """Like DiffusersAudio.forward."""
        tokens, seconds = conditions(pitch, x)
        return self.model(x, t, cross_attn_cond=tokens, global_embed=seconds, use_checkpointing=False)


LIBRARIES = {"diffusers": DiffusersAudio, "stable_audio_tools": ToolsAudio}


def conditions(pitch: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens in place of a prompt [B, 1, KINDS], length in seconds [B, 1])."""
    seconds = x.shape[2] * PATCH / RATE
    return KINDS * F.one_hot(pitch, KINDS)[:, None].to(x.dtype), x.new_full((len(x), 1), seconds)


def new_model(config: Mapping, seed: int = 0) -> nn.Module:
    """A network with random weights: config["library"] is one of LIBRARIES, config["model"] has its options."""
    library = config.get("library", "diffusers")
    if library not in LIBRARIES:
        raise ValueError(f"library is {library!r}; allowed: {', '.join(LIBRARIES)}")
    torch.manual_seed(seed)
    try:
        model = LIBRARIES[library](**config.get("model", {}))
    except ImportError as error:
        package = {"stable_audio_tools": "--no-deps stable-audio-tools"}.get(library, library)
        raise ValueError(f"library is {library!r}, which cannot be imported ({error}); run: pip install {package}") from None
    except TypeError as error:
        raise ValueError(f"the model's options do not fit {library}: {error}") from None
    model.config = {"library": library, "model": dict(config.get("model", {}))}
    return model.eval().requires_grad_(False)


def save_model(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a model without adapters atomically, with its config in the header."""
    write_safetensors(path, model.state_dict(), {HEADER: json.dumps(model.config)})


def load_model(path: str | os.PathLike) -> nn.Module:
    """Load a model that `save_model` wrote, frozen. Raises CheckpointError for any other file."""
    file = read_tensors(path)
    if HEADER not in file.metadata:
        raise CheckpointError(f"{path}: is not a model of this recipe; `python -m recipes.stable_audio base` makes one")
    model = new_model(json.loads(file.metadata[HEADER]))
    model.load_state_dict(dict(file), strict=True)
    return model


# ---- diffusion -----------------------------------------------------------------------------------------------------------

def v_loss(model: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, pitch: Tensor) -> Tensor:
    """Mean squared error of v = alpha noise - sigma x0 (Salimans and Ho 2022), as in stable-audio-tools; t [B]."""
    alpha, sigma = (f(t * math.pi / 2)[:, None, None] for f in (torch.cos, torch.sin))
    return F.mse_loss(model(alpha * x0 + sigma * noise, t, pitch), alpha * noise - sigma * x0)


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor, pitch: Tensor, steps: int = 20) -> Tensor:
    """Sample latents from N(0, 1) noise [B, PATCH, N]. In VE scale sigma is tan(t pi / 2), so t starts slightly below 1."""
    t = torch.linspace(0.98, 0, steps + 1, dtype=torch.float64)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        angle = math.atan(sigma)
        x = x * math.cos(angle)
        v = model(x, x.new_full((len(x),), angle * 2 / math.pi), pitch)
        return math.cos(angle) * x - math.sin(angle) * v

    sigmas = torch.tan(t * math.pi / 2)
    schedule = Schedule(sigmas, t[:-1], start=math.hypot(1, sigmas[0]))
    return run("dpmpp_2m", denoise, noise * schedule.start, schedule)


# ---- LoRAs ---------------------------------------------------------------------------------------------------------------

# Module names of stable-audio-tools, which LoRAW's files use, and those of diffusers; q, k, v stay fused here.
NAMES = [(re.compile(theirs), ours) for theirs, ours in (
    (r"^(model/)*(?=to_|transformer/|pre|post)", ""), (r"^transformer/layers/", "transformer_blocks/"),
    (r"^transformer/project_", "proj_"), (r"/self_attn/", "/attn1/"), (r"/cross_attn/", "/attn2/"), (r"/to_out/", "/to_out/0/"),
    (r"/ff/ff/", "/ff/net/"), (r"^to_timestep_embed/", "timestep_proj/"), (r"^to_global_embed/", "global_proj/"),
    (r"^to_cond_embed/", "cross_attention_proj/"))]


def load_lora(model: nn.Module, path: str | os.PathLike, name: str = "default", multiplier: float = 1.0,
              scale: float = 1.0) -> LoadReport:
    """Attach a LoRA of this recipe, of LoRAW, or of any program that uses module paths; see `sd.lora.load_lora_weights`.

    `scale` is alpha / rank of LoRAW's config, which its files do not include. It is not the same as `multiplier`, since it
    goes into the norm of DoRA. Raises ValueError if it is given for another file, which has its own.
    """
    file, _ = open_lora(path)
    if not all("/" in key for key in file):
        if scale != 1:
            raise ValueError(f"scale is {scale}, but {file.path.name} is not a LoRAW file and has its own; allowed: 1")
        return load_lora_weights(model, path, name, multiplier)
    tensors = {}
    for key, tensor in file.items():
        for theirs, ours in NAMES if model.config["library"] == "diffusers" else ():
            key = theirs.sub(ours, key)
        tensors[key] = tensor * scale if "/lora_up." in key else tensor
    return load_lora_weights(model, TensorFile(file.path, tensors, file.metadata), name, multiplier)
