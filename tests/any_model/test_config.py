"""LoRA from a config on any model: lora_wrapper's form and LoRAW's, training, adding checkpoints, two models."""

import copy
import json

import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sd.any_model.config import ScaledLowRank, apply_lora_config, extract_diff, merge_weights, prepare_for_training
from sd.any_model.tasks import LoRAModel
from sd.lora import (
    LoRAError,
    active_multipliers,
    attach_state,
    get_lora_parameters,
    load_lora_weights,
    lora_layers,
    lora_state,
    merge_lora_weights,
    modules_of,
    recomputation,
    save_lora_weights,
    set_adapters,
)
from sd.lora_files.write import write_lora
from tests.adapters.cases import fill


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q, self.v = nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 6)
        self.out = nn.Linear(6, 8)

    def forward(self, x):
        x = self.norm(x)
        return x + self.out(self.q(x)[..., :6].tanh() * self.v(x))


class Net(nn.Module):
    """A convolution with everything, then two blocks; `checkpointing` is a function that runs a block, or None."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(4, 8, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.mix = nn.Conv1d(8, 8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointing = None

    def forward(self, x):
        x = self.mix(self.stem(x)).mT
        for block in self.blocks:
            x = block(x) if self.checkpointing is None else self.checkpointing(block, x)
        return x


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype), torch.randn(2, 4, 10, dtype=dtype)


MODULE = {"r": 2, "scale": 0.7, "trainable_scale": 0, "hard": 1}
WRAPPER = {"trainable_model": 0, "q": MODULE, "stem": {**MODULE, "hard": 0, "scale": 1.5}, "blocks.1": {**MODULE, "r": 4}}
LORAW = {"component_whitelist": ["blocks", "mix"], "multiplier": 0.5, "rank": 3, "alpha": 5, "dropout": 0,
         "module_dropout": 0, "lr": 1e-4}
WRAPPED = {"stem": 2, "blocks.0.q": 2, "blocks.1.q": 4, "blocks.1.v": 4, "blocks.1.out": 4}


def factors(model, path, name="default"):
    a = lora_layers(model)[path].adapter(name)
    return a.up.detach().double(), a.down.detach().double()


def product(up, down, shape, groups=1):
    """up · down as a kernel, in fp64: for each group of rows its own product."""
    r = up.shape[1]
    return torch.cat([u.flatten(1) @ d.flatten(1) for u, d in zip(up.chunk(groups), down.split(r))]).reshape(shape)


def changed(bare, deltas):
    """The bare model in fp64 with W + ΔW."""
    model = copy.deepcopy(bare).double()
    with torch.no_grad():
        for path, delta in deltas.items():
            model.get_submodule(path).weight += delta
    return model


def deltas_of(model, scales, name="default"):
    layers = lora_layers(model)
    return {p: s * product(*factors(model, p, name), layers[p].weight.shape, getattr(layers[p], "groups", 1))
            for p, s in scales.items()}


def near(a, b, tolerance=1e-5):
    assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()


# ---- wrapping ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [WRAPPER, LORAW, {"sample_rate": 44100, "model": {}, "lora": LORAW}, {"lora": WRAPPER}])
def test_wrapping_changes_no_bit_and_no_key_of_the_base(config, tmp_path):
    bare, x = net()
    (tmp_path / "lora.json").write_text(json.dumps(config))
    for given in (config, tmp_path / "lora.json", str(tmp_path / "lora.json")):
        model = copy.deepcopy(bare)
        apply_lora_config(model, given)
        assert torch.equal(model(x), bare(x))
        base = LoRAModel(model).state_dict(task=None)
        assert list(base) == list(bare.state_dict()) and all(torch.equal(v, base[k]) for k, v in bare.state_dict().items())


def test_the_longest_name_wins_and_the_raw_scale_is_the_factor_of_up_down():
    bare, x = net()
    model = copy.deepcopy(bare)
    applied = apply_lora_config(model, WRAPPER)
    assert {p: w.rank for p, w in lora_state(model).items()} == WRAPPED
    assert applied.modules == {p: "stem" if p == "stem" else "blocks.1" if "1" in p else "q" for p in WRAPPED}
    fill(model)
    near(model(x), changed(bare, deltas_of(model, {p: 1.5 if p == "stem" else 0.7 for p in WRAPPED}))(x.double()))


def test_a_name_is_whole_components_of_the_path_and_of_three_lengths_the_longest_decides():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(4, 4), "goto_q": nn.Linear(4, 4), "ln": nn.LayerNorm(4),
                                                  "v": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})})
    apply_lora_config(model, {"attn": MODULE, "attn.v": {"r": 0}, "attn.v.1": {**MODULE, "r": 3}})
    assert {p: w.rank for p, w in lora_state(model).items()} == {"attn.q": 2, "attn.goto_q": 2, "attn.v.1": 3}
    apply_lora_config(nn.ModuleDict({"rank": nn.Linear(4, 4), "lora": nn.Linear(4, 4)}), {"rank": MODULE, "lora": MODULE})
    with pytest.raises(LoRAError, match="'o_q' matches no layer"):
        apply_lora_config(model, {"o_q": MODULE}, "other")


@pytest.mark.parametrize("hard", [0, 1])
@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 1), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv3d(4, 6, 2, dilation=2),
                                   nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, padding_mode="reflect")])
def test_hard_and_soft_convolutions_are_one_change_of_the_kernel_and_merge(layer, hard):
    torch.manual_seed(0)
    dims, model = layer.weight.dim() - 2, nn.ModuleDict({"conv": copy.deepcopy(layer)})
    x = torch.randn(2, 4, *[7] * dims)
    apply_lora_config(model, {"conv": {**MODULE, "hard": hard}})
    up, down = factors(fill(model), "conv")
    twin = copy.deepcopy(layer).double()  # hard: the kernel as a product of matrices
    twin.weight.data += 0.7 * product(up, down, layer.weight.shape, layer.groups)
    near(model["conv"](x), twin(x.double()), 1e-5)
    first, last = copy.deepcopy(layer).double(), (F.conv1d, F.conv2d, F.conv3d)[dims - 1]  # soft: a stack of two layers
    stack = 0.7 * last(first._conv_forward(x.double(), down, None), up, groups=layer.groups)
    near(model["conv"](x), first(x.double()) + stack, 1e-5)
    merge_lora_weights(model)
    assert type(model["conv"]) is type(layer)
    near(model["conv"](x), twin(x.double()), 1e-5)


def test_a_scale_that_trains_has_the_gradients_and_the_file_of_the_formula(tmp_path):
    bare, x = net()
    model = copy.deepcopy(bare)
    apply_lora_config(model, {"mix": {**MODULE, "trainable_scale": 1, "scale": 1.7, "r": 3}})
    assert torch.equal(model(x), bare(x))
    assert len(prepare_for_training(model)[0]["params"]) == 3
    fill(model)
    adapter = lora_layers(model)["mix"].adapter("default")
    s = adapter.trained_scale.detach().double().requires_grad_()
    up, down = (t.requires_grad_() for t in factors(model, "mix"))
    W = bare.mix.weight.detach().double() + s * product(up, down, bare.mix.weight.shape)
    y = torch.func.functional_call(copy.deepcopy(bare).double(), {"mix.weight": W}, x.double())
    y.square().mean().backward()
    out = model(x)
    out.square().mean().backward()
    near(out, y)
    for ours, theirs in ((adapter.trained_scale, s), (adapter.up, up), (adapter.down, down)):
        near(ours.grad, theirs.grad, 1e-4)
    torch.optim.SGD(prepare_for_training(model), lr=0.1).step()
    with torch.no_grad():
        expected = model(x)
    save_lora_weights(model, tmp_path / "a.safetensors")
    load_lora_weights(fresh := copy.deepcopy(bare), tmp_path / "a.safetensors")
    near(fresh(x), expected)
    near(merge_lora_weights(model)(x), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_loraws_form_equals_pefts_lora_of_the_same_values(dora):
    bare, x = net()
    ours = copy.deepcopy(bare)
    apply_lora_config(ours, {**LORAW, "component_whitelist": ["blocks"], "weight_decompose": dora})
    config = peft.LoraConfig(r=3, lora_alpha=2.5, target_modules=["q", "v", "out"], use_dora=dora)
    theirs = peft.get_peft_model(copy.deepcopy(bare), config).eval()
    assert len(lora_layers(fill(ours))) == 6
    for path, layer in lora_layers(ours).items():
        peer, adapter = theirs.base_model.model.get_submodule(path), layer.adapter("default")
        peer.lora_A["default"].weight.data.copy_(adapter.down)
        peer.lora_B["default"].weight.data.copy_(adapter.up)
        if dora:
            peer.lora_magnitude_vector["default"].weight.data.copy_(adapter.magnitude.flatten())
    near(ours(x), theirs(x))


def test_loraws_rank_is_clipped_where_a_layer_holds_less_and_alpha_is_divided_by_what_is_left():
    bare, x = net()
    model = copy.deepcopy(bare)
    applied = apply_lora_config(model, {"component_whitelist": ["blocks.0"], "rank": 7, "alpha": 5, "multiplier": 2})
    assert applied.clipped == {"blocks.0.v": 6, "blocks.0.out": 6}
    fill(model)
    near(model(x), changed(bare, deltas_of(model, {"blocks.0.q": 10 / 7, "blocks.0.v": 10 / 6, "blocks.0.out": 10 / 6}))
         (x.double()))


def test_dropouts_work_in_training_only_and_alpha_0_is_the_rank():
    model, x = net()
    apply_lora_config(model, {**LORAW, "alpha": 0, "dropout": 0.3, "module_dropout": 0.2})
    adapters = [layer.adapter("default") for layer in lora_layers(fill(model)).values()]
    assert all((a.alpha, a.dropout, a.module_dropout) == (1.5, 0.3, 0.2) for a in adapters)
    assert not torch.equal(model(x), model(x)) and torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("config, sentence", [
    ({"trainable_model": 0}, "names no module"), ({"lora": {}}, "names no module"),
    ({"blocks.0": MODULE, "q": MODULE, "blocks.1.q": MODULE}, "'q' applies to no layer"),
    ({"blocks.0.q": MODULE, "blocks.0": MODULE, "0.q": MODULE}, "'0.q' applies to no layer"),
    ({"blocks.0": MODULE, "0.q": MODULE}, "'blocks.0' and '0.q' both match blocks.0.q"),
    ({"qq": MODULE}, "'qq' matches no layer"), ({"attn": MODULE}, "matches no layer"), ({".*": MODULE}, "is not a module name"),
    ({"q": 8}, "'q' is 8; a module's options"), ({"q": {**MODULE, "rank": 3}}, "'rank' is not an option; allowed: r, scale"),
    ({"q": {**MODULE, "r": 9}}, "rank 9 does not fit blocks.0.q"), ({"q": {"scale": 1}}, "r is None"),
    ({"q": {**MODULE, "r": 2.0}}, "r is 2.0"), ({"q": {**MODULE, "r": True}}, "r is True"), ({"q": {"r": 0}}, "every r is 0"),
    ({"q": {**MODULE, "scale": 0}}, "scale is 0, with which nothing can be learned"),
    ({"q": {**MODULE, "scale": float("nan")}}, "scale is nan"), ({"q": {**MODULE, "hard": 2}}, "hard is 2; allowed: 0, 1"),
    ({"q": {**MODULE, "lr": -1}}, "lr is -1.0; allowed: 0 or more"), ({"trainable_model": "yes", "q": MODULE}, "is 'yes'"),
    ({"stem": {**MODULE, "r": 3}}, "rank 3 is not a multiple of the convolution's 2 groups"),
    ({**LORAW, "loraplus": 4}, "'loraplus' is not an option"),
    ({**LORAW, "component_whitelist": []}, r"component_whitelist is \[\]"),
    ({**LORAW, "component_whitelist": "blocks"}, "a list of module names is needed"),
    ({"lora": {"rank": 4}}, "component_whitelist is None"),
    ({**LORAW, "component_whitelist": ["blocks", "transformer"]}, "'transformer' matches no layer"),
    ({**LORAW, "rank": 0}, "rank is 0"), ({**LORAW, "multiplier": 0}, "multiplier is 0"),
    ({**LORAW, "alpha": "x"}, "alpha is 'x'"),
    ({**LORAW, "dropout": 1}, "dropout is 1.0; allowed"), ({**LORAW, "weight_decompose": "no"}, "weight_decompose is 'no'")])
def test_a_config_that_cannot_be_is_one_sentence_and_changes_nothing(config, sentence):
    model, x = net()
    kinds, expected = [type(m) for m in model.modules()], model(x)
    with pytest.raises(LoRAError, match=sentence):
        apply_lora_config(model, config)
    assert [type(m) for m in model.modules()] == kinds and torch.equal(model(x), expected)


@pytest.mark.parametrize("text, sentence", [('{"q": {"r": 2}, "q": {"r": 3}}', "'q' is given twice"), ("[1]", "no names with"),
                                            ("{", "cannot be read"), (None, "No such file")])
def test_a_file_that_is_no_config_is_named(text, sentence, tmp_path):
    path = tmp_path / "lora.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LoRAError, match=f"lora.json: .*{sentence}"):
        apply_lora_config(net()[0], path)


def test_a_second_config_of_the_same_name_is_refused_and_of_another_is_a_second_adapter():
    model, _ = net()
    apply_lora_config(model, WRAPPER)
    with pytest.raises(LoRAError, match="'default' already exists"):
        apply_lora_config(model, WRAPPER)
    apply_lora_config(model, LORAW, "b")
    with pytest.raises(LoRAError, match="name the adapter; adapters with a config: 'b', 'default'"):
        prepare_for_training(model)
    assert len(prepare_for_training(model, "b")[0]["params"]) == 2 * 7
    with pytest.raises(LoRAError, match="no adapter named 'c' was made by apply_lora_config"):
        prepare_for_training(model, "c")
    assert not any(p.requires_grad for p in get_lora_parameters(model, "default"))


# ---- loading, training, checkpointing ----------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [WRAPPER, LORAW])
def test_base_weights_may_be_loaded_before_or_after_wrapping(config):
    torch.manual_seed(1)
    weights = Net().state_dict()
    first, x = net()
    last = copy.deepcopy(first)
    first.load_state_dict(weights)
    apply_lora_config(first, config)
    apply_lora_config(last, config)
    fill(first), last.eval()
    for a, b in zip(get_lora_parameters(first), get_lora_parameters(last)):
        b.data.copy_(a)
    last(x)  # with the former base, so that something could be kept
    found = last.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys and all(".adapters." in key for key in found.missing_keys)
    assert torch.equal(last(x), first.eval()(x))
    LoRAModel(last).load_state_dict(net()[0].state_dict(), task=None)
    bare = net()[0]
    apply_lora_config(bare, config)
    for a, b in zip(get_lora_parameters(first), get_lora_parameters(bare)):
        b.data.copy_(a)
    assert torch.equal(last(x), bare.eval()(x))


def test_only_what_the_config_trains_is_trained_at_its_rates():
    model, x = net()
    apply_lora_config(model, {"q": {**MODULE, "lr": 0.1}, "blocks.1.v": MODULE, "mix": {**MODULE, "lr": 0.3}})
    model = copy.deepcopy(fill(model))
    groups = prepare_for_training(model)
    assert [(g.get("lr"), len(g["params"])) for g in groups] == [(0.3, 2), (0.1, 4), (None, 2)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(x).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad == (".adapters." in n) for n, p in model.named_parameters())
    steps = {id(p): (g.get("lr", 0.7), p.grad.clone()) for g in groups for p in g["params"]}
    torch.optim.SGD(groups, lr=0.7).step()
    for name, p in model.named_parameters():
        rate, grad = steps.get(id(p), (0.0, torch.zeros(())))
        near(p.detach(), before[name] - rate * grad, 1e-6)


def test_a_trainable_model_trains_the_base_but_for_the_wrapped_weights_as_lora_wrapper_does():
    model, _ = net()
    apply_lora_config(model, {**WRAPPER, "trainable_model": 1})
    base, adapters = prepare_for_training(model)
    names = {id(p): n for n, p in model.named_parameters()}
    free = {n for n in net()[0].state_dict() if n.rpartition(".")[0] not in WRAPPED}
    assert {names[id(p)] for p in base["params"]} == free and len(adapters["params"]) == 2 * len(WRAPPED)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        f"{path}.{key}" for path in WRAPPED for key in ("weight", "bias") if f"{path}.{key}" in net()[0].state_dict()}


@pytest.mark.parametrize("config", [WRAPPER, {**LORAW, "weight_decompose": 1}, {"blocks": {**MODULE, "trainable_scale": 1}}])
def test_gradient_checkpointing_gives_the_same_gradients(config):
    model, x = net()
    apply_lora_config(model, config)
    fill(model)
    found = []
    for run in (None, lambda block, y: checkpoint(block, y, use_reentrant=False, context_fn=lambda: recomputation(model))):
        model.checkpointing = run
        model.zero_grad()
        prepare_for_training(model)
        model(x).square().mean().backward()
        found.append([p.grad for p in get_lora_parameters(model)])
    assert all(a.abs().sum() > 0 and torch.equal(a, b) for a, b in zip(*found))


# ---- one more checkpoint -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trained", [0, 1])
def test_merging_a_checkpoint_adds_its_change_and_keeps_the_present_one(trained, tmp_path):
    bare, x = net()
    other, model = copy.deepcopy(bare), copy.deepcopy(bare)
    apply_lora_config(other, {**LORAW, "rank": 2, "component_whitelist": ["blocks", "mix", "stem"]})  # a grouped convolution
    save_lora_weights(fill(other, seed=5), tmp_path / "b.safetensors")
    apply_lora_config(model, {"q": {**MODULE, "trainable_scale": trained}, "stem": MODULE})
    fill(model, seed=3)
    adapters = {p: layer.adapter("default") for p, layer in lora_layers(model).items()}
    scale = {p: a.trained_scale.item() if isinstance(a, ScaledLowRank) else 0.7 for p, a in adapters.items()}
    own, more = deltas_of(model, scale), deltas_of(other, dict.fromkeys(lora_layers(other), 1.25))
    total = {p: own.get(p, 0) - 0.5 * more.get(p, 0) for p in own | more}
    report = merge_weights(model, tmp_path / "b.safetensors", -0.5)
    assert report.tensors == 3 * len(more) and active_multipliers(model) == {"default": 1.0}
    near(model(x), changed(bare, total)(x.double()))
    assert lora_state(model)["blocks.0.q"].rank == lora_state(model)["stem"].rank == 4
    assert isinstance(lora_layers(model)["blocks.0.q"].adapter("default"), ScaledLowRank) == bool(trained)
    params = [p for g in prepare_for_training(model) for p in g["params"]]
    assert {id(p) for p in params} == {id(p) for p in get_lora_parameters(model)}
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in params)
    save_lora_weights(model, tmp_path / "sum.safetensors")
    load_lora_weights(again := copy.deepcopy(bare), tmp_path / "sum.safetensors")
    near(again(x), model(x))


def test_loraws_checkpoint_is_added_at_the_alpha_of_its_config():
    bare, x = net()
    model, up, down = copy.deepcopy(bare), torch.randn(8, 2), torch.randn(2, 8)
    apply_lora_config(model, {"q": MODULE})
    merge_weights(model, {"blocks/0/q/lora_down.weight": down, "blocks/0/q/lora_up.weight": up}, 5 / 2)  # alpha / rank
    near(model(x), changed(bare, {"blocks.0.q": 2.5 * up.double() @ down.double()})(x.double()))


def test_merging_leaves_what_was_active_dropped_and_frozen_as_it_was(tmp_path):
    model, x = net()
    apply_lora_config(model, {**LORAW, "dropout": 0.25, "module_dropout": 0.125})
    save_lora_weights(fill(model), tmp_path / "a.safetensors")
    apply_lora_config(model, WRAPPER, "b")
    set_adapters(model, {"default": 0.25})
    prepare_for_training(model, "b")
    lora_layers(model)["mix"].set_block_multiplier("default", 0.5)
    expected = model.eval()(x)
    merge_weights(model, tmp_path / "a.safetensors", 0.0, name="default")
    near(model(x), expected)
    assert active_multipliers(model) == {"default": 0.25}
    merge_weights(model, tmp_path / "a.safetensors", 1.0, name="default")
    set_adapters(model, {"default": 0.125})
    near(model(x), expected)
    adapters = [layer.adapter("default") for p, layer in lora_layers(model).items() if "default" in layer.adapter_names]
    assert all((a.dropout, a.module_dropout, a.from_file) == (0.25, 0.125, False) for a in adapters)
    assert not any(p.requires_grad for p in get_lora_parameters(model, "default"))
    assert all(p.requires_grad for p in get_lora_parameters(model, "b"))


def test_a_checkpoint_that_cannot_be_added_changes_nothing(tmp_path):
    model, x = net()
    apply_lora_config(model, {**LORAW, "weight_decompose": True})
    save_lora_weights(fill(model), tmp_path / "dora.safetensors")
    expected = model(x)
    for given, sentence in ((tmp_path / "dora.safetensors", "concat cannot add lora with a magnitude"),
                            ({"blocks.7.q.lora_up.weight": torch.ones(8, 1), "blocks.7.q.lora_down.weight": torch.ones(1, 8)},
                             "blocks.7.q")):
        with pytest.raises(ValueError, match=sentence):
            merge_weights(model, given)
        assert torch.equal(model(x), expected)


# ---- two models --------------------------------------------------------------------------------------------------------

class Zoo(nn.Module):
    """One of each: embedding, fused attention, norm, transposed linear, a parameter and a buffer of nobody's."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D
        self.embed, self.attn = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.fc, self.gain = nn.LayerNorm(8), Conv1D(6, 8), nn.Parameter(torch.ones(8))
        self.conv = nn.Conv1d(6, 4, 3, groups=2)
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x):
        x = self.embed(x) * self.gain + self.shift
        return self.conv(self.fc(self.norm(self.attn(x, x, x, need_weights=False)[0])).mT)


