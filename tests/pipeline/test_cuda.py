"""What only a CUDA device can show; skipped without one.

The tests need torch and sd/ alone: `python -m bench.gpu` calls them one by one, on machines without pytest and peers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from sd import graphs
from sd.adapters.low_rank import LowRank
from sd.config import TINY
from sd.lora import find_targets, get_lora_parameters, merge, set_adapters, unmerge, use_adapters
from sd.models import Models, new_models
from sd.pipeline import Start, guided, sample
from sd.placement import Networks, placed_for, sent
from sd.request import Request
from sd.training.config import TrainConfig
from sd.training.dataset.data import as_picture_data
from sd.training.loss import MicroLoss, diffusion_loss
from sd.training.optim import make_optimizer, set_learning_rate
from sd.training.step import diffusion_batches
from sd.training.trained import training
from sd.training.work import Work

NAMES = ("a", "b", "c", "d")


def tiny(dtype=torch.bfloat16) -> Models:
    """A small model on the device with four LoRAs, none active."""
    models = new_models(TINY)
    g = torch.Generator().manual_seed(0)
    for layer in find_targets({"diffusion": models["diffusion"]}, "attn").values():
        for name in NAMES:
            adapter = LowRank(layer.lora_shape(), 4, 4.0)
            for p in adapter.parameters():
                p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)
            layer.add_adapter(name, adapter.requires_grad_(False), 0.0)
    set_adapters(models, {})
    for network in models.values():
        network.to("cuda", dtype).to(memory_format=torch.channels_last)
    return models


def inputs(rows: int, dtype=torch.bfloat16, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, context = torch.randn(rows, 4, 8, 8, generator=g), torch.randn(rows, 77, 32, generator=g)
    return x.to("cuda", dtype), torch.full((rows,), 500.0, device="cuda"), context.to("cuda", dtype)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-2) -> None:
    assert got.isfinite().all() and want.std() > 0
    difference = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    assert difference <= tolerance, difference


def settings():
    """What switches within a form, for one row each and for eight."""
    routes = {name: (torch.arange(4) == i).float() for i, name in enumerate(NAMES)}
    turned = dict(zip(NAMES, reversed(routes.values())))
    return {"base": (2, [{}, {}]), "adapters": (2, [{"a": 1.0}, {"b": 0.5}]), "merged": (2, [{"a": 1.0}, {"b": 0.5}]),
            "routed": (8, [routes, turned])}


@torch.no_grad()
def test_a_graph_computes_what_the_call_computes_after_every_switch():
    unet = tiny()["diffusion"]
    for form, (rows, sets) in settings().items():
        before = len(graphs.captured(unet))
        for turn in range(2):
            for active in sets:
                with use_adapters(unet, active, rows=torch.arange(4).repeat(2) if form == "routed" else None):
                    if form == "merged":
                        merge(unet)
                    for seed in range(3):
                        given = inputs(rows, seed=10 * turn + seed)
                        want = unet(*given)
                        with graphs.repeated(unet):
                            close(unet(*given), want)
        assert len(graphs.captured(unet)) == before + 1, form
        unmerge(unet)


@torch.no_grad()
def test_an_output_is_not_overwritten_by_the_next_call_or_another_graph():
    unet = tiny()["diffusion"]
    with graphs.repeated(unet):
        for _ in range(3):
            first = unet(*inputs(2))
            unet(*inputs(4))
        kept = first.clone()
        unet(*inputs(2, seed=5))
        unet(*inputs(4, seed=6))
        torch.cuda.synchronize()
        assert torch.equal(first, kept)


@torch.no_grad()
def test_graphs_of_one_network_share_their_memory_and_give_it_back():
    unet = tiny()["diffusion"]
    with graphs.repeated(unet):
        for rows in (8, 6, 4, 2):
            for _ in range(3):
                unet(*inputs(rows))
        torch.cuda.synchronize()
        assert len(graphs.captured(unet)) == 4
    held = torch.cuda.memory_allocated()
    graphs.forget(unet)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= held and not graphs.captured(unet)


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_no_sampler_waits_for_the_device():
    models = tiny()
    noise = iter(lambda: torch.randn(1, 4, 8, 8), None)
    start, context = next(noise).cuda(), torch.randn(2, 77, 32, device="cuda")
    for name in ("ddpm", "ddim", "euler_a", "heun", "pndm", "dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        request = Request("a cat", sampler_name=name, n_inference_steps=6, seed=1, lora={}).fit(TINY)
        with Networks(models, torch.device("cuda")).use("diffusion") as unet:
            denoise = guided(unet, context, Start(start, start), request, TINY)
            want = sample(denoise, start, request, TINY, noise)  # captures
            with no_waiting():
                got = sample(denoise, start, request, TINY, noise)
        assert got.isfinite().all() and got.shape == want.shape


def test_no_step_of_training_waits_for_the_device():
    class Pictures:
        captions = ["red", "green", "blue", "grey"]

        def __len__(self):
            return 4

        def picture(self, i):
            return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1

        def fingerprint(self):
            return "four"

    for weighting in ("none", "min_snr"):
        models = tiny(torch.float32)
        config = TrainConfig(batch_size=2, size=64, steps=3, precision="bf16", progress=False, weighting=weighting)
        with training(config, models) as parameters:
            micro_loss = diffusion_batches(config, models, as_picture_data(Pictures()))
            for number in range(3):
                with no_waiting() if number else nullcontext(), torch.autocast("cuda", torch.bfloat16):
                    loss = micro_loss(number)
                    loss.backward()
            assert loss.isfinite() and all(p.grad is not None for p in parameters.values())


def test_what_is_sent_arrives():
    for i in range(50):
        x = torch.full((4, 64, 64), float(i))
        assert torch.equal(sent(x, torch.device("cuda")).cpu(), x)


@torch.no_grad()
def test_the_autoencoder_in_bf16_is_near_that_in_fp32():
    half, full = tiny(torch.bfloat16)["decoder"], tiny(torch.float32)["decoder"]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    close(half(placed_for(half, latents)), full(placed_for(full, latents)), 5e-2)


def test_training_steps_from_graphs_are_those_of_plain_calls():
    losses, config = {}, TrainConfig(precision="bf16", learning_rate=1e-2, ema=0.9, accumulate=2)
    batches = []
    for seed, rows in enumerate((2, 2, 1, 1)):
        x, t, context = inputs(rows, torch.float32, seed)
        batches.append({"latents": x, "t": t.long(), "context": context, "noise": x.flip(-1)})
    for mode in ("0", "1"):
        with switched("SD_CUDA_GRAPHS", mode):
            models = tiny(torch.float32)
            set_adapters(models, {"a": 1.0})
            factors = {str(i): p.requires_grad_(True) for i, p in enumerate(get_lora_parameters(models, "a"))}
            ema, optimizer = {name: p.detach().clone() for name, p in factors.items()}, make_optimizer(factors, config)
            micro_loss = MicroLoss(lambda number: batches[number % 4], partial(diffusion_loss, models))
            work = Work(config, models, factors, optimizer, ema, micro_loss, torch.tensor([1.0, 0.0], device="cuda"))
            found = []
            for step in range(16):
                set_learning_rate(optimizer, 1 - step / 16)
                loss = work.add_gradients(2 * step) + work.add_gradients(2 * step + 1)
                found.append(work.update(loss, step))
            losses[mode] = torch.stack(found)[:, 0]
    assert work.graphs is not None and sum(graph is not None for graph in work.graphs.kept.values()) == 3
    close(losses["1"], losses["0"], 1e-2)
    assert losses["1"][-2:].mean() < losses["1"][:2].mean()
    work.release()
    assert all(p.grad is None for p in factors.values())


@contextmanager
def switched(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
