"""Reads LoRA files of kohya, LyCORIS, diffusers, PEFT and ComfyUI into entries. Facts: docs/lora-formats.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sd.adapters.adapter import Adapter
from sd.adapters.kinds import KINDS
from sd.adapters.weights import LoRAFormatError
from sd.lora_files.modules import WRAPPERS
from sd.lora_files.spellings import MODIFIER_TENSORS, ONLY_BESIDE, SCALES, SPARSE, TENSORS, TOKEN, UP_BIAS, Entry

_PEFT_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"  # state dicts saved directly have the adapter's name in their keys

# Other programs' names for the same tensors: pattern -> (suffix of the module's name, tensor, format).
SPELLINGS = [(re.compile(pattern), module, tail, program) for pattern, module, tail, program in (
    (rf"(.+)\.lora_A{_PEFT_NAME}\.weight", "", "lora_down.weight", "PEFT"),
    (rf"(.+)\.lora_B{_PEFT_NAME}\.weight", "", "lora_up.weight", "PEFT"),
    (rf"(.+)\.lora_B{_PEFT_NAME}\.bias", "", UP_BIAS, "PEFT"),
    (rf"(.+)\.lora_embedding_A{_PEFT_NAME}", "", "lora_down.weight", "PEFT"),
    (rf"(.+)\.lora_embedding_B{_PEFT_NAME}", "", "lora_up.weight", "PEFT"),
    (rf"(.+)\.lora_magnitude_vector{_PEFT_NAME}(?:\.weight)?", "", "dora_scale", "PEFT"),
    (r"(.+)\.lora\.down\.weight", "", "lora_down.weight", "diffusers"),
    (r"(.+)\.lora\.up\.weight", "", "lora_up.weight", "diffusers"),
    (r"(.+)\.lora_linear_layer\.down\.weight", "", "lora_down.weight", "diffusers 0.18"),
    (r"(.+)\.lora_linear_layer\.up\.weight", "", "lora_up.weight", "diffusers 0.18"),
    *((rf"(.+?)(?:\.processor)?\.to_{x}_lora\.{side}\.weight", f".{module}", f"lora_{side}.weight", "diffusers attn-procs")
      for x, module in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")) for side in ("down", "up")),
)]

# As A1111 and OneTrainer bundle them: the embedding's own keys follow the word, which may contain dots.
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(?:string_to_\w+\.[^.]*|[^.]+)")

_TAILS = {*TENSORS, *MODIFIER_TENSORS, *SCALES, *SPARSE}


def read_entries(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None,
                 configs: Mapping[str, Mapping] | None = None) -> tuple[list[Entry], list[str], str]:
    """(entries, keys that are not understood, format) of a file of kohya, LyCORIS, diffusers, PEFT or ComfyUI.

    `configs`: prefix of the module names -> PEFT's config of that network, which has the alphas. Raises LoRAFormatError for
    invalid configs.
    """
    entries, strange, programs = [], [], set()
    for key, tensor in tensors.items():
        if bundled := _BUNDLED.fullmatch(key):
            entries.append(Entry(key, bundled[1], TOKEN, tensor))
            continue
        module, tail, program = _split(key, tensors)
        if tail is None:
            strange.append(key)
            continue
        if program is not None:
            programs.add(program)
            tensor = tensor.flatten() if tail == "dora_scale" else tensor  # [out] or [1, out, 1, 1]
        entries.append(Entry(key, module, tail, tensor))
    name = "PEFT" if configs else _format(entries, programs)
    configs = configs or _configs_in(metadata or {})
    entries += [entry for prefix, config in configs.items() for entry in _of_config(config, prefix, entries)]
    return entries, strange, name


def _split(key: str, keys) -> tuple[str, str | None, str | None]:
    """(module, tensor, format); the format is None for kohya's and LyCORIS's names, the tensor None for unknown ones."""
    head, _, last = key.rpartition(".")
    module, _, before = head.rpartition(".")
    if f"{before}.{last}" in _TAILS and module:
        return module, f"{before}.{last}", None
    if last in _TAILS and head and (last not in ONLY_BESIDE or f"{head}.{ONLY_BESIDE[last]}" in keys):
        return head, last, None
    for pattern, more, tail, program in SPELLINGS if "lora" in key else ():
        match = pattern.fullmatch(key)
        if match:
            return match[1] + more, tail, program
    return key, None, None


def _format(entries: list[Entry], programs: set[str]) -> str:
    if programs:
        wrapped = any(entry.module.startswith(WRAPPERS) for entry in entries)
        names = {"PEFT": "PEFT" if wrapped or not any(e.module.startswith(("unet.", "text_encoder.")) for e in entries)
                 else "diffusers"}
        return " and ".join(sorted({names.get(p, p) for p in programs}))
    kinds = {TENSORS[e.tail][0] for e in entries if e.tail in TENSORS}
    if any(e.module.startswith(("diffusion_model.", "text_encoders.")) for e in entries):
        return "ComfyUI"
    if any(KINDS[kind].lycoris_name is None for kind in kinds):
        return "sdlora"  # no other program writes this kind with these names
    lycoris = kinds - {"lora"} or any(e.tail in ("lora_mid.weight", *SPARSE) for e in entries)
    return "LyCORIS" if lycoris else "kohya"


def _configs_in(metadata: Mapping[str, str]) -> dict[str, dict]:
    """PEFT configs in diffusers' `lora_adapter_metadata`, a flat dict whose keys start with the network's name."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        flat = json.loads(text)
        configs: dict[str, dict] = {}
        for key, value in flat.items():
            network, _, name = key.partition(".")
            configs.setdefault(network + ".", {})[name] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise LoRAFormatError(f"its lora_adapter_metadata cannot be read: {error}") from None
    return configs


