"""Damaged datasets: every flipped byte is found, and whatever the damage, reading ends in an answer or a clear error.

The damage is sealed with right checksums so that it reaches the parsers, and is read in another process, so that a
crash, a hang or the memory of a wrong number fails the test instead of ending it.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import multiprocessing
import resource
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from crashes import forked, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from writing_jobs import write_dataset

from vtrain._host import crc32c, crc32c_blocks
from vtrain.data import Dataset, LanguageModel, Loader, Source, exclude, manifest, stats
from vtrain.data import verify as verifying
from vtrain.data.format import BLOCK_LOG2, PAGE, Kind, ShardError, read_pages
from vtrain.data.reader import Shard
from vtrain.data.twins import Twin
from vtrain.data.verify import verify

EXPECTED = (ValueError, IndexError, OSError)  # ShardError is a ValueError
ROOM_BYTES = 2 << 30  # that reading a dataset of 1 MB may ask for
PATIENCE_S = 60
GRACE_S = 5
SECTIONS_AT, SECTION_BYTES, CRC_AT = 640, 48, 20  # of the footer page
HASH_AT = 56
NUMBERS = (0, 1, 2, 7, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - PAGE, 2**64 - 1)
OTHERS = (None, True, 0.5, "", "x", "../x", "shard-00001.vts", [], [[]], [0], {}, {"a": 1}, -1, 10**400)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """A dataset of three shards with planes, labels, columns and loss runs, their twins, exclusions, a part file, what
    was skipped and a tokenizer: name below the folder -> content."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    write_dataset(folder)
    exclude.leave_out(folder, exclude.parse("3,11-14"))
    manifest.write_part(folder, 0, manifest.load(folder).shards[:2], skipped=1)
    assert verify(folder) == []
    return tree(folder)


class Sealed:
    """A shard or twin whose bytes may be changed and then get the checksums that fit them."""

    def __init__(self, name: str, content: bytes, folder: Path) -> None:
        (folder / name).write_bytes(content)
        footer, _ = read_pages(folder / name, *Kind)
        self.content = bytearray(content)
        self.places = {id: (n, s.offset, s.bytes) for n, (id, s) in enumerate(footer.sections.items())}

    def put(self, at: int, data: bytes) -> None:
        at = min(at, len(self.content) - len(data))
        self.content[at : at + len(data)] = data

    def entry(self, section: str) -> int:
        """Where the footer tells of a section."""
        return len(self.content) - PAGE + SECTIONS_AT + SECTION_BYTES * self.places[section][0]

    def seal(self) -> None:
        """Of blocks, sections, text and both pages, by the places that the sections had at first."""
        content, footer = self.content, len(self.content) - PAGE
        _, at, size = self.places["BCRC"]
        content[at : at + size] = crc32c_blocks(bytes(content[:at]), 1 << BLOCK_LOG2).tobytes()
        for section, (_, at, size) in self.places.items():
            struct.pack_into("<I", content, self.entry(section) + CRC_AT, crc32c(bytes(content[at : at + size])))
            if section in ("SCHEMA", "META"):
                content[footer + HASH_AT : footer + HASH_AT + 32] = hashlib.sha256(content[at : at + size]).digest()
        self.seal_pages()

    def seal_pages(self) -> None:
        for page in (0, len(self.content) - PAGE):
            struct.pack_into("<I", self.content, page + PAGE - 4, crc32c(bytes(self.content[page : page + PAGE - 4])))


