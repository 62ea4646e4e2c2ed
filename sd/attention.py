"""The attention of UNet, text encoder and VAE; its projections are LoRALinear."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.adapters.layers import LoRALinear
from sd.cpu import has_bf16


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, 3.2). x: [B, N, D]; returns [B, N, D]."""

    def __init__(self, n_heads: int, d_embed: int, in_proj_bias: bool = True, out_proj_bias: bool = True):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = LoRALinear(d_embed, d_embed, bias=in_proj_bias)
        self.k_proj = LoRALinear(d_embed, d_embed, bias=in_proj_bias)
        self.v_proj = LoRALinear(d_embed, d_embed, bias=in_proj_bias)
        self.out_proj = LoRALinear(d_embed, d_embed, bias=out_proj_bias)

    def forward(self, x: Tensor, causal_mask: bool = False) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(q, k, v, self.n_heads, causal_mask))


class CrossAttention(nn.Module):
    """Multi-head attention from x: [B, N, D] to a context y: [B, L, d_cross]; returns [B, N, D]."""

    def __init__(self, n_heads: int, d_embed: int, d_cross: int, in_proj_bias: bool = True, out_proj_bias: bool = True):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = LoRALinear(d_embed, d_embed, bias=in_proj_bias)
        self.k_proj = LoRALinear(d_cross, d_embed, bias=in_proj_bias)
        self.v_proj = LoRALinear(d_cross, d_embed, bias=in_proj_bias)
        self.out_proj = LoRALinear(d_embed, d_embed, bias=out_proj_bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(y), self.v_proj(y)
        return self.out_proj(attend(q, k, v, self.n_heads))


def attend(q: Tensor, k: Tensor, v: Tensor, n_heads: int, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v for each head. q: [B, N, D], k and v: [B, L, D]; returns [B, N, D]."""
    q, k, v = (t.unflatten(-1, (n_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, N or L, D / heads]
    if pays_in_chunks(q, k) and not causal:
        return attend_in_chunks(q, k, v).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


CHUNK = 512  # rows of scores that are made at a time, so that they stay in the cache


def pays_in_chunks(q: Tensor, k: Tensor) -> bool:
    """Whether `attend_in_chunks` is faster than torch: in bf16 on CPUs that multiply it, for inference, where scores are many.

    There torch's own kernel multiplies small blocks by MKL; F.linear multiplies large ones by oneDNN.
    """
    return (q.dtype == torch.bfloat16 and q.device.type == "cpu" and min(q.shape[2], k.shape[2]) >= 1024
            and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and has_bf16())


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for each head, rows by rows. q: [B, heads, N, d], k and v: [B, heads, L, d]; returns q's shape.

    Scores and probabilities are rounded to q's dtype, the softmax sums in fp32.
    """
    out = torch.empty_like(q)
    scale = q.shape[-1] ** -0.5
    for head in product(range(q.shape[0]), range(q.shape[1])):
        keys, values = k[head].contiguous(), v[head].T.contiguous()
        for rows, result in zip(q[head].split(CHUNK), out[head].split(CHUNK)):
            scores = F.linear(rows, keys).mul_(scale)
            result.copy_(F.linear(scores.softmax(dim=-1), values))
    return out
