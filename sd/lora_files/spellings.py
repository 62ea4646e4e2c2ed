"""Tensor names in LoRA files, and guesses from them at what a file is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from sd.adapters.kinds import KINDS


class Entry(NamedTuple):
    """One tensor of a file, or a slice of one."""

    key: str  # in the file; "" if the value comes from its metadata
    module: str  # as spelled in the file, or our path
    tail: str  # which tensor of the module: a name in TENSORS, MODIFIER_TENSORS, ...
    tensor: Tensor


# Tensor names of kohya and LyCORIS -> (kind, our name). Of kinds that share names, the first in KINDS, whose kind_of decides.
TENSORS = {key: (kind, ours) for kind, cls in reversed(KINDS.items()) for key, ours in cls.keys.items()}

# Names of flags, and names that count only beside another one.
FLAG_TENSORS = {key for cls in KINDS.values() for key, ours in cls.keys.items() if ours in cls.flags}
ONLY_BESIDE = {key: other for cls in KINDS.values() for key, other in cls.only_beside.items()}

# Tensors that any kind may have in addition to its own.
MODIFIER_TENSORS = {"diff_b": "diff_b", "b_norm": "diff_b", "dora_scale": "magnitude"}

SCALES = ("alpha", "scale", "scalar")  # `scale` replaces alpha / rank, `scalar` is an additional factor

SPARSE = ("bias_indices", "bias_values", "bias_size")  # the sparse residual of a low-rank ΔW (not a bias)

UP_BIAS = "lora_up.bias"  # added after `up`, so scaled by alpha / rank

TOKEN = "token"  # a learned word bundled with the LoRA; the entry's module is the word

IGNORED = "ignored"  # a tensor that its program writes but never reads


def guess_file(tensors: Mapping[str, Tensor]) -> str:
    """A clause for messages that says what a file of these tensors seems to be."""
    keys = list(tensors)
    contexts = {t.shape[1] for k, t in tensors.items() if t.dim() > 1
                and re.search(r"attn2[._]to_k(\.processor|_lora)?\.(lora_down|lora_A|lora\.down|down)\b", k)}
    base = {768: "SD 1.x", 1024: "SD 2", 2048: "SDXL"}.get(min(contexts), "another base model") if contexts else None
    for pattern, what in (
        (r"^lora_te2_|^text_encoder_2\.", "it seems to be a LoRA for SDXL"),
        (r"^lora_(unet|transformer)_(double|single)_blocks|(single_transformer|double|single)_blocks\.\d+\.",
         "it seems to be a LoRA for Flux"),
        (r"^lora_te_text_model_encoder_layers_(1[2-9]|2\d)_", "it seems to be a LoRA for SD 2"),
        (r"joint_blocks|joint_transformer_blocks", "it seems to be a LoRA for SD 3"),
        (r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.", "it seems to be a whole checkpoint, not a LoRA"),
    ):
        if any(re.search(pattern, key) for key in keys):
            return what
    if base:
        return f"it seems to be a LoRA for {base} (text embeddings of width {min(contexts)})"
    if any(re.match("lora_unet_(input|middle|output)_block", key) for key in keys):
        return "it seems to be a LoRA for SDXL"
    if any(re.match(r"lora_(unet|te1?)_|unet\.|text_encoder\.|diffusion_model\.", key) for key in keys):
        return "it is damaged, or a LoRA for another base model"
    return "it does not look like a LoRA" if keys else "it is empty"


def guess_clause(tensors: Mapping[str, Tensor] | None) -> str:
    """`guess_file` as the end of a sentence; "" without tensors."""
    return f"; {guess_file(tensors)}" if tensors else ""


def looks_like_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file of these tensors is a LoRA rather than a checkpoint, judged by names alone."""
    parts = (*(tail for tail in TENSORS if re.search(r"[._]", tail)), ".diff")  # a single plain word is no evidence
    return any("lora" in key.lower() or key.endswith(parts) or re.match(r"(unet|text_encoder):\d+:|lycoris_", key)
               or key.endswith((".module.A", ".module.B")) for key in tensors)
