"""What a LoRA starts from: PiSSA against PEFT, ranks of blocks, files of any format; and what goes with which kind."""

import math
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from lycoris.functional.general import factorization
from torch import nn

from sd.adapters.layers import as_lora_layer
from sd.adapters.low_rank import LowRank
from sd.adapters.quant import dequantize_base, quantize_base
from sd.adapters.weights import LoRAFormatError
from sd.files.tensors import read_tensors
from sd.lora import KINDS, adapter_names, apply_lora_to_model, get_lora_parameters, lora_layers, lora_state, save_lora_weights
from sd.model_loader import load_lora_into_models, new_models
from sd.training import TrainConfig, TrainError, train
from sd.training.trained import start_with_principal, trained_parameters
from tests.training.tiny import SMALL, a_lora, changed, copy_of, metrics, output, pictures, randomized, stopped

QUICK = TrainConfig(rank=2, alpha=3.0, steps=2, batch_size=2, save_every=100, progress=False, learning_rate=1e-2)
FROM = replace(QUICK, rank=TrainConfig.rank, alpha=TrainConfig.alpha)  # what a file says is left out


@pytest.fixture(scope="module")
def first_loss(untrained, tmp_path_factory):
    """The loss of step 0, in which nothing is changed yet."""
    folder = tmp_path_factory.mktemp("plain")
    train(replace(QUICK, steps=1, out=str(folder)), copy_of(untrained), pictures())
    return metrics(folder)[0]["loss"]


# ---- PiSSA -----------------------------------------------------------------------------------------------------------

R, ALPHA = 3, 4.5


def pissa_on(layer, dora=False):
    layer = as_lora_layer(layer)
    adapter = LowRank(layer.lora_shape(), R, ALPHA)
    if dora:
        adapter.start_magnitude(layer.base_weight())
    layer.add_adapter("lora", adapter)
    start_with_principal(adapter, layer, "layer")
    return layer, adapter


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_pissa_starts_at_pefts_principal_values_and_takes_its_steps(dora):
    torch.manual_seed(0)
    plain = nn.Linear(12, 8)
    W = plain.weight.detach().clone()
    peers = nn.Sequential(nn.Linear(12, 8))
    peers[0].load_state_dict(plain.state_dict())
    peer = peft.get_peft_model(peers, peft.LoraConfig(r=R, lora_alpha=ALPHA, init_lora_weights="pissa", use_dora=dora,
                                                      target_modules=["0"]))
    inner = peer.base_model.model[0]
    layer, adapter = pissa_on(plain, dora)
    principal = ALPHA / R * (adapter.up @ adapter.down).detach()
    assert torch.allclose(principal, W - inner.base_layer.weight, atol=1e-5)

    x, target = torch.randn(64, 12), torch.randn(64, 8)
    layer.train().requires_grad_(False)
    optimizers = [torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1) for ps in (
        list(adapter.requires_grad_(True).parameters()), [p for p in peer.parameters() if p.requires_grad])]
    for _ in range(5):
        for model, optimizer in zip((layer, peer), optimizers):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    peer.merge_adapter()
    theirs = inner.base_layer.weight.detach()
    ours = W + adapter.effective_delta(W).detach()
    assert torch.allclose(ours, theirs, atol=2e-5) and (ours - W).abs().max() > 0.02
    assert torch.equal(layer.weight, W)


