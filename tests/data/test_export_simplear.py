"""The way back to SimpleAR's files: read by json, numpy and open() alone, and imported again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from crashes import leftovers, run_once, tree
from text.test_bpe import VARIANTS

from vtrain.data import exclude
from vtrain.data.export_simplear import export_simplear
from vtrain.data.format import SEGMENT, Modality, Role, Schema, SegmentFlag
from vtrain.data.importers import Options, import_tokens
from vtrain.data.manifest import publish
from vtrain.data.reader import Dataset
from vtrain.data.writer import ShardWriter
from vtrain.text import load_text_tokenizer
from vtrain.vocab import Vocabulary

CODES = 500
CAPTIONS = [
    ["a red fox. It sleeps."],
    ["a red fox.", "a red fox. It sleeps."],  # as short captions are stored
    ["It sleeps.", "a red fox. It sleeps."],
    ["one", "two. Three.", "\u00fcn\u00ef \U0001f98a"],
    [],
    [" line\nbreaks \r\nand space "],
    [""],
]
LABELS = ["a red fox. It sleeps.", "a red fox. It sleeps.", "It sleeps.\na red fox. It sleeps.",
          "one\ntwo. Three.\n\u00fcn\u00ef \U0001f98a", "", "line breaks  and space", ""]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    VARIANTS["qwen"]().save(str(folder / "tokenizer.json"))
    return load_text_tokenizer(folder, specials=["<|t2i|>", "<|soi|>"])


def codes(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, CODES, (2, 3 + i % 2))


def write(
    folder: Path, tokenizer, samples: list[list[tuple[int, int, list[int], tuple[int, int, int]]]], **schema
) -> Path:
    """samples: (modality, role, ids, grid) of each segment, and its flags if it has some."""
    vocab = Vocabulary.of(text=tokenizer.vocab_size, visual=CODES)
    made = Schema(vocab, **{"text_tokenizer": tokenizer.sha256, "image": {"resolution": 32}, **schema})
    folder.mkdir(parents=True)
    tokenizer.save(folder / "text_tokenizer")
    infos = []
    for number in range(0, len(samples), 4):
        with ShardWriter(folder / f"{number}.vts", made, uuid=bytes([number] * 16)) as writer:
            for place, sample in enumerate(samples[number : number + 4], number + 1):
                segments = np.zeros(len(sample), SEGMENT)
                segments["start"] = np.cumsum([0, *(len(ids) for _, _, ids, *_ in sample)])[:-1]
                for variant, (segment, (modality, role, _, grid, *flags)) in enumerate(zip(segments, sample)):
                    segment["flags"] = sum(flags)
                    segment["variant"] = 0 if modality == Modality.IMAGE else variant
                    segment["modality"], segment["role"] = modality, role
                    segment["t"], segment["h"], segment["w"] = grid
                ids = np.array([token for _, _, ids, *_ in sample for token in ids], np.int64)
                keys = np.array([place], np.uint64)
                writer.append_batch(ids, np.array([0, len(ids)]), segments, np.array([0, len(sample)]), keys=keys)
        infos.append(writer.info)
    publish(folder, made, infos)
    return folder


def caption(text, words: str) -> tuple:
    return Modality.TEXT, Role.INPUT, text.encode(words), (0, 0, 0)


def picture(text, grid: np.ndarray) -> tuple:
    return Modality.IMAGE, Role.TARGET, (grid.ravel() + text.vocab_size).tolist(), (1, *grid.shape)


def pictures(text, space: str = "") -> list:
    return [
        [*(caption(text, space + words if words else "") for words in captions), picture(text, codes(i))]
        for i, captions in enumerate(CAPTIONS)
    ]


@pytest.fixture(scope="module")
def dataset(text, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("export") / "foxes", text, pictures(text))


def check(folder: Path, meta: Path, numbers: list[int], root: str = "") -> None:
    """What SimpleAR finds there."""
    entries = json.loads(meta.read_text())
    assert [Path(entry["code_path"]).stem for entry in entries] == list(map(str, numbers))
    for number, entry in zip(numbers, entries):
        code_path, label_path = (folder / entry[key].removeprefix(root) for key in ("code_path", "label_path"))
        grid = np.load(code_path)
        assert (grid.dtype, grid.shape) == (np.dtype("int32"), (1, 1, *codes(number).shape))
        assert np.array_equal(grid[0, 0], codes(number))
        assert label_path.read_text("utf-8") == LABELS[number]


def test_the_files_are_simplears(dataset, tmp_path):
    out = tmp_path / "out"
    done = export_simplear(dataset, out, name="sa1b")
    assert (done.meta, done.pictures, done.written) == (out / "sa1b_32_7_meta.json", 7, 14)
    check(out, done.meta, list(range(7)))
    names = [f"sa1b/32_{what}/{i}.npy" for what in ("codes", "labels") for i in range(7)]
    assert sorted(tree(out)) == sorted([*names, "sa1b_32_7_meta.json"])
    assert json.loads(done.meta.read_text())[3]["label_path"] == "sa1b/32_labels/3.npy"


def test_a_root_and_the_name_of_the_folder(dataset, tmp_path):
    done = export_simplear(dataset, tmp_path, root="/data/tokens")
    assert json.loads(done.meta.read_text())[0]["code_path"] == "/data/tokens/foxes/32_codes/0.npy"
    check(tmp_path, done.meta, list(range(7)), root="/data/tokens/")


def test_excluded_samples_are_left_out(text, tmp_path):
    made = write(tmp_path / "foxes", text, pictures(text))
    exclude.leave_out(made, np.array([[0, 2], [4, 5]]))
    done = export_simplear(made, tmp_path / "out")
    assert done.meta.name == "foxes_32_4_meta.json"
    check(tmp_path / "out", done.meta, [2, 3, 5, 6])
    assert len(list((tmp_path / "out" / "foxes" / "32_codes").iterdir())) == 4


@pytest.mark.parametrize("space", ["", " "])
@pytest.mark.parametrize("form", ["meta", "folder"])
def test_imported_again(form, space, text, tmp_path):
    facts = {"text": {"caption_space": True}} if space else {}
    made = write(tmp_path / "foxes", text, pictures(text, space), **facts)
    done = export_simplear(made, tmp_path / "out")
    check(tmp_path / "out", done.meta, list(range(7)))
    options = Options(text_tokenizer=str(made / "text_tokenizer"), visual_vocab=CODES, captions="short", resolution=32,
                      caption_space=bool(space) or None)  # fmt: skip
    inputs = [done.meta if form == "meta" else tmp_path / "out" / "foxes"]
    import_tokens("simplear", inputs, tmp_path / "again", samples_per_shard=3, options=options)
    again, before = Dataset(tmp_path / "again"), Dataset(made)
    assert again.schema.image == {"resolution": 32}
    assert again.schema.text == before.schema.text
    some = np.array([1, 3, 4])  # sample 0 gets a short caption, 2 comes back as two whole ones, 5 and 6 are no lines
    for mine, theirs in zip(again.read(some), before.read(some)):
        assert mine.tolist() == theirs.tolist()
    assert again.segments(some)[0].tolist() == before.segments(some)[0].tolist()
    first, segments = again.read([0])[0], again.segments([0])[0]
    assert [text.decode(part) for part in np.split(first, segments["start"][1:])[:-1]] == [
        space + "a red fox.", space + "a red fox. It sleeps."
    ]  # fmt: skip
    assert export_simplear(tmp_path / "again", tmp_path / "out", name="foxes").written == 0  # the same files


def test_a_second_run_writes_nothing_and_foreign_files_stay(dataset, tmp_path):
    done = export_simplear(dataset, tmp_path)
    assert export_simplear(dataset, tmp_path).written == 0
    label = tmp_path / "foxes" / "32_labels" / "3.npy"
    label.unlink()
    assert export_simplear(dataset, tmp_path).written == 1
    label.write_text("of somebody else")
    with pytest.raises(ValueError, match=r"32_labels/3.npy: there already, with other content"):
        export_simplear(dataset, tmp_path)
    assert label.read_text() == "of somebody else"
    assert done.meta.exists()


FAULTS = (
    "rename:npy#6:kill",
    "write:npy#9:full",
    "write:foxes_32_7_meta.json#4:kill",
    "rename:foxes_32_7_meta.json:kill",
)


def test_killed_and_started_again(dataset, tmp_path):
    export_simplear(dataset, tmp_path / "undisturbed")
    for number, fault in enumerate(FAULTS):
        out = tmp_path / str(number)
        arguments = ["export", "simplear", str(dataset), "--out", str(out)]
        ended = run_once("vtrain.shards", arguments, tmp_path / "log", VTRAIN_FAILPOINT=fault)
        assert ended.code == (2 if fault.endswith("full") else -9), ended.output
        assert not list(out.glob("foxes_*_meta.json"))
        assert fault.endswith("kill") or leftovers(out) == []
        for path in out.rglob("[0-9]*.npy"):  # what has a name is whole
            assert path.read_bytes() == (tmp_path / "undisturbed" / path.relative_to(out)).read_bytes()
        export_simplear(dataset, out)
        assert tree(out) == tree(tmp_path / "undisturbed")
        assert leftovers(out) == []


def odd_samples(text) -> dict[str, tuple[list, str]]:
    """name: (the sample, what is said of it)."""
    words, grid = caption(text, "a fox"), picture(text, codes(0))
    split = text.encode("a f") + text.encode("ox")
    return {
        "no picture": ([words], "sample 2: no pictures; expected one"),
        "two": ([words, grid, grid], "sample 2: 2 pictures; expected one"),
        "a turn": ([(Modality.TEXT, Role.USER, *words[2:]), grid], "sample 2: segment 0 is user text, grid 0 x 0 x 0"),
        "input": ([words, (Modality.IMAGE, Role.INPUT, *grid[2:])], "sample 2: segment 1 is input image, grid 1 x 2"),
        "no grid": ([words, (*grid[:3], (0, 0, 0))], "sample 2: segment 1 is target image, grid 0 x 0 x 0"),
        "merged": ([words, (*grid, SegmentFlag.MERGED)], "segment 1 is target image, grid 1 x 2 x 3, flags 1;"),
        "latent": ([(Modality.FEATURE, Role.INPUT, [], (0, 0, 0)), grid], "segment 0 is input feature"),
        "special": ([(*words[:2], [text.special_id("<|soi|>")], words[3]), grid], "the caption '<|soi|>' does"),
        "half": ([(*words[:2], text.encode("\u732b")[:1], words[3]), grid], "sample 2: the caption '\ufffd' does not"),
        "other bpe": ([(*words[:2], split, words[3]), grid], "sample 2: the caption 'a fox' does not lead back"),
    }  # fmt: skip


def test_what_simplear_has_no_form_for(text, tmp_path):
    for number, (name, (sample, said)) in enumerate(odd_samples(text).items()):
        made = write(tmp_path / str(number), text, [*pictures(text)[:2], sample])
        with pytest.raises(ValueError) as error:
            export_simplear(made, tmp_path / "out")
        assert said in str(error.value), name
        assert str(made) in str(error.value)
        exclude.leave_out(made, np.array([[2, 3]]))
        assert export_simplear(made, tmp_path / f"out {number}").pictures == 2
    assert not (tmp_path / "out").exists()


def test_refused(dataset, text, tmp_path):
    made = write(tmp_path / "unknown", text, pictures(text)[:1], image={})
    assert export_simplear(made, tmp_path / "out", resolution=48).meta.name == "unknown_48_1_meta.json"
    other = write(tmp_path / "other", text, pictures(text)[:1], text_tokenizer="ab" * 32)
    for source, options, said in (
        (made, {}, "unknown: it does not say how large its pictures are; expected --resolution"),
        (dataset, {"resolution": 48}, "resolution is 48; .*foxes has pictures of 32"),
        (dataset, {"name": "a/b"}, "name is 'a/b'; expected the name of a folder"),
        (dataset, {"name": ".."}, "name is '..'; expected"),
        (other, {}, "text_tokenizer: sha256 .*; the captions were encoded with abab"),
    ):
        with pytest.raises(ValueError, match=said):
            export_simplear(source, tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()
