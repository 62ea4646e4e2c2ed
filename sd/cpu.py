"""Settings of the process that make networks faster on a CPU: memory that is not returned in between, and oneDNN for fp32."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

SWITCH = "SD_CPU_TUNING"  # "0" leaves the process as it is
# <malloc.h> of glibc
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEEP = 2**28  # bytes of free memory that may stay with the process: small models do not pay for asking again


def tuned() -> bool:
    """Whether the process may be tuned."""
    return os.environ.get(SWITCH) != "0"


@lru_cache(maxsize=1)
def tune() -> tuple[str, ...]:
    """Tune the process for networks on the CPU, once; returns what was changed, in words.

    Memory (glibc only): tensors come from memory that the process keeps. By default glibc maps each tensor over 32 MiB
    afresh, and the kernel clears it page by page: at the size of SD 1.5 half a million page faults a step. Changes no bit.
    Products (AMD only): fp32 products through oneDNN, which is faster than MKL there. torch's switch for it allows
    bfloat16 where the processor can multiply it by tiles, so it is kept only where a product is true fp32. Changes the last
    bits: about 2e-6 of the largest value of a step of SD 1.5.
    SD_CPU_TUNING=0 in the environment switches both off.
    """
    if not tuned():
        return ()
    done = []
    if (libc := _glibc()) is not None:
        # No thresholds of mmap, no return of the heap's end: glibc's own adaption stops with the first of these calls.
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        done.append("memory is kept between steps")
    if is_amd() and _onednn_for_fp32():
        done.append("fp32 products through oneDNN")
    return tuple(done)


@contextmanager
def memory_returned() -> Iterator[None]:
    """At the end of the block, return to the system what `tune` made the process keep, if it is much."""
    try:
        yield
    finally:
        libc = _glibc()
        if libc is not None and tune() and libc.mallinfo2().free > KEEP:
            libc.malloc_trim(0)


def products() -> str:
    """How fp32 products are computed, which decides their last bits: "oneDNN", or "default" as torch ships."""
    return "oneDNN" if any("oneDNN" in done for done in tune()) else "default"


@lru_cache(maxsize=1)
def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16; elsewhere it is slower than fp32."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


@lru_cache(maxsize=1)
def is_amd() -> bool:
    """Whether the processor is AMD's; only there was oneDNN measured to be the faster one."""
    info = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (info.read_text() if info.exists() else platform.processor())


def is_true_fp32(error: float = 1e-5) -> bool:
    """Whether a product of fp32 matrices is as exact as fp32 allows, against fp64; in bfloat16 it is off by 1e-3."""
    a, b = (torch.randn(64, 512, generator=torch.Generator().manual_seed(i)) for i in range(2))
    exact = a.double() @ b.double().T
    return ((a @ b.T - exact).abs().max() / exact.abs().max()).item() < error


def _onednn_for_fp32() -> bool:
    """Send fp32 products to oneDNN, if they stay fp32; whether they are."""
    products = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9
    if products is None or not torch.backends.mkldnn.is_available():
        return False
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    if not is_true_fp32():
        products.fp32_precision = before
    return products.fp32_precision == "bf16"


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim.argtypes, libc.mallinfo2.restype = [ctypes.c_size_t], _MallInfo
        return libc
    except (OSError, AttributeError):  # mallinfo2 came with glibc 2.33
        return None


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of <malloc.h>; free is its fordblks."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                                                     "used", "free", "keepcost")]
