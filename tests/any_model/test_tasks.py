"""LoRAModel: tasks on any model, chosen at each call, for the whole batch or for each sample."""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import peft
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from bench.any_module import time_rank
from bench.common import Options, environment
from sd.any_model.tasks import LoRAModel
from sd.lora import LoRAError, LoRAFormatError, active_multipliers, lora_layers, recomputation
from tests.adapters.cases import fill
from tests.any_model.tiny import ALPHA, RANK, SAMPLES, Net, net, tasked, tokens
from tests.any_model.zoo import ZOO, assert_near, changed, gpt2, made, run

ROOT = Path(__file__).resolve().parents[2]

CHOICES = [{}, {"task": "a"}, {"tasks": {"a": 0.5, "b": 1.0}}, {"task": ["a", None, "b", "b"]}]


# ---- calls -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ZOO)
def test_adding_a_task_changes_no_bit_and_no_key_of_the_base(kind):
    bare, x, targets = made(kind)
    model = LoRAModel(copy.deepcopy(bare))
    expected = run(bare, x)
    for name in ("a", "b"):
        model.add_task(name, rank=RANK, targets=targets)
        with torch.no_grad():
            assert torch.equal(run(model, x), expected)
            with model.using(name):
                assert_near(run(model.model, x), expected)  # to rounding, where an attention leaves its fast path
    base = model.state_dict(task=None)
    assert list(base) == list(bare.state_dict()) and all(torch.equal(v, base[k]) for k, v in bare.state_dict().items())
    bare.load_state_dict(base, strict=True)
    assert model.tasks == ["a", "b"]
    for name in ("b", "a"):
        model.remove_task(name)
    assert torch.equal(run(model, x), expected) and list(model.state_dict()) == list(bare.state_dict())


def test_a_call_has_the_tasks_that_it_names_and_weights():
    model, bare, x = tasked()
    for given, multipliers in (({}, {}), ({"task": "a"}, {"a": 1.0}), ({"tasks": ["a", "b"]}, {"a": 1.0, "b": 1.0}),
                               ({"tasks": {"a": 0.7, "b": -0.3}}, {"a": 0.7, "b": -0.3}), ({"tasks": []}, {})):
        expected = changed(model.model, bare, multipliers)(x, shift=2.0)
        assert_near(model(x, shift=2.0, **given), expected)
        assert_near(model(x, 2.0, **given), expected)
        with model.using(**given):
            assert_near(model.model(x, 2.0), expected)


def test_each_sample_may_have_its_own_task():
    model, bare, x = tasked(("a", "b", "c"))
    for samples in (["a", None, "c", "a"], ["b", {"a": 0.5, "c": -1.0}, None, "c"], [None] * 4):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out = model(x, task=samples).detach()
            for i, sample in enumerate(samples):
                multipliers = {sample: 1.0} if isinstance(sample, str) else sample or {}
                assert_near(out[i:i + 1], changed(model.model, bare, multipliers)(x[i:i + 1]))
    with pytest.raises(LoRAError, match="given for 3 rows, but the layer got 4 rows"):
        model(x, task=["a", None, "b"])


def test_mixed_batches_and_several_tasks_equal_pefts():
    torch.manual_seed(0)
    bare, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), torch.randn(4, 3, 6)
    ours, names = LoRAModel(copy.deepcopy(bare)), ["a", "b"]
    config = peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=["0", "2"])
    theirs = peft.get_peft_model(copy.deepcopy(bare), config, adapter_name="a").eval()
    theirs.add_adapter("b", config)
    for i, name in enumerate(names):
        ours.add_task(name, rank=RANK, alpha=ALPHA)
        fill(ours.model, name, seed=i)
        for path, layer in lora_layers(ours.model).items():
            peer = theirs.base_model.model.get_submodule(path)
            peer.lora_A[name].weight.data.copy_(layer.adapter(name).down)
            peer.lora_B[name].weight.data.copy_(layer.adapter(name).up)
    ours.eval()
    with torch.no_grad():
        expected = theirs(x, adapter_names=["a", "__base__", "b", "a"])
        assert torch.allclose(ours(x, task=["a", None, "b", "a"]), expected, atol=1e-5)
        theirs.base_model.set_adapter(names)
        assert torch.allclose(ours(x, tasks=names), theirs(x), atol=1e-5)


