"""The base class of all kinds of adapter: one weight change ΔW for one layer.

Legend: R rank, `in`, `out` widths, k kernel, g groups. W is the base weight in its own layout: Linear [out, in],
ConvNd [out, in/g, *k], Embedding [num, dim], norms [C].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.adapters.weights import AdapterWeights, LayerShape, LoRAFormatError
from sd.errors import SDError

MODIFIERS = ("magnitude", "diff_b")  # tensors that any kind may have in addition to its own


class Adapter(nn.Module):
    """One weight change for one layer; it does not know names, multipliers or other adapters.

    A kind creates its parameters in its constructor Kind(shape, rank, alpha, *, dropout, rank_dropout, module_dropout,
    **options), so that at first it changes nothing, defines `delta` and `_like`, sets the attributes below, and has a row in
    KINDS. `magnitude` and `diff_b` are modifiers that any kind may have.
    """

    kind: str
    alpha: float | None = None
    rank: int | None = None
    block_multiplier = 1.0  # the user's factor for this one layer; written by LoRALayer.set_block_multiplier
    options: tuple[str, ...] = ()  # arguments of the constructor besides rank, alpha and dropouts
    fits_norms = fits_embeddings = drops_ranks = takes_dora = False
    of_weight = False  # whether ΔW depends on W
    low_rank = False  # whether a rank above min(in, out) is an error

    # How it is trained.
    sized = True  # whether the rank sets the number of parameters
    scaled = False  # whether ΔW has the factor alpha / rank
    bounded = False  # whether alpha bounds the change instead
    adds = False  # whether changes can be summed, as ReLoRA does
    is_product = False  # whether ΔW is a product of all its matrices, so that scaling each of n by s scales ΔW by sⁿ

    # How files store it.
    keys: Mapping[str, str] = {}  # name of a tensor in files (kohya's or LyCORIS's) -> our name
    flags: tuple[str, ...] = ()  # tensors of one bool, which is an attribute and not a parameter
    needed: tuple[str, ...] = ()  # tensors that a complete adapter must have
    cores: tuple[str, ...] = ()  # tensors that are Tucker cores
    only_beside: Mapping[str, str] = {}  # ambiguous name in files -> the name that must accompany it
    held_by: Mapping[str, tuple[str, ...]] = {}  # format other than kohya's -> the tensors that its programs read
    lycoris_name: str | None = None  # `algo` in the header; None: LyCORIS lacks the kind
    no_alpha: float | None = None  # alpha to write where there is none: LyCORIS requires one of some kinds
    peft_type: str | None = None  # in PEFT's adapter_config.json; None: cannot be read
    peft_alpha = "alpha"  # name of alpha there
    peft_fields: Mapping[str, str] = {}  # field of that config -> name in files of the flag that it sets

    def __init__(self, shape: LayerShape, *, dropout: float = 0.0, rank_dropout: float = 0.0, module_dropout: float = 0.0):
        super().__init__()
        if shape.embedding and not self.fits_embeddings:
            raise SDError(f"kind {self.kind!r} does not fit an embedding; allowed: {_kinds_that('fits_embeddings')}")
        if len(shape.weight) < 2 and not self.fits_norms:
            raise SDError(f"kind {self.kind!r} does not fit a norm, whose weight {list(shape.weight)} is not a matrix; "
                          f"allowed: {_kinds_that('fits_norms')}")
        self.embedding = shape.embedding
        self.magnitude: nn.Parameter | None = None
        self.diff_b: nn.Parameter | None = None
        self.from_file = False  # get_lora_parameters() leaves loaded adapters out by default
        self.set_dropouts(dropout, rank_dropout, module_dropout)

    def set_dropouts(self, dropout: float = 0.0, rank_dropout: float = 0.0, module_dropout: float = 0.0) -> None:
        """Set the probabilities with which training drops an input, a rank, and the whole adapter. Raises SDError."""
        for what, p in (("dropout", dropout), ("rank_dropout", rank_dropout), ("module_dropout", module_dropout)):
            if not 0.0 <= p < 1.0:
                raise SDError(f"{what} is {p}; allowed: 0 <= {what} < 1")
        if rank_dropout and not self.drops_ranks:
            raise SDError(f"rank_dropout does not go with kind {self.kind!r}, which has no rank space to drop from")
        if rank_dropout and self.magnitude is not None:
            raise SDError("rank_dropout does not go with DoRA: its norm belongs to the whole of ΔW")
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout

    @property
    def scale(self) -> float:
        """alpha / rank; 1 for kinds without them."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def drops(self) -> bool:
        """Whether any dropout applies: in training mode only, with or without gradients, as in nn.Dropout."""
        return self.training and bool(self.dropout or self.rank_dropout or self.module_dropout)

    def delta(self, W: Tensor) -> Tensor:
        """Return ΔW, times alpha / rank, in the shape and dtype of W, the base weight in fp32 (fp64 in an fp64 model)."""
        raise NotImplementedError

    def bias_delta(self, b: Tensor | None) -> Tensor | None:
        """Return Δb in the dtype of b (fp32 without b), or None if the adapter does not change the bias."""
        return None if self.diff_b is None else self.diff_b.to(torch.float32 if b is None else b.dtype)

    def start_magnitude(self, W: Tensor, *, output_axis: bool = True) -> None:
        """Make this a DoRA adapter (Liu et al. 2024), with a trained norm for each output row of W, or each input column."""
        keep = int(output_axis == self.embedding)  # Embedding is [num, dim]: its output axis is the last
        shape = [n if i == keep else 1 for i, n in enumerate(W.shape)]
        self.magnitude = nn.Parameter(norm_like(W, shape).detach())
        self.set_dropouts(self.dropout, self.rank_dropout, self.module_dropout)

    @torch.no_grad()
    def restart(self, shape: LayerShape) -> None:
        """Reinitialise in place as a new adapter of this form, which changes nothing; values are drawn on the CPU.

        Not for DoRA, whose new magnitude would need the weight's norm.
        """
        new = dict(self._like(self.weights(), shape).named_parameters())
        for name, p in self.named_parameters():
            p.copy_(new[name]) if name in new else p.zero_()  # a new adapter does not change the bias

    def effective_delta(self, W: Tensor) -> Tensor:
        """Return W' - W. With magnitude m, W' = m (W + ΔW) / ‖W + ΔW‖ (DoRA, eq. 5), the norm detached (section 4.3)."""
        delta = self.delta(W)
        if self.magnitude is None:
            return delta
        norm = norm_like(W + delta, self.magnitude.shape).detach()
        s = self.magnitude / norm.where(norm > 0, 1.0)
        s = s.where(norm > 0, 1.0)  # a row of zeros has no direction to scale
        return W * s + delta * s - W  # in this order it is exactly 0 while ΔW = 0, since then s = 1

    def add_to(self, total: Tensor, W: Tensor, multiplier: float, out: Tensor | None = None) -> Tensor:
        """Return total + multiplier · (W' - W) in fp32, in a new tensor or in `out`, which may be total but not W."""
        return total + multiplier * self.effective_delta(W)

    def forward(self, x: Tensor, layer) -> Tensor:
        """Compute what the adapter adds to `layer(x)` at multiplier 1; exact, since layers are linear in (weight, bias)."""
        dtype = layer.compute_dtype(x)
        delta = self.effective_delta(layer.base_weight())
        bias = self.bias_delta(layer.base_bias())
        out = layer.op(self.drop(x), delta.to(dtype), None if bias is None else bias.to(dtype))
        return self.drop_module(out)

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout to the layer's input, in training only."""
        return F.dropout(x, self.dropout, self.training) if self.dropout and x.is_floating_point() else x

    def drop_module(self, change: Tensor) -> Tensor:
        """Skip the whole adapter with probability `module_dropout`, in training only."""
        if self.training and self.module_dropout:
            return change * (torch.rand((), device=change.device) >= self.module_dropout)
        return change

    def _apply(self, fn, recurse=True):
        """Follow the layer's device but keep fp32 when the model is cast to half precision: adapters are cast at use."""
        def keep_dtype(t):
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)
        return super()._apply(keep_dtype, recurse)

    def why_not_trained(self) -> str | None:
        """Why an adapter from a file cannot be trained, and what can; None if it can."""
        return None

    # ---- files: `tensors` are those of one layer, under our own names ------------------------------------------------

    @classmethod
    def rank_of(cls, tensors: Mapping[str, Tensor]) -> int | None:
        """The rank that alpha is divided by; None if the change has no such scale."""
        return None

    @classmethod
    def kind_of(cls, tensors: Mapping[str, Tensor]) -> str:
        """This kind, or another kind whose files use the same names."""
        return cls.kind

    @classmethod
    def missing(cls, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of required tensors that are absent."""
        return [name for name in cls.needed if name not in tensors]

    @classmethod
    def multiplied(cls, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor] | None:
        """Tensors for `factor` · ΔW where ΔW has no alpha / rank; None if the kind cannot express it."""
        return None

    @classmethod
    def spelling(cls, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Our name -> the name in files, for every tensor of the kind; inverse of `keys`."""
        return {name: key for key, name in cls.keys.items()}

    def weights(self) -> AdapterWeights:
        """Everything that a file must contain, detached."""
        tensors = {name: p.detach() for name, p in self.named_parameters()}
        flags = {name: torch.tensor(getattr(self, name)) for name in self.flags}
        return AdapterWeights(self.kind, tensors | flags, alpha=self.alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        """Inverse of `weights`. Raises LoRAFormatError if a tensor is missing, unknown, or does not fit the layer."""
        try:
            with torch.device("meta"):
                adapter = cls._like(weights, shape)
        except SDError as error:
            raise LoRAFormatError(str(error)) from None
        given = {name: tensor for name, tensor in weights.tensors.items() if name not in cls.flags}
        for name, empty in list(adapter.named_parameters()):
            if name not in given:
                raise LoRAFormatError(f"it has no {name}, which kind {cls.kind!r} needs besides {', '.join(given)}")
            setattr(adapter, name, _fitting(name, given.pop(name), empty.shape, shape))
        if "magnitude" in given:
            adapter.magnitude = _fitting_magnitude(given.pop("magnitude"), shape)
        if "diff_b" in given:
            adapter.diff_b = _fitting("diff_b", given.pop("diff_b"), (shape.fan_out,), shape)
        if given:
            raise LoRAFormatError(f"{', '.join(given)} has no place in an adapter of kind {cls.kind!r} for the layer's "
                                  f"weight {list(shape.weight)}")
        return adapter

    @classmethod
    def _like(cls, weights: AdapterWeights, shape: LayerShape) -> Self:
        """Create an adapter with the form (rank, Tucker core, ...) of a file's tensors."""
        raise NotImplementedError


def _kinds_that(fact: str) -> str:
    from sd.adapters.kinds import KINDS  # here, since the kinds import this file
    return ", ".join(name for name, kind in KINDS.items() if getattr(kind, fact))


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Cast half precision to fp32, in which changes are summed; fp64 stays fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_kind_rank(kind: str, rank: int) -> None:
    """Raise SDError unless the rank is a whole number from 1."""
    if not (isinstance(rank, int) and rank >= 1):
        raise SDError(f"rank {rank} does not go with kind {kind!r}; allowed: whole numbers from 1")


def size_of(weights: AdapterWeights, name: str, axis: int = 0) -> int:
    """Length of one axis of a tensor. Raises LoRAFormatError if the file lacks the tensor or the axis."""
    tensor = weights.tensors.get(name)
    if tensor is None:
        raise LoRAFormatError(f"it has no {name}, which kind {weights.kind!r} needs besides {', '.join(weights.tensors)}")
    if tensor.dim() <= axis or not tensor.numel():
        raise LoRAFormatError(f"{name} has shape {list(tensor.shape)}, which fits no layer")
    return tensor.shape[axis]


def flag_of(weights: AdapterWeights, name: str, what: str) -> bool:
    """Value of a flag; `what` is its meaning, for the message. Raises LoRAFormatError if the file lacks it."""
    flag = weights.tensors.get(name)
    if flag is None or flag.numel() != 1:
        raise LoRAFormatError(f"it has no {name} of one value, which says {what}")
    return bool(flag)


def _own(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.to(torch.float32, copy=True))  # the file may be memory-mapped, and the adapter outlives it


def _fitting(name: str, given: Tensor, want, shape: LayerShape) -> nn.Parameter:
    """Turn a tensor of a file into a parameter. Writers disagree on whether a 1x1 convolution and its factors are [a, b] or
    [a, b, 1, 1], and on whether a kernel's factor is flattened to a matrix."""
    same = [n for n in given.shape if n != 1] == [n for n in want if n != 1]
    flat = len(want) == 2 < given.dim() and given.flatten(1).shape == tuple(want)
    if given.numel() != math.prod(want) or not (same or flat):
        raise LoRAFormatError(f"{name} has shape {list(given.shape)}, the layer's weight {list(shape.weight)} "
                              f"wants {list(want)}")
    return _own(given.reshape(tuple(want)))


def _fitting_magnitude(m: Tensor, shape: LayerShape) -> nn.Parameter:
    dims = len(shape.weight)
    m = m.reshape(*m.shape, *(1,) * (dims - m.dim()))  # a 1x1 convolution's may be [out, 1]
    axes = [i for i, n in enumerate(m.shape) if n != 1]
    no_axis = not axes and 1 not in shape.weight[:2]
    if m.dim() > dims or len(axes) > 1 or no_axis or any(i > 1 or m.shape[i] != shape.weight[i] for i in axes):
        raise LoRAFormatError(f"its magnitude has shape {list(m.shape)}, the layer's weight {list(shape.weight)}")
    return _own(m)


def norm_like(W: Tensor, shape) -> Tensor:
    """L2 norm of W over every axis that has length 1 in `shape`."""
    axes = [i for i, n in enumerate(shape) if n == 1]
    return torch.linalg.vector_norm(W, dim=axes, keepdim=True) if axes else W.abs()


def rebuild(a: Tensor, b: Tensor, core: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply a [out, r] · b [r, in·k]; with a Tucker core [r, r, *k]: a [r, out], b [r, in] -> [out, in, *k]."""
    a, b = a.to(dtype), b.to(dtype)
    return a @ b if core is None else torch.einsum("ij...,ip,jq->pq...", core.to(dtype), a, b)


def uniform(tensor: Tensor) -> Tensor:
    """Fill as torch initialises the weight of a Linear or ConvNd: uniform within ±1 / sqrt(fan in)."""
    if tensor.is_meta:  # values will come from a file, and torch takes a millisecond to fill a meta tensor
        return tensor
    bound = 1 / math.sqrt(tensor[0].numel())
    return nn.init.uniform_(tensor, -bound, bound)
