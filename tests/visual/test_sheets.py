"""Contact sheets: every picture is there, square-pixelled and large enough to see, and captions stay in their cell."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from vtrain.visual.sheets import CAPTION_LINES, SHEET_SIDES, contact_sheet, wrap_caption

MIN_SIDE, MAX_SIDE = SHEET_SIDES
FONT = ImageFont.load_default(13)


def _find(sheet: np.ndarray, picture: np.ndarray, factor: int) -> bool:
    """Whether the enlarged picture stands somewhere in the sheet, pixel by pixel."""
    large = picture.repeat(factor, 0).repeat(factor, 1)
    h, w, _ = large.shape
    corners = np.argwhere((sheet == large[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + h, x : x + w], large) for y, x in corners)


def test_every_picture_is_enlarged_by_whole_pixels():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(5)]
    sheet = np.asarray(contact_sheet(pictures, ["a caption"] * 5))
    assert all(_find(sheet, picture, MIN_SIDE // 8) for picture in pictures)
    assert not _find(sheet, pictures[0] ^ 1, MIN_SIDE // 8)


def test_sizes_may_differ_and_large_pictures_are_reduced():
    shapes = [(1, 1), (96, 96), (30, 200), (1000, 10)]
    pictures = [np.full((*shape, 3), 50 * n, dtype=np.uint8) for n, shape in enumerate(shapes)]
    sheet = np.asarray(contact_sheet(pictures, [""] * 4, columns=4))
    assert sheet.shape[0] < 2 * MAX_SIDE
    for n in range(4):
        rows, columns = np.nonzero((sheet == 50 * n).all(-1))
        assert max(np.ptp(rows), np.ptp(columns)) + 1 in range(MIN_SIDE, MAX_SIDE + 1)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "7",
        "ab",
        "one",
        "  two\n lines ",
        "many words " * 40,
        "W" * 300,
        "a b" + "i" * 200,
        "\0\x1b[0m",
        "\u6f22" * 90,
    ],
)
@pytest.mark.parametrize("width", [40, 160])
def test_captions_are_wrapped_to_their_width(caption, width):
    wrapped = wrap_caption(caption, width, FONT)
    lines = wrapped.split("\n")
    assert len(lines) <= CAPTION_LINES
    assert all(FONT.getlength(line) <= width for line in lines)
    words = "".join(caption.split())
    shown = "".join(wrapped.removesuffix("...").split())
    assert words.startswith(shown)
    assert not words or shown


def test_short_captions_are_shown_whole_and_endless_ones_are_cut():
    assert [wrap_caption(caption, 160, FONT) for caption in ("7", "ab", "one")] == ["7", "ab", "one"]
    wrapped = wrap_caption("x" * 1_000_000, 160, FONT)
    assert len(wrapped.split("\n")) == CAPTION_LINES
    assert wrapped.endswith("...")


def test_captions_and_pictures_must_pair():
    with pytest.raises(ValueError, match="0 pictures and 0 captions"):
        contact_sheet([], [])
    with pytest.raises(ValueError, match="1 pictures and 2 captions"):
        contact_sheet([np.zeros((2, 2, 3), np.uint8)], ["a", "b"])
