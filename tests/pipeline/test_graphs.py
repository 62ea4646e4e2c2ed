"""Calls repeated from graphs. With a stand-in for CUDA's, whole pictures have the bits of plain calls, and rules are kept."""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sd import graphs
from sd.adapters.derived import STRUCTURES_KEPT
from sd.config import TINY, UNetConfig, VAEConfig
from sd.lora import (
    KINDS,
    apply_lora_to_model,
    get_lora_parameters,
    lora_layers,
    merge,
    quantize_base,
    remove_lora,
    set_adapters,
    set_lora_enabled,
    unmerge,
    use_adapters,
)
from sd.models import Models, build_networks, new_models
from sd.pipeline import generate
from sd.prompts.tokenizer import load_tokenizer
from tests.peers import randomize
from tests.pipeline.checked_tape import BrokenRule, CheckedTape

SMALL = replace(TINY, vae=VAEConfig(widths=(16, 16), layers_per_block=1, norm_groups=8), image_size=16,
                unet=UNetConfig(widths=(16, 32), attention=(True, False), layers_per_block=1, heads=2, context_width=32,
                                norm_groups=8))
TAPES: list[CheckedTape] = []
tokenizer = cache(load_tokenizer)


class Tape(CheckedTape):
    def __init__(self):
        TAPES.append(self)


@pytest.fixture
def taped(monkeypatch):
    """Graphs on the CPU; returns the list of those that were captured."""
    TAPES.clear()
    monkeypatch.setitem(graphs.TAPES, "cpu", lambda: Tape)
    monkeypatch.setattr("sd.placement.pack", lambda network: None)  # of the CPU alone
    yield TAPES
    TAPES.clear()


def small(config=SMALL, dtype=torch.float32):
    networks = {key: randomize(network, i).requires_grad_(False).to(dtype)
                for i, (key, network) in enumerate(build_networks(config).items())}
    return Models(networks, config, tokenizer())


def add(models, name, *, rank=2, targets="attn", seed=None, **options):
    """A LoRA as one from a file: random and frozen."""
    apply_lora_to_model({"diffusion": models["diffusion"]}, rank=rank, alpha=3.0, target_modules=targets, name=name, **options)
    g = torch.Generator().manual_seed(sum(map(ord, name)) if seed is None else seed)
    with torch.no_grad():
        for p in get_lora_parameters(models, name):
            p.add_(torch.randn(p.shape, generator=g) * 0.15)
            p.requires_grad_(False)
    set_adapters(models, {})
    return models


@pytest.fixture
def models():
    m = small()
    for name in "abcd":
        add(m, name)
    add(m, "wide", rank=5)
    return m


def pictures(models, prompt="a cat", *, steps=4, sampler="euler", **arguments):
    return generate(prompt, models=models, seed=3, n_inference_steps=steps, cfg_scale=3.0, sampler_name=sampler, **arguments)


def as_ever(monkeypatch, models, *args, **arguments):
    with monkeypatch.context() as patch:
        patch.setenv("SD_CUDA_GRAPHS", "0")
        return pictures(models, *args, **arguments)


