"""A contact sheet: pictures in a raster, each with its caption below, to see at a glance what a dataset holds."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE, MAX_SIDE = 96, 384  # shown pixels: smaller pictures are enlarged, larger ones reduced
MIN_CAPTION_WIDTH = 160
CAPTION_LINES = 4
_GAP = 8
_FONT_SIZE = 13
_LINE = 17


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """An RGB sheet of uint8[H, W, 3] pictures (sizes may differ), `columns` in a row (None = about as many as rows).

    Small pictures are enlarged by a whole factor with NEAREST, so their pixels stay square; long captions end in
    "...". ValueError when there is no picture, or not one caption for each.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"contact sheet: {len(pictures)} pictures and {len(captions)} captions; expected as many, > 0")
    shown = [_legible(picture) for picture in pictures]
    columns = min(len(shown), columns or max(1, round(len(shown) ** 0.5)))
    rows = -(-len(shown) // columns)
    width = max(MIN_CAPTION_WIDTH, *(image.width for image in shown))
    height = max(image.height for image in shown)
    font = ImageFont.load_default(_FONT_SIZE)
    cell_width, cell_height = width + _GAP, height + CAPTION_LINES * _LINE + _GAP
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(shown, captions)):
        left, top = _GAP + number % columns * cell_width, _GAP + number // columns * cell_height
        sheet.paste(image, (left, top))
        place = (left, top + image.height + 2)
        draw.multiline_text(place, wrap_caption(caption, width, font), fill="black", font=font, spacing=2)
    return sheet


def _legible(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    if max(image.size) > MAX_SIDE:
        scale = MAX_SIDE / max(image.size)
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    factor = max(1, -(-MIN_SIDE // max(image.size)))
    return image.resize([side * factor for side in image.size], Image.Resampling.NEAREST)


def wrap_caption(caption: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """At most CAPTION_LINES lines, each at most `width` pixels wide; words longer than a line are cut."""
    letters = len(caption)
    while letters > 1:
        lines = textwrap.wrap(caption, letters, max_lines=CAPTION_LINES, placeholder=" ...")
        if all(font.getlength(line) <= width for line in lines):
            return "\n".join(lines)
        letters = min(letters - 1, max(len(line) for line in lines) - 1)
    return ""
