"""What tuning the process for the CPU changes, and what it does not. Each is tried in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest
import torch

import sd.cpu
from sd.attention import attend, attend_in_chunks, pays_in_chunks
from sd.config import TINY
from sd.cpu import is_amd, is_true_fp32, tune, tuned
from tests.docs.reading import ROOT
from tests.peers import ours_and_peers

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
FAULTS = """
import resource, torch
from sd.cpu import tune
tune()
x, w = torch.randn(1, 16, 1024, 1024), torch.randn(16, 16, 1, 1)  # outputs of 64 MiB
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with torch.no_grad():
    for _ in range(6):
        before = faults()
        torch.nn.functional.silu(torch.nn.functional.conv2d(x, w))
print(faults() - before)
"""
RETURNED = """
import torch
from sd.cpu import memory_returned
resident = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))
before = resident()
with memory_returned():
    kept = [torch.ones(2**20) for _ in range(200)]
    last = torch.ones(1)
    del kept
    inside = resident()
print(inside - before, resident() - before)
"""
BITS = """
import hashlib, torch
import sd.cpu
sd.cpu.is_amd = lambda: False  # memory alone
sd.cpu.tune()
from sd.config import TINY
from sd.models import new_models
import sd.packed
sd.packed.tuned = lambda: False
from sd.pipeline import generate
print(torch.backends.mkldnn.matmul.fp32_precision, hashlib.sha256(generate("a cat", models=new_models(TINY), seed=1,
      n_inference_steps=2).tobytes()).hexdigest())
"""


def process(code, tuning="1"):
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"SD_CPU_TUNING": tuning, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@GLIBC
def test_later_steps_take_no_memory_from_the_system():
    assert int(process(FAULTS)[0]) < 1000 < 10_000 < int(process(FAULTS, tuning="0")[0])


@GLIBC
def test_memory_goes_back_after_a_call():
    inside, after = map(int, process("from sd.cpu import tune; tune()" + RETURNED))
    assert inside > 700_000 and after < 0.2 * inside


def test_keeping_memory_changes_no_bit():
    assert process(BITS) == process(BITS, tuning="0")


def test_one_variable_switches_everything_off():
    code = ("import torch; before = torch.backends.mkldnn.matmul.fp32_precision; from sd.cpu import products, tune, tuned; "
            "print(tune(), tuned(), products(), torch.backends.mkldnn.matmul.fp32_precision == before)")
    assert process(code, tuning="0") == ["()", "False", "default", "True"]


def test_products_are_true_fp32_and_bfloat16_is_recognised():
    tune()
    assert is_true_fp32() and tuned()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_true_fp32()


def test_a_switch_that_makes_products_bfloat16_is_not_kept(monkeypatch):
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "ieee"
        monkeypatch.setattr(sd.cpu, "is_true_fp32", lambda: products.fp32_precision != "bf16")  # as with AMX
        assert not sd.cpu._onednn_for_fp32() and products.fp32_precision == "ieee"
        monkeypatch.setattr(sd.cpu, "is_true_fp32", lambda: True)
        assert sd.cpu._onednn_for_fp32() and products.fp32_precision == "bf16"
    finally:
        products.fp32_precision = before


@pytest.mark.skipif(not is_amd(), reason="oneDNN is used for fp32 on AMD alone")
def test_the_tuned_unet_is_as_close_to_fp64_as_the_untuned_one():
    tune()
    assert sd.cpu.products() == "oneDNN" and torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    ours, peers = ours_and_peers(TINY)
    g = torch.Generator().manual_seed(1)
    x, context, t = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 77, 32, generator=g), torch.tensor([17, 917])
    with torch.no_grad():
        found, exact = ours["diffusion"](x, t, context), peers["unet"].double()(x.double(), t, context.double()).sample
    assert (found - exact).abs().max() <= 2e-5 * exact.abs().max()


# ---- attention in chunks -------------------------------------------------------------------------------------------------

def formula(q, k, v, heads):
    q, k, v = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("n, length", [(1024, 1024), (1300, 1100), (7, 5)])
def test_attention_in_chunks_is_the_formula(n, length):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, m, 3 * 40, generator=g) for m in (n, length, length))
    by_head = [t.unflatten(-1, (3, 40)).transpose(1, 2) for t in (q, k, v)]
    found, exact = attend_in_chunks(*by_head).transpose(1, 2).flatten(2), formula(q, k, v, 3)
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_bfloat16_is_attended_in_chunks_where_the_processor_has_it(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1024, 32, generator=g).bfloat16() for _ in range(3))
    called = []
    monkeypatch.setattr("sd.attention.attend_in_chunks", lambda *a: called.append(1) or attend_in_chunks(*a))
    with torch.no_grad():
        monkeypatch.setattr("sd.attention.has_bf16", lambda: True)
        found, exact = attend(q, k, v, 2), formula(q, k, v, 2)
        assert called and (found - exact).abs().max() <= 2e-2 * exact.abs().max() and found.dtype == torch.bfloat16
        heads = q.unflatten(-1, (2, -1)).transpose(1, 2)
        assert pays_in_chunks(heads, heads) and not pays_in_chunks(heads.float(), heads.float())
        assert not pays_in_chunks(heads, heads[:, :, :77])
        called.clear()
        attend(q, k, v, 2, causal=True)
        monkeypatch.setattr("sd.attention.has_bf16", lambda: False)
        attend(q, k, v, 2)
    monkeypatch.setattr("sd.attention.has_bf16", lambda: True)
    attend(q, k, v, 2)  # with gradients
    assert not called
