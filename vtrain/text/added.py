"""Added tokens: whole strings that are found in a text before its tokenizer proper sees the rest.

The matching follows Hugging Face's tokenizers: tokens with `normalized=False` are looked for in the raw text, then the
stretches between them are normalised and the others are looked for in those; leftmost, then longest match wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import regex

# Word characters and white space as the Unicode standard (UTS 18) defines them, which is what the Rust side uses.
_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"
_ENDS_WITH_WORD = regex.compile(rf"{_WORD}\Z")
_STARTS_WITH_WORD = regex.compile(_WORD)
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


@dataclass(frozen=True)
class AddedToken:
    """`special` tokens are found only on request; lstrip/rstrip swallow white space; single_word needs word borders."""

    content: str
    id: int
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class AddedTokens:
    """Splits a text into added tokens and the (normalised) stretches between them."""

    def __init__(self, tokens: Sequence[AddedToken], normalize: Callable[[str], str] | None) -> None:
        self.tokens = sorted(tokens, key=lambda t: not t.special)  # of two that normalise alike a special one wins
        self.by_id = {t.id: t for t in tokens}
        self.by_content = {t.content: t for t in tokens}
        self._normalize = normalize
        self._raw = _Matcher([(t.content, t) for t in self.tokens if not t.normalized])
        clean = normalize or str
        self._normalized = _Matcher([(clean(t.content), t) for t in self.tokens if t.normalized])

    def split(self, text: str, allow_specials: bool) -> Iterator[str | AddedToken]:
        for part in self._raw.split(text, allow_specials):
            if isinstance(part, AddedToken):
                yield part
            else:
                yield from self._normalized.split(self._normalize(part) if self._normalize else part, allow_specials)


class _Matcher:
    def __init__(self, patterns: list[tuple[str, AddedToken]]) -> None:
        self._tokens: dict[str, AddedToken] = {}
        for pattern, token in patterns:
            if pattern:
                self._tokens.setdefault(pattern, token)
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._regex = regex.compile("|".join(map(regex.escape, longest_first))) if longest_first else None

    def split(self, text: str, allow_specials: bool) -> Iterator[str | AddedToken]:
        if self._regex is None:
            if text:
                yield text
            return
        done = 0
        for match in self._regex.finditer(text):
            start, stop = match.span()
            token = self._tokens[match.group()]
            if (token.special and not allow_specials) or (token.single_word and _touches_word(text, start, stop)):
                continue
            if token.lstrip:
                start = len(text[:start].rstrip(_SPACE))
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip(_SPACE))
            if done < start:
                yield text[done:start]
            yield token
            done = stop
        if done < len(text):
            yield text[done:]


def _touches_word(text: str, start: int, stop: int) -> bool:
    before = start > 0 and _ENDS_WITH_WORD.match(text, start - 1, start)
    return bool(before or (stop < len(text) and _STARTS_WITH_WORD.match(text, stop)))
