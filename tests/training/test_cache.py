"""Latents and contexts are computed once: found again bit for bit, made anew when damaged, never taken for another's."""

import logging
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from sd.lora import apply_lora_to_model, get_lora_parameters, lora_layers, set_lora_enabled, use_adapters
from sd.model_loader import new_models
from sd.placement import placed
from sd.training import PictureSet, TrainConfig, train
from sd.training.dataset.cache import Posteriors, Store, cached_pictures, network_hash
from sd.training.dataset.contexts import Contexts, TextStore
from sd.training.dataset.open import open_data
from sd.training.errors import DataError
from tests.training.test_data import config_of
from tests.training.tiny import SMALL, copy_of, pictures


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    for k, wh in enumerate([(16, 16), (32, 8), (40, 17), (16, 16)]):
        picture = np.random.default_rng(k).integers(0, 256, wh[::-1], dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "data" / f"{k}.png")
        (tmp_path / "data" / f"{k}.txt").write_text(f"caption {k}")
    return tmp_path / "data"


def opened(folder: Path, known=frozenset(), **options):
    steps = {"bucket_step": 8, "bucket_min": 8} if "buckets" in options else {}
    return open_data(config_of(data=str(folder), **steps, **options), size=16, channels=1, factor=2, known=known)


def counted(monkeypatch, network) -> Counter:
    """How many rows the network computes from now on."""
    seen, original = Counter(), network.forward

    def forward(x, *args):
        seen["rows"] += len(x)
        return original(x, *args)

    monkeypatch.setattr(network, "forward", forward)
    return seen


def everything(posteriors, dataset) -> list[torch.Tensor]:
    pairs = [(i, v) for i in range(len(dataset)) for v in range(getattr(dataset, "variants", 1))]
    return [part for i, v in pairs for part in posteriors([i], [v])]


def cache_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


# ---- pictures --------------------------------------------------------------------------------------------------------

