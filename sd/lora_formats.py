"""LoRA files: one canonical form, {module path: AdapterWeights}, and the spellings that lead to it and back.

A reader turns a file into entries; `assemble` groups them by module and checks them. Nothing of a file is skipped in
silence: what is not applied is named in an error, or was asked for with `skip`. Facts: docs/lora-formats.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sd.checkpoint import all_finite
from sd.embeddings import EmbeddingError, words_in
from sd.lora_active import LoRAError
from sd.names import LDM_PREFIX, Name


class LoRAFormatError(LoRAError):
    """A LoRA file that cannot be read or written as asked; the message names the file's offenders."""


@dataclass
class AdapterWeights:
    """The tensors of one adapter under its kind's own names. alpha None: the kind has no scale."""

    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None for kinds without a rank."""
        if self.kind == "glora":  # both orientations of its factors are published
            return min(self.tensors["a2"].shape[:2])
        return next((self.tensors[name].shape[0] for name in RANK.get(self.kind, ()) if name in self.tensors), None)


class Entry(NamedTuple):
    """One tensor of a file, or a slice of one."""

    key: str  # in the file; "" where the value comes from the file's metadata
    module: str  # as the file spells it, or our path
    tail: str  # which tensor it is: a name of TENSORS or MODIFIERS
    tensor: Tensor


@dataclass(frozen=True)
class Modules:
    """What readers and writers must know of a model. `shapes`: path -> shape of the weight, in the model's order."""

    names: list[Name]  # empty for foreign models
    shapes: dict[str, tuple[int, ...]]
    embeddings: frozenset[str] = frozenset()  # paths of those that are nn.Embedding

    @cached_property
    def lookup(self) -> dict[str, str]:
        """Every spelling of a module's name -> its path."""
        return module_lookup(self.names) | {path: path for path in self.shapes}

    def find(self, spelling: str) -> str | None:
        """The path that a file's spelling means."""
        for prefix in ("", *WRAPPERS):
            if spelling.startswith(prefix) and spelling[len(prefix):] in self.lookup:
                return self.lookup[spelling[len(prefix):]]
        return None


WRAPPERS = ("base_model.model.",)  # what PEFT puts before every name of the model that it wraps

