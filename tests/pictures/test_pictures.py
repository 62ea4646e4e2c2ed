"""Pictures in and out, against Pillow and numpy."""

import io
import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sd.pictures.image_io import PICTURE_FORMATS, ImageError, load_image, read_parameters, save_image
from sd.pictures.parameters import format_parameters, parse_parameters
from sd.pictures.sheets import contact_sheet, line_plot

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
USUAL = {
    "prompt": "a photo of a cat", "uncond_prompt": "blurry, dark", "n_inference_steps": 20, "sampler_name": "dpmpp_2m",
    "cfg_scale": 7.5, "seed": 1, "width": 64, "height": 48, "model_hash": "0123456789", "strength": 0.8,
    "lora": {"line": 0.8, "ink v1.5": -0.25}, "lora_hashes": {"line": "00112233aabb", "ink v1.5": "ccddeeff0011"},
}
TEXT = """a photo of a cat <lora:line:0.8> <lora:ink v1.5:-0.25>
Negative prompt: blurry, dark
Steps: 20, Sampler: dpmpp_2m, CFG scale: 7.5, Seed: 1, Size: 64x48, Model hash: 0123456789, Denoising strength: 0.8, \
Lora hashes: "line: 00112233aabb, ink v1.5: ccddeeff0011\""""
NASTY = USUAL | {
    "prompt": 'two\nlines, "quotes" \\ and: colons\n\nNegative prompt: no\nSteps: 3, Seed: 4\n'
              "日本語 🙂 <lora:x:1>\x00\ud800 ",
    "uncond_prompt": "\n", "lora": {'a:b, "c" <d>\n': 0.1 + 0.2, "": 0.0}, "lora_hashes": {"a: b, c": "x"},
    "extra: field": [1, None, True, {"ü": "\r\n"}], "seed": 2**63, "note": None,
}


# parameters


@pytest.mark.parametrize("suffix", [*PICTURE_FORMATS, ".PNG"])
@pytest.mark.parametrize("parameters", [USUAL, NASTY, {}, {"prompt": ""}], ids=["usual", "nasty", "none", "empty"])
def test_parameters_come_back_exactly(tmp_path, suffix, parameters):
    save_image(PICTURE, tmp_path / f"a{suffix}", parameters)
    found = read_parameters(tmp_path / f"a{suffix}")
    assert found == parameters and list(found) == list(parameters)


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parameters=st.dictionaries(st.sampled_from(["prompt", "uncond_prompt", "seed", "model"]) | st.text(),
                                  VALUES | st.lists(VALUES) | st.dictionaries(st.text(), VALUES)),
       suffix=st.sampled_from([".png", ".jpg", ".webp"]))
def test_any_parameters_come_back_exactly(tmp_path, parameters, suffix):
    save_image(PICTURE, tmp_path / f"a{suffix}", parameters)
    assert read_parameters(tmp_path / f"a{suffix}") == parameters


def test_the_text_is_the_one_that_other_programs_read(tmp_path):
    assert format_parameters(USUAL) == TEXT
    save_image(PICTURE, tmp_path / "a.png", USUAL)
    assert Image.open(tmp_path / "a.png").text["parameters"] == TEXT
    for name in ("a.jpg", "a.webp"):
        save_image(PICTURE, tmp_path / name, USUAL)
        comment = Image.open(tmp_path / name).getexif().get_ifd(0x8769)[0x9286]
        assert comment == b"UNICODE\0" + TEXT.encode("utf-16-be")


def test_the_text_alone_says_the_same_of_usual_parameters(tmp_path):
    assert parse_parameters(TEXT) == USUAL
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", TEXT)
    Image.fromarray(PICTURE).save(tmp_path / "other.png", pnginfo=chunks)
    assert read_parameters(tmp_path / "other.png") == USUAL


@pytest.mark.parametrize("text, expected", [
    ("", {}), ("a cat", {"prompt": "a cat"}), ("a: b\nc", {"prompt": "a: b\nc"}),
    ("cat\nSteps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x768, Model: x, ENSD: 31337, "
     "Version: v1.6",
     {"prompt": "cat", "n_inference_steps": 28, "sampler_name": "DPM++ 2M Karras", "cfg_scale": 7.0, "seed": 5,
      "width": 512, "height": 768, "model": "x", "ENSD": "31337", "Version": "v1.6"}),
    ("cat\nNegative prompt: dog\nrat\nSteps: 1, Seed: many",
     {"prompt": "cat", "uncond_prompt": "dog\nrat", "n_inference_steps": 1, "Seed": "many"}),
])
def test_texts_of_other_programs_are_read(tmp_path, text, expected):
    image = Image.fromarray(PICTURE)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    exif[0x010E] = "a description by somebody"
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_parameters(tmp_path / "a.jpg") == expected