def encoded(models, data) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of each picture's latents in the UNet's scale, encoded one by one."""
    scale = models.config.vae.scale
    with torch.no_grad():
        rows = [models["encoder"](data.picture(i)[None]) for i in range(len(data))]
    return torch.cat([scale * mean for mean, _ in rows]), torch.cat([scale * (0.5 * logvar).exp() for _, logvar in rows])


def test_without_a_cache_the_latents_are_those_of_the_encoder_to_the_bit(models):
    data = pictures()
    mean, std = encoded(models, data)
    ours = Posteriors(models, data)([3, 0, 3])
    assert torch.equal(ours[0], mean[[3, 0, 3]]) and torch.equal(ours[1], std[[3, 0, 3]])
    assert Posteriors(models, data).masks([0]) is None


@pytest.mark.parametrize("limit", [1 << 20, 0])
def test_a_second_run_reads_what_the_first_wrote_and_computes_nothing(models, folder, tmp_path, monkeypatch, limit):
    options = dict(buckets=True, crop="random", variants=2, flip=True)
    data = opened(folder, **options)
    first = Posteriors(models, data, tmp_path / "cache", limit=limit)
    in_memory = Posteriors(models, data)
    rows, again = counted(monkeypatch, models["encoder"]), opened(folder, **options)
    second = Posteriors(models, again, tmp_path / "cache", limit=limit)
    assert rows["rows"] == 0 and len(cache_files(tmp_path / "cache")) == 4 * 4
    for a, b, c in zip(*(everything(p, data) for p in (first, second, in_memory))):
        assert torch.equal(a, b) and torch.equal(a, c)
    mean, logvar = models["encoder"](data.picture(2, 3)[None])
    torch.testing.assert_close(first([2], [3])[0], SMALL.vae.scale * mean)
    torch.testing.assert_close(first([2], [3])[1], SMALL.vae.scale * torch.distributions.Normal(0, logvar.exp().sqrt()).stddev)


def test_what_changes_the_latents_is_in_their_key_and_what_does_not_is_not(models, folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    Posteriors(models, opened(folder), cache)
    rows = counted(monkeypatch, models["encoder"])

    def computed(**options) -> int:
        rows.clear()
        Posteriors(models, opened(folder, **options), cache)
        return rows["rows"]

    (folder / "0.png").rename(folder / "9.png")
    (folder / "0.txt").rename(folder / "9.txt")
    assert computed(seed=5, trigger="another") == 0  # another name, order, caption and seed
    assert computed(flip=True) == 4  # the four mirror images
    assert computed(crop="random") == 4
    assert computed(buckets=True) == 2  # two have another size now
    (folder / "9.png").write_bytes((folder / "2.png").read_bytes())
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes())
    assert computed() == 0  # known contents under other names
    Image.new("L", (16, 16), 7).save(folder / "1.png")
    assert computed() == 1
    models["encoder"].conv_in.weight.data[0, 0, 0, 0] += 1e-3
    assert computed() == 3  # two pictures are the same by now
    models["encoder"].to(torch.bfloat16)
    assert computed() == 3


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "other", "text"])
def test_a_damaged_file_is_told_and_made_again_with_the_same_bits(models, folder, tmp_path, caplog, harm, monkeypatch):
    data, cache = opened(folder), tmp_path / "cache"
    before = everything(Posteriors(models, data, cache), data)
    path, other = cache_files(cache)[:2]
    content = path.read_bytes()
    bit = bytearray(content)
    bit[-1] ^= 1
    path.write_bytes({"cut": content[:-9], "bit": bytes(bit), "empty": b"", "other": other.read_bytes(),
                      "text": b"no tensors"}[harm])
    rows = counted(monkeypatch, models["encoder"])
    with caplog.at_level(logging.WARNING, "sd"):
        after = everything(Posteriors(models, data, cache), data)
    assert [r.getMessage() for r in caplog.records if str(path) in r.getMessage() and "rebuilding it" in r.getMessage()]
    assert len(caplog.records) == 1 and rows["rows"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, after)) and path.read_bytes() == content


def test_a_file_that_goes_while_it_is_used_is_a_sentence(models, folder, tmp_path):
    data = opened(folder)
    posteriors = Posteriors(models, data, tmp_path / "cache", limit=0)
    for path in cache_files(tmp_path / "cache"):
        path.unlink()
    with pytest.raises(DataError, match="was changed or removed while in use; start again"):
        posteriors([0])


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(models, folder, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    data = opened(folder)
    with monkeypatch.context() as patch, pytest.raises(DataError, match="the cache cannot be written .No space left"):
        patch.setattr(os, "fsync", full)
        Posteriors(models, data, tmp_path / "cache")
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file()]
    with pytest.raises(DataError, match="the cache cannot be written"):
        Posteriors(models, data, folder / "0.png")


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from sd.model_loader import new_models
from sd.training import PictureSet, TrainConfig, train
from sd.training.dataset.cache import Posteriors
from tests.training.test_cache import opened
from tests.training.tiny import SMALL

folder, cache = map(Path, sys.argv[1:])
models, data = new_models(SMALL, seed=1), opened(folder)
for late in (False, True, False):
    pid = os.fork()
    if pid == 0:
        replace, left = os.replace, [2]
        def deadly(source, target):
            left[0] -= 1
            if left[0] == 0 and not late:
                os.truncate(source, os.path.getsize(source) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = deadly
        Posteriors(models, data, cache)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print("killed" if os.WIFSIGNALED(status) else "ended", len(list(cache.rglob("*.safetensors"))))
"""


def test_a_kill_during_a_write_loses_nothing(models, folder, tmp_path, caplog):
    run = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "cache")], capture_output=True, text=True,
                         cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert run.stdout.splitlines() == ["killed 1", "killed 3", "ended 4"], run.stderr
    data = opened(folder)
    with caplog.at_level(logging.WARNING, "sd"):
        kept = everything(Posteriors(models, data, tmp_path / "cache"), data)
    assert not caplog.records
    assert all(torch.equal(a, b) for a, b in zip(kept, everything(Posteriors(models, data, tmp_path / "other"), data)))


def test_masks_are_the_mean_over_each_latent_and_are_kept_with_the_latents(models, folder, tmp_path):
    rng = np.random.default_rng(9)
    Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / "0-mask.png")
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        data = opened(folder, masks=True)
        masks = Posteriors(models, data, cache).masks([0, 1])
        assert torch.equal(masks[1], torch.ones(1, 8, 8))
        torch.testing.assert_close(masks[0], F.interpolate(data.mask(0)[None], size=(8, 8), mode="area")[0])
    Image.new("L", (16, 16), 51).save(folder / "0-mask.png")
    masks = Posteriors(models, opened(folder, masks=True), tmp_path / "cache").masks([0])
    torch.testing.assert_close(masks, torch.full((1, 1, 8, 8), 0.2))


def test_pictures_that_are_in_the_cache_are_not_decoded_again(models, folder, tmp_path, monkeypatch):
    data = opened(folder, buckets=True)
    assert cached_pictures(None) == cached_pictures(tmp_path / "cache") == set()
    Posteriors(models, data, tmp_path / "cache")
    known = cached_pictures(tmp_path / "cache")
    assert known == {data.digest(i) for i in range(4)}
    with monkeypatch.context() as patch:
        patch.setattr("sd.pictures.image_io.load_image", None)
        again = opened(folder, known=known, buckets=True)
        assert Posteriors(models, again, tmp_path / "cache")([0, 3])[0].shape == (2, 4, 8, 8)
    assert again.sizes == data.sizes
    (folder / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match="1.png: is empty"):
        opened(folder, known=known)


