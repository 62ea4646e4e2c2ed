"""Optimizers, learning rates, loss scaling and moving average. All but the optimizers are pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sd.adapters.layer import LoRALayer
from sd.graphs import TAPES
from sd.lora_files.block_weights import BlockWeightError, block_multipliers
from sd.lora_files.modules import Modules
from sd.training.errors import TrainError
from sd.training.relora import rewarm_factor
from sd.training.rules import kinds_with

WORDS = "clip.learned."  # prefix of the canonical names of new words' vectors
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---- optimizers: (groups, config) -> optimizer -----------------------------------------------------------------------


def _adamw(groups: list[dict], config) -> torch.optim.Optimizer:
    """Loshchilov and Hutter 2019. Where there are graphs, learning rates are tensors, which a graph reads in each step."""
    device = groups[0]["params"][0].device
    if graphs := device.type in TAPES:
        groups = [group | {"lr": torch.tensor(group["lr"], dtype=torch.float32, device=device)} for group in groups]
    return torch.optim.AdamW(groups, betas=config.betas, fused=True, capturable=graphs)


def _adamw8bit(groups: list[dict], config) -> torch.optim.Optimizer:
    """Dettmers et al. 2022: moments in 8 bits; in 32 bits for parameters with fewer than 4096 elements."""
    from bitsandbytes.optim import AdamW8bit
    return AdamW8bit(groups, lr=config.learning_rate, betas=config.betas)


def _adafactor(groups: list[dict], config) -> torch.optim.Optimizer:
    """Shazeer and Stern 2018, with a given learning rate: one relative to the weight would keep `up` at 0."""
    from transformers.optimization import Adafactor
    return Adafactor(groups, lr=config.learning_rate, scale_parameter=False, relative_step=False)


def _lion(groups: list[dict], config) -> torch.optim.Optimizer:
    """Chen et al. 2023."""
    from lion_pytorch import Lion
    return Lion(groups, lr=config.learning_rate, betas=config.betas)


def _prodigy(groups: list[dict], config) -> torch.optim.Optimizer:
    """Mishchenko and Defazio 2024, with the settings that the authors recommend for diffusion models."""
    from prodigyopt import Prodigy
    return Prodigy(groups, lr=config.learning_rate, betas=config.betas, safeguard_warmup=True, use_bias_correction=True)


def _schedule_free(groups: list[dict], config) -> torch.optim.Optimizer:
    """Defazio et al. 2024. Our warm-up is the same as the library's."""
    from schedulefree import AdamWScheduleFree
    optimizer = AdamWScheduleFree(groups, lr=config.learning_rate, betas=config.betas)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, Callable] = {"adamw": _adamw, "adamw8bit": _adamw8bit, "adafactor": _adafactor, "lion": _lion,
                                   "prodigy": _prodigy, "schedule_free": _schedule_free}
PACKAGES = {"adamw8bit": "bitsandbytes", "lion": "lion-pytorch", "prodigy": "prodigyopt", "schedule_free": "schedulefree"}


