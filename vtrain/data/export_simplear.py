"""A dataset of pictures and captions as SimpleAR's tree: an npy of codes and a text of captions for every picture.

    OUT/NAME/512_codes/7.npy            int32 [1, 1, h, w]
    OUT/NAME/512_labels/7.npy           text (whatever its name says), a caption a line
    OUT/NAME_512_<count>_meta.json      [{"code_path": ..., "label_path": ...}, ...], written last

Files are numbered as the dataset's samples are: excluded ones leave gaps. An export that was killed goes on when it is
started again; a file that is there with other content is an error.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vtrain.data.exclude import without
from vtrain.data.format import Modality, Role, SegmentFlag
from vtrain.data.reader import Dataset
from vtrain.data.sources.captions import one_line, short_and_whole, spaced
from vtrain.files import replace, sync, sync_folder, write, write_whole
from vtrain.text import load_text_tokenizer

CHECKED = 1 << 16  # samples whose segments are looked at together
READ = 1 << 10  # samples read together: 16 MB of 64 x 64 codes

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Exported:
    """The meta file, the pictures that it lists, and how many of their files were not there yet."""

    meta: Path
    pictures: int
    written: int


def export_simplear(
    source: Path | str,
    out: Path | str,
    *,
    name: str = "",
    resolution: int | None = None,
    root: str = "",
    progress: Progress | None = None,
) -> Exported:
    """Write the tree of a dataset. name: default its folder's; resolution: side of the pictures, where the dataset does
    not know it; root: what the paths in the meta file begin with (default: they are relative to it).

    ValueError, before anything is written, where a sample is not one picture with captions, or where the ids of a
    caption are not those of the text that they read.
    """
    dataset = Dataset(source)
    name = _folder_name(name or dataset.name)
    side = _resolution(dataset, resolution)
    numbers = _kept(dataset)
    captions = _Captions(dataset)
    report = progress or (lambda done, total: None)
    _check(dataset, numbers, captions, lambda done: report(done, 2 * len(numbers)))
    folders = [Path(out) / name / f"{side}_{what}" for what in ("codes", "labels")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for done, (number, codes, texts) in enumerate(_samples(dataset, numbers), 1):
        label = _label([captions.text(ids) for ids in texts])
        for folder, data in zip(folders, (_npy(codes), label.encode())):
            written += _put(folder / f"{number}.npy", data)
        if done % READ == 0:
            report(len(numbers) + done, 2 * len(numbers))
    os.sync()  # once: an fsync for each of a million files takes hours
    meta = Path(out) / f"{name}_{side}_{len(numbers)}_meta.json"
    _write_meta(meta, [posixpath.join(root, name, folder.name) for folder in folders], numbers)
    return Exported(meta, len(numbers), written)


class _Captions:
    """From the ids of a dataset's captions back to their texts."""

    def __init__(self, dataset: Dataset) -> None:
        schema, folder = dataset.schema, dataset.path / "text_tokenizer"
        self.tokenizer = load_text_tokenizer(folder)
        if self.tokenizer.sha256 != schema.text_tokenizer:
            raise ValueError(
                f"{folder}: sha256 {self.tokenizer.sha256}; the captions were encoded with {schema.text_tokenizer}"
            )
        self.base = schema.vocab["text"].base
        self.space = bool(schema.text.get("caption_space"))

    def text(self, ids: np.ndarray) -> str:
        """What was encoded, without the space that it got."""
        text = self.tokenizer.decode((ids - self.base).tolist())
        return text.removeprefix(" ") if self.space else text

    def faithful(self, ids: np.ndarray) -> bool:
        """Whether the text has these ids: not where a caption was cut, or has special tokens in it."""
        text = self.text(ids)
        return self.tokenizer.encode(spaced(text) if self.space else text) == (ids - self.base).tolist()


def _folder_name(name: str) -> str:
    if name in (".", "..") or "/" in name:
        raise ValueError(f"export simplear: name is {name!r}; expected the name of a folder, not a path")
    return name


def _resolution(dataset: Dataset, given: int | None) -> int:
    known = dataset.schema.image.get("resolution")
    if known is None and given is None:
        raise ValueError(f"{dataset.path}: it does not say how large its pictures are; expected --resolution")
    if None not in (known, given) and known != given:
        raise ValueError(f"export simplear: resolution is {given}; {dataset.path} has pictures of {known}")
    return known if given is None else given


