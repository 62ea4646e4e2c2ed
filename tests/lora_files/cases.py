"""Random tensors of files, and what networks give with them."""

import torch


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))) * scale


def outputs(unet, clip) -> tuple[torch.Tensor, torch.Tensor]:
    """The text encoder's and the UNet's output, of our networks or of the peers'."""
    g = torch.Generator().manual_seed(0)
    tokens, latents = torch.randint(0, 49406, (2, 77), generator=g), torch.randn(2, 4, 8, 8, generator=g)
    with torch.no_grad():
        context = clip(tokens)
        context = context if isinstance(context, torch.Tensor) else context[0]
        out = unet(latents.to(context.dtype), torch.tensor([3, 700]), context)
    return context, out if isinstance(out, torch.Tensor) else out.sample
