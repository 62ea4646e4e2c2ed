"""Low-rank approximation of weight changes: truncated SVD of a matrix or of a product, rules for the rank, reports.

Legend: D a weight change as a matrix [out, in·k] (a convolution is flattened), R rank, σ singular values, largest first.
Nothing is clamped: the result is the best approximation of its rank (Eckart and Young 1936).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sd.adapters.weights import AdapterWeights, LoRAError

OVERSAMPLE, POWER = 10, 4  # Halko et al. 2011, section 4.5: extra columns of a sketch; iterations for slowly decaying σ


@dataclass(frozen=True)
class RankRule:
    """How many singular values to keep: exactly one of five rules, at least 1 and at most `max_rank`.

    `rank`: that many. `ratio`: σ >= σ1 / ratio. `threshold`: σ > threshold · σ1. `cumulative`: the fewest whose sum is that
    fraction of Σσ. `frobenius`: the fewest whose squares sum to that fraction of Σσ². Raises LoRAError.
    """

    rank: int | None = None
    ratio: float | None = None
    threshold: float | None = None
    cumulative: float | None = None
    frobenius: float | None = None
    max_rank: int | None = None

    def __post_init__(self):
        rules = ("rank", "ratio", "threshold", "cumulative", "frobenius")
        given = [f"{name} = {getattr(self, name)}" for name in rules if getattr(self, name) is not None]
        if len(given) != 1:
            raise LoRAError(f"give exactly one of {', '.join(rules)}; given: {', '.join(given) or 'none'}")
        if self.rank is not None and self.max_rank is not None:
            raise LoRAError(f"max_rank is {self.max_rank} and rank {self.rank}; max_rank limits the rules that choose a rank")
        for name, allowed, ok in (
            ("rank", "whole numbers from 1", lambda v: isinstance(v, int) and v >= 1),
            ("max_rank", "whole numbers from 1", lambda v: isinstance(v, int) and v >= 1),
            ("ratio", "finite numbers from 1", lambda v: 1 <= v < math.inf),
            ("threshold", "0 <= threshold < 1", lambda v: 0 <= v < 1),
            ("cumulative", "0 < cumulative <= 1", lambda v: 0 < v <= 1),
            ("frobenius", "0 < frobenius <= 1", lambda v: 0 < v <= 1),
        ):
            value = getattr(self, name)
            if value is not None and not ok(value):
                raise LoRAError(f"{name} is {value!r}; allowed: {allowed}")

    def __call__(self, sigmas: Tensor, energy: float | None = None) -> int:
        """The rank for singular values in falling order. `energy`: Σσ² over all, if `sigmas` are only the largest."""
        s = sigmas.double()
        if self.rank is not None:
            count = self.rank
        elif self.ratio is not None:
            count = int((s >= s[0] / self.ratio).sum())
        elif self.threshold is not None:
            count = int((s > s[0] * self.threshold).sum())
        else:
            sums = (s if self.frobenius is None else s.square()).cumsum(0)
            total = sums[-1] if energy is None else energy
            share = self.cumulative if self.frobenius is None else self.frobenius
            assert share is not None  # the last of the five rules
            count = 1 + int((sums < share * total).sum())
        return max(1, min(count, len(s), self.max_rank or len(s)))


class LowRankFactors(NamedTuple):
    """up [out, R] · down [R, in·k], balanced: each has √σ. `error`: ‖D - up · down‖ / ‖D‖, Frobenius."""

    up: Tensor
    down: Tensor
    norm: float  # ‖D‖
    error: float


def truncated_svd(D: Tensor, rule: RankRule, *, randomized: bool = False, seed: int = 0) -> LowRankFactors:
    """The best approximation of D of the rank that the rule chooses; `randomized`: nearly the best, in much less time.

    D [out, in·k] in fp32 or fp64. Randomized: Halko et al. 2011, algorithms 4.4 and 5.1, reproducible by seed; `error` is
    computed from the returned factors, not estimated. Raises LoRAError for values that are not finite, and for
    `cumulative` with `randomized`, which never computes all singular values.
    """
    if randomized and rule.cumulative is not None:
        raise LoRAError("the rule `cumulative` needs all singular values, which a randomized SVD does not give; "
                        "use `frobenius`, or randomized=False")
    norm = _norm(D)
    if not math.isfinite(norm):
        raise LoRAError("the weight change holds values that are not finite")
    wide = D if D.shape[0] <= D.shape[1] else D.T
    basis = _sketch(wide, rule, norm, seed) if randomized else None
    if basis is None:
        left, sigmas = _left_singular(wide)
        basis = left[:, :rule(sigmas)]
    basis = basis.to(D.dtype)
    P = basis.T @ wide  # ΣVᵀ
    root = torch.linalg.vector_norm(P, dim=1).sqrt()
    up, down = basis * root, P / root.where(root > 0, 1.0)[:, None]
    up, down = (up, down) if wide is D else (down.T, up.T)
    up, down = up.to(D.dtype).contiguous(), down.to(D.dtype).contiguous()
    return LowRankFactors(up, down, norm, _norm(torch.addmm(D, up, down, alpha=-1)) / norm if norm else 0.0)


def _left_singular(D: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors [m, m] and σ [m] of D [m, n], m <= n, in fp64."""
    if D.dtype == torch.float64:  # squaring would lose singular values below 1e-8 σ1
        left, sigmas, _ = torch.linalg.svd(torch.linalg.qr(D.T, mode="r").R.T)
        return left, sigmas
    # Squaring an fp32 matrix in fp64 keeps σ down to 3e-8 σ1, the matrix's own rounding: as fast as an fp32 SVD of the
    # triangular factor, and 30 times as accurate.
    D = D.double()
    squares, left = torch.linalg.eigh(D @ D.T)
    return left.flip(1), squares.clamp(min=0).flip(0).sqrt()


