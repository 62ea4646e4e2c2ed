"""Merged LoRAs against Σ wᵢ ΔWᵢ in fp64, numpy's SVD and PEFT's functions on ΔW."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from sd.adapters.weights import AdapterWeights, LayerShape
from sd.config import TINY
from sd.files.tensors import read_tensors
from sd.lora import LoRAError, attach_state, load_lora_weights, use_adapters
from sd.lora_files.header import lora_metadata
from sd.lora_files.read import read_lora
from sd.lora_files.write import write_lora
from sd.model_loader import new_models, save_checkpoint
from sd.tools.base import base_of
from sd.tools.merge import METHODS, dare_mask, merge_lora_files, merge_loras
from tests.lora_files.cases import low_rank

SHAPES = {"linear": LayerShape((24, 20)), "point": LayerShape((12, 16, 1, 1)), "conv": LayerShape((12, 8, 3, 3)),
          "token_embedding": LayerShape((30, 10), embedding=True), "norm": LayerShape((14,))}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + sum(shape)), dtype=dtype)


def lora(path, rank, alpha, seed=0, dtype=torch.float64, flat=False, tucker=False):
    """A random LoRA for one of SHAPES. flat: a 1x1 convolution's factors as matrices."""
    shape = SHAPES[path]
    found = low_rank(shape.weight, rank, alpha, seed=10 * seed, embedding=shape.embedding, tucker=tucker)
    return replace(found, tensors={name: (t.flatten(1) if flat else t).to(dtype) for name, t in found.tensors.items()})


def formula(path, weights):
    """ΔW in fp64, by the definition of each form."""
    if weights is None:
        return np.zeros(SHAPES[path].weight)
    t = {name: tensor.double().numpy() for name, tensor in weights.tensors.items()}
    if weights.kind == "full":
        return t["diff"]
    rank = t["down"].shape[0]
    up, down = t["up"].reshape(-1, rank), t["down"].reshape(rank, -1)
    if "mid" in t:
        return np.einsum("nmkl,in,mj->ijkl", t["mid"], up, down) * weights.alpha / rank
    product = up @ down * weights.alpha / rank
    return product.T if SHAPES[path].embedding else product.reshape(SHAPES[path].weight)


def error_of(weights, expected, path):
    return np.linalg.norm(formula(path, weights) - expected) / np.linalg.norm(expected)


def best_error(D, rank):
    """That of the best approximation, by Eckart and Young's theorem."""
    s = np.linalg.svd(D.reshape(len(D), -1), compute_uv=False)
    return np.linalg.norm(s[rank:]) / np.linalg.norm(s)


def assert_is(weights, expected, path, tolerance):
    assert error_of(weights, expected, path) <= tolerance


def two_files(dtype=torch.float64):
    """Mixed ranks, alpha != rank, modules in only one file, both forms of a 1x1 convolution, a Tucker core."""
    first = {"linear": lora("linear", 3, 1.5, 1, dtype), "point": lora("point", 2, 5.0, 2, dtype, flat=True),
             "conv": lora("conv", 4, 2.0, 3, dtype, tucker=True), "token_embedding": lora("token_embedding", 2, 3.0, 4, dtype)}
    second = {"linear": lora("linear", 5, 8.0, 11, dtype), "point": lora("point", 3, 0.5, 12, dtype),
              "conv": lora("conv", 2, 7.0, 13, dtype)}
    return first, second


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4), (0.0, 2.0)])
@pytest.mark.parametrize("method", ["concat", "full"])
def test_concat_and_full_are_the_weighted_sum_of_the_changes(method, weights):
    files = two_files()
    merged, report = merge_loras(files, weights, method, shapes=SHAPES)
    named = set().union(*(file for file, w in zip(files, weights) if w))
    assert set(merged) == named and report.error == 0
    for path in named:
        expected = sum(w * formula(path, file.get(path)) for file, w in zip(files, weights))
        assert_is(merged[path], expected, path, 1e-14)
        assert report.modules[path].norm == pytest.approx(np.linalg.norm(expected), rel=1e-12)
        if method == "concat":
            ranks = [file[path].rank for file, w in zip(files, weights) if w and path in file]
            assert merged[path].alpha == merged[path].rank == sum(ranks)


