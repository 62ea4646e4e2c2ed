"""Read and write pictures, with generation parameters inside PNG, JPEG and WebP."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from sd.errors import SDError
from sd.files.atomic import atomic_write
from sd.pictures.parameters import format_parameters, parse_parameters


class ImageError(SDError):
    """A picture that cannot be read or written: the message names it and says why."""


PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_JSON_KEY = "sdlora"  # PNG text chunk with the parameters as JSON; JPEG and WebP hold them in EXIF ImageDescription
_DESCRIPTION, _EXIF, _USER_COMMENT = 0x010E, 0x8769, 0x9286  # EXIF tags
# What Pillow raises for damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error,
           Image.DecompressionBombError)


def to_pil(image: Any) -> Image.Image:
    """A PIL picture, from a PIL picture or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. Raises ImageError."""
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


def load_image(source: Any, mode: str = "RGB") -> Image.Image:
    """An upright PIL picture in `mode` ("RGB" or "L") from a path, a PIL picture or a uint8 array.

    Applies EXIF rotation, composites alpha on white, converts 16 bits to 8, and takes the first frame of an animation.
    Raises ImageError.
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
        return ImageError(f"{path}: is a folder; a picture is needed here")
    if not path.exists():
        return ImageError(f"{path}: no such file")
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError(f"{path}: {'is empty (0 bytes)' if path.stat().st_size == 0 else 'not a picture'}")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"{path}: too many pixels; allowed: {2 * (Image.MAX_IMAGE_PIXELS or 0):,}")
    return ImageError(f"{path}: damaged picture ({str(error)[:100]})")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "LAB"):
        raise ImageError(f"pictures of mode {image.mode!r} are not read; save it as RGB or grey with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def save_image(image, path: str | Path, parameters: dict | None = None, *, quality: int = 95) -> None:
    """Write PNG, JPEG or WebP with generation parameters inside; `path` is replaced atomically.

    `parameters`: anything that JSON can represent. `read_parameters` returns it exactly, from a copy in JSON; other
    programs read the text of `format_parameters` (PNG "parameters" chunk, EXIF UserComment otherwise). Raises ImageError.
    """
    path = Path(path)
    file_format = PICTURE_FORMATS.get(path.suffix.lower())
    if file_format is None:
        raise ImageError(f"{path}: pictures are not saved as {path.suffix!r}; allowed: {', '.join(PICTURE_FORMATS)}")
    options: dict[str, Any] = {} if file_format == "PNG" else {"quality": quality}
    if file_format == "JPEG":
        options["subsampling"] = 0
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
    """The generation parameters in a picture file, exactly as given to `save_image`.

    For a file of another program, its text parsed by `parse_parameters`; {} if there is none. Raises ImageError.
    """
    try:
        with Image.open(path) as image:
            copy: Any
            text: Any
            if isinstance(image, PngImagePlugin.PngImageFile):
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
    except ValueError:  # another program's description
        pass
    if isinstance(text, bytes):
        text = text[8:].decode("utf-16-be" if text.startswith(b"UNICODE") else "utf-8", "replace")
    return parse_parameters(text) if text else {}