FOUR = [{name: 1.0} for name in "abcd"]
CASES = {
    "base": dict(lora={}),
    "one": dict(lora={"a": 0.8}, merged=False),
    "two": dict(lora={"a": 0.8, "wide": -0.5}, merged=False),
    "merged": dict(lora={"a": 0.8, "wide": -0.5}, merged=True),
    "four routed": dict(prompt=["a cat"] * 4, lora=FOUR),
    "four mixed": dict(prompt=["a cat"] * 4, lora=[{"a": 0.3, "b": 0.2}, {"wide": 1.0}, {}, {"c": 0.5}]),
    "no guidance": dict(lora={"a": 0.8}, merged=False, do_cfg=False),
    "another size": dict(lora={"a": 0.8}, merged=False, width=24, height=20),
    "noise in each step": dict(lora={"a": 0.8}, merged=False, sampler="dpmpp_2m_sde"),
    "two calls a step": dict(lora={"a": 0.8}, merged=False, sampler="heun"),
    "img2img": dict(lora={"a": 0.8}, merged=False, steps=6, strength=0.8,
                    input_image=Image.new("RGB", (16, 16), (200, 30, 90))),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_pictures_have_the_same_bits_from_one_graph(models, taped, monkeypatch, case):
    arguments = CASES[case]
    want = as_ever(monkeypatch, models, **arguments)
    assert want.std() > 5 and not taped
    for _ in range(2):  # the second finds the graph of the first
        assert np.array_equal(pictures(models, **arguments), want)
    assert len(taped) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_same_bits_too(taped, monkeypatch, dtype):
    models = add(add(small(dtype=dtype), "a"), "b")
    for lora in ({}, {"a": 0.7}, {"b": 0.7}, {"a": 0.5, "b": 0.7}):
        assert np.array_equal(pictures(models, lora=lora), as_ever(monkeypatch, models, lora=lora))
    assert len(taped) == 3  # none, one, two


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_switched_within_a_graph(taped, monkeypatch, kind):
    models = small()
    for name in "ab":
        add(models, name, kind=kind, rank=None if not KINDS[kind].sized else 2)
    for lora in ({"a": 1.0}, {"b": 1.0}, {"a": 0.5}):
        assert np.array_equal(pictures(models, lora=lora, merged=False), as_ever(monkeypatch, models, lora=lora, merged=False))
    assert len(taped) == 1


def test_convolutions_biases_and_magnitudes_are_switched_within_a_graph(taped, monkeypatch):
    models = small()
    for name in "ab":
        add(models, name, targets="full")
        for layer in list(lora_layers(models).values())[::3]:
            layer.adapter(name).start_magnitude(layer.base_weight())
            layer.adapter(name).requires_grad_(False)
        for layer in list(lora_layers(models).values())[::2]:
            if layer.bias is not None:
                layer.adapter(name).diff_b = nn.Parameter(torch.randn_like(layer.bias) * 0.1, requires_grad=False)
    for merged in (False, True):
        for lora in ({"a": 1.0}, {"b": 1.0}, {"a": 0.5}):
            arguments = dict(lora=lora, merged=merged)
            assert np.array_equal(pictures(models, **arguments), as_ever(monkeypatch, models, **arguments))
    assert len(taped) == 2
    batch = dict(prompt=["a cat"] * 3, lora=[{"a": 1.0}, {"b": 0.5}, {}])
    assert np.array_equal(pictures(models, **batch), as_ever(monkeypatch, models, **batch))


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8", "fp8"])
def test_a_quantised_base_is_captured_too(models, taped, monkeypatch, kind):
    quantize_base({"diffusion": models["diffusion"]}, kind)
    for name in "ab":
        assert np.array_equal(pictures(models, lora={name: 1.0}), as_ever(monkeypatch, models, lora={name: 1.0}))
    assert len(taped) == 1


def test_an_inpainting_network_is_captured_with_its_further_channels(taped, monkeypatch):
    models = add(small(replace(SMALL, unet=replace(SMALL.unet, in_channels=9))), "a")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 2, 12, 10))
    arguments = dict(input_image=Image.new("RGB", (16, 16), (200, 30, 90)), mask=mask, lora={"a": 1.0}, steps=6)
    assert np.array_equal(pictures(models, **arguments), as_ever(monkeypatch, models, **arguments))
    assert len(taped) == 1


# ---- what captures anew ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("merged", [False, True])
def test_other_loras_and_multipliers_of_one_form_never_capture_anew(models, taped, monkeypatch, merged):
    for lora in ({"a": 1.0}, {"b": 1.0}, {"a": -0.3}, {"d": 2.0}, {"a": 1.0}):
        arguments = dict(lora=lora, merged=merged)
        assert np.array_equal(pictures(models, **arguments), as_ever(monkeypatch, models, **arguments))
    assert len(taped) == 1


def test_routes_of_one_form_never_capture_anew(models, taped, monkeypatch):
    for lora in (FOUR, FOUR[::-1], [{"a": 0.5}, {"b": 2.0}, {"d": 1.0}, {"c": -1.0}]):
        arguments = dict(prompt=["a cat"] * 4, lora=lora)
        assert np.array_equal(pictures(models, **arguments), as_ever(monkeypatch, models, **arguments))
    assert len(taped) == 1


