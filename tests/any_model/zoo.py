"""Models that are not ours, and what they compute with their weights changed by hand."""

import copy
import warnings
from functools import partial

import torch
import torch.nn as nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from sd.lora import apply_lora_to_model, lora_layers
from tests.adapters.cases import fill
from tests.any_model.tiny import ALPHA, RANK, tokens


class Attention(nn.Module):
    """An nn.MultiheadAttention as a model of one input."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def encoder(layers=2, **options):
    with warnings.catch_warnings():  # that norm_first has no nested tensors
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options), layers)


def gpt2(layers):
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=layers, n_head=2, resid_pdrop=0,
                                      embd_pdrop=0, attn_pdrop=0, use_cache=False))


ZOO = {
    "root linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(4, 5, 6), "full"),
    "root conv": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(4, 4, 6, 7), "layer"),
    "root embedding": (lambda: nn.Embedding(20, 6, padding_idx=3), lambda: tokens(4, 5), "full"),
    "root Conv1D": (lambda: Conv1D(8, 6), lambda: torch.randn(4, 5, 6), "full"),
    "root norm": (lambda: nn.LayerNorm(6), lambda: torch.randn(4, 6), "layer"),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, 2, padding=2, dilation=2, padding_mode="reflect")),
               lambda: torch.randn(4, 4, 9), "full"),
    "conv2d same": (lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 2), padding="same", dilation=(1, 2), padding_mode="replicate")),
                    lambda: torch.randn(4, 4, 6, 7), "full"),
    "conv2d groups": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular", bias=False)),
                      lambda: torch.randn(4, 4, 6, 7), "full"),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, padding=1)), lambda: torch.randn(4, 2, 6, 7), "full"),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3, (1, 2, 1), padding=1)), lambda: torch.randn(4, 2, 4, 5, 6), "full"),
    "attention": (Attention, lambda: torch.randn(4, 5, 8), "full"),
    "attention without biases": (partial(Attention, bias=False), lambda: torch.randn(4, 5, 8), ["v_proj", "out_proj"]),
    "encoder": (encoder, lambda: torch.randn(4, 5, 8), "full"),
    "encoder, norm first": (partial(encoder, norm_first=True), lambda: torch.randn(4, 5, 8), ["1"]),
    "BERT": (lambda: BertModel(BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                          intermediate_size=16)),
             lambda: tokens(4, 5), ["full", "word_embeddings", "LayerNorm"]),
    "GPT-2": (lambda: gpt2(1), lambda: tokens(4, 5), ["transformer.h", "wte", "wpe"]),
}


def made(kind):
    torch.manual_seed(0)
    make, sample, targets = ZOO[kind]
    return make().eval().requires_grad_(False), sample(), targets


def adapted(kind, names=("a",)):
    model, x, targets = made(kind)
    bare = copy.deepcopy(model)
    for i, name in enumerate(names):
        apply_lora_to_model(model, rank=RANK, alpha=ALPHA, target_modules=targets, name=name)
        fill(model, name, seed=i)
    return model, bare, x


def run(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple) else out.get("logits", out[0])


@torch.no_grad()
def delta(layer, name, groups=1):
    """alpha / rank · up · down in fp64, [out, in/g · k], from the parameters alone; a norm's own difference."""
    adapter = layer.adapter(name)
    if adapter.kind == "full":
        return adapter.diff.double()
    parts = zip(adapter.up.double().flatten(1).chunk(groups), adapter.down.double().flatten(1).chunk(groups))
    return torch.cat([up @ down for up, down in parts]) * ALPHA / RANK


@torch.no_grad()
def changed(model, bare, multipliers):
    """The bare model, in fp64, with every weight changed by hand."""
    bare = copy.deepcopy(bare).double()
    for path, layer in lora_layers(model).items():
        parent, _, part = path.rpartition(".")
        for name, m in multipliers.items():
            change = m * delta(layer, name, getattr(layer, "groups", 1))
            if part in ("q_proj", "k_proj", "v_proj"):  # of torch's attention, which has no such modules
                bare.get_submodule(parent).in_proj_weight.chunk(3)["qkv".index(part[0])].add_(change)
                continue
            plain = bare if path == "layer" else bare.get_submodule(path)
            change = change.T if isinstance(layer, (nn.Embedding, Conv1D)) else change.reshape(plain.weight.shape)
            plain.weight = nn.Parameter(plain.weight + change, requires_grad=False)  # a new one: it may be tied
    return bare


def as_double(x):
    return x.double() if x.is_floating_point() else x


def assert_near(out, expected, tolerance=5e-6):
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
