"""What a start and a step do does not grow with the pictures that are in the cache. Counted, not timed."""

import os
import sys
import time
from pathlib import Path, PurePath

import numpy as np
import pytest
import torch
from PIL import Image

from sd.training import PictureSet
from sd.training.dataset.batches import Batches, batch_weights
from sd.training.dataset.cache import Posteriors
from sd.training.dataset.contexts import Contexts, TextStore, all_captions
from sd.training.dataset.index import Index
from sd.training.dataset.open import open_pictures
from sd.training.dataset.sources import read_folder
from tests.training.test_cache import counted
from tests.training.test_data import config_of

OPENED: list[str] = []  # what is opened while this is watched
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" and OPENED else None)


def opens(run) -> list[Path]:
    OPENED[:] = ["watch"]
    try:
        run()
        return [Path(name) for name in OPENED[1:]]
    finally:
        OPENED.clear()


def aged(*files: Path) -> None:
    """Written a minute ago: a file that has just been written is not recognised by its time."""
    for file in files:
        os.utime(file, (time.time() - 60,) * 2)


def make(folder: Path, count: int) -> Path:
    folder.mkdir()
    for k in range(count):
        picture = np.random.default_rng(k).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{k:03}.png")
        Image.fromarray(picture).save(folder / f"{k:03}-mask.png")
        (folder / f"{k:03}.txt").write_text(f"caption {k}")
    aged(*folder.iterdir())
    return folder


def start(models, folder: Path, **options):
    """What a training does with its data before the first step."""
    config = config_of(data=str(folder), cache=str(folder.parent / "cache"), size=16, masks=True, **options)
    data, held_out = open_pictures(config, models)
    data.fingerprint()
    posteriors, store = Posteriors(models, data, config.cache), TextStore(config.cache, models)
    contexts = Contexts(models, trained=False, store=store)
    contexts.fill(all_captions(data, config))
    return data, posteriors, contexts


@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_a_second_start_opens_one_index_however_many_pictures_there_are(models, tmp_path, validation):
    again = {}
    for count in (12, 36):
        (tmp_path / str(count)).mkdir()
        folder = make(tmp_path / str(count) / "data", count)
        first = start(models, folder, validation=validation)
        again[count] = [p for p in opens(lambda: start(models, folder, validation=validation)) if tmp_path in p.parents]  # noqa: B023
        data, posteriors, contexts = start(models, folder, validation=validation)
        assert data.fingerprint() == first[0].fingerprint() and data.sizes == first[0].sizes
        assert all(torch.equal(a, b) for a, b in zip(posteriors([1, 0]), first[1]([1, 0]), strict=True))
        assert torch.equal(posteriors.masks([0]), first[1].masks([0]))
        assert torch.equal(contexts(["caption 1"]), first[2](["caption 1"]))
    assert [len(files) for files in again.values()] == [1, 1] and again[12][0].parent.name == "index"


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_file_that_changed_is_read_again_whatever_its_time_says(models, tmp_path, keep_time):
    folder = make(tmp_path / "data", 3)
    before, *_ = start(models, folder)
    for name in ("001.png", "002.txt", "000-mask.png"):
        content = bytearray((folder / name).read_bytes())
        if name.endswith("png"):
            other = Image.fromarray(np.random.default_rng(7).integers(0, 256, (16, 16), dtype=np.uint8))
            other.save(folder / name)
        else:
            (folder / name).write_bytes(content.replace(b"2", b"5"))
        if keep_time:
            aged(folder / name)
    after, *_ = start(models, folder)
    assert [before.digest(i) == after.digest(i) for i in range(3)] == [True, False, True]
    assert after.captions == [("caption 0",), ("caption 1",), ("caption 5",)]
    assert before.made_of(0)["mask"] != after.made_of(0)["mask"] and before.made_of(2) == after.made_of(2)


def test_a_damaged_index_is_made_anew_and_a_file_just_written_is_not_in_it(tmp_path):
    file = tmp_path / "a"
    file.write_text("x")
    index, asked = Index(tmp_path, ["data"]), []

    def size(path=file) -> int:
        asked.append(path)
        return path.stat().st_size
    assert [index.fact("size", file, size) for _ in range(2)] == [1, 1] and len(asked) == 2  # it is too young
    index.save()
    aged(file)
    assert Index(tmp_path, ["data"]).before == {}
    for content in (None, b"", b"{", b"[]", b'{"format": 0, "files": {}}'):
        if content is not None:
            index.path.write_bytes(content)
        index = Index(tmp_path, ["data"])
        asked.clear()
        assert [index.fact("size", file, size) for _ in range(2)] == [1, 1] and len(asked) == 1
        index.save()
        assert Index(tmp_path, ["data"]).fact("size", file, lambda: None) == 1
        assert Index(tmp_path, ["other"]).fact("size", file, lambda: 5) == 5


def test_the_batches_of_an_epoch_are_listed_once_and_not_in_each_step(monkeypatch):
    data = PictureSet(torch.zeros(300, 1, 2, 2), ["a"] * 300)
    listed, original = [], Batches.batches
    monkeypatch.setattr(Batches, "batches", lambda self, epoch: listed.append(epoch) or original(self, epoch))
    batches = Batches(data, config_of(batch_size=2))
    assert len({i for number in range(150) for i in batches(number)}) == 300
    assert listed == [0]
    read = []

    class Regular(list):
        def __iter__(self):
            read.append(1)
            return super().__iter__()

    data.regular = Regular([False] * 300)
    assert [batch_weights(data, [0, 1], config_of()) for _ in range(5)] == [None] * 5 and len(read) == 1


def test_pictures_and_masks_are_matched_without_comparing_all_with_all(tmp_path, monkeypatch):
    compared, original = [0], PurePath.__eq__

    def equal(self, other):
        compared[0] += 1
        return original(self, other)

    counts = []
    for count in (10, 40):
        folder = make(tmp_path / str(count), count)
        with monkeypatch.context() as patch:
            patch.setattr(PurePath, "__eq__", equal)
            compared[0] = 0
            assert all(e.mask.stem == f"{Path(e.name).stem}-mask" for e in read_folder(folder, masks=True))
        counts.append(compared[0])
    assert counts[1] <= 8 * max(counts[0], 10)  # 4 times the files; all with all would be 16


def test_contexts_that_nothing_can_hold_are_not_encoded_in_advance(models, tmp_path, monkeypatch):
    captions = [f"number {k}" for k in range(40)]
    one = Contexts(models, trained=False)(["a"]).nbytes
    rows = counted(monkeypatch, models["clip"])
    Contexts(models, trained=False, limit=3 * one).fill(captions)
    assert rows["rows"] == 3
    Contexts(models, trained=False, store=TextStore(tmp_path, models, limit=5 * one), limit=3 * one).fill(captions)
    assert 3 + 5 <= rows["rows"] <= 3 + 6 and len(list(tmp_path.rglob("*.safetensors"))) == 5
