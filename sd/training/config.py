"""Training options: one frozen dataclass, from which the command line's flags are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sd.training.rules import check


@dataclass(frozen=True)
class TrainConfig:
    """Train a LoRA, or the whole model, on a folder of pictures with captions; the same command again resumes."""

    data: str = ""
    """Folder of pictures with captions, a .toml that lists several, or hf: and a dataset's name or path (docs/training.md)."""
    buckets: bool = False
    """Keep aspect ratios: crop each picture to the size with the nearest ratio and at most size x size pixels."""
    bucket_min: int | None = None
    """Shortest side of a bucket; none: half of size."""
    bucket_max: int | None = None
    """Longest side of a bucket; none: twice size."""
    bucket_step: int = 64
    """Bucket sides are multiples of this."""
    upscale: bool = True
    """Enlarge pictures that are smaller than their bucket; if off, they go into a smaller bucket."""
    crop: Literal["center", "random"] = "center"
    """Where pictures are cropped."""
    flip: bool = False
    """Mirror pictures half of the time."""
    variants: int = 1
    """Number of random crops of each picture; flip doubles it."""
    shuffle_tags: bool = False
    """Shuffle the tags of a caption each time it is used."""
    keep_tokens: int = 0
    """Number of leading tags that shuffle_tags leaves in place."""
    tag_separator: str = ","
    """Separator between tags."""
    prefix: str = ""
    """Text put before every caption."""
    suffix: str = ""
    """Text put after every caption."""
    trigger: str = ""
    """Word added as the first tag of captions that lack it."""
    wildcards: bool = False
    """Replace {a|b|c} in a caption with a, b or c, drawn anew each time."""
    reg_data: str | None = None
    """Regularisation pictures (prior preservation), given like data and used as often."""
    prior_weight: float = 1.0
    """Weight of the loss of regularisation pictures."""
    masks: bool = False
    """Weight the loss by masks, bright where the model should learn: a-mask.png or masks/a.png for a.png."""
    cache: str | None = None
    """Folder in which latents and text encoder outputs are kept for other runs; none: in memory only."""
    out: str = "out/train"
    """Output folder for state, metrics, loss curve and result. The same command with the same folder resumes."""
    model: str | None = None
    """Checkpoint or diffusers folder to start from, or the name of a model in data/; none: emoji."""
    train: Literal["lora", "full", "vae", "words"] = "lora"
    """Train a LoRA, all weights of UNet and/or text encoder, the autoencoder, or only new words (textual inversion)."""
    unet: bool = True
    """Train the UNet (its LoRA, or all of it)."""
    text_encoder: bool = False
    """Train the text encoder (its LoRA, or all of it)."""
    new_words: tuple[str, ...] = ()
    """New words to learn, each as WORD=initial text or WORD:VECTORS=initial text."""

    name: str = "lora"
    """Name of the LoRA and of its file in the out folder."""
    kind: Literal["lora", "full", "loha", "lokr", "ia3", "glora", "oft", "boft", "hra"] = "lora"
    """Kind of adapter: see sd/adapters/kinds.py."""
    rank: int = 4
    """Rank of the LoRA."""
    alpha: float = 4.0
    """The LoRA is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023); files store alpha times sqrt(rank)."""
    block_ranks: tuple[str, ...] = ()
    """Ranks of individual blocks, such as mid_block=8; 0 leaves a block without a LoRA. alpha is adjusted to keep the scale
    the same everywhere (with rslora, alpha / sqrt of the block's rank)."""
    init: Literal["default", "pissa"] = "default"
    """Initial factors. default: a change of 0. pissa (Meng et al. 2024): the principal components of the weight, minus a
    frozen copy of them; the file has twice the rank, and weight decay acts on the principal components too."""
    from_lora: str | None = None
    """LoRA file or folder, in any program's format, to start from; it determines kind, rank, alpha, targets and magnitudes."""
    relora_every: int = 0
    """Steps between restarts (ReLoRA), each of which moves the LoRA's change into a frozen one; 0: never."""
    relora_warmup: int = 10
    """Warm-up steps of the learning rate after each restart."""
    relora_save: Literal["full", "svd"] = "full"
    """Save the sum of all changes in full, or its best low-rank approximation as a LoRA."""
    relora_rank: int | None = None
    """Rank of that LoRA; none: rank times the number of starts, which is exact for plain LoRAs."""
    quantize: Literal["none", "nf4", "nf4-double", "int8", "fp8"] = "none"
    """Quantise the frozen UNet and text encoder (QLoRA) to 4.5, 4.1 or 8 bits per value."""
    dropout: float = 0.0
    """Dropout on the inputs of the LoRA."""
    rank_dropout: float = 0.0
    """Dropout on ranks of the LoRA."""
    module_dropout: float = 0.0
    """Probability that a layer skips its LoRA in a forward pass."""
    dora: bool = False
    """Train a magnitude vector as well (DoRA)."""
    targets: tuple[str, ...] = ("attn",)
    """Layers to adapt: a preset (attn, kohya, full), module names or regular expressions."""

    steps: int = 1000
    """Total number of optimizer steps."""
    batch_size: int = 4
    """Pictures in a micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step, in all processes together."""
    size: int | None = None
    """Scale and crop pictures to size x size pixels; none: the model's native size."""
    caption_dropout: float = 0.1
    """Probability of replacing a caption with the empty one, which classifier-free guidance needs."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule_free"] = "adamw"
    """Optimizer; all except adamw and adafactor need the packages of the extra `optimizers`."""
    learning_rate: float = 1e-3
    """Learning rate; 1 with prodigy, which estimates its own."""
    text_learning_rate: float | None = None
    """Learning rate of the text encoder; none: the same."""
    word_learning_rate: float | None = None
    """Learning rate of new words; none: that of the text encoder. 5e-3 is typical."""
    schedule: Literal["constant", "cosine", "linear", "polynomial", "cosine_restarts"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0."""
    cycles: int = 1
    """Number of cycles of cosine_restarts."""
    power: float = 1.0
    """Exponent of the polynomial schedule."""
    lora_plus: float = 1.0
    """Ratio of the learning rates of `up` and `down` (LoRA+; 16 is typical)."""
    block_rates: tuple[str, ...] = ()
    """Learning rate factors of individual blocks, such as mid_block=0.5; 0 freezes a block."""
    max_norm: float = 0.0
    """Maximum norm of a layer's weight change; 0: no limit."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products and convolutions, and of frozen weights; what is trained and the optimizer stay in fp32."""
    warmup: int = 0
    """Warm-up steps of the learning rate."""
    weight_decay: float = 0.01
    """Weight decay of matrices and convolutions; biases and norms are not decayed."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's two moment estimates."""
    clip_norm: float = 1.0
    """Clip the global gradient norm to this; 0: no limit."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights, which becomes the result; 0: none."""
    kl_weight: float = 1e-3
    """Weight of the KL term in the autoencoder's loss."""
    loss: Literal["mse", "huber", "smooth_l1"] = "mse"
    """Elementwise loss; huber and smooth_l1 are less sensitive to outliers."""
    huber_delta: float = 0.1
    """Error at which huber and smooth_l1 change from squared to absolute."""
    weighting: Literal["none", "min_snr", "debiased", "p2"] = "none"
    """Loss weight of a timestep, by its signal-to-noise ratio."""
    snr_gamma: float = 5.0
    """The gamma of min_snr."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule to end at pure noise; for models that predict v."""
    min_timestep: int = 0
    """Lowest timestep to train on."""
    max_timestep: int | None = None
    """Upper bound (exclusive) of the timesteps to train on; none: all."""
    timestep_bias: float = 1.0
    """Above 1 favours small timesteps (details), below 1 large ones (composition)."""
    noise_offset: float = 0.0
    """Strength of extra noise that is constant over each channel of an image, for darker and brighter pictures."""
    pyramid_noise: float = 0.0
    """Discount per level of added coarser noise (multi-resolution noise); 0: none."""
    input_perturbation: float = 0.0
    """Strength of extra noise added to the input but not to the target."""
    checkpointing: bool = False
    """Gradient checkpointing: recompute the UNet's activations in the backward pass; less memory, a third more time."""
    compile: bool = False
    """Compile the UNet: takes minutes at the start, then steps are faster."""
    deterministic: bool = False
    """On a GPU, use only deterministic kernels, so that a resumed run is bit-identical; slower."""
    shard: bool = False
    """Shard the trained networks over the processes that torchrun started (FSDP2)."""
    seed: int = 0
    """Seed of all random numbers."""
    save_every: int = 500
    """Steps between saves of the state."""
    progress: bool = True
    """Show a progress bar and an estimate of memory and time."""
    validation: float = 0.0
    """Fraction of the pictures to hold out for the validation loss, each chosen by its content alone."""
    validation_data: str | None = None
    """Pictures with captions for the validation loss instead, given like data."""
    validate_every: int = 500
    """Steps between measurements of the validation loss."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts for sample pictures; samples.png has a row for the base and one for each time."""
    sample_every: int = 500
    """Steps between rows of sample pictures."""
    sample_seed: int = 0
    """Seed of the first picture in each row; it increases by 1 along the row."""
    sample_steps: int = 25
    """Sampler steps of the samples."""
    sample_cfg: float = 7.5
    """Guidance scale of the samples."""
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Also log metrics and samples to TensorBoard (the folder tensorboard in out) or wandb."""
    dry_run: bool = False
    """Only show pictures, captions, trained parameters, memory and time; write nothing."""

    def __post_init__(self):
        check(self)

    @property
    def trains_text(self) -> bool:
        """Whether training changes the context of a caption, so that contexts cannot be cached."""
        return self.text_encoder or bool(self.new_words)
