"""Where pictures and captions come from, which batch holds what, and captions as they are seen."""

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sd.training import TrainConfig
from sd.training.dataset.batches import Batches, batch_captions, batch_variants, batch_weights
from sd.training.dataset.buckets import make_buckets
from sd.training.dataset.captions import CAPTION_OPTIONS, fixed_captions, seen_caption
from sd.training.dataset.contexts import all_captions
from sd.training.dataset.data import PictureData, as_picture_data
from sd.training.dataset.open import open_data
from sd.training.dataset.pictures import PictureFolder
from sd.training.dataset.randomness import STREAMS, seed_of
from sd.training.dataset.sources import balanced, read_folder, read_sources, whole_repeats
from sd.training.errors import DataError, TrainError
from sd.training.watch.describe import describe_data
from tests.training.tiny import changed, pictures


def config_of(**options) -> TrainConfig:
    """Small batches without empty captions, and what has no effect beside the given options left as it is by default."""
    return changed(TrainConfig(batch_size=2, steps=10, caption_dropout=0.0), **({"bucket_step": 16} | options))


def opened(folder: Path | str, size: int = 64, **options):
    return open_data(config_of(data=str(folder), **options), size=size, channels=3, factor=8)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(folder: Path, sizes: dict[str, tuple[int, int]], captions: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, (name, wh) in enumerate(sizes.items()):
        noise(*wh, seed=k).save(folder / name)
        if captions:
            (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    return folder


TWO = {"a.png": (20, 16), "b: c.png": (16, 20)}


# ---- sources ---------------------------------------------------------------------------------------------------------

def as_csv(rows):
    return "file_name,text\n" + "".join(f'{n},"{t.replace(chr(34), chr(34) * 2)}"\n' for n, t in rows)


def as_colon_lines(rows):
    return "\n\n".join(f'"{n}": {t}' for n, t in rows)


LISTS = {"metadata.jsonl": lambda rows: "\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows),
         "metadata.csv": as_csv, "captions.txt": as_colon_lines}


@pytest.mark.parametrize("name", LISTS)
def test_every_list_of_captions_holds_what_texts_beside_the_pictures_do(tmp_path, name):
    texts = {"a.png": 'red: a "fox", or two', "b: c.png": "blue\u2028é"}
    beside, listed = write(tmp_path / "beside", TWO), write(tmp_path / "listed", TWO, captions=False)
    for n, text in texts.items():
        (beside / n).with_suffix(".txt").write_text(text, encoding="utf-8")
    (listed / name).write_text("\ufeff" + LISTS[name](reversed(texts.items())), encoding="utf-8")
    a, b = (PictureFolder(folder, size=16, channels=3) for folder in (beside, listed))
    assert a.captions == b.captions == [(text,) for text in texts.values()]
    assert a.fingerprint() == b.fingerprint()


def test_an_unquoted_name_ends_at_the_colon_and_the_caption_may_hold_more(tmp_path):
    write(tmp_path, {"a.png": (16, 16)}, captions=False)
    (tmp_path / "captions.txt").write_text("  a.png : one: two  \n")
    assert read_folder(tmp_path)[0].captions == ("one: two",)


@pytest.mark.parametrize("name, content, message", [
    ("captions.txt", "a.png: x\nb: c.png: y", "line 2: 'b' is not in the folder"),
    ("captions.txt", "a.png: x\n\nno colon", "line 3: expected `name.png: caption`"),
    ("captions.txt", "a.png: x\na.png: y", "line 2: 'a.png' is listed twice"),
    ("captions.txt", "a.png: x", "1 of 2 pictures have no caption, first: b: c.png"),
    ("metadata.csv", "name,text\na.png,x", r"line 1: expected the columns file_name and text, found \['name', 'text'\]"),
    ("metadata.csv", "", "line 1: expected the columns"),
    ("metadata.csv", "file_name,text\na.png,x, y", "line 2: has more values"),
    ("metadata.csv", "file_name,text\na.png", "line 2: has fewer values"),
    ("metadata.csv", 'file_name,text\na.png,"x', "line 2: unexpected end of data"),
    ("metadata.csv", "file_name,text\nz.png,x", "line 2: 'z.png' is not in the folder")])
def test_a_bad_line_of_a_list_is_named_with_its_number(tmp_path, name, content, message):
    write(tmp_path, TWO, captions=False)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path)


def test_two_lists_and_text_that_is_not_utf_8_are_refused(tmp_path):
    write(tmp_path, TWO, captions=False)
    (tmp_path / "captions.txt").write_bytes(b"a.png: caf\xe9")
    with pytest.raises(DataError, match="captions.txt: is not UTF-8"):
        read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(DataError, match="has both metadata.jsonl and captions.txt; keep one"):
        read_folder(tmp_path)


def test_numbered_folders_repeat_their_pictures_and_their_name_is_the_caption_that_is_missing(tmp_path):
    write(tmp_path / "3_sks dog", TWO)
    (tmp_path / "3_sks dog" / "a.txt").unlink()
    write(tmp_path / "1_dog", {"a.png": (16, 16)}, captions=False)
    data = opened(tmp_path, size=16)
    assert data.captions == [("dog",), ("sks dog",), ("caption of b: c.png",)]
    assert Counter(data.uses) == {0: 1, 1: 3, 2: 3}
    noise(16, 16).save(tmp_path / "lost.png")
    with pytest.raises(DataError, match="lost.png: is beside numbered folders such as 1_dog"):
        read_folder(tmp_path)
    (tmp_path / "lost.png").unlink()
    (tmp_path / "1_dog").rename(tmp_path / "0_dog")
    with pytest.raises(DataError, match="0_dog: says 0 repeats; allowed: 1 to 10000"):
        read_folder(tmp_path)


TOML = """
[[source]]
data = "few"
weight = 2
trigger = "sks"
caption_dropout = 1
[[source]]
data = "many"
weight = 1.0
prefix = "a photo,"
"""


def test_a_toml_of_sources_has_weights_and_caption_options_of_its_own(tmp_path):
    write(tmp_path / "few", {"a.png": (16, 16)})
    write(tmp_path / "many", {f"{k}.png": (16, 16) for k in range(3)})
    (tmp_path / "all.toml").write_text(TOML)
    data = opened(tmp_path / "all.toml", size=16, suffix="end")
    uses = Counter(data.uses)
    assert uses[0] == 2 * sum(uses[i] for i in (1, 2, 3)) and uses[1] == uses[2] == uses[3] == 1
    config = config_of(suffix="end")
    assert batch_captions(data, [0, 1], config, 0) == ["", "a photo, caption of 0.png end"]
    before = data.fingerprint()
    (tmp_path / "all.toml").write_text(TOML.replace("sks", "shs"))
    assert opened(tmp_path / "all.toml", size=16).fingerprint() != before


@pytest.mark.parametrize("content, message", [
    ("[[source]]\ndata = 3", "source 1: data is 3; a str is needed"),
    ("[[source]]\nrepeats = 2", "source 1: data is missing"),
    ("[[source]]\ndata = 'a'\nrepeat = 2", "source 1: 'repeat' is unknown; allowed: data, repeats, weight"),
    ("[[source]]\ndata = 'a'\nrepeats = 0", "source 1: repeats is 0; allowed: 1 to 10000"),
    ("[[source]]\ndata = 'a'\nshuffle_tags = 1", "shuffle_tags is 1; a bool is needed"),
    ("[[source]]\ndata = 'a'\nweight = 1\nrepeats = 2", "weight does not go with repeats"),
    ("[[source]]\ndata = 'a'\n[[source]]\ndata = 'b'\nweight = 2", "some sources have a weight and some have none"),
    ("[[source]]\ndata = 'a'\n[[source]]\ndata = 'a'", "source 2: data 'a' is listed twice; use repeats"),
    ("[[source]]\ndata = 'x.toml'", "source 1: data is 'x.toml'; allowed: a folder"),
    ("[[source]]\ndata = 'nowhere'", "nowhere: no such folder"),
    ("data = 'a'", "expected \\[\\[source\\]\\] tables and nothing else, found data"),
    ("", "expected .* found nothing"), ("[[source", "not valid TOML")])
def test_a_toml_that_does_not_fit_is_refused(tmp_path, content, message):
    for name in "ab":
        write(tmp_path / name, {"a.png": (16, 16)})
    (tmp_path / "all.toml").write_text(content)
    with pytest.raises(DataError, match=message):
        read_sources(str(tmp_path / "all.toml"))


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=4))
def test_whole_repeats_are_in_the_proportions_asked_for(wanted):
    found = whole_repeats(wanted)
    for a, b in zip(found, wanted):
        assert a / found[wanted.index(min(wanted))] == pytest.approx(b / min(wanted), rel=0.11)


