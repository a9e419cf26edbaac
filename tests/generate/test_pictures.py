"""Captions to prompts, codes to pictures, pictures to a grid."""

import numpy as np
import pytest
import torch

from vtrain.generate.pictures import decode_pictures, text_to_image_prompts
from vtrain.visual.sheets import GRID_SIDES, MAX_COLUMNS, MAX_ROWS, draw_grid
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(extra=5, text=300, visual=6)


class Letters:
    """A text tokenizer of bytes and two specials."""

    def encode(self, text):
        return list(text.encode())

    def special_id(self, name):
        return {"<|t2i|>": 256, "<|soi|>": 257}[name]


class NoSpecials(Letters):
    def special_id(self, name):
        raise KeyError(f"no {name}")


class Shades:
    """An image tokenizer whose code is a brightness of its 2x2 pixels, -1 to 1."""

    def __init__(self):
        self.batches = []

    def decode(self, ids):
        self.batches.append(tuple(ids.shape))
        pixels = ids.repeat_interleave(2, 1).repeat_interleave(2, 2)
        return (pixels[:, None].expand(-1, 3, -1, -1) / 2.5) - 1.0


def test_prompts_are_global_ids_between_the_two_specials():
    prompts, uncond = text_to_image_prompts(["ab", ""], Letters(), VOCAB)
    assert prompts == [[261, 102, 103, 262], [261, 262]]
    assert uncond == [261, 262]
    assert text_to_image_prompts(["ab"], Letters(), VOCAB, negative="c") == ([[261, 102, 103, 262]], [261, 104, 262])


@pytest.mark.parametrize(
    ("opener", "caption_space", "expected"),
    [
        ("A photo of ", False, "A photo of a cat"),
        ("A photo of", True, "A photo of a cat"),
        ("", False, "a cat"),
        ("", True, " a cat"),
    ],
)
def test_one_space_joins_an_opener_or_begins_a_caption(opener, caption_space, expected):
    [prompt], away = text_to_image_prompts(
        ["a cat"], Letters(), VOCAB, "dim", openers=[opener], caption_space=caption_space
    )
    assert bytes(i - 5 for i in prompt[1:-1]).decode() == expected
    assert bytes(i - 5 for i in away[1:-1]).decode() == (" dim" if caption_space else "dim")
    assert text_to_image_prompts([], Letters(), VOCAB, caption_space=caption_space) == ([], [261, 262])


def test_a_model_without_text_or_specials_is_a_user_error():
    with pytest.raises(ValueError, match="text to image: the vocabulary has no range 'text'; it has visual"):
        text_to_image_prompts(["ab"], Letters(), Vocabulary.of(visual=6))
    with pytest.raises(ValueError, match=r"text to image: no <\|t2i\|>"):
        text_to_image_prompts(["ab"], NoSpecials(), VOCAB)


def test_codes_are_decoded_in_raster_order_and_batches():
    ids = VOCAB["visual"].base + torch.tensor([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0] * 6])
    tokenizer = Shades()
    pictures = decode_pictures(ids, tokenizer, VOCAB, grid=(2, 3), batch_size=2)
    assert tokenizer.batches == [(2, 2, 3), (1, 2, 3)]
    assert pictures.shape == (3, 4, 6, 3)
    assert pictures.dtype == np.uint8
    codes = (ids - VOCAB["visual"].base).numpy()
    for picture, row in zip(pictures, codes):
        expected = np.kron(row.reshape(2, 3), np.ones((2, 2))) * 51
        assert (picture == expected[..., None]).all()


def test_grid_enlarges_small_pictures_by_whole_factors():
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(n)] for n in (3, 1)]
    sheet = np.asarray(draw_grid(["a caption", "another"], rows))
    found = 0
    for row in rows:
        for picture in row:
            block = np.kron(picture, np.ones((8, 8, 1), dtype=np.uint8))
            spots = np.argwhere((sheet[:-63, :-63] == block[0, 0]).all(-1))
            found += any((sheet[y : y + 64, x : x + 64] == block).all() for y, x in spots)
    assert found == 4
    assert (sheet[:, :150] != 255).any(), "no caption was drawn"


def test_grid_reduces_large_pictures_and_stays_bounded():
    sheet = draw_grid(["one"], [[np.zeros((600, 300, 3), np.uint8)]])
    black = np.argwhere((np.asarray(sheet)[:, 150:] == 0).all(-1))
    assert (np.ptp(black, axis=0) + 1).tolist() == [GRID_SIDES[1], GRID_SIDES[1] // 2]
    tiny = np.zeros((1, 1, 3), np.uint8)
    many = draw_grid(["x"] * 200, [[tiny] * 40] * 200)
    assert many.size == draw_grid(["x"] * MAX_ROWS, [[tiny] * MAX_COLUMNS] * MAX_ROWS).size


@pytest.mark.parametrize("caption", ["", "word " * 500, "x" * 500, "line\nbreak", "三 Ünï \U0001f600"], ids=len)
def test_any_caption_can_be_drawn(caption):
    picture = np.full((64, 64, 3), 9, np.uint8)
    sheet = np.asarray(draw_grid([caption], [[picture]]))
    assert (sheet[8:72, 150:214] == 9).all(), "the caption runs into the pictures"


def test_a_grid_without_pictures_is_an_error():
    with pytest.raises(ValueError, match="0 pictures"):
        draw_grid([], [])
