"""prompt -> context -> latents -> sampler -> decode -> picture, and nothing else.

Legend: B images (prompts x images_per_prompt), R rows of a network call (2B with guidance), C latent channels,
H, W pixels, h, w latents (pixels / VAE factor), L tokens, D context width.
"""

from __future__ import annotations

import inspect
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sd.adapters.merging import unmerge
from sd.adapters.quant import quantized_kinds
from sd.adapters.switch import active_multipliers, adapter_names, exclusive, use_adapters, use_rows
from sd.errors import SDError
from sd.model_loader import preload_models_from_standard_weights
from sd.models import Models, usable_device
from sd.pictures.image_io import load_image
from sd.pictures.sheets import contact_sheet
from sd.placement import Placement, placed_for
from sd.prompts.learned_words import vectors_hash
from sd.prompts.tokenizer import find_words, tokenize
from sd.sampling.denoiser import DENOISERS, CFGDenoiser
from sd.sampling.noise import Schedule, alphas_cumprod, cut
from sd.sampling.samplers import SAMPLERS, check_eta, run, sampler_schedule
from sd.vae import sample_posterior

MAX_IMAGES = 4096  # in one call


class GenerateError(SDError):
    """A request that cannot be met: the message names the argument, its value and what is allowed."""


class NotFiniteError(RuntimeError):
    """A picture of NaN: the message says whether weights or an overflow are to blame."""


