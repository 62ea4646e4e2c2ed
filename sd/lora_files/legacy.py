"""Readers for LoRA files of older programs, which differ from kohya's in names, orientation or scale.

Each yields entries in kohya's spelling: `down` [R, in], `up` [out, R]. The format determines the orientation of a matrix and
the layer's shape must agree; if only the transpose fits, it is used. Facts: docs/lora-formats.md, 8 to 10.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sd.adapters.weights import LoRAFormatError
from sd.files.tensor_file import TensorFile
from sd.lora_files.modules import Modules
from sd.lora_files.spellings import IGNORED, TOKEN, Entry

DOWN, UP, MAGNITUDE = "lora_down.weight", "lora_up.weight", "dora_scale"

Found = dict[str, tuple[str, Tensor]]  # tensor name -> (key in the file, tensor)


# ---- from the file's module names to layers ------------------------------------------------------------------------------

FUSED = {"qkv": ("to_qkv", "in_proj", "qkv_proj", "qkv"), "kv": ("to_kv", "kv_proj", "kv")}


def _places(modules: Modules, more: dict[str, str] | None = None) -> dict[str, tuple[str, ...]]:
    """Every spelling -> its layer, or the q, k, v layers of a fused one."""
    table: dict[str, tuple[str, ...]] = {
        name: (path,) for name, path in (modules.lookup | (more or {})).items() if path in modules.shapes}
    for name in list(table):
        q = next((end for end in ("to_q", "q_proj") if name.endswith(end)), "")
        head = name.removesuffix(q)
        for letters, fused in FUSED.items() if q else ():
            parts = [place for letter in letters if (place := table.get(head + q.replace("q", letter)))]
            if len(parts) == len(letters) and len({modules.shapes[path][1:] for path, in parts}) == 1:
                for last in fused:
                    table.setdefault(head + last, tuple(path for path, in parts))
    return table


def _placed(names: Iterable[str], places: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The file's names -> layers; names that the model lacks are left out.

    The file's network may contain ours or be a part of it: then all its names have the same leading parts too many or too
    few. The choice that places the most layers wins, then the one that keeps the most of the names.
    """
    heads: dict[str, list[str]] = {}  # end of one of the model's names -> possible beginnings
    for name in places:
        for start in [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]:
            heads.setdefault(name[start:], []).append(name[:start])
    found: dict[tuple[int, str], dict[str, tuple[str, ...]]] = {}  # (parts too many, parts too few) -> placed
    for name in names:
        parts = name.split(".")
        for n in range(len(parts)):
            end = ".".join(parts[n:])
            for head in heads.get(end, ()):
                if n == 0 or head == "":
                    found.setdefault((n, head), {})[name] = places[head + end]

    def worth(case: tuple[int, str]) -> tuple:
        return len(set(found[case].values())), -case[0], case[1] == ""

    if not found:
        return {}
    best = max(found, key=worth)
    for case in found:
        if worth(case) == worth(best) and found[case] != found[best]:
            name = next(name for name in found[best] if found[case].get(name) != found[best][name])
            raise LoRAFormatError(f"{name!r} may mean {' and '.join(found[best][name])} or "
                                  f"{' and '.join(found[case].get(name, ['nothing']))}; load it into that network alone")
    return found[best]


# ---- from a pair of tensors to entries -----------------------------------------------------------------------------------

def _pair(module: str, paths: tuple[str, ...] | None, found: Found, modules: Modules) -> Iterator[Entry]:
    """Entries of one pair. The q, k, v of a fused layer share `down`, and each has its own rows of `up`.

    Unknown modules and half pairs are passed on unchanged, for `assemble` to raise the error.
    """
    if not paths or not {DOWN, UP} <= found.keys():
        for tail, (key, tensor) in found.items():
            yield Entry(key, paths[0] if paths else module, tail, tensor)
        return
    shapes = [modules.shapes[path] for path in paths]
    wanted = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    found = found | _oriented(module, found, wanted[::-1] if paths[0] in modules.embeddings else wanted)
    if MAGNITUDE in found and len(paths) > 1 and found[MAGNITUDE][1].shape[:1] != wanted[:1]:
        raise LoRAFormatError(f"{module}: its magnitude has {found[MAGNITUDE][1].numel()} values, its layers "
                              f"{' and '.join(paths)} have {wanted[0]} rows")
    first = 0
    for path, shape in zip(paths, shapes):
        for tail, (key, tensor) in found.items():
            own = tensor[first:first + shape[0]] if len(paths) > 1 and tail in (UP, MAGNITUDE) else tensor
            yield Entry(key, path, tail, own)
        first += shape[0]