@pytest.mark.parametrize("given", [SHAPES, None])
def test_concat_keeps_the_layers_own_form_of_a_convolution(given):
    merged, _ = merge_loras(two_files(), (1, 1), shapes=given)
    assert merged["point"].tensors["down"].shape == (5, 16, 1, 1) and merged["point"].tensors["up"].shape == (12, 5, 1, 1)
    assert merged["conv"].tensors["down"].shape == (6, 8, 3, 3) and "mid" not in merged["conv"].tensors
    both_flat = {"point": lora("point", 2, 1.0, flat=True)}
    merged, _ = merge_loras([both_flat, both_flat], (1, 1), shapes=given)
    assert merged["point"].tensors["down"].dim() == (2 if given is None else 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision_are_summed_in_fp32(dtype):
    files = two_files(dtype)
    merged, _ = merge_loras(files, (0.7, -0.4))
    for path, weights in merged.items():
        assert {t.dtype for t in weights.tensors.values()} == {torch.float32}
        assert_is(weights, 0.7 * formula(path, files[0][path]) - 0.4 * formula(path, files[1].get(path)), path, 1e-6)


def test_a_weight_may_differ_from_module_to_module():
    files = two_files()
    table = {"linear": 0.5, "point": 0.0, "conv": 0.0, "token_embedding": -1.0}
    merged, _ = merge_loras(files, (table, {path: 2.0 if path == "conv" else 0.0 for path in files[1]}))
    assert set(merged) == {"linear", "conv", "token_embedding"}
    assert_is(merged["linear"], 0.5 * formula("linear", files[0]["linear"]), "linear", 1e-14)
    assert_is(merged["conv"], 2 * formula("conv", files[1]["conv"]), "conv", 1e-14)


@pytest.mark.parametrize("method", ["concat", "full"])
def test_one_file_with_weight_1_comes_back(method):
    first, _ = two_files()
    for path, weights in merge_loras([first], [1.0], method, shapes=SHAPES)[0].items():
        assert_is(weights, formula(path, first[path]), path, 1e-14)


def full(path, seed, bias=None):
    tensors = {"diff": random(*SHAPES[path].weight, seed=seed)} | ({} if bias is None else {"diff_b": bias})
    return AdapterWeights("full", tensors)


@pytest.mark.parametrize("method", ["concat", "svd", "full"])
def test_differences_of_norms_and_biases_add_up_exactly(method):
    b1, b2, b3 = random(14, seed=5), random(14, seed=6), random(24, seed=7)
    files = [{"norm": full("norm", 1, b1), "linear": AdapterWeights("full", {"diff_b": b3})},
             {"norm": full("norm", 2, b2), "linear": lora("linear", 2, 3.0)}]
    merged, _ = merge_loras(files, (0.5, -2.0), method, rank=2 if method == "svd" else None, shapes=SHAPES)
    assert torch.equal(merged["norm"].tensors["diff"],
                       0.5 * files[0]["norm"].tensors["diff"] - 2.0 * files[1]["norm"].tensors["diff"])
    assert torch.equal(merged["norm"].tensors["diff_b"], 0.5 * b1 - 2.0 * b2)
    assert torch.equal(merged["linear"].tensors["diff_b"], 0.5 * b3)
    assert_is(merged["linear"], -2 * formula("linear", files[1]["linear"]), "linear", 1e-14)


def test_biases_alone_stay_biases_alone():
    files = [{"linear": AdapterWeights("full", {"diff_b": random(24, seed=i)})} for i in range(2)]
    merged, report = merge_loras(files, (1, 2))
    assert merged["linear"].kind == "full" and merged["linear"].tensors.keys() == {"diff_b"} and not report.modules


W = random(24, 20, seed=99)


def dora(seed):
    weights = lora("linear", 3, 1.5, seed)
    weights.tensors["magnitude"] = random(24, 1, seed=seed + 3).abs() + 0.5
    return weights


def loha(seed):
    tensors = {"w1_a": random(24, 2, seed=seed), "w1_b": random(2, 20, seed=seed + 1), "w2_a": random(24, 2, seed=seed + 2),
               "w2_b": random(2, 20, seed=seed + 3)}
    return AdapterWeights("loha", tensors, alpha=3.0)


def effective(weights):
    """W' - W of a DoRA and a LoHa by their papers' formulas, in fp64."""
    if weights.kind == "loha":
        t = weights.tensors
        return ((t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"]) * (3.0 / 2)).numpy()
    changed = W.numpy() + formula("linear", weights)
    return weights.tensors["magnitude"].numpy() * changed / np.linalg.norm(changed, axis=1, keepdims=True) - W.numpy()


@pytest.mark.parametrize("make", [dora, loha])
def test_kinds_that_concat_cannot_hold_are_named_and_the_method_full_holds_them(make):
    files = [{"linear": make(1)}, {"linear": lora("linear", 4, 2.0, 21)}]
    with pytest.raises(LoRAError, match=r"^linear: concat cannot add .*(loha|DoRA).*; the method full can, .*svd"):
        merge_loras(files, (1, 1))
    expected = 0.6 * effective(files[0]["linear"]) - 0.3 * formula("linear", files[1]["linear"])
    merged, _ = merge_loras(files, (0.6, -0.3), "full", shapes=SHAPES, base_weight=lambda path: W)
    assert_is(merged["linear"], expected, "linear", 1e-6)
    merged, report = merge_loras(files, (0.6, -0.3), "svd", rank=7, shapes=SHAPES, base_weight=lambda path: W)
    best = best_error(expected, 7)
    assert error_of(merged["linear"], expected, "linear") == pytest.approx(best, rel=1e-4)
    assert report.error == pytest.approx(best, rel=1e-4)


def test_a_module_that_one_file_alone_changes_keeps_its_kind_at_weight_1():
    adapter = dora(1)
    merged, _ = merge_loras([{"linear": adapter}, {"conv": lora("conv", 2, 1.0)}], (1, 0.5))
    assert merged["linear"] == adapter
    with pytest.raises(LoRAError, match="DoRA"):
        merge_loras([{"linear": adapter}], [0.5])


def test_the_base_weight_is_asked_for_only_where_the_change_depends_on_it():
    asked = []
    files = [{"linear": loha(1)}, {"linear": lora("linear", 2, 1.0)}]
    merge_loras(files, (1, 1), "full", shapes=SHAPES, base_weight=asked.append)
    assert not asked
    with pytest.raises(LoRAError, match="linear: the ΔW of lora with a magnitude .* depends on the base weight"):
        merge_loras([{"linear": dora(1)}], [0.5], "full", shapes=SHAPES)


@pytest.mark.parametrize("path", ["linear", "conv", "point"])
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_svd_is_the_best_approximation_of_the_sum(path, rank):
    files = two_files()
    merged, report = merge_loras(files, (0.7, -0.4), "svd", rank=rank)
    expected = 0.7 * formula(path, files[0][path]) - 0.4 * formula(path, files[1][path])
    u, s, vh = np.linalg.svd(expected.reshape(len(expected), -1), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert_is(merged[path], best.reshape(expected.shape), path, 1e-12)
    row = report.modules[path]
    assert row.rank == merged[path].rank == min(rank, files[0][path].rank + files[1][path].rank, *best.shape)
    assert row.error == pytest.approx(np.linalg.norm(s[rank:]) / np.linalg.norm(s), abs=1e-12)
    up, down = (merged[path].tensors[name].flatten(1) for name in ("up", "down"))
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1))  # balanced


def changes(path, files, dtype=torch.float32):
    return [torch.from_numpy(formula(path, file[path])).to(dtype) for file in files]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 1.2, 0.4)])
