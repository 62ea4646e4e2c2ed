"""prompt -> context -> latents -> sampler -> decode -> picture, and nothing else.

Legend: B images (prompts x images_per_prompt), R rows of a network call (2B with guidance), C latent channels,
H, W pixels, h, w latents (pixels / VAE factor), L tokens, D context width.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd.adapters.switch import active_multipliers, adapter_names, exclusive, use_adapters, use_rows
from sd.config import ModelConfig
from sd.cpu import memory_returned
from sd.errors import NotFiniteError
from sd.models import Models, usable_device
from sd.pictures.sheets import contact_sheet
from sd.placement import Networks, placed_for, sent, should_merge
from sd.prompts.tokenizer import tokenize
from sd.request import GenerateError, Request, check_number, describe, texts
from sd.sampling.denoiser import DENOISERS, CFGDenoiser
from sd.sampling.noise import Schedule
from sd.sampling.samplers import run
from sd.vae import sample_posterior

if TYPE_CHECKING:
    from sd.request import Fitted

__all__ = ["GenerateError", "NotFiniteError", "compare", "describe", "draw", "generate", "to_uint8"]


def generate(prompt: str | Sequence[str], uncond_prompt: str | Sequence[str] | None = None, input_image=None,
             strength: float = 0.8, do_cfg: bool = True, cfg_scale: float = 7.5, sampler_name: str = "ddpm",
             n_inference_steps: int = 50, models: Models | None = None, seed: int | Sequence[int] | None = None,
             device=None, idle_device=None, tokenizer=None, *, width: int | None = None, height: int | None = None,
             images_per_prompt: int = 1, spacing: str | None = None, eta: float = 0.0, clip_skip: int = 1, mask=None,
             lora: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None, use_lora: bool = True,
             merged: bool | str = "auto", on_step: Callable[[int, int, Tensor], None] | None = None) -> np.ndarray:
    """Make pictures for one prompt (uint8 [H, W, 3]) or for a list of prompts (uint8 [B, H, W, 3], prompt by prompt).

    `input_image` (path, PIL picture or array): start from it, with noise for the last `strength` of the steps; with
    `mask` (white is repainted), inpaint it. `seed`: image i uses seed + i, or a list has one seed per image; an image's
    noise depends on its seed alone, drawn in the order posterior, start, steps. `clip_skip` 1 is the last layer of the text
    encoder, 2 the one before it. `lora`: exactly these adapters, {"name": multiplier}, or one such dict per image; None:
    the active ones. `use_lora=False`: the bare base. `merged`: run with merged weights ("auto": in fp32, if all images have
    the same LoRA); they are kept for the next call, until `sd.lora.unmerge`. `on_step(i, n, x0)` gets each step's estimate.
    `device`: where the networks run; each is moved there for its part and back afterwards, or to `idle_device`. The
    adapters active before are restored.
    Raises GenerateError (a ValueError) for bad arguments before any network runs, NotFiniteError instead of a black picture.
    """
    request = Request(prompt, uncond_prompt=uncond_prompt, input_image=input_image, strength=strength, do_cfg=do_cfg,
                      cfg_scale=cfg_scale, sampler_name=sampler_name, n_inference_steps=n_inference_steps, seed=seed,
                      width=width, height=height, images_per_prompt=images_per_prompt, spacing=spacing, eta=eta,
                      clip_skip=clip_skip, mask=mask, lora=lora, use_lora=use_lora, merged=merged)
    pictures = draw(request, _models(models, device), device=device, idle_device=idle_device, tokenizer=tokenizer,
                    on_step=on_step)
    return pictures[0] if isinstance(prompt, str) and len(pictures) == 1 else pictures


def draw(request: Request, models: Models, *, device=None, idle_device=None, tokenizer=None,
         on_step: Callable[[int, int, Tensor], None] | None = None) -> np.ndarray:
    """Make the pictures of a request, uint8 [B, H, W, 3]; arguments and errors are those of `generate`."""
    fitted = request.fit(models.config)  # every check, before any network runs
    device = models.device if device is None else usable_device(device)
    idle_device = None if idle_device is None else usable_device(idle_device)
    with torch.no_grad(), exclusive(models), adapters_of(models, fitted), memory_returned():
        networks = Networks(models, device, idle_device, should_merge(models, fitted.merged))
        noise = image_noise(fitted, models.config)
        context = encode(networks, fitted, tokenizer)
        start = first_latents(networks, fitted, noise)
        with use_rows(models, rows_of(fitted)), networks.use("diffusion") as unet:
            denoise = guided(unet, context, start, fitted, models.config)
            latents = sample(denoise, start.x, fitted, models.config, noise, on_step)
        pictures = decode(networks, start.keep_outside(latents))
    return to_uint8(pictures)


def compare(prompts: str | Sequence[str], models: Models | None = None, variants: Sequence[Mapping[str, float]] = (), *,
            seed: int | None = 0, **arguments) -> np.ndarray:
    """Draw a labelled contact sheet, uint8 [H, W, 3]: a row per prompt, a column per set of adapters ({}: the base).

    All pictures are made in one batch, with the same noise for a prompt in every column. `variants` defaults to the base
    and each loaded adapter alone at 1. `arguments` go to `generate`.
    """
    prompts = texts(prompts, "prompts")
    taken = sorted({"lora", "use_lora", "images_per_prompt"} & arguments.keys())
    if taken:
        raise GenerateError(f"compare() sets {taken[0]} itself: each variant is a dict of adapters, {{}} for the base")
    models = _models(models, arguments.get("device"))
    variants = list(variants) or [{}, *({name: 1.0} for name in adapter_names(models))]
    seed = secrets.randbits(32) if seed is None else seed
    check_number(seed, "seed", Integral, 0)
    if not isinstance(arguments.get("uncond_prompt") or "", str):
        arguments["uncond_prompt"] = [u for u in arguments["uncond_prompt"] for _ in variants]
    cells = [(p, variant, seed + i) for i, p in enumerate(prompts) for variant in variants]
    pictures = generate([p for p, _, _ in cells], models=models, lora=[v for _, v, _ in cells],
                        seed=[s for _, _, s in cells], **arguments)
    rows = [list(pictures[i:i + len(variants)]) for i in range(0, len(cells), len(variants))]
    labels = [" + ".join(f"{name} {m:g}" for name, m in v.items()) or "base" for v in variants]
    return contact_sheet(rows, prompts, labels)


# ---- parts -----------------------------------------------------------------------------------------------------------

def _models(models: Models | None, device) -> Models:
    """The given models, or by default the one that ships."""
    if models is None:
        from sd.model_loader import preload_models_from_standard_weights
        return preload_models_from_standard_weights(device=device)
    if not isinstance(models, Models):
        raise GenerateError(f"models is a {type(models).__name__}; pass what preload_models_with_lora or "
                            f"preload_models_from_standard_weights returns")
    return models


@contextmanager
def adapters_of(models: Models, request: Request) -> Iterator[None]:
    """Activate the request's adapters inside the block: those of `lora`, none, or the ones already active."""
    with use_adapters(models, chosen) if (chosen := _chosen(request)) is not None else nullcontext():
        for name, m in active_multipliers(models).items():
            if isinstance(m, tuple) and len(m) != len(request.prompt):
                raise GenerateError(f"the multipliers of {name!r} are for {len(m)} images, not {len(request.prompt)}")
        yield


