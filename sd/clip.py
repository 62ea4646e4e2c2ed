"""The CLIP text encoder: tokens to context."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sd.attention import SelfAttention
from sd.config import CLIPConfig
from sd.errors import SDError
from sd.prompts.learned_words import LearnedWords


class CLIP(nn.Module):
    """CLIP text transformer (Radford et al. 2021). tokens: [B, L] long; returns the context [B, L, D]."""

    component = "clip"

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_tokens, config.width)
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        self.learned = LearnedWords(config)  # adds no keys while it is empty

    def forward(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """`clip_skip` 1 takes the last layer's output, 2 that of the layer before, ...; then the final norm. Raises SDError."""
        if not 1 <= clip_skip <= len(self.layers):
            raise SDError(f"clip_skip is {clip_skip}; allowed: 1 (last layer) to {len(self.layers)}")
        if tokens.shape[1] > self.config.max_tokens:
            raise SDError(f"got {tokens.shape[1]} tokens; the text encoder takes at most {self.config.max_tokens}")
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # a row for each image
        x = self.embed(tokens) + self.position_embedding(positions)  # [B, L, D]
        for layer in self.layers[: len(self.layers) - clip_skip + 1]:
            x = layer(x)
        return self.final_norm(x)

    @property
    def words(self) -> dict[str, range]:
        """Learned word -> its token ids, which follow those of the vocabulary."""
        return self.learned.ids

    def learn(self, words: Mapping[str, Tensor]) -> list[str]:
        """Add words that prompts can use; see LearnedWords.learn."""
        return self.learned.learn(words, self.final_norm.weight.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids, learned words included, without positions; returns [B, L, D]."""
        if not self.learned:
            return self.token_embedding(tokens)
        x, row = self.token_embedding(tokens.clamp(max=self.config.vocab_size - 1)), tokens - self.config.vocab_size
        vectors = torch.cat([vectors.to(x.dtype) for vectors in self.learned.values()])
        return torch.where((row >= 0)[..., None], vectors[row.clamp(min=0)], x)


class CLIPLayer(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.heads, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), causal_mask=True)
        return x + self.mlp(self.norm2(x))


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.quick = config.activation == "quick_gelu"

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)  # ViT-L/14 was trained with the quick form
        return self.fc2(x)
