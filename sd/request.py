"""Request: all settings of a picture, checked before any network runs; and the parameters recorded in picture files.

Its fields, the arguments of generate() and the keys in picture files share their names. Only the command line has shorter
ones for some: FLAGS in sd/commands/args.py, where flags are described from the fields. That needs neither torch nor Pillow,
so here the functions that need them import them.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, cast

from sd.errors import SDError
from sd.sampling.samplers import SAMPLERS, Sampler, check_eta, sampler_schedule

if TYPE_CHECKING:
    from PIL import Image

    from sd.config import ModelConfig
    from sd.models import Models
    from sd.sampling.noise import Schedule

MAX_IMAGES = 4096  # in one call
# Parameters that every picture file records, in this order, with their types; and those that only newer versions write.
SAVED: dict[str, type] = {"prompt": str, "uncond_prompt": str, "n_inference_steps": int, "sampler_name": str,
                          "cfg_scale": float, "seed": int, "width": int, "height": int}
SAVED_LATER = ("spacing", "clip_skip", "eta")


class GenerateError(SDError):
    """A request that cannot be met; the message names the argument, its value and what is allowed."""


def setting(default, help: str) -> Any:
    """A field with its text for --help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Request:
    """The settings of one call of generate(), documented there. Raises GenerateError for a value that no model accepts."""

    prompt: str | Sequence[str]
    uncond_prompt: str | Sequence[str] | None = setting(None, "What the picture should not show.")
    n_inference_steps: int = setting(50, "Sampling steps.")
    sampler_name: str = setting("ddpm", f"{', '.join(SAMPLERS)}.")
    spacing: str | None = setting(None, f"Noise schedule: {', '.join(Sampler.spacings)}; none: the sampler's own.")
    cfg_scale: float = setting(7.5, "Guidance scale; 1 turns guidance off.")
    width: int | None = setting(None, "Width in pixels; none: the model's native size.")
    height: int | None = setting(None, "Height in pixels; none: the model's native size.")
    clip_skip: int = setting(1, "Use the text encoder's last layer (1), the one before it (2), and so on.")
    seed: int | Sequence[int] | None = setting(None, "Picture i uses seed + i; none: a random seed, which is printed.")
    images_per_prompt: int = setting(1, "Pictures per prompt.")
    input_image: object = setting(None, "Picture to start from (img2img).")
    mask: object = setting(None, "Picture that is white where the input is to be repainted (inpainting).")
    strength: float = setting(0.8, "How much the input may change, from 0 (not at all) to 1 (completely).")
    do_cfg: bool = True
    eta: float = 0.0
    lora: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None
    use_lora: bool = True
    merged: bool | str = "auto"

    def __post_init__(self):
        prompts = texts(self.prompt, "prompt")
        check_number(self.images_per_prompt, "images_per_prompt", Integral, 1, MAX_IMAGES)
        images = len(prompts) * int(self.images_per_prompt)
        check_number(images, "the number of images", Integral, 1, MAX_IMAGES)
        unconds = texts("" if self.uncond_prompt is None else self.uncond_prompt, "uncond_prompt")
        if len(unconds) not in (1, images, len(prompts)):
            raise GenerateError(f"{len(unconds)} uncond_prompts for {len(prompts)} prompts; give one, or one each")
        check_number(self.n_inference_steps, "n_inference_steps", Integral, 1)  # the most depends on model and spacing
        check_number(self.cfg_scale, "cfg_scale", Real)
        check_number(self.strength, "strength", Real, 0, 1)
        check_number(self.eta, "eta", Real, 0, 1)
        if self.seed is not None:
            _seeds(self.seed, images)
        if self.mask is not None and self.input_image is None:
            raise GenerateError("inpainting needs input_image= and mask=; input_image is missing")
        if not isinstance(self.sampler_name, str) or self.sampler_name not in SAMPLERS:
            raise GenerateError(f"sampler {self.sampler_name!r} is unknown; allowed: {', '.join(SAMPLERS)}")
        try:
            check_eta(self.sampler_name, self.eta)
        except SDError as error:
            raise GenerateError(str(error)) from None
        if self.merged not in (True, False, "auto"):
            raise GenerateError(f"merged is {self.merged!r}; allowed: 'auto', True, False")
        if self.use_lora:
            _check_lora(self.lora, images)

    def fit(self, config: ModelConfig) -> Fitted:
        """The request resolved for a model of this config.

        In the result prompt, uncond_prompt and seed are lists with one item per image, images_per_prompt is 1, size and
        spacing are filled in, cfg_scale is 1 without guidance, and input_image and mask are PIL pictures of that size.
        Raises GenerateError, or ImageError for a picture that cannot be read.
        """
        check_number(self.clip_skip, "clip_skip", Integral, 1, config.clip.layers)
        height, width = _size(self.height, "height", config), _size(self.width, "width", config)
        if config.unet.in_channels == 9 and self.input_image is None:
            raise GenerateError("inpainting needs input_image= and mask=; input_image is missing")
        if config.unet.in_channels == 9 and self.mask is None:
            raise GenerateError("this is an inpainting model: it needs mask= as well as input_image= (white is repainted)")
        prompts = [p for p in texts(self.prompt, "prompt") for _ in range(self.images_per_prompt)]
        unconds = texts("" if self.uncond_prompt is None else self.uncond_prompt, "uncond_prompt")
        mode = "L" if config.vae.image_channels == 1 else "RGB"
        fitted = replace(
            self, prompt=prompts, uncond_prompt=[u for u in unconds for _ in range(len(prompts) // len(unconds))],
            seed=_seeds(secrets.randbits(32) if self.seed is None else self.seed, len(prompts)), images_per_prompt=1,
            height=height, width=width, cfg_scale=self.cfg_scale if self.do_cfg else 1.0,
            spacing=SAMPLERS[self.sampler_name].spacing if self.spacing is None else self.spacing,
            input_image=_opened(self.input_image, mode, (width, height)), mask=_opened(self.mask, "L", (width, height)))
        fitted.schedule(config)  # checks steps, spacing and strength
        return cast("Fitted", fitted)

    def singles(self) -> list[Request]:
        """One request per image; uncond_prompt must be one text and seed a number."""
        prompts = [p for p in texts(self.prompt, "prompt") for _ in range(self.images_per_prompt)]
        return [replace(self, prompt=p, seed=s, images_per_prompt=1) for p, s in zip(prompts, _seeds(self.seed, len(prompts)))]

    def schedule(self, config: ModelConfig) -> Schedule:
        """Noise levels of the steps: all, or with an input_image the last `strength` of them. Raises GenerateError."""
        from sd.sampling.noise import alphas_cumprod, cut
        try:
            steps = sampler_schedule(self.sampler_name, self.n_inference_steps, alphas_cumprod(config), self.spacing)
            return steps if self.input_image is None else cut(steps, self.strength)
        except SDError as error:
            raise GenerateError(str(error)) from None


if TYPE_CHECKING:
    class Fitted(Request):
        """A Request that `fit` returned."""

        prompt: list[str]
        uncond_prompt: list[str]
        seed: list[int]
        width: int
        height: int
        spacing: str
        input_image: Image.Image | None
        mask: Image.Image | None


# ---- checks ----------------------------------------------------------------------------------------------------------

def texts(prompt: Any, what: str) -> list[str]:
    """One or several texts as a list. Raises GenerateError for anything else."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else [prompt]
    if not prompts:
        raise GenerateError(f"{what} is an empty list; at least one text is needed")
    for text in prompts:
        if not isinstance(text, str):
            raise GenerateError(f"{what} holds {text!r}, which is not a string")
    return prompts


def check_number(value: Any, what: str, kind: type[Any], low: float = -math.inf, high: float = math.inf) -> None:
    """Raises GenerateError unless `value` is a finite number of type `kind` from low to high."""
    if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        allowed = "a finite number" if low == -math.inf else f"{low}" if high == math.inf else f"{low} to {high}"
        raise GenerateError(f"{what} is {value!r}; allowed: {'whole numbers from ' if kind is Integral else ''}{allowed}")


def _seeds(seed: Any, images: int) -> list[int]:
    """One seed per image."""
    seeds: list[Any]
    try:
        seeds = [int(seed) + i for i in range(images)] if isinstance(seed, Integral) else list(seed)
    except TypeError:
        seeds = [seed] * images
    if len(seeds) != images:
        raise GenerateError(f"{len(seeds)} seeds are given for {images} images; give one seed, or one for each image")
    for s in seeds:
        if not isinstance(s, Integral) or not 0 <= int(s) < 2**63:
            raise GenerateError(f"seed {s!r} is not allowed; a whole number from 0 to 2^63 - 1 is needed")
    return seeds


def _check_lora(lora, images: int) -> None:
    if lora is None or isinstance(lora, Mapping):
        return
    if not isinstance(lora, Sequence) or not all(isinstance(one, Mapping) for one in lora):
        raise GenerateError(f"lora is {lora!r}; allowed: a dict of multipliers, or one for each image")
    if len(lora) != images:
        raise GenerateError(f"lora has {len(lora)} dicts for {images} images; give one dict, or one for each image")


def _size(pixels: int | None, what: str, config) -> int:
    pixels, factor = config.image_size if pixels is None else pixels, config.vae.factor
    if not isinstance(pixels, int) or not factor <= pixels <= config.largest_size:
        raise GenerateError(f"{what} is {pixels!r}; allowed: whole numbers of pixels from {factor} to {config.largest_size}, "
                            f"8 times this model's native size")
    if pixels % factor:
        low = pixels // factor * factor
        raise GenerateError(f"{what} is {pixels}, no multiple of {factor}; the nearest are {low} and {low + factor}")
    return pixels


def _opened(image, mode: str, size: tuple[int, int]) -> Image.Image | None:
    if image is None:
        return None
    from PIL import Image

    from sd.pictures.image_io import load_image
    return load_image(image).convert(mode).resize(size, Image.Resampling.LANCZOS)


# ---- the parameters in a picture file --------------------------------------------------------------------------------

def describe(models: Models, prompt: str, *, seed: int, **arguments) -> dict[str, Any]:
    """Everything needed to make a picture again: the arguments of `generate`, the model, and the LoRAs actually applied.

    To be written into the file by `sd.pictures.save_image(picture, path, parameters)`. Arguments of `generate` that only
    affect how it runs, such as `device`, are left out.
    """
    check_number(seed, "seed", Integral, 0)
    known = {f.name for f in fields(Request)}
    given = {name: value for name, value in arguments.items() if name in known and value is not None}
    return parameters_of(Request(prompt, seed=seed, **given), models)


def parameters_of(request: Request, models: Models) -> dict[str, Any]:
    """What `describe` returns, for a request for one picture. Raises GenerateError for several."""
    from sd.adapters.switch import active_multipliers
    applied: Any = active_multipliers(models) if request.lora is None else request.lora
    if not isinstance(applied, Mapping) or not isinstance(request.prompt, str):
        raise GenerateError("describe() is for one picture: lora must be that picture's dict")
    filled = replace(request, uncond_prompt=request.uncond_prompt or "", seed=int(cast(int, request.seed)),
                     cfg_scale=float(request.cfg_scale if request.do_cfg else 1.0),
                     width=request.width or models.config.image_size, height=request.height or models.config.image_size)
    found = {name: getattr(filled, name) for name in SAVED} | {
        "model": models.config.name, "spacing": request.spacing or SAMPLERS[request.sampler_name].spacing,
        "clip_skip": request.clip_skip, "dtype": models.dtype_name}
    if request.eta:
        found["eta"] = request.eta
    if request.input_image is not None:
        found["strength"] = request.strength
    if models.model_hash:
        found["model_hash"] = models.model_hash
    if embeddings := used_embeddings(models, found["prompt"], found["uncond_prompt"]):
        found["embeddings"] = embeddings
    applied = {name: float(m) for name, m in applied.items() if m} if request.use_lora else {}
    if applied:
        found["lora"] = applied
        reports = {name: models.lora_reports[name] for name in applied if name in models.lora_reports}
        found["lora_hashes"] = {name: report.hash for name, report in reports.items() if report.hash}
        parts = {"lora_blocks": {name: report.blocks for name, report in reports.items() if report.blocks},
                 "lora_skipped": {name: report.skipped for name, report in reports.items() if report.skipped}}
        found |= {key: value for key, value in parts.items() if value}
    return found


def used_embeddings(models: Models, *texts: str) -> dict[str, str]:
    """The learned words in these texts -> hashes of their vectors (`vectors_hash`)."""
    from sd.prompts.learned_words import vectors_hash
    from sd.prompts.tokenizer import find_words
    learned = models["clip"].learned
    words = {word for text in texts for *_, word in find_words(text, learned.ids)}
    return {word: vectors_hash(learned.of(word)) for word in sorted(words)}


def again(about: Mapping[str, Any], path, models: Models, **others) -> Request:
    """The request that made the picture file `path`, from the parameters in it (`about`); `others`: further settings.

    Raises GenerateError if the parameters are incomplete, or if model, LoRAs or learned words differ from the picture's.
    """
    for key, kind in SAVED.items():
        if type(about.get(key)) is not kind:
            raise GenerateError(f"{path}: cannot be made again: it records no {key} of type {kind.__name__}")
    for key in ("lora", "lora_hashes", "lora_blocks", "lora_skipped"):
        if not isinstance(about.get(key) or {}, Mapping):
            raise GenerateError(f"{path}: cannot be made again: its record of LoRAs is damaged")
    if "strength" in about and others.get("input_image") is None:
        raise GenerateError(f"{path}: made from another picture, which the file does not hold; name it with --input")
    if about.get("model_hash", models.model_hash) != models.model_hash:
        raise GenerateError(f"{path}: made with model {about.get('model')!r} of hash {about['model_hash']}; "
                            f"this one has {models.model_hash}; name it with --model")
    _check_same_loras(about, path, models)
    then, now = about.get("embeddings") or {}, used_embeddings(models, about["prompt"], about["uncond_prompt"])
    if then != now:
        raise GenerateError(f"{path}: made with the embeddings {then or 'none'} (word: hash) in its prompts; this one has "
                            f"{now or 'none'}; name them with --embedding")
    keys = (*SAVED, *SAVED_LATER, "strength")
    return Request(**others | {key: about[key] for key in keys if key in about}, lora=about.get("lora") or {})


def made_in(about: Mapping[str, Any], path) -> Any:
    """The name of the dtype that the picture file `path` records in its parameters (`about`); None for older files."""
    dtype = about.get("dtype")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise GenerateError(f"{path}: cannot be made again: its dtype is {dtype!r:.40}; allowed: float32, bfloat16, float16")
    return dtype


def _check_same_loras(about: Mapping[str, Any], path, models: Models) -> None:
    used, reports = about.get("lora") or {}, models.lora_reports
    missing = sorted(set(used) - set(reports))
    if missing:
        raise GenerateError(f"{path}: made with the LoRA {missing[0]!r}; load it with --lora")
    for name, digest in (about.get("lora_hashes") or {}).items():
        if name in reports and reports[name].hash != digest:
            raise GenerateError(f"{path}: made with another LoRA {name!r}, of hash {digest}; this one has {reports[name].hash}")
    for key, what in (("lora_blocks", "blocks"), ("lora_skipped", "skipped")):
        for name in used:
            then, now = (about.get(key) or {}).get(name) or None, getattr(reports[name], what) or None
            if then != now:
                raise GenerateError(f"{path}: made with {what} {then} of the LoRA {name!r}; this one has {now}; "
                                    f"say so with --lora PATH:MULTIPLIER:BLOCKS and --skip")
