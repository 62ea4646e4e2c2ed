"""Resized LoRAs, and the rules for a rank, against numpy's SVD."""

import json

import numpy as np
import pytest
import torch

from sd.adapters.weights import AdapterWeights
from sd.config import TINY
from sd.files.tensors import read_tensors
from sd.lora import LoRAError
from sd.lora_files.header import lora_metadata
from sd.lora_files.write import write_lora
from sd.tools.base import base_of, load_lora_file
from sd.tools.decompose import RankRule, svd_of_product, truncated_svd
from sd.tools.resize import resize, resize_file


def matrix(sigmas, rows=20, columns=30, seed=0):
    """A matrix [rows, columns] with these singular values, in fp64."""
    rng, n = np.random.default_rng(seed), len(sigmas)
    U, V = (np.linalg.qr(rng.standard_normal((size, n)))[0] for size in (rows, columns))
    return U * np.asarray(sigmas, dtype=float) @ V.T


SIGMAS = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]  # Σσ = 15.75, Σσ² = 85.3125


@pytest.mark.parametrize("rule, rank", [
    ({"rank": 3}, 3), ({"rank": 9}, 6), ({"ratio": 1e9, "max_rank": 2}, 2),
    ({"ratio": 1}, 1), ({"ratio": 2}, 2), ({"ratio": 3.9}, 2), ({"ratio": 16}, 5), ({"ratio": 1e9}, 6),
    ({"threshold": 0.5}, 1), ({"threshold": 0.49}, 2), ({"threshold": 0.03}, 6), ({"threshold": 0}, 6),
    ({"cumulative": 8 / 15.75}, 1), ({"cumulative": 0.51}, 2), ({"cumulative": 14 / 15.75}, 3), ({"cumulative": 1}, 6),
    ({"frobenius": 64 / 85.3125}, 1), ({"frobenius": 0.76}, 2), ({"frobenius": 80 / 85.3125}, 2), ({"frobenius": 1}, 6),
    ({"frobenius": 1, "max_rank": 4}, 4), ({"ratio": 1e9, "max_rank": 4}, 4),
])
def test_a_rule_keeps_exactly_as_many_singular_values_as_it_says(rule, rank):
    assert RankRule(**rule)(torch.tensor(SIGMAS)) == rank


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("name, power", [("cumulative", 1), ("frobenius", 2)])
def test_a_share_takes_the_fewest_values_that_reach_it(name, power, share):
    s = np.sort(np.random.default_rng(3).exponential(size=40))[::-1] ** power
    fewest = next(k for k in range(1, 41) if s[:k].sum() >= share * s.sum())
    assert RankRule(**{name: share})(torch.from_numpy(s ** (1 / power))) == fewest


@pytest.mark.parametrize("rule", [{"rank": 4}, {"ratio": 2}, {"threshold": 0.1}, {"cumulative": 0.5}, {"frobenius": 0.5}])
def test_a_rule_keeps_at_least_one_value_also_of_nothing(rule):
    zeros = truncated_svd(torch.zeros(5, 7), RankRule(**rule))
    assert zeros.down.shape[0] >= 1 and not zeros.up.any() and not zeros.down.any() and zeros.error == 0
    assert RankRule(**rule)(torch.tensor([3.0])) == 1


@pytest.mark.parametrize("rule, message", [
    ({}, "give exactly one of rank, ratio, threshold, cumulative, frobenius; given: none"),
    ({"rank": 4, "ratio": 2}, "give exactly one of .*; given: rank = 4, ratio = 2"),
    ({"max_rank": 4}, "given: none"), ({"rank": 5, "max_rank": 2}, "max_rank is 2 and rank 5"),
    ({"rank": 0}, "rank is 0; allowed: whole numbers from 1"), ({"rank": 2.5}, "rank is 2.5"),
    ({"ratio": 0.5}, "ratio is 0.5"), ({"ratio": float("inf")}, "ratio is inf"), ({"threshold": 1}, "threshold is 1"),
    ({"cumulative": 0}, "cumulative is 0"), ({"frobenius": 1.1}, "frobenius is 1.1"),
    ({"frobenius": float("nan")}, "frobenius is nan"), ({"frobenius": 0.5, "max_rank": 0}, "max_rank is 0"),
])
def test_what_is_no_rule_is_refused(rule, message):
    with pytest.raises(LoRAError, match=message):
        resize({}, **rule)


