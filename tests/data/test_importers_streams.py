"""The megatron and nanogpt importers: files written here by struct are read back exactly; damaged ones are named."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from vtrain.data.format import Modality
from vtrain.data.importers import Options, import_tokens, nanogpt, open_importer
from vtrain.data.importers.megatron import IndexedFile
from vtrain.data.reader import Dataset
from vtrain.data.verify import verify

VOCAB = 60_000
CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "f8": 6, "f4": 7, "u2": 8}


def write_megatron(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "u2", modes: Sequence[int] | None = None
) -> Path:
    """documents -> sequences -> ids, byte by byte."""
    sequences = [sequence for document in documents for sequence in document]
    body, pointers = b"", []
    for sequence in sequences:
        pointers.append(len(body))
        body += np.array(sequence, dtype=f"<{dtype}").tobytes()
    bounds = [0]
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    index = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<QQ", len(sequences), len(bounds))
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    index += b"".join(struct.pack("<q", pointer) for pointer in pointers)
    index += b"".join(struct.pack("<q", bound) for bound in bounds)
    index += b"".join(struct.pack("<b", mode) for mode in modes or ())
    prefix.with_name(prefix.name + ".bin").write_bytes(body)
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    return prefix


def some_documents(seed: int, count: int = 23, top: int = 100) -> list[list[list[int]]]:
    """Among them one without sequences, one of an empty sequence, one of several."""
    rng = np.random.default_rng(seed)
    documents = [[rng.integers(0, top, rng.integers(0, 40)).tolist() for _ in range(rng.integers(1, 4))]
                 for _ in range(count)]  # fmt: skip
    documents[3], documents[4], documents[count - 1] = [], [[]], [[5], [], [6, 7]]
    return documents


def joined(documents: list[list[list[int]]]) -> list[list[int]]:
    return [[i for sequence in document for i in sequence] for document in documents]


def samples(folder: Path) -> list[list[int]]:
    assert verify(folder) == []
    dataset = Dataset(folder)
    ids, cu = dataset.read(np.arange(len(dataset)))
    return [row.tolist() for row in np.split(ids, cu[1:-1])]


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2"])
def test_megatron_is_read_back(tmp_path, dtype):
    documents = some_documents(1)
    prefix = write_megatron(tmp_path / "corpus_text_document", documents, dtype)
    report = import_tokens("megatron", [prefix], tmp_path / "out", samples_per_shard=7,
                           options=Options(text_vocab=VOCAB))  # fmt: skip
    assert (report.complete, report.samples, report.records, report.skipped) == (True, 23, 23, 0)
    assert samples(tmp_path / "out") == joined(documents)
    dataset = Dataset(tmp_path / "out")
    assert dataset.schema.vocab.to_json() == [["text", VOCAB]]
    segments, cu = dataset.segments(np.arange(23))
    assert np.diff(cu).tolist() == [1] * 23
    assert set(segments["modality"].tolist()) == {Modality.TEXT}
    keys = dataset.keys(np.arange(23)).tolist()
    assert len({0, *keys}) == 24


def test_megatron_names_of_the_files_and_several_inputs(tmp_path):
    one, two = some_documents(1), some_documents(2, 6)
    write_megatron(tmp_path / "b", one)
    write_megatron(tmp_path / "a.v2", two)
    inputs = [tmp_path / "b.bin", tmp_path / "a.v2.idx"]
    import_tokens("megatron", inputs, tmp_path / "out", options=Options(text_vocab=100, visual_vocab=8))
    assert samples(tmp_path / "out") == joined(one) + joined(two)
    dataset = Dataset(tmp_path / "out")
    segments, _ = dataset.segments(np.arange(len(dataset)))
    assert len(segments) == 0  # ids of both ranges may stand anywhere
    apart = tmp_path / "moved"
    apart.mkdir()
    write_megatron(apart / "b", one)
    import_tokens("megatron", [apart / "b"], apart / "out", options=Options(text_vocab=100))
    everything = np.arange(len(one))
    assert Dataset(apart / "out").keys(everything).tolist() == dataset.keys(everything).tolist()


def test_megatron_sequences_that_are_not_in_order(tmp_path):
    prefix = write_megatron(tmp_path / "x", [[[1, 2], [3]], [[4, 5, 6]]])
    data = bytearray((tmp_path / "x.idx").read_bytes())
    struct.pack_into("<qqq", data, 34 + 12, 6, 4, 0)  # byte offsets of the three sequences
    (tmp_path / "x.idx").write_bytes(data)
    file = IndexedFile(prefix)
    cu = file.cu(0, 2)
    assert cu.tolist() == [0, 3, 6]
    assert file.read(0, 2, cu).tolist() == [4, 5, 3, 1, 2, 3]


def test_megatron_batches_stay_small(tmp_path, monkeypatch):
    documents = some_documents(3)
    prefix = write_megatron(tmp_path / "x", documents)
    importer = open_importer("megatron", [prefix], Options(text_vocab=VOCAB))
    monkeypatch.setattr("vtrain.data.importers.base.groups.__defaults__", (50,))
    batches = list(importer.read(2, 20))
    assert all(len(b.samples.ids) <= 50 or len(b.samples.keys) == 1 for b in batches)
    assert sum(b.records for b in batches) == 18
    rows = [row.tolist() for b in batches for row in np.split(b.samples.ids, b.samples.cu[1:-1])]
    assert rows == joined(documents)[2:20]


def test_ids_beyond_the_vocabulary_are_skipped_and_told(tmp_path):
    documents = [[[1, 2]], [[3, 100]], [[4]], [[70, 8]], [[-1]]]
    prefix = write_megatron(tmp_path / "x", documents, "i4")
    report = import_tokens("megatron", [prefix], tmp_path / "out", options=Options(text_vocab=70))
    assert report.skipped == 3
    assert report.reasons == {"token # is id #; expected #..#": 3}
    assert samples(tmp_path / "out") == [[1, 2], [4]]
    listed = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert '"reason": "token 1 is id 100; expected 0..69", "record": "x.idx: document 1"' in listed
    assert "document 4" in listed
    with pytest.raises(ValueError, match=r"3 of 5 documents were skipped; expected at most 2 \(max-skipped\)"):
        import_tokens("megatron", [prefix], tmp_path / "b", options=Options(text_vocab=70), max_skipped=2)
    with pytest.raises(ValueError, match=r"5 of 5 documents were skipped; expected at least one that is usable"):
        import_tokens("megatron", [prefix], tmp_path / "c", options=Options(text_vocab=1))


def test_megatron_sequences_of_another_mode(tmp_path):
    prefix = write_megatron(tmp_path / "x", [[[1, 2]], [[3], [4], [5]], [[6]]], modes=[0, 0, 1, 2, 0])
    report = import_tokens("megatron", [prefix], tmp_path / "out", options=Options(text_vocab=70))
    assert report.reasons == {"sequence # has mode #; expected #, text": 1}
    assert "sequence 2 has mode 1" in (tmp_path / "out" / "skipped.jsonl").read_text()
    assert samples(tmp_path / "out") == [[1, 2], [6]]


def damage(path: Path, offset: int, form: str, *values: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, *values)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "form", "value", "said"),
    [
        (0, "<B", 1, r"x\.idx: starts with .*: not a Megatron index"),
        (9, "<Q", 2, r"version 2; expected 1"),
        (17, "<B", 6, r"dtype code 6 \(float64\); expected integers"),
        (17, "<B", 99, r"dtype code 99; expected integers"),
        (18, "<Q", 9, r"x\.idx: 94 bytes; expected 166 for 9 sequences and 3 document bounds, or 175 with modes"),
        (18, "<Q", 2**63, r"94 bytes; expected"),
        (34 + 8, "<i", 4, r"sequence 2: 4 tokens at byte 6; expected 2-byte tokens inside the 12 bytes of x\.bin"),
        (34, "<i", -3, r"sequence 0: -3 tokens at byte 0"),
        (34 + 12, "<q", 14, r"sequence 0: 2 tokens at byte 14"),
        (34 + 12, "<q", 2**63 - 1, r"sequence 0: 2 tokens at byte 9223372036854775807"),
        (34 + 12, "<q", -2, r"sequence 0: 2 tokens at byte -2"),
        (34 + 12, "<q", 1, r"sequence 0: 2 tokens at byte 1"),
        (34 + 36, "<q", 1, r"document bound 0: 1; expected rising from 0"),
        (34 + 44, "<q", 4, r"document bound 2: 3; expected rising from 0"),
        (34 + 52, "<q", 2, r"the last document ends at sequence 2; expected 3"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, offset, form, value, said):
    prefix = write_megatron(tmp_path / "x", [[[1, 2], [3]], [[4, 5, 6]]])
    damage(tmp_path / "x.idx", offset, form, value)
    with pytest.raises(ValueError, match=said):
        import_tokens("megatron", [prefix], tmp_path / "out", options=Options(text_vocab=70))
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_of_an_index_is_never_read_beyond_the_files(tmp_path):
    prefix = write_megatron(tmp_path / "x", [[[1, 2], [3]], [], [[4, 5, 6]]], modes=[0, 1, 0])
    whole = (tmp_path / "x.idx").read_bytes()
    opened = 0
    for position in range(len(whole)):
        for value in (0, 2, 255):
            (tmp_path / "x.idx").write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                importer = open_importer("megatron", [prefix], Options(text_vocab=70))
            except ValueError as error:
                assert "x.idx" in str(error)  # noqa: PT017
                continue
            opened += 1
            for batch in importer.read(0, len(importer)):
                assert batch.samples.cu[-1] == len(batch.samples.ids)
                assert set(batch.samples.ids.tolist()) <= set(range(7)) | {0}
    assert opened > 100  # the bytes that were what they are, lengths and offsets that stay inside


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_cut_off_or_missing_half_is_named(tmp_path, suffix):
    prefix = write_megatron(tmp_path / "x", [[[1, 2], [3]], [[4, 5, 6]]])
    path = tmp_path / f"x{suffix}"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.idx: "):
            IndexedFile(prefix)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"x{suffix}: no such file; a Megatron dataset is"):
        IndexedFile(prefix)


@pytest.mark.parametrize("documents", [[], [[]], [[[]], []]])
def test_no_document_or_no_token(tmp_path, documents):
    prefix = write_megatron(tmp_path / "x", documents)
    if not documents:
        with pytest.raises(ValueError, match="import megatron: no documents in"):
            import_tokens("megatron", [prefix], tmp_path / "out", options=Options(text_vocab=70))
        return
    import_tokens("megatron", [prefix], tmp_path / "out", options=Options(text_vocab=70))
    assert samples(tmp_path / "out") == joined(documents)


def cut(ids: Sequence[int], eos: int, at: str) -> list[list[int]]:
    """Slow and plain: the documents of a stream."""
    documents: list[list[int]] = [[]]
    for i in ids:
        if at == "start" and i == eos and documents[-1]:
            documents.append([])
        documents[-1].append(i)
        if at == "end" and i == eos:
            documents.append([])
    return [document for document in documents if document]


STREAMS = {
    "usual": [5, 6, 9, 7, 9, 8, 8, 9],
    "open end": [9, 5, 9, 9, 9, 6, 7],
    "one document": [1, 2, 3],
    "only eos": [9],
    "many": np.random.default_rng(0).integers(5, 10, 150).tolist(),
}


@pytest.mark.parametrize("at", ["end", "start"])
@pytest.mark.parametrize("name", STREAMS)
def test_nanogpt_is_cut_at_the_eos(tmp_path, monkeypatch, name, at):
    monkeypatch.setattr(nanogpt, "GRAIN", 4)
    monkeypatch.setattr(nanogpt, "_SCANNED", 7)
    ids = STREAMS[name]
    np.array(ids, dtype="<u2").tofile(tmp_path / "train.bin")
    options = Options(text_vocab=50257, eos=9, eos_at=at)
    said = []
    report = import_tokens("nanogpt", [tmp_path / "train.bin"], tmp_path / "out", samples_per_shard=3, options=options,
                           say=said.append)  # fmt: skip
    expected = cut(ids, 9, at)
    assert samples(tmp_path / "out") == expected
    assert report.samples == len(expected)
    assert f"cut at id 9, the {at} of a document" in said[0]
    importer = open_importer("nanogpt", [tmp_path / "train.bin"], options)
    rng = np.random.default_rng(1)
    for _ in range(10):
        first, last = sorted(rng.integers(0, len(expected) + 1, 2).tolist())
        rows = [r.tolist() for b in importer.read(first, last) for r in np.split(b.samples.ids, b.samples.cu[1:-1])]
        assert rows == expected[first:last]


@pytest.mark.parametrize("tokens", [1, 9, 10, 11])
def test_nanogpt_without_eos_is_cut_by_length_and_says_so(tmp_path, tokens):
    np.arange(tokens, dtype="<u2").tofile(tmp_path / "train.bin")
    said = []
    import_tokens("nanogpt", [tmp_path / "train.bin"], tmp_path / "out", options=Options(text_vocab=100, length=5),
                  say=said.append)  # fmt: skip
    assert samples(tmp_path / "out") == [list(range(i, min(i + 5, tokens))) for i in range(0, tokens, 5)]
    assert "cut every 5 tokens, NOT between documents" in said[0]


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_files_of_llm_c(tmp_path, magic, version, dtype):
    ids = [9, 1, 2, 9, 3]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids)
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(header.tobytes() + np.array(ids, dtype=dtype).tobytes())
    import_tokens("nanogpt", [path], tmp_path / "out", options=Options(text_vocab=100, eos=9, eos_at="start"))
    assert samples(tmp_path / "out") == [[9, 1, 2], [9, 3]]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"magic {magic}, version {version}, 5 tokens, \d+ bytes; expected"):
        open_importer("nanogpt", [path], Options(text_vocab=100, eos=9))


def test_nanogpt_refusals(tmp_path):
    path = tmp_path / "train.bin"
    path.write_bytes(b"abc")
    for options, said in (
        (Options(text_vocab=9), "give eos, the id between documents, or length"),
        (Options(text_vocab=9, eos=1, length=4), "give eos, the id between documents, or length"),
        (Options(text_vocab=9, length=0), r"length is 0; expected 1\.\."),
        (Options(text_vocab=9, length=2**70), f"length is {2**70}; expected"),
        (Options(text_vocab=9, eos=1, eos_at="middle"), "eos-at is 'middle'; expected end or start"),
        (Options(text_vocab=9, eos=1), "3 bytes; expected u16 ids, an even number"),
        (Options(eos=1), "number of text ids is not known; give text-vocab or text-tokenizer"),
        (Options(text_vocab=9, eos=1, merged=True), "does not take merged; it takes text-vocab, "),
    ):
        with pytest.raises(ValueError, match=said):
            open_importer("nanogpt", [path], options)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no documents in"):
        import_tokens("nanogpt", [path], tmp_path / "out", options=Options(text_vocab=9, eos=1))
    path.write_bytes(b"ab")
    with pytest.raises(ValueError, match=r"eos is 9; expected 0\.\.8"):
        open_importer("nanogpt", [path], Options(text_vocab=9, eos=9))
