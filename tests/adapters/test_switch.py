"""Which adapters are on: the active set, threads, block multipliers."""

import copy
import threading

import pytest
import torch
import torch.nn as nn
from torch._subclasses import FakeTensorMode

from sd.adapters.layers import LoRALinear
from sd.lora import (
    LoRAError,
    active_multipliers,
    apply_lora_to_model,
    checkpoint,
    merge,
    merge_lora_weights,
    set_adapters,
    use_adapters,
    use_rows,
)
from tests.adapters.cases import (
    adapted,
    attach,
    close,
    expected,
    layer_and_input,
    weights_of,
)


def test_the_active_set_is_exact_and_returns_after_an_exception():
    model, x = adapted("linear", ("a", "b"))
    set_adapters(model, {"a": 0.5})
    with pytest.raises(RuntimeError, match="boom"):
        with use_adapters(model, {"b": 2.0}):
            assert active_multipliers(model) == {"b": 2.0}
            raise RuntimeError("boom")
    assert active_multipliers(model) == {"a": 0.5}
    for wrong in ({"c": 1.0}, {"a": float("nan")}, {"a": "x"}, {"a": None}, {"a": torch.tensor([])},
                  {"a": torch.tensor([1.0]), "b": torch.tensor([1.0, 2.0])}):
        with pytest.raises(LoRAError), use_adapters(model, wrong):
            raise AssertionError("must not get here")
    with pytest.raises(LoRAError, match="no adapter is named 'c'; loaded: 'a', 'b'"), use_adapters(model, {"c": 1.0}):
        pass
    assert active_multipliers(model) == {"a": 0.5}


def test_two_threads_never_share_an_active_set():
    model, x = adapted("linear", ("a", "b"))
    with torch.no_grad():
        want = {}
        for name in ("a", "b"):
            with use_adapters(model, {name: 1.0}):
                want[name] = model(x)
    wrong = []

    def use(name):
        for _ in range(50):
            with torch.no_grad(), use_adapters(model, {name: 1.0}):
                if not torch.equal(model(x), want[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=use, args=(name,)) for name in ("a", "b", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_adapter_attached_inside_use_adapters_is_off_everywhere_afterwards():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_lora_to_model(model, rank=2, target_modules=["0"], name="x")
    with use_adapters(model, {"x": 1.0}):
        apply_lora_to_model(model, rank=2, target_modules=["0", "1"], name="y")
        assert active_multipliers(model) == {"x": 1.0, "y": 1.0}
    assert [m.multipliers for m in model] == [{"x": 1.0}, {}]


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


def test_the_mark_of_an_active_set_is_made_once_for_all_layers_and_plain_whatever_the_first_forward_is_inside():
    model = nn.Sequential(LoRALinear(4, 4, rank=2), LoRALinear(4, 4, rank=2))
    with use_adapters(model, {"default": 0.5}):
        with FakeTensorMode(), torch.inference_mode(), torch.device("meta"):
            mark = model[0].effective.mark
        assert type(mark) is torch.Tensor and not mark.is_inference() and mark.device.type == "cpu"
        for run in (model, lambda x: checkpoint(model, x)):
            run(torch.randn(2, 4, requires_grad=True)).sum().backward()
            assert model[0].effective.mark is model[1].effective.mark is mark
        assert mark.item() == model[0].effective.fingerprint
    with use_adapters(model, {"default": -0.5}):
        assert not torch.equal(model[0].effective.mark, mark)