def make_optimizer(parameters: Mapping[str, nn.Parameter], config, modules: Modules | None = None) -> torch.optim.Optimizer:
    """The optimizer of `config` for parameters by canonical name, with one group per pair of learning rate and weight decay.

    The rate is `word_learning_rate` for new words, `text_learning_rate` in the text encoder, else `learning_rate`; times
    `lora_plus` for `up` (LoRA+, Hayou et al. 2024), times the factor in `block_rates` (which need `modules`, the model's
    `modules_of`). Weight decay applies to matrices, but not to biases, norms, magnitudes, new words and frozen blocks. Raises
    TrainError for a missing package, a block without trained parameters, LoRA+ without a LoRA, and Prodigy with several rates.
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
    """Parameter name -> learning rate, before the schedule."""
    paths = {name: name.rpartition(".")[0] for name in parameters}
    blocks: dict[str, float] = {}
    if config.block_rates:
        assert modules is not None
        trained = Modules(modules.names, {path: shape for path, shape in modules.shapes.items() if path in set(paths.values())})
        try:
            found = block_multipliers(",".join(config.block_rates), trained)
        except BlockWeightError as error:
            raise TrainError(f"block_rates is {config.block_rates!r}; of what is trained: {error}") from None
        blocks = found.table if found else {}
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
    """Inside the block the trained weights are those the optimizer would end with; afterwards they are restored bit for bit.

    Schedule-free takes its gradients at one point and ends at another; for all others this does nothing.
    """
    if not hasattr(optimizer, "train"):
        yield
        return
    kept = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    settle(optimizer)
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for p, value in kept:  # switching back rounds
                p.copy_(value)


def settle(optimizer: torch.optim.Optimizer) -> None:
    """Make the trained weights final after the last step, see `final_weights`."""
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
    """Factor of the learning rate at a step, from 0 on: linear warm-up, then one of SCHEDULES, which end at 0.

    cosine_restarts falls to 0 `cycles` times (Loshchilov and Hutter 2017), polynomial is (1 - progress)^power. Each
    restart of ReLoRA adds another warm-up.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return SCHEDULES[config.schedule](progress, config.cycles, config.power) * rewarm_factor(step, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of each group to its initial one times `factor`."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# ---- precision -------------------------------------------------------------------------------------------------------

def autocast(precision: str, device: torch.device):
    """Compute products in `precision` inside the block; weights, gradients and the loss stay in fp32."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


LOSS_SCALE, SCALE_STEPS = 65536.0, 2000  # a power of 2, so that scaling is exact


@torch.no_grad()
def unscale(parameters: Iterable[nn.Parameter], scale: Tensor) -> None:
    """Divide the gradients by the loss scale, in place."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, 1 / scale)


@torch.no_grad()
def next_loss_scale(state: Tensor, good: Tensor) -> Tensor:
    """[loss scale, good steps since it changed] after a step: halved after a bad one, doubled after 2000 good ones.

    The rule of torch.amp.GradScaler, Micikevicius et al. 2018, section 3.2. A step with a gradient that is not finite is bad.
    """
    scale, steps = state
    full = steps + 1 == SCALE_STEPS
    after = torch.where(full, torch.stack([scale * 2, steps * 0]), torch.stack([scale, steps + 1]))
    return torch.where(good, after, torch.stack([scale / 2, steps * 0]))


# ---- the step and after it ------------------------------------------------------------------------------------------

@torch.no_grad()
def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer step unless `bad` (a scalar) is true. Fused optimizers decide on the device, without a sync."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not bad:
        optimizer.step()


@torch.no_grad()
def limit_norms(layers: Mapping[str, LoRALayer], name: str, max_norm: float) -> None:
    """Scale the factors of adapter `name` in each LoRALayer, all alike, so that ΔW has a Frobenius norm of at most `max_norm`.

    This is kohya's scale_weight_norms; ΔW is taken before DoRA's magnitude. Weights within the limit keep their bits, and
    nothing is read from the device. Raises TrainError for a kind whose ΔW is not a product.
    """
    for path, layer in layers.items():
        if name not in layer.adapter_names:
            continue
        adapter = layer.adapter(name)
        if not adapter.is_product:
            raise TrainError(f"max_norm is {max_norm}, which does not go with kind {adapter.kind!r} (on {path}); "
                             f"allowed: {', '.join(sorted(kinds_with('is_product')))}")
        factors: list[Tensor] = [p for key, p in adapter.named_parameters() if key not in ("magnitude", "diff_b")]
        if not factors:  # a difference of the bias alone
            continue
        # Most kinds need only the shape of W: avoid an fp32 copy of a half-precision or quantised weight.
        W = layer.base_weight() if adapter.of_weight else torch.empty(tuple(layer.weight.shape), device="meta")
        ratio = (max_norm / torch.linalg.vector_norm(adapter.delta(W))).clamp(max=1)
        torch._foreach_mul_(factors, ratio ** (1 / len(factors)))


def ema_rate(decay: float, step: int) -> float:
    """1 - d of the moving average at a step; d rises to `decay`, so the random start fades quickly."""
    return 1 - min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], parameters: dict[str, nn.Parameter], rate: Tensor | float,
               bad: Tensor | None = None) -> None:
    """ema += rate (p - ema), in place, unless the step was bad."""
    if not ema:
        return
    rate = rate if bad is None else rate * (1 - bad.float())
    values, weights = list(ema.values()), [parameters[name].data for name in ema]
    # On a GPU in few kernels; on the CPU tensor by tensor, each of which stays in the processor's cache.
    each = [(values, weights)] if values[0].is_cuda else [([value], [weight]) for value, weight in zip(values, weights)]
    for some, new in each:
        away = torch._foreach_sub(new, some)
        torch._foreach_mul_(away, rate)
        torch._foreach_add_(some, away)
