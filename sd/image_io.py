"""Pictures in and out: generation parameters inside PNG, JPEG and WebP, contact sheets, plots of losses."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from sd.checkpoint import atomic_write


class ImageError(ValueError):
    """A picture that cannot be read or written: the message names it and says why."""


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_JSON_KEY = "sdlora"  # PNG text chunk of the exact copy; JPEG and WebP have it as EXIF ImageDescription
_DESCRIPTION, _EXIF, _USER_COMMENT = 0x010E, 0x8769, 0x9286  # EXIF tags
# What Pillow raises for damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error,
           Image.DecompressionBombError)


def to_pil(image) -> Image.Image:
    """A PIL picture from one, or from a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. Raises ImageError."""
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    is_picture = array.ndim == 2 or array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype != np.uint8 or array.size == 0 or not is_picture:
        raise ImageError(f"a picture must be uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], "
                         f"not {array.dtype} {list(array.shape)}")
    return Image.fromarray(array)


def load_image(source, mode: str = "RGB") -> Image.Image:
    """An upright PIL picture in `mode` ("RGB" or "L") from a path, a PIL picture or a uint8 array.

    EXIF rotation is applied, alpha is laid on white, 16 bits become 8; of an animation the first frame is taken. Raises
    ImageError.
    """
    if mode not in ("RGB", "L"):
        raise ImageError(f"mode is {mode!r}; allowed: 'RGB', 'L'")
    if not isinstance(source, (str, Path)):
        return _convert(to_pil(source), mode)
    try:
        with Image.open(source) as image:
            return _convert(image, mode)
    except ImageError as error:
        raise ImageError(f"{source}: {error}") from None
    except _DAMAGE as error:
        raise _unreadable(source, error) from None


def _unreadable(path: str | Path, error: BaseException) -> ImageError:
    path = Path(path)
    if path.is_dir():
        return ImageError(f"{path}: is a folder, a picture is needed here")
    if not path.exists():
        return ImageError(f"{path}: no such file")
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError(f"{path}: {'is empty (0 bytes)' if path.stat().st_size == 0 else 'not a picture'}")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"{path}: too many pixels; allowed: {2 * Image.MAX_IMAGE_PIXELS:,}")
    return ImageError(f"{path}: damaged picture ({str(error)[:100]})")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "LAB"):
        raise ImageError(f"pictures of mode {image.mode!r} are not read; save it as RGB or grey with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def save_image(image, path: str | Path, parameters: dict | None = None, *, quality: int = 95) -> None:
    """Write PNG, JPEG or WebP with generation parameters inside; `path` is replaced at once or not at all.

    `parameters`: anything that JSON can hold. `read_parameters` gives it back exactly, from a copy in JSON; other
    programs read the text of `format_parameters` ("parameters" of a PNG, EXIF UserComment of the others). Raises
    ImageError.
    """
    path = Path(path)
    file_format = FORMATS.get(path.suffix.lower())
    if file_format is None:
        raise ImageError(f"{path}: pictures are not saved as {path.suffix!r}; allowed: {', '.join(FORMATS)}")
    options = {"quality": quality} if file_format == "WEBP" else {"quality": quality, "subsampling": 0}
    if file_format == "PNG":
        options = {}
    if parameters is not None:
        copy = json.dumps(parameters)
        text = format_parameters(parameters).replace("\0", "").encode("utf-8", "replace").decode("utf-8")
        if file_format == "PNG":
            options["pnginfo"] = chunks = PngImagePlugin.PngInfo()
            chunks.add_text("parameters", text)
            chunks.add_text(_JSON_KEY, copy)
        else:
            exif = Image.Exif()
            exif[_DESCRIPTION] = copy
            exif.get_ifd(_EXIF)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
            options["exif"] = exif.tobytes()
            if file_format == "JPEG" and len(options["exif"]) > 65_000:
                raise ImageError(f"{path}: the parameters need {len(options['exif']):,} bytes, a JPEG holds 65,000; "
                                 "save it as .png")
    picture = to_pil(image)
    if file_format == "JPEG" and picture.mode not in ("RGB", "L"):
        picture = load_image(picture)
    with atomic_write(path) as file:
        picture.save(file, format=file_format, **options)


def read_parameters(path: str | Path) -> dict:
    """The generation parameters in a picture: exactly what `save_image` was given.

    Without our copy, what the text of another program says; {} if there is none. Raises ImageError.
    """
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                copy, text = image.text.get(_JSON_KEY), image.text.get("parameters")
            else:
                exif = image.getexif()
                copy, text = exif.get(_DESCRIPTION), exif.get_ifd(_EXIF).get(_USER_COMMENT)
    except _DAMAGE as error:
        raise _unreadable(path, error) from None
    try:
        found = json.loads(copy or "")
        if isinstance(found, dict):
            return found
    except ValueError:  # the description of another program
        pass
    if isinstance(text, bytes):
        text = text[8:].decode("utf-16-be" if text.startswith(b"UNICODE") else "utf-8", "replace")
    return parse_parameters(text) if text else {}


# Our names, those of the text, and how a value is read back.
_LABELS = {"n_inference_steps": ("Steps", int), "sampler_name": ("Sampler", str), "cfg_scale": ("CFG scale", float),
           "seed": ("Seed", int), "size": ("Size", str), "model_hash": ("Model hash", str), "model": ("Model", str),
           "strength": ("Denoising strength", float), "clip_skip": ("Clip skip", int)}
_NAMES = {label: (name, read) for name, (label, read) in _LABELS.items()}


def format_parameters(parameters: dict) -> str:
    """The text that Automatic1111 writes and most programs read: prompt, negative prompt, one line of settings.

    Known keys: prompt, uncond_prompt, width, height, lora {name: multiplier} (as <lora:name:0.8> after the prompt),
    lora_hashes {name: hash} and those of _LABELS; all others are written under their own name.
    """
    rest = dict(parameters)
    prompt, negative = str(rest.pop("prompt", "")), str(rest.pop("uncond_prompt", None) or "")
    loras, hashes = rest.pop("lora", None), rest.pop("lora_hashes", None)
    if isinstance(loras, dict):
        prompt = " ".join([prompt, *(f"<lora:{name}:{multiplier}>" for name, multiplier in loras.items())])
    elif loras:
        rest["lora"] = loras
    if "width" in rest and "height" in rest:
        rest["size"] = f"{rest.pop('width')}x{rest.pop('height')}"
    fields = [(label, rest.pop(name)) for name, (label, _) in _LABELS.items() if rest.get(name) is not None]
    fields += rest.items()
    if isinstance(hashes, dict):
        fields.append(("Lora hashes", ", ".join(f"{name}: {digest}" for name, digest in hashes.items())))
    settings = ", ".join(f"{label}: {_quote(value)}" for label, value in fields)
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), settings])


def _quote(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def parse_parameters(text: str) -> dict:
    """The reverse of `format_parameters`, as far as the text is unambiguous; fields unknown here keep their label."""
    lines = text.strip("\n").split("\n")
    field = r'\s*([\w][\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)'
    settings = lines.pop() if re.match(r"\s*Steps: \d", lines[-1]) or len(re.findall(field, lines[-1])) > 2 else ""
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    found: dict = {"prompt": "\n".join(lines[:start])}
    if start < len(lines):
        found["uncond_prompt"] = "\n".join(lines[start:]).removeprefix("Negative prompt:").removeprefix(" ")
    tags = re.findall(r"<lora:([^:<>]+):(-?[\d.]+)>", found["prompt"])
    if tags:
        found["prompt"] = re.sub(r" ?<lora:[^:<>]+:-?[\d.]+>", "", found["prompt"])
        found["lora"] = {name: float(multiplier) for name, multiplier in tags}
    for label, value in re.findall(field, settings):
        value = value.strip()
        try:
            value = json.loads(value) if value.startswith('"') else value
            name, read = _NAMES.get(label, (label, str))
            found[name] = read(value)
        except ValueError:
            found[label] = value
    if re.fullmatch(r"\d+x\d+", found.get("size", "")):
        found["width"], found["height"] = map(int, found.pop("size").split("x"))
    if "Lora hashes" in found:
        pairs = [pair.rpartition(": ") for pair in found.pop("Lora hashes").split(", ")]
        found["lora_hashes"] = {name: digest for name, _, digest in pairs}
    return found


def contact_sheet(rows, row_labels=None, column_labels=None, *, tile: int = 160) -> np.ndarray:
    """Pictures in rows and columns with labels, as uint8 [H, W, 3].

    `rows`: lists of what `to_pil` takes, or None for a gap; pictures smaller than `tile` pixels are enlarged by a whole
    factor without smoothing. Raises ImageError if there is no picture or a label too many or too few.
    """
    rows = [[None if cell is None else to_pil(cell).convert("RGB") for cell in row] for row in rows]
    cells, columns = [cell for row in rows for cell in row if cell], max(map(len, rows), default=0)
    row_labels, column_labels = list(row_labels or []), list(column_labels or [])
    if not cells:
        raise ImageError("a contact sheet needs at least one picture")
    if len(row_labels) not in (0, len(rows)) or len(column_labels) not in (0, columns):
        raise ImageError(f"{len(row_labels)} row labels and {len(column_labels)} column labels do not fit "
                         f"{len(rows)} rows of {columns}")
    factor = max(1, math.ceil(tile / max(max(cell.size) for cell in cells)))
    width, height = (factor * max(cell.size[axis] for cell in cells) for axis in (0, 1))
    font, gap = ImageFont.load_default(15), 10
    side = [_wrap(label, font, 180, max(1, height // 19)) for label in row_labels]
    top = [_wrap(label, font, width, 4) for label in column_labels]
    left = gap + max((math.ceil(font.getlength(line)) + gap for lines in side for line in lines), default=0)
    above = gap + max((19 * len(lines) + 4 for lines in top), default=0)
    sheet = Image.new("RGB", (left + columns * (width + gap), above + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, lines in enumerate(top):
        x = left + c * (width + gap) + width // 2
        draw.text((x, above - 6), "\n".join(lines), "black", font, anchor="md", align="center")
    for r, row in enumerate(rows):
        y = above + r * (height + gap)
        if side:
            draw.text((left - gap, y + height // 2), "\n".join(side[r]), "black", font, anchor="rm", align="right")
        for c, cell in enumerate(row):
            if cell:
                cell = cell.resize((factor * cell.width, factor * cell.height), Image.Resampling.NEAREST)
                x = left + c * (width + gap)
                sheet.paste(cell, (x, y))
                draw.rectangle((x - 1, y - 1, x + cell.width, y + cell.height), outline="#c8c8c8")
    return np.array(sheet)


def _wrap(label, font, width: float, most: int) -> list[str]:
    """Lines of a label that fit into `width` pixels, at most `most` of them; what does not fit ends in dots."""
    lines, rest = [], " ".join(str(label).split())
    while rest and len(lines) < most:
        fit = next((n for n in range(len(rest), 1, -1) if font.getlength(rest[:n]) <= width), 1)
        space = rest.rfind(" ", 0, fit + 1) if fit < len(rest) else -1
        cut = space if space > 0 else fit
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    if rest:
        while lines[-1] and font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return lines


def line_plot(series: dict[str, list[tuple[float, float]]], title: str = "", x_label: str = "", y_label: str = "",
              size: tuple[int, int] = (800, 480)) -> Image.Image:
    """Lines of (x, y) points with axes, ticks and a legend; points that are not finite leave a gap."""
    colours = ["#1f6fb4", "#d9541e", "#2c9a4b", "#8e5bb5", "#b8860b", "#555555", "#d6408f", "#17a2b8"]
    scale = 2  # drawn at twice the size, for smooth lines
    width, height = scale * size[0], scale * size[1]
    sheet = Image.new("RGB", (width, height), "white")
    draw, font, big = ImageDraw.Draw(sheet), ImageFont.load_default(13 * scale), ImageFont.load_default(16 * scale)
    points = [p for line in series.values() for p in line if math.isfinite(p[0]) and math.isfinite(p[1])] or [(0, 0)]
    (x0, x1, x_ticks), (y0, y1, y_ticks) = (_axis([p[axis] for p in points], size[axis] // 90) for axis in (0, 1))
    names = [f"{t:g}" for t in y_ticks]
    left = 12 * scale + int(max(font.getlength(name) for name in names)) + (24 * scale if y_label else 8 * scale)
    top, right, bottom = 40 * scale, width - 24 * scale, height - (52 if x_label else 34) * scale

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for t, name in zip(y_ticks, names, strict=True):
        draw.line((left, place(x0, t)[1], right, place(x0, t)[1]), "#e4e4e4", scale)
        draw.text((left - 8 * scale, place(x0, t)[1]), name, "#333333", font, anchor="rm")
    for t in x_ticks:
        draw.line((place(t, y0)[0], bottom, place(t, y0)[0], bottom + 5 * scale), "#333333", scale)
        draw.text((place(t, y0)[0], bottom + 9 * scale), f"{t:g}", "#333333", font, anchor="mt")
    draw.line((left, top, left, bottom, right, bottom), "#333333", scale)
    for i, line in enumerate(series.values()):
        for (xa, ya), (xb, yb) in zip(line, line[1:]):
            if all(map(math.isfinite, (xa, ya, xb, yb))):
                draw.line((*place(xa, ya), *place(xb, yb)), colours[i % len(colours)], 2 * scale)
        if len(line) == 1 and all(map(math.isfinite, line[0])):
            draw.circle(place(*line[0]), 3 * scale, colours[i % len(colours)])
    for i, name in enumerate(series):
        y = top + (8 + 20 * i) * scale
        draw.text((right - 34 * scale, y), name, "#333333", font, anchor="rm")
        draw.line((right - 28 * scale, y, right - 4 * scale, y), colours[i % len(colours)], 3 * scale)
    draw.text((width // 2, 20 * scale), title, "black", big, anchor="mm")
    draw.text(((left + right) // 2, height - 10 * scale), x_label, "#333333", font, anchor="mb")
    upright = Image.new("RGB", (bottom - top, 20 * scale), "white")
    ImageDraw.Draw(upright).text((upright.width // 2, 10 * scale), y_label, "#333333", font, anchor="mm")
    if y_label:
        sheet.paste(upright.rotate(90, expand=True), (4 * scale, top))
    return sheet.resize(size, Image.Resampling.LANCZOS)


def _axis(values: list[float], most: int) -> tuple[float, float, list[float]]:
    """Lowest and highest value of an axis and its ticks: multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / max(most, 2)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [round(i * step, 12) for i in range(first, last + 1)]