def test_an_exception_in_forward_leaves_no_task_selected():
    model, bare, x = tasked()
    with pytest.raises(IndexError):
        model(x + 20, task="a")
    assert active_multipliers(model.model) == {} and torch.equal(model(x), bare(x))


@pytest.mark.parametrize("call", [lambda m, x: m(x, task="c"), lambda m, x: m(x, tasks=["a", "c"]),
                                  lambda m, x: m(x, task=["a", "c", None, None]), lambda m, x: m.remove_task("c"),
                                  lambda m, x: m.state_dict(task="c"), lambda m, x: m.load_state_dict({}, task="c"),
                                  lambda m, x: m.requires_grad_(True, task="c"), lambda m, x: m.parameters(task="c"),
                                  lambda m, x: m.save_task("x.safetensors", "c"), lambda m, x: m.merge("c")])
def test_an_unknown_name_is_an_error_that_tells_the_known_ones(call):
    model, bare, x = tasked()
    with pytest.raises(LoRAError, match="no adapter is named 'c'; loaded: 'a', 'b'"):
        call(model, x)
    assert torch.equal(model(x), bare(x))


@pytest.mark.parametrize("given, sentence", [
    ({"task": "a", "tasks": ["b"]}, "one of them is needed"), ({"tasks": "a"}, "tasks is a list of names"),
    ({"task": []}, r"task is \[\]"), ({"task": {"a": 1.0}}, "a name, None, or a list with one entry for each sample"),
    ({"task": 3}, "task is 3;"), ({"task": [1, 2, None, "a"]}, r"task is \[1, 2, None, 'a'\];"),
    ({"task": b"a"}, "task is b'a';"), ({"tasks": 3}, "tasks is 3;"), ({"tasks": b"a"}, "tasks is b'a';")])
def test_what_is_no_choice_of_tasks_is_one_sentence(given, sentence):
    model, _, x = tasked()
    with pytest.raises(LoRAError, match=sentence):
        model(x, **given)


@pytest.mark.parametrize("given, sentence", [
    ({"name": None}, "the name of an adapter is None; a string"), ({"name": b"c"}, "the name of an adapter is b'c'"),
    ({"rank": True}, "rank True does not fit"), ({"rank": 2.0}, "rank 2.0 does not fit"),
    ({"rank": "x"}, "rank 'x' does not fit"), ({"alpha": "x"}, "alpha is 'x'; a finite number"),
    ({"targets": 3}, "target 3 is not a preset"), ({"targets": ["out", 3]}, "target 3 is not a preset")])
def test_what_makes_no_task_is_one_sentence_and_changes_nothing(given, sentence):
    model, _, x = tasked()
    with pytest.raises(LoRAError, match=sentence):
        model.add_task(**{"name": "c"} | given)
    with pytest.raises(LoRAError, match="name of an adapter is 3"):
        model.load_task(model.state_dict(task="a"), 3)
    assert model.tasks == ["a", "b"]


def test_what_is_no_model_and_what_is_no_state_are_refused():
    model, _, _ = tasked()
    with pytest.raises(LoRAError, match="the model is 3; an nn.Module is needed"):
        LoRAModel(3)
    for task in ("a", None):
        with pytest.raises(LoRAError, match="the state is 3; a dict of tensors is needed"):
            model.load_state_dict(3, task=task)


def test_a_name_that_is_in_use_is_refused_and_changes_nothing():
    model, _, x = tasked()
    before = model(x, tasks=["a", "b"])
    with pytest.raises(LoRAError, match="'a' already exists"):
        model.add_task("a")
    assert torch.equal(model(x, tasks=["a", "b"]), before)


