"""Pages, section table and schema: what was written is read, and every lie in them is refused by name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from shard_model import VOCAB, Sample, overwrite, rewrite_footer, some_samples, write_shard

from vtrain._host import crc32c
from vtrain.data import format
from vtrain.data.format import LENGTH_EDGES, PAGE, Modality, Schema, Section, ShardError
from vtrain.data.reader import Shard, verify
from vtrain.vocab import Vocabulary

SCHEMA = Schema(VOCAB, {"<|pad|>": 39}, text_tokenizer="ab" * 32, image={"resolution": 8})


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "a.vts", SCHEMA, some_samples(12))
    return tmp_path / "a.vts"


def test_the_bytes_of_the_format_are_pinned(tmp_path):
    """A change of this hash is a change of the format: it needs a new version, or a section of its own."""
    picture = [(0, Modality.TEXT, 0, 1, 0, 0, 0, 0, 0), (2, Modality.IMAGE, 2, 0, 0, 1, 1, 3, 4)]
    found = [Sample(7, [1, 39, 40, 41, 63], picture, [(2, 0), (3, 1)]), Sample(2**64 - 1, []), Sample(9, [5, 60])]
    write_shard(tmp_path / "a.vts", SCHEMA, found)
    expected = "7ee3e141e438b2e9a9e5ead3cffc6c9a8e80d4cdab034ab73efb67f66d81edd5"
    assert hashlib.sha256((tmp_path / "a.vts").read_bytes()).hexdigest() == expected


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1, "u1"), (255, "u1"), (256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4"), (2**31, "<u4")],
)
def test_the_smallest_dtype_that_holds_the_ids_is_chosen(size, dtype):
    assert format.id_dtype_for(size) == np.dtype(dtype)
    assert np.iinfo(dtype).max >= size - 1


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
    assert format.unpack_header(_reseal(page), "x") == (b"u" * 16, 1 << 20)


def _changed(id: str, **changes):
    return lambda footer: {"sections": {**footer.sections, id: replace(footer.sections[id], **changes)}}


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
    "unknown": (_renamed("RUN", "FEA.clip"), "section FEA.clip: unknown"),
    "runs without offsets": (_renamed("RUNO", "LBL", flags=1), "no section RUN or RUNO"),
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


def test_unknown_optional_sections_are_passed_over_and_still_verified(shard):
    """A later version's section: before BCRC, of a dtype code that this version has never heard of."""
    data = shard.read_bytes()
    footer, _ = format.read_pages(shard)
    blocks = footer.sections.pop("BCRC")
    extra = Section("COL.score", format.DTYPES[1], 1, crc32c(b"later"), blocks.offset, 5, 5)
    footer.sections["COL.score"] = extra
    moved = replace(blocks, offset=blocks.offset + PAGE)
    page = b"later".ljust(PAGE, b"\0")
    shard.write_bytes(data[: blocks.offset] + page + data[blocks.offset : -PAGE] + bytes(PAGE))
    footer = replace(footer, file_bytes=len(data) + PAGE, sections={**footer.sections, "BCRC": moved})
    with open(shard, "r+b") as file:
        sealed = bytearray(format.pack_footer(footer))
        row = 640 + 48 * list(footer.sections).index("COL.score")
        sealed[row + 16 : row + 18] = (99).to_bytes(2, "little")
        file.seek(-PAGE, 2)
        file.write(_reseal(sealed))
    expected = write_shard(shard.with_name("b.vts"), SCHEMA, some_samples(12))
    assert len(Shard(shard)) == expected.samples
    assert any("block 0" in problem for problem in verify(shard))  # the new page is not in the old block checksum
    blocks_crc = crc32c(shard.read_bytes()[: moved.offset])
    overwrite(shard, moved.offset, blocks_crc.to_bytes(4, "little"))
    assert any("section BCRC" in problem for problem in verify(shard))


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
    ],
)
def test_foreign_schemas_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Schema.from_json({**SCHEMA.to_json(), **change})
    with pytest.raises(ValueError, match="KeyError 'vocab'"):
        Schema.from_json({})


def test_segments_hold_ids_of_their_own_range():
    schema = Schema(Vocabulary.of(text=10, visual=20, vbpe=5))
    assert schema.id_span(Modality.TEXT) == (0, 10)
    assert schema.id_span(Modality.IMAGE) == schema.id_span(Modality.VIDEO) == (10, 30)
    assert schema.id_span(Modality.IMAGE, merged=True) == (10, 35)
    assert Schema(Vocabulary.of(text=10)).id_span(Modality.IMAGE) == (0, 0)
