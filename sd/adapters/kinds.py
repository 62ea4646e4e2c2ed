"""The table of all kinds of adapter; a new kind takes a class, a row here, and its name in TrainConfig.kind."""

from __future__ import annotations

from sd.adapters.adapter import Adapter
from sd.adapters.low_rank import Full, LowRank
from sd.adapters.lycoris import IA3, GLoRA, LoHa, LoKr
from sd.adapters.orthogonal import BOFT, HRA, OFT
from sd.adapters.weights import AdapterWeights

KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (
    LowRank,
    Full,
    LoHa,
    LoKr,
    IA3,
    GLoRA,
    OFT,
    BOFT,
    HRA,
)}


def needs_base(weights: AdapterWeights) -> bool:
    """Whether the change depends on the base weight: for some kinds, and for all with a magnitude (DoRA)."""
    return KINDS[weights.kind].of_weight or "magnitude" in weights.tensors
