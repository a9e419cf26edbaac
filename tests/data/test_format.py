"""Pages, section table and schema: what was written is read, and every lie in them is refused by name."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from shard_model import VOCAB, Sample, dressed, overwrite, rewrite_footer, some_samples, write_shard

from vtrain._host import crc32c
from vtrain.data import format
from vtrain.data.container import ContainerWriter
from vtrain.data.format import LENGTH_EDGES, PAGE, SEGMENT, Modality, Schema, ShardError
from vtrain.data.reader import Shard
from vtrain.data.verify import verify
from vtrain.vocab import Vocabulary

SCHEMA = Schema(VOCAB, {"<|pad|>": 39}, text_tokenizer="ab" * 32, image={"resolution": 8})
FULL = replace(SCHEMA, columns={"class": "<u2", "quality": "<f4"}, labels=True)


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "a.vts", SCHEMA, some_samples(12))
    return tmp_path / "a.vts"


def _pinned(path, schema, **options) -> str:
    picture = [(0, Modality.TEXT, 0, 1, 0, 0, 0, 0, 0), (2, Modality.IMAGE, 2, 0, 0, 1, 1, 3, 4)]
    found = [Sample(7, [1, 39, 40, 41, 63], picture, [(2, 0), (3, 1)]), Sample(2**64 - 1, []), Sample(9, [5, 60])]
    write_shard(path, schema, dressed(found, schema), **options)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_bytes_of_the_format_are_pinned(tmp_path, monkeypatch):
    """A change of a hash is a change of the format: it needs a new version, or a section of its own."""
    assert _pinned(tmp_path / "a.vts", FULL, id_store="u16+1") == (
        "0a634b833f48073ef90c8f6a1682a8291bf228e0118da142429196243e4e977a"
    )
    assert _pinned(tmp_path / "a.vts", SCHEMA) == "5678d504c45fd2651d25d5765f7a7a4ff5d56f38fda3918e1093b264c0428712"
    # What the versions before labels, columns and planes wrote was the same but for the number of the version.
    monkeypatch.setattr(format, "MINOR", 0)
    assert _pinned(tmp_path / "a.vts", SCHEMA) == "7ee3e141e438b2e9a9e5ead3cffc6c9a8e80d4cdab034ab73efb67f66d81edd5"


def test_a_shard_of_the_minor_version_before_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "MINOR", 0)
    path = tmp_path / "a.vts"
    write_shard(path, SCHEMA, some_samples(12))
    monkeypatch.undo()
    assert path.read_bytes()[10] == 0
    ids, cu = Shard(path).read(np.arange(12))
    assert [ids[a:b].tolist() for a, b in pairwise(cu)] == [s.ids for s in some_samples(12)]
    assert verify(path) == []


@pytest.mark.parametrize(
    ("size", "store"),
    [(1, "u8"), (256, "u8"), (257, "u16"), (2**16, "u16"), (2**16 + 1, "u16+1"), (2**17, "u16+1"), (2**17 + 1, "u16+2"),
     (2**18, "u16+2"), (2**18 + 1, "u32"), (2**31 - 1, "u32")],
)  # fmt: skip
def test_the_smallest_store_that_holds_the_ids_is_chosen(size, store):
    assert format.store_for(size) == format.STORES[store]
    assert format.STORES[store].capacity >= size


def test_length_bins_are_two_per_octave():
    slow, edge = [0, 1], 2
    while len(slow) < 64:
        slow += [edge, edge + edge // 2]
        edge *= 2
    assert LENGTH_EDGES.tolist() == slow
    assert edge == 2**32


@pytest.mark.parametrize("where", ["header", "footer"])
def test_every_flipped_byte_of_a_page_is_refused_at_opening(shard, where):
    data = bytearray(shard.read_bytes())
    page = data[:PAGE] if where == "header" else data[-PAGE:]
    unpack = format.unpack_header if where == "header" else partial(format.unpack_footer, file_bytes=len(data))
    for at in range(PAGE):
        page[at] ^= 0x40
        with pytest.raises(ShardError, match=where):
            unpack(bytes(page), "x")
        page[at] ^= 0x40


def _reseal(page: bytearray) -> bytes:
    page[-4:] = int(crc32c(page[:-4])).to_bytes(4, "little")
    return bytes(page)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (8, 2, "format version 2, this program reads 1"),
        (12, 0xFF, "endian mark"),
        (32, 31, r"block 2\*\*31"),
        (36, 1, "flags 0x1"),
    ],
)
def test_headers_of_other_formats_are_refused(at, value, message):
    page = bytearray(format.pack_header(bytes(16)))
    page[at] = value
    with pytest.raises(ShardError, match=message):
        format.unpack_header(_reseal(page), "x")


def test_a_higher_minor_version_is_read():
    page = bytearray(format.pack_header(b"u" * 16))
    page[10] = 7
    assert format.unpack_header(_reseal(page), "x") == (b"u" * 16, 1 << 20, format.Kind.SHARD)


@pytest.mark.parametrize(("kind", "name"), [(1, "features"), (2, "blobs"), (3, "3")])
def test_a_file_of_another_kind_is_refused(shard, kind, name):
    content = bytearray(shard.read_bytes())
    content[40] = kind
    shard.write_bytes(_reseal(content[:PAGE]) + content[PAGE:])
    with pytest.raises(ShardError, match=f"a file of kind {name}; expected shard"):
        Shard(shard)


def _changed(id: str, **changes):
    return lambda footer: {"sections": {**footer.sections, id: replace(footer.sections[id], **changes)}}


def _wider(id: str):
    """The section as half as many numbers of 4 bytes."""
    return lambda f: _changed(
        id, dtype=format.DTYPES[3], bytes=f.sections[id].count // 2 * 4, count=f.sections[id].count // 2
    )(f)


def _renamed(old: str, new: str, **changes):
    def rename(footer):
        return {"sections": {n: replace(s, id=new, **changes) if n == old else s for n, s in footer.sections.items()}}

    return rename


def _swapped(footer):
    text, blocks = footer.sections["SCHEMA"], footer.sections["BCRC"]
    swap = {
        "SCHEMA": replace(text, id="BCRC", dtype=format.DTYPES[3], bytes=4, count=1),
        "BCRC": replace(blocks, id="SCHEMA", dtype=format.DTYPES[1], bytes=4, count=4),
    }
    return {"sections": {n: swap.get(n, s) for n, s in footer.sections.items()}}


LIES = {
    "beyond the file": (_changed("KEY", offset=2**40), "section KEY: bytes"),
    "wraps around 2**64": (_changed("KEY", offset=2**64 - PAGE), "section KEY: bytes"),
    "huge": (_changed("KEY", bytes=2**63, count=2**60), "section KEY: bytes"),
    "over the header": (_changed("TOK", offset=0), "section TOK: bytes"),
    "not on a page": (_changed("OFF", offset=PAGE * 2 + 64), "section OFF: bytes"),
    "over its neighbour": (_changed("OFF", offset=PAGE), "section OFF: bytes"),
    "bytes and count differ": (_changed("SEG", count=1), "section SEG: .* bytes for 1 items"),
    "ids of 8 bytes": (_changed("TOK", dtype=format.DTYPES[4]), "section TOK: dtype code 4; expected 1 or 2 or 3"),
    "twice": (_renamed("RUN", "OFF"), "section OFF stands twice"),
    "unknown": (_renamed("RUN", "XTRA"), "section XTRA: unknown"),
    "a twin's section": (_renamed("RUN", "ROW"), "section ROW: unknown"),
    "runs without offsets": (_renamed("RUNO", "XRUNO", flags=1), "no section RUN or RUNO"),
    "no keys": (_renamed("KEY", "XKEY", flags=1), "no section KEY"),
    "checksums not last": (_swapped, "section SCHEMA stands last, expected BCRC"),
    "more samples": (lambda f: {"samples": f.samples + 1}, "section (KEY|OFF)"),
    "fewer tokens": (lambda f: {"tokens": f.tokens - 1}, "section TOK"),
    "2**32 tokens": (lambda f: {"tokens": 2**32}, "a shard holds at most 4294967295"),
    "another file's size": (lambda f: {"file_bytes": f.file_bytes + PAGE}, "written for a file of"),
    "another file's uuid": (lambda f: {"uuid": bytes(16)}, "uuid"),
    "too few block checksums": (_changed("BCRC", count=0, bytes=0), "section BCRC: 0 checksums"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_section_table_that_lies_is_refused_though_its_checksum_is_right(shard, lie):
    change, message = LIES[lie]
    rewrite_footer(shard, **change(format.read_pages(shard)[0]))
    with pytest.raises(ShardError, match=message) as error:
        Shard(shard)
    assert str(shard) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_of_too_many_sections_is_refused(shard):
    page = bytearray(shard.read_bytes()[-PAGE:])
    page[88:92] = (format.MAX_SECTIONS + 1).to_bytes(4, "little")
    with pytest.raises(ShardError, match=f"{format.MAX_SECTIONS + 1} sections"):
        format.unpack_footer(_reseal(page), "x", shard.stat().st_size)


FULL_LIES = {
    "two planes": (_renamed("COL.class", "TOK2", dtype=format.DTYPES[1], bytes=12), "section TOK2: expected one plane"),
    "a plane beside u32": (_wider("TOK"), "section TOK1: expected one plane, beside TOK of dtype code 2"),
    "a plane of labels alone": (_renamed("LBL", "XTRA", flags=1), "section LBL1: expected one plane, beside LBL"),
    "labels stored otherwise": (_renamed("LBL1", "XTRA", flags=1), "section LBL: stored as u16; expected u16.1 as TOK"),
    "half a plane": (_changed("TOK1", bytes=1, count=1), "section TOK1: 1 items, expected"),
    "a column of another length": (
        _changed("COL.quality", bytes=4, count=1),
        "section COL.quality: 1 items, expected 12",
    ),
    "a column of records": (_changed("COL.quality", dtype=SEGMENT), "section COL.quality: dtype code 16"),
    "fewer labels": (_changed("LBL", bytes=2, count=1), "section LBL: 1 items, expected"),
}


@pytest.mark.parametrize("lie", FULL_LIES)
def test_planes_labels_and_columns_that_lie_are_refused(tmp_path, lie):
    path = tmp_path / "a.vts"
    write_shard(path, FULL, dressed(some_samples(12), FULL), id_store="u16+1")
    change, message = FULL_LIES[lie]
    rewrite_footer(path, **change(format.read_pages(path)[0]))
    with pytest.raises(ShardError, match=message):
        Shard(path)


def _write_extended(path, monkeypatch, flags: int):
    """A shard with a section of a later version before BCRC, of a dtype code that this version has never heard of."""
    finish = ContainerWriter.finish

    def extended(self, **facts):
        self.section("XTRA", np.frombuffer(b"later", np.uint8), flags)
        with suppress(ShardError):
            return finish(self, **facts)
        return format.Footer(**facts, uuid=self.uuid, file_bytes=0, sections={})

    with monkeypatch.context() as patch:
        patch.setattr(ContainerWriter, "finish", extended)
        write_shard(path, SCHEMA, some_samples(12))
    content = bytearray(path.read_bytes())
    row = content.rindex(b"XTRA")
    content[row + 16 : row + 18] = (99).to_bytes(2, "little")
    path.write_bytes(content[:-PAGE] + _reseal(content[-PAGE:]))


def test_unknown_optional_sections_are_passed_over_and_still_verified(tmp_path, monkeypatch):
    path = tmp_path / "a.vts"
    _write_extended(path, monkeypatch, flags=1)
    assert len(Shard(path)) == 12
    assert verify(path) == []
    overwrite(path, format.read_pages(path)[0].sections["XTRA"].offset + 1, b"x")
    block, section = verify(path)
    assert "block 0" in block
    assert "section XTRA: crc32c" in section


def test_unknown_sections_that_are_not_optional_are_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "a.vts"
    _write_extended(path, monkeypatch, flags=0)
    with pytest.raises(ShardError, match="section XTRA: unknown to this version of vtrain and not optional"):
        Shard(path)
    assert len(verify(path)) == 1


def test_schema_survives_json_and_its_hash_names_every_difference():
    weights = (0.0, 0.1, *[1.0] * 254)
    schema = replace(SCHEMA, loss_weights=weights)
    again = Schema.from_json(schema.to_json())
    assert again == schema
    assert again.hash == schema.hash
    assert schema.loss_weights[1] == float(np.float32(0.1))
    changes = {
        "vocab": Vocabulary.of(text=40, visual=25),
        "specials": {"<|pad|>": 38},
        "text_tokenizer": "cd" * 32,
        "image_tokenizer": "ef" * 32,
        "image": {"resolution": 16},
        "loss_weights": weights,
        "columns": {"quality": "<f4"},
        "labels": True,
    }
    for key, value in changes.items():
        other = replace(SCHEMA, **{key: value})
        assert other.hash != SCHEMA.hash
        (difference,) = SCHEMA.differences(other)
        assert difference.startswith(f"{key}: ")
    assert SCHEMA.differences(Schema.from_json(SCHEMA.to_json())) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": ["image", "text"]}, "modalities"),
        ({"new_key": 1}, "new_key"),
        ({"vocab": None}, "TypeError"),
        ({"specials": {"<|pad|>": 64}}, "special '<|pad|>' has id 64; expected 0..63".replace("|", r"\|")),
        ({"loss_weights": [1.0]}, "loss_weights: 1 numbers"),
        ({"columns": {"Quality": "<f4"}}, "schema: column 'Quality': expected a name of 1..12 of a-z, 0-9 and _"),
        ({"columns": {"a_name_too_long": "<f4"}}, "column 'a_name_too_long'"),
        ({"columns": {"quality": "<f2"}}, "column 'quality' has dtype '<f2'; expected one of u1, <u2"),
        ({"columns": {"quality": 4}}, "column 'quality' has dtype 4"),
        ({"columns": {}}, "columns: found {}, this version knows None"),
        ({"labels": "yes"}, "labels: found 'yes', this version knows True"),
    ],
)
def test_foreign_schemas_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Schema.from_json({**SCHEMA.to_json(), **change})
    with pytest.raises(ValueError, match="KeyError 'vocab'"):
        Schema.from_json({})


def test_labels_and_columns_are_left_out_of_the_hash_of_schemas_that_have_none():
    assert {"labels", "columns"}.isdisjoint(SCHEMA.to_json())
    assert SCHEMA.hash == replace(SCHEMA, columns={}, labels=False).hash
    full = Schema(VOCAB, columns={"b": np.float32, "a": np.dtype("u1")}, labels=True)
    assert full.to_json()["columns"] == {"a": "u1", "b": "<f4"}
    assert Schema.from_json(full.to_json()) == full


def test_segments_hold_ids_of_their_own_range():
    schema = Schema(Vocabulary.of(text=10, visual=20, vbpe=5))
    assert schema.id_span(Modality.TEXT) == (0, 10)
    assert schema.id_span(Modality.IMAGE) == schema.id_span(Modality.VIDEO) == (10, 30)
    assert schema.id_span(Modality.IMAGE, merged=True) == (10, 35)
    assert Schema(Vocabulary.of(text=10)).id_span(Modality.IMAGE) == (0, 0)