def damage_file(draw: st.DrawFn, file: Sealed) -> None:
    """Something in a section, in the table of sections, or in a page."""
    section = draw(st.sampled_from(sorted(file.places)))
    _, at, size = file.places[section]
    number = st.sampled_from(NUMBERS)
    what = draw(st.sampled_from(["bytes", "item", "footer", "header", "table", "swap"]))
    if what == "bytes":
        file.put(at + draw(st.integers(0, max(size - 1, 0))), draw(st.binary(min_size=1, max_size=8)))
    if what == "item":
        width = draw(st.sampled_from([1, 2, 4, 8]))
        value = (draw(number) % 2 ** (8 * width)).to_bytes(width, "little")
        file.put(at + width * draw(st.integers(0, max(size // width - 1, 0))), value)
    if what in ("bytes", "item"):
        file.seal()
        return
    if what == "table":
        field, width = draw(st.sampled_from([(16, 2), (18, 2), (24, 8), (32, 8), (40, 8)]))
        value = draw(st.one_of(number, st.integers(0, 24), st.integers(0, 40).map(lambda pages: pages * PAGE)))
        file.put(file.entry(section) + field, (value % 2 ** (8 * width)).to_bytes(width, "little"))
    elif what == "swap":
        other = draw(st.sampled_from(sorted(file.places)))
        a, b = file.entry(section) + 16, file.entry(other) + 16
        rest = SECTION_BYTES - 16
        file.content[a : a + rest], file.content[b : b + rest] = file.content[b : b + rest], file.content[a : a + rest]
    else:
        page = 0 if what == "header" else len(file.content) - PAGE
        width = draw(st.sampled_from([2, 4, 8]))
        value = (draw(number) % 2 ** (8 * width)).to_bytes(width, "little")
        file.put(page + 2 * draw(st.integers(0, SECTIONS_AT // 2 if what == "footer" else 24)), value)
    file.seal_pages()


def damage_json(draw: st.DrawFn, value: object) -> object:
    """One place of a JSON value, replaced, left out or doubled."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 4)):
        keys = sorted(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(keys))
        changed = value.copy()
        what = draw(st.sampled_from(["inside", "inside", "inside", "drop", "double"]))
        if what == "drop":
            del changed[key]
        elif what == "double" and isinstance(changed, list):
            changed.append(changed[key])
        else:
            changed[key] = damage_json(draw, value[key])
        return changed
    return draw(st.sampled_from(OTHERS + NUMBERS))


def seal_json(body: bytes) -> bytes:
    return b'{\n "crc32c": "%08x",' % crc32c(body) + body[1:]


def spelled(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode() + b"\n"


def relist(body: dict, files: dict[str, bytes]) -> None:
    """Have a manifest list the files as they are, so that opening goes on behind that comparison."""
    rows = [(row, "samples", "tokens") for row in body["shards"]]
    rows += [(row, "segments", "rows") for twin in body["twins"].values() for row in twin["files"] if row]
    for row, first, second in rows:
        content = files[row["file"]]
        if len(content) >= PAGE:
            page = content[-PAGE:]
            row["uuid"], row["bytes"] = page[:16].hex(), len(content)
            row[first], row[second] = struct.unpack_from("<QQ", page, 24)
            (row["footer_crc"],) = struct.unpack_from("<I", page, PAGE - 4)
    counts = [(row["samples"], row["tokens"]) for row in body["shards"]]
    body["starts"] = [sum(n for n, _ in counts[:i]) for i in range(len(counts))]
    body["samples"], body["tokens"] = (sum(column) for column in zip(*counts))


class Files(dict):
    """Name -> content; hypothesis prints its examples."""

    def __repr__(self) -> str:
        return f"{len(self)} files, see the folder"


@st.composite
def damaged(draw: st.DrawFn, whole: dict[str, bytes], folder: Path) -> Files:
    """The files of the dataset after one to three kinds of damage."""
    files = Files(whole)
    binary = sorted(name for name in files if name.endswith((".vts", ".vtf")))
    (last,) = (name for name in files if name.startswith("manifest-000002"))
    body = json.loads(files.pop(last))
    del body["crc32c"]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(binary[:6]))  # of the first two shards: enough
        what = draw(st.sampled_from(["inside"] * 5 + ["cut", "grow", "swap files", "manifest", "manifest"]))
        if what == "inside" and len(files[name]) == len(whole[name]):
            try:
                file = Sealed(name, files[name], folder)
            except EXPECTED:
                continue  # damaged beyond what a second hit could add
            damage_file(draw, file)
            files[name] = bytes(file.content)
        elif what == "cut":
            size = len(files[name])
            whole_pages = st.integers(0, size // PAGE).map(lambda pages: pages * PAGE)
            files[name] = files[name][: draw(st.one_of(st.integers(0, size), whole_pages))]
        elif what == "grow":
            files[name] += draw(st.sampled_from([b"\0", bytes(PAGE), files[name][-PAGE:], files[name]]))
        elif what == "swap files":
            other = draw(st.sampled_from(binary))
            files[name], files[other] = files[other], files[name]
        elif what == "manifest":
            body = damage_json(draw, body)
    if draw(st.booleans()):
        with suppress(TypeError, KeyError, AttributeError, IndexError, ValueError):  # the manifest is damaged, too
            relist(body, files)
    try:
        text = spelled(body)
    except ValueError:  # more digits than Python spells
        text = b"{}\n"
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(1, len(text)))
        text = text[:at] + draw(st.binary(max_size=4)) + text[at + draw(st.integers(0, 4)) :]
    generation = body.get("generation", 2) if isinstance(body, dict) else 2
    generation = generation if isinstance(generation, int) and 0 <= generation < 10**6 else 2
    files[f"manifest-{generation:06d}-{hashlib.sha256(text).hexdigest()[:16]}.json"] = seal_json(text)
    return files


def uses(folder: Path) -> Iterator[Callable[[], object]]:
    """All that can be done with a folder; each may be refused."""
    yield lambda: verify(folder)
    yield lambda: manifest.read_parts(folder)
    yield lambda: exclude.damaged(manifest.load(folder))
    yield lambda: stats.measure(Dataset(folder), [64])
    for path in sorted(folder.glob("*.vts")):
        yield from _reads(lambda path=path: Shard(path))
        yield lambda path=path: Shard(path).schema
    for path in sorted(folder.glob("*.vtf")):
        yield from _twin_reads(path)
    for path in [folder, *folder.glob("manifest-*.json")]:
        yield lambda path=path: manifest.load(path)
        yield from _reads(lambda path=path: Dataset(path))
    for raw in (False, True):
        yield lambda raw=raw: _load(Dataset(folder), raw)


def _numbers(count: int) -> list[np.ndarray]:
    count = min(count, 60)
    return [np.arange(count), np.arange(count)[::-3], np.array([-1]), np.array([count]), *np.arange(count)[:8, None]]


def _reads(opened: Callable[[], Shard | Dataset]) -> Iterator[Callable[[], object]]:
    try:
        found = opened()
        numbers = _numbers(len(found))
    except EXPECTED:
        return
    names = ["lengths", "keys", "read", "labels", "segments", "loss_runs", "will_need"]
    calls = [getattr(found, name) for name in names] + [lambda i: found.column("quality", i)]
    calls += [lambda i: _read_spans(found, i, "ids"), lambda i: _read_spans(found, i, "labels")]
    if isinstance(found, Dataset):
        calls += [found.excluded, found.segment_numbers, lambda i: found.features("clip").read(i)]
        calls += [lambda i: found.features("clip").counts(i), lambda i: found.blobs("image").read(i)]
    for call in calls:
        for indices in numbers:
            yield lambda call=call, indices=indices: call(indices)


def _read_spans(found: Shard | Dataset, indices: np.ndarray, stream: str) -> None:
    """The middle of every sample."""
    lengths = found.lengths(indices).astype(np.int64)
    counts = np.minimum(lengths - lengths // 3, 1 << 16)
    at = np.cumsum(counts) - counts
    found.read_spans(indices, lengths // 3, counts, np.zeros(int(counts.sum()), np.int32), at, stream)


def _twin_reads(path: Path) -> Iterator[Callable[[], object]]:
    try:
        twin = Twin(path)
    except EXPECTED:
        return
    for call in (twin.counts, twin.rows, twin.blobs):
        for segments in _numbers(len(twin)):
            yield lambda call=call, segments=segments: call(segments)


def _load(found: Dataset, raw: bool) -> None:
    options = {"pack_tokens": 64, "bins_per_step": 2, "overlong": "split", "pool": 8, "prefetch": 0, "raw": raw}
    options |= {"tables": () if raw else ("segments",), "readahead": 1}
    run = Loader([Source(found, max_epochs=1)], LanguageModel(), found.schema.vocab, **options)
    for _ in islice(run, 3):
        run.state_dict()


def _reader(pipe: multiprocessing.connection.Connection) -> None:
    """Answers every folder with what went wrong while it was read, "" = nothing."""
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)  # tells where it hangs
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, resource.RLIM_INFINITY))
    while True:
        folder, wrong = Path(pipe.recv()), ""
        for use in uses(folder):
            try:
                use()
            except EXPECTED:
                pass
            except BaseException:
                wrong = traceback.format_exc()
                break
        pipe.send(wrong)


class Reader:
    """A process that reads folders; another one takes its place when it dies."""

    def __init__(self) -> None:
        self.process = None

    def read(self, folder: Path) -> None:
        """AssertionError with what went wrong."""
        if self.process is None:
            self.pipe, far = multiprocessing.Pipe()
            self.process = forked(_reader, far)
            far.close()
        self.pipe.send(str(folder))
        try:
            wrong = self.pipe.recv() if self.pipe.poll(PATIENCE_S) else "it hangs"
        except EOFError:
            self.process.join()
            wrong = f"the reader died with {self.process.exitcode}"
        if wrong:
            self.process.terminate()
            self.process.join(GRACE_S)
            self.process.kill()
            self.process = None
        assert not wrong, f"{folder}: {wrong}"


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    if made.process is not None:
        made.process.kill()


def lay_out(files: dict[str, bytes], folder: Path) -> None:
    """Put these files into the folder, and no others."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def survives(data: st.DataObject, whole: dict[str, bytes], reader: Reader, folder: Path) -> None:
    lay_out(data.draw(damaged(whole, folder)), folder)
    reader.read(folder)


RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_an_undamaged_dataset_is_read(whole, reader, tmp_path):
    lay_out(whole, tmp_path)
    reader.read(tmp_path)
    assert verify(tmp_path) == []
    file = Sealed("shard-00000.vts", whole["shard-00000.vts"], tmp_path)
    file.seal()
    assert bytes(file.content) == whole["shard-00000.vts"]  # sealing is what the writer does
    (name,) = (name for name in whole if name.startswith("manifest-000002"))
    body = json.loads(whole[name])
    del body["crc32c"]
    assert seal_json(spelled(body)) == whole[name]
    relist(body, whole)
    assert seal_json(spelled(body)) == whole[name]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("twins", "clip", "dim"), None, "twins: clip: 'features' of None 'i1'; expected"),
        (("twins", "image", "kind"), "pictures", "twins: image: 'pictures' of 0 ''; expected"),
        (("shards", 1, "samples"), 0.5, "expected a plain file name and counts"),
        (("shards", 1, "tokens"), 2**64, "expected a plain file name and counts"),
        (("shards", 1, "footer_crc"), "x", "expected a plain file name and counts"),
        (("files",), ["writing.json"], "files: found a list; expected names with checksums"),
        (("files", "../x"), "00000000", "expected a name below the folder and a checksum"),
    ],
)
def test_values_of_a_wrong_type_in_a_manifest_are_named(whole, tmp_path, path, value, message):
    lay_out(whole, tmp_path)
    (last,) = tmp_path.glob("manifest-000002-*")
    body = json.loads(last.read_bytes())
    del body["crc32c"]
    *way, key = path
    place = body
    for step in way:
        place = place[step]
    place[key] = value
    last.unlink()
    text = spelled(body)
    (tmp_path / f"manifest-000002-{hashlib.sha256(text).hexdigest()[:16]}.json").write_bytes(seal_json(text))
    with pytest.raises(ShardError, match=message):
        Dataset(tmp_path)


@settings(max_examples=40, **RELAXED)
@given(data=st.data())
def test_damage_ends_in_an_answer_or_an_error(whole, reader, tmp_path, data):
    survives(data, whole, reader, tmp_path)


@pytest.mark.slow
@settings(max_examples=300, **RELAXED)
@given(data=st.data())
def test_much_damage_ends_in_answers_or_errors(whole, reader, tmp_path, data):
    survives(data, whole, reader, tmp_path)


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_byte_is_found_in_every_file_beside_shards_and_twins(whole, tmp_path, monkeypatch, step):
    """test_verify.py does it to shards and twins."""
    lay_out(whole, tmp_path)
    monkeypatch.setattr(verifying, "_verify_file", lambda *_: [])
    names = [name for name in whole if not name.endswith((".vts", ".vtf")) and name != manifest.LOCK_FILE]
    assert [name for name in names if not name.startswith("manifest-")] == [
        "part-00000.json", "skipped.jsonl", "text_tokenizer/more/tokenizer.json", "text_tokenizer/tokenizer.model",
        "writing.json",
    ]  # fmt: skip
    assert whole[manifest.LOCK_FILE] == b""
    missed = []
    for name in names:
        content = whole[name]
        for at in range(0, len(content), min(step, max(1, len(content) // 3))):
            (tmp_path / name).write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            if not verify(tmp_path):
                missed.append((name, at))
        (tmp_path / name).write_bytes(content)
    assert missed == []
    (tmp_path / "skipped.jsonl").unlink()
    (problem,) = verify(tmp_path)
    assert "skipped.jsonl: file: missing; the manifest lists it" in problem