def test_pictures_in_memory_can_be_cached_too_and_a_file_is_plain_safetensors(models, tmp_path, monkeypatch):
    data = pictures()
    first = Posteriors(models, data, tmp_path)
    rows = counted(monkeypatch, models["encoder"])
    second = Posteriors(models, data, tmp_path)
    assert rows["rows"] == 0
    assert all(torch.equal(a, b) for a, b in zip(first(range(5)), second(range(5)), strict=True))
    torch.testing.assert_close(first(range(5))[0], encoded(models, data)[0])
    path = second.store.path(second._key(2, 0))
    assert torch.equal(load_file(path)["mean"], first([2])[0][0])


# ---- captions --------------------------------------------------------------------------------------------------------

def test_contexts_are_read_back_bit_for_bit_without_the_text_encoder(models, tmp_path, monkeypatch):
    captions = ["b", "a", "b", ""]
    plain = Contexts(models, trained=False)(captions)
    first = Contexts(models, trained=False, store=TextStore(tmp_path, models))
    assert torch.equal(first(captions), plain)
    second, rows = Contexts(models, trained=False, store=TextStore(tmp_path, models)), counted(monkeypatch, models["clip"])
    second.fill(captions)
    assert torch.equal(second(captions), plain) and rows["rows"] == 0
    assert len(cache_files(tmp_path)) == 3


def test_the_key_of_a_context_holds_all_that_the_text_encoder_does(models, tmp_path, monkeypatch):
    rows = counted(monkeypatch, models["clip"])

    def computed() -> int:
        expected = Contexts(models, trained=False)(["a"])
        rows.clear()
        found = Contexts(models, trained=False, store=TextStore(tmp_path, models))(["a"])
        assert torch.equal(found, expected)  # what is found is also what the encoder gives now
        return rows["rows"]

    assert [computed(), computed()] == [1, 0]
    apply_lora_to_model({"clip": models["clip"]}, 2, 2.0, name="x")
    for p in get_lora_parameters(models):
        p.data.normal_()
    assert [computed(), computed()] == [1, 0]
    with use_adapters(models, {"x": 0.5}):
        assert [computed(), computed()] == [1, 0]
    with use_adapters(models, {}):
        assert computed() == 0  # as without it
    set_lora_enabled(models, False)
    assert computed() == 0
    set_lora_enabled(models, True)
    layer = next(iter(lora_layers(models["clip"]).values()))
    layer.set_block_multiplier("x", 0.25)
    assert computed() == 1
    layer.adapter("x").alpha = 4.0
    assert computed() == 1
    models["clip"].final_norm.bias.data[0] += 1
    assert computed() == 1
    models["clip"].to(torch.bfloat16)
    assert [computed(), computed()] == [1, 0]


def test_clip_skip_takes_an_earlier_layer_and_has_files_of_its_own(tmp_path):
    models = new_models(replace(SMALL, clip=replace(SMALL.clip, layers=2)), seed=1)
    last, early = (Contexts(models, trained=False, store=TextStore(tmp_path, models, n), clip_skip=n)(["a"]) for n in (1, 2))
    tokens = Contexts(models, trained=True).tokens(["a"])
    assert torch.equal(early, models["clip"](tokens, 2)) and not torch.equal(early, last)
    assert torch.equal(Contexts(models, trained=True, clip_skip=2)(["a"]), early)
    assert len(cache_files(tmp_path)) == 2


