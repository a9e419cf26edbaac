"""Pictures of many pictures, to see at a glance what a dataset holds (contact sheet) or a model draws (grid)."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vtrain.files import write_whole

SHEET_SIDES = (96, 384)  # shown pixels in a sheet: smaller pictures are enlarged, larger ones reduced
GRID_SIDES = (64, 256)
MAX_ROWS, MAX_COLUMNS = 64, 32  # a grid stays below 17000 x 9000 pixels
CAPTION_LINES = 4
_MIN_CAPTION_WIDTH = 160
_GRID_CAPTION_WIDTH = 150
_GAP = 8
_FONT_SIZE = 13
_LINE = 17
_CUT = "..."


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """An RGB sheet of uint8[H, W, 3] pictures (sizes may differ), each above its caption.

    `columns` in a row (None = about as many as rows). Long captions end in "...". ValueError when there is no picture,
    or not one caption for each.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"contact sheet: {len(pictures)} pictures and {len(captions)} captions; expected as many, > 0")
    shown = [_legible(picture, *SHEET_SIDES) for picture in pictures]
    columns = min(len(shown), columns or max(1, round(len(shown) ** 0.5)))
    rows = -(-len(shown) // columns)
    width = max(_MIN_CAPTION_WIDTH, *(image.width for image in shown))
    height = max(image.height for image in shown)
    cell_width, cell_height = width + _GAP, height + CAPTION_LINES * _LINE + _GAP
    sheet = _Sheet(columns * cell_width + _GAP, rows * cell_height + _GAP)
    for number, (image, caption) in enumerate(zip(shown, captions)):
        left, top = _GAP + number % columns * cell_width, _GAP + number // columns * cell_height
        sheet.image.paste(image, (left, top))
        sheet.write(caption, left, top + image.height + 2, width, CAPTION_LINES)
    return sheet.image


def draw_grid(captions: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """An RGB picture of uint8[H, W, 3] pictures, one row per caption, which stands at the left.

    Rows and columns past MAX_ROWS and MAX_COLUMNS are left out. ValueError if there is no picture at all.
    """
    rows = [[_legible(p, *GRID_SIDES) for p in row[:MAX_COLUMNS]] for row in rows[:MAX_ROWS]]
    cells = [cell for row in rows for cell in row]
    if not cells or len(captions) < len(rows):
        raise ValueError(f"grid: {len(cells)} pictures and {len(captions)} captions for {len(rows)} rows")
    width, height = max(c.width for c in cells) + _GAP, max(c.height for c in cells) + _GAP
    columns = max(len(row) for row in rows)
    sheet = _Sheet(_GRID_CAPTION_WIDTH + columns * width + _GAP, len(rows) * height + _GAP)
    for r, (caption, row) in enumerate(zip(captions, rows)):
        top = _GAP + r * height
        sheet.write(caption, _GAP, top, _GRID_CAPTION_WIDTH - 2 * _GAP, max(1, (height - _GAP) // _LINE))
        for c, cell in enumerate(row):
            sheet.image.paste(cell, (_GRID_CAPTION_WIDTH + c * width, top))
    return sheet.image


def write_png(path: str | os.PathLike, image: Image.Image) -> None:
    """Write a picture whole or not at all; its folder is made."""
    data = io.BytesIO()
    image.save(data, format="png")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data.getvalue())


def wrap_caption(caption: str, width: int, font: ImageFont.FreeTypeFont, lines: int = CAPTION_LINES) -> str:
    """At most `lines` lines, each at most `width` pixels wide; words longer than a line are cut."""
    letters = min(max(len(caption), len(_CUT)), width)  # a letter is a pixel wide or more
    caption = caption[: lines * width + 1]  # what stands past it is cut in any case
    while letters >= len(_CUT):
        wrapped = textwrap.wrap(caption, letters, max_lines=lines, placeholder=f" {_CUT}")
        if all(font.getlength(line) <= width for line in wrapped):
            return "\n".join(wrapped)
        letters = min(letters - 1, max(len(line) for line in wrapped) - 1)
    return ""


class _Sheet:
    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(_FONT_SIZE)

    def write(self, text: str, left: int, top: int, width: int, lines: int) -> None:
        wrapped = wrap_caption(text, width, self.font, lines)
        self.draw.multiline_text((left, top), wrapped, fill="black", font=self.font, spacing=2)


def _legible(picture: np.ndarray, smallest: int, largest: int) -> Image.Image:
    """Enlarged by a whole factor with NEAREST, so that pixels stay square, or reduced with Lanczos."""
    image = Image.fromarray(picture)
    side = max(image.size)
    if side > largest:
        return image.resize([max(1, round(s * largest / side)) for s in image.size], Image.Resampling.LANCZOS)
    factor = max(1, -(-smallest // side))
    return image.resize([s * factor for s in image.size], Image.Resampling.NEAREST)
