"""The attention of UNet, text encoder and VAE; its projections are LoRALinear."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.adapters.layers import LoRALinear


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
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
