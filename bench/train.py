"""Pictures per second and peak memory of LoRA training: ours against diffusers with PEFT, and against full fine-tuning.

    python -m bench.train                     # a reduced model on the CPU
    python -m bench.train --full --device cuda --dtypes bf16 --size 512
    python -m bench.train --full --size 256 --dtypes fp32 bf16 --former ../sdlora-before
"""

from __future__ import annotations

import importlib
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bench import peers
from bench.common import GIB, Options, block, checkpoints, run
from bench.process import Measured, isolated, synchronize
from sd.config import SD15, TINY, CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from sd.files.tensors import read_tensors
from sd.model_loader import preload_models_from_standard_weights
from sd.training import TrainConfig

# The topology of SD 1.5 at a size that two cores can train.
REDUCED = ModelConfig(
    name="sd15-reduced", clip=CLIPConfig(width=256, layers=4, heads=4, mlp_width=1024),
    vae=VAEConfig(widths=(32, 64, 128, 128)),
    unet=UNetConfig(widths=(64, 128, 192, 192), context_width=256), image_size=256)


@dataclass(frozen=True)
class TrainOptions(Options):
    tiny: bool = False  # use the model of the tests, to try the program
    peers: bool = True  # measure diffusers' loop too, not only ours for whole networks and for LoRAs
    whole: bool = True  # measure ours for whole networks and for LoRAs of other sizes
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ()  # to compare in one run; (): --dtype alone
    former: Path | None = None  # a folder with an earlier state of this repository, to compare with

    @property
    def config(self) -> ModelConfig:
        return SD15 if self.full else TINY if self.tiny else REDUCED


NOTES = """LoRA of rank 4 on q, k, v and out of the UNet's attentions (128 layers in SD 1.5), AdamW, gradients clipped to
1, random weights, {pictures} PNG files with a caption each. Theirs is the loop of diffusers'
train_text_to_image_lora.py on PEFT's adapters, written out without accelerate: every step reads, scales and
encodes the pictures, tokenises and encodes the captions. "cached" is the same loop with latents and contexts
from memory, which leaves little but the UNet. Ours is `train()` with its cache on disk, built beforehand.
On both sides {long} steps are timed after {short} untimed ones. Each figure is the median of n fresh processes, in
alternating order; peak memory is that of the process, loading included. bf16: under autocast on both sides."""
SHORT, LONG, PICTURES = 2, 8, 32
HEADER = ("dtype", "batch", "checkpointing", "ours, img/s", "theirs", "theirs, cached", "ours / theirs", "ours / cached",
          "ours, peak GiB", "theirs", "theirs, cached")
FORMER_HEADER = ("ours before, img/s", "ours / before", "ours before, peak GiB")
FULL_HEADER = ("what is trained", "parameters", "file of the result", "batch", "img/s", "peak GiB")
FULL_CASES = {"all of the UNet": {"train": "full"}, "LoRA, rank 8, q and v": {"rank": 8, "targets": ("q_proj", "v_proj")},
              "LoRA, rank 4, attn": {}, "LoRA, rank 4, attn, on an nf4 base": {"quantize": "nf4"}}


class Trained(NamedTuple):
    speed: float  # pictures per second
    parameters: int
    file: int  # bytes


def make_pictures(folder: Path, size: int) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture number {i}, noise")
    return folder


def ours(options: Options, model: Path, root: Path, size: int, batch: int, checkpointing: bool, changes: dict) -> Trained:
    models = preload_models_from_standard_weights(model, options.device, dtype=torch.float32)
    loop, starts = importlib.import_module("sd.training.loop"), []
    original = loop.set_learning_rate

    def stamped(*args) -> None:
        synchronize(options.device)
        starts.append(time.perf_counter())
        original(*args)

    loop.set_learning_rate = stamped  # called at the start of each step
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(data=str(root / "data"), out=out, cache=str(root / "cache"), size=size, batch_size=batch,
                             steps=LONG + 1, checkpointing=checkpointing, precision=options.dtype, progress=False,
                             save_every=10**6, caption_dropout=0.0, learning_rate=1e-4, **changes)
        loop.train(config, models)
        shapes = read_tensors(Path(out, "state.safetensors")).shapes
        result = Path(out, f"{config.name if config.train == 'lora' else 'model'}.safetensors").stat().st_size
    parameters = sum(math.prod(shape) for key, shape in shapes.items() if key.startswith("weights/"))
    return Trained(batch * (LONG - SHORT) / (starts[LONG] - starts[SHORT]), parameters, result)


