"""Reads the spellings of kohya, LyCORIS, diffusers, PEFT and ComfyUI into entries."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sd.adapters.weights import LoRAFormatError
from sd.lora_files.modules import WRAPPERS
from sd.lora_files.spellings import MODIFIERS, SCALES, SPARSE, TENSORS, TOKEN, UP_BIAS, Entry

# Other programs' names for the same tensors: pattern -> (what to put after the module's name, tensor, format).
_PEFT_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?"  # a dump from memory has the adapter's name in its keys


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


# Of A1111 and OneTrainer; the embedding's own tensors stand after the word, which may hold dots.
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(?:string_to_\w+\.[^.]*|[^.]+)")


_TAILS = {*TENSORS, *MODIFIERS, *SCALES, *SPARSE}


def read_entries(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None,
                 configs: Mapping[str, Mapping] | None = None) -> tuple[list[Entry], list[str], str]:
    """(entries, keys that are not understood, format) of a file in any spelling of kohya, LyCORIS, diffusers, PEFT, ComfyUI.

    `configs`: prefix of the module names -> PEFT's config of that network, which holds the alphas that the tensors lack.
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
    entries += [entry for prefix, config in configs.items() for entry in _alphas_of(config, prefix, entries)]
    return entries, strange, name


def _split(key: str, keys) -> tuple[str, str | None, str | None]:
    """(module, tensor, program that spells it so): kohya's names stand as they are, the others are patterns."""
    head, _, last = key.rpartition(".")
    module, _, before = head.rpartition(".")
    if f"{before}.{last}" in _TAILS and module:
        return module, f"{before}.{last}", None
    if last in _TAILS and head and (last != "weight" or f"{head}.on_input" in keys):
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
    family = {TENSORS[e.tail][0] for e in entries if e.tail in TENSORS} - {"lora", "full"}
    if any(e.module.startswith(("diffusion_model.", "text_encoders.")) for e in entries):
        return "ComfyUI"
    return "LyCORIS" if family or any(e.tail in ("diff", "w_norm", "lora_mid.weight", *SPARSE) for e in entries) else "kohya"


def _configs_in(metadata: Mapping[str, str]) -> dict[str, dict]:
    """diffusers' `lora_adapter_metadata`: the fields of each network's PEFT config, with the network's name before each."""
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


def _alphas_of(config: Mapping, prefix: str, entries: list[Entry]) -> Iterator[Entry]:
    """An alpha for each module of one network, by PEFT's rules: a pattern that ends the module's name wins over the rest."""
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2].upper()
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise LoRAFormatError(f"its peft_type is {kind!r}; read are LORA, LOHA and LOKR")
    overall, patterns = config.get("lora_alpha" if kind == "LORA" else "alpha"), config.get("alpha_pattern") or {}
    inner = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")  # their first axis is the rank
    ranks = {e.module: e.tensor.shape[0] for e in entries if e.tail in inner and e.tensor.dim() and e.module.startswith(prefix)}
    whole = {e.module for e in entries if e.tail == "lokr_w1" and e.module.startswith(prefix)}
    whole &= {e.module for e in entries if e.tail == "lokr_w2"}
    given = {e.module for e in entries if e.tail == "alpha"}
    for module in [*ranks, *whole]:
        name = module.removeprefix(prefix)
        for wrapper in WRAPPERS:  # PEFT's patterns are for the names inside
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
        # LyCORIS scales a product of two whole factors by 1, PEFT by alpha / rank as any other
        yield Entry("", module, "scale" if module in whole else "alpha",
                    torch.tensor(alpha / rank if module in whole else float(alpha), dtype=torch.float64))


def _of_pattern(name: str, patterns: Mapping, overall):
    if not isinstance(patterns, Mapping):
        raise LoRAFormatError(f"its config has the patterns {patterns!r}; a table of patterns is needed")
    return next((value for pattern, value in patterns.items() if _ends_with(name, pattern)), overall)


def _ends_with(name: str, pattern: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise LoRAFormatError(f"its config has the pattern {pattern!r}, which is no regular expression: {error}") from None