def _chosen(request: Request) -> Mapping[str, float | Tensor] | None:
    """The multipliers for `use_adapters`; None: keep the active ones."""
    lora = request.lora if request.use_lora else {}
    if lora is None or isinstance(lora, Mapping):
        return lora
    if all(dict(one) == dict(lora[0]) for one in lora):
        return lora[0]
    names = sorted({name for one in lora for name in one})
    return {name: torch.tensor([float(one.get(name, 0.0)) for one in lora]) for name in names}


def rows_of(request: Fitted) -> Tensor:
    """The image of each row of a network call, [R]: with guidance each image has two rows, all unconditional ones first."""
    return torch.arange(len(request.prompt)).repeat(1 if request.cfg_scale == 1 else 2)


def image_noise(request: Fitted, config: ModelConfig) -> Iterator[Tensor]:
    """Draws of N(0, 1), [B, C, h, w] in fp32 on the CPU; image i's depend on its own seed only."""
    shape = config.vae.latent_channels, request.height // config.vae.factor, request.width // config.vae.factor
    generators = [torch.Generator().manual_seed(int(seed)) for seed in request.seed]
    while True:
        yield torch.stack([torch.randn(shape, generator=g) for g in generators])


def encode(networks: Networks, request: Fitted, tokenizer=None) -> Tensor:
    """The context for each row, [R, L, D]. Rows with the same text and the same adapters are encoded once."""
    models, images = networks.models, rows_of(request)
    texts = request.prompt if request.cfg_scale == 1 else request.uncond_prompt + request.prompt
    per_image = [m for m in active_multipliers(models["clip"]).values() if isinstance(m, tuple)]
    kinds = [(text, *(m[i] for m in per_image)) for text, i in zip(texts, images.tolist())]
    first: dict[tuple, int] = {}  # kind -> the first row of it
    for row, kind in enumerate(kinds):
        first.setdefault(kind, row)
    rows, place = list(first.values()), {kind: i for i, kind in enumerate(first)}
    tokens = tokenize(tokenizer or models.tokenizer, [texts[row] for row in rows], models.config.clip.max_tokens,
                      models["clip"].words)
    with use_rows(models, images[rows]), networks.use("clip") as clip:
        encoded = clip(tokens.to(networks.device), request.clip_skip)
    return encoded[[place[kind] for kind in kinds]]