# ---- the SVD ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-7)])
@pytest.mark.parametrize("shape", [(40, 40), (24, 90), (90, 24)])
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6])
def test_a_matrix_of_rank_r_comes_back(shape, dtype, tolerance, smallest):
    D = matrix(np.geomspace(1, smallest, 6), *shape)
    found = truncated_svd(torch.from_numpy(D).to(dtype), RankRule(rank=6))
    assert found.up.shape == (shape[0], 6) and found.down.shape == (6, shape[1]) and found.up.dtype == dtype
    error = np.linalg.norm(D - found.up.double().numpy() @ found.down.double().numpy()) / np.linalg.norm(D)
    assert error <= tolerance and abs(found.error - error) <= tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(60, 45), (45, 60), (30, 200)])
def test_a_truncated_svd_is_the_optimum_balanced(shape, dtype, tolerance):
    D = np.random.default_rng(1).standard_normal(shape)
    u, s, vh = np.linalg.svd(D, full_matrices=False)
    found = truncated_svd(torch.from_numpy(D).to(dtype), RankRule(rank=9))
    best = (u[:, :9] * s[:9]) @ vh[:9]
    assert np.linalg.norm(found.up.double().numpy() @ found.down.double().numpy() - best) <= tolerance * np.linalg.norm(best)
    assert found.error == pytest.approx(np.linalg.norm(s[9:]) / np.linalg.norm(s), rel=tolerance)
    assert found.norm == pytest.approx(np.linalg.norm(s), rel=tolerance)
    for sides in (found.up.norm(dim=0), found.down.norm(dim=1)):
        assert np.allclose(sides.double().numpy() ** 2, s[:9], rtol=100 * tolerance)


def spread(rows=150, columns=400):
    """Singular values that fall slowly, as those of a fine-tuning."""
    return matrix(1 / np.arange(1, 151) ** 0.7, rows, columns)


@pytest.mark.parametrize("turned", [False, True])
def test_a_randomized_svd_is_near_the_optimum_tells_its_error_and_repeats_itself(turned):
    D = spread().T if turned else spread()
    s = np.linalg.svd(D, compute_uv=False)
    found = truncated_svd(torch.from_numpy(D).float(), RankRule(rank=12), randomized=True, seed=3)
    error = np.linalg.norm(D - found.up.double().numpy() @ found.down.double().numpy()) / np.linalg.norm(D)
    best = np.linalg.norm(s[12:]) / np.linalg.norm(s)
    assert found.error == pytest.approx(error, rel=1e-5)
    assert best < error < 1.001 * best
    again = truncated_svd(torch.from_numpy(D).float(), RankRule(rank=12), randomized=True, seed=3)
    other = truncated_svd(torch.from_numpy(D).float(), RankRule(rank=12), randomized=True, seed=4)
    assert torch.equal(found.up, again.up) and torch.equal(found.down, again.down) and not torch.equal(found.up, other.up)


def test_a_randomized_svd_gives_a_matrix_of_rank_r_back():
    D = matrix(np.geomspace(1, 1e-3, 12), 150, 400)
    assert truncated_svd(torch.from_numpy(D).float(), RankRule(rank=12), randomized=True).error < 1e-6
    assert truncated_svd(torch.from_numpy(D), RankRule(rank=12), randomized=True).error < 1e-13


@pytest.mark.parametrize("rule", [{"threshold": 0.2}, {"frobenius": 0.9}, {"ratio": 8}, {"threshold": 0.2, "max_rank": 5},
                                  {"threshold": 0.06}])
def test_a_randomized_svd_finds_the_rank_that_the_exact_one_finds(rule):
    D = torch.from_numpy(spread())
    found = truncated_svd(D, RankRule(**rule), randomized=True)
    assert found.down.shape[0] == truncated_svd(D, RankRule(**rule)).down.shape[0] > 4


