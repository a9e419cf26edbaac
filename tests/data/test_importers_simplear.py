"""The simplear importer: meta files, mixes and folders of hand-made codes and captions, and all that can be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from vtrain.data.format import Modality, Role
from vtrain.data.importers import Options, import_tokens, open_importer
from vtrain.data.reader import Dataset
from vtrain.data.verify import verify
from vtrain.text import load_text_tokenizer, train_sentencepiece

PICTURES = 11
CAPTIONS = {0: "a red fox. It sleeps.\n", 1: "eins\n zwei \n\ndrei", 2: "ünï cødé \U0001f98a", 3: "", 4: "no full stop",
            5: "short.", 6: "\r\nx\r\n\r\ny\r\n"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(["a red fox. It sleeps.", "eins zwei drei", "no full stop"], 60, folder / "tokenizer.model")
    return folder


def codes(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 64000, (1, 1, 2, 3 + i % 2), dtype=np.int32)


@pytest.fixture
def tree(tmp_path) -> Path:
    """NAME/32_codes and NAME/32_labels, and meta.json beside NAME."""
    folder = tmp_path / "data" / "sa1b"
    for name in ("32_codes", "32_labels"):
        (folder / name).mkdir(parents=True)
    entries = []
    for i in range(PICTURES):
        np.save(folder / "32_codes" / f"{i}.npy", codes(i))
        (folder / "32_labels" / f"{i}.npy").write_bytes(CAPTIONS.get(i, f"picture {i}").encode())
        entries.append({"code_path": f"sa1b/32_codes/{i}.npy", "label_path": f"sa1b/32_labels/{i}.npy"})
    (folder.parent / "meta.json").write_text(json.dumps(entries))
    return folder


def run(inputs: list[Path], out: Path, tokenizer: Path, **options) -> Dataset:
    shards = {"samples_per_shard": options.pop("samples_per_shard", 4)}
    import_tokens("simplear", inputs, out, **shards, options=Options(text_tokenizer=str(tokenizer), **options))
    assert verify(out) == []
    return Dataset(out)


def contents(dataset: Dataset) -> list[tuple[list[str], np.ndarray]]:
    """(captions, codes [h, w]) of every sample."""
    text = load_text_tokenizer(dataset.path / "text_tokenizer")
    found = []
    for i in range(len(dataset)):
        ids, _ = dataset.read([i])
        segments, _ = dataset.segments([i])
        *captions, picture = [ids[s["start"] : s["start"] + s["length"]] for s in segments]
        assert segments["modality"].tolist() == [Modality.TEXT] * len(captions) + [Modality.IMAGE]
        assert segments["role"].tolist() == [Role.INPUT] * len(captions) + [Role.TARGET]
        assert segments["variant"].tolist() == [*range(len(captions)), 0]
        assert segments["t"][-1] == 1
        grid = (picture - dataset.schema.vocab["visual"].base).reshape(segments["h"][-1], segments["w"][-1])
        found.append(([text.decode(caption) for caption in captions], grid))
    return found


def test_a_meta_file(tree, tmp_path, tokenizer):
    dataset = run([tree.parent / "meta.json"], tmp_path / "out", tokenizer)
    found = contents(dataset)
    assert len(found) == PICTURES
    for i, (_, grid) in enumerate(found):
        assert np.array_equal(grid, codes(i)[0, 0])
    captions = [variants for variants, _ in found]
    assert captions[:7] == [["a red fox. It sleeps."], ["eins", "zwei", "drei"], [CAPTIONS[2]], [], ["no full stop"],
                            ["short."], ["x", "y"]]  # fmt: skip
    text = load_text_tokenizer(tokenizer)
    assert dataset.schema.vocab.to_json() == [["text", text.vocab_size], ["visual", 64000]]
    assert dataset.schema.text_tokenizer == text.sha256
    assert "<|t2i|>" in dataset.schema.specials


def test_caption_rules(tree, tmp_path, tokenizer):
    meta = tree.parent / "meta.json"
    short = [variants for variants, _ in contents(run([meta], tmp_path / "s", tokenizer, captions="short"))]
    assert short[:7] == [["a red fox.", "a red fox. It sleeps."], ["eins", "zwei", "drei"], [CAPTIONS[2]], [],
                         ["no full stop"], ["short."], ["x", "y"]]  # fmt: skip
    second = [variants for variants, _ in contents(run([meta], tmp_path / "t", tokenizer, captions="second"))]
    assert second[:7] == [["a red fox. It sleeps."], ["zwei"], [CAPTIONS[2]], [], ["no full stop"], ["short."], ["y"]]


def test_a_pattern_of_meta_files(tree, tmp_path, tokenizer):
    entries = json.loads((tree.parent / "meta.json").read_text())
    for name, part in (("b", entries[4:]), ("a", entries[:4])):
        (tree.parent / f"{name}.json").write_text(json.dumps(part))
    dataset = run([tree.parent / "{b,a}.json"], tmp_path / "out", tokenizer)
    assert [grid.tolist() for _, grid in contents(dataset)] == [codes(i)[0, 0].tolist() for i in range(PICTURES)]
    with pytest.raises(ValueError, match=r"c\.json: no such file"):
        run([tree.parent / "{a,c}.json"], tmp_path / "none", tokenizer)


def test_what_the_dataset_notes(tree, tmp_path, tokenizer):
    inputs = [tree.parent / "meta.json"]
    plain = run(inputs, tmp_path / "out", tokenizer)
    assert (plain.schema.image, plain.schema.text) == ({}, {})
    noted = run(inputs, tmp_path / "noted", tokenizer, resolution=32, caption_space=True)
    assert (noted.schema.image, noted.schema.text) == ({"resolution": 32}, {"caption_space": True})
    text = load_text_tokenizer(tokenizer)
    segments = noted.segments([4])[0]
    assert noted.read([4])[0][: segments["length"][0]].tolist() == text.encode(" no full stop")
    assert contents(noted)[3][0] == []
    with pytest.raises(ValueError, match="caption_space null, now true"):
        run(inputs, tmp_path / "out", tokenizer, caption_space=True)
    with pytest.raises(ValueError, match="resolution is 0; expected pixels"):
        run(inputs, tmp_path / "zero", tokenizer, resolution=0)


def test_a_folder_has_the_keys_of_its_meta_file(tree, tmp_path, tokenizer):
    listed = run([tree.parent / "meta.json"], tmp_path / "a", tokenizer)
    for number, path in enumerate((tree, tree / "32_codes")):
        found = run([path], tmp_path / str(number), tokenizer)
        everything = np.arange(PICTURES)
        assert found.keys(everything).tolist() == listed.keys(everything).tolist()
        assert found.read(everything)[0].tolist() == listed.read(everything)[0].tolist()
    assert len(run([tree], tmp_path / "b", tokenizer, total=5)) == 5
    for name in ("9" * 30, "007", "\u0663"):  # not numbers as SimpleAR writes them
        (next(tree.glob("*_codes")) / f"{name}.npy").touch()
    moved = tree.rename(tmp_path / "sa1b")
    assert run([moved], tmp_path / "c", tokenizer).keys([3]).tolist() == listed.keys([3]).tolist()


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (None, range(PICTURES)),
        ("all", range(PICTURES)),
        ("first:3", range(3)),
        ("end:3", range(8, 11)),
        ("first:99", range(PICTURES)),
        ("first:10%", range(2)),
        ("end: 50%", range(5, 11)),
        ("first:0", range(0)),
    ],
)
def test_a_mix(tree, tmp_path, tokenizer, strategy, expected):
    meta = tree.parent / "meta.json"
    rows = "".join(json.dumps(entry) + "\n\n" for entry in json.loads(meta.read_text()))
    (tree.parent / "b.jsonl").write_text(rows)  # every second line is blank
    said = "" if strategy is None else f"\n    sampling_strategy: {strategy!r}"
    mix = tree.parent / "mix.yaml"
    mix.write_text(f"datasets:\n  - json_path: meta.json{said}\n  - json_path: '{{b,b}}.jsonl'\n")
    dataset = run([mix], tmp_path / "out", tokenizer)
    wanted = [*expected, *range(PICTURES)]
    assert [grid.tolist() for _, grid in contents(dataset)] == [codes(i)[0, 0].tolist() for i in wanted]


def test_a_random_choice_is_always_the_same(tree, tmp_path, tokenizer):
    mix = tree.parent / "mix.yml"
    found = []
    for out in ("a", "b"):
        mix.write_text("datasets: [{json_path: meta.json, sampling_strategy: 'random:40%'}]")
        found.append(run([mix], tmp_path / out, tokenizer).keys(np.arange(5)).tolist())
    assert found[0] == found[1]
    assert len(set(found[0])) == math.ceil(0.4 * PICTURES)
    assert len(Dataset(tmp_path / "a")) == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("datasets: 7", "expected `datasets:` with a list"),
        ("just text", "expected `datasets:` with a list"),
        ("datasets: [{path: x}]", "expected json_path and sampling_strategy"),
        ("datasets: [{json_path: meta.json, sampling_strategy: 'last:3'}]", r"mix.yaml: datasets\[0\]: .* 'last:3'; "),
        ("datasets: [{json_path: meta.json, sampling_stategy: 'first:3'}]", r"datasets\[0\] is .* expected json_path"),
        ("datasets: [{json_path: meta.json, sampling_strategy: }]", "sampling_strategy is 'None'; expected all"),
        ("datasets: [{json_path: none.json}]", r"none\.json: no such file"),
        ("{", "mix.yaml: not YAML: "),
        ("datasets: [!!python/object/apply:os.getcwd []]", "mix.yaml: not YAML: could not determine a constructor"),
    ],
)
def test_a_broken_mix(tree, tokenizer, content, said):
    mix = tree.parent / "mix.yaml"
    mix.write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        open_importer("simplear", [mix], Options(text_tokenizer=str(tokenizer)))
    assert "\n" not in str(error.value)


def test_bad_pictures_are_skipped_with_the_reason(tree, tmp_path, tokenizer):
    grids, labels = tree / "32_codes", tree / "32_labels"
    (grids / "0.npy").unlink()
    (grids / "1.npy").write_bytes((grids / "1.npy").read_bytes()[:-3])
    np.save(grids / "2.npy", np.array([[0.5]]))
    np.save(grids / "3.npy", np.array([[64000]]))
    np.save(grids / "4.npy", np.array([None]))
    np.save(grids / "5.npy", codes(5).reshape(-1))
    np.save(grids / "6.npy", np.concatenate([codes(6), codes(6)]))
    (labels / "7.npy").unlink()
    (labels / "8.npy").write_bytes(b"\xff\xfe caption")
    np.save(labels / "9.npy", np.array(["a caption"]))
    (labels / "10.npy").write_text("line\n" * 257)
    meta = tree.parent / "meta.json"
    entries = json.loads(meta.read_text())
    np.save(grids / "11.npy", codes(11))
    (labels / "11.npy").write_text("the last")
    good = {"code_path": str(grids / "11.npy"), "label_path": str(labels / "11.npy")}  # absolute
    meta.write_text(json.dumps([*entries, {"code_path": 7}, [], good]))
    dataset = run([meta], tmp_path / "out", tokenizer)
    ((captions, grid),) = contents(dataset)
    assert captions == ["the last"]
    assert np.array_equal(grid, codes(11)[0, 0])
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["record"] for entry in listed] == [f"meta.json: element {i}" for i in range(13)]
    reasons = [
        "No such file",
        "cut off",
        "float64; expected an npy of integers",
        "token 0 is id 64000",
        "not an npy of",
        f"shape ({codes(5).size},); expected",
        "shape (2, 1, 2, 3)",
        "No such file",
        "not UTF-8",
        "an npy, or more than",
        "257 captions; expected at most 256",
        "expected an object with code_path",
        "expected an object",
    ]
    for entry, reason in zip(listed, reasons):
        assert reason in entry["reason"], entry


def test_a_unit_of_which_nothing_was_usable_is_made_again(tree, tmp_path, tokenizer):
    """The first try looks for the pictures of the meta file in the wrong folder; units with usable ones stay."""
    meta = tree.parent / "meta.json"
    with pytest.raises(ValueError, match=f"{PICTURES} of {PICTURES} pictures were skipped; .*No such file"):
        run([meta], tmp_path / "out", tokenizer, root=str(tmp_path))
    dataset = run([meta], tmp_path / "out", tokenizer, root=str(tree.parent))
    direct = run([meta], tmp_path / "direct", tokenizer)
    assert dataset.manifest.skipped == 0
    assert not (tmp_path / "out" / "skipped.jsonl").exists()
    assert dataset.manifest.shards == direct.manifest.shards


def test_refused(tree, tmp_path, tokenizer):
    meta = tree.parent / "meta.json"
    given = {"text_tokenizer": str(tokenizer)}
    for inputs, options, said in (
        ([meta], {}, "no text-tokenizer; the captions are text"),
        ([meta], given | {"captions": "all"}, "captions is 'all'; expected whole, short, second"),
        ([meta], given | {"text_vocab": 5}, r"\d+ ids; the text range has 5"),
        ([meta, meta], given, "meta.json: given twice"),
        ([tree.parent], given, r"0 folders \*_codes; expected one"),
        ([tree.parent / "no.json"], given, r"no\.json: no such file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            open_importer("simplear", inputs, Options(**options))
    meta.write_text("[{]")
    with pytest.raises(ValueError, match=r"meta\.json: byte 1: not JSON"):
        open_importer("simplear", [meta], Options(**given))
    (tree / "32_labels").rename(tree / "labels")
    with pytest.raises(ValueError, match="32_labels: no such folder"):
        open_importer("simplear", [tree], Options(**given))