@pytest.mark.parametrize("make, shape", [
    (lambda: nn.Linear(12, 8), (5, 12)), (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 5)),
    (lambda: nn.Conv2d(12, 8, 1), (2, 12, 5, 5)), (lambda: nn.Embedding(20, 8), None)],
    ids=["linear", "conv", "1x1", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pissa_holds_the_best_approximation_of_its_rank_and_changes_no_bit(make, shape, dtype):
    torch.manual_seed(0)
    base = make().to(dtype)
    x = torch.randint(20, (4, 3)) if shape is None else torch.randn(shape, dtype=dtype)
    before = base(x)
    layer, adapter = pissa_on(base)
    W = layer.base_weight().detach()
    u, s, vh = np.linalg.svd((W.T if shape is None else W).flatten(1).double().numpy(), full_matrices=False)
    best = (u[:, :R] * s[:R]) @ vh[:R]
    held = ALPHA / R * (adapter.up.flatten(1) @ adapter.down.flatten(1)).detach().double().numpy()
    assert np.allclose(held, best, atol=1e-5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(layer(x), before)
    adapter.up.data += 0.1
    delta = ALPHA / R * (adapter.up.flatten(1) @ adapter.down.flatten(1)).detach().double().numpy() - held
    delta = delta.T if shape is None else delta
    assert np.allclose(adapter.delta(W).detach().double().flatten(1).numpy(), delta, atol=1e-5)
    saved = LowRank.from_weights(adapter.weights(), layer.lora_shape())
    assert np.allclose(saved.delta(W).detach().double().flatten(1).numpy(), delta, atol=1e-5)


def test_rank_dropout_drops_both_halves_of_a_rank_of_pissa():
    torch.manual_seed(0)
    layer, adapter = pissa_on(nn.Linear(12, 8))
    adapter.set_dropouts(rank_dropout=0.5)
    adapter.up.data[:, 1] += 1.0  # both factors of one rank have changed: a row has its change, twice, or none
    adapter.down.data[1] += 1.0
    x = torch.randn(200, 12)
    with torch.no_grad():
        whole = adapter.eval()(x, layer)
        ratio = (adapter.train()(x, layer) / whole).mean(1)
    assert torch.allclose(ratio, ratio.round(), atol=1e-3) and set(ratio.round().tolist()) == {0.0, 2.0}


def test_a_pissa_run_changes_nothing_at_first_and_its_file_is_a_lora_of_twice_the_rank(untrained, tmp_path, first_loss):
    models = copy_of(untrained)
    before = {key: {n: t.clone() for n, t in m.state_dict().items()} for key, m in models.items()}
    train(replace(QUICK, init="pissa", targets=("kohya",), steps=4, out=str(tmp_path)), models, pictures())
    assert metrics(tmp_path)[0]["loss"] == first_loss
    for key, network in before.items():
        assert all(torch.equal(t, models[key].state_dict()[n]) for n, t in network.items())
    again = load_lora_into_models(copy_of(untrained), tmp_path / "lora.safetensors")
    assert torch.equal(output(again), output(models)) and not torch.equal(output(models), output(untrained))
    assert {(w.kind, w.rank, w.alpha) for w in lora_state(again, "lora").values()} == {("lora", 4, 6.0)}
    assert read_tensors(tmp_path / "lora.safetensors").metadata["ss_network_module"] == "networks.lora"


def test_the_start_of_pissa_is_that_of_the_quantised_weight_that_is_there(untrained):
    models = quantize_base(copy_of(untrained))
    trained_parameters(replace(QUICK, init="pissa"), models)
    for layer in lora_layers(models).values():
        adapter, W = layer.adapter("lora").requires_grad_(False), layer.base_weight()
        s = torch.linalg.svdvals(W.double())
        left = W.double() - adapter.scale * adapter.up.double() @ adapter.down.double()
        assert torch.linalg.matrix_norm(left) == pytest.approx(float(s[2:].square().sum().sqrt()), rel=1e-4)


def test_a_weight_of_zeros_or_a_grouped_convolution_has_no_principal_part(untrained):
    models = copy_of(untrained)
    models["diffusion"].mid_block.attentions[0].proj_in.weight.data.zero_()
    with pytest.raises(TrainError, match="the weight of diffusion.mid_block.attentions.0.proj_in is 0"):
        trained_parameters(replace(QUICK, init="pissa", targets=("kohya",)), models)
    with pytest.raises(TrainError, match="layer: a start other than 0 does not go with a grouped convolution"):
        torch.manual_seed(0)
        layer = as_lora_layer(nn.Conv2d(6, 6, 3, groups=3))
        start_with_principal(LowRank(layer.lora_shape(), 3), layer, "layer")


# ---- ranks of blocks -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, alpha", [
    ({}, lambda r: 3.0 * r), ({"rslora": True}, lambda r: 3.0 * math.sqrt(r)), ({"kind": "loha"}, lambda r: 3.0 * r),
    ({"kind": "oft", "rank": 4}, lambda r: 3.0)], ids=["lora", "rslora", "loha", "oft"])
