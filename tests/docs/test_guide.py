"""Every Python block of LORA_README.md runs and does what it says."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from sd.lora import active_multipliers, adapter_names, lora_layers, remove_lora
from sd.model_loader import preload_models_from_standard_weights
from sd.pictures.image_io import read_parameters
from tests.docs.reading import blocks, quick_code


def seen(name):
    return lambda v: v[name].shape == (64, 64, 3) and v[name].std() > 30


def colour(picture):
    return np.mean(picture.max(axis=-1).astype(int) - picture.min(axis=-1))


def greyer(a, b):
    return colour(a) < 0.5 * colour(b)


# One check for each block of LORA_README.md, in order: what the block promises.
CHECKS = [
    lambda v: active_multipliers(v["models"]) == {"contrast": 1.0} and v["models"].lora_reports["contrast"].tensors > 0,
    lambda v: (v["models"].lora_reports["half"].blocks == {"mid_block": 0, "up_blocks.1": 0.5}
               and len(v["models"].lora_reports["half"].skipped) == 21 and not remove_lora(v["models"], "half")),
    lambda v: (greyer(v["with_lora"], v["without"]) and seen("without")(v)
               and read_parameters("apple.png")["lora"] == {"contrast": 1.0}),
    lambda v: v["sheet"].ndim == 3 and Path("sheet.png").stat().st_size > 0,
    lambda v: (colour(v["without"]) > colour(v["half"]) > colour(v["with_lora"]) and greyer(v["four"][1], v["four"][0])
               and np.abs(v["four"][1].astype(int) - v["four"][0]).max() > 100),
    lambda v: (np.array_equal(v["off"], v["without"]) and greyer(v["pair"][1], v["pair"][0])
               and colour(v["without"]) > colour(v["blended"]) and active_multipliers(v["models"]) == {"contrast": 1.0}),
    lambda v: all((Path("out/guide") / n).exists() for n in ("delft.safetensors", "metrics.jsonl", "loss.png")),
    lambda v: torch.isfinite(v["loss"]) and any(p.any() for p in v["parameters"][1::2]) and Path("mine.safetensors").exists(),
    lambda v: list(v["models"]["clip"].words) == ["<tile>"],
    lambda v: v["words"] == ["<tile>"] and seen("tile")(v) and not v["models"]["clip"].words,
    lambda v: adapter_names(v["mine"]) == ["convs", "default", "qv"],
    lambda v: all(layer.merged_weight is None for layer in lora_layers(v["models"]).values()),
    lambda v: (np.array_equal(v["same"], v["with_lora"]) and not lora_layers(v["deployed"])
               and preload_models_from_standard_weights("merged-folder").config.unet == v["deployed"].config.unet),
    lambda v: (v["facts"]["modules"] == {"unet": 131}
               and all(Path(f"{n}.safetensors").exists() for n in ("sum", "best", "small", "found", "diffusers"))),
    lambda v: (torch.equal(v["same"], v["base"]) and torch.allclose(v["routed"][1], v["base"][1], atol=1e-6)
               and not torch.allclose(v["routed"][0], v["base"][0]) and type(v["deployed"]) is nn.TransformerEncoder
               and not adapter_names(v["deployed"])),
    lambda v: ({group["lr"] for group in v["optimizer"].param_groups} == {1e-4, 1e-3}
               and not v["wrapped"]["ff"].weight.requires_grad
               and set(lora_layers(v["wrapped"])) == {"attn.to_q", "attn.to_v"}),
]


def test_every_block_of_the_guide_runs_and_does_what_it_says(elsewhere):
    code = blocks("LORA_README.md", "python")
    assert len(code) == len(CHECKS)
    values: dict = {}
    for block, check in zip(code, CHECKS):
        exec(compile(quick_code(block), "LORA_README.md", "exec"), values)
        assert check(values), block
