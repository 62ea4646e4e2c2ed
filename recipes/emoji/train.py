"""Train the emoji model and its LoRAs: data/emoji.safetensors and data/loras/emoji-*.safetensors.

    python -m recipes.emoji.train vae         # the autoencoder
    python -m recipes.emoji.train text        # the text encoder, before there is a UNet
    python -m recipes.emoji.train unet        # UNet and text encoder: endless, stop it when the pictures are good
    python -m recipes.emoji.train finish      # their last steps, with the learning rate falling to 0
    python -m recipes.emoji.train export      # the result of `finish` (`--run unet`: the last save) to data/emoji.safetensors
    python -m recipes.emoji.train style       # the LoRA "high contrast", for the exported model
    python -m recipes.emoji.train concept     # the LoRA of one emoji that is not in the model's training data

A stage that was stopped continues when it is run again. `--run NAME --start FILE` continues from a checkpoint.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.digits.train import fill_untrained_tokens
from recipes.emoji.data import BASE, HIGH_CONTRAST, OUT, PACKAGES, EmojiSet, Row, build, caption, captions, choose
from recipes.emoji.text import train_text
from sd.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from sd.files.tensors import read_tensors
from sd.model_loader import Models, new_models, preload_models_from_standard_weights, save_checkpoint, save_models_lora
from sd.training import TrainConfig, train
from sd.training.dataset.cache import Posteriors
from sd.vae import sample_posterior

MODEL = Path("data/emoji.safetensors")
LORAS = Path("data/loras")
START = OUT / "start.safetensors"  # the trained autoencoder beside an untrained UNet and text encoder
READS = OUT / "reads.safetensors"  # the same with a trained text encoder

# 64 x 64 pixels, latents 16 x 16 x 4. The top level of the UNet is narrow and has no attention: capacity is cheaper at 8 x 8
# and 4 x 4. Captions have at most 27 tokens, so the context has 32 instead of 77.
EMOJI = ModelConfig(
    name="emoji",
    clip=CLIPConfig(max_tokens=32, width=96, layers=3, heads=4, mlp_width=768),
    vae=VAEConfig(widths=(16, 32, 96), layers_per_block=1, norm_groups=8),
    unet=UNetConfig(widths=(48, 128, 192), attention=(False, True, True), layers_per_block=1, heads=4, context_width=96,
                    norm_groups=16),
    prediction="v",  # gives noisy timesteps, where the prompt matters, more weight than eps
    image_size=64,
)

VAE = TrainConfig(train="vae", out=str(OUT / "vae"), steps=1500, batch_size=8, learning_rate=1e-3, schedule="cosine",
                  warmup=100, ema=0.998, kl_weight=2e-4, weight_decay=0.0, precision="bf16", save_every=400,
                  progress=False)
TEXT = TrainConfig(train="full", unet=False, text_encoder=True, out=str(OUT / "text"), steps=8000, batch_size=64,
                   learning_rate=1.5e-3, schedule="cosine", warmup=100, weight_decay=0.02, caption_dropout=0.05,
                   precision="bf16", save_every=500)
UNET = TrainConfig(train="full", text_encoder=True, out=str(OUT / "unet"), steps=1_000_000, batch_size=32,
                   learning_rate=8e-4, text_learning_rate=1e-4, warmup=200, timestep_bias=0.5, ema=0.999,
                   caption_dropout=0.1, precision="bf16", save_every=250, progress=False)
FINISH = replace(UNET, out=str(OUT / "finish"), steps=1600, schedule="linear", warmup=0, timestep_bias=0.65)
STYLE = TrainConfig(name="emoji-high-contrast", out=str(OUT / "style"), steps=1000, batch_size=16, rank=8, alpha=8.0,
                    targets=("full",), learning_rate=2e-3, schedule="cosine", warmup=50, precision="bf16",
                    progress=False)
CONCEPT = replace(STYLE, name="emoji-cat-face", out=str(OUT / "concept"), steps=300, rank=4, alpha=4.0,
                  targets=("kohya",), learning_rate=1e-3)
CONCEPT_CODE, CONCEPT_STYLES = "1F431", ("noto", "twemoji", "fluent-emoji-flat", "emojione")
SHIFTS = (-2, 0, 2)  # shifts to the right in pixels, which make twelve pictures of four drawings
MOST = 200  # pictures of the style LoRA


# ---- the autoencoder -------------------------------------------------------------------------------------------------

def train_vae(run: str, start: Path | None) -> None:
    """Train the autoencoder on all styles, from scratch or from a checkpoint, and write START."""
    pictures, rows = build(EMOJI.image_size)
    chosen = choose(pictures, [row for row in rows if row.split == "train"])
    models = fresh_models(EMOJI)
    if start is not None:
        trained = preload_models_from_standard_weights(start, "cpu", dtype=torch.float32)
        models.update({part: trained[part] for part in ("encoder", "decoder")})
    train(replace(VAE, out=str(OUT / run)), models, chosen, autoencoder_loss=sharp_loss)
    fold_statistics(models, EmojiSet(chosen.pictures[::8], chosen.captions[::8]))
    save_checkpoint(models, START)


def fresh_models(config: ModelConfig) -> Models:
    """Untrained networks with small embeddings, and with residual branches of the UNet that start at 0."""
    models = new_models(config, seed=0)
    for embedding in (models["clip"].token_embedding, models["clip"].position_embedding):
        embedding.weight.data.mul_(0.02)  # CLIP's initialisation; torch's N(0, 1) would drown the layers' output
    for path, layer in models["diffusion"].named_modules():
        if path.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return models


def sharp_loss(models: Models, pictures: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Like `vae_loss`, with two more terms; pictures: [B, C, H, W].

    A quarter of the absolute error keeps edges sharp. The squared error of means over 8 x 8 pixels corrects the colours of
    areas; without it, rare colours (green, purple) are learned last.
    """
    mean, logvar = models["encoder"](pictures)
    rebuilt = models["decoder"](sample_posterior(mean, logvar, noise)).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    areas = F.mse_loss(F.avg_pool2d(rebuilt, 8), F.avg_pool2d(pictures, 8))
    return F.mse_loss(rebuilt, pictures) + 0.25 * F.l1_loss(rebuilt, pictures) + areas + kl_weight * kl


