"""Every kind of adapter against fp64 formulas, numpy, and LyCORIS' own forward; modifiers, files, starts."""

import copy
import itertools
from dataclasses import replace

import lycoris.modules as peers
import pytest
import torch
import torch.nn as nn
from lycoris.functional.general import factorization as lycoris_factorization
from lycoris.functional.general import power2factorization

from sd.adapters.layers import as_lora_layer
from sd.adapters.lycoris import factorization
from sd.adapters.weights import AdapterWeights, LayerShape
from sd.lora import (
    KINDS,
    LoRAError,
    LoRAFormatError,
    apply_lora_to_model,
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
from tests.adapters.cases import (
    ALPHA,
    CASES,
    LAYERS,
    SHAPES,
    R,
    attach,
    changed,
    close,
    expected,
    layer_and_input,
    loaded,
    model_and_input,
    random,
    weights_of,
)

PAIRS = [(case, name) for case in CASES for name in SHAPES if name not in CASES[case][2]]


# ---- against the formulas --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case, name", PAIRS)
def test_the_change_of_a_weight_is_that_of_the_formula(case, name, dtype, tolerance):
    layer, _ = layer_and_input(name)
    weights, W = weights_of(case, layer), layer.weight.detach().to(dtype)
    adapter = loaded(weights, layer.lora_shape())
    got, want = adapter.effective_delta(W).detach(), changed(weights, layer)
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

NEW = [*((kind, {}) for kind in KINDS), ("lora", dict(tucker=True)), ("loha", dict(tucker=True)), ("lokr", dict(factor=2)),
       ("lokr", dict(factor=4, decompose_both=True)), ("lokr", dict(factor=2, tucker=True)), ("ia3", dict(on_input=True)),
       ("oft", dict(rescaled=True)), ("boft", dict(rescaled=True))]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv1x1", "conv3x3"])
@pytest.mark.parametrize("kind, options", NEW)
def test_a_new_adapter_changes_no_bit_and_all_of_it_learns(kind, options, name, dora):
    model, x = model_and_input(name)
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


LYCORIS_KINDS = ["lora", "full", "loha", "lokr", "ia3", "glora", "oft", "boft"]
FACTS = {  # fact -> which of them have it, by their papers and by LyCORIS, PEFT and ComfyUI
    "fits_embeddings": "lora full", "fits_norms": "full", "takes_dora": "lora full loha lokr", "drops_ranks": "lora",
    "of_weight": "ia3 glora oft boft", "low_rank": "lora loha glora", "sized": "lora loha lokr glora oft boft",
    "scaled": "lora loha lokr glora", "bounded": "oft boft", "adds": "lora loha lokr glora",
    "is_product": "lora full loha lokr ia3", "peft_type": "lora loha lokr",
    "held_by": "lora full loha lokr glora oft boft"}


@pytest.mark.parametrize("fact", FACTS)
def test_the_facts_of_the_kinds_of_other_programs_are_theirs(fact):
    assert all(KINDS[kind].lycoris_name for kind in LYCORIS_KINDS)
    assert " ".join(kind for kind in LYCORIS_KINDS if getattr(KINDS[kind], fact)) == FACTS[fact]


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
    assert close(changed(weights, layer) - layer.weight.detach().double(), adapter.delta(layer.base_weight()).detach(), 1e-5)


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