def _of_config(config: Mapping, prefix: str, entries: list[Entry]) -> Iterator[Entry]:
    """Entries for what only PEFT's config of a network knows: each module's alpha, and flags."""
    allowed = {cls.peft_type: cls for cls in KINDS.values() if cls.peft_type}
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2].upper()
    if kind not in allowed:
        *some, last = allowed
        raise LoRAFormatError(f"its peft_type is {kind!r}; read are {', '.join(some)} and {last}")
    modules: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        if entry.module.startswith(prefix) and entry.tail in TENSORS and entry.tensor.dim():
            modules.setdefault(entry.module, {})[entry.tail] = entry.tensor
    yield from _alphas_of(config, prefix, modules, {e.module for e in entries if e.tail == "alpha"}, allowed[kind].peft_alpha)
    for field, tail in allowed[kind].peft_fields.items():
        if not isinstance(config.get(field), bool):
            raise LoRAFormatError(f"its config has the {field} {config.get(field)!r}; true or false is needed")
        for module, found in modules.items():
            if found.keys() & allowed[kind].keys.keys():
                yield Entry("", module, tail, torch.tensor(config[field]))


def _alphas_of(config: Mapping, prefix: str, modules: Mapping[str, Mapping[str, Tensor]], given: set[str],
               field: str) -> Iterator[Entry]:
    """An alpha for each module without one, by PEFT's rules: patterns match the end of a name and override the default."""
    overall, patterns = config.get(field), config.get("alpha_pattern") or {}
    ranks, whole = _ranks(modules)
    for module in [*ranks, *whole]:
        name = module.removeprefix(prefix)
        for wrapper in WRAPPERS:  # PEFT's patterns are for the names without it
            name = name.removeprefix(wrapper)
        alpha = _of_pattern(name, patterns, overall)
        rank = ranks.get(module) or _of_pattern(name, config.get("rank_pattern") or {}, config.get("r"))
        if alpha is None or module in given:
            continue
        if module in whole and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise LoRAFormatError(f"its config gives {name} the rank {rank!r}; a whole number from 1 is needed")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise LoRAFormatError(f"its config gives {name} the alpha {alpha!r}; a finite number is needed")
        if config.get("use_rslora"):  # Kalajdzievski 2023: alpha / sqrt(rank)
            alpha = alpha * math.sqrt(rank)
        # LyCORIS scales a product of two full factors by 1, PEFT by alpha / rank like any other
        yield Entry("", module, "scale" if module in whole else "alpha",
                    torch.tensor(alpha / rank if module in whole else float(alpha), dtype=torch.float64))


def _ranks(modules: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, int], list[str]]:
    """(module -> rank, modules of scaled kinds without a rank since their factors are not decomposed)."""
    ranks, whole = {}, []
    for module, found in modules.items():
        for cls in _peft_kinds(found):
            own = {ours: found[key] for key, ours in cls.keys.items() if key in found}
            rank = cls.rank_of(own)
            if rank is not None:
                ranks[module] = rank
            elif not cls.missing(own):
                whole.append(module)
    return ranks, whole


def _peft_kinds(found: Mapping[str, Tensor]) -> list[type[Adapter]]:
    """The scaled kinds of PEFT whose tensors are among these; exactly one in a valid file."""
    return [cls for cls in KINDS.values() if cls.peft_type and cls.scaled and cls.keys.keys() & found.keys()]


def _of_pattern(name: str, patterns: Mapping, overall):
    if not isinstance(patterns, Mapping):
        raise LoRAFormatError(f"its config has the patterns {patterns!r}; a table of patterns is needed")
    return next((value for pattern, value in patterns.items() if _ends_with(name, pattern)), overall)


def _ends_with(name: str, pattern: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise LoRAFormatError(f"its config has the pattern {pattern!r}, which is not a regular expression: {error}") from None
