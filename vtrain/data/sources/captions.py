"""Captions as SimpleAR has them: one line each, and the first sentence beside the whole."""

from __future__ import annotations

import re

_BREAK = re.compile(r"\r\n|\r|\n")  # what ends a line of a text file that Python reads


def one_line(caption: str) -> str:
    """Without space around, line breaks as spaces."""
    return _BREAK.sub(" ", caption).strip()


def lines(text: str) -> list[str]:
    """The captions of a label file: its lines that are not blank, without space around."""
    return [line.strip() for line in _BREAK.split(text) if line.strip()]


def short_and_whole(caption: str) -> list[str]:
    """[all up to the first full stop, the whole caption]; the caption alone where that is all of it."""
    sentence, stop, _ = caption.partition(".")
    return [sentence + stop, caption] if stop and sentence + stop != caption.rstrip() else [caption]


def spaced(caption: str) -> str:
    """What is encoded where captions are to follow a word (schema.text caption_space): the space is the caption's."""
    return f" {caption}" if caption else ""
