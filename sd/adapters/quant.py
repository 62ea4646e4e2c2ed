"""A quantised frozen base (QLoRA): nf4, int8 or fp8 weights in the layers of a model, dequantised at each use.

A quantised layer is a LoRALayer whose `weight` is a QuantizedWeight, which has the shape, dtype and device of the tensor
that it replaces. Layer and adapters compute, bit for bit, what they would with the weight `dequantize()`; the quantisation
error is permanent. `.to(dtype)` changes the dtype of the dequantised weight, never what is stored.

Legend: n values of a weight, flattened; out rows; block of 64 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.adapters.derived import exact
from sd.adapters.layer import MERGED, LoRALayer
from sd.adapters.layers import as_lora_layer, lora_class
from sd.adapters.switch import exclusive
from sd.adapters.targets import components, find_targets, named_layers, refuse_bypassed
from sd.adapters.weights import LoRAError

BLOCK = 64  # values that share an absmax (Dettmers et al. 2023, section 3)
SECOND_BLOCK = 256  # absmaxes that share a scale if they are quantised too

# The 16 levels of NormalFloat (Dettmers et al. 2023, appendix E): quantiles of a normal distribution, with an exact 0.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


# ---- numbers: W in fp32 <-> what is stored -----------------------------------------------------------------------------

def pack_nf4(W: Tensor) -> dict[str, Tensor]:
    """Code the nearest level of W / absmax in each block of 64. codes: [n / 64, 32], two per byte; absmax: [n / 64, 1]."""
    blocks = _blocks(W, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    scaled, codes = blocks / absmax.where(absmax > 0, 1.0), torch.zeros_like(blocks, dtype=torch.uint8)
    for border in ((levels[1:] + levels[:-1]) / 2).float().tolist():  # twice as fast as bucketize
        codes += scaled > border
    # Both values of each byte as one int64: one look-up for two is twice as fast as two, and needs no shifts.
    pairs = torch.cartesian_prod(*[levels.float()] * 2).view(torch.int64).flatten().to(W.device)
    return {"codes": codes[:, ::2] << 4 | codes[:, 1::2], "absmax": absmax, "pairs": pairs}


def unpack_nf4(codes: Tensor, absmax: Tensor, pairs: Tensor) -> Tensor:
    """Blocks [n / 64, 64] in fp32."""
    return pairs.index_select(0, codes.flatten().int()).view(torch.float32).view(-1, BLOCK).mul_(absmax)


def pack_nf4_double(W: Tensor) -> dict[str, Tensor]:
    """Like pack_nf4, with the absmaxes minus their mean in int8: 4.13 bits per value, not 4.5 (double quantisation)."""
    parts = pack_nf4(W)
    absmax = parts.pop("absmax")
    mean = absmax.mean()
    second = pack_int8(_blocks(absmax - mean, SECOND_BLOCK))
    return parts | {"absmax_codes": second["codes"], "absmax_scale": second["scale"], "absmax_mean": mean}


def unpack_nf4_double(codes: Tensor, pairs: Tensor, absmax_codes: Tensor, absmax_scale: Tensor, absmax_mean: Tensor) -> Tensor:
    absmax = (unpack_rows(absmax_codes, absmax_scale) + absmax_mean).view(-1, 1)
    return unpack_nf4(codes, absmax[:len(codes)], pairs)


def pack_int8(W: Tensor) -> dict[str, Tensor]:
    """round(127 W / absmax) for each row of W. codes: [out, n / out], scale: [out, 1]."""
    rows, scale = _scaled_rows(W, 127.0)
    return {"codes": rows.round().to(torch.int8), "scale": scale}


def pack_fp8(W: Tensor) -> dict[str, Tensor]:
    """448 W / absmax for each row of W, in float8_e4m3fn, whose largest number is 448. Shapes as in pack_int8."""
    rows, scale = _scaled_rows(W, 448.0)
    return {"codes": rows.to(torch.float8_e4m3fn).view(torch.uint8), "scale": scale}  # as bytes: pickle does not support float8


def unpack_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    return unpack_rows(codes.view(torch.float8_e4m3fn), scale)


def unpack_rows(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float().mul_(scale)


def _blocks(W: Tensor, size: int) -> Tensor:
    """Flatten W into [n / size, size], padded with zeros."""
    flat = W.flatten()
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _scaled_rows(W: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    rows = W.flatten(1)
    scale = rows.abs().amax(dim=1, keepdim=True) / largest
    scale = scale.where(scale > 0, 1.0)
    return (rows / scale).clamp(-largest, largest), scale  # clamped, since a denormal scale is too coarse


class Quantizer(NamedTuple):
    pack: Callable[[Tensor], dict[str, Tensor]]
    unpack: Callable[..., Tensor]


QUANTIZERS = {
    "nf4": Quantizer(pack_nf4, unpack_nf4),
    "nf4-double": Quantizer(pack_nf4_double, unpack_nf4_double),
    "int8": Quantizer(pack_int8, unpack_rows),
    "fp8": Quantizer(pack_fp8, unpack_fp8),
}


# ---- a quantised weight in a layer -------------------------------------------------------------------------------------

class QuantizedWeight(nn.Module):
    """Replaces the frozen `weight` of a layer: packed buffers, with the shape, dtype and device of that tensor.

    State dicts keep the keys of the plain model, with the dequantised weights.
    """

    requires_grad = False
    codes: Tensor
    _buffers: dict[str, Any]  # all of them tensors

    def __init__(self, weight: Tensor, kind: str):
        super().__init__()
        self.kind, self.shape, self.dtype = kind, weight.shape, weight.dtype
        for name, part in QUANTIZERS[kind].pack(weight.detach().float()).items():
            self.register_buffer(name, part)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantize(self) -> Tensor:
        """The weight as a tensor of `shape` and `dtype`: computed in fp32, rounded once."""
        return self.unpack(*self._buffers.values())

    def unpack(self, *parts: Tensor) -> Tensor:
        values = QUANTIZERS[self.kind].unpack(*parts).flatten()
        return values[:self.shape.numel()].view(self.shape).to(self.dtype)

    def forward(self, x: Tensor, layer: LoRALayer) -> Tensor:
        """layer.op(x, the dequantised weight, layer.bias)."""
        if not torch.is_grad_enabled():
            return layer.op(x, self.dequantize(), layer.bias)
        if isinstance(layer, nn.modules.conv._ConvNd):
            return _Convolution.apply(_padded(x, layer), layer.bias, layer, self, *self._buffers.values())
        return _Linear.apply(x, layer.bias, layer, self, *self._buffers.values())

    def extra_repr(self) -> str:
        return f"{self.kind}, {list(self.shape)}, {self.dtype}"

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype

        def keep_dtype(part):
            moved = fn(part)
            return moved if moved.dtype == part.dtype else part.to(moved.device)
        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix[:-1]] = self.dequantize()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        raise LoRAError(f"{prefix[:-1]} is quantised ({self.kind}) and takes no values; load them into the plain model, then "
                        f"quantize_base it")


# A plain layer saves its weight for backward. Here that would be the dequantised one, so it is dequantised again.

class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, layer, weight, *parts):
        _save(ctx, x, weight, parts)
        return F.linear(x, weight.unpack(*parts), bias)

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _saved_weight(ctx, grad)).to(ctx.like.dtype)
        if ctx.needs_input_grad[1]:
            grad_b = grad.flatten(0, -2).sum(0)
        return grad_x, grad_b, None, None, *[None] * ctx.parts


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, layer, weight, *parts):
        _save(ctx, x, weight, parts)
        ctx.how = layer.stride, _padding(layer), layer.dilation, False, [0] * len(layer.stride), layer.groups
        stride, padding, dilation, *_ = ctx.how
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
        return conv(x, weight.unpack(*parts), bias, stride, padding, dilation, layer.groups)

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:  # only the shape and layout of x matter
            x = torch.empty_like(ctx.like, dtype=grad.dtype, device=grad.device)
            grad_x = torch.ops.aten.convolution_backward(grad, x, _saved_weight(ctx, grad), None, *ctx.how,
                                                         (True, False, False))[0].to(ctx.like.dtype)
        if ctx.needs_input_grad[1]:
            grad_b = grad.transpose(0, 1).flatten(1).sum(1)
        return grad_x, grad_b, None, None, *[None] * ctx.parts


def _save(ctx, x: Tensor, weight: QuantizedWeight, parts: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*parts)
    ctx.parts, ctx.weight, ctx.like = len(parts), weight, torch.empty_like(x, device="meta")


def _saved_weight(ctx, grad: Tensor) -> Tensor:
    return ctx.weight.unpack(*ctx.saved_tensors).to(grad.dtype)  # under autocast the product had another dtype


def _padding(layer: nn.modules.conv._ConvNd):
    return layer.padding if layer.padding_mode == "zeros" and not isinstance(layer.padding, str) else [0] * len(layer.stride)


def _padded(x: Tensor, layer: nn.modules.conv._ConvNd) -> Tensor:
    """Pad x where the convolution itself cannot: with other values than zeros, or different amounts on the two sides."""
    if _padding(layer) is layer.padding:
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


# ---- whole models ------------------------------------------------------------------------------------------------------

def quantize_base(models, kind: str = "nf4", target_modules=None):
    """Quantise the weights of the frozen base in place: "nf4", "nf4-double", "int8" or "fp8". Returns `models`.

    Bits per value: 4.5, 4.13, 8 and 8 (plus one scale per row). `target_modules`: as in apply_lora_to_model; None is
    "full", every linear layer and convolution of UNet and text encoder but the UNet's first and last; biases, norms and
    embeddings stay. Attach DoRA afterwards: its magnitude is the norm of the weight at that time. Raises LoRAError, before
    anything changes, for an unknown kind, or a layer that is trainable, quantised already, not finite, or of another type.
    """
    if kind not in QUANTIZERS:
        raise LoRAError(f"quantisation {kind!r} is unknown; allowed: {', '.join(QUANTIZERS)}")
    with exclusive(models), exact():
        targets = find_targets(models, "full" if target_modules is None else target_modules)
        refuse_bypassed(models, targets, lambda m: isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)),
                        "it cannot be quantised")
        for path, target in targets.items():
            _check(target, path)
        for path, target in targets.items():
            layer = as_lora_layer(target, path)
            layer.drop_derived()
            packed = QuantizedWeight(layer.weight, kind)
            del layer.weight
            layer.weight = packed.train(layer.training)
    return models


def dequantize_base(models):
    """Make every quantised weight a plain, frozen one again, in its layer's dtype. Returns `models`."""
    with exclusive(models), exact():
        for layer in _quantized_layers(models).values():
            layer.drop_derived()
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
            layer.register_parameter("bias", layer._parameters.pop("bias"))  # after the weight, in the original order
            if not layer.adapters and layer.plain_class is not None:
                layer.to_plain()
    return models


