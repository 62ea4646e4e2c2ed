"""torch's own attention with LoRA. It reads its layers' weights instead of calling the layers, so it needs special classes.

Legend: B batch, L queries, S keys, H heads, E width of the queries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.adapters.layer import LoRALayer
from sd.adapters.walk import walk
from sd.adapters.weights import LayerShape
from sd.errors import SDError

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class AttentionProjection(LoRALayer, nn.Module):
    """q, k or v of an nn.MultiheadAttention: a slice of its parameters, which stay where they are and keep their keys."""

    routable = True

    def __init__(self, attention: nn.MultiheadAttention, index: int):
        super().__init__()
        self._attention, self.index = (attention,), index  # in a tuple, so that it is not a submodule
        self.init_lora()
        self.train(attention.training)

    @property
    def attention(self) -> nn.MultiheadAttention:
        return self._attention[0]

    @property
    def _name(self) -> str:
        return "in_proj_weight" if self.attention.in_proj_weight is not None else f"{PROJECTIONS[self.index]}_weight"

    @property
    def weight(self) -> Tensor:
        return self._slice(getattr(self.attention, self._name), self.attention.embed_dim)

    @property
    def bias(self) -> Tensor | None:
        bias = self.attention.in_proj_bias
        return None if bias is None else self._slice(bias, self.attention.embed_dim)

    def _slice(self, tensor: Tensor, rows: int) -> Tensor:
        return tensor if len(tensor) == rows else tensor[self.index * rows:(self.index + 1) * rows]

    def lora_shape(self):
        return LayerShape(tuple(self.weight.shape))

    def op(self, x, weight, bias):
        return F.linear(x, weight, bias)

    def base_tensors(self):
        return [getattr(self.attention, self._name), self.attention.in_proj_bias]

    def set_base(self, weight, bias):
        for name, values in ((self._name, weight), ("in_proj_bias", bias)):
            if values is not None:
                old = getattr(self.attention, name)
                whole = old.detach().clone()
                self._slice(whole, len(values)).copy_(values)
                setattr(self.attention, name, nn.Parameter(whole, old.requires_grad))

    def attached(self) -> AttentionProjection:
        """The projection that its attention calls: this one, unless there is one already. Converts the attention."""
        attention = self.attention
        if type(attention) is nn.MultiheadAttention:
            attention.__class__ = LoRAMultiheadAttention
            for name, projection in projections(attention).items():
                attention.add_module(name, self if name == PROJECTIONS[self.index] else projection)
        return projections(attention)[PROJECTIONS[self.index]]


def projections(attention: nn.MultiheadAttention) -> dict[str, AttentionProjection]:
    """The projections of an attention; new ones if it is not converted."""
    there: dict[str, Any] = attention._modules
    return {name: there.get(name) or AttentionProjection(attention, i) for i, name in enumerate(PROJECTIONS)}


def any_on(module: nn.Module) -> bool:
    """Whether some adapter in the module is on."""
    return any(m.is_on for m in module.modules() if isinstance(m, LoRALayer))


class LoRAMultiheadAttention(nn.MultiheadAttention):
    """torch's own while no adapter in it is on; else the same formula, up to rounding, with projections that are called."""

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):
        if not any_on(self):
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                                   is_causal)
        if is_causal and attn_mask is None:
            raise SDError("is_causal describes attn_mask, which is missing; give the mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)  # [B, L, E], [B, S, E], [B, S, E]
        if self.bias_k is not None:
            k, v = (torch.cat([x, bias.expand(len(x), -1, -1)], dim=1) for x, bias in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        causal = is_causal and key_padding_mask is None and not need_weights and k.shape[1] == key.shape[1]
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k.shape[1] - key.shape[1])
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, ., E/H]
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            weights = q * math.sqrt(1 / self.head_dim) @ k.mT
            weights = F.softmax(weights if mask is None else weights + mask, dim=-1)  # [B, H, L, S]
            weights = F.dropout(weights, dropout, self.training)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # [B, L, E]
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, extra: int) -> Tensor | None:
        """The sum of both masks, to add to scores [B, H, L, S + extra]; None without any. Raises SDError for a misfit."""
        b, length, sources = len(q), q.shape[1], None if key_padding_mask is None else key_padding_mask.shape[-1]
        for name, mask, shapes in (("attn_mask", attn_mask, ((length, None), (b * self.num_heads, length, None))),
                                   ("key_padding_mask", key_padding_mask, ((b, sources),))):
            if mask is None:
                continue
            if not (mask.dtype == torch.bool or mask.is_floating_point()):
                raise SDError(f"{name} is of {mask.dtype}; allowed: torch.bool and floating types")
            if not any(mask.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, mask.shape)) for shape in shapes):
                raise SDError(f"{name} has the shape {list(mask.shape)}, which does not fit {b} samples of {length} queries")
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask.view(len(q), self.num_heads, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None])
        masks = [torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m.to(q.dtype)
                 for m in masks]
        total: Any = sum(masks)
        return F.pad(total, (0, extra)) if masks else None


class LoRATransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Takes torch's fast path, which reads the weights of its layers, only while no adapter in it is on."""

    @property
    def activation_relu_or_gelu(self) -> int:  # 0 rules out the fast path
        return 0 if any_on(self) else self.__dict__["activation_relu_or_gelu"]

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class LoRATransformerEncoder(nn.TransformerEncoder):
    """Hands its layers nested tensors, which only their fast path supports, only while no adapter in it is on."""

    @property
    def use_nested_tensor(self) -> bool:
        return self.__dict__["use_nested_tensor"] and not any_on(self)

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


HOSTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: LoRAMultiheadAttention, nn.TransformerEncoderLayer: LoRATransformerEncoderLayer,
    nn.TransformerEncoder: LoRATransformerEncoder,
}


def convert_hosts(network: nn.Module) -> None:
    """Give modules of HOSTS their LoRA class while they contain an adapter, and their own again afterwards."""
    back = {lora: plain for plain, lora in HOSTS.items()}
    for _, module in list(walk(network)):
        if type(module) not in HOSTS and type(module) not in back:
            continue
        adapted = any(isinstance(m, LoRALayer) and m.adapters for m in module.modules())
        if isinstance(module, nn.MultiheadAttention) and adapted:
            AttentionProjection(module, 0).attached()
        elif adapted:
            module.__class__ = HOSTS.get(type(module), type(module))
        else:
            module.__class__ = back.get(type(module), type(module))
            for name in PROJECTIONS if isinstance(module, nn.MultiheadAttention) else ():
                module._modules.pop(name, None)