def _sketch(D: Tensor, rule: RankRule, norm: float, seed: int) -> Tensor | None:
    """A basis [m, R] of the leading left singular vectors of D [m, n], m <= n; None if an exact SVD is as cheap."""
    generator = torch.Generator().manual_seed(seed)
    limit = rule.rank or rule.max_rank
    size = OVERSAMPLE + (limit or 32)
    while 2 * size < D.shape[0]:
        Q = torch.linalg.qr(D @ torch.randn(D.shape[1], size, generator=generator, dtype=D.dtype).to(D.device)).Q
        for _ in range(POWER):
            Q = torch.linalg.qr(D @ torch.linalg.qr(D.T @ Q).Q).Q
        Q = torch.linalg.qr(Q.double()).Q  # orthonormal beyond fp32, so that the basis adds no error
        left, sigmas = _left_singular(Q.to(D.dtype).T @ D)
        rank = rule(sigmas, energy=norm ** 2)
        if rank <= size - OVERSAMPLE:
            return Q @ left[:, :rank]
        size = 2 * (size - OVERSAMPLE) + OVERSAMPLE
    return None


def svd_of_product(up: Tensor, down: Tensor, rule: RankRule) -> LowRankFactors:
    """The best approximation of up [out, R] · down [R, in·k] of the rank that the rule chooses; never forms the product.

    QR of both factors and the SVD of the small core between them, in fp64.
    """
    left, a = torch.linalg.qr(up.double())
    right, b = torch.linalg.qr(down.double().T)
    U, sigmas, Vh = torch.linalg.svd(a @ b.T, full_matrices=False)
    k, norm = rule(sigmas), float(torch.linalg.vector_norm(sigmas))
    root = sigmas[:k].sqrt()
    error = float(torch.linalg.vector_norm(sigmas[k:])) / norm if norm else 0.0
    new_up, new_down = (left @ U[:, :k]) * root, root[:, None] * (Vh[:k] @ right.T)
    return LowRankFactors(new_up.to(up.dtype), new_down.to(down.dtype), norm, error)


def approximate(D: Tensor, rule: RankRule, *, embedding: bool = False, dtype: torch.dtype | None = None,
                randomized: bool = False, seed: int = 0, **modifiers: Tensor) -> tuple[AdapterWeights, Approximation]:
    """The LoRA nearest to a weight change D in its layer's shape, of the rank that the rule chooses, and its error.

    `embedding`: D belongs to an embedding, whose factors are those of the transposed weight. `dtype`: of the factors; None:
    D's. `modifiers`: further tensors of the module. Raises as `truncated_svd` does.
    """
    matrix = D.T if embedding else D
    found = truncated_svd(matrix.flatten(1), rule, randomized=randomized, seed=seed)
    up, down = (factor.to(dtype or D.dtype) for factor in (found.up, found.down))
    weights = lora_weights(up, down, tuple(matrix.shape[1:]), 1.0, **modifiers)
    return weights, Approximation(weights.rank, found.norm, found.error)


def product_norm(up: Tensor, down: Tensor) -> float:
    """‖up · down‖ (Frobenius), without forming the product."""
    up, down = up.double(), down.double()
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def _norm(D: Tensor) -> float:
    return float(torch.linalg.vector_norm(D, dtype=torch.float64))


# ---- adapters as factors ---------------------------------------------------------------------------------------------