def quantized_kinds(models) -> list[str]:
    """The kinds of quantisation in the base, such as ["nf4"]; [] for a plain one."""
    return sorted({layer.weight.kind for layer in _quantized_layers(models).values()})


def base_bytes(models) -> int:
    """Bytes of the base, plain or quantised: all parameters and buffers except those of adapters and merged weights."""
    tensors = chain.from_iterable((*network.named_parameters(), *network.named_buffers())
                                  for network in components(models).values())
    return sum(t.nbytes for name, t in tensors
               if ".adapters." not in f".{name}" and name.rpartition(".")[2] not in MERGED)


def _quantized_layers(models) -> dict[str, LoRALayer]:
    return {path: m for path, m in named_layers(models)
            if isinstance(m, LoRALayer) and isinstance(m.weight, QuantizedWeight)}


def _check(layer: nn.Module, path: str) -> None:
    lora_class(layer, path)
    if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        raise LoRAError(f"{path} is a {type(layer).__name__}; only linear layers and convolutions are quantised")
    if isinstance(layer.weight, QuantizedWeight):
        raise LoRAError(f"{path} is quantised already ({layer.weight.kind}); dequantize_base(models) first")
    if layer.weight.requires_grad or layer.bias is not None and layer.bias.requires_grad:
        raise LoRAError(f"{path} is trainable; only a frozen base can be quantised: requires_grad_(False) on the model first")
    if not layer.weight.is_meta and not math.isfinite(layer.weight.detach().abs().amax()):
        raise LoRAError(f"{path} holds weights that are not finite, so it cannot be quantised")
