"""Optimizers, learning rates, loss scaling and moving average: beside the optimizers, pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sd.lora_files.block_weights import BlockWeightError, block_multipliers
from sd.lora_files.modules import Modules
from sd.training.errors import TrainError
from sd.training.relora import rewarm_factor
from sd.training.rules import FACTORS

WORDS = "clip.learned."  # the canonical names of new words' vectors start so
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- optimizers: (groups, config) -> optimizer -----------------------------------------------------------------------


def _adamw(groups: list[dict], config) -> torch.optim.Optimizer:
    """Loshchilov and Hutter 2019."""
    return torch.optim.AdamW(groups, betas=config.betas, fused=True)


def _adamw8bit(groups: list[dict], config) -> torch.optim.Optimizer:
    """Dettmers et al. 2022: moments in 8 bits, those of parameters under 4096 numbers in 32."""
    from bitsandbytes.optim import AdamW8bit
    return AdamW8bit(groups, lr=config.learning_rate, betas=config.betas)


def _adafactor(groups: list[dict], config) -> torch.optim.Optimizer:
    """Shazeer and Stern 2018, with our learning rate: one that grows with the weight would hold `up` at its 0."""
    from transformers.optimization import Adafactor
    return Adafactor(groups, lr=config.learning_rate, scale_parameter=False, relative_step=False)


def _lion(groups: list[dict], config) -> torch.optim.Optimizer:
    """Chen et al. 2023."""
    from lion_pytorch import Lion
    return Lion(groups, lr=config.learning_rate, betas=config.betas)


def _prodigy(groups: list[dict], config) -> torch.optim.Optimizer:
    """Mishchenko and Defazio 2024, with what the authors recommend for diffusion models."""
    from prodigyopt import Prodigy
    return Prodigy(groups, lr=config.learning_rate, betas=config.betas, safeguard_warmup=True, use_bias_correction=True)


def _schedule_free(groups: list[dict], config) -> torch.optim.Optimizer:
    """Defazio et al. 2024. The warm-up is ours, which is the library's."""
    from schedulefree import AdamWScheduleFree
    optimizer = AdamWScheduleFree(groups, lr=config.learning_rate, betas=config.betas)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, Callable] = {"adamw": _adamw, "adamw8bit": _adamw8bit, "adafactor": _adafactor, "lion": _lion,
                                   "prodigy": _prodigy, "schedule_free": _schedule_free}
PACKAGES = {"adamw8bit": "bitsandbytes", "lion": "lion-pytorch", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}


