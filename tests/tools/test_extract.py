"""Extracted LoRAs against the differences that were put into the files, in fp64."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from sd.checkpoints.names import model_names
from sd.config import TINY
from sd.files.tensor_file import CheckpointError
from sd.files.tensors import read_tensors
from sd.lora import LoRAError, load_lora_weights, merge_lora_weights
from sd.model_loader import new_models, preload_models_from_standard_weights, save_checkpoint
from sd.tools.base import load_base, load_lora_file
from sd.tools.decompose import RankRule
from sd.tools.embed import embed
from sd.tools.extract import Layer, extract, extract_lora, rounding_norm
from sd.tools.merge import merge_loras

LINEAR = ["diffusion.mid_block.attentions.0.transformer_blocks.0.attn1.q_proj", "diffusion.time_embedding.linear_1"]
TEXT = ["clip.layers.1.attention.out_proj", "clip.layers.0.mlp.fc1"]
CONVS = ["diffusion.down_blocks.0.resnets.0.conv1", "diffusion.down_blocks.0.downsampler.conv"]
POINT = ["diffusion.mid_block.attentions.0.proj_in"]
EMBEDDING = ["clip.token_embedding"]
MATRICES = LINEAR + TEXT + CONVS + POINT + EMBEDDING
NORMS = ["diffusion.mid_block.resnets.0.norm1", "clip.final_norm"]
BIASES = ["diffusion.conv_in", LINEAR[1], NORMS[0]]
CONFIG = replace(TINY, clip=replace(TINY.clip, vocab_size=600))
VAE = ["encoder.quant_conv", "decoder.conv_in"]
RANK = 3


def parameter(models, path, tail="weight"):
    component, _, name = path.partition(".")
    return getattr(models[component].get_submodule(name), tail).data


def low_rank(shape, rank, size, seed):
    """A change of this rank with singular values that fall from `size` to a fifth of it, in fp64."""
    rng = np.random.default_rng(seed)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    U, V = (np.linalg.qr(rng.standard_normal((n, rank)))[0] for n in (rows, columns))
    return torch.from_numpy((U * np.linspace(1, 0.2, rank) * size) @ V.T).reshape(tuple(shape))


def tuned_of(base, size=1.0):
    """A model with changes of rank 3 in matrices and kernels, and of any kind in norms and biases; and the changes in fp64."""
    tuned, changes = new_models(CONFIG), {}
    for i, path in enumerate(MATRICES + VAE):
        changes[path, "weight"] = low_rank(parameter(base, path).shape, RANK, size, i)
    for i, path in enumerate(NORMS):
        changes[path, "weight"] = torch.from_numpy(np.random.default_rng(i).standard_normal(len(parameter(base, path)))) * 1e-5
    for i, path in enumerate(BIASES):
        bias = parameter(base, path, "bias")
        changes[path, "bias"] = torch.from_numpy(np.random.default_rng(i).standard_normal(len(bias))) * 1e-4
    for (path, tail), change in changes.items():
        parameter(tuned, path, tail).copy_(parameter(base, path, tail).double() + change)
    return tuned, changes


def files(folder, dtype=torch.float32, size=1.0):
    base = new_models(CONFIG)
    tuned, changes = tuned_of(base, size)
    for name, models in (("base", base), ("tuned", tuned)):
        save_checkpoint(models, folder / f"{name}.safetensors", dtype=dtype)
    return folder / "base.safetensors", folder / "tuned.safetensors", changes


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(base, tuned, changes) with files in fp32."""
    return files(tmp_path_factory.mktemp("pair"))


def stored(*paths):
    return [load_base(path).models for path in paths]


def extracted(tmp_path, base, tuned, **options):
    report = extract_lora(base, tuned, tmp_path / "lora.safetensors", progress=False, **options)
    file, _ = load_lora_file(tmp_path / "lora.safetensors")
    return report, file