# Tensor names of kohya and LyCORIS -> (kind, our name); one table for both directions.
TENSORS = {
    "lora_down.weight": ("lora", "down"), "lora_up.weight": ("lora", "up"), "lora_mid.weight": ("lora", "mid"),
    "diff": ("full", "diff"), "w_norm": ("full", "diff"),
    **{f"hada_{name}": ("loha", name) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": ("lokr", name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"{name}.weight": ("glora", name) for name in ("a1", "a2", "b1", "b2", "bm")},
    "oft_blocks": ("oft", "blocks"), "oft_diag": ("oft", "rotation"), "rescale": ("oft", "rescale"),
    "on_input": ("ia3", "on_input"), "weight": ("ia3", "weight"),
}
# What any kind may have beside its own tensors.
MODIFIERS = {"diff_b": "diff_b", "b_norm": "diff_b", "dora_scale": "magnitude"}
SCALES = ("alpha", "scale", "scalar")  # `scale` takes the place of alpha / rank, `scalar` is one more factor
SPARSE = ("bias_indices", "bias_values", "bias_size")  # the residual of ΔW that a low rank leaves (not of a bias)
UP_BIAS = "lora_up.bias"  # added after `up`, so it has the scale alpha / rank
TOKEN = "token"  # a learned word of the prompt that lies beside the LoRA; its module is the word
IGNORED = "ignored"  # a tensor that its own program writes and never reads

NEEDED = {"lora": ("down", "up"), "loha": ("w1_a", "w1_b", "w2_a", "w2_b"), "glora": ("a1", "a2", "b1", "b2"),
          "ia3": ("weight", "on_input")}
RANK = {"lora": ("down",), "loha": ("w1_b",), "lokr": ("w1_b", "w2_b")}

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


# ---- reading ---------------------------------------------------------------------------------------------------------

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


@dataclass
class Assembled:
    """What `assemble` made of a file's entries."""

    state: dict[str, AdapterWeights]
    used: set[str]  # keys of the file
    skipped: set[str]
    words: dict[str, Tensor] = field(default_factory=dict)  # learned word -> its vectors


def assemble(entries: Iterable[Entry], strange: Iterable[str], modules: Modules, where: str, *, skip: str | None = None,
             tensors: Mapping[str, Tensor] | None = None, words: bool = False) -> Assembled:
    """Entries to {module path: AdapterWeights}, whole: every one is used, matches `skip`, or is named in LoRAFormatError.

    `skip`: a regular expression, searched in the file's keys and in our module paths. `words`: whether learned words of the
    prompt are taken too; else they are refused.
    """
    try:
        leave = re.compile(skip) if skip else None
    except re.error as error:
        raise LoRAFormatError(f"skip={skip!r} is not a regular expression: {error}") from None
    skipped = {key for key in strange if leave and leave.search(key)}
    strange = [key for key in strange if key not in skipped]
    if strange:
        raise LoRAFormatError(f"{where}: {len(strange)} of {len(tensors or strange)} tensors are not understood, "
                              f"first: {strange[0]!r}{_guess(tensors)}")
    parts: dict[str, dict[str, Tensor]] = {}
    spelled: dict[str, str] = {}
    unknown, used, learned = [], set(), {}
    for key, module, tail, tensor in entries:
        path = modules.find(module)
        if leave and (leave.search(key) or leave.search(module) or path and leave.search(path)):
            skipped.add(key)
            continue
        if tail == IGNORED:
            used.add(key)
        elif tail == TOKEN and words:
            learned.setdefault(module, {})[key.removeprefix(f"bundle_emb.{module}.")] = tensor
            used.add(key)
        elif tail == TOKEN:
            raise LoRAFormatError(f"{where}: it holds the learned word {module!r}, an embedding of the prompt and no LoRA, "
                                  f"for which there is no place here; skip={'^' + re.escape(module)!r} leaves it out")
        elif path is None:
            unknown.append(module)
        elif spelled.setdefault(path, module) != module:
            raise LoRAFormatError(f"{where}: {module!r} is a second LoRA for {path}; the file spells it twice "
                                  f"(also as {spelled[path]!r})")
        elif tail in parts.setdefault(path, {}):
            raise LoRAFormatError(f"{where}: {module} has two tensors {tail}, such as {key!r}; if the file holds several "
                                  f"adapters, skip all but one by name")
        else:
            parts[path][tail] = tensor
            used.add(key)
    if unknown:
        names = sorted(set(unknown))
        raise LoRAFormatError(f"{where}: {len(names)} of {len(names) + len(parts)} LoRA modules are unknown to this model, "
                              f"first: {names[0]!r}{_guess(tensors)}")
    state = {path: _weights(spelled[path], found, modules.shapes.get(path), where) for path, found in parts.items()}
    for path, weights in state.items():
        if "magnitude" in weights.tensors and path in modules.shapes:
            weights.tensors["magnitude"] = _like_weight(weights.tensors["magnitude"], len(modules.shapes[path]),
                                                        path in modules.embeddings)
    vectors = {word: _vectors(word, found, where) for word, found in learned.items()}
    return Assembled(state, used - {""}, skipped - {""}, vectors)


def _vectors(word: str, found: Mapping[str, Tensor], where: str) -> Tensor:
    try:
        vectors = list(words_in(found, word, where).values())
    except EmbeddingError as error:
        raise LoRAFormatError(str(error)) from None
    if len(vectors) != 1:
        raise LoRAFormatError(f"{where}: the learned word {word!r} has {len(vectors)} tensors: {', '.join(found)}")
    return vectors[0]


def _weights(module: str, found: dict[str, Tensor], shape: tuple[int, ...] | None, where: str) -> AdapterWeights:
    for tail, tensor in found.items():
        if tensor.is_complex():
            raise LoRAFormatError(f"{where}: {module}.{tail} holds complex numbers; real ones are expected")
        if not all_finite(tensor):
            raise LoRAFormatError(f"{where}: {module}.{tail} holds values that are not finite (NaN or infinity)")
        if not tensor.numel() or tensor.dim() == 0 and tail not in (*SCALES, "on_input"):
            raise LoRAFormatError(f"{where}: {module}.{tail} has shape {list(tensor.shape)}, which fits no layer")
    kinds = sorted({TENSORS[tail][0] for tail in found if tail in TENSORS})
    if not kinds and {"diff_b", "b_norm"} & found.keys():
        kinds = ["full"]
    if len(kinds) != 1:
        has = " and ".join(kinds) or "only " + ", ".join(sorted(found))
        raise LoRAFormatError(f"{where}: {module} is no adapter of one kind: it has {has}")
    kind = kinds[0]
    weights = AdapterWeights(kind, {TENSORS[t][1]: v for t, v in found.items() if t in TENSORS})
    if kind == "oft" and "oft_blocks" in found and found["oft_blocks"].dim() == 4:
        weights.kind = "boft"
    _refuse_halves(module, weights, found, where)
    for tail, name in MODIFIERS.items():
        if tail in found:
            weights.tensors[name] = found[tail]
    weights.alpha = _alpha(module, weights, found, where)
    if UP_BIAS in found:
        bias = found[UP_BIAS]
        scaled = bias.double() * (weights.alpha / weights.rank)
        weights.tensors["diff_b"] = scaled.to(bias.dtype if bias.itemsize >= 4 else torch.float32)
    return _with_sparse(module, weights, found, shape, where) if set(SPARSE) & found.keys() else weights


def _like_weight(magnitude: Tensor, dims: int, embedding: bool) -> Tensor:
    """In as many dimensions as the weight; a flat one, as PEFT has it, holds a value for each output."""
    if magnitude.dim() == 1 and embedding:
        return magnitude[None]
    return magnitude.reshape(*magnitude.shape, *(1,) * (dims - magnitude.dim()))


def _refuse_halves(module: str, weights: AdapterWeights, found: Mapping[str, Tensor], where: str) -> None:
    have, missing = weights.tensors, [n for n in NEEDED.get(weights.kind, ()) if n not in weights.tensors]
    if weights.kind == "lokr":
        missing = [w for w in ("w1", "w2") if w not in have and not {f"{w}_a", f"{w}_b"} <= have.keys()]
    elif weights.kind in ("oft", "boft"):
        missing = [] if {"blocks", "rotation"} & have.keys() else ["blocks"]
    elif weights.kind == "full" and not ({"diff"} & have.keys() or {"diff_b", "b_norm"} & found.keys()):
        missing = ["diff"]
    if missing:
        raise LoRAFormatError(f"{where}: {module} is half a pair: {', '.join(sorted(found))} without its {missing[0]}")


def _alpha(module: str, weights: AdapterWeights, found: Mapping[str, Tensor], where: str) -> float | None:
    for tail in SCALES:
        if tail in found and found[tail].numel() != 1:
            raise LoRAFormatError(f"{where}: {module}.{tail} has shape {list(found[tail].shape)}; one number is expected")
    value = {tail: float(found[tail]) for tail in SCALES if tail in found}
    rank, factor = weights.rank, value.get("scale", 1.0) * value.get("scalar", 1.0)
    if rank is None and factor != 1.0 and weights.kind == "lokr":
        weights.tensors["w1"] = weights.tensors["w1"].float() * factor
    elif rank is None and factor != 1.0:
        raise LoRAFormatError(f"{where}: {module} has a scale, but its kind ({weights.kind}) has none")
    if weights.kind in ("oft", "boft"):  # here alpha is not a scale: it bounds the rotation
        return value.get("alpha") or None  # LyCORIS writes 0 for none
    if rank is None:  # LyCORIS writes an alpha for such kinds too, and no program reads it
        return None
    # kohya: a missing alpha means alpha = rank
    alpha = value["scale"] * rank if "scale" in value else value.get("alpha", float(rank))
    alpha *= value.get("scalar", 1.0)
    if abs(alpha / rank) > torch.finfo(torch.float32).max:
        raise LoRAFormatError(f"{where}: {module} has the alpha {alpha:g}, which no fp32 number holds")
    return alpha


def _with_sparse(module: str, weights: AdapterWeights, found: Mapping[str, Tensor], shape, where: str) -> AdapterWeights:
    """A low rank and the entries that it misses, as LyCORIS extracts them; together they are a full difference."""
    missing = [tail for tail in SPARSE if tail not in found]
    if missing or weights.kind != "lora" or "mid" in weights.tensors or shape is None:
        raise LoRAFormatError(f"{where}: {module} has a sparse residual " + (f"without its {missing[0]}" if missing else
                              f"beside a {weights.kind} that is read without one only"))
    indices, values, size = (found[tail] for tail in SPARSE)
    try:
        rest = torch.sparse_coo_tensor(indices.long(), values.double(), tuple(size.tolist()), check_invariants=True).to_dense()
        down, up = (weights.tensors[name].double().flatten(1) for name in ("down", "up"))
        diff = (up @ down).reshape(shape) + rest.reshape(shape)
    except (RuntimeError, TypeError) as error:
        raise LoRAFormatError(f"{where}: {module}'s sparse residual does not fit the layer's {list(shape)}: "
                              f"{str(error).splitlines()[0]}") from None
    kept = {name: t for name, t in weights.tensors.items() if name not in ("down", "up")}
    return AdapterWeights("full", {"diff": (diff * (weights.alpha / weights.rank)).float(), **kept})


# ---- writing ---------------------------------------------------------------------------------------------------------

def write_kohya(state: Mapping[str, AdapterWeights], names: Iterable[Name], dtype: torch.dtype | None = None, *,
                spell: Callable[[Name], str | None] = lambda name: name.kohya) -> dict[str, Tensor]:
    """{key: tensor} in kohya's names, LyCORIS's for the kinds that are its own. alpha always.

    A module without such a name (of the VAE, of foreign models) is written under its module path. Raises LoRAFormatError
    for values that are not finite in `dtype`.
    """
    spelled = {name.path: spell(name) or name.path for name in names}
    return {f"{spelled.get(path, path)}.{tail}": tensor for path, weights in state.items()
            for tail, tensor in spell_tensors(weights, dtype, path).items()}


def spell_tensors(weights: AdapterWeights, dtype: torch.dtype | None, where: str) -> dict[str, Tensor]:
    """{kohya's or LyCORIS's tensor name: tensor} of one module, alpha included."""
    norm = weights.tensors.get("diff", torch.empty(0, 0)).dim() == 1
    kind = "oft" if weights.kind == "boft" else weights.kind
    tails = {ours: tail for tail, (of, ours) in TENSORS.items() if of == kind and tail != ("diff" if norm else "w_norm")}
    tails |= {"diff_b": "b_norm" if norm else "diff_b", "magnitude": "dora_scale"}
    found = {tails[name]: as_written(tensor, dtype, f"{where}: {name}") for name, tensor in weights.tensors.items()}
    # LyCORIS makes no module of these kinds without an alpha: here it scales by 1, or bounds nothing
    alpha = {"lokr": 1.0, "oft": 0.0, "boft": 0.0}.get(weights.kind) if weights.alpha is None else weights.alpha
    return found if alpha is None else found | {"alpha": _number(alpha)}


def as_written(tensor: Tensor, dtype: torch.dtype | None, what: str) -> Tensor:
    """On the CPU, contiguous, in `dtype` if it is a floating tensor. Raises LoRAFormatError for what is then not finite."""
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.to(dtype or tensor.dtype)
    if not all_finite(tensor):
        raise LoRAFormatError(f"{what} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}, "
                              f"so the LoRA is not written")
    return tensor


def _number(value: float) -> Tensor:
    """0-d, fp32 as kohya has it, fp64 where fp32 would round: alpha is a factor of every ΔW, whatever dtype the file has."""
    single = torch.tensor(float(value))
    return single if single.item() == value else single.double().fill_(value)


# ---- names and guesses -----------------------------------------------------------------------------------------------

def module_lookup(names: Iterable[Name]) -> dict[str, str]:
    """Every name under which a LoRA file may address a module -> module path."""
    table: dict[str, str] = {}
    for name in names:
        inside = name.ldm.removeprefix(LDM_PREFIX[name.component])
        dotted = [name.path, name.ldm, name.diffusers]
        flat = [name.kohya] if name.kohya else []
        if name.component == "diffusion":
            dotted += [f"unet.{name.diffusers}", f"diffusion_model.{inside}"]
            flat += ["lora_unet_" + inside.replace(".", "_"), "lycoris_" + name.diffusers.replace(".", "_")]
        elif name.component == "clip":
            bare = name.diffusers.removeprefix("text_model.")  # transformers >= 5.6
            old = bare  # the attention of diffusers' first text encoder LoRAs has the names of the UNet's
            for ours, theirs in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out.0")):
                old = re.sub(rf"\.{ours}$", f".{theirs}", old)
            comfy = "text_encoders.clip_l.transformer."
            dotted += [bare, f"{comfy}{name.diffusers}", f"{comfy}{bare}", f"clip_l.transformer.{name.diffusers}"]
            dotted += [f"text_encoder.{start}{end}" for start in ("", "text_model.") for end in (bare, old)]
            # writers that think of SDXL number the only text encoder
            flat += [start + end.replace(".", "_") for start in ("lora_te_", "lora_te1_") for end in (name.diffusers, bare)]
        else:
            dotted.append(f"vae.{name.diffusers}")
        table |= dict.fromkeys((*dotted, *flat), name.path)
    return table


def guess_file(tensors: Mapping[str, Tensor]) -> str:
    """One clause on what a file of these tensors seems to be."""
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


def _guess(tensors: Mapping[str, Tensor] | None) -> str:
    return f"; {guess_file(tensors)}" if tensors else ""


def looks_like_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file of these tensors is a LoRA rather than a checkpoint, by its names alone."""
    parts = (*(tail for tail in TENSORS if tail not in ("weight", "diff", "rescale")), ".diff")
    return any("lora" in key.lower() or key.endswith(parts) or re.match(r"(unet|text_encoder):\d+:|lycoris_", key)
               or key.endswith((".module.A", ".module.B")) for key in tensors)