def test_calls_of_threads_give_what_serial_calls_give():
    model, _, x = tasked(("a", "b", "c"))
    choices = [{"task": "c"}, *CHOICES[1:]]
    with torch.no_grad():
        expected = [model(x, **choice) for choice in choices]
    wrong = []

    def work(i):
        for _ in range(25):
            with torch.no_grad():
                if not torch.equal(model(x, **choices[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and active_multipliers(model.model) == {}


# ---- training ----------------------------------------------------------------------------------------------------------

def step(model, optimizer, x, **choice):
    optimizer.zero_grad()
    (model(x, **choice) - 1).square().mean().backward()
    optimizer.step()


def test_interleaved_training_changes_only_the_task_in_use():
    model, bare, x = tasked(("a", "b", "c"))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)  # of all: what is not in use has no gradient
    for choice, used in (({"task": "a"}, {"a"}), ({"task": "b"}, {"b"}), ({"tasks": ["a", "b"]}, {"a", "b"}),
                         ({"task": ["c", None, "a", None]}, {"a", "c"})):
        before = {name: [p.clone() for p in model.parameters(task=name)] for name in (*"abc", None)}
        step(model, optimizer, x, **choice)
        for name, old in before.items():
            same = all(torch.equal(p, q) for p, q in zip(model.parameters(task=name), old))
            assert same == (name not in used), name


def test_interleaved_training_of_two_tasks_is_that_of_each_alone():
    both, x = tasked(scale := ("a", "b"))[0], net()[1]
    alone = {name: copy.deepcopy(both) for name in scale}
    for model, order in ((both, "abab"), (alone["a"], "aa"), (alone["b"], "bb")):
        optimizers = {name: torch.optim.AdamW(model.parameters(task=name), 0.01) for name in scale}
        for name in order:
            step(model, optimizers[name], x, task=name)
    for name, model in alone.items():
        assert all(torch.equal(p, q) for p, q in zip(both.parameters(task=name), model.parameters(task=name)))


def test_requires_grad_is_for_a_task_for_the_base_or_for_all():
    model, _, x = tasked()

    def flags():
        return {name: {p.requires_grad for p in model.parameters(task=name)} for name in ("a", "b", None)}

    assert flags() == {"a": {True}, "b": {True}, None: {False}}
    assert not any(p.requires_grad for p in LoRAModel(Net()).parameters())
    assert model.requires_grad_(False, task="a") is model and flags() == {"a": {False}, "b": {True}, None: {False}}
    model.requires_grad_(True, task=None)
    assert flags() == {"a": {False}, "b": {True}, None: {True}}
    model.requires_grad_(False)
    assert flags() == {"a": {False}, "b": {False}, None: {False}}
    model.requires_grad_(True, task="b")
    model(x, task=["a", None, "b", None]).sum().backward()
    assert all(p.grad is None for name in ("a", None) for p in model.parameters(task=name))
    assert all(p.grad is not None for p in model.parameters(task="b"))


def test_gradients_of_a_routed_batch_are_those_of_its_parts():
    model, _, x = tasked()
    samples, grads = ["a", "b", None, "a"], []
    for parts in ([range(4)], [[0], [1], [3]]):  # the base alone has no gradient
        model.zero_grad()
        for part in parts:
            model(x[list(part)], task=[samples[i] for i in part]).square().sum().backward()
        grads.append([p.grad.clone() for name in "ab" for p in model.parameters(task=name)])
    for whole, summed in zip(*grads):
        assert_near(whole, summed, 2e-5)


def test_a_model_with_checkpointing_of_its_own_trains_by_plain_calls():
    torch.manual_seed(0)
    model, x, grads = LoRAModel(gpt2(2)), tokens(2, 5), []
    model.add_task("a", rank=RANK, targets=["transformer.h"])
    fill(model.model)
    for checkpointing in (False, True):
        if checkpointing:
            how = {"use_reentrant": False, "context_fn": lambda: recomputation(model.model)}
            model.model.gradient_checkpointing_enable(how)
        model.zero_grad()
        model(x, task="a").logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters(task="a")])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- states, files, merging --------------------------------------------------------------------------------------------