def test_blocks_have_their_ranks_and_alpha_goes_along(untrained, options, alpha):
    models = copy_of(untrained)
    blocks = ("mid_block=8", "mid_block.attentions.0.transformer_blocks.0.attn2=4", "down_blocks.0=0", "unet.up_blocks=2")
    trained_parameters(replace(QUICK, **({"rank": 1} | options), text_encoder=True, block_ranks=blocks), models)
    found, met = lora_state(models, "lora"), set()
    for path, weights in found.items():
        rank = (4 if ".mid_block." in path and ".attn2." in path else 8 if ".mid_block." in path else
                2 if ".up_blocks." in path else options.get("rank", 1))
        assert weights.alpha == pytest.approx(alpha(rank))
        if "blocks" in weights.tensors:  # of oft the rank bounds the rows of a block
            n, b, _ = weights.tensors["blocks"].shape
            assert b == factorization(n * b, rank)[0], path
        else:
            assert weights.rank == rank, path
        met.add((path.split(".")[0], rank))
    assert not any(".down_blocks.0." in path for path in found)
    assert len(met) == 5 if not options.get("rank") else len(met) == 4


@pytest.mark.parametrize("blocks, sentence", [
    (("mid_block=1.5",), "allowed: whole numbers of 0 or more"), (("mid_block=-1",), "allowed: whole numbers of 0 or more"),
    (("moon=2",), "block_ranks is .*of the targets: block weights name 'moon'"), (("unet=0",), "so nothing has a LoRA"),
    (("text_encoder=2",), "of the targets: block weights name 'text_encoder'"), (("mid_block=999",), "rank 999 does not fit"),
], ids=str)
def test_ranks_that_cannot_be_are_a_sentence_before_anything_is_attached(untrained, blocks, sentence):
    models = copy_of(untrained)
    with pytest.raises(ValueError, match=sentence):
        trained_parameters(replace(QUICK, block_ranks=blocks), models)
    assert adapter_names(models) == []


# ---- from a file -----------------------------------------------------------------------------------------------------

FILES = {"kohya": {}, "diffusers": {}, "peft": {}, "comfyui": {}, "pt": {},
         **{kind: {"kind": kind, "rank": 4} for kind in KINDS},
         "dora": {"dora": True}, "tucker": {"tucker": True, "target_modules": ["conv1", "mlp"]},
         "conv": {"target_modules": ["conv1", "mlp", "norm1"]}}


@pytest.mark.parametrize("case", FILES)
def test_a_lora_of_any_format_and_kind_is_taken_up_and_trained_on(untrained, tmp_path, case):
    format = case if case in ("kohya", "diffusers", "peft", "comfyui", "pt") else "kohya"
    path, before = a_lora(untrained, tmp_path / "old.safetensors", format, **FILES[case])
    models = load_lora_into_models(copy_of(untrained), path, name="old")
    with torch.no_grad():
        expected = lora_state(models, "old")
    started = copy_of(untrained)
    parameters = trained_parameters(replace(FROM, text_encoder=True, from_lora=str(path)), started)
    assert {path: (w.kind, w.rank, w.alpha) for path, w in lora_state(started, "lora").items()} == \
        {path: (w.kind, w.rank, w.alpha) for path, w in expected.items()}
    assert all(torch.equal(t, lora_state(started, "lora")[path].tensors[name])
               for path, w in expected.items() for name, t in w.tensors.items())
    assert torch.equal(output(started), output(models)) and not torch.equal(output(started), output(untrained))
    assert {id(p) for p in parameters.values()} == {id(p) for p in get_lora_parameters(started)} and parameters

    out = tmp_path / "run"
    again = train(replace(FROM, text_encoder=True, from_lora=str(path), out=str(out)), copy_of(untrained), pictures())
    loaded = load_lora_into_models(copy_of(untrained), out / "lora.safetensors")
    assert torch.equal(output(again), output(loaded)) and not torch.equal(output(again), output(started))
    changed = [name for name, p in parameters.items() for path, w in [(name.rpartition(".")[0], lora_state(again, "lora"))]
               if not torch.equal(p.detach(), w[path].tensors[name.rpartition(".")[2]])]
    assert len(changed) > 0.6 * len(parameters)  # some of these random layers get no gradient