def make_optimizer(parameters: Mapping[str, nn.Parameter], config, modules: Modules | None = None) -> torch.optim.Optimizer:
    """The optimizer of `config` on parameters by canonical name, one group for each pair of learning rate and decay.

    The rate is `word_learning_rate` of new words, `text_learning_rate` in the text encoder, else `learning_rate`; times
    `lora_plus` for `up` (Hayou et al. 2024, LoRA+), times what `block_rates` give (for them, `modules` are the model's
    `modules_of`). Matrices decay; biases, norms, magnitudes, new words and what has no rate do not. Raises TrainError for a
    missing package, a block of which nothing is trained, LoRA+ without a LoRA, and Prodigy with several rates.
    """
    rates = _rates(parameters, config, modules)
    if not any(rates.values()):
        raise TrainError(f"block_rates is {config.block_rates!r}, so nothing is trained; allowed: above 0 for some block")
    if config.optimizer == "prodigy" and len(set(rates.values()) - {0.0}) > 1:
        raise TrainError("prodigy estimates one learning rate for all; leave out text_learning_rate, lora_plus and block_rates "
                         "other than 0 and 1, or choose another optimizer")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        decays = p.dim() > 1 and not name.endswith("magnitude") and not name.startswith(WORDS) and rates[name] > 0
        groups.setdefault((rates[name], config.weight_decay if decays else 0.0), []).append(p)
    rows = [{"params": ps, "lr": rate, "initial_lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]
    try:
        return OPTIMIZERS[config.optimizer](rows, config)
    except ImportError as error:
        package = PACKAGES.get(config.optimizer, "transformers")
        raise TrainError(f"optimizer is {config.optimizer!r}, which needs the package {package} ({error}); "
                         f"run: pip install {package}") from None


def _rates(parameters: Iterable[str], config, modules: Modules | None) -> dict[str, float]:
    """Name of each parameter -> its learning rate before any schedule."""
    paths = {name: name.rpartition(".")[0] for name in parameters}
    blocks = {}
    if config.block_rates:
        trained = Modules(modules.names, {path: shape for path, shape in modules.shapes.items() if path in set(paths.values())})
        try:
            blocks = block_multipliers(",".join(config.block_rates), trained).table
        except BlockWeightError as error:
            raise TrainError(f"block_rates is {config.block_rates!r}; of what is trained: {error}") from None
        if min(blocks.values(), default=0) < 0:
            raise TrainError(f"block_rates is {config.block_rates!r}; allowed: factors of 0 or more")
    if config.lora_plus != 1 and not any(name.endswith(".up") for name in paths):
        raise TrainError(f"lora_plus is {config.lora_plus}, but nothing that is trained has an `up`; allowed: 1")

    text = config.learning_rate if config.text_learning_rate is None else config.text_learning_rate
    word = text if config.word_learning_rate is None else config.word_learning_rate

    def rate(name: str) -> float:
        base = word if name.startswith(WORDS) else text if name.startswith("clip.") else config.learning_rate
        return base * (config.lora_plus if name.endswith(".up") else 1.0) * blocks.get(paths[name], 1.0)

    return {name: rate(name) for name in paths}


@contextmanager
def final_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the trained weights are those that the optimizer would end with; afterwards they are the same bits as before.

    Schedule-free takes its gradients at one point and ends at another; for all others this does nothing.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    kept = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    settle(optimizer)
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for p, value in kept:  # the way back rounds
                p.copy_(value)


def settle(optimizer: torch.optim.Optimizer) -> None:
    """After the last step: the trained weights become those to keep, see `final_weights`."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


# ---- learning rate ---------------------------------------------------------------------------------------------------

# progress 0..1 after the warm-up -> factor of the learning rate
SCHEDULES = {
    "constant": lambda progress, cycles, power: 1.0,
    "cosine": lambda progress, cycles, power: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress, cycles, power: 1 - progress,
    "polynomial": lambda progress, cycles, power: (1 - progress) ** power,
    "cosine_restarts": lambda progress, cycles, power: 0.5 * (1 + math.cos(math.pi * (progress * cycles % 1.0))),
}


def lr_factor(step: int, config) -> float:
    """What the learning rate is multiplied by in step 0, 1, ..: linear over the warm-up, then SCHEDULES, which end at 0.

    cosine_restarts falls to 0 `cycles` times (Loshchilov and Hutter 2017), polynomial is (1 - progress)^power. All rise anew
    after a restart of ReLoRA.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return SCHEDULES[config.schedule](progress, config.cycles, config.power) * rewarm_factor(step, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's own rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


# ---- precision -------------------------------------------------------------------------------------------------------

def autocast(precision: str, device: torch.device):
    """Inside, products are computed in `precision`; weights, gradients and the loss stay fp32."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


LOSS_SCALE, SCALE_STEPS = 65536.0, 2000  # powers of 2, so that scaling rounds nothing


@torch.no_grad()
def unscale(parameters: Iterable[nn.Parameter], scale: Tensor) -> None:
    """Divide the gradients by the factor that their loss was multiplied by, in place."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, 1 / scale)


@torch.no_grad()
def next_loss_scale(state: Tensor, good: Tensor) -> Tensor:
    """[scale, good steps since it changed] after a step: half after a bad one, twice after 2000 good ones.

    The rule of torch.amp.GradScaler, Micikevicius et al. 2018, section 3.2; a bad step has a gradient that is not finite.
    """
    scale, steps = state
    full = steps + 1 == SCALE_STEPS
    after = torch.where(full, torch.stack([scale * 2, steps * 0]), torch.stack([scale, steps + 1]))
    return torch.where(good, after, torch.stack([scale / 2, steps * 0]))


# ---- the step and after it ------------------------------------------------------------------------------------------

@torch.no_grad()
def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, or none where `bad` (a scalar) is true. Fused ones decide on the device: nothing waits for it."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = bad.float()
        optimizer.step()
    elif not bad:
        optimizer.step()



@torch.no_grad()
def limit_norms(layers: Mapping[str, nn.Module], name: str, max_norm: float) -> None:
    """Scale adapter `name` of each LoRALayer back to a Frobenius norm of ΔW of at most `max_norm`, its factors alike.

    That is kohya's scale_weight_norms; ΔW is the one before DoRA's magnitude. What is within the limit keeps its bits, and
    nothing is read from the device. Raises TrainError for a kind whose ΔW is no product.
    """
    for path, layer in layers.items():
        if name not in layer.adapter_names:
            continue
        adapter = layer.adapter(name)
        if adapter.kind not in FACTORS:
            raise TrainError(f"max_norm is {max_norm}, which does not go with kind {adapter.kind!r} (on {path}); "
                             f"allowed: {', '.join(sorted(FACTORS))}")
        factors = [p for key, p in adapter.named_parameters() if key not in ("magnitude", "diff_b")]
        if not factors:  # a full difference of a bias alone
            continue
        # The others ask for no more than the shape: no copy of a half or quantised weight is made.
        W = layer.base_weight() if adapter.of_weight else torch.empty(tuple(layer.weight.shape), device="meta")
        ratio = (max_norm / torch.linalg.vector_norm(adapter.delta(W))).clamp(max=1)
        torch._foreach_mul_(factors, ratio ** (1 / len(factors)))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float, step: int,
               bad: Tensor | bool = False) -> None:
    """ema += (1 - d) (p - ema), in place, unless the step was bad; d rises to `decay`: the random start is soon forgotten."""
    if ema:
        away = torch._foreach_sub([parameters[name].data for name in ema], list(ema.values()))
        torch._foreach_mul_(away, (1 - min(decay, (1 + step) / (10 + step))) * (1 - torch.as_tensor(bad).float()))
        torch._foreach_add_(list(ema.values()), away)