def test_the_state_of_a_task_is_its_file_and_goes_back_in_place(tmp_path):
    model, _, x = tasked()
    model.save_task(tmp_path / "a.safetensors", "a")
    state, file = model.state_dict(task="a"), load_file(tmp_path / "a.safetensors")
    assert state.keys() == file.keys() and all(torch.equal(state[k], file[k]) for k in file)
    assert sum(k.endswith(".alpha") for k in file) == 3 and {float(file[k]) for k in file if k.endswith(".alpha")} == {ALPHA}
    parameters = list(model.parameters(task="b"))
    with torch.no_grad():
        expected = model(x, task="a")
        model(x, task="b")  # what is derived from the old values must not be used again
        assert model.load_state_dict(file, task="b") == ([], [])
        assert torch.equal(model(x, task="b"), expected)
    assert all(p is q and p.requires_grad for p, q in zip(parameters, model.parameters(task="b")))
    other = LoRAModel(net()[0])
    assert other.load_task(tmp_path / "a.safetensors", "c").tensors == len(file)
    assert torch.equal(other(x, task="c"), expected) and torch.equal(other(x), model(x))


def test_the_state_of_all_goes_back_also_inside_another_model():
    model, _, x = tasked()
    state = copy.deepcopy(model.state_dict())
    fresh = LoRAModel(net()[0])
    for name in ("a", "b"):
        fresh.add_task(name, rank=RANK, alpha=ALPHA, targets=["full", "embed"])
    assert not fresh.load_state_dict(state).missing_keys and torch.equal(fresh(x, tasks=["a", "b"]), model(x, tasks=["a", "b"]))
    outer, other = nn.ModuleDict({"inner": model}), nn.ModuleDict({"inner": copy.deepcopy(fresh)})
    fill(model.model, "a", seed=7)
    assert all(k.startswith(("inner.embed.", "inner.conv.", "inner.out.")) for k in outer.state_dict())
    other.load_state_dict(outer.state_dict(), strict=True)
    assert torch.equal(other["inner"](x, task="a"), model(x, task="a"))


def test_the_state_of_the_base_goes_back_under_the_bare_models_keys():
    model, bare, x = tasked()
    with torch.no_grad():
        for p in bare.parameters():
            p.mul_(2)
        before = model(x, task="a")
        assert model.load_state_dict(bare.state_dict(), task=None) == ([], [])
        assert torch.equal(model(x), bare(x)) and not torch.equal(model(x, task="a"), before)
    state = bare.state_dict()
    state["extra"] = state.pop("out.bias")
    with pytest.raises(LoRAError, match="1 are missing, first 'out.bias' and 1 are unexpected, first 'extra'"):
        model.load_state_dict(state, task=None)
    assert model.load_state_dict(state, strict=False, task=None) == (["out.bias"], ["extra"])


def test_the_base_of_a_model_with_tasks_inside_another_has_no_adapters_keys():
    model, bare, _ = tasked()
    outer = LoRAModel(nn.ModuleDict({"inner": model, "own": nn.Linear(5, 5)}))
    outer.add_task("c", rank=RANK, targets=["own"])
    plain = nn.ModuleDict({"inner": bare, "own": nn.Linear(5, 5)})
    assert list(outer.state_dict(task=None)) == list(plain.state_dict())
    assert list(outer.state_dict(task=None, prefix="x.")) == [f"x.{key}" for key in plain.state_dict()]
    assert not any(v.requires_grad for v in outer.requires_grad_(True, task=None).state_dict(task=None).values())
    assert all(p is q for p, q in zip(outer.state_dict(task=None, keep_vars=True).values(), outer.parameters(task=None)))
    assert outer.load_state_dict(plain.state_dict(), task=None) == ([], [])
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in outer.state_dict(task=None).items())