def test_a_lora_that_takes_the_place_of_another_never_captures_anew(models, taped, monkeypatch):
    for seed in (1, 2, 3):
        remove_lora(models, "a")
        add(models, "a", seed=seed)
        assert np.array_equal(pictures(models, lora={"a": 1.0}, merged=False),
                              as_ever(monkeypatch, models, lora={"a": 1.0}, merged=False))
    assert len(taped) == 1


def test_another_rank_is_another_graph_and_both_stay(models, taped):
    for lora in ({"a": 1.0}, {"wide": 1.0}, {"b": 1.0}, {"wide": 0.5}, {}, {"a": 1.0}):
        pictures(models, lora=lora, merged=False)
    assert len(taped) == 3


def test_another_size_or_number_of_rows_is_another_graph(models, taped):
    for arguments in (dict(), dict(width=24), dict(prompt=["a", "b"]), dict(do_cfg=False), dict(width=24), dict()):
        pictures(models, **arguments)
    assert len(taped) == 4


def test_only_the_latest_graphs_are_kept(models, taped):
    for width in range(16, 16 + 4 * (graphs.GRAPHS_KEPT + 2), 4):
        pictures(models, width=width, height=16, steps=2)
    assert len(taped) == graphs.GRAPHS_KEPT + 2
    pictures(models, width=width, height=16, steps=2)
    assert len(taped) == graphs.GRAPHS_KEPT + 2
    pictures(models, width=16, height=16, steps=2)
    assert len(taped) == graphs.GRAPHS_KEPT + 3
    assert len(graphs._GRAPHS[models["diffusion"]].kept) == graphs.GRAPHS_KEPT


def test_a_single_call_is_not_captured(models, taped):
    pictures(models, steps=1)
    assert not taped
    pictures(models, steps=1)
    assert len(taped) == 1


def test_a_graph_reads_nothing_but_what_its_validity_rests_on(models, taped):
    for arguments in (CASES["two"], CASES["merged"], CASES["four routed"], CASES["four mixed"]):
        taped.clear()
        kept = graphs._GRAPHS.get(models["diffusion"])
        before = set(kept.kept) if kept else set()
        pictures(models, **arguments)
        kept = graphs._GRAPHS[models["diffusion"]]
        (key,) = set(kept.kept) - before
        known = {place[0] for place in (*kept.base, *key[0])} | {x.data_ptr() for x in kept.kept[key].inputs}
        assert taped[0].outside <= known and len(taped[0].outside) > 60


# ---- changes within a picture, and of the model ----------------------------------------------------------------------

def test_what_a_callback_changes_counts_from_the_next_step(models, taped, monkeypatch):
    unet, b = models["diffusion"], get_lora_parameters(models, "b")
    changes = [
        lambda: set_adapters(models, {"a": 1.0}),
        lambda: set_adapters(models, {"b": 0.5}),
        lambda: set_lora_enabled(models, False),
        lambda: set_lora_enabled(models, True),
        lambda: merge(models),
        lambda: torch._foreach_mul_(b, 1.5),
        lambda: unmerge(models),
        lambda: unet.load_state_dict(unet.state_dict()),
        lambda: set_adapters(models, {}),
    ]

    def change(i, n, x0):  # a call, its capture, a replay, then a change
        if i % 3 == 2 and i // 3 < len(changes):
            changes[i // 3]()

    def undone(make):
        saved = [(p, p.clone()) for p in b]
        try:
            return make(steps=3 * len(changes) + 3, merged=False, on_step=change)
        finally:
            set_adapters(models, {})
            with torch.no_grad():
                for p, value in saved:
                    p.copy_(value)

    want = undone(partial(as_ever, monkeypatch, models))
    assert np.array_equal(undone(partial(pictures, models)), want)
    assert taped


def test_a_network_that_was_written_moved_or_loaded_gives_what_it_gives_without_graphs(models, taped, monkeypatch):
    unet = models["diffusion"]

    def check(captures):
        assert np.array_equal(pictures(models, lora={"a": 1.0}), as_ever(monkeypatch, models, lora={"a": 1.0}))
        assert len(taped) == captures

    check(1)
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.1)  # in place: the graph reads it
    check(1)
    for p in get_lora_parameters(models, "a"):
        p.requires_grad_(False).mul_(0.9)
    check(1)
    unet.conv_in.weight = nn.Parameter(unet.conv_in.weight * 0.9, requires_grad=False)
    check(2)
    unet.double().float()
    check(3)