def flat_factors(weights: AdapterWeights, path: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A LoRA's up [out, R], down [R, in·k] in fp32 or fp64, and its (in, *k); a Tucker core is multiplied into down.

    alpha / R is not included. Raises LoRAError for a grouped convolution, whose product is block-diagonal.
    """
    tensors = {name: weights.tensors[name] for name in ("up", "down", "mid") if name in weights.tensors}
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
    up, down = (tensors[name].to(dtype) for name in ("up", "down"))
    if "mid" in tensors:  # ΔW = einsum('nmkl,in,mj->ijkl', mid, up, down)
        down = torch.einsum("nm...,mj->nj...", tensors["mid"].to(dtype), down.flatten(1))
    if up.shape[1] != down.shape[0]:
        raise LoRAError(f"{path}: up {list(up.shape)} and down {list(down.shape)} are of a grouped convolution, "
                        f"which the tools do not take apart")
    return up.flatten(1), down.flatten(1), tuple(down.shape[1:])


def lora_weights(up: Tensor, down: Tensor, inner: tuple[int, ...], scale: float = 1.0, **modifiers: Tensor) -> AdapterWeights:
    """up [out, R] · down [R, in·k] as AdapterWeights for a layer with inner shape (in, *k); alpha = scale · R."""
    rank, ones = down.shape[0], (1,) * (len(inner) - 1)
    tensors = {"down": down.reshape(rank, *inner), "up": up.reshape(-1, rank, *ones), **modifiers}
    return AdapterWeights("lora", tensors, alpha=scale * rank)


def named_seed(seed: int, *names) -> int:
    """A seed for one module, independent of the order in which modules are processed."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:7], "big")


def alpha_and_rank(weights: AdapterWeights) -> tuple[float, int]:
    """alpha and rank of a LoRA, which always has both."""
    alpha, rank = weights.alpha, weights.rank
    assert alpha is not None and rank is not None
    return alpha, rank


# ---- reports ---------------------------------------------------------------------------------------------------------

class Approximation(NamedTuple):
    """How well a module's result approximates the wanted ΔW. `rank` None: exact, in a kind without a rank."""

    rank: int | None
    norm: float  # ‖ΔW‖; 0 for a module that is copied unchanged
    error: float  # ‖ΔW - result‖ / ‖ΔW‖
    old_rank: int | None = None
    rounding: float = 0.0  # ‖rounding of the weights in their file‖ / ‖ΔW‖, if ΔW is a difference of files


@dataclass
class Report:
    """Path -> Approximation, and the errors over all modules."""

    modules: dict[str, Approximation] = field(default_factory=dict)
    stored: float = 0.0  # relative error of rounding the whole change to the file's dtype
    skipped: int | None = None  # tensors of the sources left out by `skip`

    def _overall(self, name: str) -> float:
        total = math.sqrt(sum(row.norm ** 2 for row in self.modules.values()))
        parts = math.sqrt(sum((getattr(row, name) * row.norm) ** 2 for row in self.modules.values()))
        return parts / total if total else 0.0

    @property
    def error(self) -> float:
        """Relative Frobenius error over all modules."""
        return self._overall("error")

    @property
    def rounding(self) -> float:
        return self._overall("rounding")

    @property
    def ranks(self) -> list[int]:
        return sorted({row.rank for row in self.modules.values() if row.rank is not None})

    def __str__(self) -> str:
        ranks = "-" if not self.ranks else f"{self.ranks[0]} to {self.ranks[-1]}" if len(self.ranks) > 1 else str(self.ranks[0])
        worst = max(self.modules, key=lambda path: self.modules[path].error, default=None)
        text = f"{len(self.modules)} modules, rank {ranks}, relative error {self.error:.2e}"
        if worst is not None and self.modules[worst].error:
            text += f" (largest {self.modules[worst].error:.2e} in {worst})"
        if self.stored:
            text += f", rounding to the file's dtype {self.stored:.2e}"
        return text if self.skipped is None else f"{text}; {self.skipped} tensors skipped as asked"


def store(state: Mapping[str, AdapterWeights], dtype: torch.dtype | Mapping[str, torch.dtype] | None,
          report: Report) -> dict[str, AdapterWeights]:
    """`state` rounded to the dtype of a file (or to one dtype per module); the error goes into `report.stored`.

    Raises LoRAError for a change that becomes 0 in the dtype.
    """
    rounded, lost, whole = {}, 0.0, 0.0
    for path, weights in state.items():
        kind = dtype.get(path) if isinstance(dtype, Mapping) else dtype
        cast = {n: t.to(kind) if kind is not None and t.is_floating_point() else t for n, t in weights.tensors.items()}
        rounded[path] = replace(weights, tensors=cast)
        before, after, apart = _norms(weights, rounded[path], path)
        if before and not after:
            raise LoRAError(f"{path}: its change, of norm {before:.1e}, is 0 in {str(kind).removeprefix('torch.')}; "
                            f"write a wider dtype")
        lost, whole = lost + apart ** 2, whole + before ** 2
    report.stored = math.sqrt(lost / whole) if whole else 0.0
    return rounded


def _norms(a: AdapterWeights, b: AdapterWeights, path: str) -> tuple[float, float, float]:
    """‖ΔWa‖, ‖ΔWb‖, ‖ΔWa - ΔWb‖ of a LoRA or a full difference; zeros for kinds that no tool makes."""
    if a.kind == "full" and "diff" in a.tensors:
        D, E = (w.tensors["diff"].double() for w in (a, b))
        return float(D.norm()), float(E.norm()), float((D - E).norm())
    if a.kind != "lora" or a.tensors.keys() == b.tensors.keys() and all(a.tensors[n] is b.tensors[n] for n in a.tensors):
        return 0.0, 0.0, 0.0
    (up, down, _), (v, e, _) = (flat_factors(w, path) for w in (a, b))
    up, down, v, e = (t.double() for t in (up, down, v, e))
    alpha, rank = alpha_and_rank(a)
    scale = abs(alpha / rank)
    both = product_norm(torch.cat([up, -v], 1), torch.cat([down, e]))
    return scale * product_norm(up, down), scale * product_norm(v, e), scale * both
