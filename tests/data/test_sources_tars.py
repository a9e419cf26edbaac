"""WebDataset tars: how files become records, how tars are cut into units, and what becomes of damaged ones."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vtrain.data.sources import Record, Skipped
from vtrain.data.sources.file_patterns import expand_braces, find_files
from vtrain.data.sources.record import stable_key
from vtrain.data.sources.webdataset import WebDataset

LONG = "d" * 90 + "/" + "n" * 150


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix != ".tar" else "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pictures(count: int, size: int = 700) -> list[tuple[str, bytes]]:
    members = []
    for i in range(count):
        members += [(f"{i:03d}.png", bytes([i + 1]) * (size + i)), (f"{i:03d}.txt", f"caption {i}".encode())]
    return members


def everything(source: WebDataset, size: int = 1000) -> list[Record | Skipped]:
    return [record for unit in source.units(size) for record in source.read(unit)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_records(name, format, tmp_path):
    write_tar(
        tmp_path / name,
        [
            ("000.jpg", b"one"),
            ("000.txt", "\ufeff a caf\u00e9 \n".encode()),
            ("000.json", json.dumps({"caption": "a caf\u00e9", "captions": ["b"], "width": 3}).encode()),
            ("x.y/001.seg.png", b"mask"),
            ("x.y/001.JPEG", b"two"),
            ("x.y/001.caption", b"c"),
            (f"{LONG}.webp", b"three"),
            ("\u00fc/2.png", b"four"),
            ("\u00fc/2.jpg", b"five"),
            ("README", b"about"),
            ("\u00fc/._2.jpg", b"what macOS adds"),
            ("3.txt", b"no picture"),
        ],
        format,
    )
    found = everything(WebDataset(tmp_path / name))
    assert found == [
        Record(stable_key(name, "000"), f"{name}:000", (b"one",), ("a caf\u00e9", "b")),
        Record(stable_key(name, "x.y/001"), f"{name}:x.y/001", (b"two",), ("c",)),
        Record(stable_key(name, LONG), f"{name}:{LONG}", (b"three",)),
        Record(stable_key(name, "\u00fc/2"), f"{name}:\u00fc/2", (b"four", b"five")),
        Record(stable_key(name, "3"), f"{name}:3", (), ("no picture",)),
    ]


def test_chosen_fields(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [("0.seg.png", b"mask"), ("0.png", b"p"), ("0.txt", b"t"), ("0.json", b'{"re": "r", "caption": "c"}')],
    )
    (record,) = everything(WebDataset(path, image="seg.png", captions=["re"]))
    assert (record.images, record.captions) == ((b"mask",), ("r",))


def test_bad_texts_are_skipped(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [("0.png", b"p"), ("0.json", b"{"), ("1.txt", b"\xff"), ("2.json", b'{"caption": 3}'), ("3.json", b"[1]"),
         ("4.json", json.dumps({"captions": [str(i) for i in range(257)]}).encode()), ("5.png", b"q")],
    )  # fmt: skip
    found = everything(WebDataset(path))
    assert [isinstance(r, Skipped) for r in found] == [True, True, True, False, True, False]
    assert found[2] == Skipped(
        "a.tar:2", "not what its captions should be: caption is 3; expected a string or a list of strings"
    )


def test_files_that_claim_to_be_huge_are_not_read(tmp_path):
    """A sparse file is a map of a terabyte of zeros in one block."""
    path = write_tar(tmp_path / "a.tar", [("0.png", b"p"), ("1.png", b"q" * 512), ("1.txt", b"t"), ("2.png", b"r")])
    data = bytearray(path.read_bytes())
    header = tarfile.TarInfo("1.png")
    header.size, header.type = 512, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410], block[483:495] = b"%011o\0" % (2**33 - 512) + b"%011o\0" % 512, b"%011o\0" % (2**33 - 1)
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    at = data.index(b"1.png")
    data[at : at + 512] = block
    path.write_bytes(data)
    first, huge, last = everything(WebDataset(path))
    assert (first.images, last.images) == ((b"p",), (b"r",))
    assert huge == Skipped("a.tar:1", f"png: {2**33 - 1} bytes; expected at most {2**30}")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_units_cover_every_record_once(size, format, tmp_path):
    members = [(f"{LONG}{name}" if i % 3 else name, data) for i, (name, data) in enumerate(pictures(20))]
    members = [(name, data) for i in range(20) for name, data in members[2 * i : 2 * i + 2]]
    write_tar(tmp_path / "a.tar", members, format)
    write_tar(tmp_path / "b.tar", pictures(20), format)
    source = WebDataset(tmp_path)
    whole = everything(source, 10**9)
    assert len(source.units(10**9)) == 2
    found = everything(source, size)
    assert found == whole
    assert len([r for r in found if r.name.startswith("b.tar")]) == 20
    if size < 20:
        assert len(source.units(size)) > 2


def test_captions_without_pictures(tmp_path):
    source = WebDataset(write_tar(tmp_path / "a.tar", pictures(3)))
    (unit,) = source.units(100)
    expected = [Record(r.key, r.name, (), r.captions) for r in source.read(unit)]
    assert list(source.read(unit, pictures=False)) == expected


def test_records_in_any_order(tmp_path):
    write_tar(tmp_path / "a.tar", pictures(7), tarfile.PAX_FORMAT)
    write_tar(tmp_path / "b.tar", [(LONG + ".png", b"x"), *pictures(3)])
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "c.tar").write_bytes(whole[: whole.index(b"001.png")])
    source = WebDataset(tmp_path)
    index = source.indexed()
    in_order = everything(source)
    assert isinstance(in_order[-1], Skipped)
    assert [index[i] for i in reversed(range(len(index)))] == in_order[::-1]
    assert index.fingerprint() == source.fingerprint()
    with pytest.raises(ValueError, match=r"a.tgz: a compressed tar is read in order only"):
        WebDataset(write_tar(tmp_path / "a.tgz", pictures(1))).indexed()


def test_a_tar_that_is_cut_off_at_any_byte(tmp_path):
    data = write_tar(tmp_path / "whole.tar", pictures(4)).read_bytes()
    whole = everything(WebDataset(tmp_path / "whole.tar"))
    end = next(n for n in range(0, len(data), 512) if not any(data[n : n + 1024]))
    for length in range(0, end, 100):
        (tmp_path / "cut.tar").write_bytes(data[:length])
        *good, bad = everything(WebDataset(tmp_path / "cut.tar"))
        assert isinstance(bad, Skipped)
        assert "the tar is damaged here" in bad.reason
        assert [(r.images, r.captions) for r in good] == [(r.images, r.captions) for r in whole[: len(good)]]
        assert len(good) >= length * 4 // end - 1


@pytest.mark.parametrize("size", [1, 100])
def test_a_broken_header_ends_the_tar(size, tmp_path):
    path = write_tar(tmp_path / "a.tar", pictures(6))
    data = bytearray(path.read_bytes())
    third = data.index(b"003.png")
    data[third] ^= 1
    path.write_bytes(data)
    found = everything(WebDataset(path), size)
    assert [r.name for r in found if isinstance(r, Record)] == ["a.tar:000", "a.tar:001"]
    (bad,) = [r for r in found if isinstance(r, Skipped)]
    assert bad.name == "a.tar:002"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_headers_neither_crash_nor_hang(format, tmp_path):
    """Random bytes in headers, most with a checksum that fits: sizes and offsets of any kind."""
    members = [(LONG + name, data) for name, data in pictures(2, 60)] + pictures(3, 60)
    data = write_tar(tmp_path / "a.tar", members, format).read_bytes()
    headers = [n for n in range(0, len(data), 512) if data[n + 257 : n + 262] == b"ustar"]
    rng = np.random.default_rng(0)
    for _ in range(80):
        start = int(rng.choice(headers))
        header = bytearray(data[start : start + 512])
        for position in rng.integers(0, 512, 3):
            header[position] = rng.integers(0, 256)
        if rng.random() < 0.2:
            header[124:136] = bytes([0xFF] * int(rng.integers(1, 13))).ljust(12, b"\0")  # a negative size, in base 256
        if rng.random() < 0.8:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(data[:start] + header + data[start + 512 :])
        source = WebDataset(tmp_path / "a.tar")
        found = everything(source, 1)
        assert len(found) <= 6
        assert sum(isinstance(r, Skipped) and "damaged" in r.reason for r in found) <= 1
        assert len(source.indexed()) <= 6


def test_an_error_of_the_disk_is_no_damage(tmp_path, monkeypatch):
    source = WebDataset(write_tar(tmp_path / "a.tar", pictures(3)))

    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(tarfile.ExFileObject, "read", fails)
    with pytest.raises(OSError, match="Input/output error"):
        everything(source)


@pytest.mark.parametrize("damage", ["cut off", "flipped", "not gzip"])
def test_a_broken_gzip_ends_the_tar(damage, tmp_path):
    noise = np.random.default_rng(0).bytes
    path = write_tar(tmp_path / "a.tar.gz", [(f"{i}.png", noise(30_000)) for i in range(20)])
    data = bytearray(path.read_bytes())
    if damage == "cut off":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-6] ^= 1  # in the checksum: the data themselves look fine
    else:
        data = b"plain words"
    path.write_bytes(data)
    *good, bad = everything(WebDataset(path))
    assert isinstance(bad, Skipped)
    low, high = {"cut off": (7, 9), "flipped": (17, 19), "not gzip": (0, 0)}[damage]
    assert low <= len(good) <= high


def test_empty_tars(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar.gz", [])
    assert everything(WebDataset(tmp_path)) == []
    (tmp_path / "c.tar").write_bytes(b"")
    (empty,) = everything(WebDataset(tmp_path))
    assert (empty.name, isinstance(empty, Skipped)) == ("c.tar:", True)


def test_the_fingerprint_follows_the_content(tmp_path):
    path = write_tar(tmp_path / "a.tar", pictures(3))
    before = WebDataset(path).fingerprint()
    moved = tmp_path / "elsewhere" / "a.tar"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert WebDataset(moved).fingerprint() == before
    write_tar(path, pictures(4))
    assert WebDataset(path).fingerprint() != before


def test_patterns(tmp_path):
    assert list(expand_braces("s-{08..11}.tar")) == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert list(expand_braces("{a,b}/{1..2}")) == ["a/1", "a/2", "b/1", "b/2"]
    assert list(expand_braces("plain-{x}.tar")) == ["plain-{x}.tar"]
    with pytest.raises(ValueError, match="stands for more than"):
        list(expand_braces("{0..99999999999}"))
    for name in ("b/2.tar", "a/1.tar", "a/{x,y}.tar", "a/.hidden.tar", "a/3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(pattern: str) -> list[str]:
        return [name for name, _ in find_files(tmp_path / pattern, [".tar"])]

    assert names("") == ["a/1.tar", "a/{x,y}.tar", "b/2.tar"]
    assert names("{b,a}/*.tar") == ["a/1.tar", "a/{x,y}.tar", "b/2.tar"]
    assert names("a/{x,y}.tar") == ["{x,y}.tar"]
    assert names("a/1.tar") == ["1.tar"]
    with pytest.raises(ValueError, match=r"c/1\.tar: no such file"):
        names("{a,c}/1.tar")
    for pattern in ("a/{3..1}.tar", "[ab]"):
        with pytest.raises(ValueError, match="no such file"):
            names(pattern)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no \.tar file in this folder"):
        names("empty")
