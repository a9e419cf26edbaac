"""Chat templates: turns to token ids with a mark on every stretch, so that losses and pictures know where they are.

The text between two special tokens is tokenised joined, as a model sees it at inference; then it is cut again where
template and turns meet. What a user writes never becomes a special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vtrain.text.tokenizer import TextTokenizer

IMAGE = "<image>"  # in a turn: a picture stands here
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side said; `<image>` marks where pictures stand, in order. role: system, user or assistant."""

    role: str
    text: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"turn: role {self.role!r}; expected one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Span:
    """Ids of one stretch. role: whose words they are, "template" for glue; image: a picture stands here, no ids."""

    ids: tuple[int, ...]
    role: str
    image: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """before/after: what stands around the words of each role, special tokens written out in braces: `{<|im_end|>}`.

    start: before everything. system: the default system turn, "" = none. The text after an assistant's words up to and
    with its first special token (all of it where there is none) is what the model has to say to end its turn: it counts
    as the assistant's. strip: white space around the words is dropped.
    """

    name: str
    before: dict[str, str]
    after: dict[str, str]
    start: str = ""
    system: str = ""
    strip: bool = False

    def spans(self, turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[Span]:
        """The conversation as spans in order, neighbours of one role joined. KeyError: a special token is missing."""
        if self.system and not (turns and turns[0].role == "system"):
            turns = [Turn("system", self.system), *turns]
        pieces = [("template", self.start)]
        for turn in turns:
            end, rest = self._end(turn.role)
            pieces += [("template", self.before[turn.role]), *self._words(turn), (turn.role, end), ("template", rest)]
        return _joined(_tokenised([(role, piece) for role, piece in pieces if piece], tokenizer))

    def _end(self, role: str) -> tuple[str, str]:
        after = self.after[role]
        if role != "assistant":
            return "", after
        special = _SPECIAL.search(after)
        cut = special.end() if special else len(after)
        return after[:cut], after[cut:]

    def _words(self, turn: Turn) -> list[tuple[str, object]]:
        text = turn.text.strip() if self.strip else turn.text
        words: list[tuple[str, object]] = []
        for number, part in enumerate(text.split(IMAGE)):
            words += [(turn.role, _IMAGE)] * (number > 0) + [(turn.role, _Words(part))] * bool(part)
        return words


class _Words(str):
    """What somebody said: braces in it mean nothing."""

    __slots__ = ()


_IMAGE = object()
_SPECIAL = re.compile(r"\{([^{}]+)\}")


def _tokenised(pieces: list[tuple[str, object]], tokenizer: TextTokenizer) -> list[Span]:
    """Special tokens by their id, pictures as they are, everything between two of these tokenised as one text."""
    spans: list[Span] = []
    run: list[tuple[str, str]] = []

    def flush() -> None:
        ids = tokenizer.encode_joined([text for _, text in run])
        spans.extend(Span(tuple(own), role) for (role, _), own in zip(run, ids))
        run.clear()

    for role, piece in pieces:
        if piece is _IMAGE:
            flush()
            spans.append(Span((), role, image=True))
        elif isinstance(piece, _Words):
            run.append((role, piece))
        else:
            for number, part in enumerate(_SPECIAL.split(piece)):
                if number % 2:
                    flush()
                    spans.append(Span((tokenizer.special_id(part),), role))
                elif part:
                    run.append((role, part))
    flush()
    return spans


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in spans:
        if span.image or not joined or joined[-1].image or joined[-1].role != span.role:
            joined.append(span)
        else:
            joined[-1] = Span(joined[-1].ids + span.ids, span.role)
    return [span for span in joined if span.image or span.ids]


def _same(text: str) -> dict[str, str]:
    return dict.fromkeys(ROLES, text)


TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate(
            "qwen2",
            before={role: f"{{<|im_start|>}}{role}\n" for role in ROLES},
            after=_same("{<|im_end|>}\n"),
            system="You are a helpful assistant.",
        ),
        ChatTemplate(
            "llama3",
            before={role: f"{{<|start_header_id|>}}{role}{{<|end_header_id|>}}\n\n" for role in ROLES},
            after=_same("{<|eot_id|>}"),
            start="{<|begin_of_text|>}",
            strip=True,
        ),
        ChatTemplate(
            "vicuna",
            before={"system": "", "user": "USER: ", "assistant": "ASSISTANT: "},
            after={"system": " ", "user": " ", "assistant": "{</s>}"},
            system="A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        ),
        # Only the words: the first stage of LLaVA-like training, picture then caption.
        ChatTemplate("plain", before=_same(""), after={"system": "\n", "user": "", "assistant": "\n"}),
    )
}


def chat_template(name: str) -> ChatTemplate:
    """A template by name; ValueError tells those there are."""
    if name not in TEMPLATES:
        raise ValueError(f"chat template {name!r}; expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
