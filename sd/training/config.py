"""What a training is told: one frozen dataclass, from which the command line's flags are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sd.adapters.kinds import Kind
from sd.training.errors import TrainError
from sd.training.rules import (
    effect_rules,
    lora_rules,
    monitor_rules,
    objective_rules,
    optimizer_rules,
    relora_rules,
    shard_rules,
    word_rules,
)


@dataclass(frozen=True)
class TrainConfig:
    """Train a LoRA, or the whole model, on a folder of pictures with captions; the same command again resumes."""

    data: str = ""
    """Folder of pictures with captions, a .toml of several, or hf: and the name or path of a dataset (docs/training.md)."""
    buckets: bool = False
    """Keep the pictures' shapes: each is cut to the nearest of the sizes with at most size x size pixels."""
    bucket_min: int | None = None
    """Shortest side of a bucket; none: half of size."""
    bucket_max: int | None = None
    """Longest side of a bucket; none: twice size."""
    bucket_step: int = 64
    """Sides of buckets are multiples of it."""
    upscale: bool = True
    """Enlarge pictures that are smaller than their bucket; else they go into a smaller one."""
    crop: Literal["center", "random"] = "center"
    """Where pictures are cut."""
    flip: bool = False
    """Show pictures mirrored half of the time."""
    variants: int = 1
    """Random crops of each picture; flip doubles them."""
    shuffle_tags: bool = False
    """Show the tags of a caption in another order each time."""
    keep_tokens: int = 0
    """Tags at the start that shuffle_tags leaves in place."""
    tag_separator: str = ","
    """What stands between tags."""
    prefix: str = ""
    """Put before every caption."""
    suffix: str = ""
    """Put after every caption."""
    trigger: str = ""
    """Word put as a tag before captions that lack it."""
    wildcards: bool = False
    """{a|b|c} in a caption is one of them, chosen anew each time."""
    reg_data: str | None = None
    """Regularisation pictures (prior preservation), as many uses as of those of data."""
    prior_weight: float = 1.0
    """Factor of their loss."""
    masks: bool = False
    """Learn where a mask is bright: a-mask.png or masks/a.png for a.png."""
    cache: str | None = None
    """Folder in which latents and contexts are kept for other runs; none: in memory only."""
    out: str = "out/train"
    """Folder of the run: state, metrics, loss curve and result. The same command with the same folder resumes."""
    model: str | None = None
    """Checkpoint or diffusers folder to start from, or the name of a model in data/; none: emoji."""
    train: Literal["lora", "full", "vae", "words"] = "lora"
    """A LoRA, all weights of UNet and/or text encoder, the autoencoder, or the new words alone (textual inversion)."""
    unet: bool = True
    """Whether the UNet is trained (its LoRA, or all of it)."""
    text_encoder: bool = False
    """Train the text encoder (its LoRA, or all of it)."""
    new_words: tuple[str, ...] = ()
    """Words of captions to learn as well, as WORD=text to start from, or WORD:VECTORS=text."""

    name: str = "lora"
    """Name of the LoRA, and of its file in the out folder."""
    kind: Kind = "lora"
    """What is learned beside each weight: see sd/adapters/kinds.py."""
    rank: int = 4
    """Rank of the LoRA."""
    alpha: float = 4.0
    """The LoRA is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023); files hold alpha times sqrt(rank)."""
    block_ranks: tuple[str, ...] = ()
    """Ranks of blocks, such as mid_block=8, where they are not `rank`; 0 leaves a block without a LoRA. alpha goes along, so
    that the scale is the same everywhere (of rslora, alpha / sqrt of the block's rank)."""
    init: Literal["default", "pissa"] = "default"
    """How the factors start: random with no change, or as the principal part of the weight with a frozen copy subtracted
    (PiSSA, Meng et al. 2024), which gives a file of twice the rank. Weight decay pulls at the principal part too."""
    from_lora: str | None = None
    """LoRA file or folder of any program to start from: kind, rank, alpha, targets and magnitudes are the file's."""
    relora_every: int = 0
    """Steps after which the LoRA's change moves into a frozen one and the LoRA begins anew (ReLoRA); 0: never."""
    relora_warmup: int = 10
    """Steps in which the learning rate rises again after that."""
    relora_save: Literal["full", "svd"] = "full"
    """Save the sum of all changes whole, or as a LoRA, the best of its rank."""
    relora_rank: int | None = None
    """Rank of that LoRA; none: rank times the number of its beginnings, in which plain LoRAs lose nothing."""
    quantize: Literal["none", "nf4", "nf4-double", "int8", "fp8"] = "none"
    """Hold the frozen base in few bits (QLoRA): 4.5, 4.1 or 8 bits a value of UNet and text encoder."""
    dropout: float = 0.0
    """Dropout on the input of the LoRA's layers."""
    rank_dropout: float = 0.0
    """Dropout on the ranks of the LoRA."""
    module_dropout: float = 0.0
    """Probability with which a layer is trained without its LoRA."""
    dora: bool = False
    """Train a magnitude as well (DoRA)."""
    targets: tuple[str, ...] = ("attn",)
    """Layers with a LoRA: a preset (attn, kohya, full), module names or regular expressions."""

    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 4
    """Pictures in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in an optimizer step, of all processes together."""
    size: int | None = None
    """Pictures are scaled and cut to size x size pixels; none: what the model is made for."""
    caption_dropout: float = 0.1
    """Probability of an empty caption, from which guidance is learned."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule_free"] = "adamw"
    """Optimizer; all but adamw and adafactor need a package of the extra `optimizers`."""
    learning_rate: float = 1e-3
    """Learning rate; 1 with prodigy, which finds its own."""
    text_learning_rate: float | None = None
    """Learning rate of the text encoder; none: the same."""
    word_learning_rate: float | None = None
    """Learning rate of new words; none: that of the text encoder. 5e-3 is usual."""
    schedule: Literal["constant", "cosine", "linear", "polynomial", "cosine_restarts"] = "constant"
    """Learning rate after the warm-up: constant, or down to 0."""
    cycles: int = 1
    """How often cosine_restarts falls to 0."""
    power: float = 1.0
    """Power of the polynomial schedule."""
    lora_plus: float = 1.0
    """The learning rate of the LoRA's `up` is this times that of `down` (LoRA+; 16 is usual)."""
    block_rates: tuple[str, ...] = ()
    """Factors of the learning rate of blocks, such as mid_block=0.5; 0 leaves a block as it is."""
    max_norm: float = 0.0
    """Largest norm of the LoRA's change of a layer; 0: no limit."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the products in the networks; weights and optimizer are fp32."""
    warmup: int = 0
    """Steps in which the learning rate rises to its value."""
    weight_decay: float = 0.01
    """Weight decay of matrices and convolutions; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's two moving averages."""
    clip_norm: float = 1.0
    """Largest norm of the gradient, all weights together; 0: no limit."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then the result; 0: none."""
    kl_weight: float = 1e-3
    """Weight of the posterior's KL in the autoencoder's loss."""
    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    """Error of each number; the two others count large errors less."""
    huber_delta: float = 0.1
    """Where huber and smooth_l1 turn from squares to absolute errors."""
    weighting: Literal["none", "min_snr", "debiased", "p2"] = "none"
    """Weight of a timestep by its signal-to-noise ratio."""
    snr_gamma: float = 5.0
    """The gamma of min_snr."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise; for models that predict v."""
    min_timestep: int = 0
    """Lowest timestep that is trained."""
    max_timestep: int | None = None
    """The timesteps below it are trained; none: all."""
    timestep_bias: float = 1.0
    """Above 1 prefers small timesteps, the details; below 1 large ones, the composition."""
    noise_offset: float = 0.0
    """Share of noise that is one number for each image and channel: darker and brighter pictures."""
    pyramid_noise: float = 0.0
    """Discount of coarser noise that is added level by level; 0: none."""
    input_perturbation: float = 0.0
    """Other noise that the input has and the target has not."""
    checkpointing: bool = False
    """Compute the UNet's activations a second time in the backward: less memory, a third more time."""
    compile: bool = False
    """Compile the UNet: minutes at the start, faster steps."""
    deterministic: bool = False
    """On a GPU use only kernels that give the same bits each time, so that a resumed run does; slower."""
    shard: bool = False
    """With several processes (torchrun), each holds a part of the trained networks, not all of them (FSDP2)."""
    seed: int = 0
    """Everything random follows from it."""
    save_every: int = 500
    """Steps between two saves of the state."""
    progress: bool = True
    """Whether a progress bar and an estimate of memory and time are shown."""
    validation: float = 0.0
    """Share of the pictures that is held out, each chosen by its content: their loss is measured, never learned from."""
    validation_data: str | None = None
    """Pictures with captions to hold out instead, named as those of data."""
    validate_every: int = 500
    """Steps between two measurements of the validation loss."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of sample pictures, on a sheet with a row for the base and for each time: samples.png."""
    sample_every: int = 500
    """Steps between two rows of samples."""
    sample_seed: int = 0
    """Seed of the first sample in each row; the next has the next one."""
    sample_steps: int = 25
    """Sampler steps of the samples."""
    sample_cfg: float = 7.5
    """Guidance scale of the samples."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Show metrics and samples in TensorBoard (the folder tensorboard in out) or wandb as well."""
    dry_run: bool = False
    """Only show the pictures, captions, what is trained, memory and time; write nothing."""

    def __post_init__(self):
        def require(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise TrainError(f"{field} is {getattr(self, field)!r}; allowed: {allowed}")

        for field in ("steps", "batch_size", "accumulate", "save_every", "rank"):
            require(getattr(self, field) >= 1, field, "1 or more")
        for field in ("caption_dropout", "dropout", "rank_dropout", "module_dropout", "ema"):
            require(0 <= getattr(self, field) < 1, field, f"0 <= {field} < 1")
        for field in ("warmup", "weight_decay", "clip_norm", "kl_weight", "seed"):
            require(0 <= getattr(self, field) < math.inf, field, "0 or more")
        for ok, field, allowed in (*objective_rules(self), *optimizer_rules(self), *word_rules(self), *monitor_rules(self),
                                   *lora_rules(self), *relora_rules(self), *shard_rules(self)):
            require(ok, field, allowed)
        require(len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers of 0 <= beta < 1")
        require(self.train in ("lora", "full", "vae", "words"), "train", "lora, full, vae, words")
        require(bool(self.out), "out", "a folder")
        require(0 < len(self.name) <= 100 and Path(self.name).name == self.name and self.name not in ("..", "state")
                and Path(self.name).suffix not in (".safetensors", ".pt"), "name",
                "a file's name of up to 100 letters, without its ending, and not 'state'")
        require(self.batch_size <= 4096, "batch_size", "1 to 4096")
        require(0 < abs(self.alpha) <= 1e4, "alpha", "a number other than 0, to 10000")
        require(self.weight_decay <= 10, "weight_decay", "0 to 10")
        require(self.size is None or self.size >= 8, "size", "8 or more pixels")
        if self.train != "vae" and not (self.unet or self.text_encoder):
            raise TrainError("nothing is trained: unet and text_encoder are both off")
        for ok, field, allowed in effect_rules(self):
            require(ok, field, allowed)

    @property
    def trains_text(self) -> bool:
        """Whether a caption's context changes in the training: then none is kept."""
        return self.text_encoder or bool(self.new_words)
