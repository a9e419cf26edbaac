"""The beingvl importer: hand-made JSONL lines and npy grids come back piece by piece; bad ones are skipped by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vtrain.data.format import Modality, Role, SegmentFlag
from vtrain.data.importers import Options, import_tokens, open_importer
from vtrain.data.importers.base import load_array
from vtrain.data.reader import Dataset
from vtrain.data.verify import verify

TEXT, VISUAL = 128261, 8192
CODES = [TEXT + i for i in (0, 8191, 5, 5)]
MERGED = [TEXT + VISUAL + 8191, TEXT + 7]


def line(**changes) -> dict:
    whole = {
        "image": "täst/a.jpg",
        "original": "<s><racm3:break><image>...",
        "token_0": [128000, 128260],
        "token_1": [128258, 40, 41, 128257, 42, 128257],
        "token_image": CODES,
        "token_image_new": MERGED,
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def write_lines(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return path


def pieces(folder: Path) -> list[list[tuple]]:
    """Per sample: (modality, role, flags, (t, h, w), ids) of each segment."""
    assert verify(folder) == []
    dataset = Dataset(folder)
    found = []
    for i in range(len(dataset)):
        ids, _ = dataset.read([i])
        segments, _ = dataset.segments([i])
        found.append([(int(s["modality"]), int(s["role"]), int(s["flags"]), (int(s["t"]), int(s["h"]), int(s["w"])),
                       ids[s["start"] : s["start"] + s["length"]].tolist()) for s in segments])  # fmt: skip
    return found


def text(ids: list[int], role: Role = Role.TARGET) -> tuple:
    return (Modality.TEXT, role, 0, (0, 0, 0), ids)


@pytest.mark.parametrize("merged", [None, True])
def test_a_conversation(tmp_path, merged):
    path = write_lines(tmp_path / "pt.jsonl", line(), "", line(token_image_new=MERGED[:1], token_1=[128258]))
    report = import_tokens("beingvl", [path], tmp_path / "out", options=Options(merged=merged))
    assert (report.samples, report.skipped) == (2, 0)
    picture = (Modality.IMAGE, Role.INPUT, SegmentFlag.MERGED if merged else 0, (1, 2, 2), MERGED if merged else CODES)
    head = text([128000, 128260], Role.INPUT)
    turns = [text([128258, 40, 41]), text([128257, 42]), text([128257])]
    second = (*picture[:4], MERGED[:1]) if merged else picture
    assert pieces(tmp_path / "out") == [[head, picture, *turns], [head, second, text([128258])]]
    schema = Dataset(tmp_path / "out").schema
    assert schema.vocab.to_json() == [["text", TEXT], ["visual", VISUAL], ["vbpe", 8192]]


def test_keys_follow_the_content(tmp_path):
    one = write_lines(tmp_path / "a.jsonl", line(), line(image="b.jpg"), line(token_1=[128258, 9]))
    two = write_lines(tmp_path / "b.jsonl", line(token_1=[128258, 9]), "", line(token_image_new=None), line())
    found = []
    for path in (one, two):
        import_tokens("beingvl", [path], tmp_path / path.stem, options=Options())
        dataset = Dataset(tmp_path / path.stem)
        found.append(dataset.keys(np.arange(len(dataset))).tolist())
    assert len(set(found[0])) == 3
    assert found[1] == [found[0][2], found[0][0], found[0][0]]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("{", "not JSON: "),
        ("[1, 2]", "list; expected an object"),
        (line(token_0=None), "no token_0; it has image, original, "),
        (line(token_1=[1, 2.5]), "token_1: expected a list of integers"),
        (line(token_1=[[1], [2]]), "token_1: expected a list of integers"),
        (line(token_1=[[1], 2]), "token_1: expected a list of integers"),
        (line(token_1=[1, 2**70]), "token_1: expected a list of integers"),
        (line(token_1=[True]), "token_1: expected a list of integers"),
        (line(token_1="7"), "token_1: expected a list of integers"),
        (line(token_1=[128258, TEXT]), f"token_1: token 1 is id {TEXT}; expected 0..{TEXT - 1}"),
        (line(token_image=[5]), f"token_image: token 0 is id 5; expected {TEXT}..{TEXT + VISUAL - 1}"),
        (line(token_image=MERGED), f"token_image: token 0 is id {MERGED[0]}"),
    ],
)
def test_a_bad_line_is_skipped_and_named(tmp_path, broken, said):
    path = write_lines(tmp_path / "pt.jsonl", line(), broken, line(token_1=[]))
    report = import_tokens("beingvl", [path], tmp_path / "out", options=Options())
    assert (report.samples, report.skipped) == (2, 1)
    (entry,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert entry["record"] == "pt.jsonl:2"
    assert entry["reason"].startswith(said)
    assert len(pieces(tmp_path / "out")[1]) == 2  # an empty conversation has no turn


def test_a_line_without_merged_ids(tmp_path):
    path = write_lines(tmp_path / "pt.jsonl", line(), line(token_image_new=None))
    report = import_tokens("beingvl", [path], tmp_path / "out", options=Options(merged=True))
    assert report.reasons == {"no token_image_new; it has image, original, token_#, token_#, token_image": 1}


@pytest.mark.parametrize("dtype", ["<i8", "<u2", ">i4"])
@pytest.mark.parametrize("shape", [(7, 12), (7, 16), (7, 4, 3), (7, 1, 1)])
def test_grids(tmp_path, dtype, shape):
    codes = np.random.default_rng(0).integers(0, VISUAL, shape).astype(dtype)
    codes[4].flat[0] = VISUAL
    np.save(tmp_path / "grids.npy", codes)
    report = import_tokens("beingvl", [tmp_path / "grids.npy"], tmp_path / "out", samples_per_shard=3,
                           options=Options())  # fmt: skip
    assert (report.samples, report.skipped) == (6, 1)
    assert "grids.npy: grid 4" in (tmp_path / "out" / "skipped.jsonl").read_text()
    grid = {(7, 12): (0, 0, 0), (7, 16): (1, 4, 4)}.get(shape, (1, *shape[1:]))
    expected = [(Modality.IMAGE, Role.TARGET, 0, grid, (codes[i].ravel().astype(int) + TEXT).tolist())
                for i in (0, 1, 2, 3, 5, 6)]  # fmt: skip
    assert pieces(tmp_path / "out") == [[piece] for piece in expected]


def test_grids_of_shifted_codes(tmp_path):
    np.save(tmp_path / "grids.npy", np.array([[TEXT, TEXT + 8191]]))
    import_tokens("beingvl", [tmp_path / "grids.npy"], tmp_path / "out", options=Options(offset=TEXT))
    assert pieces(tmp_path / "out")[0][0][-1] == [TEXT, TEXT + 8191]


def test_refused_files(tmp_path):
    grids, meta = tmp_path / "grids.npy", tmp_path / "pt.jsonl"
    meta.write_text("[]")
    with pytest.raises(ValueError, match=r"pt\.jsonl: a JSON list; expected a line per conversation"):
        open_importer("beingvl", [meta], Options())
    np.save(grids, np.array([object()], dtype=object))
    with pytest.raises(ValueError, match=r"grids\.npy: not an npy of numbers, or cut off: "):
        open_importer("beingvl", [grids], Options())
    np.save(grids, np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"grids\.npy: float64; expected an npy of integers"):
        open_importer("beingvl", [grids], Options())
    np.save(grids, np.zeros(4, dtype=np.int64))
    with pytest.raises(ValueError, match=r"shape \(4,\); expected \(N, H\*W\) or \(N, H, W\)"):
        open_importer("beingvl", [grids], Options())
    np.save(grids, np.zeros((8, 4), dtype=np.int64))
    whole = grids.read_bytes()
    for size in (0, 5, 60, 200, len(whole) - 1):
        grids.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"grids\.npy: "):
            open_importer("beingvl", [grids], Options())


def test_a_flipped_byte_of_an_npy_is_read_or_refused(tmp_path):
    path = tmp_path / "grids.npy"
    np.save(path, np.arange(12, dtype=np.int32).reshape(3, 4))
    whole = path.read_bytes()
    for position in range(len(whole) - 48):  # the header
        for value in (39, whole[position] ^ 128):
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                assert load_array(path).size <= 12
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)  # noqa: PT017, PT018
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999,), }".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + bytes(24))
    with pytest.raises(ValueError, match=r"grids\.npy: not an npy of numbers"):
        load_array(path)