def test_a_share_of_the_sum_is_refused_where_not_all_singular_values_are_seen():
    with pytest.raises(LoRAError, match="`cumulative` needs all singular values"):
        truncated_svd(torch.ones(4, 4), RankRule(cumulative=0.5), randomized=True)


def test_a_change_with_nan_in_it_is_refused():
    with pytest.raises(LoRAError, match="not finite"):
        truncated_svd(torch.full((4, 4), float("nan")), RankRule(rank=1))


@pytest.mark.parametrize("shapes", [(20, 6, 30), (4, 6, 30), (20, 6, 5)])
def test_the_svd_of_a_product_is_that_of_its_matrix(shapes):
    out, rank, inner = shapes
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((out, rank)), rng.standard_normal((rank, inner))
    u, s, vh = np.linalg.svd(up @ down)
    found = svd_of_product(torch.from_numpy(up), torch.from_numpy(down), RankRule(rank=3))
    assert np.allclose(found.up.numpy() @ found.down.numpy(), (u[:, :3] * s[:3]) @ vh[:3], atol=1e-12)
    assert found.norm == pytest.approx(np.linalg.norm(s))
    assert found.error == pytest.approx(np.linalg.norm(s[3:]) / np.linalg.norm(s))


# ---- resize ----------------------------------------------------------------------------------------------------------