def test_graphs_go_when_the_network_goes_or_moves(models, taped):
    pictures(models)
    graph = weakref.ref(next(g for g in graphs._GRAPHS[models["diffusion"]].kept.values() if g))
    models.to("cpu")
    taped.clear()
    gc.collect()
    assert graph() is None and models["diffusion"] not in graphs._GRAPHS


def test_a_lora_that_was_removed_leaves_no_tensor_behind(models, taped):
    pictures(models, lora={"a": 1.0}, merged=False)
    left = [weakref.ref(p) for p in get_lora_parameters(models, "a")]
    taped.clear()
    remove_lora(models, "a")
    gc.collect()
    assert left and all(p() is None for p in left)


def test_a_network_that_is_away_between_pictures_is_not_captured(models, taped, monkeypatch):
    pictures(models, idle_device="cpu")
    assert not taped


def test_trained_hooked_compiled_and_autocast_networks_are_called_as_they_are(models, taped, monkeypatch):
    unet = models["diffusion"]
    seen = []
    hook = unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    pictures(models, lora={"a": 1.0})
    assert len(seen) == 4
    hook.remove()
    for p in get_lora_parameters(models, "a"):
        p.requires_grad_(True)
    pictures(models, lora={"a": 1.0}, merged=False)
    unet.conv_in.weight.requires_grad_(True)
    pictures(models, lora={})
    unet.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        pictures(models, lora={})
    unet._compiled_call_impl = unet.forward
    pictures(models, lora={})
    assert unet._compiled_call_impl is not None
    unet._compiled_call_impl = None
    assert not taped
    pictures(models, lora={})
    assert len(taped) == 1


def test_gradients_go_through_the_network_inside_the_block(models, taped):
    unet = models["diffusion"]
    x, t, context = torch.randn(1, 4, 8, 8, requires_grad=True), torch.tensor([5.0]), torch.randn(1, 7, 32)
    with graphs.repeated(unet):
        for _ in range(3):
            unet(x, t, context).sum().backward()
    assert x.grad.abs().sum() > 0 and not taped


def test_outputs_of_earlier_calls_keep_their_values(models, taped):
    unet, given = models["diffusion"], (torch.tensor([5.0]), torch.randn(1, 7, 32))
    xs = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with torch.no_grad():
        want = [unet(x, *given) for x in xs]
        with graphs.repeated(unet):
            got = [unet(x, *given) for x in xs]
    assert all(map(torch.equal, got, want)) and len(taped) == 1


def test_inference_mode_may_come_and_go(models, taped, monkeypatch):
    want = as_ever(monkeypatch, models, lora={"a": 1.0})
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert np.array_equal(pictures(models, lora={"a": 1.0}), want)
    assert len(taped) == 1


def test_without_memory_for_a_graph_the_network_is_called_as_it_is(models, monkeypatch):
    class Full:
        def capture(self, run):
            made.append(run())
            raise torch.OutOfMemoryError("no memory")

    made = []
    want = pictures(models)
    monkeypatch.setitem(graphs.TAPES, "cpu", lambda: Full)
    assert np.array_equal(pictures(models), want) and np.array_equal(pictures(models), want)
    assert len(made) == 1


def test_the_tape_of_cuda_captures_in_the_shared_pool_and_replays(monkeypatch):
    done = []

    class Fake:
        def replay(self):
            done.append("replay")

    @contextmanager
    def capture(graph, pool, capture_error_mode):
        assert isinstance(graph, Fake) and pool == "pool" and capture_error_mode == "thread_local"
        done.append("capture")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Fake)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    tape = graphs.TAPES["cuda"]()()
    output = tape.capture(lambda: X)
    tape.replay()
    assert output is X and done == ["capture", "replay", "replay"]