@dataclass(frozen=True)
class Start:
    """Where sampling starts: x [B, C, h, w] in VE scale and the noise in it; the rest is for img2img and inpainting."""

    x: Tensor
    noise: Tensor
    known: Tensor | None = None  # latents of the picture, [B, C, h, w]
    mask: Tensor | None = None  # 1 where it is repainted, [1, 1, h, w]
    extra: Tensor | None = None  # for UNets with 9 input channels: mask, and latents of the masked picture, [B, 5, h, w]

    def keep_outside(self, x: Tensor) -> Tensor:
        """x inside the mask, the known latents outside."""
        return x if self.mask is None or self.known is None else self.mask * x + (1 - self.mask) * self.known


def first_latents(networks: Networks, request: Fitted, noise: Iterator[Tensor]) -> Start:
    """Noise, or noised latents of the picture. Draws noise for posterior, start, and inpainting channels, in this order."""
    models, device = networks.models, networks.device
    config, sigma = models.config, request.schedule(models.config).start
    if request.input_image is None:
        start = next(noise).to(device)
        return Start(start * sigma, start)
    picture, images = _pixels(request.input_image) / 127.5 - 1, len(request.prompt)
    mask = None if request.mask is None else (_pixels(request.mask) / 255 >= 0.5).float()
    with use_rows(models, torch.arange(images)), networks.use("encoder") as encoder:
        known = _to_latents(encoder, picture.expand(images, -1, -1, -1), next(noise), config)
        start = next(noise).to(device)
        extra: Tensor | None = None
        if config.unet.in_channels == 9 and mask is not None:
            hidden = picture * (mask < 0.5)
            latents = _to_latents(encoder, hidden.expand(images, -1, -1, -1), next(noise), config)
            small = F.interpolate(mask, size=latents.shape[2:]).to(latents)
            extra = torch.cat([small.expand(images, -1, -1, -1), latents], dim=1).to(device)
    known = known.to(device)
    outline = None if mask is None else F.interpolate(mask, size=known.shape[2:]).to(device)  # nearest
    return Start(known + start * sigma, start, known, outline, extra)


