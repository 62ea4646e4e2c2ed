"""Train the digits model and its LoRA: data/digits.safetensors and data/loras/digits-inverted.safetensors.

    python -m recipes.digits.train       # about 18 minutes on one core; to resume, run it again
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.digits.data import OUT, captions, load_mnist, split
from sd.config import DIGITS
from sd.files.tensors import read_tensors
from sd.model_loader import Models, new_models, preload_models_from_standard_weights, save_checkpoint, save_models_lora
from sd.prompts.tokenizer import tokenize
from sd.training import PictureSet, TrainConfig, train
from sd.training.dataset.cache import Posteriors
from sd.vae import sample_posterior

MODEL, LORA = Path("data/digits.safetensors"), Path("data/loras/digits-inverted.safetensors")

VAE = TrainConfig(train="vae", out=str(OUT / "vae"), steps=1600, batch_size=32, learning_rate=2e-3, schedule="cosine",
                  warmup=100, ema=0.995, kl_weight=1e-3, weight_decay=0.0)
UNET = TrainConfig(train="full", text_encoder=True, out=str(OUT / "unet"), steps=3200, batch_size=64,
                   learning_rate=1.5e-3, schedule="cosine", warmup=100, ema=0.998, caption_dropout=0.1)
INVERTED = TrainConfig(name="inverted", out=str(OUT / "inverted"), steps=1000, batch_size=32, rank=4, alpha=4.0,
                       targets=("attn",), learning_rate=5e-3, schedule="cosine", warmup=20)


def main() -> None:
    """Run all stages; those that are complete in out/digits return at once."""
    torch.set_num_threads(1)  # several threads sum in another order, and gain little on small networks
    pictures, digits = load_mnist()
    chosen, _ = split(digits)
    pictures, texts = pictures[chosen], [captions(d) for d in digits[chosen].tolist()]

    models = new_models(DIGITS, seed=0)
    for embedding in (models["clip"].token_embedding, models["clip"].position_embedding):
        embedding.weight.data.mul_(0.02)  # CLIP's initialisation; torch's N(0, 1) would drown the layers' output
    both = PictureSet(torch.cat([pictures, -pictures]), texts + texts)
    models = train(VAE, models, both, autoencoder_loss=polarity_loss)
    fold_scale(models, both)

    models = train(UNET, models, PictureSet(pictures, texts))
    fill_untrained_tokens(models, sorted({text for group in texts for text in group} | {""}))
    save_checkpoint(models, MODEL, dtype=torch.float16, metadata=notes(UNET, "model"))
    print(f"{MODEL}: {MODEL.stat().st_size:,} bytes")

    models = preload_models_from_standard_weights(MODEL, "cpu", dtype=torch.float32)  # as released: rounded to fp16
    models = train(INVERTED, models, PictureSet(-pictures, texts))
    LORA.parent.mkdir(exist_ok=True)
    save_models_lora(models, LORA, INVERTED.name, dtype=torch.float16, metadata=notes(INVERTED, INVERTED.name))
    print(f"{LORA}: {LORA.stat().st_size:,} bytes")


def notes(config: TrainConfig, result: str) -> dict[str, str]:
    """Metadata of a released file: the options of its training, and the licence."""
    made = read_tensors(Path(config.out, f"{result}.safetensors")).metadata
    return {key: value for key, value in made.items() if key == "sdlora.training" or key.startswith("ss_")} | {
        "license": "CC BY-SA 3.0, see data/NOTICE"}


def polarity_loss(models: Models, pictures: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Like `vae_loss`, with the polarity in the first latent channel: negating it inverts the decoded picture.

    Left alone, the autoencoder finds latents(-x) = -latents(x), and a UNet that has seen one polarity would have to
    learn every stroke anew for the other. So the two are made to differ in one channel. pictures: [B, 1, H, W].
    """
    mean, logvar = models["encoder"](pictures)
    corner = pictures[:, :, :1, :1]  # the padding: -1 for white on black
    sign = torch.ones(len(pictures), 1, 1, 1)
    sign[1::2] = -1  # every other picture of the shuffled batch
    z = sample_posterior(mean, logvar, noise)
    rebuilt = models["decoder"](torch.cat([sign * z[:, :1], z[:, 1:]], dim=1))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    is_polarity = F.mse_loss(mean[:, :1], corner.expand_as(mean[:, :1]))
    return F.mse_loss(rebuilt, sign * pictures) + 0.1 * is_polarity + kl_weight * kl


@torch.no_grad()
def fold_scale(models: Models, dataset) -> None:
    """Rescale the VAE's latents so that, multiplied by `config.vae.scale`, they have a standard deviation of 1."""
    mean, std = Posteriors(models, dataset)(range(len(dataset)))
    factor = 1 / (mean.var() + std.square().mean()).sqrt()
    quant, post, z = models["encoder"].quant_conv, models["decoder"].post_quant_conv, models.config.vae.latent_channels
    quant.weight[:z] *= factor
    quant.bias[:z] *= factor
    quant.bias[z:] += 2 * factor.log()  # logvar
    post.weight /= factor


@torch.no_grad()
def fill_untrained_tokens(models: Models, texts: list[str]) -> None:
    """Set the embeddings of tokens that are in no caption to the mean of the trained ones, instead of noise."""
    weight: Tensor = models["clip"].token_embedding.weight
    used = tokenize(models.tokenizer, texts, models.config.clip.max_tokens).unique()
    mean = weight[used].mean(dim=0)
    others = torch.ones(len(weight), dtype=torch.bool)
    others[used] = False
    weight[others] = mean


if __name__ == "__main__":
    main()