@torch.no_grad()
def fold_statistics(models: Models, dataset) -> None:
    """Normalise each latent channel to mean 0 and, times `config.vae.scale`, variance 1, within the VAE's 1x1 convolutions."""
    scale, z = models.config.vae.scale, models.config.vae.latent_channels
    mean, std = (latents / scale for latents in Posteriors(models, dataset)(range(len(dataset))))
    middle = mean.mean(dim=(0, 2, 3))
    factor = 1 / (scale * (mean.var(dim=(0, 2, 3)) + std.square().mean(dim=(0, 2, 3))).sqrt())
    quant, post = models["encoder"].quant_conv, models["decoder"].post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ middle
    post.weight /= factor[None, :, None, None]
    quant.weight[:z] *= factor[:, None, None, None]
    quant.bias[:z] = (quant.bias[:z] - middle) * factor
    quant.bias[z:] += 2 * factor.log()  # logvar


# ---- text encoder and UNet -------------------------------------------------------------------------------------------

def in_folder(config: TrainConfig, run: str) -> TrainConfig:
    """The options in out/emoji/`run`; pictures are encoded once for all runs and starts."""
    return replace(config, out=str(OUT / run), cache=str(OUT / "cache"))


def base_rows(rows: list[Row]) -> list[Row]:
    """The training rows of the base."""
    return [row for row in rows if row.split == "train" and row.style in BASE]


def train_text_encoder(run: str) -> None:
    """Train the text encoder from scratch, and write READS."""
    pictures, rows = build(EMOJI.image_size)
    models = preload_models_from_standard_weights(START, "cpu", dtype=torch.float32)
    train_text(in_folder(TEXT, run), models, choose(pictures, base_rows(rows)))
    models.source = None  # the models no longer match that file
    save_checkpoint(models, READS)


def train_unet(run: str, start: Path | None, device: str = "cpu") -> None:
    """Train the UNet from scratch or from an exported model, or resume the run in out/emoji/`run`."""
    pictures, rows = build(EMOJI.image_size)
    models = preload_models_from_standard_weights(start or READS, device, dtype=torch.float32)
    train(in_folder(UNET, run), models, choose(pictures, base_rows(rows)))


def finish_unet(run: str, begun: str, start: Path | None = None) -> None:
    """Train the last steps, from the last save of the run `begun` (from the checkpoint `start`), which must not be running."""
    models, _ = latest(begun, start)
    pictures, rows = build(models.config.image_size)
    train(in_folder(FINISH, run), models, choose(pictures, base_rows(rows)))


def export(run: str, to: Path, start: Path | None = None) -> None:
    """Write the moving average of the weights in out/emoji/`run` as a checkpoint in fp16."""
    models, made = latest(run, start)
    _, rows = build(models.config.image_size)
    fill_untrained_tokens(models, sorted({text for row in base_rows(rows) for text in captions(row)} | {""}))
    to.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(models, to, dtype=torch.float16, metadata=made | LICENCE)
    print(f"{to}: {to.stat().st_size:,} bytes, {made['sdlora.steps']} steps of {run!r}")