def test_a_dataset_of_hugging_face_on_the_disk_is_read_as_a_folder_is(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = write(tmp_path / "folder", {"a.png": (20, 16), "b.png": (16, 24)}, captions=False)
    (folder / "metadata.jsonl").write_text(LISTS["metadata.jsonl"]([("a.png", "A"), ("b.png", "B")]))
    ours = opened(folder, size=16)
    rows = {"image": [str(folder / n) for n in ("a.png", "b.png")], "caption": [["A", "a"], ["B"]]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved")
    for path, captions in ((folder, [("A",), ("B",)]), (tmp_path / "saved", [("A", "a"), ("B",)])):
        theirs = opened(f"hf:{path}", size=16)
        assert theirs.captions == captions
        assert all(torch.equal(theirs.picture(i), ours.picture(i)) for i in (0, 1))
    datasets.Dataset.from_dict({"image": ["x"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="a column of pictures and one named text, .* it has image"):
        read_sources(f"hf:{tmp_path / 'other'}")
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no picture", "path": None}], "text": ["x"]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}))
    broken.save_to_disk(tmp_path / "broken")
    with pytest.raises(DataError, match="broken, row 0: not a picture"):
        opened(f"hf:{tmp_path / 'broken'}")


def test_without_the_package_a_hugging_face_dataset_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="data is 'hf:someone/pictures', which needs .* pip install datasets"):
        read_sources("hf:someone/pictures")


# ---- regularisation and masks ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, m", [(3, 2), (3, 3), (2, 7)])
def test_half_of_an_epoch_is_regularisation_and_every_picture_is_in_it(tmp_path, n, m):
    train = write(tmp_path / "train", {f"{k}.png": (16, 16) for k in range(n)})
    write(tmp_path / "reg" / "1_dog", {f"{k}.png": (16, 16) for k in range(m)}, captions=False)
    data = opened(train, size=16, reg_data=str(tmp_path / "reg"), prior_weight=0.5, trigger="sks")
    uses = Counter(data.uses)
    assert len(uses) == n + m
    assert sum(uses[i] for i in range(n)) == sum(uses[i] for i in range(n, n + m))
    for part in (range(n), range(n, n + m)):
        assert max(uses[i] for i in part) - min(uses[i] for i in part) <= 1
    config = config_of(reg_data="reg", prior_weight=0.5, trigger="sks")
    assert torch.equal(batch_weights(data, [0, n, n + 1], config), torch.tensor([1, 0.5, 0.5]))
    assert batch_captions(data, [0, n], config, 0) == ["sks, caption of 0.png", "dog"]
    assert batch_weights(opened(train, size=16), [0], config) is None
    with pytest.raises(DataError, match="all pictures are for regularisation"):
        balanced([replace(e, regular=True) for e in data.entries])


def test_masks_are_cut_as_their_pictures_are_and_are_no_pictures_themselves(tmp_path):
    write(tmp_path, {"a.png": (40, 16), "b.png": (40, 16), "c.png": (16, 16)})
    (tmp_path / "masks").mkdir()
    ramp = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None] * 6, 16, axis=0))  # other filters, the same ramp
    for name, mask in (("a.png", "a-mask.png"), ("b.png", "masks/b.png")):
        ramp.convert("RGB").save(tmp_path / name)
        ramp.save(tmp_path / mask)
    data = opened(tmp_path, size=16, masks=True, crop="random", variants=3, flip=True)
    assert [e.name for e in data.entries] == ["a.png", "b.png", "c.png"] and data.variants == 6
    for i in (0, 1):
        crops = [data.picture(i, variant) for variant in range(6)]
        assert all(torch.allclose((p[:1] + 1) / 2, data.mask(i, v), atol=0.006) for v, p in enumerate(crops))
        assert len({p.numpy().tobytes() for p in crops}) == 6
        assert all(torch.equal(crops[v].flip(-1), crops[v + 1]) for v in (0, 2, 4))
    assert torch.equal(data.mask(2), torch.ones(1, 16, 16))
    assert "2 have a mask" in describe_data(data, config_of())