def test_what_the_file_has_for_a_network_that_is_not_trained_stays_in_force_and_in_the_result(untrained, tmp_path):
    path, before = a_lora(untrained, tmp_path / "old.safetensors")
    result = train(replace(FROM, from_lora=str(path), out=str(tmp_path / "run")), copy_of(untrained), pictures())
    again = load_lora_into_models(copy_of(untrained), tmp_path / "run/lora.safetensors")
    old, new = lora_state(before, "old"), lora_state(again)
    assert old.keys() == new.keys() == lora_state(result, "lora").keys()
    for path in old:
        same = all(torch.equal(t, new[path].tensors[name]) for name, t in old[path].tensors.items())
        assert same == path.startswith("clip."), path


def test_a_file_without_anything_for_a_network_that_is_trained_or_for_another_model_is_refused(untrained, tmp_path):
    models = copy_of(untrained)
    apply_lora_to_model(models["diffusion"], 2, 3.0, name="old")
    save_lora_weights(models, tmp_path / "old.safetensors", "old")
    with pytest.raises(TrainError, match="old.safetensors has nothing for the text_encoder; leave text_encoder out"):
        trained_parameters(replace(FROM, text_encoder=True, from_lora=str(tmp_path / "old.safetensors")), copy_of(untrained))
    other = new_models(replace(SMALL, unet=replace(SMALL.unet, widths=(4, 8))), seed=0)
    with pytest.raises(LoRAFormatError, match="old.safetensors: .* do not fit this model"):
        trained_parameters(replace(FROM, from_lora=str(tmp_path / "old.safetensors")), other)
    assert adapter_names(other) == []
    with pytest.raises(ValueError, match="nowhere.safetensors: no such file"):
        trained_parameters(replace(FROM, from_lora=str(tmp_path / "nowhere.safetensors")), copy_of(untrained))


@pytest.mark.parametrize("field, value", [("rank", 8), ("alpha", 1.0), ("kind", "loha"), ("rslora", True), ("dora", True),
                                          ("targets", ("kohya",)), ("init", "pissa"), ("block_ranks", ("mid_block=2",))])
def test_what_the_file_says_is_not_said_again(field, value):
    with pytest.raises(TrainError, match=rf"{field} is .*; allowed: left out with from_lora, whose file says it"):
        replace(FROM, from_lora="x.safetensors", **{field: value})


@pytest.mark.parametrize("options, config, sentence", [
    ({"dora": True}, {"rank_dropout": 0.1}, "rank_dropout does not go with DoRA"),
    ({"kind": "loha"}, {"rank_dropout": 0.1}, "rank_dropout does not go with kind 'loha'"),
    ({"kind": "oft"}, {"max_norm": 1.0}, "max_norm does not go with kind 'oft'"),
    ({"kind": "oft"}, {"relora_every": 2, "relora_warmup": 1}, "relora_every does not go with kind 'oft'"),
    ({"dora": True}, {"relora_every": 2, "relora_warmup": 1}, r"relora_every does not go with a magnitude \(DoRA\)"),
], ids=str)
def test_what_does_not_go_with_the_kind_of_the_file_is_refused_before_the_first_step(
        untrained, tmp_path, options, config, sentence):
    path, _ = a_lora(untrained, tmp_path / "old.safetensors", **options)
    models = copy_of(untrained)
    with pytest.raises(TrainError, match=sentence):
        train(replace(FROM, from_lora=str(path), out=str(tmp_path / "run"), **config), models, pictures())
    assert adapter_names(models) == [] and not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_goes_on_with_the_same_lora_in_any_place_or_format_and_with_no_other(untrained, tmp_path, monkeypatch):
    path, models = a_lora(untrained, tmp_path / "old.safetensors")
    config = replace(FROM, steps=4, save_every=1, from_lora=str(path), out=str(tmp_path / "run"))
    whole = train(replace(config, out=str(tmp_path / "whole")), copy_of(untrained), pictures())
    stopped(config, copy_of(untrained), monkeypatch, 2)
    other, _ = a_lora(untrained, tmp_path / "other.safetensors", seed=1)
    with pytest.raises(TrainError, match="holds another training .*the LoRA that it starts from changed"):
        train(replace(config, from_lora=str(other)), copy_of(untrained), pictures())
    save_lora_weights(models, tmp_path / "moved", "old", format="peft")
    path.unlink()
    resumed = train(replace(config, from_lora=str(tmp_path / "moved")), copy_of(untrained), pictures())
    assert torch.equal(output(resumed), output(whole))