def test_a_base_state_with_a_wrong_shape_is_refused_before_anything_is_copied():
    model, bare, _ = tasked()
    state = {key: value + 1 for key, value in bare.state_dict().items()}
    state["out.bias"] = torch.zeros(1)
    before = {key: value.clone() for key, value in model.state_dict(task=None).items()}
    with pytest.raises(LoRAError, match="1 of .* tensors do not fit the base, first 'out.bias'"):
        model.load_state_dict(state, task=None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict(task=None).items())


def test_a_state_that_does_not_fit_is_refused_whole():
    model, _, x = tasked()
    before = model(x, task="a").detach()
    state = model.state_dict(task="b")
    part = {k: v for k, v in state.items() if not k.startswith("conv.")}
    with pytest.raises(LoRAError, match="does not fit task 'a': 1 are missing, first 'conv'"):
        model.load_state_dict(part, task="a")
    assert torch.equal(model(x, task="a"), before)
    assert model.load_state_dict(part, strict=False, task="a") == (["conv"], [])
    model.add_task("small", rank=1)
    with pytest.raises(LoRAError, match="1 are unexpected, first 'embed'"):
        model.load_state_dict(state, task="small")
    with pytest.raises(LoRAError, match="of task 'small' holds"):
        model.load_state_dict(state, strict=False, task="small")
    strange = {"elsewhere.lora_down.weight": torch.zeros(2, 4), "elsewhere.alpha": torch.tensor(2.0), "odd": torch.zeros(2)}
    with pytest.raises(LoRAFormatError, match="odd"):
        model.load_state_dict(strange | state, task="a")
    del strange["odd"]
    with pytest.raises(LoRAFormatError, match="elsewhere"):
        model.load_state_dict(strange | state, task="a")
    with pytest.raises(LoRAError, match="elsewhere"):  # one class to catch for all that a LoRA can be refused for
        model.load_task(strange | state, "new")


def test_not_strict_what_the_model_does_not_know_is_left_and_told():
    model, _, x = tasked()
    state, before = model.state_dict(task="b"), model(x, task="a").detach()
    strange = {"elsewhere.lora_down.weight": torch.zeros(2, 4), "elsewhere.alpha": torch.tensor(2.0), "odd": torch.zeros(2)}
    assert model.load_state_dict(strange, strict=False, task="a") == (["embed", "conv", "out"], ["odd", "elsewhere"])
    assert torch.equal(model(x, task="a"), before)
    part = {k: v for k, v in state.items() if not k.startswith("conv.")}
    assert model.load_state_dict(strange | part, strict=False, task="a") == (["conv"], ["odd", "elsewhere"])
    with torch.no_grad():
        assert not torch.equal(model(x, task="a"), before)
        model.load_state_dict(strange | state, strict=False, task="a")
        assert torch.equal(model(x, task="a"), model(x, task="b"))
    half = {k: v for k, v in state.items() if k != "out.lora_up.weight"}
    with pytest.raises(LoRAFormatError, match="out"):
        model.load_state_dict(half, strict=False, task="a")


def test_a_file_brings_its_alpha_to_a_task_that_had_another(tmp_path):
    model, _, x = tasked()
    save_file(model.state_dict(task="a"), tmp_path / "a.safetensors")
    other = LoRAModel(net()[0])
    other.add_task("a", rank=RANK, alpha=1.0, targets=["full", "embed"])
    other.load_state_dict(load_file(tmp_path / "a.safetensors"), task="a")
    assert torch.equal(other(x, task="a"), model(x, task="a"))