def delta(weights, embedding=False):
    if weights.kind == "full":
        return weights.tensors["diff"].double()
    down, up = (weights.tensors[name].double() for name in ("down", "up"))
    D = (up.flatten(1) @ down.flatten(1)) * weights.alpha / len(down)
    return D.T if embedding else D.reshape(len(up), *down.shape[1:])


def error_of(weights, change, path):
    return ((delta(weights, path in EMBEDDING) - change).norm() / change.norm()).item()


@pytest.mark.parametrize("options", [{"rank": RANK}, {"rank": RANK, "randomized": True}, {"threshold": 1e-3},
                                     {"frobenius": 1 - 1e-6}], ids=str)
def test_a_difference_of_rank_r_comes_back_and_nothing_else_is_in_the_file(tmp_path, pair, options):
    base, tuned, changes = pair
    models = stored(base, tuned)
    report, file = extracted(tmp_path, base, tuned, **options)
    assert set(file.state) == set(MATRICES + NORMS + BIASES)
    for path in MATRICES:
        weights = file.state[path]
        assert weights.kind == "lora" and weights.rank == weights.alpha == report.modules[path].rank == RANK
        assert error_of(weights, changes[path, "weight"], path) <= 1e-5
    for path in NORMS:
        assert file.state[path].kind == "full"
        a, b = (parameter(m, path) for m in models)
        assert torch.equal(file.state[path].tensors["diff"], b - a)
    for path in BIASES:
        a, b = (parameter(m, path, "bias") for m in models)
        assert torch.equal(file.state[path].tensors["diff_b"], b - a)
    layers = [name for name in model_names(CONFIG) if name.component in ("clip", "diffusion")]
    assert report.equal == len(layers) - len(file.state) and report.error <= 1e-5 and report.ranks == [RANK]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_difference_of_half_precision_files_comes_back_to_their_own_rounding_which_is_told(tmp_path, dtype):
    base, tuned, changes = files(tmp_path, dtype)
    report, file = extracted(tmp_path, base, tuned, rank=RANK)
    models = stored(base, tuned)
    for path in LINEAR + CONVS + EMBEDDING:
        a, b = (parameter(m, path) for m in models)
        assert a.dtype == b.dtype == dtype
        D, row = b.double() - a.double(), report.modules[path]
        s = np.linalg.svd(D.flatten(1).numpy(), compute_uv=False)
        best = np.linalg.norm(s[RANK:]) / np.linalg.norm(s)  # rounding, the base's and the tuned's, is all that is beyond it
        assert error_of(file.state[path], D, path) == pytest.approx(best, rel=1e-3)
        assert row.error == pytest.approx(best, rel=1e-3)
        assert 0.7 * row.rounding < best < 1.6 * row.rounding
    assert 0 < report.rounding and f"{report.rounding:.2e}" in str(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_the_rounding_of_a_dtype_is_what_the_report_expects(dtype, spread):
    W = torch.randn(200, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * spread
    rounded = W.to(dtype)
    assert rounding_norm(rounded) == pytest.approx((rounded.double() - W).norm().item(), rel=0.02)


@pytest.mark.parametrize("randomized", [False, True])
def test_the_threshold_finds_each_layers_own_rank_exactly(randomized):
    W = torch.randn(80, 120, generator=torch.Generator().manual_seed(0))
    layers = [Layer(str(r), W, (W.double() + low_rank((80, 120), r, 2.0, r)).float()) for r in (1, 2, 5, 9)]
    state, report = extract(layers, RankRule(threshold=1e-3, max_rank=16), randomized=randomized)
    assert {path: w.rank for path, w in state.items()} == {"1": 1, "2": 2, "5": 5, "9": 9}
    assert report.error < 1e-5


def test_nothing_is_clamped():
    """Cutting U and V at their 99 % quantile, as other programs do, costs a tenth of this difference."""
    change = low_rank((320, 320), 8, 1.0, 0)
    W = torch.randn(320, 320, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, report = extract([Layer("layer", W, W + change)], RankRule(rank=8))
    assert error_of(state["layer"], change, "layer") < 1e-12 and report.error < 1e-12
    U, s, Vh = torch.linalg.svd(change)
    U, Vh = U[:, :8] * s[:8], Vh[:8]
    limit = torch.cat([U.flatten(), Vh.flatten()]).quantile(0.99)
    assert ((U.clamp(-limit, limit) @ Vh.clamp(-limit, limit) - change).norm() / change.norm()).item() > 0.09


def test_a_difference_however_small_is_kept(tmp_path):
    """Others drop the whole text encoder where its largest difference is below 0.01."""
    base, tuned, changes = files(tmp_path, size=1e-4)
    _, file = extracted(tmp_path, base, tuned, rank=RANK)
    for path in TEXT:
        assert changes[path, "weight"].abs().max() < 1e-4
        assert error_of(file.state[path], changes[path, "weight"], path) < 1e-2


def test_the_stated_error_of_a_randomized_extraction_is_the_true_one(tmp_path):
    base, tuned = new_models(CONFIG), new_models(CONFIG, seed=1)
    for name, models in (("base", base), ("tuned", tuned)):
        save_checkpoint(models, tmp_path / f"{name}.safetensors")
    report, file = extracted(tmp_path, tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", rank=4, randomized=True)
    lost = whole = 0.0
    for path, weights in file.state.items():
        if weights.kind == "lora":
            D = parameter(tuned, path).double() - parameter(base, path).double()
            lost += (delta(weights, path.endswith("_embedding")) - D).square().sum()
            whole += D.square().sum()
    assert report.error == pytest.approx((lost / whole).sqrt().item(), rel=1e-4) and report.error > 0.1


def test_kernels_may_have_a_rank_of_their_own(tmp_path, pair):
    base, tuned, _ = pair
    report, file = extracted(tmp_path, base, tuned, rank=2, conv_rank=1)
    assert {path: file.state[path].rank for path in MATRICES} == {p: 1 if p in CONVS else 2 for p in MATRICES}
    assert file.state[POINT[0]].tensors["down"].shape[2:] == (1, 1)
    for path in CONVS:
        assert file.state[path].tensors["down"].shape[2:] == (3, 3) and file.state[path].tensors["up"].shape[2:] == (1, 1)


def test_a_rank_beside_a_threshold_is_its_upper_limit(tmp_path, pair):
    base, tuned, _ = pair
    report, _ = extracted(tmp_path, base, tuned, rank=2, conv_rank=8, threshold=1e-3)
    assert {p: report.modules[p].rank for p in MATRICES} == {p: RANK if p in CONVS else 2 for p in MATRICES}


def test_the_vae_is_left_out_by_name_or_taken_on_request(tmp_path, pair):
    base, tuned, changes = pair
    report, _ = extracted(tmp_path, base, tuned, rank=RANK)
    assert sorted(report.left_out) == sorted(VAE) and "2 modules of the VAE differ and are left out" in str(report)
    report, file = extracted(tmp_path, base, tuned, rank=RANK, vae=True)
    assert set(file.state) == set(MATRICES + NORMS + BIASES + VAE) and not report.left_out and "VAE" not in str(report)
    for path in VAE:
        assert error_of(file.state[path], changes[path, "weight"], path) <= 1e-5


def test_the_extracted_lora_makes_the_base_the_tuned_model(tmp_path, pair):
    base, tuned, _ = pair
    extracted(tmp_path, base, tuned, rank=RANK, vae=True)
    models = preload_models_from_standard_weights(base, "cpu")
    load_lora_weights(models, tmp_path / "lora.safetensors")
    merge_lora_weights(models)
    for component, network in preload_models_from_standard_weights(tuned, "cpu").items():
        ours = models[component].state_dict()
        for key, tensor in network.state_dict().items():
            assert (ours[key] - tensor).abs().max() <= 1e-6 * max(1, tensor.abs().max()), key


def test_what_is_extracted_from_a_merge_is_what_was_merged(tmp_path, pair):
    base, tuned, _ = pair
    _, file = extracted(tmp_path, base, tuned, rank=RANK)
    models = preload_models_from_standard_weights(base, "cpu")
    load_lora_weights(models, tmp_path / "lora.safetensors", multiplier=0.5)
    save_checkpoint(merge_lora_weights(models), tmp_path / "merged.safetensors")
    _, again = extracted(tmp_path, base, tmp_path / "merged.safetensors", rank=RANK)
    expected, _ = merge_loras([file.state], [0.5])
    for path in MATRICES:
        assert error_of(again.state[path], delta(expected[path], path in EMBEDDING), path) < 1e-5


def test_the_file_says_what_it_is_for(tmp_path, pair):
    base, tuned, _ = pair
    _, file = extracted(tmp_path, base, tuned, rank=RANK, metadata={"modelspec.title": "Tuned"}, dtype=torch.float16)
    assert file.metadata["ss_new_sd_model_hash"] == preload_models_from_standard_weights(base, "cpu").model_hash
    assert file.metadata["ss_sd_model_name"] == "base.safetensors" and file.metadata["modelspec.title"] == "Tuned"
    assert json.loads(file.metadata["sdlora.config"])["name"] == "tiny"
    tensors = read_tensors(tmp_path / "lora.safetensors")
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {torch.float16}


def test_what_has_no_difference_to_extract_is_refused(tmp_path, pair):
    base, tuned, _ = pair
    other = replace(CONFIG, unet=replace(CONFIG.unet, widths=(32, 64, 64, 96)))
    save_checkpoint(new_models(other), tmp_path / "other.safetensors")
    models = preload_models_from_standard_weights(base, "cpu")
    parameter(models, VAE[0]).add_(1.0)
    save_checkpoint(models, tmp_path / "vae.safetensors")
    out, options = tmp_path / "lora.safetensors", {"rank": 2, "progress": False}
    for file, message in ((tmp_path / "other.safetensors", r"are different models, .* unet is UNetC.*64\),.* and .*96\),"),
                          (base, "there is nothing to extract: no weight differs from .*base.safetensors$"),
                          (tmp_path / "vae.safetensors", "nothing to extract: .*; 1 modules of the VAE do")):
        with pytest.raises(LoRAError, match=message):
            extract_lora(base, file, out, **options)
    with pytest.raises(CheckpointError, match="base.safetensors: is read by this and would be lost"):
        extract_lora(base, tuned, base, **options)
    with pytest.raises(LoRAError, match="give exactly one of"):
        extract_lora(base, tuned, out, progress=False)
    assert not out.exists()


def test_a_checkpoint_with_loras_inside_is_refused(tmp_path, pair):
    base, tuned, _ = pair
    extracted(tmp_path, base, tuned, rank=RANK)
    embed(base, {tmp_path / "lora.safetensors": 1.0}, tmp_path / "with.safetensors")
    with pytest.raises(LoRAError, match="has the LoRAs 'lora' inside, which are no part of its weights"):
        extract_lora(base, tmp_path / "with.safetensors", tmp_path / "out.safetensors", rank=2, progress=False)


@pytest.mark.parametrize("layer, message", [
    (Layer("a", torch.ones(3, 4), torch.ones(4, 3)), "a is [3, 4] in the base and [4, 3] in the tuned model"),
    (Layer("a", torch.ones(3, 4), torch.ones(3, 4), torch.ones(3)), "a (bias) is [3] in the base and absent in the tuned"),
    (Layer("a", torch.ones(3, 4), torch.full((3, 4), torch.nan)), "a: the difference holds values that are not finite"),
])
def test_layers_that_do_not_belong_together_are_refused(layer, message):
    with pytest.raises(LoRAError, match=re.escape(message)):
        extract([layer], RankRule(rank=1))
