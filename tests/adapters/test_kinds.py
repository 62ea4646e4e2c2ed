"""Every kind of adapter against fp64 formulas, numpy, and LyCORIS' own forward; modifiers and block multipliers."""

import copy
import itertools
import math
from dataclasses import replace

import lycoris.modules as peers
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from lycoris.functional.general import factorization as lycoris_factorization
from lycoris.functional.general import power2factorization

from sd.adapters.layers import as_lora_layer
from sd.adapters.lycoris import factorization
from sd.adapters.weights import AdapterWeights, LayerShape
from sd.lora import (
    KINDS,
    LoRAError,
    LoRAFormatError,
    active_multipliers,
    apply_lora_to_model,
    checkpoint,
    get_lora_parameters,
    lora_layers,
    merge,
    merge_lora_weights,
    remove_lora,
    set_adapters,
    unmerge,
    use_adapters,
    use_rows,
)

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (4, 5, 12)),
    "conv1x1": (lambda: nn.Conv2d(12, 8, 1), (4, 12, 5, 6)),
    "conv3x3": (lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1), (4, 12, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(12, 8, 3, padding=1), (4, 12, 7)),
    "conv3d": (lambda: nn.Conv3d(12, 8, (1, 3, 3)), (4, 12, 2, 5, 4)),
    "grouped": (lambda: nn.Conv2d(12, 8, 3, padding=1, groups=2), (4, 12, 7, 6)),
}
R = 3
ALPHA = 4.5  # not the rank


def random(*shape, seed=0, scale=0.5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape) + len(shape))) * scale