def test_what_is_kept_does_not_depend_on_whether_it_is_asked_for_under_autocast(models):
    plain, lazy = Contexts(models, trained=False)(["a"]), Contexts(models, trained=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(models["clip"](lazy.tokens(["a"])), plain)
        assert torch.equal(lazy(["a"]), plain)


def test_a_trained_text_encoder_neither_reads_nor_writes_the_cache(models, tmp_path):
    store = TextStore(tmp_path, models)
    contexts = Contexts(models, trained=True, store=store)
    contexts.fill(["a"])
    models["clip"].requires_grad_(True)
    assert contexts(["a", "b"]).requires_grad
    assert cache_files(tmp_path) == []


def test_above_their_limits_memory_and_disk_hold_no_more_and_the_contexts_stay_the_same(models, tmp_path, monkeypatch):
    captions = [f"number {k}" for k in range(6)]
    plain = Contexts(models, trained=False)(captions)
    one = plain[0].nbytes
    store = TextStore(tmp_path, models, limit=3 * one)
    contexts = Contexts(models, trained=False, store=store, limit=2 * one)
    for _ in range(2):
        for k, caption in enumerate(captions):
            assert torch.equal(contexts([caption])[0], plain[k])
        assert len(contexts.kept) == 2 and contexts.bytes == 2 * one
        assert list(contexts.kept) == captions[-2:]
    contexts([captions[4]]), contexts([captions[0]])
    assert list(contexts.kept) == [captions[4], captions[0]]  # what was used last stays
    assert torch.equal(contexts(captions), plain)  # a batch above the limit
    assert len(cache_files(tmp_path)) == 3
    assert TextStore(tmp_path, models, limit=3 * one).store.bytes >= 3 * one
    rows = counted(monkeypatch, models["clip"])
    contexts([list(contexts.kept)[0]])
    assert rows["rows"] == 0


def test_a_hash_of_a_network_is_of_its_values_and_not_of_its_place_in_memory(models, untrained):
    assert network_hash(models["encoder"]) == network_hash(untrained["encoder"]) != network_hash(models["clip"])
    models["encoder"].quant_conv.bias.data[0] = -models["encoder"].quant_conv.bias.data[0]
    assert network_hash(models["encoder"]) != network_hash(untrained["encoder"])


def test_networks_leave_the_device_inside_the_block_and_come_back_after_an_error():
    class Network:
        def __init__(self, device):
            self.weight, self.moves = torch.empty(1, device=device), 0

        def parameters(self):
            return iter([self.weight])

        def to(self, device):
            self.weight, self.moves = torch.empty(1, device=device), self.moves + 1

    def devices():
        return [str(network.weight.device) for network in models.values()]

    models = {"encoder": Network("meta"), "clip": Network("meta"), "diffusion": Network("meta"), "decoder": Network("cpu")}
    with pytest.raises(KeyError), placed(models, ("encoder", "clip", "decoder"), "cpu"):
        assert devices() == ["cpu", "cpu", "meta", "cpu"]
        with placed(models, models, torch.device("meta")):
            assert devices() == ["meta"] * 4
        assert devices() == ["cpu", "cpu", "meta", "cpu"]
        raise KeyError
    assert devices() == ["meta", "meta", "meta", "cpu"]
    assert models["diffusion"].moves == 0  # a move drops merged weights


@pytest.mark.parametrize("change, idle", [
    ({}, ("encoder", "decoder", "clip")), ({"train": "full"}, ("encoder", "decoder", "clip")),
    ({"shuffle_tags": True}, ("encoder", "decoder")), ({"text_encoder": True}, ("encoder", "decoder")), ({"train": "vae"}, ())])
def test_steps_do_without_the_networks_that_leave_the_device(change, idle, models, tmp_path, monkeypatch):
    @contextmanager
    def away(models, keys, device):
        assert tuple(keys) == idle and device == "cpu"
        for key in keys:
            monkeypatch.setattr(models[key], "forward", None)
        yield

    @contextmanager
    def back(models, keys, device):
        assert set(keys) == set(models) and device == models.device
        with monkeypatch.context() as inside:
            for network in models.values():
                inside.setattr(network, "forward", partial(type(network).forward, network))
            yield

    data = PictureSet(pictures(4).pictures, [("a, b", "c, d")] * 4)
    config = TrainConfig(steps=3, batch_size=2, progress=False, validate_every=1, out=str(tmp_path / "plain"), **change)
    if config.train != "vae":
        config = replace(config, sample_prompts=("a",), sample_every=2, sample_steps=2)
    train(config, copy_of(models), data, held_out=pictures(2))
    monkeypatch.setattr(import_module("sd.training.loop"), "placed", away)
    monkeypatch.setattr(import_module("sd.training.watch.samples"), "placed", back)
    train(replace(config, out=str(tmp_path / "away")), copy_of(models), data, held_out=pictures(2))
    kept = [(tmp_path / run / "state.safetensors").read_bytes() for run in ("plain", "away")]
    assert kept[0] == kept[1]


def test_two_stores_of_one_folder_do_not_disturb_each_other(tmp_path):
    a, b = Store(tmp_path), Store(tmp_path)
    a.write({"x": 1}, {"t": torch.ones(3)})
    b.write({"x": 1}, {"t": torch.ones(3)})
    assert torch.equal(a.read({"x": 1})["t"], torch.ones(3)) and b.read({"x": 2}) is None
    assert len(cache_files(tmp_path)) == 1