def test_merged_tasks_are_used_by_calls_with_exactly_these():
    model, bare, x = tasked()
    with torch.no_grad():
        expected = {key: model(x, **choice) for key, choice in (("a", {"task": "a"}), ("ab", {"tasks": {"a": 0.5, "b": 1.0}}))}
        model.merge(tasks={"a": 0.5, "b": 1.0})
        with model.using(tasks={"a": 0.5, "b": 1.0}):
            assert all(layer.is_merged() for layer in lora_layers(model.model).values())
        assert_near(model(x, tasks={"a": 0.5, "b": 1.0}), expected["ab"])
        assert torch.equal(model(x, task="a"), expected["a"]) and torch.equal(model(x), bare(x))
        model.unmerge()
        assert torch.equal(model(x, tasks={"a": 0.5, "b": 1.0}), expected["ab"])
        plain = model.merge_for_good(tasks={"a": 0.5, "b": 1.0})
    assert type(plain) is Net and list(plain.state_dict()) == list(bare.state_dict())
    assert_near(plain(x), expected["ab"])


@pytest.mark.parametrize("given", [{}, {"tasks": []}, {"tasks": {"a": 0.0}}, {"task": [None, None]}])
def test_a_merge_of_no_task_is_refused(given):
    model, _, _ = tasked()
    with pytest.raises(LoRAError, match="there is nothing to merge"):
        model.merge(**given)


def test_inference_is_compiled_as_one_graph_whatever_the_tasks():
    model, _, x = tasked(("a", "b", "c"))
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        for choice in (*CHOICES, {"task": "b"}, {"tasks": {"c": 0.3}}):
            assert_near(compiled(x, **choice), model(x, **choice))


def test_copies_pickles_and_compiled_calls_do_as_the_model_does():
    model, _, x = tasked()
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), compiled):
            for choice in CHOICES[:2] if other is compiled else CHOICES:
                assert_near(other(x, **choice), model(x, **choice))


# ---- several processes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [1, 2])
def test_processes_of_ddp_share_the_gradients_of_the_whole_batch(world, tmp_path):
    model, _, x = tasked()
    model(x, task=SAMPLES).square().mean().backward()
    command = [sys.executable, "-m", "tests.any_model.tiny"]
    processes = [subprocess.Popen([*command, str(rank), str(world), str(tmp_path)], cwd=ROOT) for rank in range(world)]
    assert all(process.wait(timeout=120) == 0 for process in processes)
    for rank in range(world):
        grads = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for grad, p in zip(grads, model.parameters(task="a")):
            assert_near(grad, p.grad, 2e-5)


def test_what_the_benchmark_compares_with_peft_is_equal():
    assert "model BERT 64x2, n" in environment(Options(), "BERT 64x2") and "model tiny, n" in environment(Options())
    rows = time_rank(Options(n=1, threads=1), 4)
    assert [row[:3] for row in rows] == [[what, 4, case] for what in ("forward", "forward + backward")
                                         for case in ("one task", "four at once", "routed over four")]
    assert all(float(row[-1]) < 1e-5 and float(row[5]) > 0 for row in rows)


def test_calls_leave_nothing_behind_that_copies_and_files_would_carry():
    model, x = LoRAModel(nn.Linear(4, 4)), torch.ones(1, 4)
    model.add_task("a")
    sizes = []
    with torch.no_grad():
        for times in (4, 400):  # deeper than Python's stack
            for choice in ({"task": "a"}, {}, {"tasks": {"a": 0.5}}) * times:
                model(x, **choice)
            sizes.append(len(pickle.dumps(model)))
        model.remove_task("a")
        model.add_task("a", rank=2)
        assert torch.equal(copy.deepcopy(model)(x, task="a"), model(x, task="a"))
        assert torch.equal(pickle.loads(pickle.dumps(model))(x, task="a"), model(x, task="a"))
    assert sizes[0] == sizes[1]


def test_a_task_named_twice_is_refused():
    model = LoRAModel(nn.Linear(4, 4))
    model.add_task("a")
    with pytest.raises(LoRAError, match="which names one twice; give a dict of weights"):
        model(torch.ones(1, 4), tasks=["a", "a"])