def lora(sigmas, alpha, rank=8, kernel=(), tucker=False, **modifiers):
    """A LoRA whose up · down has these singular values, hidden in `rank` unbalanced columns."""
    mix = np.random.default_rng(5).standard_normal((rank, rank)) * np.geomspace(1, 30, rank)
    full = np.pad(np.asarray(sigmas, dtype=float), (0, rank - len(sigmas)))
    U, V = (np.linalg.qr(np.random.default_rng(i).standard_normal((n, rank)))[0] for i, n in ((1, 20), (2, 27)))
    up, down = torch.from_numpy(U * full @ mix), torch.from_numpy(np.linalg.inv(mix) @ V.T)
    if tucker:
        rng = np.random.default_rng(7)
        tensors = {"down": rng.standard_normal((rank, 3, 1, 1)), "up": rng.standard_normal((20, rank, 1, 1)),
                   "mid": rng.standard_normal((rank, rank, 3, 3))}
        return AdapterWeights("lora", {name: torch.from_numpy(t) for name, t in tensors.items()}, alpha=alpha)
    inner = (27 // (np.prod(kernel, dtype=int)), *kernel)
    tensors = {"down": down.reshape(rank, *inner), "up": up.reshape(20, rank, *(1,) * len(kernel)), **modifiers}
    return AdapterWeights("lora", tensors, alpha=alpha)


def formula(weights):
    """alpha / R · up · down as a matrix."""
    t = {name: tensor.double().numpy() for name, tensor in weights.tensors.items()}
    rank = len(t["down"])
    if "mid" in t:
        product = np.einsum("nmkl,in,mj->ijkl", t["mid"], t["up"][..., 0, 0], t["down"][..., 0, 0]).reshape(20, -1)
    else:
        product = t["up"].reshape(-1, rank) @ t["down"].reshape(rank, -1)
    return product * weights.alpha / rank


@pytest.mark.parametrize("alpha", [8.0, 3.0, -2.0])
@pytest.mark.parametrize("form", [{}, {"kernel": (3, 3)}, {"tucker": True}], ids=str)
def test_resizing_gives_the_best_approximation_at_the_same_scale(form, alpha):
    weights = lora(SIGMAS, alpha, **form)
    resized, report = resize({"layer": weights}, rank=3)
    D, new = formula(weights), resized["layer"]
    u, s, vh = np.linalg.svd(D, full_matrices=False)
    assert np.allclose(formula(new), (u[:, :3] * s[:3]) @ vh[:3], atol=1e-12 * s[0])
    assert new.rank == 3 and new.alpha / 3 == pytest.approx(alpha / 8, rel=1e-15)
    row = report.modules["layer"]
    assert (row.old_rank, row.rank) == (8, 3) and row.norm == pytest.approx(np.linalg.norm(s))
    assert row.error == report.error == pytest.approx(np.linalg.norm(s[3:]) / np.linalg.norm(s))
    if form:
        assert new.tensors["down"].shape == (3, 3, 3, 3) and new.tensors["up"].shape == (20, 3, 1, 1)


@pytest.mark.parametrize("rule, rank", [({"ratio": 17}, 5), ({"threshold": 0.49}, 2), ({"cumulative": 0.88}, 3),
                                        ({"frobenius": 0.93}, 2), ({"frobenius": 0.9999999, "max_rank": 4}, 4)])
def test_each_rule_looks_at_the_change_not_at_the_factors(rule, rank):
    resized, _ = resize({"layer": lora(SIGMAS, 3.0)}, **rule)
    assert resized["layer"].rank == rank


def test_the_overall_error_is_that_of_all_modules_together():
    state = {"a": lora(SIGMAS, 3.0), "b": lora([100.0, 50.0, 30.0], 16.0), "c": lora([1.0], 8.0)}
    resized, report = resize(state, rank=2)
    lost = sum(np.linalg.norm(formula(state[path]) - formula(resized[path])) ** 2 for path in state)
    assert report.error == pytest.approx(np.sqrt(lost / sum(np.linalg.norm(formula(w)) ** 2 for w in state.values())))
    assert "3 modules, rank 2, relative error" in str(report) and "in b)" in str(report)


@pytest.mark.parametrize("rule", [{"rank": 8}, {"rank": 64}, {"ratio": 1e300}])
def test_a_rank_is_never_raised_and_what_keeps_its_rank_stays_as_it_is(rule):
    weights = lora(np.geomspace(8, 1, 8), 3.0, tucker="ratio" not in rule)
    resized, report = resize({"layer": weights}, **rule)
    assert resized["layer"] is weights and report.modules["layer"].rank == 8 and report.error == 0


def test_a_magnitude_and_biases_and_differences_stay_as_they_are():
    m, b, diff = torch.rand(20, 1), torch.rand(20), torch.rand(9)
    state = {"dora": lora(SIGMAS, 3.0, magnitude=m, diff_b=b), "norm": AdapterWeights("full", {"diff": diff, "diff_b": diff})}
    resized, report = resize(state, rank=2)
    assert resized["dora"].tensors["magnitude"] is m and resized["dora"].tensors["diff_b"] is b and resized["dora"].rank == 2
    assert resized["norm"] is state["norm"] and set(report.modules) == {"dora"}


def test_other_kinds_are_refused_by_name_or_left_as_they_are_on_request():
    state = {"a": lora(SIGMAS, 3.0), "b": AdapterWeights("loha", {"w1_a": torch.ones(4, 2)}, alpha=1.0)}
    with pytest.raises(LoRAError, match="^b is of the kind loha, which cannot be resized"):
        resize(state, rank=2)
    resized, _ = resize(state, rank=2, skip=True)
    assert resized["b"] is state["b"] and resized["a"].rank == 2


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_file_keeps_its_metadata_and_its_dtype(tmp_path, dtype):
    path, shape = "diffusion.mid_block.resnets.0.conv1", (64, 64, 3, 3)
    torch.manual_seed(0)
    tensors = {"down": torch.randn(8, *shape[1:]).half(), "up": torch.randn(64, 8, 1, 1).half()}
    weights = AdapterWeights("lora", tensors, alpha=3.0)
    told = {"ss_training_comment": "seven", "modelspec.title": "Seven"}
    write_lora(tmp_path / "a.safetensors", {path: weights}, base_of(TINY).modules, metadata=lora_metadata({}, TINY) | told)
    report = resize_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=5, dtype=dtype)
    file, _ = load_lora_file(tmp_path / "b.safetensors")
    assert file.metadata.items() >= told.items() and file.metadata["ss_network_dim"] == "5"
    assert json.loads(file.metadata["sdlora.modules"])[path][1] == 5
    written = read_tensors(tmp_path / "b.safetensors")
    assert {t.dtype for key, t in written.items() if "alpha" not in key} == {dtype or torch.float16}
    D = formula(weights)
    error = np.linalg.norm(formula(file.state[path]) - D) / np.linalg.norm(D)
    assert report.error == pytest.approx(error, rel=1e-5 if dtype else 1e-3)
