"""One picture of many: a row per prompt, its caption at the left. What a person opens to see how a model does."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_CELL, MAX_CELL = 64, 256  # shown sides in pixels: smaller pictures are enlarged, larger ones reduced
MAX_ROWS, MAX_COLUMNS = 64, 32  # a grid stays below 17000 x 9000 pixels
_GAP = 4
_CAPTION_WIDTH = 150
_FONT_SIZE = 13
_LINE = 16


def draw_grid(captions: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """An RGB picture of uint8[H, W, 3] pictures, one row and one caption per prompt.

    Small pictures are enlarged by a whole factor with NEAREST, so their pixels stay square. Rows and columns past
    MAX_ROWS and MAX_COLUMNS are left out. ValueError if there is no picture at all.
    """
    rows = [[_cell(p) for p in row[:MAX_COLUMNS]] for row in rows[:MAX_ROWS]]
    cells = [cell for row in rows for cell in row]
    if not cells or len(captions) < len(rows):
        raise ValueError(f"grid: {len(cells)} pictures and {len(captions)} captions for {len(rows)} rows")
    width, height = max(c.width for c in cells), max(c.height for c in cells)
    columns = max(len(row) for row in rows)
    size = (_CAPTION_WIDTH + columns * (width + _GAP) + 2 * _GAP, len(rows) * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for r, (caption, row) in enumerate(zip(captions, rows)):
        top = _GAP + r * (height + _GAP)
        draw.multiline_text((_GAP, top), _wrap(caption, height, font), fill="black", font=font, spacing=2)
        for c, cell in enumerate(row):
            sheet.paste(cell, (_CAPTION_WIDTH + _GAP + c * (width + _GAP), top))
    return sheet


def _cell(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    side = max(image.size)
    if side > MAX_CELL:
        return image.resize([max(1, round(s * MAX_CELL / side)) for s in image.size], Image.Resampling.LANCZOS)
    factor = max(1, -(-MIN_CELL // side))
    return image.resize([s * factor for s in image.size], Image.Resampling.NEAREST)


def _wrap(caption: str, height: int, font: ImageFont.FreeTypeFont) -> str:
    """The caption in lines that fit the caption column and a row of this height."""
    letters = int((_CAPTION_WIDTH - 2 * _GAP) / font.getlength("n"))
    lines = textwrap.wrap(caption, letters, max_lines=max(1, height // _LINE), placeholder=" ...")
    return "\n".join(lines)