def zoo():
    torch.manual_seed(0)
    model = Zoo().requires_grad_(False).eval()
    tuned = copy.deepcopy(model)
    for name, p in tuned.named_parameters():
        if name != "gain":
            p += torch.randn(p.shape) * 0.1
    return model, tuned, torch.arange(8).view(2, 4)


@pytest.mark.parametrize("as_weights", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
def test_the_difference_of_two_models_turns_one_into_the_other(rank, as_weights, tmp_path):
    base, tuned, x = zoo()
    state, report = extract_diff(tuned.state_dict() if as_weights else tuned, base, rank)
    assert set(state) == {"embed", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "norm", "fc", "conv"}
    assert report.error < 1e-5
    if rank is None:
        assert {w.kind for w in state.values()} == {"full"}
        write_lora(tmp_path / "diff.safetensors", state, modules_of(base))
        load_lora_weights(base, tmp_path / "diff.safetensors")
    else:
        assert {w.kind for w in state.values()} == {"lora", "full"} and state["conv"].kind == state["norm"].kind == "full"
        attach_state(base, state, "diff")
    near(base(x), tuned(x), 1e-4)


def test_a_low_rank_of_the_difference_is_the_best_one():
    base, _ = net()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.mix.weight += torch.randn(8, 8, 1)
    state, report = extract_diff(tuned, base, 3)
    D = (tuned.mix.weight - base.mix.weight).detach().double().flatten(1)
    U, S, V = torch.linalg.svd(D)
    up, down = state["mix"].tensors["up"].double().flatten(1), state["mix"].tensors["down"].double().flatten(1)
    near(up @ down * (state["mix"].alpha / 3), U[:, :3] * S[:3] @ V[:3])
    assert list(state) == ["mix"] and abs(report.error - (S[3:].square().sum() / S.square().sum()).sqrt()) < 1e-5
    by_share = extract_diff(tuned, base, 5, frobenius=0.9)[0]["mix"].rank
    assert by_share == min(5, 1 + int((S.square().cumsum(0) < 0.9 * S.square().sum()).sum()))
    apply_lora_config(base, LORAW)  # adapters of the base are no part of its weights
    fill(base)
    for given in (tuned, tuned.state_dict()):
        assert torch.equal(extract_diff(given, base, 3)[0]["mix"].tensors["up"], state["mix"].tensors["up"])


@pytest.mark.parametrize("spoil, sentence", [
    (lambda m: m.gain.add_(1), "gain differs, which no adapter can change; skip='gain'"),
    (lambda m: m.shift.add_(1), "shift differs"), (lambda m: m.fc.weight.fill_(torch.nan), "not finite"),
    (lambda m: apply_lora_config(m, {"fc": MODULE}), r"has the LoRAs 'default' attached"),
    (lambda m: setattr(m, "conv", nn.Conv1d(6, 4, 5, groups=2)), "different names or shapes")])
def test_a_difference_that_no_adapter_can_hold_is_one_sentence(spoil, sentence):
    base, tuned, _ = zoo()
    spoil(tuned)
    with pytest.raises(LoRAError, match=sentence):
        extract_diff(tuned, base)


def test_what_may_differ_is_left_out_on_request_only_and_equal_models_are_an_error():
    base, tuned, _ = zoo()
    tuned.gain += 1
    assert set(extract_diff(tuned, base, skip="gain|attn")[0]) == {"embed", "norm", "fc", "conv"}
    with pytest.raises(LoRAError, match="no weight differs"):
        extract_diff(copy.deepcopy(base), base)
    with pytest.raises(LoRAError, match="do not fit the base"):
        extract_diff({"gain": torch.ones(8)}, base)


# ---- what users stumbled over ------------------------------------------------------------------------------------------

def test_a_trained_scale_stays_when_relora_begins_the_adapter_anew():
    model = Net()
    apply_lora_config(model, {"q": {"r": 2, "scale": 3, "trainable_scale": 1}})
    layer = lora_layers(model)["blocks.0.q"]
    adapter = layer.adapter("default")
    fill(model)
    before = adapter.trained_scale.item()
    adapter.restart(layer.lora_shape())
    assert adapter.trained_scale.item() == before != 0 and not adapter.up.any() and adapter.down.any()
    layer(torch.ones(1, 8)).sum().backward()
    assert adapter.up.grad.any()  # it can learn again


@pytest.mark.parametrize("options", [{"trainable_scale": 1}, {"scale": 3}])
def test_a_norm_has_no_factor_and_is_refused_before_anything_changes(options):
    model = Net()
    with pytest.raises(LoRAError, match="'blocks.0.norm' is a norm, whose change is a full difference without a factor"):
        apply_lora_config(model, {"blocks.0.norm": {"r": 4} | options})
    assert not lora_layers(model)
    apply_lora_config(model, {"blocks.0.norm": {"r": 4}})
    assert [w.kind for w in lora_state(model, "default").values()] == ["full"]


@pytest.mark.parametrize("tuned, base", [("state", "state"), ("model", "state"), (None, "model"), ("model", 3)])
def test_a_difference_is_one_of_models(tuned, base):
    model = Net()
    given = {"model": model, "state": model.state_dict(), None: None, 3: 3}
    with pytest.raises(LoRAError, match="(tuned|base) is not a model; a model.* is needed"):
        extract_diff(given[tuned], given[base])