@torch.no_grad()
def latest(run: str, start: Path | None = None) -> tuple[Models, dict[str, str]]:
    """(the models with the moving average of the run's last save, metadata about their training).

    `start` is the checkpoint that the run started from, which has the autoencoder; None is START.
    """
    models = preload_models_from_standard_weights(start or START, "cpu", dtype=torch.float32)
    state = read_tensors(OUT / run / "state.safetensors")
    for name, value in state.items():
        if name.startswith("ema/"):
            component, parameter = name.removeprefix("ema/").split(".", 1)
            models[component].get_parameter(parameter).copy_(value)
    steps = json.loads(state.metadata["progress"])["step"]
    models.source = None  # the models no longer match that file
    return models, {"sdlora.training": state.metadata["facts"], "sdlora.steps": str(steps)}


LICENCE = {
    "license": "MIT; trained on emoji under Apache-2.0, MIT and CC BY 4.0, see data/NOTICE",
    "sdlora.provenance": f"recipes/emoji, from {', '.join(PACKAGES)}",
}


# ---- LoRAs -----------------------------------------------------------------------------------------------------------

def style_rows(rows: list[Row]) -> list[Row]:
    """A fixed selection of MOST pictures of the high-contrast set, without held-out concepts."""
    rows = [row for row in rows if row.style == HIGH_CONTRAST and row.split == "train"]
    chosen = np.random.default_rng(0).permutation(len(rows))[:MOST]
    return [rows[i] for i in sorted(chosen)]


def concept_rows(rows: list[Row]) -> list[Row]:
    """Drawings of the concept, which the base has not seen, in some styles; the LoRA has to generalise to the others."""
    return [row for row in rows if row.code == CONCEPT_CODE and row.style in CONCEPT_STYLES]


def shifted(pictures: Tensor, pixels: int) -> Tensor:
    """Shift uint8 [N, 3, H, W] to the right; padding is white."""
    width = pictures.shape[-1]
    return F.pad(pictures, (max(pixels, 0), max(-pixels, 0)), value=255)[..., max(-pixels, 0):][..., :width]


def train_lora(config: TrainConfig, dataset: EmojiSet, model: Path, to: Path) -> None:
    """Train a LoRA on the released model, which is rounded to fp16."""
    models = preload_models_from_standard_weights(model, "cpu", dtype=torch.float32)
    models = train(config, models, dataset)
    made = read_tensors(Path(config.out, f"{config.name}.safetensors")).metadata
    notes = {key: value for key, value in made.items() if key == "sdlora.training" or key.startswith("ss_")} | LICENCE
    to.mkdir(parents=True, exist_ok=True)
    path = to / f"{config.name}.safetensors"
    save_models_lora(models, path, config.name, dtype=torch.float16, metadata=notes)
    print(f"{path}: {path.stat().st_size:,} bytes, {len(dataset)} pictures")


def train_style(model: Path, to: Path) -> None:
    """Train the high-contrast LoRA; half of the captions name the style, so that the LoRA works with and without it."""
    pictures, rows = build(EMOJI.image_size)
    chosen = style_rows(rows)
    texts = [(caption(row), caption(row, style=False)) for row in chosen]
    train_lora(STYLE, EmojiSet(pictures[[row.index for row in chosen]], texts), model, to)


def train_concept(model: Path, to: Path) -> None:
    """Train a LoRA of one emoji that the base has not seen, on twelve pictures in four styles."""
    pictures, rows = build(EMOJI.image_size)
    chosen = concept_rows(rows)
    drawn = pictures[[row.index for row in chosen]]
    moved = torch.cat([shifted(drawn, pixels) for pixels in SHIFTS])
    train_lora(CONCEPT, EmojiSet(moved, [(caption(row),) for row in chosen] * len(SHIFTS)), model, to)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("vae", "text", "unet", "finish", "export", "style", "concept"))
    parser.add_argument("--run", help="vae, text, unet, finish, export: folder of the training in out/emoji "
                                      "(default: the stage; export: finish)")
    parser.add_argument("--start", type=Path, help="vae, unet: checkpoint that a new run starts from; finish, export: the same "
                                                   "one for that run")
    parser.add_argument("--begun", default="unet", help="finish: the run to finish (default unet)")
    parser.add_argument("--model", type=Path, default=MODEL, help=f"style, concept: the base (default {MODEL})")
    parser.add_argument("--to", type=Path, help=f"export: the file (default {MODEL}); LoRAs: the folder (default {LORAS})")
    parser.add_argument("--device", default="cpu", help="unet: where it is trained (default cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; use the same number throughout a run, since it "
                                                               "changes the last bit of sums")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    match args.stage:
        case "vae":
            train_vae(args.run or "vae", args.start)
        case "text":
            train_text_encoder(args.run or "text")
        case "unet":
            train_unet(args.run or "unet", args.start, args.device)
        case "finish":
            finish_unet(args.run or "finish", args.begun, args.start)
        case "export":
            export(args.run or "finish", args.to or MODEL, args.start)
        case "style":
            train_style(args.model, args.to or LORAS)
        case "concept":
            train_concept(args.model, args.to or LORAS)


if __name__ == "__main__":
    main()