def theirs(options: Options, folder: Path, root: Path, size: int, batch: int, checkpointing: bool, cached: bool) -> float:
    """Pictures per second."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig
    pipe = peers.from_pretrained(replace(options, dtype="fp32"), folder)
    unet, vae, text, device = pipe.unet, pipe.vae, pipe.text_encoder, options.device
    for network in (unet, vae, text):
        network.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian",
                                target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    files = sorted((root / "data").glob("*.png"))

    def inputs(indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = [Image.open(files[i]).convert("RGB").resize((size, size), Image.Resampling.BILINEAR) for i in indices]
        pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures])
        captions = [files[i].with_suffix(".txt").read_text() for i in indices]
        tokens = pipe.tokenizer(captions, max_length=pipe.tokenizer.model_max_length, padding="max_length", truncation=True,
                                return_tensors="pt").input_ids
        with torch.no_grad():
            latents = vae.encode(pixels.to(device)).latent_dist.sample() * vae.config.scaling_factor
            return latents, text(tokens.to(device))[0]

    known = {i: inputs([i]) for i in range(PICTURES)} if cached else {}
    autocast = torch.autocast(device.split(":")[0], options.torch_dtype, enabled=options.dtype != "fp32")
    order = np.random.default_rng(0).permutation(PICTURES)
    for step in range(LONG):
        if step == SHORT:
            synchronize(device)
            start = time.perf_counter()
        indices = [int(order[(step * batch + k) % PICTURES]) for k in range(batch)]
        with autocast:
            latents, context = ([torch.cat(x) for x in zip(*(known[i] for i in indices))] if cached else inputs(indices))
            noise = torch.randn_like(latents)
            t = torch.randint(0, schedule.config.num_train_timesteps, (batch,), device=device)
            out = unet(schedule.add_noise(latents, noise, t), t, context, return_dict=False)[0]
            loss = F.mse_loss(out.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    synchronize(device)
    return batch * (LONG - SHORT) / (time.perf_counter() - start)


def main(options: TrainOptions) -> str:
    size = options.size or (512 if options.full else options.config.image_size)
    file, folder = checkpoints(options)
    batches = (1, 4, 8, 16) if options.device.startswith("cuda") else (1,) if options.full else (1, 4)
    dtypes = options.dtypes or (options.dtype,)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_pictures(root / "data", size)
        isolated(options, ours, options, file, root, size, 1, False, {})  # fills the cache
        rows, full = [], []
        for dtype, batch, checkpointing in product(dtypes, batches, (False, True)) if options.peers else ():
            how = (plain(options, dtype), file, root, size, batch, checkpointing)
            cases = {"ours": (ours, *how, {}), "theirs": (theirs, how[0], folder, *how[2:], False),
                     "cached": (theirs, how[0], folder, *how[2:], True)}
            speed, peak = compared(options, cases | ({"former": cases["ours"]} if options.former else {}))
            rows.append([dtype, batch, "yes" if checkpointing else "no", *(f"{speed[name]:.2f}" for name in cases),
                         f"{speed['ours'] / speed['theirs']:.2f}", f"{speed['ours'] / speed['cached']:.2f}",
                         *(f"{peak[name]:.2f}" for name in cases)])
            if options.former:
                rows[-1] += [f"{speed['former']:.2f}", f"{speed['ours'] / speed['former']:.2f}", f"{peak['former']:.2f}"]
        for batch, (what, changes) in product(batches, FULL_CASES.items()) if options.whole else ():
            (speed, parameters, length), peak = isolated(options, ours, options, file, root, size, batch, False, changes)
            full.append((what, f"{parameters:,}", f"{length / 1e6:.1f} MB", batch, f"{speed:.2f}", f"{peak / GIB:.2f}"))
    note = " ".join(NOTES.split()).format(long=LONG - SHORT, short=SHORT, pictures=PICTURES)
    header = (*HEADER, *FORMER_HEADER) if options.former else HEADER
    tables = [(header, rows)] * options.peers + [(FULL_HEADER, full)] * options.whole
    return block(f"Training, {size} pixels", replace(options, dtype=" and ".join(dtypes)), [note], *tables)


def plain(options: TrainOptions, dtype: str) -> Options:
    return Options(full=options.full, device=options.device, dtype=dtype)  # type: ignore[arg-type]


def compared(options: TrainOptions, cases: dict[str, tuple]) -> tuple[dict[str, float], dict[str, float]]:
    """Median pictures per second and GiB of each case, from n fresh processes each, in alternating order."""
    found: dict[str, list[Measured]] = {name: [] for name in cases}
    for i in range(options.n):
        for name in list(cases) if i % 2 else list(cases)[::-1]:
            checkout = options.former if name == "former" else None
            found[name].append(isolated(options, *cases[name], checkout=checkout))
    return ({name: statistics.median(getattr(m.result, "speed", m.result) for m in runs) for name, runs in found.items()},
            {name: statistics.median(m.peak for m in runs) / GIB for name, runs in found.items()})


if __name__ == "__main__":
    from bench import train  # a new process finds its functions there, and none in __main__
    run(train.main, train.TrainOptions)