def layer_and_input(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return as_lora_layer(make()), torch.randn(shape)


def sizes(layer):
    """out, in as the weight has it, [kernel], their product in · k."""
    out, inner, *kernel = layer.weight.shape
    return out, inner, kernel, inner * math.prod(kernel)


# ---- tensors of each kind in canonical form --------------------------------------------------------------------------

def lora(layer):
    out, inner, k, _ = sizes(layer)
    return dict(down=random(4, inner, *k), up=random(out, 4 // getattr(layer, "groups", 1), *[1] * len(k))), ALPHA


def tucker_lora(layer):
    out, inner, k, _ = sizes(layer)
    ones = [1] * len(k)
    return dict(down=random(R, inner, *ones), up=random(out, R, *ones), mid=random(R, R, *k)), ALPHA


def full(layer):
    return dict(diff=random(*layer.weight.shape), diff_b=random(len(layer.weight))), None


def bias_alone(layer):
    return dict(diff_b=random(len(layer.weight))), None


def loha(layer):
    out, _, _, flat = sizes(layer)
    return dict(w1_a=random(out, R), w1_b=random(R, flat), w2_a=random(out, R, seed=1), w2_b=random(R, flat, seed=1)), ALPHA


def tucker_loha(layer):
    out, inner, k, _ = sizes(layer)
    return {f"{n}{half}{side}": random(*shape, seed=half) for half in (1, 2) for n, side, shape in (
        ("t", "", (R, R, *k)), ("w", "_a", (R, out)), ("w", "_b", (R, inner)))}, ALPHA


def lokr(whole1, whole2, tucker=False):
    def make(layer):
        (out, inner, k, _), (a, c) = sizes(layer), (2, 3)
        b, d = out // a, inner // c
        tensors = dict(w1=random(a, c)) if whole1 else dict(w1_a=random(a, R), w1_b=random(R, c))
        if whole2:
            tensors["w2"] = random(b, d, *k)
        elif tucker:
            tensors |= dict(w2_a=random(R, b), w2_b=random(R, d), t2=random(R, R, *k))
        else:
            tensors |= dict(w2_a=random(b, R), w2_b=random(R, d * math.prod(k)))
        return tensors, None if whole1 and whole2 else ALPHA
    return make


def ia3(on_input):
    def make(layer):
        n, ones = layer.weight.shape[on_input], [1] * (layer.weight.dim() - 2)
        return dict(weight=random(1, n, *ones) if ones else random(n), on_input=torch.tensor(on_input)), None
    return make


def glora(layer):
    out, inner, k, _ = sizes(layer)
    ones = [1] * len(k)
    return dict(a1=random(inner, R, *ones), a2=random(R, inner, *ones, seed=1), b1=random(out, R, *ones),
                b2=random(R, inner, *k, seed=2)), ALPHA


def tucker_glora(layer):
    tensors, alpha = glora(layer)
    _, inner, k, _ = sizes(layer)
    return tensors | dict(b2=random(R, inner, *[1] * len(k), seed=2), bm=random(R, R, *k)), alpha


def old_glora(layer):
    (tensors, alpha), flat = glora(layer), sizes(layer)[3]
    a1, a2, b1, b2 = (tensors[n].reshape(len(tensors[n]), -1) for n in ("a1", "a2", "b1", "b2"))
    assert b2.shape == (R, flat)
    return dict(a1=a2, a2=a1, b1=tensors["b2"], b2=b1), alpha


def oft(constraint=None, rescaled=False):
    def make(layer):
        tensors = dict(blocks=random(2, 4, 4, scale=0.2))
        if rescaled:
            tensors["rescale"] = 1 + random(len(layer.weight), *[1] * (layer.weight.dim() - 1), scale=0.2)
        return tensors, constraint
    return make


def oft_rotation(layer):
    return dict(rotation=torch.linalg.qr(random(2, 4, 4))[0]), None


def boft(constraint=None, rescaled=False):
    def make(layer):
        tensors, _ = oft(rescaled=rescaled)(layer)
        return tensors | dict(blocks=random(3, 4, 2, 2, scale=0.2)), constraint
    return make


def with_magnitude(make, axis):
    def made(layer):
        tensors, alpha = make(layer)
        shape = [n if i == axis else 1 for i, n in enumerate(layer.weight.shape)]
        return tensors | dict(magnitude=random(*shape).abs() + 0.2), alpha
    return made


def with_bias(make):
    def made(layer):
        tensors, alpha = make(layer)
        return tensors | dict(diff_b=random(len(layer.weight), seed=5)), alpha
    return made


CASES = {  # name -> (kind, its tensors, layers it does not fit)
    "lora": ("lora", lora, ()),
    "lora with bias": ("lora", with_bias(lora), ()),
    "tucker lora": ("lora", tucker_lora, ("linear", "conv1x1", "grouped")),
    "tucker lora with bias": ("lora", with_bias(tucker_lora), ("linear", "conv1x1", "grouped")),
    "full": ("full", full, ()),
    "bias alone": ("full", bias_alone, ()),
    "loha": ("loha", loha, ()),
    "tucker loha": ("loha", tucker_loha, ("linear", "conv1x1")),
    "lokr whole whole": ("lokr", lokr(True, True), ()),
    "lokr whole low": ("lokr", lokr(True, False), ()),
    "lokr low whole": ("lokr", lokr(False, True), ()),
    "lokr low low": ("lokr", lokr(False, False), ()),
    "tucker lokr": ("lokr", lokr(True, False, tucker=True), ("linear", "conv1x1")),
    "tucker lokr low": ("lokr", lokr(False, False, tucker=True), ("linear", "conv1x1")),
    "ia3": ("ia3", ia3(False), ()),
    "ia3 on input": ("ia3", ia3(True), ()),
    "glora": ("glora", glora, ()),
    "glora with bias": ("glora", with_bias(glora), ()),
    "tucker glora": ("glora", tucker_glora, ("linear",)),
    "old glora": ("glora", old_glora, ()),
    "oft": ("oft", oft(), ()),
    "oft constrained": ("oft", oft(0.05), ()),
    "oft loosely constrained": ("oft", oft(50.0), ()),
    "oft rescaled": ("oft", oft(rescaled=True), ()),
    "oft rotation": ("oft", oft_rotation, ()),
    "boft": ("boft", boft(), ()),
    "boft constrained": ("boft", boft(0.05), ()),
    "boft rescaled": ("boft", boft(rescaled=True), ()),
    **{f"{name} with magnitude of {'rows' if axis == 0 else 'columns'}": (name.split()[-1], with_magnitude(make, axis), skip)
       for axis in (0, 1) for name, make, skip in (
           ("lora", lora, ()), ("tucker lora", tucker_lora, ("linear", "conv1x1", "grouped")), ("full", full, ()),
           ("loha", loha, ()), ("lokr", lokr(True, False), ()), ("glora", glora, ()), ("oft", oft(), ()))},
}
PAIRS = [(case, layer) for case in CASES for layer in LAYERS if layer not in CASES[case][2]]


def weights_of(case, layer):
    tensors, alpha = CASES[case][1](layer)
    return AdapterWeights(CASES[case][0], tensors, alpha)


def loaded(weights, shape):
    return KINDS[weights.kind].from_weights(weights, shape)


def attach(layer, case, name="a", multiplier=1.0):
    weights = weights_of(case, layer)
    adapter = loaded(weights, layer.lora_shape()).requires_grad_(False)
    layer.add_adapter(name, adapter, multiplier)
    return adapter


# ---- the formulas, in numpy and fp64, matrix by matrix ---------------------------------------------------------------

def cayley(q):
    """R = (I + Q)(I - Q)⁻¹ of one skew matrix."""
    return (np.eye(len(q)) + q) @ np.linalg.inv(np.eye(len(q)) - q)


def rotations(blocks, constraint, out):
    q = blocks - np.swapaxes(blocks, -1, -2)
    norm, limit = math.sqrt((q**2).sum()), (constraint or 0) * out
    if limit > 0 and norm > limit:
        q = q * limit / norm
    return np.array([cayley(m) for m in q.reshape(-1, *q.shape[-2:])]).reshape(q.shape)


def tucker(core, a, b):
    """Σ core[n, m, ...] a[:, n] b[m, :], tap by tap."""
    taps = core.reshape(*core.shape[:2], -1)
    flat = np.stack([a @ taps[:, :, t] @ b for t in range(taps.shape[2])], axis=-1)
    return flat.reshape(len(a), b.shape[1], *core.shape[2:])


def matrix(t):
    return t.reshape(len(t), -1)


def changed(weights, W, groups=1):
    """W' by the definition of the kind; W a numpy array in fp64."""
    t = {name: v.double().numpy() for name, v in weights.tensors.items() if name != "on_input"}
    out, inner, *k = W.shape
    kind, alpha = weights.kind, weights.alpha
    if kind == "lora" and "mid" in t:
        delta = tucker(t["mid"], matrix(t["up"]), matrix(t["down"])) * alpha / len(t["down"])
    elif kind == "lora":
        pairs = zip(np.split(matrix(t["up"]), groups), np.split(matrix(t["down"]), groups))
        delta = np.concatenate([u @ d for u, d in pairs]) * alpha / len(t["down"])
    elif kind == "full":
        delta = t.get("diff", np.zeros_like(W))
    elif kind == "loha":
        if "t1" in t:
            delta = tucker(t["t1"], t["w1_a"].T, t["w1_b"]) * tucker(t["t2"], t["w2_a"].T, t["w2_b"]) * alpha / R
        else:
            delta = (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"]) * alpha / R
    elif kind == "lokr":
        w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
        if "t2" in t:
            w2 = tucker(t["t2"], t["w2_a"].T, t["w2_b"])
        else:
            w2 = t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"]
        w2 = w2.reshape(out // len(w1), inner // w1.shape[1], -1)
        delta = np.stack([np.kron(w1, w2[:, :, tap]) for tap in range(w2.shape[2])], axis=-1)
        delta = delta * (alpha / R if alpha is not None else 1)
    elif kind == "ia3":
        w = t["weight"].reshape(-1)
        delta = W * (w[None, :, *[None] * len(k)] if weights.tensors["on_input"] else w[:, *[None] * (1 + len(k))])
    elif kind == "glora":
        a1, a2, b1, b2 = (t[n] for n in (("a1", "a2", "b1", "b2") if len(t["a2"]) == R else ("a2", "a1", "b2", "b1")))
        turned = np.moveaxis(np.moveaxis(W, 1, -1) @ matrix(a1) @ matrix(a2), -1, 1)
        b = tucker(t["bm"], matrix(b1), matrix(b2)) if "bm" in t else (matrix(b1) @ matrix(b2)).reshape(W.shape)
        delta = (turned + b) * alpha / R
    elif kind == "oft":
        r = t["rotation"] if "rotation" in t else rotations(t["blocks"], alpha, out)
        whole = np.zeros((out, out))
        for i, block in enumerate(r):
            at = slice(i * len(block), (i + 1) * len(block))
            whole[at, at] = block.T
        delta = whole @ matrix(W)
        delta = delta.reshape(W.shape) * t.get("rescale", 1) - W
    elif kind == "boft":
        r, total = rotations(t["blocks"], alpha, out), matrix(W)
        b = r.shape[-1]
        for i, stage in enumerate(r):
            apart, mixed = 2**i * b // 2, np.zeros_like(total)
            order = [start + offset + apart * pair  # rows in the order in which blocks of b take them
                     for start in range(0, out, 2 * apart) for offset in range(apart) for pair in (0, 1)]
            for n, block in enumerate(stage):
                rows = order[n * b:(n + 1) * b]
                mixed[rows] = block @ total[rows]
            total = mixed
        delta = total.reshape(W.shape) * t.get("rescale", 1) - W
    new = W + delta.reshape(W.shape)
    if "magnitude" in t:
        m = t["magnitude"].reshape(t["magnitude"].shape + (1,) * (W.ndim - t["magnitude"].ndim))
        axes = tuple(i for i, n in enumerate(m.shape) if n == 1)
        new = m * new / np.sqrt((new**2).sum(axis=axes, keepdims=True))
    return new


def expected(layer, x, weights_and_multipliers):
    """op(x, W + Σ m (W' - W), b + Σ m Δb) in fp64, by torch's own functions."""
    W, b = layer.weight.detach().double(), layer.bias.detach().double()
    total = W.clone()
    for weights, m in weights_and_multipliers:
        total += m * (torch.from_numpy(changed(weights, W.numpy(), getattr(layer, "groups", 1))) - W)
        if "diff_b" in weights.tensors:
            b = b + m * weights.tensors["diff_b"].double()
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), total, b)
    conv = (F.conv1d, F.conv2d, F.conv3d)[W.dim() - 3]
    return conv(x.double(), total, b, layer.stride, layer.padding, layer.dilation, layer.groups)


def close(got, want, tolerance):
    return float((got.double() - want.double()).norm() / want.double().norm()) <= tolerance


# ---- against the formulas --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case, name", PAIRS)
def test_the_change_of_a_weight_is_that_of_the_formula(case, name, dtype, tolerance):
    layer, _ = layer_and_input(name)
    weights, W = weights_of(case, layer), layer.weight.detach().to(dtype)
    adapter, groups = loaded(weights, layer.lora_shape()), getattr(layer, "groups", 1)
    got, want = adapter.effective_delta(W).detach(), torch.from_numpy(changed(weights, W.double().numpy(), groups))
    assert got.shape == W.shape and got.dtype == dtype
    if case == "bias alone":
        assert not got.any()
    else:
        assert close(W.double() + got.double(), want, tolerance) and close(got, want - W.double(), 3 * tolerance)
        assert (want - W.double()).norm() > 0.01 * W.norm(), "a change that is next to nothing proves nothing"


@pytest.mark.parametrize("case, name", PAIRS)
def test_a_layer_computes_with_w_plus_m_times_the_change_on_every_path(case, name):
    layer, x = layer_and_input(name)
    layer.requires_grad_(False)
    weights = weights_of(case, layer)
    with torch.no_grad():
        base = layer(x)
        adapter = attach(layer, case)
        for m in (0.0, 1.0, 0.3, -1.0):
            want = expected(layer, x, [(weights, m)])
            set_adapters(layer, {"a": m})
            out = layer(x)
            assert torch.equal(out, base) if m == 0 else close(out, want, 1e-5) and not torch.allclose(out, base, atol=1e-3)
            merge(layer)
            assert layer.is_merged() == bool(m) and close(layer(x), want, 1e-5)
            unmerge(layer)
            assert torch.equal(layer(x), out)
            with use_adapters(layer, {"a": torch.tensor([m, 0.0, m, 2.0])}):
                mixed = layer(x)
            assert close(mixed[0], want[0], 1e-5) and torch.equal(mixed[1], base[1]) and close(mixed[2], want[2], 1e-5)
            with torch.enable_grad():
                adapter.requires_grad_(True)
                trained = layer(x)
                adapter.requires_grad_(False)
            assert trained.requires_grad == bool(m) and close(trained.detach(), want, 1e-5)


def test_a_low_rank_bias_reaches_an_input_without_a_batch():
    for name in ("linear", "conv3x3"):
        layer, x = layer_and_input(name)
        attach(layer, "lora with bias", multiplier=0.7)
        x = x[0, 0] if name == "linear" else x[0]
        with torch.no_grad():
            want = expected(layer, x, [(weights_of("lora with bias", layer), 0.7)])
            assert layer(x).shape == want.shape and close(layer(x), want, 1e-5)


def test_a_layer_in_fp64_is_exact_to_fp64():
    layer, x = layer_and_input("conv3x3")
    layer.double()
    for case in ("tucker lora with bias", "loha", "boft rescaled"):
        attach(layer, case, case, 0.3)
    weights = [(weights_of(case, layer), 0.3) for case in ("tucker lora with bias", "loha", "boft rescaled")]
    want = expected(layer, x, weights)
    with torch.no_grad():
        assert close(layer(x.double()), want, 1e-12)
        merge(layer)
        assert close(layer(x.double()), want, 1e-12)


# ---- against LyCORIS -------------------------------------------------------------------------------------------------

RENAMED = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "dora_scale": "magnitude",
           "oft_blocks": "blocks", "w_norm": "diff", "b_norm": "diff_b"}
BOTH = dict(decompose_both=True, unbalanced_factorization=True)
LYCORIS = {  # name -> (their module, its arguments, our kind)
    "lora": (peers.LoConModule, {}, "lora"),
    "tucker lora": (peers.LoConModule, dict(use_tucker=True), "lora"),
    "dora": (peers.LoConModule, dict(weight_decompose=True), "lora"),
    "loha": (peers.LohaModule, {}, "loha"),
    "tucker loha": (peers.LohaModule, dict(use_tucker=True), "loha"),
    "loha dora": (peers.LohaModule, dict(weight_decompose=True), "loha"),
    "lokr whole whole": (peers.LokrModule, dict(full_matrix=True), "lokr"),
    "lokr whole low": (peers.LokrModule, dict(factor=2, lora_dim=1), "lokr"),
    "lokr low whole": (peers.LokrModule, dict(factor=2, lora_dim=2, **BOTH), "lokr"),
    "lokr low low": (peers.LokrModule, dict(factor=3, lora_dim=1, **BOTH), "lokr"),
    "tucker lokr": (peers.LokrModule, dict(use_tucker=True, factor=2, lora_dim=2), "lokr"),
    "lokr dora": (peers.LokrModule, dict(weight_decompose=True, factor=2, lora_dim=2), "lokr"),
    "oft": (peers.DiagOFTModule, {}, "oft"),
    "oft constrained": (peers.DiagOFTModule, dict(constraint=0.02), "oft"),
    "oft rescaled": (peers.DiagOFTModule, dict(rescaled=True), "oft"),
    "boft": (peers.ButterflyOFTModule, dict(lora_dim=2), "boft"),
    "boft constrained": (peers.ButterflyOFTModule, dict(lora_dim=4, constraint=0.02), "boft"),
    "boft rescaled": (peers.ButterflyOFTModule, dict(lora_dim=2, rescaled=True), "boft"),
    "ia3": (peers.IA3Module, {}, "ia3"),
    "ia3 on input": (peers.IA3Module, dict(train_on_input=True), "ia3"),
    "glora": (peers.GLoRAModule, {}, "glora"),
}


def canonical(kind, state):
    """LyCORIS' state dict of one module as AdapterWeights."""
    tensors = {RENAMED.get(key, key).removeprefix("lokr_").removeprefix("hada_").removesuffix(".weight"): v.detach().clone()
               for key, v in state.items() if key != "alpha"}
    alpha = float(state["alpha"]) if "alpha" in state else None
    return AdapterWeights(kind, tensors, alpha)


@pytest.mark.parametrize("name", ["linear", "conv1x1", "conv3x3"])
@pytest.mark.parametrize("case", LYCORIS)
def test_the_output_is_that_of_lycoris(case, name):
    module, arguments, kind = LYCORIS[case]
    torch.manual_seed(1)
    plain, x = LAYERS[name][0](), torch.randn(LAYERS[name][1])
    if case == "lokr low whole":  # only a layer that widens much has a w1 larger than its w2
        plain = nn.Linear(4, 16) if name == "linear" else nn.Conv2d(4, 16, plain.kernel_size)
        x = x[..., :4] if name == "linear" else x[:, :4]
    layer = as_lora_layer(copy.deepcopy(plain))
    peer = module("peer", plain, 1.0, **(dict(lora_dim=4, alpha=2.5) | arguments))
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
        state = peer.state_dict()
        peer.apply_to()
        peer.eval()
        weights = canonical(kind, state)
        layer.add_adapter("a", loaded(weights, layer.lora_shape()))
        want, base = plain(x), layer.base_forward(x)
        assert not torch.allclose(want, base, atol=1e-2)
        assert close(layer(x), want, 2e-6) and close(layer(x) - base, want - base, 1e-5)
    parts = {"lokr whole whole": {"w1", "w2"}, "lokr whole low": {"w1", "w2_a", "w2_b"},
             "lokr low low": {"w1_a", "w1_b", "w2_a", "w2_b"}, "lokr low whole": {"w1_a", "w1_b", "w2"}}
    assert case not in parts or weights.tensors.keys() == parts[case], "the case is the one that it is named for"


@pytest.mark.parametrize("make, shape", [(lambda: nn.GroupNorm(2, 6), (4, 6, 9)), (lambda: nn.LayerNorm(6), (4, 7, 6))])
def test_norms_are_those_of_lycoris(make, shape):
    torch.manual_seed(0)
    plain, x = make(), torch.randn(shape)
    layer = as_lora_layer(copy.deepcopy(plain))
    peer = peers.NormModule("peer", plain, 1.0)
    with torch.no_grad():
        for p in peer.parameters():
            p.normal_()
        peer.apply_to()
        layer.add_adapter("a", loaded(canonical("full", peer.state_dict()), layer.lora_shape()))
        assert close(layer(x), plain(x), 1e-6)


def test_new_factors_have_the_sizes_of_lycoris():
    for n, factor in itertools.product((*range(1, 130), 320, 360, 640, 768, 1280), (-1, 1, 2, 3, 4, 8, 16, 64, 2000)):
        assert factorization(n, factor) == lycoris_factorization(n, factor), (n, factor)
    for n, rank in itertools.product((2, 4, 8, 12, 40, 320, 640, 768), (2, 4, 8, 10, 64, 320)):
        theirs = power2factorization(n, min(rank, n))
        if theirs[1]:
            m = sum(int(i) for i in f"{theirs[1] - 1:b}") + 1
            assert KINDS["boft"].new_sizes(n, rank) == (m, theirs[1], theirs[0], theirs[0])
        else:
            with pytest.raises(ValueError, match=f"rank {rank} does not divide its {n} rows"):
                KINDS["boft"].new_sizes(n, rank)
    for arguments in (dict(), dict(factor=2), dict(factor=2, decompose_both=True), dict(factor=4, tucker=True)):
        for name in ("linear", "conv1x1", "conv3x3"):
            plain = LAYERS[name][0]()
            theirs = peers.LokrModule("peer", plain, 1.0, lora_dim=1, alpha=2,
                                      **{{"tucker": "use_tucker"}.get(k, k): v for k, v in arguments.items()})
            ours = KINDS["lokr"](LayerShape(tuple(plain.weight.shape)), 1, 2.0, **arguments)
            want = canonical("lokr", theirs.state_dict())
            assert {k: v.shape for k, v in ours.weights().tensors.items()} == {k: v.shape for k, v in want.tensors.items()}


# ---- several at once -------------------------------------------------------------------------------------------------

BLEND = {"lora with bias": 0.7, "tucker lora": -0.4, "loha": 1.3, "tucker lokr": 0.5, "ia3": 0.2, "old glora": -0.6,
         "oft rescaled": 0.9, "boft": 0.8, "full": -0.3, "lora with magnitude of columns": 0.6}


def test_kinds_blend_by_adding_their_changes_merged_and_not():
    layer, x = layer_and_input("conv3x3")
    for case in BLEND:
        attach(layer, case, case)
    want = expected(layer, x, [(weights_of(case, layer), m) for case, m in BLEND.items()])
    with torch.no_grad(), use_adapters(layer, BLEND):
        apart = layer(x)
        merge(layer)
        assert close(apart, want, 1e-5) and close(layer(x), want, 1e-5)
        plain = merge_lora_weights(copy.deepcopy(layer))
    assert close(plain(x).detach(), want, 1e-5) and not lora_layers(plain)


@pytest.mark.parametrize("name", ["linear", "conv3x3"])
@pytest.mark.parametrize("grad", [False, True])
def test_each_image_gets_its_own_mix_of_kinds(name, grad):
    layer, x = layer_and_input(name)
    table = {case: torch.tensor([m, 0.5 - m]) for case, m in BLEND.items() if name not in CASES[case][2]}
    for case in table:
        attach(layer, case, case).requires_grad_(grad)
    rows = torch.tensor([1, 0, 0, 1])
    with torch.set_grad_enabled(grad), use_adapters(layer, table), use_rows(layer, rows):
        out = layer(x).detach()
    for row, image in enumerate(rows.tolist()):
        mix = [(weights_of(case, layer), float(m[image])) for case, m in table.items()]
        assert close(out[row:row + 1], expected(layer, x[row:row + 1], mix), 1e-5)


# ---- new adapters ----------------------------------------------------------------------------------------------------

NEW = [("lora", {}), ("lora", dict(tucker=True)), ("full", {}), ("loha", {}), ("loha", dict(tucker=True)), ("lokr", {}),
       ("lokr", dict(factor=2)), ("lokr", dict(factor=4, decompose_both=True)), ("lokr", dict(factor=2, tucker=True)),
       ("ia3", {}), ("ia3", dict(on_input=True)), ("glora", {}), ("oft", {}), ("oft", dict(rescaled=True)), ("boft", {}),
       ("boft", dict(rescaled=True))]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv1x1", "conv3x3"])
@pytest.mark.parametrize("kind, options", NEW)
def test_a_new_adapter_changes_no_bit_and_all_of_it_learns(kind, options, name, dora):
    torch.manual_seed(0)
    model, x = nn.Sequential(LAYERS[name][0]()), torch.randn(LAYERS[name][1])
    base = model(x).detach()
    if dora and not KINDS[kind].takes_dora:
        with pytest.raises(LoRAError, match=f"dora does not go with kind '{kind}'; allowed: lora, full, loha, lokr"):
            apply_lora_to_model(model, 2, 3.0, target_modules=["0"], kind=kind, dora=True)
        return
    apply_lora_to_model(model, 2, 3.0, target_modules=["0"], kind=kind, dora=dora, **options)
    with torch.no_grad():
        assert torch.equal(model(x), base)
        merge(model)
        assert torch.equal(model[0].merged_weight, model[0].weight)
    assert torch.equal(model(x).detach(), base)
    assert not model[0].adapter("default").effective_delta(model[0].weight).any()
    parameters = get_lora_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    target = torch.randn(base.shape)
    for _ in range(3):  # zero factors hold back the gradient of those they multiply for a step
        optimizer.zero_grad()
        ((model(x) - target) ** 2).mean().backward()
        optimizer.step()
    assert all(p.grad.any() for p in parameters)
    with torch.no_grad():
        assert ((model(x) - target) ** 2).mean() < ((base - target) ** 2).mean()
    remove_lora(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("case", ["tucker lora with bias", "loha", "tucker lokr low", "glora", "oft constrained", "boft",
                                  "ia3 on input"])
def test_gradients_are_those_of_the_weight_they_change(case):
    """Against finite differences of the fp64 formula in numpy, in a random direction of every tensor."""
    layer, x = layer_and_input("conv3x3")
    adapter = attach(layer, case).requires_grad_(True)
    target = torch.randn_like(layer(x))
    (layer(x) * target).sum().backward()
    weights, step = weights_of(case, layer), 1e-5
    for name, p in adapter.named_parameters():
        direction = random(*p.shape, seed=9).double()
        values = []
        for sign in (1, -1):
            moved = weights.tensors | {name: weights.tensors[name].double() + sign * step * direction}
            values.append((expected(layer, x, [(AdapterWeights(weights.kind, moved, weights.alpha), 1.0)]) * target).sum())
        slope = (values[0] - values[1]) / (2 * step)
        assert float((p.grad.double() * direction).sum()) == pytest.approx(float(slope), rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("arguments, sentence", [
    (dict(kind="loha", rank=9), "rank 9 does not fit 0, which maps 12 to 8 values; allowed: 1 to 8"),
    (dict(kind="glora", rank=0), "rank 0 does not fit 0"),
    (dict(kind="lokr", rank=0), "0: rank 0 does not go with kind 'lokr'; allowed: whole numbers from 1"),
    (dict(kind="oft", rank=1), "0: rank 1 divides its 8 rows into blocks of 1, which cannot rotate"),
    (dict(kind="boft", rank=1), "0: rank 1 does not divide its 8 rows .* allowed: from 2"),
    (dict(kind="oft", factor=2), "kind 'oft' has no option 'factor'; it has rescaled"),
    (dict(kind="glora", tucker=True), "kind 'glora' has no option 'tucker'; it has none"),
    (dict(kind="loha", rank_dropout=0.1), "0: rank_dropout does not go with kind 'loha'"),
    (dict(kind="loha", target_modules=["1"]), "1: kind 'loha' does not fit an embedding; allowed: lora, full"),
    (dict(kind="lora", target_modules=["2"], tucker=True), "2: a Tucker core does not go with a convolution of 2 groups"),
])
def test_what_a_kind_cannot_do_is_one_sentence(arguments, sentence):
    model = nn.Sequential(nn.Linear(12, 8), nn.Embedding(5, 8), nn.Conv1d(8, 8, 3, groups=2))
    with pytest.raises(LoRAError, match=sentence):
        apply_lora_to_model(model, **(dict(rank=2, target_modules=["0"]) | arguments))
    assert [type(m) for m in model] == [nn.Linear, nn.Embedding, nn.Conv1d]


FACTS = {  # fact -> the kinds of which it is true, by their papers and by LyCORIS, PEFT and ComfyUI
    "fits_embeddings": "lora full", "fits_norms": "full", "takes_dora": "lora full loha lokr", "drops_ranks": "lora",
    "of_weight": "ia3 glora oft boft", "low_rank": "lora loha glora", "sized": "lora loha lokr glora oft boft",
    "scaled": "lora loha lokr glora", "bounded": "oft boft", "adds": "lora loha lokr glora",
    "is_product": "lora full loha lokr ia3", "peft_type": "lora loha lokr",
    "held_by": "lora full loha lokr glora oft boft"}


@pytest.mark.parametrize("fact", FACTS)
def test_the_facts_of_the_kinds_of_other_programs_are_theirs(fact):
    known = [kind for kind in KINDS if KINDS[kind].lycoris_name]
    assert known == ["lora", "full", "loha", "lokr", "ia3", "glora", "oft", "boft"]
    assert " ".join(kind for kind in known if getattr(KINDS[kind], fact)) == FACTS[fact]


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_kind_has_a_name_in_files(kind):
    cls, layer = KINDS[kind], as_lora_layer(nn.Linear(12, 8))
    apply_lora_to_model(layer, 2, 3.0, target_modules=[""], kind=kind)
    weights = layer.adapter("default").weights()
    names = cls.spelling(weights.tensors)
    assert weights.tensors.keys() <= names.keys() and len(set(names.values())) == len(names)
    assert all(cls.keys[key] == name for name, key in names.items() if name not in ("magnitude", "diff_b"))
    assert not cls.missing(weights.tensors) and cls.kind_of(weights.tensors) == kind
    assert weights.rank == layer.adapter("default").rank and {*cls.needed, *cls.cores, *cls.flags} <= {*cls.keys.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_norms_get_a_full_difference_beside_any_kind(kind):
    model = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8))
    apply_lora_to_model(model, 2, 3.0, target_modules=["0", "1"], kind=kind, rank_dropout=0.1 if kind == "lora" else 0.0)
    assert [layer.adapter("default").kind for layer in model] == [kind, "full"]
    if kind != "full":
        with pytest.raises(LoRAFormatError, match=rf"kind '{kind}' does not fit a norm, whose weight \[8\] is not a matrix"):
            loaded(model[0].adapter("default").weights(), LayerShape((8,)))


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case, name", PAIRS)
def test_weights_come_back_bit_for_bit(case, name):
    layer, _ = layer_and_input(name)
    given = weights_of(case, layer)
    adapter = loaded(given, layer.lora_shape())
    written = adapter.weights()
    again = loaded(written, layer.lora_shape()).weights()
    for weights in (written, again):
        assert (weights.kind, weights.alpha) == (given.kind, given.alpha)
        assert weights.tensors.keys() == given.tensors.keys()
        if case != "old glora":  # it is written as today's
            assert all(torch.equal(t, given.tensors[k]) for k, t in weights.tensors.items())
    assert all(torch.equal(t, again.tensors[k]) for k, t in written.tensors.items())
    assert not any(t.requires_grad for t in written.tensors.values())
    half = {k: t.half() if t.is_floating_point() else t for k, t in given.tensors.items()}
    adapter = loaded(replace(given, tensors=half), layer.lora_shape())
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_that_is_missing_or_extra_or_of_another_shape_is_named(case):
    layer, _ = layer_and_input("conv3x3")
    given, shape = weights_of(case, layer), layer.lora_shape()
    if given.kind not in ("lora", "full"):
        with pytest.raises(LoRAFormatError, match="does not fit an embedding"):
            loaded(given, shape._replace(embedding=True))
    for name, tensor in given.tensors.items():
        for wrong in (torch.zeros(7), torch.zeros(*tensor.shape, 2), torch.zeros(0, 3), torch.zeros(())):
            if name == "on_input" and wrong.numel() == 1:
                continue
            with pytest.raises(LoRAFormatError, match=f"{name}|does not divide|the layer's weight") as error:
                loaded(replace(given, tensors=given.tensors | {name: wrong}), shape)
            assert "\n" not in str(error.value)
        if name not in ("magnitude", "diff_b", "rescale", "diff"):  # these may be missing
            with pytest.raises(LoRAFormatError):
                loaded(replace(given, tensors={k: t for k, t in given.tensors.items() if k != name}), shape)
    with pytest.raises(LoRAFormatError, match=f"strange has no place in an adapter of kind '{given.kind}'"):
        loaded(replace(given, tensors=given.tensors | {"strange": torch.zeros(2)}), shape)
    with pytest.raises(LoRAFormatError):
        loaded(given, LayerShape((10, 14, 3, 3)))


def test_matrices_of_kernels_may_keep_the_kernels_axes():
    layer, x = layer_and_input("conv3x3")
    weights = weights_of("loha", layer)
    unfolded = {k: t.reshape(R, -1, 3, 3) if k.endswith("_b") else t for k, t in weights.tensors.items()}
    adapter = loaded(replace(weights, tensors=unfolded), layer.lora_shape())
    assert torch.equal(adapter.delta(layer.weight), loaded(weights, layer.lora_shape()).delta(layer.weight))


def test_a_square_layer_of_its_own_rank_reads_glora_as_todays():
    a1, a2, b1, b2 = (random(3, 3, seed=i) for i in range(4))
    W = random(3, 3, seed=7)
    adapter = loaded(AdapterWeights("glora", dict(a1=a1, a2=a2, b1=b1, b2=b2), 1.5), LayerShape((3, 3)))
    assert close(adapter.delta(W).detach(), (W.double() @ a1.double() @ a2.double() + b1.double() @ b2.double()) / 2, 1e-6)


# ---- block multipliers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["lora with bias", "tucker lora", "loha", "oft rescaled", "lora with magnitude of rows"])
def test_a_block_multiplier_is_a_factor_of_the_users_multiplier(case):
    layer, x = layer_and_input("conv3x3")
    attach(layer, case, "a")
    attach(layer, "lora", "b")
    a, b = weights_of(case, layer), weights_of("lora", layer)
    with torch.no_grad():
        layer(x)
        layer.set_block_multiplier("a", 0.5)
        for m in (1.0, -0.6):
            with use_adapters(layer, {"a": m, "b": 0.7}):
                assert layer.multipliers == active_multipliers(layer) == {"a": m, "b": 0.7}
                want = expected(layer, x, [(a, 0.5 * m), (b, 0.7)])
                assert close(layer(x), want, 1e-5)
                merge(layer)
                assert layer.is_merged() and close(layer(x), want, 1e-5)
                layer.set_block_multiplier("a", -2.0)
                assert not layer.is_merged() and close(layer(x), expected(layer, x, [(a, -2 * m), (b, 0.7)]), 1e-5)
                with torch.enable_grad():
                    layer.adapter("a").requires_grad_(True)
                    assert close(layer(x).detach(), expected(layer, x, [(a, -2 * m), (b, 0.7)]), 1e-5)
                    layer.adapter("a").requires_grad_(False)
                layer.set_block_multiplier("a", 0.5)
        with use_adapters(layer, {"a": torch.tensor([1.0, -1.0, 0.0, 2.0])}):
            out = layer(x)
            assert active_multipliers(layer) == {"a": (1.0, -1.0, 0.0, 2.0)}
        for i, m in enumerate((1.0, -1.0, 0.0, 2.0)):
            assert close(out[i:i + 1], expected(layer, x[i:i + 1], [(a, 0.5 * m)]), 1e-5)


def test_at_a_block_multiplier_of_0_the_layer_is_its_base_and_the_user_set_stays():
    layer, x = layer_and_input("linear")
    with torch.no_grad():
        base = layer(x)
        attach(layer, "lora with bias", "a", 0.8)
        layer.set_block_multiplier("a", 0.0)
        for _ in range(2):
            assert torch.equal(layer(x), base) and active_multipliers(layer) == {"a": 0.8}
            merge(layer)
        with use_adapters(layer, {"a": torch.tensor([1.0, 2.0])}), use_rows(layer, torch.tensor([0, 1, 0])):
            assert torch.equal(layer(x), base)  # no adapter is on, so no row needs an image
        assert torch.equal(merge_lora_weights(copy.deepcopy(layer))(x), base)
        again = copy.deepcopy(layer)
        again.set_block_multiplier("a", 1.0)
        assert close(again(x), expected(layer, x, [(weights_of("lora with bias", layer), 0.8)]), 1e-5)
    with pytest.raises(LoRAError, match="the block multiplier of 'a' is nan; a finite number is needed"):
        layer.set_block_multiplier("a", float("nan"))


def test_a_block_multiplier_that_changes_before_a_recomputation_raises():
    layer, x = layer_and_input("linear")
    attach(layer, "lora").requires_grad_(True)
    out = checkpoint(layer, x)
    layer.set_block_multiplier("a", 0.5)
    with pytest.raises(LoRAError, match="the active LoRA set changed"):
        out.sum().backward()


# ---- starts and restarts ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv1x1", "conv3x3", "conv1d"])
def test_a_lora_with_a_frozen_start_changes_by_what_it_is_less_its_start(name, grad):
    layer, x = layer_and_input(name)
    bare = layer(x).detach()
    adapter = KINDS["lora"](layer.lora_shape(), R, ALPHA)
    first, last = ({"down": random(*adapter.down.shape, seed=i), "up": random(*adapter.up.shape, seed=i)} for i in (1, 2))
    adapter.start_at(first["up"].flatten(1), first["down"].flatten(1))
    layer.add_adapter("a", adapter.requires_grad_(grad))
    with torch.set_grad_enabled(grad):
        assert torch.equal(layer(x).detach(), bare)  # to the bit
        adapter.down.data.copy_(last["down"])
        adapter.up.data.copy_(last["up"])
        attach(layer, "loha", "b")
        sides = [(AdapterWeights("lora", last, ALPHA), 1.0), (AdapterWeights("lora", first, ALPHA), -1.0)]
        with use_adapters(layer, {"a": torch.tensor([0.7, -0.4]), "b": 0.5}), use_rows(layer, torch.tensor([1, 0, 0, 1])):
            out = layer(x).detach()
        for row, m in enumerate((-0.4, 0.7, 0.7, -0.4)):
            mix = [*((weights, m * sign) for weights, sign in sides), (weights_of("loha", layer), 0.5)]
            assert close(out[row:row + 1], expected(layer, x[row:row + 1], mix), 1e-5)
        with use_adapters(layer, {"a": 0.7}):
            want = expected(layer, x, [(weights, 0.7 * sign) for weights, sign in sides])
            assert close(layer(x).detach(), want, 1e-5)
            merge(layer)
            with torch.no_grad():
                assert layer.is_merged() and close(layer(x), want, 1e-5)
    weights = adapter.weights()  # for a file: a LoRA as any other
    assert (weights.kind, weights.rank, weights.alpha, sorted(weights.tensors)) == ("lora", 2 * R, 2 * ALPHA, ["down", "up"])
    assert close(torch.from_numpy(changed(weights, layer.weight.detach().double().numpy(), 1)) - layer.weight.detach().double(),
                 adapter.delta(layer.base_weight()).detach(), 1e-5)


def test_in_half_precision_a_frozen_start_costs_the_change_nothing():
    """bf16 holds 8 bits: of up · down - up₀ · down₀ with a change of 1e-3 of either it would leave nothing."""
    torch.manual_seed(0)
    layer, x = as_lora_layer(nn.Linear(64, 64, bias=False)), torch.randn(8, 64)
    adapter = KINDS["lora"](layer.lora_shape(), 8, 8.0)
    adapter.start_at(torch.randn(64, 8), torch.randn(8, 64))
    layer.add_adapter("a", adapter)
    adapter.up.data += 1e-3 * torch.randn(64, 8)
    with torch.no_grad():
        change = adapter(x.bfloat16(), layer).double()
        assert close(change, x.double() @ adapter.delta(layer.weight.double()).T, 0.02)


@pytest.mark.parametrize("kind, options", NEW)
def test_a_restarted_adapter_is_a_new_one_of_its_form(kind, options):
    layer, _ = layer_and_input("conv3x3")
    W = layer.base_weight()
    adapter = KINDS[kind](layer.lora_shape(), 4, ALPHA, **options).requires_grad_(False)
    adapter.diff_b = nn.Parameter(torch.ones(8), requires_grad=False)
    fresh = {name: p.clone() for name, p in adapter.named_parameters()}
    for p in adapter.parameters():
        p += torch.randn_like(p)
    assert adapter.delta(W).any()
    same = dict(adapter.named_parameters())
    torch.manual_seed(7)
    adapter.restart(layer.lora_shape())
    assert not adapter.delta(W).any() and not adapter.diff_b.any()
    assert all(p is same[name] for name, p in adapter.named_parameters())
    torch.manual_seed(7)
    again = dict(KINDS[kind](layer.lora_shape(), 4, ALPHA, **options).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in adapter.named_parameters() if name != "diff_b")
    drawn = [name for name, p in fresh.items() if len(p.unique()) > 1]
    assert all(not torch.equal(same[name], fresh[name]) for name in drawn) and (drawn or kind in ("full", "ia3", "oft", "boft"))


def test_dropouts_that_an_adapter_cannot_have_are_refused_whenever_they_are_set():
    layer, _ = layer_and_input("linear")
    adapter = KINDS["lora"](layer.lora_shape(), R, ALPHA, rank_dropout=0.1)
    with pytest.raises(ValueError, match="rank_dropout does not go with DoRA"):
        adapter.start_magnitude(layer.base_weight())
    with pytest.raises(ValueError, match="module_dropout is 1.0; allowed: 0 <= module_dropout < 1"):
        adapter.set_dropouts(module_dropout=1.0)
    with pytest.raises(ValueError, match="rank_dropout does not go with kind 'loha'"):
        KINDS["loha"](layer.lora_shape(), R, ALPHA).set_dropouts(rank_dropout=0.1)