def test_a_picture_without_parameters_has_none(tmp_path):
    for suffix in PICTURE_FORMATS:
        save_image(PICTURE, tmp_path / f"a{suffix}")
        assert read_parameters(tmp_path / f"a{suffix}") == {}


def test_parameters_that_do_not_fit_into_a_jpeg_are_an_error_and_fit_into_the_others(tmp_path):
    long = {"prompt": "語" * 10_000}
    with pytest.raises(ImageError, match="a JPEG holds 65,000; save it as .png"):
        save_image(PICTURE, tmp_path / "a.jpg", long)
    assert not os.listdir(tmp_path)
    for name in ("a.png", "a.webp"):
        save_image(PICTURE, tmp_path / name, long)
        assert read_parameters(tmp_path / name) == long


# saving


@pytest.mark.parametrize("shape", [(20, 30, 3), (20, 30, 4), (20, 30), (20, 30, 1)])
def test_a_png_holds_the_pixels_exactly(tmp_path, shape):
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    save_image(array, tmp_path / "a.png", USUAL)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), array.squeeze())
    for name in ("a.jpg", "a.webp"):
        save_image(array, tmp_path / name)
        assert Image.open(tmp_path / name).size == (30, 20)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8),
                                   np.zeros((2, 4, 4, 3), np.uint8), "text", None])
def test_what_is_no_picture_is_refused_and_nothing_is_written(tmp_path, image):
    with pytest.raises(ImageError, match="a picture must be uint8"):
        save_image(image, tmp_path / "a.png")
    assert not os.listdir(tmp_path)


def test_an_unknown_format_names_the_allowed_ones(tmp_path):
    with pytest.raises(ImageError, match=r"'.bmp'; allowed: .png, .jpg, .jpeg, .webp"):
        save_image(PICTURE, tmp_path / "a.bmp")


def test_a_failed_save_leaves_the_old_picture(tmp_path, monkeypatch):
    save_image(PICTURE, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def half(self, file, **options):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space left on device.*a.png"):
        save_image(PICTURE[::-1].copy(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


# loading


def test_exif_rotation_is_applied(tmp_path):
    for orientation, turns in [(1, 0), (3, 2), (6, -1), (8, 1)]:
        turned = np.rot90(PICTURE, turns)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), turned)


def test_alpha_is_laid_on_white(tmp_path):
    array = np.dstack([PICTURE, np.where(np.arange(30) < 15, 0, 255)[None].repeat(20, 0).astype(np.uint8)])
    Image.fromarray(array).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), array, Image.fromarray(array)):
        loaded = np.asarray(load_image(source))
        assert (loaded[:, :15] == 255).all() and np.array_equal(loaded[:, 15:], PICTURE[:, 15:])
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(load_image(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [1, 2, 3]]]
    grey = Image.merge("LA", [Image.new("L", (2, 2), 10), Image.new("L", (2, 2), 0)])
    assert np.asarray(load_image(grey, "L")).tolist() == [[255, 255], [255, 255]]


def test_16_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png", "L")).tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("mode", "1 L LA P PA RGB RGBA RGBa CMYK YCbCr HSV I I;16".split())
def test_every_mode_becomes_rgb_or_l(mode):
    for wanted in ("RGB", "L"):
        assert load_image(Image.new(mode, (3, 2)), wanted).mode == wanted


def test_files_that_cannot_be_read_get_one_sentence(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "PNG")
    cases = {"empty": (b"", "is empty"), "text": (b"hello", "not a picture"),
             "cut": (buffer.getvalue()[:-900], "damaged picture")}
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}: {message}"):
            load_image(tmp_path / name)
    for path, message in [(tmp_path, "is a folder"), (tmp_path / "x", "no such file")]:
        for read in (load_image, read_parameters):
            with pytest.raises(ImageError, match=message):
                read(path)
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="bomb.png: too many pixels; allowed: 200"):
        load_image(tmp_path / "bomb.png")
    for mode in ("F", "LAB"):
        with pytest.raises(ImageError, match=f"pictures of mode '{mode}' are not read"):
            load_image(Image.new(mode, (2, 2)))
    with pytest.raises(ImageError, match="'CMYK'; allowed"):
        load_image(PICTURE, "CMYK")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".png", ".jpg", ".webp"]))
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_never_raise_anything_but_an_image_error(tmp_path, data, suffix):
    path = tmp_path / f"a{suffix}"
    save_image(PICTURE, path, USUAL)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    for read in (load_image, read_parameters):
        try:
            read(path)
        except ImageError:
            pass


