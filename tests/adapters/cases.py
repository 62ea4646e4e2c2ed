"""The layers and the adapters that the tests of this folder share, and the formulas in fp64 that both must equal.

A kind that comes needs no row here: what holds for every kind is tested over KINDS, its formula in a file of its own.
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from sd.adapters.layers import as_lora_layer
from sd.adapters.weights import AdapterWeights
from sd.lora import KINDS, apply_lora_to_model, get_lora_parameters

LAYERS = {  # name -> (the layer, the shape of an input: of 4 rows but for one)
    "linear": (lambda: nn.Linear(12, 8), (4, 5, 12)),
    "conv1x1": (lambda: nn.Conv2d(12, 8, 1), (4, 12, 5, 6)),
    "conv3x3": (lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1), (4, 12, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(12, 8, 3, padding=1), (4, 12, 7)),
    "conv3d": (lambda: nn.Conv3d(12, 8, (1, 3, 3), padding="same"), (4, 12, 2, 5, 4)),
    "grouped": (lambda: nn.Conv2d(12, 8, 3, padding=1, groups=2), (4, 12, 7, 6)),
    "no bias": (lambda: nn.Linear(12, 8, bias=False), (4, 12)),
    "one row": (lambda: nn.Linear(12, 8), (12,)),
    "dilated": (lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1, dilation=2), (4, 12, 9, 11)),
    "circular": (lambda: nn.Conv2d(12, 8, 3, padding=(1, 0), padding_mode="circular"), (4, 12, 7, 6)),
    "circular conv1d": (lambda: nn.Conv1d(12, 8, 3, padding=2, dilation=2, padding_mode="circular"), (4, 12, 7)),
    "embedding": (lambda: nn.Embedding(20, 12, padding_idx=3), (4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 12), (4, 12, 7)),
    "layer norm": (lambda: nn.LayerNorm(12), (4, 5, 12)),
}
MATRICES = [name for name in LAYERS if name not in ("embedding", "group norm", "layer norm")]
SHAPES = ["linear", "conv1x1", "conv3x3", "conv1d", "conv3d", "grouped"]  # the other matrices differ in their forward alone
R = 3
ALPHA = 4.5  # not the rank


def random(*shape, seed=0, scale=0.5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape) + len(shape))) * scale


def model_and_input(name):
    """The plain layer in a model."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return nn.Sequential(make()), torch.randint(0, 20, shape) if name == "embedding" else torch.randn(shape)


def layer_and_input(name):
    """A layer that can carry adapters."""
    model, x = model_and_input(name)
    return as_lora_layer(model[0]), x


def fill(model, name=None, seed=0):
    """Random values in all adapters, or in one: an adapter that is zero proves nothing."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in get_lora_parameters(model, name):
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def adapted(name, adapters=("a",), **options):
    """The plain layer in a model with random LoRAs of rank 2, 4, ..."""
    model, x = model_and_input(name)
    for i, adapter in enumerate(adapters):
        apply_lora_to_model(model, rank=2 * (i + 1), alpha=3.0, target_modules=["0"], name=adapter, **options)
    return fill(model), x


# ---- tensors of each kind in canonical form --------------------------------------------------------------------------

def sizes(layer):
    """out, in as the weight has it, [kernel], their product in · k."""
    out, inner, *kernel = layer.weight.shape
    return out, inner, kernel, inner * math.prod(kernel)


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


CASES = {  # name -> (kind, its tensors, those of SHAPES it does not fit)
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


def changed(weights, layer):
    """W' by the definition of the kind, in fp64."""
    W = layer.weight.detach().double().numpy()
    t = {name: v.double().numpy() for name, v in weights.tensors.items() if name != "on_input"}
    out, inner, *k = W.shape if W.ndim > 1 else (*W.shape, 1)
    groups = getattr(layer, "groups", 1)
    kind, alpha = weights.kind, weights.alpha
    if kind == "lora" and "mid" in t:
        delta = tucker(t["mid"], matrix(t["up"]), matrix(t["down"])) * alpha / len(t["down"])
    elif kind == "lora":
        pairs = zip(np.split(matrix(t["up"]), groups), np.split(matrix(t["down"]), groups))
        delta = np.concatenate([u @ d for u, d in pairs]) * alpha / len(t["down"])
        delta = delta.T if isinstance(layer, nn.Embedding) else delta
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
    return torch.from_numpy(new)


def expected(layer, x, mix):
    """op(x, W + Σ m (W' - W), b + Σ m Δb) in fp64, by torch's own functions, for a mix of (weights, m)."""
    W, b = layer.weight.detach().double(), getattr(layer, "bias", None)
    b = None if b is None else b.detach().double()
    total = W.clone()
    for weights, m in mix:
        total += m * (changed(weights, layer) - W)
        if "diff_b" in weights.tensors:
            b = b + m * weights.tensors["diff_b"].double()
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, total)
    x = x.double()
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, total, b, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, total, b, layer.eps)
    if isinstance(layer, nn.Linear):
        return F.linear(x, total, b)
    padding = layer.padding
    if layer.padding_mode == "circular":
        x, padding = F.pad(x, [n for n in padding[::-1] for _ in "lr"], mode="circular"), 0
    conv = (F.conv1d, F.conv2d, F.conv3d)[W.dim() - 3]
    return conv(x, total, b, layer.stride, padding, layer.dilation, layer.groups)


def on(layer, multipliers):
    """The mix of the layer's own adapters."""
    return [(layer.adapter(name).weights(), m) for name, m in multipliers.items()]


def close(got, want, tolerance):
    return float((got.double() - want.double()).norm() / want.double().norm()) <= tolerance