def _kept(dataset: Dataset) -> np.ndarray:
    """int64[n]: the samples that are not excluded."""
    ranges = without(np.array([[0, len(dataset)]]), dataset.manifest.excluded)
    return np.concatenate([np.arange(first, last) for first, last in ranges.tolist()])


def _check(dataset: Dataset, numbers: np.ndarray, captions: _Captions, progress: Callable[[int], object]) -> None:
    """ValueError for the first sample that SimpleAR's files cannot hold."""
    for first in range(0, len(numbers), CHECKED):
        _check_segments(dataset, numbers[first : first + CHECKED])
    for done, (number, _, texts) in enumerate(_samples(dataset, numbers), 1):
        for ids in texts:
            if not captions.faithful(ids):
                raise ValueError(
                    f"{dataset.path}: sample {number}: the caption {captions.text(ids)[:80]!r} does not lead back to "
                    "its ids; expected whole captions without special tokens"
                )
        if done % READ == 0:
            progress(done)


def _check_segments(dataset: Dataset, numbers: np.ndarray) -> None:
    """ValueError unless each of the samples is captions and one grid of codes."""
    segments, cu = dataset.segments(numbers)
    owner = np.repeat(np.arange(len(numbers)), np.diff(cu))
    modality, role = segments["modality"], segments["role"]
    caption = (modality == Modality.TEXT) & (role == Role.INPUT)
    picture = (modality == Modality.IMAGE) & (role == Role.TARGET) & (segments["t"] == 1)
    picture &= (segments["flags"] & SegmentFlag.MERGED) == 0
    for at in np.flatnonzero(~caption & ~picture)[:1].tolist():
        found = f"{Role(role[at]).name.lower()} {Modality(modality[at]).name.lower()}"
        grid = " x ".join(str(segments[axis][at]) for axis in "thw")
        raise ValueError(
            f"{dataset.path}: sample {numbers[owner[at]]}: segment {at - cu[owner[at]]} is {found}, grid {grid}, "
            f"flags {segments['flags'][at]}; expected captions (input text) and codes (target image, grid 1 x h x w)"
        )
    counts = np.bincount(owner[picture], minlength=len(numbers))
    for at in np.flatnonzero(counts != 1)[:1].tolist():
        raise ValueError(f"{dataset.path}: sample {numbers[at]}: {counts[at] or 'no'} pictures; expected one")


def _samples(dataset: Dataset, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray, list[np.ndarray]]]:
    """(number, codes [h, w], ids of each caption) of every sample."""
    base = dataset.schema.vocab["visual"].base
    for first in range(0, len(numbers), READ):
        some = numbers[first : first + READ]
        (ids, cu), (segments, segment_cu) = dataset.read(some), dataset.segments(some)
        for row, number in enumerate(some.tolist()):
            own = segments[segment_cu[row] : segment_cu[row + 1]]
            pieces = [ids[cu[row] + s["start"] : cu[row] + s["start"] + s["length"]] for s in own]
            at = int(np.argmax(own["modality"] == Modality.IMAGE))
            codes = (pieces.pop(at) - base).reshape(own["h"][at], own["w"][at])
            yield number, codes, pieces


def _npy(codes: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, codes[None, None].astype("<i4"))
    return buffer.getvalue()


def _label(captions: list[str]) -> str:
    """A caption a line. Of [first sentence, whole] only the whole one: SimpleAR makes the other itself."""
    lines = list(filter(None, map(one_line, captions)))
    return lines[1] if len(lines) == 2 and lines == short_and_whole(lines[1]) else "\n".join(lines)


def _put(path: Path, data: bytes) -> bool:
    """Whether the file had to be written; ValueError where another one is there."""
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        write_whole(path, data)
        return True
    raise ValueError(f"{path}: there already, with other content; expected another folder, or delete it")


def _write_meta(path: Path, folders: list[str], numbers: np.ndarray) -> None:
    """The list, one entry at a time: that of 43 million pictures has gigabytes."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            for place, number in enumerate(numbers.tolist()):
                codes, label = (posixpath.join(folder, f"{number}.npy") for folder in folders)
                entry = json.dumps({"code_path": codes, "label_path": label})
                write(file, f"{',' if place else '['}\n{entry}".encode(), path)
            write(file, b"\n]\n", path)
            sync(file, path)
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