def _oriented(module: str, found: Found, wanted: tuple[int, ...]) -> Found:
    (down_key, down), (up_key, up) = found[DOWN], found[UP]
    for turn in (False, True):
        a, b = (t.T if turn and t.dim() == 2 else t for t in (down, up))
        if _fits(a, b, wanted):
            return {DOWN: (down_key, a), UP: (up_key, b)}
    raise LoRAFormatError(f"{module}: its down {list(down.shape)} and up {list(up.shape)} do not fit the layer's weight "
                          f"{list(wanted)}, which wants [R, {', '.join(map(str, wanted[1:]))}] and [{wanted[0]}, R]")


def _fits(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether up · down has the shape of W. 1x1 convolutions may lack their last axes; groups divide the ranks of up."""
    if min(down.dim(), up.dim(), len(shape)) < 2 or 0 in (*down.shape, *up.shape):
        return False
    ranks = down.shape[0] % up[0].numel() == 0 if len(shape) > 2 else down.shape[0] == up.shape[1]
    return up.shape[0] == shape[0] and _long(down.shape[1:]) == _long(shape[1:]) and _long(up.shape[2:]) == [] and ranks


def _product(path: str, left: tuple[str, Tensor], right: tuple[str, Tensor], shape: tuple[int, ...]) -> Iterator[Entry]:
    """A full difference from two factors whose product is viewed as W, which makes the change one of full rank."""
    yield Entry(left[0], path, "diff", (left[1].double() @ right[1].double()).reshape(shape).float())
    yield Entry(right[0], path, IGNORED, right[1])  # already in the product


def _long(shape: Iterable[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _grouped(file: TensorFile, pattern: str) -> dict[str, Found]:
    """Module -> its tensors, by a pattern that matches every key, with groups for the module and the rest."""
    found: dict[str, Found] = {}
    for key, tensor in file.items():
        match = re.fullmatch(pattern, key)
        assert match  # the format was detected by this pattern
        module, tail = match.groups()
        found.setdefault(module, {})[tail] = (key, tensor)
    return found


def _spelt(pattern: str) -> Callable[[TensorFile], bool]:
    return lambda file: bool(file) and all(re.fullmatch(pattern, key) for key in file)


# ---- the fork of hkproj/pytorch-stable-diffusion -------------------------------------------------------------------------

_FORK = r"(.+)\.(lora_A|lora_B|alpha|rank)"
_FORK_NAMES = [(re.compile(old), new) for old, new in (
    (r"^model\.diffusion_model\.", "diffusion."), (r"^diffusion\.time_embed\.0$", "diffusion.time_embedding.linear_1"),
    (r"^diffusion\.time_embed\.2$", "diffusion.time_embedding.linear_2"),
    (r"^diffusion\.out\.0$", "diffusion.final.groupnorm"), (r"^diffusion\.out\.2$", "diffusion.final.conv"),
    (r"^diffusion\.input_blocks", "diffusion.unet.encoders"), (r"^diffusion\.middle_block", "diffusion.unet.bottleneck"),
    (r"^diffusion\.output_blocks", "diffusion.unet.decoders"), (r"\.op$", ""),
    (r"\.in_layers\.0$", ".groupnorm_feature"), (r"\.in_layers\.2$", ".conv_feature"), (r"\.emb_layers\.1$", ".linear_time"),
    (r"\.out_layers\.0$", ".groupnorm_merged"), (r"\.out_layers\.3$", ".conv_merged"),
    (r"\.skip_connection$", ".residual_layer"), (r"\.norm$", ".groupnorm"), (r"\.proj_in$", ".conv_input"),
    (r"\.proj_out$", ".conv_output"), (r"\.transformer_blocks\.0\.norm(\d)$", r".layernorm_\1"),
    (r"\.transformer_blocks\.0\.attn(\d)\.to_out\.0$", r".attention_\1.out_proj"),
    (r"\.transformer_blocks\.0\.attn(\d)\.to_(\w)$", r".attention_\1.\2_proj"),
    (r"\.transformer_blocks\.0\.ff\.net\.0\.proj$", ".linear_geglu_1"),
    (r"\.transformer_blocks\.0\.ff\.net\.2$", ".linear_geglu_2"),
    (r"^clip\.token_embedding$", "clip.embedding.token_embedding"), (r"^clip\.final_norm$", "clip.layernorm"),
    (r"^(clip\..*)\.norm(\d)$", r"\1.layernorm_\2"), (r"^(clip\..*)\.mlp\.fc(\d)$", r"\1.linear_\2"),
)]


def fork_names(modules: Modules) -> dict[str, str]:
    """The fork's name of every module of UNet and text encoder -> its path: LDM's block numbers, its own names inside."""
    table = {}
    for name in modules.names:
        spelling = {"diffusion": name.ldm, "clip": name.path}.get(name.component)
        if spelling is not None:
            for old, new in _FORK_NAMES:
                spelling = old.sub(new, spelling)
            table[spelling] = table[spelling.removeprefix("diffusion.")] = name.path
    return table


def _is_fork(file: TensorFile) -> bool:
    return _spelt(_FORK)(file) and any(key.endswith(".lora_A") for key in file) and (
        any(key.endswith((".alpha", ".rank")) for key in (*file, *file.scalars))
        or any(re.match(r"(diffusion\.)?unet\.(encoders|decoders|bottleneck)\.|clip\.layers\.", key) for key in file))


def _read_fork(file: TensorFile, modules: Modules) -> Iterator[Entry]:
    """A [in, r], B [r, out], ΔW = (A B)ᵀ · alpha / rank, or (A B)ᵀ without these numbers."""
    found = _grouped(file, _FORK)
    placed = _placed(found, _places(modules, fork_names(modules)))
    for module, have in found.items():
        pair: Found = {}
        for name, tail in (("lora_A", DOWN), ("lora_B", UP)):
            if name in have:
                key, tensor = have[name]
                pair[tail] = (key, tensor.T if tensor.dim() == 2 else tensor)
        alpha, rank = (_number(file, f"{module}.{name}") for name in ("alpha", "rank"))
        shapes = [list(tensor.shape) for _, tensor in pair.values()]
        if rank is not None and not all(rank in shape for shape in shapes):
            raise LoRAFormatError(f"{module}.rank is {rank:g}, but its down and up are {' and '.join(map(str, shapes))}")
        if alpha is not None:
            pair["alpha"] = (have["alpha"][0] if "alpha" in have else "", torch.tensor(alpha, dtype=torch.float64))
        if "rank" in have:
            yield Entry(have["rank"][0], module, IGNORED, have["rank"][1])  # the matrices' shapes give it too
        yield from _pair(module, placed.get(module), pair, modules)


def _number(file: TensorFile, key: str) -> float | None:
    value = file.get(key, file.scalars.get(key))
    if value is None:
        return None
    if isinstance(value, Tensor) and value.numel() != 1:
        raise LoRAFormatError(f"{key} has shape {list(value.shape)}; one number is expected")
    if isinstance(value, str) or not math.isfinite(float(value)):
        raise LoRAFormatError(f"{key} is {value if isinstance(value, str) else float(value)!r}; a finite number is needed")
    return float(value)


# ---- LoRAW ------------------------------------------------------------------------------------------------------------

_LORAW = r"(.+)/(lora_down\.weight|lora_up\.weight|dora_mag\.weight|dora_mag\.bias)"


def _read_loraw(file: TensorFile, modules: Modules) -> Iterator[Entry]:
    """ΔW = up · down, or DoRA with `dora_mag` [out, 1]. alpha is only in the model's config; its default is the rank."""
    found = {module.replace("/", "."): have for module, have in _grouped(file, _LORAW).items()}
    placed = _placed(found, _places(modules))
    for module, have in found.items():
        if "dora_mag.bias" in have:  # `dora_mag` is an nn.Linear whose bias is not used
            yield Entry(have["dora_mag.bias"][0], module, IGNORED, have.pop("dora_mag.bias")[1])
        if "dora_mag.weight" in have:
            have[MAGNITUDE] = have.pop("dora_mag.weight")
        yield from _pair(module, placed.get(module), have, modules)


# ---- TheDiscoMole/LoRA ------------------------------------------------------------------------------------------------

_DISCOMOLE = r"(.+\.[^.]+)\.module\.(A|B)"


def _read_discomole(file: TensorFile, modules: Modules) -> Iterator[Entry]:
    """One task: ΔW = A B. Convolutions have A [*k, out, r] and B [*k, r, in/g], and the program views the product
    [*k, out, in/g] as W's [out, in/g, *k] without permuting axes: a change of full rank.
    """
    found = {tuple(name.rsplit(".", 1)): have for name, have in _grouped(file, _DISCOMOLE).items()}
    tasks = sorted({task for _, task in found})
    if len(tasks) > 1:
        raise LoRAFormatError(f"the file holds {len(tasks)} tasks ({', '.join(tasks)}); save one, as "
                              f"model.state_dict(task={tasks[0]!r}) gives it")
    placed = _placed([module for module, _ in found], _places(modules))
    for (module, _), have in found.items():
        paths = placed.get(module)
        if not paths or have.keys() != {"A", "B"} or have["A"][1].dim() < 3:
            sides = {"A": UP, "B": DOWN}
            if paths and paths[0] in modules.embeddings:  # ΔW [num, dim] = A B = (up · down)ᵀ
                sides, have = {"A": DOWN, "B": UP}, {side: (key, t.T) for side, (key, t) in have.items()}
            yield from _pair(module, paths, {sides[side]: at for side, at in have.items()}, modules)
            continue
        a, b, shape = have["A"][1], have["B"][1], modules.shapes[paths[0]]
        if a.shape != (*shape[2:], shape[0], a.shape[-1]) or b.shape != (*shape[2:], a.shape[-1], *shape[1:2]):
            raise LoRAFormatError(f"{module}: its A {list(a.shape)} and B {list(b.shape)} do not fit the layer's weight "
                                  f"{list(shape)}")
        yield from _product(paths[0], have["A"], have["B"], shape)


# ---- cloneofsimo/lora and xdiffusion: pairs identified only by their position in a list -----------------------------------

_NUMBERED = r"(unet|text_encoder):(\d{1,6}):(up|down)"


class _Order(NamedTuple):
    """Layers in the order in which a program traverses a network."""

    network: str
    paths: list[str]


def _orders(modules: Modules) -> list[_Order]:
    """The known orders of files: cloneofsimo's for our networks, the model's own for foreign ones."""
    if not modules.names:
        return [_Order("model", [p for p, shape in modules.shapes.items() if len(shape) > 1 and p not in modules.embeddings])]
    attn1, attn2 = ([f"transformer_blocks.0.{attn}.{x}_proj" for x in ("q", "k", "v", "out")] for attn in ("attn1", "attn2"))
    fc1, resnet = ["transformer_blocks.0.ff.fc1"], ["conv1", "time_emb_proj", "conv2", "conv_shortcut"]
    orders = []
    for inside in (attn1 + fc1 + attn2, attn1 + attn2 + fc1):  # the order inside a block, in older and newer diffusers
        for leaves in (inside, inside + resnet):  # the latter: "extended" files
            orders.append(_Order("unet", _sorted(modules, r"diffusion\.(down|up|mid)_blocks?\.(?:(\d+)\.)?"
                                                          r"(attentions|resnets)\.(\d+)\.(.+)", leaves)))
    orders.append(_Order("text_encoder", _sorted(modules, r"clip()\.layers\.(\d+)\.()()attention\.(.+)",
                                                 [f"{x}_proj" for x in ("k", "v", "q", "out")])))
    return [order for order in orders if order.paths]


def _sorted(modules: Modules, pattern: str, leaves: list[str]) -> list[str]:
    """Paths sorted by (down, up, mid; block number; attentions, resnets; number; leaf). In diffusers mid_block comes last."""
    found = {}
    for path in modules.shapes:
        match = re.fullmatch(pattern, path)
        if match and match[5] in leaves:
            found[path] = (("", "down", "up", "mid").index(match[1]), int(match[2] or 0), match[3], int(match[4] or 0),
                           leaves.index(match[5]))
    return sorted(found, key=found.__getitem__)


def _walk(pairs: list[Found], orders: list[_Order], modules: Modules) -> list[str]:
    """The layers of the pairs, from the first order that fits them all; fc1, which is not square, distinguishes the orders."""
    if not all(pair.keys() == {UP, DOWN} for pair in pairs):
        i = next(i for i, pair in enumerate(pairs) if pair.keys() != {UP, DOWN})
        raise LoRAFormatError(f"pair {i} of a list without names lacks its {'down' if UP in pairs[i] else 'up'}")
    known = [order for order in orders if len(order.paths) == len(pairs)]
    if not known:
        counts = ", ".join(f"{n} of the {network}" for network, n in sorted({(o.network, len(o.paths)) for o in orders}))
        raise LoRAFormatError(f"it is a list of {len(pairs)} pairs without names; lists for this model have as many pairs as "
                              f"it has layers: {counts}")
    misfits: list[tuple[int, _Order]] = []
    for order in known:
        misfit = next((i for i, (pair, path) in enumerate(zip(pairs, order.paths))
                       if not _fits(pair[DOWN][1], pair[UP][1], modules.shapes[path])), None)
        if misfit is None:
            return order.paths
        misfits.append((misfit, order))
    i, order = max(misfits, key=lambda case: case[0])
    (_, up), (_, down) = pairs[i][UP], pairs[i][DOWN]
    raise LoRAFormatError(f"pair {i} of a list without names, up {list(up.shape)} and down {list(down.shape)}, does not "
                          f"fit {order.paths[i]}, the {order.network}'s layer in that place, whose weight is "
                          f"{list(modules.shapes[order.paths[i]])}")


def _is_list(file: TensorFile) -> bool:
    return bool(file) and file.keys() == {str(i) for i in range(len(file))}


def _read_list(file: TensorFile, modules: Modules) -> Iterator[Entry]:
    """[up0, down0, up1, down1, ...] of one network, identified by their number and shapes; ΔW = up · down."""
    if len(file) % 2:
        raise LoRAFormatError(f"it is a list of {len(file)} tensors; pairs of up and down are expected")
    pairs = [{UP: (str(i), file[str(i)]), DOWN: (str(i + 1), file[str(i + 1)])} for i in range(0, len(file), 2)]
    for path, pair in zip(_walk(pairs, _orders(modules), modules), pairs):
        yield from _pair(path, (path,), pair, modules)


def _read_numbered(file: TensorFile, modules: Modules) -> Iterator[Entry]:
    """As the list, with network and number in each key; learned words are marked in the metadata."""
    networks: dict[str, dict[int, Found]] = {}
    for key, tensor in file.items():
        match = re.fullmatch(_NUMBERED, key)
        if match:
            pair = networks.setdefault(match[1], {}).setdefault(int(match[2]), {})
            pair[UP if match[3] == "up" else DOWN] = (key, tensor)
        elif file.metadata.get(key) == "<embed>":
            yield Entry(key, key, TOKEN, tensor)
    for network, numbered in networks.items():
        orders = [order for order in _orders(modules) if order.network in (network, "model")]
        try:
            paths = _walk([numbered.get(i, {}) for i in range(len(numbered))], orders, modules) if orders else []
        except LoRAFormatError as error:
            targets = f" (its targets are {file.metadata[network]})" if network in file.metadata else ""
            raise LoRAFormatError(f"{network}{targets}: {error}") from None
        for i, pair in sorted(numbered.items()):
            yield from _pair(f"{network}:{i}", (paths[i],) if paths else None, pair, modules)


# ---- lora_wrapper and loralib -----------------------------------------------------------------------------------------

_WRAPPER = r"(.+)\.lora_(scale|A|B|A\.weight|B\.weight)"
_LORALIB = r"(.+)\.lora_(A|B)"


def _read_wrapper(file: TensorFile, modules: Modules) -> Iterator[Entry]:
    """ΔW = lora_scale · B A, or for a "soft" convolution lora_scale · A(B(x)), which is one convolution if A is 1x1."""
    found = _grouped(file, _WRAPPER)
    placed = _placed(found, _places(modules))
    for module, have in found.items():
        soft = have.get("A.weight")
        if soft and soft[1].dim() > 1 and _long(soft[1].shape[2:]):
            raise LoRAFormatError(f"{module} is a soft wrapper, two convolutions one after the other, the second of "
                                  f"{'x'.join(map(str, soft[1].shape[2:]))}: they do not amount to a change of one weight")
        tails = {"A": DOWN, "B": UP, "B.weight": DOWN, "A.weight": UP, "scale": "scale"}
        yield from _pair(module, placed.get(module), {tails[name]: at for name, at in have.items()}, modules)


def _read_loralib(file: TensorFile, modules: Modules) -> Iterator[Entry]:
    """ΔW = B A; the file lacks alpha / r. Convolutions have [r·k, in·k] and [out/g·k, r·k], their product viewed as W;
    a MergedLinear of n parts has A [r·n, in] and B [out, r], and each part has its own rows of both.
    """
    found = _grouped(file, _LORALIB)
    placed = _placed(found, _places(modules))
    for module, have in found.items():
        paths, pair = placed.get(module), {{"A": DOWN, "B": UP}[side]: at for side, at in have.items()}
        if not paths or len(have) < 2 or have["A"][1].dim() != 2 or have["B"][1].dim() != 2:
            yield from _pair(module, paths, pair, modules)
            continue
        a, b, shape = have["A"][1], have["B"][1], modules.shapes[paths[0]]
        parts = a.shape[0] / max(b.shape[1], 1)
        if parts == 1 and len(shape) > 2 and a.shape[1] != shape[1] and b.shape[0] * a.shape[1] == math.prod(shape):
            yield from _product(paths[0], have["B"], have["A"], shape)
        elif parts > 1 and parts.is_integer() and len(shape) == 2 and a.shape[1] == shape[1]:
            yield from _merged_linear(module, paths, pair, int(parts), modules)
        else:
            yield from _pair(module, paths, pair, modules)


def _merged_linear(module: str, paths: tuple[str, ...], pair: Found, n: int, modules: Modules) -> Iterator[Entry]:
    (a_key, a), (b_key, b) = pair[DOWN], pair[UP]
    rows = [modules.shapes[path][0] for path in paths]
    if b.shape[0] != sum(rows) or b.shape[0] % n or len(paths) > 1 and rows != [b.shape[0] // n] * n:
        raise LoRAFormatError(f"{module}: A {list(a.shape)} and B {list(b.shape)} are {n} parts of a fused layer, which has "
                              f"{' + '.join(map(str, rows))} rows; only all parts at once, of equal size, can be read: which "
                              f"of them are enabled is not in the file")
    downs, ups = a.chunk(n), b.chunk(n)
    if len(paths) > 1:
        for path, down, up in zip(paths, downs, ups):
            yield from _pair(module, (path,), {DOWN: (a_key, down), UP: (b_key, up)}, modules)
    else:
        yield from _pair(module, paths, {DOWN: pair[DOWN], UP: (b_key, torch.block_diag(*ups))}, modules)


LEGACY: list[tuple[str, Callable[[TensorFile], bool], Callable[[TensorFile, Modules], Iterator[Entry]]]] = [
    ("LoRAW", _spelt(_LORAW), _read_loraw),
    ("TheDiscoMole/LoRA", _spelt(_DISCOMOLE), _read_discomole),
    ("cloneofsimo list", _is_list, _read_list),
    ("cloneofsimo", lambda file: any(re.fullmatch(_NUMBERED, key) for key in file), _read_numbered),
    ("hkproj fork", _is_fork, _read_fork),
    ("lora_wrapper", lambda file: _spelt(_WRAPPER)(file) and any(key.endswith(".lora_scale") for key in file), _read_wrapper),
    ("loralib", _spelt(_LORALIB), _read_loralib),
]
