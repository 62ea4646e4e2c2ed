"""LoRA files: readers and writers to one canonical form, {module path: AdapterWeights}.

Facts about the formats stand in docs/design.md. Every tensor of a file is applied or named in an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd.names import Name


class LoRAFormatError(ValueError):
    """A LoRA file that cannot be read or written as asked; the message names the file's offenders."""


@dataclass
class AdapterWeights:
    """The tensors of one adapter under its kind's own names. alpha None: the kind has no scale."""

    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def rank(self) -> int | None:
        return self.tensors["down"].shape[0] if "down" in self.tensors else None


# kohya's tensor names (and LyCORIS') -> (kind, our name); one table for both directions.
KOHYA_TENSORS = {
    "lora_down.weight": ("lora", "down"),
    "lora_up.weight": ("lora", "up"),
    "diff": ("full", "diff"),
    "diff_b": ("full", "diff_b"),
    "w_norm": ("full", "diff"),
    "b_norm": ("full", "diff_b"),
}
MAGNITUDE = "dora_scale"
NEEDED = {"lora": ("down", "up"), "full": ("diff",)}


def read_kohya(tensors: Mapping[str, Tensor], modules: Mapping[str, str], where: str = "the file") -> dict[str, AdapterWeights]:
    """kohya's spelling to {module path: AdapterWeights}; `modules`: every name that the model knows -> module path.

    Raises LoRAFormatError for unknown modules or tensors, half pairs, and values that are not finite.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    unknown, strange = [], []
    for key, tensor in tensors.items():
        module, tail = _split(key)
        if tail is None:
            strange.append(key)
        elif module not in modules:
            unknown.append(module)
        else:
            parts.setdefault(module, {})[tail] = tensor
    if strange:
        raise LoRAFormatError(f"{where}: {len(strange)} of {len(tensors)} tensors are not understood, "
                              f"first: {strange[0]!r}; {guess_file(tensors)}")
    if unknown:
        names = sorted(set(unknown))
        raise LoRAFormatError(f"{where}: {len(names)} of {len(names) + len(parts)} LoRA modules are unknown to this model, "
                              f"first: {names[0]!r}; {guess_file(tensors)}")
    state: dict[str, AdapterWeights] = {}
    for module, found in parts.items():
        if modules[module] in state:
            raise LoRAFormatError(f"{where}: {module!r} is a second LoRA for {modules[module]}; the file spells it twice")
        state[modules[module]] = _weights(module, found, where)
    return state


def write_kohya(state: Mapping[str, AdapterWeights], names: Iterable[Name],
                dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The inverse of `read_kohya`. A module that kohya has no name for is written under its module path. alpha always."""
    kohya = {name.path: name.kohya or name.path for name in names}
    tensors: dict[str, Tensor] = {}
    for path, weights in state.items():
        module, found = kohya.get(path, path), dict(weights.tensors)
        if "magnitude" in found:
            tensors[f"{module}.{MAGNITUDE}"] = found.pop("magnitude")
        norm = weights.kind == "full" and found["diff"].dim() == 1
        tails = {ours: tail for tail, (kind, ours) in KOHYA_TENSORS.items()
                 if kind == weights.kind and (kind != "full" or tail.endswith("_norm") == norm)}
        for ours, tensor in found.items():
            tensors[f"{module}.{tails[ours]}"] = tensor
    tensors = {k: t.detach().cpu().to(dtype or t.dtype).contiguous() for k, t in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise LoRAFormatError(f"{key} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}, "
                                  f"so the LoRA is not written")
    return tensors | {f"{kohya.get(path, path)}.alpha": _number(w.alpha) for path, w in state.items() if w.alpha is not None}


def _number(value: float) -> Tensor:
    """0-d, fp32 as kohya has it, fp64 where fp32 would round: alpha is a factor of every ΔW, whatever dtype the file has."""
    single = torch.tensor(float(value))
    return single if single.item() == value else single.double().fill_(value)


def _split(key: str) -> tuple[str, str | None]:
    """'<module>.<tail>' with a tail that we know; the module may hold dots."""
    for tail in (*KOHYA_TENSORS, MAGNITUDE, "alpha"):
        if key.endswith("." + tail):
            return key[: -len(tail) - 1], tail
    return key, None


def _weights(module: str, found: dict[str, Tensor], where: str) -> AdapterWeights:
    for tail, tensor in found.items():
        if not torch.isfinite(tensor.float()).all():  # 8-bit floats know no isfinite
            raise LoRAFormatError(f"{where}: {module}.{tail} holds values that are not finite (NaN or infinity)")
    kinds = sorted({KOHYA_TENSORS[tail][0] for tail in found if tail in KOHYA_TENSORS})
    if len(kinds) != 1:
        has = " and ".join(kinds) or "only " + ", ".join(sorted(found))
        raise LoRAFormatError(f"{where}: {module} is no adapter of one kind: it has {has}")
    weights = AdapterWeights(kinds[0], {KOHYA_TENSORS[t][1]: v for t, v in found.items() if t in KOHYA_TENSORS})
    missing = [name for name in NEEDED[weights.kind] if name not in weights.tensors]
    if missing:
        raise LoRAFormatError(f"{where}: {module} is half a pair: {', '.join(sorted(found))} without its {missing[0]}")
    if MAGNITUDE in found:
        weights.tensors["magnitude"] = found[MAGNITUDE]
    empty = [tail for tail, tensor in found.items() if not tensor.numel() or tensor.dim() == 0 and tail != "alpha"]
    if empty:
        raise LoRAFormatError(f"{where}: {module}.{empty[0]} has shape {list(found[empty[0]].shape)}, which fits no layer")
    if weights.kind == "lora":
        alpha = found.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            raise LoRAFormatError(f"{where}: {module}.alpha has shape {list(alpha.shape)}; one number is expected")
        weights.alpha = float(weights.rank if alpha is None else alpha)  # kohya: a missing alpha means alpha = rank
    elif "alpha" in found:
        raise LoRAFormatError(f"{where}: {module} has an alpha, but a full difference has no scale")
    return weights


def guess_file(tensors: Mapping[str, Tensor]) -> str:
    """One clause on what a file of these tensors seems to be."""
    keys = list(tensors)
    contexts = {t.shape[1] for k, t in tensors.items() if k.endswith("attn2_to_k.lora_down.weight") and t.dim() > 1}
    for pattern, what in (
        (r"^lora_te2_|^lora_unet_(input|middle|output)_block", "it seems to be a LoRA for SDXL"),
        (r"^lora_unet_(double|single)_blocks|transformer\.single_transformer_blocks", "it seems to be a LoRA for Flux"),
        (r"^lora_te_text_model_encoder_layers_(1[2-9]|2\d)_", "it seems to be a LoRA for SD 2"),
        (r"joint_blocks", "it seems to be a LoRA for SD 3"),
        (r"\.lora_[AB]\b|[._]lora\.(down|up)\.|lora_linear_layer", "it seems to be spelt as in diffusers or PEFT"),
        (r"^unet:\d+:|^text_encoder:\d+:", "it seems to be a LoRA of cloneofsimo/lora"),
        (r"\.(hada_w1|lokr_w|oft_|lora_mid|a1\.|b1\.)", "it seems to be a LyCORIS file of a kind that is not read here"),
        (r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.", "it seems to be a whole checkpoint, not a LoRA"),
    ):
        if any(re.search(pattern, key) for key in keys):
            return what
    if contexts:
        base = {768: "SD 1.x", 1024: "SD 2", 2048: "SDXL"}.get(min(contexts), "another base model")
        return f"it seems to be a LoRA for {base} (text embeddings of width {min(contexts)})"
    if any(re.match("lora_(unet|te1?)_", key) for key in keys):
        return "it seems to be a kohya LoRA for another base model"
    return "it does not look like a LoRA" if keys else "it is empty"


def component_of(key: str) -> str:
    """What the start of a key says of the network it is for, without a model at hand."""
    for start, name in (("lora_unet_", "UNet"), ("unet.", "UNet"), ("lora_te", "text encoder"), ("text_enc", "text encoder")):
        if key.startswith(start):
            return name
    return key.split(".")[0]


def module_lookup(names: Iterable[Name]) -> dict[str, str]:
    """Every name under which a LoRA file may address a module -> module path."""
    table: dict[str, str] = {}
    for name in names:
        table[name.path] = name.path
        if name.kohya:
            table[name.kohya] = name.path
        if name.component == "clip":  # sdxl-minded writers number the only text encoder
            table["lora_te1_" + name.kohya.removeprefix("lora_te_")] = name.path
            for prefix in ("lora_te_", "lora_te1_"):  # transformers >= 5.6 has no text_model
                table[prefix + name.kohya.removeprefix("lora_te_text_model_")] = name.path
    return table