@pytest.mark.parametrize("method, peer", [("ties", merge_utils.ties), ("magnitude", merge_utils.magnitude_prune)])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_and_magnitude_are_those_of_peft_on_the_changes(method, peer, density, weights):
    files = [{path: lora(path, 3, 2.0, seed) for path in ("linear", "conv", "token_embedding")} for seed in (1, 11, 21)]
    merged, _ = merge_loras(files, weights, method, density=density, shapes=SHAPES)
    for path in files[0]:
        expected = peer(changes(path, files, torch.float64), torch.tensor(weights, dtype=torch.float64), density).numpy()
        assert merged[path].kind == "full"
        assert_is(merged[path], expected, path, 1e-12)


def test_a_negative_weight_in_ties_is_the_turned_change():
    files = [{"linear": lora("linear", 3, 2.0, seed)} for seed in (1, 11)]
    first, second = changes("linear", files, torch.float64)
    expected = merge_utils.ties([first, -second], torch.tensor([0.7, 0.4], dtype=torch.float64), 0.5).numpy()
    assert_is(merge_loras(files, (0.7, -0.4), "ties", shapes=SHAPES)[0]["linear"], expected, "linear", 1e-12)


def test_dare_is_its_formula_with_its_masks():
    files = two_files()
    merged, _ = merge_loras(files, (0.7, -0.4), "dare", density=0.3, seed=5, shapes=SHAPES)
    for path in files[1]:
        masks = [dare_mask(SHAPES[path].weight, 0.3, 5, i, path, "weight").double().numpy() for i in range(2)]
        first, second = (formula(path, file[path]) * mask / 0.3 for file, mask in zip(files, masks))
        assert_is(merged[path], 0.7 * first - 0.4 * second, path, 1e-12)


