"""One UNet in several programs: each a class that imports its program, with `load(size)` and `step(size)` to be timed.

They live in two environments, and so does this file: it needs torch alone.

`shape`: (channels of the latents, tokens, width of the context, pixels of a latent's side).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]
ROWS = 2


def inputs(shape: Shape, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    channels, tokens, width, factor = shape
    g = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, channels, size // factor, size // factor, generator=g)
    context = torch.randn(ROWS, tokens, width, generator=g)
    return x.to(dtype), torch.full((ROWS,), 500), context.to(dtype)


class Ours:
    def __init__(self, folder: Path, shape: Shape, dtype: str):
        from sd.model_loader import preload_models_from_standard_weights
        from sd.placement import Networks
        self.shape, self.dtype, self.stack, self.placed = shape, getattr(torch, dtype), ExitStack(), Networks
        self.read = partial(preload_models_from_standard_weights, folder, "cpu", dtype=self.dtype)

    def load(self, size: int) -> Callable[[], None]:
        def now() -> None:
            models = self.read()
            self.unet = self.stack.enter_context(self.placed(models, models.device).use("diffusion"))  # as generate() does
        return now

    def step(self, size: int) -> Callable[[], Tensor]:
        return torch.no_grad()(partial(self.unet, *inputs(self.shape, size, self.dtype)))


class Diffusers:
    def __init__(self, folder: Path, shape: Shape, dtype: str):
        from diffusers import UNet2DConditionModel
        self.shape, self.dtype = shape, getattr(torch, dtype)
        self.read = partial(UNet2DConditionModel.from_pretrained, folder / "unet", torch_dtype=self.dtype)

    def load(self, size: int) -> Callable[[], None]:
        def now() -> None:
            self.unet = self.read().eval()
        return now

    def step(self, size: int) -> Callable[[], Tensor]:
        given = inputs(self.shape, size, self.dtype)
        return torch.no_grad()(lambda: self.unet(*given, return_dict=False)[0])


class OpenVINO:
    """A converted UNet for each size; `precision` None is OpenVINO's own choice."""

    def __init__(self, converted: dict[int, Path], shape: Shape, precision: str | None, threads: int):
        import openvino
        self.converted, self.shape, self.core = converted, shape, openvino.Core()
        self.how = {"INFERENCE_NUM_THREADS": threads} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})

    def load(self, size: int) -> Callable[[], None]:
        """Read and compile the model of this size."""
        def now() -> None:
            self.compiled = self.core.compile_model(str(self.converted[size]), "CPU", self.how)
        return now

    def precision(self) -> str:
        """In which the compiled model computes."""
        return self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def step(self, size: int) -> Callable[[], Tensor]:
        given = [t.numpy() for t in inputs(self.shape, size, torch.float32)]
        return lambda: torch.from_numpy(self.compiled(given)[0])


class _Plain(torch.nn.Module):
    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, t, context, return_dict=False)[0]


def convert(folder: Path, file: Path, shape: Shape, size: int) -> float:
    """Write diffusers' UNet as an OpenVINO model of fixed shapes, fp32; returns the seconds that the conversion took."""
    import openvino
    from diffusers import UNet2DConditionModel
    given = inputs(shape, size, torch.float32)
    module = _Plain(UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)).eval()
    start = time.perf_counter()
    with torch.no_grad():
        model = openvino.convert_model(module, example_input=given, input=[tuple(t.shape) for t in given])
    openvino.save_model(model, file, compress_to_fp16=False)
    return time.perf_counter() - start
