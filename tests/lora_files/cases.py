"""Layers of the tiny models by their names in diffusers, random LoRAs for them, and what networks give with these."""

import safetensors.torch
import torch

from sd.adapters.weights import AdapterWeights

ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
PROJ = "down_blocks.1.attentions.0.proj_in"  # a 1x1 convolution
CONV = "up_blocks.1.resnets.0.conv1"  # 3x3
DOWN = "down_blocks.0.downsamplers.0.conv"  # 3x3 with stride 2
NORM = "mid_block.attentions.0.norm"
TEXT = ["encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1"]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))) * scale


def low_rank(shape, rank=3, alpha=1.5, *, seed=0, scale=1.0, embedding=False, tucker=False, **more) -> AdapterWeights:
    """A LoRA for a weight of this shape, which is [number, width] of an embedding; `more`: further tensors."""
    out, into, *kernel = shape[::-1] if embedding else shape
    ones = [1] * len(kernel)
    tensors = {"down": random(rank, into, *(ones if tucker else kernel), seed=seed, scale=scale),
               "up": random(out, rank, *ones, seed=seed + 1, scale=scale)}
    if tucker:
        tensors["mid"] = random(rank, rank, *kernel, seed=seed + 2, scale=scale)
    return AdapterWeights("lora", tensors | more, alpha)


def magnitude(*shape: int, seed: int = 0) -> torch.Tensor:
    return random(*shape, seed=seed).abs() + 0.5


def outputs(unet, clip) -> tuple[torch.Tensor, torch.Tensor]:
    """The text encoder's and the UNet's output, of our networks or of the peers'."""
    g = torch.Generator().manual_seed(0)
    tokens, latents = torch.randint(0, 49406, (2, 77), generator=g), torch.randn(2, 4, 8, 8, generator=g)
    with torch.no_grad():
        context = clip(tokens)
        context = context if isinstance(context, torch.Tensor) else context[0]
        out = unet(latents.to(context.dtype), torch.tensor([3, 700]), context)
    return context, out if isinstance(out, torch.Tensor) else out.sample


def our_outputs(models) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs(models["diffusion"], models["clip"])


def close(ours, theirs, tolerance: float = 2e-5) -> bool:
    """Whether all tensors are equal to `tolerance` of the largest value of each."""
    return all(a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()
               for a, b in zip(ours, theirs, strict=True))


# ---- files of kohya ----------------------------------------------------------------------------------------------------

def pair(module, out, into, rank=3, alpha=None, kernel=(), seed=0, scale=0.3):
    """A LoRA of one module as kohya writes it."""
    ones = (1,) * len(kernel)
    found = {f"{module}.lora_down.weight": random(rank, into, *kernel, seed=seed, scale=scale),
             f"{module}.lora_up.weight": random(out, rank, *ones, seed=seed + 1, scale=scale)}
    return found if alpha is None else found | {f"{module}.alpha": torch.as_tensor(alpha)}


def u(name):
    """kohya's name of a module of the UNet."""
    return "lora_unet_" + name.replace(".", "_")


def t(name, prefix="lora_te_text_model_"):
    """kohya's name of a module of the text encoder."""
    return prefix + name.replace(".", "_")


# Files as different programs write them; on TINY the widths are 32, 64, 64, 64 and the context has 32.
FILES = {
    "attention": pair(u(ATTN), 32, 32, alpha=2.0)
    | pair(u("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"), 64, 64, rank=5, alpha=0.7),
    "alpha missing": pair(u(ATTN), 32, 32, rank=4),
    "alpha of one element": pair(u(ATTN), 32, 32, alpha=[2.0]),
    "alpha as an integer": pair(u(ATTN), 32, 32, alpha=2),
    "1x1 convolution 4-D": pair(u(PROJ), 64, 64, alpha=1.0, kernel=(1, 1)),
    "1x1 convolution 2-D": pair(u(PROJ), 64, 64, alpha=1.0),
    "3x3 convolution": pair(u(CONV), 64, 128, alpha=1.0, kernel=(3, 3)),
    "3x3 convolution with stride": pair(u(DOWN), 32, 32, alpha=1.0, kernel=(3, 3)),
    "time embedding and feed-forward": pair(u("time_embedding.linear_1"), 128, 32, alpha=1.5)
    | pair(u("up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj"), 512, 64, alpha=1.5),
    "text encoder": pair(t(TEXT[0]), 32, 32, alpha=1.0) | pair(t(TEXT[1]), 64, 32, alpha=1.0),
    "text encoder as te1": pair(t(TEXT[0], "lora_te1_text_model_"), 32, 32, alpha=1.0),
    "text encoder without text_model": pair(t(TEXT[0], "lora_te_"), 32, 32, alpha=1.0),
    "DoRA on the output axis": pair(u(ATTN), 32, 32, alpha=1.0) | {f"{u(ATTN)}.dora_scale": magnitude(32, 1)},
    "DoRA on the input axis": pair(u(ATTN), 32, 32, alpha=1.0) | {f"{u(ATTN)}.dora_scale": magnitude(1, 32)},
    "DoRA of a convolution": pair(u(CONV), 64, 128, alpha=1.0, kernel=(3, 3))
    | {f"{u(CONV)}.dora_scale": magnitude(64, 1, 1, 1)},
    "DoRA of a convolution, input axis": pair(u(CONV), 64, 128, alpha=1.0, kernel=(3, 3))
    | {f"{u(CONV)}.dora_scale": magnitude(1, 128, 1, 1)},
    "DoRA of a 1x1 convolution 2-D": pair(u(PROJ), 64, 64, alpha=1.0) | {f"{u(PROJ)}.dora_scale": magnitude(64, 1)},
    "full difference with bias": {f"{u(PROJ)}.diff": random(64, 64, 1, 1, scale=0.3),
                                  f"{u(PROJ)}.diff_b": random(64, scale=0.3)},
    "norm": {f"{u(NORM)}.w_norm": random(64, scale=0.3), f"{u(NORM)}.b_norm": random(64, scale=0.3)},
}
GOOD = FILES["attention"] | FILES["text encoder"]


def write(path, tensors, dtype=None, metadata=None):
    safetensors.torch.save_file({k: v.to(dtype or v.dtype) for k, v in tensors.items()}, path, metadata)
    return path