def test_dare_keeps_the_mean_and_drops_by_density():
    masks = torch.stack([dare_mask((50, 40), 0.3, seed, 0, "linear", "weight") for seed in range(200)]).double()
    assert masks.mean().item() == pytest.approx(0.3, abs=0.003)  # 400,000 draws: 4 standard deviations
    assert masks.mean(0).std().item() == pytest.approx((0.3 * 0.7 / 200) ** 0.5, rel=0.1)  # seeds draw independently
    ones = AdapterWeights("full", {"diff": torch.ones(24, 20)})
    mean = np.mean([formula("linear", merge_loras([{"linear": ones}], [1], "dare", density=0.5, seed=s)[0]["linear"])
                    for s in range(400)], axis=0)
    off = np.sqrt(np.mean((mean - 1) ** 2))  # of 480 values, each the mean of 400 draws of 0 or 2
    assert off == pytest.approx(1 / 20, rel=4 * (2 / 480) ** 0.5 / 2)


def test_dare_does_not_depend_on_the_order_or_number_of_modules():
    first, second = two_files()
    options = {"density": 0.3, "seed": 5, "shapes": SHAPES}
    whole, _ = merge_loras([first, second], (1, 1), "dare", **options)
    turned, _ = merge_loras([dict(reversed(f.items())) for f in (first, second)], (1, 1), "dare", **options)
    alone, _ = merge_loras([{"conv": f["conv"]} for f in (first, second)], (1, 1), "dare", **options)
    for other in (turned, alone):
        assert all(torch.equal(other[path].tensors["diff"], whole[path].tensors["diff"]) for path in other)
    other_seed, _ = merge_loras([first, second], (1, 1), "dare", **options | {"seed": 6})
    assert not torch.equal(other_seed["conv"].tensors["diff"], whole["conv"].tensors["diff"])


@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_density_1_is_the_plain_sum(method):
    files = two_files()
    merged, _ = merge_loras(files, (0.7, -0.4), method, density=1, shapes=SHAPES)
    for path, weights in merged.items():
        assert_is(weights, 0.7 * formula(path, files[0].get(path)) - 0.4 * formula(path, files[1].get(path)), path, 1e-14)