@pytest.mark.parametrize("name, size, message", [
    ("z-mask.png", (16, 16), "z-mask.png: a mask without a picture"), ("a-mask.png", (8, 16), "has 8 x 16 pixels, its picture"),
    ("other.png", (16, 16), "no picture has one; that of a.png is a-mask.png or masks/a.png")])
def test_masks_that_do_not_fit_are_refused(tmp_path, name, size, message):
    write(tmp_path, {"a.png": (16, 16)})
    Image.new("L", size).save(tmp_path / name)
    if name == "other.png":
        (tmp_path / "other.txt").touch()
    with pytest.raises(DataError, match=message):
        opened(tmp_path, size=16, masks=True).mask(0)


# ---- sizes and crops -------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(8, 4000), st.integers(8, 4000), st.sampled_from([(512, 64), (512, 8), (768, 64), (64, 16)]))
def test_a_bucket_has_the_nearest_ratio_of_all_sizes_that_are_as_large_as_the_area_allows(width, height, case):
    size, step = case
    w, h = make_buckets(size, factor=8, step=step).choose(width, height)
    sides = range(max(step, size // 2), 2 * size + 1, step)
    # By brute force: all sizes that cannot grow on either side.
    allowed = [(a, b) for a in sides for b in sides if a * b <= size * size]
    largest = [(a, b) for a, b in allowed if (a + step, b) not in allowed or (a, b + step) not in allowed]
    distance = [abs(math.log(a / b) - math.log(width / height)) for a, b in largest]
    assert (w, h) in largest
    assert abs(math.log(w / h) - math.log(width / height)) == pytest.approx(min(distance), abs=1e-6)
    flipped = make_buckets(size, factor=8, step=step).choose(height, width)
    assert sorted(flipped) == sorted((w, h))


@settings(max_examples=60, deadline=None)
@given(st.integers(128, 700), st.integers(128, 700))
def test_without_upscale_a_picture_covers_its_bucket_and_a_large_one_has_the_usual_one(width, height):
    usual, kept = (make_buckets(512, factor=8, low=64, upscale=up).choose(width, height) for up in (True, False))
    assert kept[0] <= width and kept[1] <= height
    assert (usual == kept) == (usual[0] <= width and usual[1] <= height)


def test_pictures_of_two_shapes_fill_their_buckets_without_bars_or_distortion(tmp_path):
    write(tmp_path, {"wide.png": (128, 32), "high.png": (40, 64), "small.png": (24, 24)})
    data = opened(tmp_path, size=64, buckets=True, bucket_min=16, bucket_step=16, crop="center")
    assert data.sizes == [(48, 80), (64, 64), (128, 32)] and data.bucket_of == [0, 1, 2]
    for i, (w, h) in enumerate(data.sizes):
        assert data.picture(i).shape == (3, h, w)
    wide = torch.from_numpy(np.array(noise(128, 32), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(data.picture(2), wide)  # it is as large as its bucket: nothing is done to it
    assert "128 x 32: 1 pictures, 1 uses" in describe_data(data, config_of())
    small = opened(tmp_path, size=64, buckets=True, bucket_min=16, bucket_step=16, upscale=False)
    assert small.sizes[1] == (16, 16)
    with pytest.raises(DataError, match="small.png: has 24 x 24 pixels, less than its smallest bucket"):
        opened(tmp_path, size=64, buckets=True, bucket_min=32, upscale=False)


def test_a_picture_that_its_exif_turns_has_the_bucket_of_the_upright_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    noise(128, 32).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").touch()
    data = opened(tmp_path, buckets=True, bucket_min=16)
    assert data.sizes == [(32, 128)]
    known = open_data(config_of(data=str(tmp_path), buckets=True, bucket_min=16), size=64, channels=3, factor=8,
                      known={data.digest(0)})
    assert known.sizes == data.sizes


def test_random_crops_are_whole_windows_of_the_scaled_picture_and_the_same_in_every_run(tmp_path):
    write(tmp_path, {"a.png": (64, 16), "b.png": (64, 16)})
    data = opened(tmp_path, size=16, crop="random", variants=4)
    again = opened(tmp_path, size=16, crop="random", variants=4)
    whole = torch.from_numpy(np.array(noise(64, 16), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    offsets = []
    for v in range(4):
        # An offset is a fraction of a pixel, so that a crop lies between two whole windows.
        errors = [(data.picture(0, v) - whole[:, :, x:x + 16]).abs().mean().item() for x in range(49)]
        offsets.append(int(np.argmin(errors)))
        assert min(errors) < 0.6 * np.median(errors)
        assert torch.equal(data.picture(0, v), again.picture(0, v))
    assert len(set(offsets)) > 1
    counts = Counter(v for number in range(200) for v in batch_variants(data, [0, 1], config_of(), number))
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 60
    assert batch_variants(pictures(), [0, 1], config_of(), 5) == [0, 0]


@pytest.mark.parametrize("options, message", [
    ({"crop": "left"}, "crop is 'left'; allowed: center, random"),
    ({"variants": 2}, "variants is 2; allowed: 1, since .* crop random"),
    ({"variants": 0}, "variants is 0; allowed: 1 to 1000"),
    ({"upscale": False}, "upscale is False; allowed: True, since .* buckets"),
    ({"prior_weight": -1.0}, "prior_weight is -1.0; allowed: 0 or more"), ({"keep_tokens": -1}, "keep_tokens is -1"),
    ({"tag_separator": ""}, "tag_separator is ''"),
    ({"buckets": True, "bucket_step": 12}, "bucket_step is 12; allowed: multiples of 8"),
    ({"buckets": True, "bucket_min": 80}, "bucket_min is 80 and bucket_max is 128; size, which is 64"),
    ({"buckets": True, "bucket_step": 64, "bucket_min": 48, "bucket_max": 64, "size": 56}, "no bucket has sides of|must lie")])
def test_an_option_that_makes_no_sense_is_refused(tmp_path, options, message):
    write(tmp_path, {"a.png": (16, 16)})
    with pytest.raises((DataError, TrainError), match=message):
        config = TrainConfig(**{"data": str(tmp_path), "size": 64} | options)
        open_data(config, size=config.size, channels=3, factor=8)


@pytest.mark.parametrize("content, message", [
    (b"", "b.png: is empty"), (b"\x89PNG\r\n\x1a\n broken", "b.png: "), ("1 pixel", "b.png: has 1 x 1 pixels"),
    ("huge", "b.png: too many pixels")])
def test_a_picture_that_cannot_be_used_is_named_when_the_data_is_opened(tmp_path, content, message, monkeypatch):
    write(tmp_path, {"a.png": (16, 16), "b.png": (32, 32)})
    if content == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    elif content == "1 pixel":
        noise(1, 1).save(tmp_path / "b.png")
    else:
        (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path, size=16, buckets=True)


def test_at_the_defaults_a_picture_is_what_pillow_makes_of_it(tmp_path):
    write(tmp_path, {"a.png": (50, 31)})
    expected = ImageOps.fit(Image.open(tmp_path / "a.png"), (24, 24), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.array(expected, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(PictureFolder(tmp_path, size=24, channels=3).picture(0), expected)
    assert torch.equal(opened(tmp_path, size=24).picture(0), expected)


# ---- order -----------------------------------------------------------------------------------------------------------

class Shapes(PictureData):
    """A data set without pictures: the bucket of each, and how often it comes in an epoch."""

    def __init__(self, buckets, repeats):
        names = sorted(set(buckets))
        self.bucket_of = [names.index(b) for b in buckets]
        self.uses = [i for i, r in enumerate(repeats) for _ in range(r)]

    def __len__(self):
        return len(self.bucket_of)


shapes = st.integers(1, 12).flatmap(lambda n: st.tuples(
    st.lists(st.integers(0, 3), min_size=n, max_size=n), st.lists(st.integers(1, 3), min_size=n, max_size=n)))


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(1, 7), st.integers(0, 1000), st.integers(1, 6))
def test_a_batch_has_one_bucket_and_each_picture_comes_as_often_as_it_should(case, batch_size, seed, epochs):
    data, config = Shapes(*case), config_of(batch_size=batch_size, seed=seed)
    batches = Batches(data, config)
    for b in set(data.bucket_of):
        # All batches of the first epochs that hold this bucket, joined in the bucket's own order, are its epochs end to end.
        own = sorted((k, number) for e in range(epochs) for at, (bucket, k) in enumerate(batches.batches(e))
                     for number in [batches.before(e) + at] if bucket == b)
        assert [k for k, _ in own] == list(range(len(own)))
        row = [i for _, number in own for i in batches(number)]
        epoch = Counter(i for i in data.uses if data.bucket_of[i] == b)
        n = sum(epoch.values())
        assert epochs * n <= len(row) < epochs * n + batch_size
        assert all(Counter(row[e * n:(e + 1) * n]) == epoch for e in range(epochs))
        assert all(len({data.bucket_of[i] for i in batches(number)}) == 1 and len(batches(number)) == batch_size
                   for _, number in own)


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 7), st.integers(0, 1000), st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_a_batch_follows_from_its_number_alone(case, batch_size, seed, numbers):
    config = config_of(batch_size=batch_size, seed=seed)
    whole = Batches(Shapes(*case), config)
    row = [whole(number) for number in range(max(numbers) + 1)]
    resumed = Batches(Shapes(*case), config)
    assert [resumed(number) for number in numbers] == [row[number] for number in numbers]


def test_epochs_and_seeds_have_orders_of_their_own_and_buckets_are_mixed():
    data, config = Shapes([0] * 20 + [1] * 20, [1] * 40), config_of(batch_size=2)
    batches = Batches(data, config)
    epochs = [[tuple(batches(n)) for n in range(batches.before(e), batches.before(e + 1))] for e in (0, 1)]
    assert epochs[0] != epochs[1] and epochs[0] != [tuple(Batches(data, replace(config, seed=1))(n)) for n in range(20)]
    kinds = [data.bucket_of[b[0]] for b in epochs[0]]
    assert 4 < sum(a != b for a, b in zip(kinds, kinds[1:])) < 16


# ---- captions --------------------------------------------------------------------------------------------------------

def options(**varied):
    return CAPTION_OPTIONS | varied


tags = st.lists(st.text("abc {|}é\n", min_size=1, max_size=6).filter(str.strip), max_size=6)


@settings(deadline=None)
@given(st.text(max_size=40), st.integers(0, 99))
def test_with_the_defaults_a_caption_is_seen_to_the_letter(text, seed):
    assert seen_caption(text, options(), np.random.default_rng(seed)) == text


@settings(deadline=None)
@given(tags, st.integers(0, 8), st.integers(0, 99))
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(given_tags, keep, seed):
    clean = [tag.strip() for tag in given_tags]
    seen = seen_caption(",".join(given_tags), options(shuffle_tags=True, keep_tokens=keep), np.random.default_rng(seed))
    found = seen.split(", ") if seen else []
    assert found[:keep] == clean[:keep] and sorted(found) == sorted(clean)


def test_every_order_of_tags_and_every_wildcard_is_as_likely_as_the_next():
    rng = np.random.default_rng(0)
    seen = Counter(seen_caption("k, a, b, c", options(shuffle_tags=True, keep_tokens=1), rng) for _ in range(3000))
    assert len(seen) == 6 and all(text.startswith("k, ") for text in seen) and min(seen.values()) > 400
    seen = Counter(seen_caption("a {red|{light|dark} blue|} car", options(wildcards=True), rng) for _ in range(3000))
    assert set(seen) == {"a red car", "a light blue car", "a dark blue car", "a car"}
    assert seen["a red car"] > 900 and seen["a dark blue car"] > 400


@pytest.mark.parametrize("changed, caption, seen", [
    ({"trigger": "sks"}, "a dog", "sks, a dog"), ({"trigger": "sks"}, "a sks dog", "a sks dog"),
    ({"trigger": "sks"}, "asks a dog", "sks, asks a dog"), ({"trigger": "sks"}, "", "sks"),
    ({"trigger": "<c++>"}, "a <c++> x", "a <c++> x"),
    ({"prefix": "a photo of"}, "a dog", "a photo of a dog"), ({"prefix": "p"}, "", "p"),
    ({"suffix": "by day"}, "a dog", "a dog by day"), ({"suffix": ", 4k"}, "a dog", "a dog, 4k"), ({"suffix": "x"}, "", "x"),
    ({"prefix": "p", "trigger": "t", "suffix": "s"}, "c", "p t, c s"),
    ({"shuffle_tags": True, "tag_separator": ";"}, " a ;; ", "a"), ({"shuffle_tags": True}, "", ""),
    ({"wildcards": True}, "{a} }b{ |c", "a }b{ |c"), ({}, "{a|b}", "{a|b}")])
def test_captions_are_put_together_in_a_fixed_order(changed, caption, seen):
    assert seen_caption(caption, options(**changed), np.random.default_rng(0)) == seen


def test_a_seen_caption_follows_from_seed_number_and_place():
    data = pictures(1)
    data.captions = [("a, b, c, d, e, {x|y}",)]
    config = config_of(shuffle_tags=True, wildcards=True)
    first = batch_captions(data, [0] * 6, config, 3)
    assert first == batch_captions(data, [0] * 6, config, 3) and len(set(first)) > 3
    assert first[:2] == batch_captions(data, [0] * 2, config, 3)  # whatever else is in the batch
    assert first != batch_captions(data, [0] * 6, config, 4) != batch_captions(data, [0] * 6, replace(config, seed=1), 4)


def test_all_captions_are_known_ahead_unless_they_vary():
    data = pictures(3)
    config = config_of(caption_dropout=0.1, prefix="p", batch_size=4)
    texts = all_captions(data, config)
    drawn = {t for number in range(200) for t in batch_captions(data, [0, 1, 2], config, number)}
    assert drawn == set(texts) and "" in texts and len(texts) == 7
    assert "" not in all_captions(data, replace(config, caption_dropout=0.0))
    assert all_captions(data, replace(config, wildcards=True, shuffle_tags=True)) == texts  # there is nothing to vary
    for text, varied in (("a, b", {"shuffle_tags": True}), ("{a|b}", {"wildcards": True})):
        assert fixed_captions([(text,)], [options(**varied)]) is None
        assert fixed_captions([(text,)], [options()]) == [text]
    assert fixed_captions([("a, b",)], [options(shuffle_tags=True, keep_tokens=1)]) == ["a, b"]


def test_the_dry_run_says_what_will_be_seen(tmp_path):
    write(tmp_path / "photos", {"a.png": (16, 16), "b.png": (32, 16)})
    write(tmp_path / "reg", {"r.png": (16, 16)})
    config = config_of(data=str(tmp_path / "photos"), buckets=True, bucket_min=8, bucket_step=8, reg_data=str(tmp_path / "reg"),
                    trigger="sks", prior_weight=0.5, flip=True)
    data = open_data(config, size=16, channels=3, factor=8)
    text = describe_data(data, config, n=5)
    lines = text.splitlines()
    assert lines[0] == "3 pictures, 4 uses and about 2.0 batches of 2 an epoch; 10 steps are 5.0 epochs"
    assert "2 crops and mirror images of each" in lines
    assert "1 of them, and 2 of the uses, are for prior preservation; their loss counts 0.5 times" in lines
    assert f"  {tmp_path / 'photos'}: 2 pictures, 2 uses" in lines and f"  {tmp_path / 'reg'}: 1 pictures, 2 uses" in lines
    assert "  16 x 16: 2 pictures, 3 uses" in lines and "  24 x 8: 1 pictures, 1 uses" in lines
    shown = lines[lines.index("captions as they will be seen:") + 1:]
    batches = Batches(data, config)
    expected = [(i, t) for n in range(3) for i, t in zip(batches(n), batch_captions(data, batches(n), config, n))]
    assert shown == [f"  {data.entries[i].name}: {t!r}" for i, t in expected[:5]]
    assert "sks, caption of a.png" in text and "'caption of r.png'" in text
    assert describe_data(pictures(), config_of()).startswith("5 pictures, 5 uses")


def test_streams_keep_their_numbers_since_they_are_the_seeds_of_every_past_run():
    assert STREAMS == {"init": 0, "order": 1, "caption": 2, "caption dropout": 3, "posterior": 4, "timestep": 5, "noise": 6,
                       "layers": 7, "batch order": 8, "words": 9, "variant": 10, "new words": 11}
    assert seed_of(3, "noise", 7) == int(np.random.SeedSequence([3, 6, 7]).generate_state(1, np.uint64)[0] >> 1)


class Mine:
    captions = [("a",), ("b", "c")]

    def __len__(self):
        return 2

    def picture(self, i):
        return torch.full((1, 8, 16), float(i))

    def fingerprint(self):
        return "mine"


def test_a_users_own_data_set_needs_captions_pictures_a_fingerprint_and_a_length():
    given = Mine()
    data = as_picture_data(given)
    assert (len(data), data.fingerprint(), data.captions) == (2, "mine", given.captions)
    assert torch.equal(data.picture(1, 0), torch.ones(1, 8, 16)) and data.sizes == [(16, 8)] * 2
    assert (list(data.uses), data.bucket_of, data.options, data.regular) == ([0, 1], [0, 0], [{}, {}], [False, False])
    assert (data.variants, data.masked, data.names) == (1, False, ["picture 0", "picture 1"])
    assert data.made_of(0) != data.made_of(1) and as_picture_data(data) is data
    given.uses = [1, 1, 0]
    assert as_picture_data(given).uses == [1, 1, 0]
