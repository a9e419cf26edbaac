"""LLaVA's conversations: a JSON list or JSON Lines of {id, image: path or list, conversations: [{from, value}]}."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vtrain.data.sources.json_file import JsonFile
from vtrain.data.sources.record import (
    IndexedSource,
    Record,
    Skipped,
    Turn,
    file_digest,
    inside,
    shown,
    stable_key,
    strings,
    texts,
)
from vtrain.text.chat import IMAGE

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CAPTIONS = ("gpt",)


class Llava(IndexedSource):
    """The conversations of a file. A record without image is text only; one whose `<image>` marks are not as many as
    its images is skipped, as is one that is broken.

    captions: the speakers whose first words, without marks, are the picture's caption (gpt: what is said about it;
    human: what it was drawn from), or other keys of a record that hold captions.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        records: str | os.PathLike,
        *,
        image: str = "image",
        captions: Sequence[str] = CAPTIONS,
    ) -> None:
        self.root, self.fields = Path(root), (image, tuple(captions))
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder of images")
        self.file = JsonFile(records)
        if not len(self.file):
            raise ValueError(f"{self.file.path}: empty; expected conversations")

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Record | Skipped:
        name = self.file.name(index)
        try:
            return self._record(name, self.file.object(index))
        except ValueError as error:
            return Skipped(name, str(error))

    def _record(self, name: str, value: dict) -> Record:
        image, names = self.fields
        paths = strings(value[image], "image") if value.get(image) not in (None, "", []) else ()
        turns = conversation(value.get("conversations"))
        check_marks(turns, len(paths))
        # LLaVA's ids repeat: a picture that is talked about twice has one. What is said tells them apart.
        key = stable_key(json.dumps([value.get("id"), paths, [[t.role, t.text] for t in turns]]))
        captions = turn_captions(turns, names) or texts(value, names)
        return Record(key, name, tuple(inside(self.root, path) for path in paths), captions, turns)

    def fingerprint(self) -> dict:
        return {"kind": "llava", "records": file_digest(self.file.path), "fields": list(self.fields)}

    def describe(self) -> str:
        return f"{len(self)} conversations of {self.file.path}"


def conversation(turns: object) -> tuple[Turn, ...]:
    """Turns from LLaVA's [{"from": "human", "value": "..."}, ...]; ValueError where they are something else."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations is {shown(turns)}; expected a list of turns")
    return tuple(_turn(number, turn) for number, turn in enumerate(turns))


def _turn(number: int, turn: object) -> Turn:
    value = turn if isinstance(turn, Mapping) else {}
    role, text = value.get("from"), value.get("value")
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        expected = '{"from": human, gpt or system, "value": text}'
        raise ValueError(f"conversations[{number}] is {shown(turn)}; expected {expected}")
    return Turn(ROLES[role], text)


def check_marks(turns: Sequence[Turn], images: int) -> None:
    """ValueError unless every image has its mark in the turns."""
    marks = sum(turn.text.count(IMAGE) for turn in turns)
    if marks != images:
        raise ValueError(f"{marks} {IMAGE} marks for {images} images; expected as many")


def turn_captions(turns: Sequence[Turn], names: Sequence[str]) -> tuple[str, ...]:
    """What the named speakers say first, without marks and space around; no empty texts."""
    found = []
    for role in (ROLES[name] for name in names if name in ROLES):
        said = next((turn.text.replace(IMAGE, "").strip() for turn in turns if turn.role == role), "")
        found += [said] if said else []
    return tuple(dict.fromkeys(found))
