"""The elements of a file that is one JSON list, found one by one: such a file need not fit in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
MAX_ELEMENT = 1 << 26  # bytes: a file that is no JSON must not be read whole to tell
_CHUNK = 1 << 22
_DECODER = json.JSONDecoder()


def is_list(path: Path) -> bool:
    """Whether the file begins with `[`."""
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(BOM).lstrip(BLANK).startswith(b"[")


def elements(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """(first byte, JSON) of every element of the list in a file; ValueError names the first that is not JSON."""
    text = _Text(file)
    text.drop(BOM.decode("latin-1"))
    text.blanks()
    text.drop("[")
    yield from _rest(text, path)
    text.blanks()
    if text.peek():
        raise ValueError(f"{path}: byte {text.position}: more after the list; expected its end")


def elements_from(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The same from the element on that begins where the file stands."""
    return _rest(_Text(file), path)


def _rest(text: _Text, path: Path) -> Iterator[tuple[int, bytes]]:
    text.blanks()
    more = not text.drop("]")
    while more:
        start = text.position
        try:
            element = text.value()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: byte {start}: not JSON: {error}") from None
        yield start, element.encode("latin-1")
        text.blanks()
        more = text.drop(",")
        if not more and not text.drop("]"):
            found = repr(text.peek()) if text.peek() else "the end of the file"
            raise ValueError(f"{path}: byte {text.position}: {found}; expected , or ] in the list")
        text.blanks()


class _Text:
    """The bytes of a file from where it stands, as latin-1: characters and bytes count alike."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.start = file.tell()  # the byte of the file that is buffer[0]
        self.buffer = ""
        self.at = 0

    @property
    def position(self) -> int:
        return self.start + self.at

    def more(self) -> bool:
        chunk = self.file.read(_CHUNK)
        self.start += self.at
        self.buffer = self.buffer[self.at :] + chunk.decode("latin-1")
        self.at = 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character, empty at the end."""
        if self.at == len(self.buffer):
            self.more()
        return self.buffer[self.at : self.at + 1]

    def drop(self, expected: str) -> bool:
        while len(self.buffer) - self.at < len(expected) and self.more():
            pass
        found = self.buffer.startswith(expected, self.at)
        self.at += len(expected) * found
        return found

    def blanks(self) -> None:
        while (letter := self.peek()) and letter in " \t\r\n":
            self.at += 1

    def value(self) -> str:
        """The text of the JSON value that begins here; ValueError where there is none."""
        while True:
            try:
                size = _DECODER.raw_decode(self.buffer, self.at)[1] - self.at
            except ValueError:
                if len(self.buffer) - self.at > MAX_ELEMENT or not self.more():
                    raise
                continue
            if self.at + size < len(self.buffer) or not self.more():  # a number may go on behind the buffer's end
                break
        text = self.buffer[self.at : self.at + size]
        self.at += size
        return text
