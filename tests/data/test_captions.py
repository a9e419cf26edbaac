"""SimpleAR's rules for captions: one line, the first sentence, and a space that makes them follow a style opener."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text.test_bpe import VARIANTS
from text.text_samples import random_text

from vtrain.data.sources.captions import lines, one_line, short_and_whole, spaced
from vtrain.text import load_text_tokenizer

OPENERS = ("A detailed digital painting of ", "An image of: ", "Photo (8k), ", "3 ", "Ein Bild \u00e9 ")


def as_a_file(text: str) -> list[str]:
    """The lines as SimpleAR reads them of a label."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8").readlines()


@given(st.text(alphabet="ab .\r\n\x0b\u2028\t"))
def test_one_line_is_one_line_of_a_text_file(caption):
    line = one_line(caption)
    assert as_a_file(line) == ([line] if line else [])
    assert line.split() == caption.split()


@given(st.text(alphabet="ab .\r\n\x0b\u2028\t"))
def test_lines_are_those_of_a_text_file(text):
    assert lines(text) == [line.strip() for line in as_a_file(text) if line.strip()]


@pytest.mark.parametrize(
    ("caption", "variants"),
    [
        ("a fox. It sleeps.", ["a fox.", "a fox. It sleeps."]),
        ("a fox.", ["a fox."]),
        ("a fox. ", ["a fox. "]),
        ("no stop", ["no stop"]),
        ("3.5 cats", ["3.", "3.5 cats"]),  # up to the first full stop, whatever it ends
        (". b", [".", ". b"]),
        ("", [""]),
    ],
)
def test_the_first_sentence_stands_before_the_whole(caption, variants):
    assert short_and_whole(caption) == variants


@pytest.fixture(scope="module", params=["qwen", "shuffled_merges", "llama3", "gpt2"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    VARIANTS[request.param]().save(str(folder / "tokenizer.json"))
    return load_text_tokenizer(folder, specials=())


def test_a_spaced_caption_joins_an_opener_as_text_does(tokenizer):
    rng = random.Random(0)
    captions = ["a cat", "3 dogs.", '"x" (y)', "\u0301accent", "\u732b", "I'm", *(random_text(rng) for _ in range(300))]
    captions = list(filter(None, map(one_line, captions)))
    apart = 0
    for opener in OPENERS:
        head = tokenizer.encode(opener.removesuffix(" "))
        for caption in captions:
            joined = tokenizer.encode(opener + caption)
            assert head + tokenizer.encode(spaced(caption)) == joined, (opener, caption)
            apart += tokenizer.encode(opener) + tokenizer.encode(caption) != joined
    assert apart > len(captions)  # without the space most do not join


def test_no_caption_gets_no_space():
    assert (spaced(""), spaced("a")) == ("", " a")
