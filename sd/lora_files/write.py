"""Writes {module path: AdapterWeights} as a LoRA file of kohya, diffusers, PEFT or ComfyUI.

Nothing is dropped: whatever a format cannot hold raises an error that names it. Facts: docs/lora-formats.md.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sd.adapters.kinds import KINDS
from sd.adapters.weights import AdapterWeights, LoRAFormatError
from sd.checkpoints.names import FOLDERS, Name
from sd.files.atomic import atomic_folder, atomic_write
from sd.files.tensor_file import all_finite
from sd.files.tensors import write_safetensors, write_tensors
from sd.lora_files.header import lora_metadata, plain_number, with_hash
from sd.lora_files.modules import Modules

FORMATS = ("kohya", "diffusers", "peft", "comfyui")
PEFT_FILES = {"adapter_model.safetensors", "adapter_config.json"}  # a save replaces nothing else


def write_lora(path: str | os.PathLike, state: Mapping[str, AdapterWeights], modules: Modules, *, format: str = "kohya",
               dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA in one of FORMATS, atomically. PEFT's format is a folder, the others are one file.

    `dtype` None keeps each tensor's own. `metadata` overrides the header from `lora_metadata`. Raises LoRAFormatError if the
    format cannot hold something, if values overflow `dtype`, or if the folder holds other things.
    """
    check_format(state, modules, format)
    if format != "peft" and Path(path).is_dir():
        raise LoRAFormatError(f"{path}: is a folder; the format {format} is one file, so name one that ends in .safetensors")
    state = dict(sorted(state.items()))  # the same LoRA gives the same file, in whatever order it was read
    header = lora_metadata(state, extra=metadata)
    if format == "peft":
        _check_folder(Path(path))
        with atomic_folder(path) as folder:
            for network, (tensors, config) in peft_parts(state, modules, dtype).items():
                (folder / network).mkdir()
                write_safetensors(folder / network / "adapter_model.safetensors", tensors, with_hash(header, tensors))
                with atomic_write(folder / network / "adapter_config.json") as file:
                    file.write((json.dumps({"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None,
                                            "inference_mode": True, "bias": "none"} | config, indent=2) + "\n").encode())
        return
    if format == "diffusers":
        if Path(path).suffix.lower() == ".pt":
            raise LoRAFormatError(f"{path}: diffusers keeps alpha in the metadata, which a .pt file does not have; "
                                  f"name a .safetensors file")
        tensors, more = write_diffusers(state, modules, dtype)
        header |= more
    else:
        tensors = (write_comfyui if format == "comfyui" else write_kohya)(state, modules.names, dtype)
    write_tensors(path, tensors, with_hash(header, tensors))


UNNAMED = "a module for which it has no name"


# ---- what a format can hold --------------------------------------------------------------------------------------------

def refusals(state: Mapping[str, AdapterWeights], modules: Modules, format: str) -> dict[str, str]:
    """{module path: what `format` cannot hold of it, and why}; empty if it can hold everything. Raises LoRAFormatError."""
    if format not in FORMATS:
        raise LoRAFormatError(f"format {format!r} cannot be written; allowed: {', '.join(FORMATS)}")
    if format == "kohya":  # with LyCORIS's tensor names it holds everything
        return {}
    names, found = {name.path: name for name in modules.names}, {}
    networks: dict[str, list[AdapterWeights]] = {}
    for path, weights in state.items():
        networks.setdefault(path.split(".")[0], []).append(weights)
    for path, weights in state.items():
        name, held = names.get(path), KINDS[weights.kind].held_by
        strange = weights.tensors.keys() - set(held.get(format, ()))
        if name is None or name.component not in ("clip", "diffusion"):
            found[path] = UNNAMED
        elif format not in held:
            found[path] = f"kind {weights.kind!r}"
        elif strange:
            found[path] = f"kind {weights.kind!r} with {', '.join(sorted(strange))}"
        elif format == "comfyui" and path in modules.embeddings:
            found[path] = "a low rank of an embedding, which ComfyUI transposes"
        elif format != "comfyui" and (why := _why_not_peft(weights, networks[name.component], path in modules.embeddings)):
            found[path] = f"kind {weights.kind!r} with {why}"
    return found


def _why_not_peft(weights: AdapterWeights, network: list[AdapterWeights], embedding: bool) -> str | None:
    """Why PEFT cannot hold a module: all modules of a network must have a magnitude or none, and likewise a bias change."""
    magnitude, bias = weights.tensors.get("magnitude"), weights.tensors.get("diff_b")
    if magnitude is not None:
        if magnitude.dim() > 1 and magnitude.shape[int(embedding)] != magnitude.numel():
            return "a magnitude on the input axis"
        if not all("magnitude" in other.tensors for other in network):
            return "a magnitude, which other modules of the network lack"
    if bias is not None:
        if any("magnitude" in other.tensors or "diff_b" not in other.tensors for other in network):
            return "a bias change (diff_b), which is not all that the network's modules have"
        alpha, rank = _alpha_and_rank(weights)
        scale = alpha / rank
        if not scale or not torch.equal(_up_bias(weights).double() * scale, bias.double()):
            return "a bias change (diff_b) that alpha / rank does not divide exactly"
    return None