def _pixels(picture: Image.Image) -> Tensor:
    """[1, C, H, W], 0 to 255, in fp32."""
    array = np.asarray(picture, dtype=np.float32)
    return torch.from_numpy(array).view(picture.height, picture.width, -1).permute(2, 0, 1)[None]


def _to_latents(encoder: nn.Module, picture: Tensor, noise: Tensor, config: ModelConfig) -> Tensor:
    """Latents of pictures [B, C, H, W], sampled from the posterior with `noise`, in fp32 and the UNet's scale."""
    mean, logvar = encoder(placed_for(encoder, picture))
    return sample_posterior(mean.float(), logvar.float(), noise.to(mean.device)) * config.vae.scale


def guided(unet: Any, context: Tensor, start: Start, request: Fitted, config: ModelConfig) -> Callable[[Tensor, float], Tensor]:
    """denoise(x, sigma) -> x0 by the UNet, with guidance, and with the known latents outside the mask."""
    network = DENOISERS[config.prediction](lambda x, t, context, rows: unet(x, t, context), request.schedule(config),
                                           dtype=unet.conv_in.weight.dtype, extra=start.extra)
    uncond, context = (None, context) if request.cfg_scale == 1 else context.float().chunk(2)
    denoise = CFGDenoiser(network, context.float(), uncond, request.cfg_scale)
    if start.mask is None:
        return denoise
    return lambda x, sigma: start.keep_outside(denoise(_shown(start, x, sigma), sigma))


def _shown(start: Start, x: Tensor, sigma: float) -> Tensor:
    """Inpainting with any UNet: outside the mask the network sees the known latents at this noise level."""
    assert start.mask is not None and start.known is not None
    return start.mask * x + (1 - start.mask) * (start.known + sigma * start.noise)


def sample(denoise: Callable[[Tensor, float], Tensor], x: Tensor, request: Request, config: ModelConfig,
         noise: Iterator[Tensor], on_step: Callable[[int, int, Tensor], None] | None = None) -> Tensor:
    """Run the sampler from x with a progress bar; returns latents in the UNet's scale."""
    steps: Schedule = request.schedule(config)
    with tqdm(total=len(steps.timesteps), desc=request.sampler_name, leave=False, disable=None) as bar:
        def done(i, n, x0):
            bar.update()
            if on_step is not None:
                on_step(i, n, x0)
        x = run(request.sampler_name, denoise, x, steps, noise=lambda i: sent(next(noise), x.device), on_step=done,
                eta=request.eta)
    return x * steps.end


def decode(networks: Networks, latents: Tensor) -> Tensor:
    """Decode latents to pictures [B, 1 or 3, H, W] in [-1, 1], fp32. Raises NotFiniteError."""
    models = networks.models
    with use_rows(models, torch.arange(len(latents))), networks.use("decoder") as decoder:
        pictures = decoder(placed_for(decoder, latents / models.config.vae.scale)).float()
    if not torch.isfinite(pictures).all():
        raise NotFiniteError(_why_not_finite(models))
    return pictures


def _why_not_finite(models: Models) -> str:
    """The message for NotFiniteError; reads all weights, so it is called only after a failure."""
    bad = [f"{key}.{name}" for key, network in models.items() for name, p in network.named_parameters()
           if not torch.isfinite(p).all()]
    if bad:
        return f"the picture is not finite: {len(bad)} tensors of the model hold NaN or infinity, first: {bad[0]}"
    return (f"the picture is not finite: a network overflowed in {models.dtype_name}; "
            f"load it with dtype=torch.float32 or bfloat16, or lower cfg_scale and multipliers")


def to_uint8(pictures: Tensor) -> np.ndarray:
    """Convert [B, 1 or 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], rounding to nearest."""
    pictures = (pictures / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