def test_there_are_graphs_on_cuda_alone():
    assert set(graphs.TAPES) == {"cuda"}
    models = new_models(SMALL)
    pictures(models, steps=2)
    assert models["diffusion"] not in graphs._GRAPHS


def test_a_switch_writes_into_the_same_tensors_and_a_copy_takes_none_of_them(models, taped):
    from copy import deepcopy
    layer = next(iter(lora_layers(models["diffusion"]).values()))
    with torch.no_grad():
        with use_adapters(models, {"a": 1.0}):
            first = [t.data_ptr() for t in layer.hold()]
        with use_adapters(models, {"b": 1.0}):
            assert [t.data_ptr() for t in layer.hold()] == first
    assert layer.derived.fixed and not deepcopy(layer).derived.fixed
    layer.to(torch.float64)
    assert not layer.derived.fixed


def test_only_the_latest_structures_keep_their_tensors(taped):
    models = small()
    for rank in range(1, STRUCTURES_KEPT + 3):
        add(models, f"r{rank}", rank=rank)
    layer = next(iter(lora_layers(models["diffusion"]).values()))
    with torch.no_grad():
        for rank in range(1, STRUCTURES_KEPT + 3):
            with use_adapters(models, {f"r{rank}": 1.0}):
                held = layer.hold()
    assert len(layer.derived.fixed) == STRUCTURES_KEPT
    assert [t.data_ptr() for t in held] == [t.data_ptr() for t in list(layer.derived.fixed.values())[-1].tensors()]


# ---- the rules of the stand-in: each is broken once ------------------------------------------------------------------

def captured(run):
    tape = CheckedTape()
    tape.capture(run)
    return tape


X = torch.arange(6.0)


@pytest.mark.parametrize("name, run", [
    ("item", lambda: X * X.sum().item()),
    ("a branch on a value", lambda: X if X.sum() > 0 else -X),
    ("comparing values", lambda: X if torch.equal(X, X) else -X),
    ("a shape from values", lambda: X.nonzero()),
    ("a mask as index", lambda: X[X > 2]),
    ("numbers of the host", lambda: X * torch.tensor([1.0, 2, 3, 4, 5, 6])),
    ("numpy", lambda: X * torch.from_numpy(np.ones(6))),
    ("to the host", lambda: X.cpu() + 1),
    ("to numpy", lambda: X + X.numpy().shape[0]),
    ("to a list", lambda: X + len(X.tolist())),
])
def test_the_stand_in_refuses_to_capture(name, run):
    with pytest.raises(BrokenRule):
        captured(run)


def test_the_stand_in_refuses_another_kernel_number_address_or_shape():
    state = {}

    def broken(first, then, run):
        state.update(first)
        tape = captured(run)
        tape.replay()
        state.update(then)
        with pytest.raises(BrokenRule):
            tape.replay()

    broken({"more": False}, {"more": True}, lambda: (X + 1).relu() if state["more"] else X + 1)
    broken({"more": True}, {"more": False}, lambda: (X + 1).relu() if state["more"] else X + 1)
    broken({"f": torch.sin}, {"f": torch.cos}, lambda: state["f"](X))
    broken({"s": 1.0}, {"s": 2.0}, lambda: X * state["s"])
    broken({"s": 1.0}, {"s": 2.0}, lambda: torch.full((6,), state["s"]) * X)
    broken({"w": torch.ones(6)}, {"w": torch.ones(6)}, lambda: X * state["w"])
    w = torch.ones(12)
    broken({"w": w[:6]}, {"w": w[6:]}, lambda: X * state["w"])
    broken({"w": w[:3]}, {"w": w[:4]}, lambda: state["w"] * 2)
    broken({"w": w}, {"w": w.view(torch.int32)}, lambda: state["w"] + 1)


def test_the_stand_in_writes_new_values_into_the_same_output():
    x = torch.ones(3)
    tape = captured(lambda: (x * 2).relu())
    output = tape.output
    x.fill_(5.0)
    tape.replay()
    assert tape.output is output and output.tolist() == [10.0] * 3