# ---- whole runs ------------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "dropout": {"dropout": 0.5}, "pissa": {"init": "pissa"},
    "rank_dropout": {"rank_dropout": 0.5}, "module_dropout": {"module_dropout": 0.5}, "max_norm": {"max_norm": 0.01},
    "block_ranks": {"block_ranks": ("mid_block.attentions=8",)}, "nf4": {"quantize": "nf4"},
    "nf4 dora": {"dora": True, "quantize": "nf4"},
}
NEEDED = {"rslora": "scaled", "dora": "takes_dora", "nf4 dora": "takes_dora", "rank_dropout": "drops_ranks",
          "max_norm": "is_product", "block_ranks": "sized"}
REFUSED = {option: {kind for kind in KINDS if not getattr(KINDS[kind], fact)} for option, fact in NEEDED.items()}
REFUSED["pissa"] = KINDS.keys() - {"lora"}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_option_works_with_a_kind_or_is_refused_and_nothing_is_changed_at_first(
        untrained, tmp_path, first_loss, kind, option):
    options = {"kind": kind, "rank": 4, "targets": ("mid_block",), **OPTIONS[option]}
    if kind in REFUSED.get(option, ()):
        with pytest.raises(TrainError, match=r"(kind|rslora|dora|rank_dropout|max_norm|block_ranks) is .*; allowed: "):
            changed(QUICK, **options)
        return
    models = train(changed(QUICK, out=str(tmp_path), **options), copy_of(untrained), pictures())
    rows = metrics(tmp_path)
    if "nf4" not in option:
        assert rows[0]["loss"] == first_loss
    assert all(row["loss"] is not None and not row["skipped"] for row in rows)
    changes = [(layer, layer.adapter("lora")) for layer in lora_layers(models).values()]
    learned = [bool(adapter.effective_delta(layer.base_weight()).any()) for layer, adapter in changes]
    assert all(learned) if "_dropout" not in option else sum(learned) > len(learned) / 2  # some are dropped both times
    if option == "max_norm":
        assert all(adapter.delta(layer.base_weight()).norm() <= 0.01001 for layer, adapter in changes)


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"block_ranks": ("mid_block=2",)}, {"from_lora": "x"},
                                     {"relora_every": 3}], ids=str)
def test_what_belongs_to_a_lora_is_refused_where_none_is_trained(options):
    with pytest.raises(TrainError, match="train is 'full'; allowed: lora, where|relora_every is 3; allowed: 0 unless"):
        TrainConfig(train="full", relora_warmup=1, **options)


def test_dora_on_a_quantised_base_has_the_gradients_of_a_plain_one_with_its_values(untrained):
    sides = [quantize_base(copy_of(untrained)), dequantize_base(quantize_base(copy_of(untrained)))]
    grads = []
    for models in sides:
        parameters = trained_parameters(replace(QUICK, dora=True, targets=("kohya",)), models)
        randomized(models, "lora", scale=0.1)
        g = torch.Generator().manual_seed(0)
        x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 8, generator=g)
        models["diffusion"](x, torch.tensor([3, 700]), context).square().mean().backward()
        grads.append({name: p.grad for name, p in parameters.items()})
    assert grads[0].keys() == grads[1].keys() and any(name.endswith("magnitude") for name in grads[0])
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-3, atol=1e-6 + 1e-3 * float(grads[1][name].abs().max())), name
