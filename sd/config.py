"""Model configurations: widths, depths, heads, schedule. Networks are built from these alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from sd.errors import SDError


class ConfigError(SDError):
    """An invalid configuration; the message names the field, its value and what is allowed."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP text encoder; the defaults are ViT-L/14, the text encoder of SD 1.x."""

    vocab_size: int = 49408
    max_tokens: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"

    def __post_init__(self):
        _require(self.width % self.heads == 0, f"CLIP width {self.width} is not a multiple of its {self.heads} heads")
        _require(self.activation in ("quick_gelu", "gelu"),
                 f"CLIP activation {self.activation!r} is unknown; allowed: 'quick_gelu', 'gelu'")


@dataclass(frozen=True)
class VAEConfig:
    """KL autoencoder; the defaults are KL-f8 of SD 1.x. One width per resolution, so the factor is 2^(len(widths) - 1).

    Without widths there is no autoencoder, and the UNet works on pixels: see `pixels`.
    """

    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scale: float = 0.18215  # latents of the UNet are scale * latents of the VAE

    def __post_init__(self):
        _require(self.image_channels in (1, 3), f"image_channels is {self.image_channels}; allowed: 1 (grey), 3 (RGB)")
        _require(bool(self.widths) or self.latent_channels == self.image_channels,
                 f"without widths, latents are the {self.image_channels} channels of images, not {self.latent_channels}")
        _check_groups("VAE", self.widths, self.norm_groups)

    @classmethod
    def pixels(cls, channels: int) -> VAEConfig:
        """No autoencoder: diffusion on the pixels themselves."""
        return cls(image_channels=channels, latent_channels=channels, widths=(), scale=1.0)

    @property
    def factor(self) -> int:
        """Pixels per latent, on each side."""
        return 2 ** max(len(self.widths) - 1, 0)


@dataclass(frozen=True)
class UNetConfig:
    """Denoising UNet; the defaults are SD 1.x. `attention[i]`: whether down block i, and its mirror, have transformers."""

    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    heads: int = 8
    context_width: int = 768
    norm_groups: int = 32

    def __post_init__(self):
        _require(len(self.widths) == len(self.attention),
                 f"UNet has {len(self.widths)} widths but {len(self.attention)} attention flags")
        _check_groups("UNet", self.widths, self.norm_groups)
        for width in self.widths:
            _require(width % self.heads == 0, f"UNet width {width} is not a multiple of its {self.heads} heads")


def _check_groups(name: str, widths: tuple[int, ...], groups: int) -> None:
    _require(groups > 0, f"{name} has {groups} norm groups; at least 1 is needed")
    for width in widths:
        _require(width > 0 and width % groups == 0, f"{name} width {width} is not a multiple of its {groups} norm groups")


@dataclass(frozen=True)
class ModelConfig:
    """A whole Stable Diffusion model. `prediction`: what the UNet returns, "eps" or "v".

    `beta_schedule` "cosine" is continuous (sampling/noise.py: cosine_angle) and ignores the betas. `zero_terminal_snr`: the
    betas are rescaled so that the last timestep is pure noise (Lin et al. 2024).
    """

    name: str = "sd15"
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    prediction: str = "eps"
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    image_size: int = 512  # pixels, the default of generate()

    def __post_init__(self):
        _require(self.prediction in ("eps", "v"), f"prediction {self.prediction!r} is unknown; allowed: 'eps', 'v'")
        _require(self.beta_schedule in ("linear", "scaled_linear", "cosine"),
                 f"beta_schedule {self.beta_schedule!r} is unknown; allowed: 'linear', 'scaled_linear', 'cosine'")
        _require(not self.zero_terminal_snr or (self.prediction == "v" and self.beta_schedule != "cosine"),
                 "zero_terminal_snr needs a model that predicts v (eps at an SNR of 0 is its input) and a schedule of betas")
        _require(self.clip.width == self.unet.context_width,
                 f"the UNet expects a context of width {self.unet.context_width}, the text encoder gives {self.clip.width}")
        _require(self.vae.latent_channels == self.unet.out_channels,
                 f"the UNet outputs {self.unet.out_channels} channels, the VAE has {self.vae.latent_channels} latent channels")

    @property
    def largest_size(self) -> int:
        """Largest accepted side in pixels: more is taken for a typing error, since it would exhaust the memory."""
        return 8 * self.image_size

    def to_dict(self) -> dict:
        """Plain numbers, strings and lists, for JSON in a checkpoint's metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        """Inverse of `to_dict`. Raises ConfigError on a field that does not exist."""
        parts = {"clip": CLIPConfig, "vae": VAEConfig, "unet": UNetConfig}
        values = {k: _build(parts[k], v, k) if k in parts else v for k, v in values.items()}
        return _build(cls, values, "model")


def _build(cls, values: dict, where: str):
    known = {f.name for f in fields(cls)}
    for key in values:
        _require(key in known, f"unknown field {key!r} in the {where} config; known: {', '.join(sorted(known))}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


SD15 = ModelConfig()

# The topology of SD 1.5, small enough for a test to run in milliseconds.
TINY = ModelConfig(
    name="tiny",
    clip=CLIPConfig(vocab_size=49408, width=32, layers=2, heads=4, mlp_width=64),
    vae=VAEConfig(widths=(16, 32, 32, 32), layers_per_block=1, norm_groups=8),
    unet=UNetConfig(widths=(32, 64, 64, 64), layers_per_block=1, heads=4, context_width=32, norm_groups=8),
    image_size=64,
)

# 28 x 28 digits padded to 32 x 32, grey, latents 8 x 8 x 4: the smallest real model, in data/digits.safetensors.
DIGITS = ModelConfig(
    name="digits",
    clip=CLIPConfig(width=64, layers=2, heads=4, mlp_width=256),
    vae=VAEConfig(image_channels=1, widths=(16, 16, 24), layers_per_block=1, norm_groups=8),
    unet=UNetConfig(widths=(32, 40), attention=(True, True), layers_per_block=1, heads=2, context_width=64, norm_groups=8),
    image_size=32,
)

CONFIG_KEY = "sdlora.config"  # where our own files store their ModelConfig, as JSON
PRESETS = {config.name: config for config in (SD15, TINY, DIGITS)}