def _alpha_and_rank(weights: AdapterWeights) -> tuple[float, int]:
    """Of a low-rank pair, the only kind that PEFT's writers take."""
    alpha, rank = weights.alpha, weights.rank
    assert alpha is not None and rank is not None
    return alpha, rank


def check_format(state: Mapping[str, AdapterWeights], modules: Modules, format: str) -> None:
    """Raises LoRAFormatError naming the first module that `format` cannot hold, and the formats that can."""
    found = refusals(state, modules, format)
    if found:
        path, what = next(iter(found.items()))
        able = [other for other in FORMATS if path not in refusals(state, modules, other)]
        matrix = len(modules.shapes.get(path, ())) > 1 and what != UNNAMED and "diff_b" not in state[path].tensors
        hint = ", or approximate it (--approximate RANK)" if matrix else ""
        raise LoRAFormatError(f"{format} cannot hold {len(found)} of {len(state)} modules, first: {path}, {what}; "
                              f"{' and '.join(able)} can{hint}")


# ---- tensors -----------------------------------------------------------------------------------------------------------

def write_comfyui(state: Mapping[str, AdapterWeights], names: Iterable[Name],
                  dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """{key: tensor} in ComfyUI's names: LDM's for modules, kohya's and LyCORIS's for tensors."""
    def spell(name: Name) -> str:
        if name.component == "clip":
            return f"text_encoders.clip_l.transformer.{name.diffusers}"
        return name.ldm.removeprefix("model.")

    return write_kohya(state, names, dtype, spell=spell)


def write_diffusers(state: Mapping[str, AdapterWeights], modules: Modules,
                    dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({key: tensor}, metadata) as from diffusers' `save_lora_weights`; its loader takes the alphas from the metadata."""
    tensors: dict[str, Tensor] = {}
    config: dict[str, object] = {}
    for network, (found, fields) in peft_parts(state, modules, dtype, prefix="", text_model="text_model.").items():
        # diffusers detects a text encoder's spelling by its attention layers, so it fails without any.
        blind = network == "text_encoder" and "_proj.lora_A" not in "".join(found)
        for key, tensor in found.items():
            if network == "text_encoder" and key.endswith("lora_magnitude_vector"):
                key += ".weight"  # the spelling of transformers 5, by which diffusers loads text encoders
            if blind:
                key = key.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")
            tensors[f"{network}.{key}"] = tensor
        config |= {f"{network}.{field}": value for field, value in fields.items()}
    return tensors, {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}


def peft_parts(state: Mapping[str, AdapterWeights], modules: Modules, dtype: torch.dtype | None = None, *,
               prefix: str = "base_model.model.", text_model: str = "") -> dict[str, tuple[dict[str, Tensor], dict]]:
    """{"unet" or "text_encoder": ({key: tensor}, fields of its LoraConfig)}.

    A Tucker core is multiplied into `down`, in fp32 at least unless `dtype` says otherwise. `text_model`: a prefix of the text
    encoder's names. PEFT needs the names of transformers >= 5.6, without text_model; diffusers translates them.
    """
    names = {name.path: name for name in modules.names}
    networks: dict[str, dict[str, AdapterWeights]] = {}
    for path, weights in state.items():
        networks.setdefault(FOLDERS[names[path].component], {})[path] = weights
    parts = {}
    for network, members in sorted(networks.items(), reverse=True):  # the UNet first, as in diffusers
        bare = {path: names[path].diffusers.removeprefix("text_model.") for path in members}
        start = text_model if network == "text_encoder" else ""
        tensors = {f"{prefix}{start}{bare[path]}.{tail}": as_written(tensor, dtype, f"{path}: {tail}")
                   for path, weights in members.items()
                   for tail, tensor in _peft_tensors(weights, modules.shapes[path], path in modules.embeddings).items()}
        parts[network] = tensors, _peft_config({bare[path]: weights for path, weights in members.items()}, network)
    return parts


def _peft_tensors(weights: AdapterWeights, shape: tuple[int, ...], embedding: bool) -> dict[str, Tensor]:
    down, up = weights.tensors["down"], weights.tensors["up"]
    if embedding:
        tensors = {"lora_embedding_A": down, "lora_embedding_B": up}
    else:
        if "mid" in weights.tensors:
            mid = weights.tensors["mid"]
            product = torch.einsum("nm...,mi->ni...", mid.double(), down.double().flatten(1))
            down = product.to(mid.dtype if mid.dtype.itemsize >= 4 else torch.float32)
        _, rank = _alpha_and_rank(weights)
        tensors = {"lora_A.weight": down.reshape(rank, *shape[1:]),  # the factors of a 1x1 convolution may be matrices
                   "lora_B.weight": up.reshape(shape[0], -1, *(1,) * (len(shape) - 2))}
    if "magnitude" in weights.tensors:
        flat = weights.tensors["magnitude"].flatten()
        tensors["lora_magnitude_vector"] = flat.reshape(1, -1, *(1,) * (len(shape) - 2)) if len(shape) > 2 else flat
    if "diff_b" in weights.tensors:
        tensors["lora_B.bias"] = _up_bias(weights)
    return tensors


def _up_bias(weights: AdapterWeights) -> Tensor:
    """The bias of PEFT's lora_B, which PEFT multiplies by alpha / rank."""
    alpha, rank = _alpha_and_rank(weights)
    return (weights.tensors["diff_b"].double() * (rank / alpha)).to(weights.tensors["up"].dtype)


def _peft_config(members: Mapping[str, AdapterWeights], network: str) -> dict:
    """The fields of peft.LoraConfig for the target modules and their ranks and alphas; the others keep PEFT's defaults."""
    both = {module: _alpha_and_rank(weights) for module, weights in members.items()}
    alphas = {module: alpha for module, (alpha, _) in both.items()}
    ranks = {module: rank for module, (_, rank) in both.items()}
    any_of = next(iter(members.values())).tensors
    # PEFT matches patterns, which are regular expressions, at the end of a name: escaped and anchored, each fits one module.
    start = r"^(text_model\.)?" if network == "text_encoder" else "^"

    def patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
        return {start + re.escape(module): plain_number(value) for module, value in values.items() if value != usual}

    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {"r": rank, "lora_alpha": plain_number(alpha), "rank_pattern": patterns(ranks, rank),
              "alpha_pattern": patterns(alphas, alpha), "target_modules": sorted(members), "use_rslora": False,
              "use_dora": "magnitude" in any_of}
    return config | ({"lora_bias": True} if "diff_b" in any_of else {})  # PEFT has this field since 0.14


def _check_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise LoRAFormatError(f"{path}: is a file; PEFT's format is a folder, so name a new one")
    entries = sorted(path.rglob("*")) if path.exists() else []
    networks = [path / "unet", path / "text_encoder"]
    others = [e for e in entries if e not in networks and not (e.parent in networks and e.name in PEFT_FILES and e.is_file())]
    if others:
        raise LoRAFormatError(f"{path}: is a folder with other things in it, such as {others[0].name}; name a new folder")


def write_kohya(state: Mapping[str, AdapterWeights], names: Iterable[Name], dtype: torch.dtype | None = None, *,
                spell: Callable[[Name], str | None] = lambda name: name.kohya) -> dict[str, Tensor]:
    """{key: tensor} in kohya's names, or LyCORIS's for its own kinds, always with alpha where the kind has one.

    A module without such a name (in the VAE or a foreign model) is written under its module path. Raises LoRAFormatError for
    values that are not finite in `dtype`.
    """
    spelled = {name.path: spell(name) or name.path for name in names}
    return {f"{spelled.get(path, path)}.{tail}": tensor for path, weights in state.items()
            for tail, tensor in spell_tensors(weights, dtype, path).items()}


def spell_tensors(weights: AdapterWeights, dtype: torch.dtype | None, where: str) -> dict[str, Tensor]:
    """{kohya's or LyCORIS's tensor name: tensor} of one module, including alpha."""
    kind = KINDS[weights.kind]
    tails = {"diff_b": "diff_b", "magnitude": "dora_scale"} | kind.spelling(weights.tensors)
    found = {tails[name]: as_written(tensor, dtype, f"{where}: {name}") for name, tensor in weights.tensors.items()}
    alpha = kind.no_alpha if weights.alpha is None else weights.alpha
    return found if alpha is None else found | {"alpha": _number(alpha)}


def as_written(tensor: Tensor, dtype: torch.dtype | None, what: str) -> Tensor:
    """The tensor on the CPU, contiguous, in `dtype` if floating point. Raises LoRAFormatError for values that overflow it."""
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.to(dtype or tensor.dtype)
    if not all_finite(tensor):
        raise LoRAFormatError(f"{what} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}, "
                              f"so the LoRA is not written")
    return tensor


def _number(value: float) -> Tensor:
    """0-d, in fp32 like kohya's, or in fp64 if fp32 would round it: alpha scales ΔW, whatever dtype the file has."""
    single = torch.tensor(float(value))
    return single if single.item() == value else single.double().fill_(value)
