"""Block weights: a LoRA's multipliers per component and per block of the UNet.

Given as {"text_encoder": 0.5, "mid_block": 0, "up_blocks.1.attentions.0": 1.2}, as a string with the same content
("text_encoder=0.5,mid_block=0"), or as a list of 17, 25 or 26 numbers, as users of kohya and A1111 paste them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sd.checkpoints.names import FOLDERS, LDM_PREFIX, Name
from sd.errors import SDError
from sd.lora_files.modules import Modules


class BlockWeightError(SDError):
    """Block weights that are malformed or do not fit the model."""


@dataclass(frozen=True)
class BlockWeights:
    """`given`: block as the user named it -> multiplier; `table`: module path -> multiplier."""

    given: dict[str, float]
    table: dict[str, float]

    def of(self, path: str) -> float:
        """The factor by which one module's multiplier is scaled; 1 where nothing is given."""
        return self.table.get(path, 1.0)


# LDM counts the UNet's blocks as 12 + 1 + 12: IN00 to IN11, M00, OUT00 to OUT11. BASE is the text encoder.
IN, OUT = ([f"{side}{i:02}" for i in range(12)] for side in ("IN", "OUT"))
BLOCK_LISTS = {
    26: ["BASE", *IN, "M00", *OUT],
    25: [*IN, "M00", *OUT],  # kohya's block_dims
    17: ["BASE", *(IN[i] for i in (1, 2, 4, 5, 7, 8)), "M00", *OUT[3:]],  # the blocks with attention; the others get 0
}


def block_multipliers(given: Mapping[str, float] | Sequence[float] | str | None, modules: Modules) -> BlockWeights | None:
    """The multipliers of all modules. If several names match a module, the longest wins.

    Raises BlockWeightError for a block that the model lacks, a list of another length, and values that are not finite numbers.
    """
    if given is None:
        return None
    values: Mapping[str, object] | Sequence[object] = _parse(given) if isinstance(given, str) else given
    if not isinstance(values, Mapping):
        return _from_list([_number(value, f"number {i + 1}") for i, value in enumerate(values)], modules)
    named = {block: _number(value, f"the weight of {block!r}") for block, value in values.items()}
    spellings, table, met = _spellings(modules), {}, set()
    for path, names in spellings.items():
        fitting = [block for block in named if any(f"{name}.".startswith(f"{block}.") for name in names)]
        met |= set(fitting)
        if fitting:
            table[path] = named[max(fitting, key=len)]
    for block in named:
        if block not in met:
            raise BlockWeightError(f"block weights name {block!r}, which this model does not have; it has "
                                   f"{', '.join(_blocks(spellings))}")
    return BlockWeights(named, table)


def _parse(text: str) -> dict[str, str] | list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not any("=" in part for part in parts):
        return parts
    bad = [part for part in parts if part.count("=") != 1]
    if bad:
        raise BlockWeightError(f"block weights {bad[0]!r} is not of the form block=number")
    named = [part.split("=") for part in parts]
    twice = [block for i, (block, _) in enumerate(named) if block in [name for name, _ in named[:i]]]
    if twice:
        raise BlockWeightError(f"block weights name {twice[0]!r} twice")
    return dict(named)


def _number(value, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BlockWeightError(f"block weights: {what} is {value!r}; a finite number is needed")
    return number


def _from_list(values: list[float], modules: Modules) -> BlockWeights:
    if len(values) not in BLOCK_LISTS:
        raise BlockWeightError(f"a list of {len(values)} block weights is given; lists have 17 (text encoder and the blocks "
                               f"with attention), 25 (all blocks of the UNet) or 26 values (text encoder and all blocks)")
    blocks = {name.path: _ldm_block(name) for name in modules.names if name.component in ("clip", "diffusion")}
    if not set(blocks.values()) >= {*IN, "M00", *OUT}:
        raise BlockWeightError("lists of block weights are for the 12 + 1 + 12 blocks of SD 1.x, which this model does not "
                               f"have; name the blocks instead: {', '.join(_blocks(_spellings(modules)))}")
    weights = dict(zip(BLOCK_LISTS[len(values)], values))
    if len(values) == 17:
        weights = dict.fromkeys([*IN, *OUT], 0.0) | weights
    table = {path: weights.get(block, 1.0) for path, block in blocks.items() if block}
    return BlockWeights({block: weight for block, weight in weights.items() if weight != 1.0}, table)


def _ldm_block(name: Name) -> str | None:
    if name.component == "clip":
        return "BASE"
    inside = name.ldm.removeprefix(LDM_PREFIX["diffusion"])
    match = re.match(r"(input|middle|output)_blocks?\.(\d+)\.", inside)
    if match is None:  # the time embedding and the output layers
        return None
    return "M00" if match[1] == "middle" else f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}"


def _spellings(modules: Modules) -> dict[str, list[str]]:
    """Path -> names that a user may give the module: ours and diffusers', with and without the network's name."""
    table = {path: [path] for path in modules.shapes}
    for name in modules.names:
        if name.path in table:
            table[name.path] += [name.ours, name.diffusers, f"{FOLDERS[name.component]}.{name.diffusers}"]
    return table


def _blocks(spellings: Mapping[str, list[str]]) -> list[str]:
    """Names to suggest in messages: the networks and the UNet's blocks."""
    found = dict.fromkeys(names[-1].split(".")[0] for names in spellings.values())
    for names in spellings.values():
        match = re.match(r"unet\.((?:down|up)_blocks\.\d+|mid_block)\.", names[-1])
        found |= {match[1]: None} if match else {}
    return list(found)