def generate(prompt: str | Sequence[str], uncond_prompt: str | Sequence[str] | None = None, input_image=None,
             strength: float = 0.8, do_cfg: bool = True, cfg_scale: float = 7.5, sampler_name: str = "ddpm",
             n_inference_steps: int = 50, models: Models | None = None, seed: int | Sequence[int] | None = None,
             device=None, idle_device=None, tokenizer=None, *, width: int | None = None, height: int | None = None,
             images_per_prompt: int = 1, spacing: str | None = None, eta: float = 0.0, clip_skip: int = 1, mask=None,
             lora: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None, use_lora: bool = True,
             merged: bool | str = "auto", on_step: Callable[[int, int, Tensor], None] | None = None) -> np.ndarray:
    """Pictures for one prompt (uint8 [H, W, 3]) or for a list of prompts (uint8 [B, H, W, 3], prompt by prompt).

    `input_image` (path, PIL picture or array): start from it, with noise for the last `strength` of the steps; with
    `mask` (white is repainted) inpaint it. `seed`: image i has seed + i, or one seed each; its noise depends on nothing
    else, in the order posterior, start, steps. `clip_skip` 1 is the last layer of the text encoder, 2 the one before.
    `lora`: exactly these adapters, {"name": multiplier}, or one such dict for each image; None: what is active.
    `use_lora=False` is the bare base, whatever is loaded. `merged`: run with merged weights ("auto": in fp32 and with
    the same LoRA for all images); they stay for the next call, until `sd.lora.unmerge`. `on_step(i, n, x0)` sees each
    step's estimate. What was active before is restored.
    Raises GenerateError (a ValueError) for bad arguments before any network runs, NotFiniteError instead of a black picture.
    """
    prompts = _prompts(prompt, "prompt")
    _check(images_per_prompt, "images_per_prompt", Integral, 1, MAX_IMAGES)
    images = len(prompts) * int(images_per_prompt)
    _check(images, "the number of images", Integral, 1, MAX_IMAGES)
    models = preload_models_from_standard_weights(device=device) if models is None else models
    if not isinstance(models, Models):
        raise GenerateError(f"models is a {type(models).__name__}; pass what preload_models_with_lora or "
                            f"preload_models_from_standard_weights returns")
    config, device = models.config, models.device if device is None else usable_device(device)
    idle_device = None if idle_device is None else usable_device(idle_device)
    prompts = [p for p in prompts for _ in range(images_per_prompt)]
    unconds = _prompts("" if uncond_prompt is None else uncond_prompt, "uncond_prompt")
    if len(unconds) not in (1, images, images // images_per_prompt):
        raise GenerateError(f"{len(unconds)} uncond_prompts for {images // images_per_prompt} prompts; give one, or one each")
    unconds = [u for u in unconds for _ in range(images // len(unconds))]
    _check(cfg_scale, "cfg_scale", Real)
    _check(strength, "strength", Real, 0, 1)
    _check(clip_skip, "clip_skip", Integral, 1, config.clip.layers)
    _check(eta, "eta", Real, 0, 1)
    scale = cfg_scale if do_cfg else 1.0
    height, width = _size(height, "height", config), _size(width, "width", config)
    shape = config.vae.latent_channels, height // config.vae.factor, width // config.vae.factor
    noise = ImageNoise(_seeds(seed, images), shape)
    picture, mask = _input(input_image, mask, height, width, config)
    if not isinstance(sampler_name, str):
        raise GenerateError(f"sampler {sampler_name!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    try:
        steps = sampler_schedule(sampler_name, n_inference_steps, alphas_cumprod(config), spacing)
        steps = steps if picture is None else cut(steps, strength)
        check_eta(sampler_name, eta)
    except SDError as error:
        raise GenerateError(str(error)) from None

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(exclusive(models))
        _enter_adapters(stack, models, lora, use_lora, images)
        place = Placement(models, device, idle_device, _should_merge(models, merged))

        # Guidance asks for two rows an image: without a prompt first, then with it.
        rows = torch.arange(images).repeat(1 if scale == 1 else 2)
        stack.enter_context(use_rows(models, rows))
        texts = prompts if scale == 1 else unconds + prompts
        tokens = tokenize(tokenizer or models.tokenizer, texts, config.clip.max_tokens, models["clip"].words).to(device)
        context = place("clip")(tokens, clip_skip)  # [R, L, D]
        uncond, context = (None, context) if scale == 1 else context.chunk(2)

        known, extra = None, None
        if picture is not None:
            with use_rows(models, torch.arange(images)):
                known = _encode(place("encoder"), picture.expand(images, -1, -1, -1), noise(), config).to(device)
        start_noise = noise().to(device)
        if config.unet.in_channels == 9:
            with use_rows(models, torch.arange(images)):
                extra = _inpainting_channels(place, picture, mask, images, noise, config, height, width).to(device)

        unet = place("diffusion")
        network = DENOISERS[config.prediction](lambda x, t, context, rows: unet(x, t, context), steps,
                                               dtype=unet.conv_in.weight.dtype, extra=extra)
        denoise = CFGDenoiser(network, context.float(), None if uncond is None else uncond.float(), scale)
        x = start_noise * steps.start if known is None else known + start_noise * steps.start
        if mask is not None:
            small = F.interpolate(mask, size=x.shape[2:]).to(device)  # [1, 1, h, w], nearest
            denoise = _keep_outside(denoise, small, known, start_noise)
        x = _sample(denoise, x, steps, sampler_name, eta, lambda i: noise().to(device), on_step)
        if mask is not None:
            x = small * x + (1 - small) * known

        with use_rows(models, torch.arange(images)):
            pictures = _decode(place("decoder"), x, config)  # [B, C, H, W]
        place(None)
        if not torch.isfinite(pictures).all():
            raise NotFiniteError(_why_not_finite(models))
    array = to_uint8(pictures)
    return array[0] if isinstance(prompt, str) and images == 1 else array


def compare(prompts: str | Sequence[str], models: Models | None = None, variants: Sequence[Mapping[str, float]] = (), *,
            seed: int | None = 0, **arguments) -> np.ndarray:
    """A labelled contact sheet, uint8 [H, W, 3]: a row for each prompt, a column for each set of adapters, {} the base.

    All variants are made in one batch, each prompt with the same noise in every column. `variants` defaults to the base
    beside all loaded adapters, each alone at 1. `arguments` go to `generate`.
    """
    prompts = _prompts(prompts, "prompts")
    taken = sorted({"lora", "use_lora", "images_per_prompt"} & arguments.keys())
    if taken:
        raise GenerateError(f"compare() sets {taken[0]} itself: each of the variants is a dict of adapters, {{}} is the base")
    models = preload_models_from_standard_weights(device=arguments.get("device")) if models is None else models
    variants = list(variants) or [{}, *({name: 1.0} for name in adapter_names(models))]
    seed = secrets.randbits(32) if seed is None else seed
    _check(seed, "seed", Integral, 0)
    if not isinstance(arguments.get("uncond_prompt") or "", str):
        arguments["uncond_prompt"] = [u for u in arguments["uncond_prompt"] for _ in variants]
    cells = [(p, variant, seed + i) for i, p in enumerate(prompts) for variant in variants]
    pictures = generate([p for p, _, _ in cells], models=models, lora=[v for _, v, _ in cells],
                        seed=[s for _, _, s in cells], **arguments)
    rows = [list(pictures[i:i + len(variants)]) for i in range(0, len(cells), len(variants))]
    labels = [" + ".join(f"{name} {m:g}" for name, m in v.items()) or "base" for v in variants]
    return contact_sheet(rows, prompts, labels)


class ImageNoise:
    """N(0, 1) noise for a batch: one CPU generator an image, so that image i depends on its own seed and on nothing else."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape = shape

    def __call__(self) -> Tensor:
        """The next draw, [B, *shape] in fp32 on the CPU."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])


# ---- the arguments ---------------------------------------------------------------------------------------------------

def _prompts(prompt, what: str) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else [prompt]
    if not prompts:
        raise GenerateError(f"{what} is an empty list; at least one text is needed")
    for text in prompts:
        if not isinstance(text, str):
            raise GenerateError(f"{what} holds {text!r}, which is no text")
    return prompts


def _check(value, what: str, kind: type, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises GenerateError unless `value` is a finite number of that kind from low to high."""
    if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        allowed = "a finite number" if low == -math.inf else f"{low} to {high}"
        raise GenerateError(f"{what} is {value!r}; allowed: {'whole numbers from ' if kind is Integral else ''}{allowed}")


def _size(pixels: int | None, what: str, config) -> int:
    pixels, factor = config.image_size if pixels is None else pixels, config.vae.factor
    if not isinstance(pixels, int) or not factor <= pixels <= config.largest_size:
        raise GenerateError(f"{what} is {pixels!r}; allowed: whole numbers of pixels from {factor} to {config.largest_size}, "
                            f"8 times what this model is made for")
    if pixels % factor:
        low = pixels // factor * factor
        raise GenerateError(f"{what} is {pixels}, no multiple of {factor}; the nearest are {low} and {low + factor}")
    return pixels


def _seeds(seed: int | Sequence[int] | None, images: int) -> list[int]:
    seed = secrets.randbits(32) if seed is None else seed
    seeds = [int(seed) + i for i in range(images)] if isinstance(seed, Integral) else list(seed)
    if len(seeds) != images:
        raise GenerateError(f"{len(seeds)} seeds are given for {images} images")
    for s in seeds:
        if not isinstance(s, Integral) or not 0 <= s < 2**63:
            raise GenerateError(f"seed {s!r} is not allowed; a whole number from 0 to 2^63 - 1 is needed")
    return seeds


def _input(image, mask, height: int, width: int, config) -> tuple[Tensor | None, Tensor | None]:
    """(picture [1, C, H, W] in [-1, 1] or None, mask [1, 1, H, W] of 0 and 1 or None)."""
    if image is None and (mask is not None or config.unet.in_channels == 9):
        raise GenerateError("inpainting needs input_image= and mask=; input_image is missing")
    if image is not None and mask is None and config.unet.in_channels == 9:
        raise GenerateError("this is an inpainting model: it needs mask= beside input_image= (white is repainted)")
    if image is None:
        return None, None
    picture = load_image(image).convert("L" if config.vae.image_channels == 1 else "RGB")
    picture = np.asarray(picture.resize((width, height), Image.LANCZOS), dtype=np.float32)
    picture = torch.from_numpy(picture).view(height, width, -1).permute(2, 0, 1)[None] / 127.5 - 1
    if mask is not None:
        mask = np.asarray(load_image(mask).convert("L").resize((width, height), Image.LANCZOS), dtype=np.float32)
        mask = torch.from_numpy(mask / 255 >= 0.5).float()[None, None]
    return picture, mask


# ---- LoRA ------------------------------------------------------------------------------------------------------------

def _enter_adapters(stack: ExitStack, models: Models, lora, use_lora: bool, images: int) -> None:
    """The toggle: use_lora=False over lora=... over the present state."""
    if not use_lora:
        stack.enter_context(use_adapters(models, {}))
    elif isinstance(lora, Mapping):
        stack.enter_context(use_adapters(models, lora))
    elif lora is not None:
        if len(lora) != images:
            raise GenerateError(f"lora has {len(lora)} dicts for {images} images; give one dict, or one for each image")
        if all(dict(one) == dict(lora[0]) for one in lora):
            stack.enter_context(use_adapters(models, lora[0]))
        else:
            names = sorted({name for one in lora for name in one})
            table = {name: torch.tensor([float(one.get(name, 0.0)) for one in lora]) for name in names}
            stack.enter_context(use_adapters(models, table))
    for name, m in active_multipliers(models).items():
        if isinstance(m, tuple) and len(m) != images:
            raise GenerateError(f"the multipliers of {name!r} are for {len(m)} images, {images} are asked for")


def _should_merge(models: Models, merged: bool | str) -> bool:
    if merged not in (True, False, "auto"):
        raise GenerateError(f"merged is {merged!r}; allowed: 'auto', True, False")
    if merged is False:
        unmerge(models)
    if merged != "auto":
        return bool(merged)
    # In half precision the sum W + ΔW rounds away a good part of a usual ΔW; the adapters' own path keeps it.
    same_for_all = not any(isinstance(m, tuple) for m in active_multipliers(models).values())
    # Merged weights are whole ones: of a quantised base they would take what it saves.
    return same_for_all and models.dtype == torch.float32 and not quantized_kinds(models)


# ---- the steps -------------------------------------------------------------------------------------------------------

def _sample(denoise, x: Tensor, steps: Schedule, sampler_name: str, eta: float, noise, on_step) -> Tensor:
    """Run the sampler with a progress bar; returns latents in the UNet's scale."""
    with tqdm(total=len(steps.timesteps), desc=sampler_name, leave=False, disable=None) as bar:
        def told(i, n, x0):
            bar.update()
            if on_step is not None:
                on_step(i, n, x0)
        x = run(sampler_name, denoise, x, steps, noise=noise, on_step=told, eta=eta)
    return x * steps.end


def _keep_outside(denoise, mask: Tensor, known: Tensor, noise: Tensor):
    """Inpainting for any UNet: outside the mask the network sees, and the sampler gets, the known latents."""
    def masked(x: Tensor, sigma: float) -> Tensor:
        x0 = denoise(mask * x + (1 - mask) * (known + sigma * noise), sigma)
        return mask * x0 + (1 - mask) * known
    return masked


def _encode(encoder, picture: Tensor, noise: Tensor, config) -> Tensor:
    """Latents of pictures [B, C, H, W], sampled from the posterior with `noise`, in the UNet's scale and fp32."""
    mean, logvar = encoder(placed_for(encoder, picture))
    return sample_posterior(mean.float(), logvar.float(), noise.to(mean.device)) * config.vae.scale


def _decode(decoder, latents: Tensor, config) -> Tensor:
    return decoder(placed_for(decoder, latents / config.vae.scale)).float()


def _why_not_finite(models: Models) -> str:
    """Looked up only when a picture came out wrong: reading all weights takes longer than loading them."""
    bad = [f"{key}.{name}" for key, network in models.items() for name, p in network.named_parameters()
           if not torch.isfinite(p).all()]
    if bad:
        return f"the picture is not finite, since {len(bad)} tensors of the model hold NaN or infinity, first: {bad[0]}"
    return (f"the picture is not finite: a network overflowed in {str(models.dtype).removeprefix('torch.')}; "
            f"load it with dtype=torch.float32 or bfloat16, or lower cfg_scale and multipliers")


def _inpainting_channels(place: Placement, picture, mask, images: int, noise: ImageNoise, config, height, width) -> Tensor:
    """Mask and latents of the picture without the masked part, [B, 5, h, w], for UNets with 9 input channels."""
    hidden = picture * (mask < 0.5)
    latents = _encode(place("encoder"), hidden.expand(images, -1, -1, -1), noise(), config)
    small = F.interpolate(mask, size=latents.shape[2:]).to(latents)
    return torch.cat([small.expand(images, -1, -1, -1), latents], dim=1)


def to_uint8(pictures: Tensor) -> np.ndarray:
    """[B, 1 or 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], rounded to nearest."""
    pictures = (pictures / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def describe(models: Models, prompt: str, *, seed: int, **arguments) -> dict:
    """What makes a picture again: the arguments of `generate` with its defaults, the model, and the LoRAs truly applied.

    For `sd.image_io.save_image(picture, path, parameters)`, which writes it into the file.
    """
    _check(seed, "seed", Integral, 0)
    defaults = {k: p.default for k, p in inspect.signature(generate).parameters.items() if p.default is not p.empty}
    known = defaults | {k: v for k, v in arguments.items() if v is not None}
    if known["sampler_name"] not in SAMPLERS:
        raise GenerateError(f"sampler {known['sampler_name']!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    row = SAMPLERS[known["sampler_name"]]
    found = {"prompt": prompt, "uncond_prompt": known["uncond_prompt"] or "", "n_inference_steps": known["n_inference_steps"],
             "sampler_name": known["sampler_name"], "cfg_scale": float(known["cfg_scale"] if known["do_cfg"] else 1.0),
             "seed": int(seed), "width": known["width"] or models.config.image_size,
             "height": known["height"] or models.config.image_size, "model": models.config.name,
             "spacing": known["spacing"] or row.spacing, "clip_skip": known["clip_skip"]}
    if known["eta"]:
        found["eta"] = known["eta"]
    if known["input_image"] is not None:
        found["strength"] = known["strength"]
    if models.model_hash:
        found["model_hash"] = models.model_hash
    if embeddings := used_embeddings(models, prompt, found["uncond_prompt"]):
        found["embeddings"] = embeddings
    if not isinstance(known["lora"], Mapping | None):
        raise GenerateError("describe() is for one picture: lora is the dict of that picture")
    applied = known["lora"] if known["lora"] is not None else active_multipliers(models)
    applied = {name: float(m) for name, m in applied.items() if m} if known["use_lora"] else {}
    if applied:
        found["lora"] = applied
        reports = {name: models.lora_reports[name] for name in applied if name in models.lora_reports}
        found["lora_hashes"] = {name: report.hash for name, report in reports.items() if report.hash}
        parts = {"lora_blocks": {name: report.blocks for name, report in reports.items() if report.blocks},
                 "lora_skipped": {name: report.skipped for name, report in reports.items() if report.skipped}}
        found |= {key: value for key, value in parts.items() if value}
    return found


def used_embeddings(models: Models, *texts: str) -> dict[str, str]:
    """The learned words in these texts, and what tells each one's vectors from others (`sd.embeddings.vectors_hash`)."""
    learned = models["clip"].learned
    words = {word for text in texts for *_, word in find_words(text, learned.ids)}
    return {word: vectors_hash(learned.of(word)) for word in sorted(words)}
