"""Contact sheets and line plots."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sd.pictures.image_io import ImageError, to_pil


def contact_sheet(rows, row_labels=None, column_labels=None, *, tile: int = 160) -> np.ndarray:
    """Pictures in labelled rows and columns, as uint8 [H, W, 3].

    `rows`: lists of anything `to_pil` accepts, or None for a gap; pictures smaller than `tile` pixels are enlarged by an
    integer factor without smoothing. Raises ImageError if there is no picture or the number of labels is wrong.
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
    """Break a label into at most `most` lines of `width` pixels; a longer label ends in dots."""
    lines: list[str] = []
    rest = " ".join(str(label).split())
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
    """Plot lines of (x, y) points with axes, ticks and a legend; points that are not finite leave a gap."""
    colours = ["#1f6fb4", "#d9541e", "#2c9a4b", "#8e5bb5", "#b8860b", "#555555", "#d6408f", "#17a2b8"]
    scale = 2  # drawn at twice the size and reduced, for smooth lines
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
    """(lowest, highest, ticks) of an axis: multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / max(most, 2)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [round(i * step, 12) for i in range(first, last + 1)]