@pytest.mark.parametrize("randomized", [False, True])
@pytest.mark.parametrize("method", ["ties", "dare", "magnitude"])
def test_a_rank_makes_the_best_lora_of_the_pruned_sum(method, randomized):
    files = two_files()
    whole, _ = merge_loras(files, (1, 1), method, seed=3, shapes=SHAPES)
    merged, report = merge_loras(files, (1, 1), method, seed=3, rank=4, shapes=SHAPES, randomized=randomized)
    for path, weights in merged.items():
        D = formula(path, whole[path])
        assert weights.rank == weights.alpha == 4
        assert error_of(weights, D, path) == pytest.approx(best_error(D, 4), rel=1e-6)
        assert report.modules[path].error == pytest.approx(best_error(D, 4), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_no_argument_is_written_to(method):
    files, same = two_files(), two_files()
    merge_loras(files, (0.7, -0.4), method, rank=2 if method == "svd" else None, shapes=SHAPES)
    for file, before in zip(files, same):
        for path, weights in file.items():
            assert all(torch.equal(t, before[path].tensors[name]) for name, t in weights.tensors.items())


@pytest.mark.parametrize("weights, options, message", [
    ((1,), {}, "2 LoRAs are given, but 1 weights"),
    ((0, 0), {}, "nothing to merge: every weight is 0"),
    ((1, float("nan")), {}, "a weight of the merge is nan"),
    ((1, 1), {"method": "sum"}, "the method of merging is 'sum'; allowed: concat, svd, full, ties, dare, magnitude"),
    ((1, 1), {"method": "svd"}, "the method svd needs a rank"),
    ((1, 1), {"method": "svd", "rank": 0}, "rank is 0; allowed: whole numbers from 1"),
    ((1, 1), {"rank": 4}, "the method concat is exact and takes no rank"),
    ((1, 1), {"method": "ties", "density": 0}, "density is 0; allowed: 0 < density <= 1"),
    ((1, 1), {"method": "ties"}, "linear: the method ties needs the shape of the layer"),
])
def test_what_cannot_be_merged_as_asked_is_refused(weights, options, message):
    with pytest.raises(LoRAError, match=message):
        merge_loras(two_files(), weights, **options)


@pytest.mark.parametrize("method", ["concat", "full"])
def test_files_for_different_models_are_refused(method):
    other = AdapterWeights("lora", {"down": random(2, 18), "up": random(24, 2)}, alpha=2.0)
    with pytest.raises(LoRAError, match=r"linear: changes of the shapes \[24, 18\] and \[24, 20\] meet"):
        merge_loras([{"linear": other}, two_files()[0]], (1, 1), method, shapes=SHAPES)


def grouped(groups, rank, alpha, seed=0):
    down, up = random(rank, 12 // groups, 3, seed=seed), random(24, rank // groups, 1, seed=seed + 1)
    return {"conv": AdapterWeights("lora", {"down": down, "up": up}, alpha=alpha)}


def blocks(state, groups):
    """ΔW of a grouped convolution in fp64, each group by itself."""
    weights = state["conv"]
    up, down = (np.split(weights.tensors[name].double().numpy(), groups) for name in ("up", "down"))
    products = [u[:, :, 0] @ d.reshape(len(d), -1) for u, d in zip(up, down)]
    return np.concatenate(products).reshape(24, -1, 3) * weights.alpha / weights.rank


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("groups", [2, 3, 12])
def test_concat_and_full_sum_a_grouped_convolution_group_by_group(groups, given):
    shapes = {"conv": LayerShape((24, 12 // groups, 3), groups=groups)}
    files = grouped(groups, groups, 5.0, 1), grouped(groups, 2 * groups, 3.0, 2)
    expected = 0.7 * blocks(files[0], groups) - 0.4 * blocks(files[1], groups)
    merged, report = merge_loras(files, (0.7, -0.4), shapes=shapes if given else None)
    assert merged["conv"].rank == merged["conv"].alpha == 3 * groups and report.error == 0
    assert np.abs(blocks(merged, groups) - expected).max() < 1e-14 * np.abs(expected).max()
    assert report.modules["conv"].norm == pytest.approx(np.linalg.norm(expected), rel=1e-12)
    conv = torch.nn.Conv1d(12, 24, 3, groups=groups).double()
    x = random(2, 12, 5)
    base = conv(x)
    attach_state(conv, {"layer": merged["conv"]}, "merged")
    change = torch.nn.functional.conv1d(x, torch.from_numpy(expected), groups=groups)
    assert torch.allclose(conv(x) - base, change, rtol=1e-5, atol=1e-4)
    if given:
        full, _ = merge_loras(files, (0.7, -0.4), "full", shapes=shapes)
        assert np.allclose(full["conv"].tensors["diff"].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "ties"])
def test_a_rank_for_a_grouped_convolution_is_refused(method):
    shapes = {"conv": LayerShape((24, 6, 3), groups=2)}
    with pytest.raises(LoRAError, match="conv: no rank is chosen for a convolution of 2 groups; the methods concat and full"):
        merge_loras([grouped(2, 4, 2.0)] * 2, (1, 1), method, rank=2, shapes=shapes)


def test_what_is_no_grouped_convolution_is_not_taken_for_one():
    with pytest.raises(LoRAError, match="conv: LoRAs of 2 and 3 groups meet"):
        merge_loras([{"conv": AdapterWeights("lora", {"down": random(6, 4, 3), "up": random(24, 6 // g, 1)}, alpha=2.0)}
                     for g in (2, 3)], (1, 1))
    half = {"linear": AdapterWeights("lora", {"down": random(4, 20), "up": random(24, 2)}, alpha=2.0)}
    with pytest.raises(LoRAError, match=r"linear: up \[24, 2\] and down \[4, 20\]"):
        merge_loras([half, half], (1, 1))


# ---- files -----------------------------------------------------------------------------------------------------------

def tiny_state(seed, rank, alpha, dtype=torch.float32):
    """A LoRA on linear layers and convolutions of both networks of TINY."""
    layers = {path: shape for path, shape in base_of(TINY).layers.items() if len(shape.weight) > 1
              and path.startswith(("clip.layers", "diffusion.")) and not path.endswith(("conv_in", "conv_out"))}
    state = {}
    for i, (path, shape) in enumerate(layers.items()):
        out, *inner = shape.weight
        ones = (1,) * (len(inner) - 1)
        tensors = {"down": random(rank, *inner, seed=seed + i, dtype=dtype) * shape.fan_in ** -0.5,
                   "up": random(out, rank, *ones, seed=seed + i + 1, dtype=dtype) * 0.1}
        state[path] = AdapterWeights("lora", tensors, alpha=alpha)
    return state


def output(models):
    with torch.no_grad():
        context = models["clip"](torch.arange(77)[None])
        return models["diffusion"](random(1, 4, 8, 8, dtype=torch.float32), torch.tensor([400]), context)


@pytest.mark.parametrize("blocks", [None, {"text_encoder": 0.5, "mid_block": 0}])
def test_a_merged_file_does_what_its_sources_do_together(tmp_path, blocks):
    modules, models = base_of(TINY).modules, new_models(TINY)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file, state in zip(files, (tiny_state(1, 2, 3.0), tiny_state(500, 4, 2.0))):
        write_lora(file, state, modules, metadata=lora_metadata(state, TINY))
    chosen = {} if blocks is None else {files[0]: blocks}
    report = merge_lora_files(dict(zip(files, (0.7, -0.4))), tmp_path / "merged.safetensors", block_weights=chosen)
    assert report.error == 0 and set(report.ranks) <= {4, 6}
    plain = output(models)
    load_lora_weights(models, tmp_path / "merged.safetensors", "merged")
    merged = output(models)
    for name, file in zip("ab", files):
        load_lora_weights(models, file, name, block_weights=chosen.get(file))
    with use_adapters(models, {"a": 0.7, "b": -0.4}):
        together = output(models)
    assert (merged - together).abs().max() <= 1e-5 * together.abs().max()
    assert (plain - together).abs().max() > 1e-2 * together.abs().max()


def flat(weights):
    """ΔW of a LoRA as a matrix in fp64."""
    up, down = (weights.tensors[name].double().flatten(1).numpy() for name in ("up", "down"))
    return up @ down * weights.alpha / weights.rank


def test_the_header_of_a_merge_is_true_of_all_its_sources(tmp_path):
    modules, files = base_of(TINY).modules, []
    for i, words in enumerate(("sks dog, oil", "oil, cat")):
        (tmp_path / str(i)).mkdir()
        files.append(tmp_path / str(i) / "x.safetensors")
        header = {"ss_sd_model_name": "base", "ss_seed": str(i), "ss_steps": "5", "modelspec.trigger_phrase": words}
        write_lora(files[-1], tiny_state(i, 2, 3.0), modules, metadata=lora_metadata({}, TINY) | header)
    merge_lora_files({files[0]: 1.0, files[1]: -0.5}, tmp_path / "both.safetensors")
    found = read_tensors(tmp_path / "both.safetensors").metadata
    assert found["ss_sd_model_name"] == "base" and found["modelspec.trigger_phrase"] == "sks dog, oil, cat"
    assert "ss_steps" not in found and "ss_seed" not in found and found["ss_network_dim"] == "4"
    weights = [["x.safetensors", 1.0], ["x.safetensors", -0.5]]
    assert json.loads(found["sdlora.merged"]) == {"method": "concat", "weights": weights}
    merge_lora_files({files[0]: 1.0}, tmp_path / "one.safetensors")
    found = read_tensors(tmp_path / "one.safetensors").metadata
    assert (found["ss_seed"], found["ss_steps"]) == ("0", "5")


@pytest.mark.parametrize("weight, dtype", [(1.0, torch.float16), (1e-6, torch.float16), (0.3, torch.bfloat16)])
def test_what_the_dtype_of_the_file_loses_is_told_and_true(tmp_path, weight, dtype):
    state, file, out = tiny_state(0, 2, 3.0), tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    write_lora(file, state, base_of(TINY).modules, metadata=lora_metadata(state, TINY))
    report = merge_lora_files({file: weight}, out, dtype=dtype)
    written, lost, whole = read_lora(out, base_of(TINY).modules).state, 0.0, 0.0
    for path, weights in state.items():
        expected = weight * flat(weights)
        lost += np.square(flat(written[path]) - expected).sum()
        whole += np.square(expected).sum()
    assert report.error == 0 and report.stored == pytest.approx((lost / whole) ** 0.5, rel=1e-3) and report.stored > 1e-5
    assert f"rounding to the file's dtype {report.stored:.2e}" in str(report)
    with pytest.raises(LoRAError, match="is 0 in float16; write a wider dtype"):
        merge_lora_files({file: 1e-12}, out, dtype=torch.float16)
    with pytest.raises(LoRAError, match="block weights are given for 'nosuch'"):
        merge_lora_files({file: 1.0}, out, block_weights={"nosuch": {"mid_block": 0}})


def test_dora_files_are_merged_with_the_base_that_they_depend_on(tmp_path):
    models, state = new_models(TINY), tiny_state(1, 2, 3.0)
    save_checkpoint(models, tmp_path / "base.safetensors")
    for weights in state.values():
        out, _, *ones = weights.tensors["up"].shape
        weights.tensors["magnitude"] = random(out, 1, *ones, dtype=torch.float32).abs() + 0.5
    for name in "ab":
        write_lora(tmp_path / f"{name}.safetensors", state, base_of(TINY).modules, metadata=lora_metadata(state, TINY))
    chosen = {tmp_path / "a.safetensors": 0.7, tmp_path / "b.safetensors": -0.4}
    with pytest.raises(LoRAError, match="depends on the base weight"):
        merge_lora_files(chosen, tmp_path / "merged.safetensors", method="full")
    merge_lora_files(chosen, tmp_path / "merged.safetensors", method="full", base=tmp_path / "base.safetensors")
    plain = output(models)
    load_lora_weights(models, tmp_path / "merged.safetensors", "merged")
    load_lora_weights(models, tmp_path / "a.safetensors", "a", 0.3)
    with use_adapters(models, {"merged": 1.0}):
        merged = output(models)
    with use_adapters(models, {"a": 0.3}):
        expected = output(models)
    assert (merged - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
