"""Gradients against fp64's, also with fp32 products computed by oneDNN.

torch's switch "bf16" allows rounding, which oneDNN does only where the processor has matrix units for bf16; elsewhere it
computes in full fp32, and that is all that is allowed here.
"""

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from sd.adapters.kinds import KINDS
from sd.lora import apply_lora_to_model, get_lora_parameters
from tests.training.tiny import copy_of, randomized

TARGETS = ["q_proj", "k_proj", "out_proj", "fc1", "(conv1|proj_in|downsampler.conv)$"]


@contextmanager
def products_by_onednn(on):
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if on else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.fixture(params=[False, True], ids=["as shipped", "onednn"])
def switch(request):
    with products_by_onednn(request.param):
        g = torch.Generator().manual_seed(0)
        a, b = torch.randn(64, 512, generator=g), torch.randn(512, 512, generator=g)
        if request.param and relative(F.linear(a, b), F.linear(a.double(), b.double())) > 1e-5:
            pytest.skip("oneDNN rounds to bf16 on this processor, so the switch is not used")
        yield


def gradients(models, dtype):
    """{name: gradient} of a UNet step, with fixed noise, of every trained factor and of the context."""
    g = torch.Generator().manual_seed(2)
    latents, noise, context = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
                               for shape in ((2, 4, 8, 8), (2, 4, 8, 8), (2, 77, 8)))
    context.requires_grad_(True)
    out = models["diffusion"](latents + noise, torch.tensor([3, 700]), context)
    F.mse_loss(out, noise).backward()
    found = {name: p.grad for name, p in models["diffusion"].named_parameters() if p.requires_grad}
    return found | {"context": context.grad}


@pytest.mark.parametrize("kind, options", [*((kind, {}) for kind in KINDS), ("lora", {"dora": True})], ids=str)
def test_gradients_of_every_kind_on_linears_and_convolutions_are_those_of_fp64(untrained, switch, kind, options):
    models = copy_of(untrained)
    rank = 4 if kind == "oft" else 8  # 8 would leave its blocks one row
    apply_lora_to_model({"diffusion": models["diffusion"]}, rank, 8.0, 0.0, TARGETS, "a", kind=kind, **options)
    randomized(models, "a", scale=0.02)
    for p in get_lora_parameters(models, "a"):
        p.requires_grad_(True)
    exact = deepcopy(models["diffusion"]).double()
    for p in exact.parameters():
        p.data = p.data.double()  # adapters stay fp32 when a model is cast
    wide = copy_of(models)
    wide["diffusion"] = exact
    want, got = gradients(wide, torch.float64), gradients(models, torch.float32)
    assert want.keys() == got.keys() and len(got) > 20
    for name in got:
        assert got[name].dtype == torch.float32 and want[name].dtype == torch.float64
        assert relative(got[name], want[name]) < 1e-5, name