# sheets and plots


def test_a_sheet_holds_every_picture_at_its_place_enlarged_without_smoothing():
    generator = np.random.default_rng(0)
    tiles = [[generator.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3)] for _ in range(2)]
    sheet = contact_sheet(tiles, ["first", "second " * 50], ["a", "b", "long label " * 20])
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    places = {}
    for r in range(2):
        for c in range(3):
            big = tiles[r][c].repeat(5, 0).repeat(5, 1)
            corners = np.argwhere((sheet == big[0, 0]).all(-1))
            found = [(y, x) for y, x in corners if np.array_equal(sheet[y:y + 160, x:x + 160], big)]
            assert len(found) == 1
            places[r, c] = found[0]
    assert len({places[r, c][0] for r in range(2) for c in range(3)}) == 2
    assert [places[0, c] < places[0, c + 1] for c in range(2)] == [True, True] and places[0, 0][0] < places[1, 0][0]
    labels = sheet.copy()
    for y, x in places.values():
        labels[y - 1:y + 161, x - 1:x + 161] = 255
    assert (labels < 128).any() and (labels[:, 0] == 255).all() and (labels[:, -1] == 255).all()
    top, left = places[0, 0]
    assert (labels[:top, left:] < 128).any() and (labels[top:top + 160, :left] < 128).any()


def test_sheets_take_grey_large_unequal_and_missing_pictures():
    sheet = contact_sheet([[np.zeros((512, 300), np.uint8), None], [np.zeros((64, 64, 1), np.uint8)]])
    assert sheet.shape[0] > 1024 and (sheet == 0).all(-1).sum() == 512 * 300 + 64 * 64
    sheet[0, 0] = 0  # the caller owns it
    for rows, labels, message in [([], {}, "at least one"), ([[None]], {}, "at least one"),
                                  ([[PICTURE]], {"row_labels": ["a", "b"]}, "2 row labels and 0 column labels"),
                                  ([[PICTURE]], {"column_labels": ["a", "b"]}, "0 row labels and 2 column labels")]:
        with pytest.raises(ImageError, match=message):
            contact_sheet(rows, **labels)


def test_a_plot_draws_each_line_where_its_points_are():
    series = {"down": [(0, 1.0), (100, 0.0)], "up": [(0, 0.0), (100, 1.0)]}
    plot = np.asarray(line_plot(series, "title", "step", "loss")).astype(int)
    assert plot.shape == (480, 800, 3)
    red, blue = plot[..., 0] - plot[..., 2] > 80, plot[..., 2] - plot[..., 0] > 80
    assert blue[60:160, 60:300].any() and blue[320:420, 550:760].any() and not blue[320:420, 80:300].any()
    assert red[320:420, 60:300].any() and not red[60:160, 80:300].any()


@pytest.mark.parametrize("series", [
    {}, {"a": []}, {"a": [(1, 2)]}, {"a": [(0, float("nan")), (1, 1e-9), (2, float("inf")), (3, 1e9)]},
    {"a": [(5, 5)] * 3},
    {"a": [(i, -1e-12 * i) for i in range(3)]}, {str(i): [(i, i), (i + 1e6, -i)] for i in range(9)},
    {"a": [(1e6, 1 + 1e-13), (1e6 + 1, 1)]},
])
def test_a_plot_of_odd_points_is_still_a_plot(series):
    assert line_plot(series, "t", size=(400, 300)).size == (400, 300)


def test_the_json_copy_is_plain_json(tmp_path):
    save_image(PICTURE, tmp_path / "a.png", NASTY)
    assert json.loads(Image.open(tmp_path / "a.png").text["sdlora"]) == NASTY


def test_a_multiplier_with_an_exponent_is_read_back():
    text = format_parameters({"prompt": "a cat", "n_inference_steps": 4, "lora": {"line": 1e-05, "ink": -2.5e-07}})
    assert parse_parameters(text)["lora"] == {"line": 1e-05, "ink": -2.5e-07} and parse_parameters(text)["prompt"] == "a cat"
