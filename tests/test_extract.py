"""The extract command: bytes do not depend on ranks, a kill loses nothing, bad images are listed, misuse is refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from crashes import run_once
from ranks import run_ranks
from toys import CAPTIONS, CODES, extract_arguments, write_images
from visual.cosmos_nets import DV, random_tensors

from vtrain.config import load as load_settings
from vtrain.config import run_command
from vtrain.data.format import Modality, Role
from vtrain.data.reader import Dataset
from vtrain.data.sources.record import stable_key
from vtrain.data.verify import verify
from vtrain.extract import main
from vtrain.settings import ExtractSettings
from vtrain.text import load_text_tokenizer, train_sentencepiece
from vtrain.visual import load_image_tokenizer
from vtrain.visual.preprocess import adm_center_crop, center_crop_resize, load_image, to_tensor
from vtrain.visual.tokenizer import save_image_tokenizer

IMAGES = 23


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("inputs"), IMAGES)


@pytest.fixture
def damaged(inputs, tmp_path) -> Path:
    """A copy in which five images cannot be read."""
    root = Path(shutil.copytree(inputs, tmp_path / "damaged"))
    images = root / "images"
    (images / "2.png").unlink()
    (images / "3.png").write_bytes(b"")
    (images / "9.png").write_bytes(b"not a picture")
    (images / "10.png").write_bytes((images / "10.png").read_bytes()[:200])
    (images / "22.png").unlink()
    (images / "22.png").mkdir()
    return root


def run(inputs: Path, out: Path, *overrides: str) -> None:
    main(load_settings(ExtractSettings, None, extract_arguments(inputs, out, *overrides)))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "shards"
    run(inputs, out)
    return out


def test_the_dataset_holds_captions_and_codes(inputs, finished):
    assert verify(finished) == []
    dataset = Dataset(finished)
    text = load_text_tokenizer(finished / "text_tokenizer")
    image = load_image_tokenizer(finished / "image_tokenizer")
    assert dataset.schema.vocab.to_json() == [["text", text.vocab_size], ["visual", CODES]]
    assert dataset.schema.text_tokenizer == text.sha256
    assert dataset.schema.image_tokenizer == image.sha256
    assert dataset.schema.specials == {name: text.special_id(name) for name in text.specials}
    assert [len(shard) for shard in dataset.shards] == [5, 5, 5, 5, 3]
    everything = np.arange(IMAGES)
    assert dataset.keys(everything).tolist() == [stable_key(f"{i}.png") for i in range(IMAGES)]
    for i in range(IMAGES):
        ids, _ = dataset.read([i])
        segments, _ = dataset.segments([i])
        parts = np.split(ids, segments["start"][1:])
        captions = CAPTIONS[: i % 3 + 1] if i % 6 else CAPTIONS[:1]
        assert [text.decode(part) for part in parts[:-1]] == captions
        assert segments["modality"].tolist() == [Modality.TEXT] * len(captions) + [Modality.IMAGE]
        assert segments["role"].tolist() == [Role.INPUT] * len(captions) + [Role.TARGET]
        assert segments["variant"].tolist() == [*range(len(captions)), 0]
        assert segments[["t", "h", "w"]].tolist() == [(0, 0, 0)] * len(captions) + [(1, 4, 4)]
        pixels = to_tensor(center_crop_resize(load_image(inputs / "images" / f"{i}.png"), 16))
        codes = image.encode(pixels[None])
        assert (parts[-1] - text.vocab_size).reshape(4, 4).tolist() == codes[0].tolist()


def test_only_the_dataset_is_left(finished):
    names = sorted(path.name for path in finished.iterdir())
    manifest = next(name for name in names if name.startswith("manifest-"))
    shards = [f"shard-{u:05d}.vts" for u in range(5)]
    assert names == [".lock", "extract.json", "image_tokenizer", manifest, *shards, "text_tokenizer"]


def write_llava(inputs: Path, folder: Path, lines: list[dict]) -> list[str]:
    talks = [
        {
            "image": line["image"],
            "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": line["caption"][0]}],
        }
        for line in lines
    ]
    (folder / "chat.json").write_text(json.dumps(talks))
    return [f"input.records={folder / 'chat.json'}"]


def write_vgt(inputs: Path, folder: Path, lines: list[dict]) -> list[str]:
    for line in lines:
        (folder / f"{line['image']}.json").write_text(json.dumps({"re_caption": line["caption"]}))
    entries = [{"image": line["image"], "annotation": f"{line['image']}.json"} for line in lines]
    (folder / "list.json").write_text(json.dumps(entries))
    return [f"input.records={folder / 'list.json'}", f"input.annotations={folder}"]


def write_webdataset(inputs: Path, folder: Path, lines: list[dict], name: str = "a.tar") -> list[str]:
    with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as tar:
        for line in lines:
            path = inputs / "images" / line["image"]
            texts = path.with_suffix(".json").name, json.dumps({"captions": line["caption"]}).encode()
            for member, data in ((path.name, path.read_bytes()), texts):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return [f"input.records={folder / name}", "input.images="]


def write_compressed(inputs: Path, folder: Path, lines: list[dict]) -> list[str]:
    return write_webdataset(inputs, folder, lines, "a.tar.gz")


def write_parquet(inputs: Path, folder: Path, lines: list[dict]) -> list[str]:
    pictures = [(inputs / "images" / line["image"]).read_bytes() for line in lines]
    columns = {"jpg": pictures, "caption": [line["caption"] for line in lines]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=4)
    return [f"input.records={folder / 'a.parquet'}", "input.images=", "input.fields.image=jpg"]


def write_simplear(inputs: Path, folder: Path, lines: list[dict]) -> list[str]:
    entries = [{"image_path": line["image"], "caption": line["caption"]} for line in lines]
    (folder / "list.json").write_text(json.dumps(entries))
    return [f"input.records={folder / 'list.json'}"]


WRITERS = {
    "llava": write_llava,
    "parquet": write_parquet,
    "simplear": write_simplear,
    "vgt": write_vgt,
    "webdataset": write_webdataset,
    "webdataset, compressed": write_compressed,
}


def as_kind(kind: str, inputs: Path, folder: Path) -> list[str]:
    """The pictures and captions of `inputs` as another kind of source; the overrides that name it."""
    lines = [json.loads(line) for line in (inputs / "captions.jsonl").read_text().splitlines()]
    lines = [{**line, "caption": [line["caption"]] if isinstance(line["caption"], str) else line["caption"]}
             for line in lines]  # fmt: skip
    folder.mkdir()
    return [f"input.kind={kind.partition(',')[0]}", *WRITERS[kind](inputs, folder, lines)]


def contents(out: Path, captions: int) -> list[tuple[list[str], list[int]]]:
    """Per sample the first captions and the codes."""
    dataset = Dataset(out)
    text = load_text_tokenizer(out / "text_tokenizer")
    found = []
    for i in range(len(dataset)):
        ids, segments = dataset.read([i])[0], dataset.segments([i])[0]
        *texts, codes = np.split(ids, segments["start"][1:])
        found.append(([text.decode(part) for part in texts[:captions]], codes.tolist()))
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_pictures_give_the_same_codes_from_any_source(kind, inputs, finished, tmp_path):
    run(inputs, tmp_path / "out", *as_kind(kind, inputs, tmp_path / "source"))
    assert verify(tmp_path / "out") == []
    captions = 1 if kind == "llava" else 3
    assert contents(tmp_path / "out", captions) == contents(finished, captions)
    dataset = Dataset(tmp_path / "out")
    assert len(set(dataset.keys(np.arange(len(dataset))).tolist())) == IMAGES
    shards = len(dataset.shards)
    assert shards == (1 if "compressed" in kind else shards if kind == "webdataset" else 5)
    assert shards > 1 or "compressed" in kind


@pytest.fixture(params=["webdataset", "parquet"])
def damaged_stream(request, damaged, tmp_path) -> tuple[list[str], Path]:
    """(overrides that name the damaged images as a stream, the finished dataset)."""
    for name in ("2.png", "22.png"):  # a tar cannot hold what is not there
        shutil.rmtree(damaged / "images" / name, ignore_errors=True)
        (damaged / "images" / name).write_bytes(b"broken")
    overrides = as_kind(request.param, damaged, tmp_path / "source")
    run(damaged, tmp_path / "one", *overrides)
    entries = [json.loads(line) for line in (tmp_path / "one" / "skipped.jsonl").read_text().splitlines()]
    file = "a.tar" if request.param == "webdataset" else "a.parquet"
    assert [entry["name"] for entry in entries] == [f"{file}:{i}" for i in (2, 3, 9, 10, 22)]
    return overrides, tmp_path / "one"


def test_streams_on_any_number_of_ranks(damaged_stream, damaged, tmp_path):
    overrides, one = damaged_stream
    for ranks in (2, 3):
        run_ranks(ranks, run, damaged, tmp_path / f"on {ranks}", *overrides)
        assert tree(tmp_path / f"on {ranks}") == tree(one)


@pytest.mark.slow
def test_streams_after_a_kill(damaged_stream, damaged, tmp_path):
    overrides, one = damaged_stream
    arguments = extract_arguments(damaged, tmp_path / "killed", *overrides)
    script = textwrap.dedent(KILLED).format(patch=PATCHES["inside a shard"], arguments=arguments)
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == -9
    assert list((tmp_path / "killed" / "progress").iterdir())
    run(damaged, tmp_path / "killed", *overrides)
    assert tree(tmp_path / "killed") == tree(one)


@pytest.fixture
def seven(damaged) -> list[str]:
    """Seven pictures in SimpleAR's form, the fourth of them broken; the overrides that name them."""
    entries = [{"image_path": f"{i}.png", "caption": f"a red square. The {i}th."} for i in range(7)]
    (damaged / "images" / "2.png").write_bytes((damaged / "images" / "1.png").read_bytes())  # there again
    (damaged / "seven.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (damaged / "mix.yaml").write_text("datasets: [{json_path: seven.jsonl, sampling_strategy: 'first:99%'}]")
    options = ["crop=adm", "kind=simplear", f"records={damaged / 'mix.yaml'}", "resolution=20"]
    return [*(f"input.{option}" for option in options), "extract.samples_per_shard=2", "extract.short_captions=true",
            "extract.caption_space=true"]  # fmt: skip


def test_seven_pictures_on_two_ranks_after_a_kill(seven, damaged, tmp_path):
    out = tmp_path / "out"
    fault = {"VTRAIN_FAILPOINT": "rename:shard.vts#3:kill"}
    assert run_once("extract", extract_arguments(damaged, out, *seven), tmp_path / "log", **fault).code == -9
    assert len(list((out / "progress").iterdir())) == 2
    assert not list(out.glob("manifest-*"))
    run_ranks(2, run, damaged, out, *seven)
    run(damaged, tmp_path / "undisturbed", *seven)
    assert tree(out) == tree(tmp_path / "undisturbed")
    dataset, kept = Dataset(out), [0, 1, 2, 4, 5, 6]
    assert dataset.keys(np.arange(len(dataset))).tolist() == [stable_key(f"{i}.png") for i in kept]
    (skipped,) = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert skipped["name"] == "[0] seven.jsonl:4"
    assert skipped["reason"].endswith("3.png: cannot read the image: the file is empty")


def test_the_adm_crop_short_captions_and_a_space(seven, damaged, tmp_path):
    run(damaged, tmp_path / "out", *seven)
    dataset, image = Dataset(tmp_path / "out"), load_image_tokenizer(damaged / "vq")
    text = load_text_tokenizer(tmp_path / "out" / "text_tokenizer")
    assert dataset.schema.text == {"caption_space": True}
    assert dataset.schema.image == {"resolution": 20, "downscale": 4, "crop": "adm"}
    others = 0
    for sample, i in enumerate([0, 1, 2, 4, 5, 6]):
        ids, segments = dataset.read([sample])[0], dataset.segments([sample])[0]
        short, whole, codes = np.split(ids, segments["start"][1:])
        assert short.tolist() == text.encode(" a red square.")
        assert whole.tolist() == text.encode(f" a red square. The {i}th.")
        assert segments["variant"].tolist() == [0, 1, 0]
        picture = load_image(damaged / "images" / f"{i}.png")
        pixels = adm_center_crop(picture, 20)
        assert (codes - text.vocab_size).tolist() == image.encode(to_tensor(pixels)[None]).flatten().tolist()
        others += not np.array_equal(pixels, center_crop_resize(picture, 20))
    assert others


@pytest.mark.slow
def test_a_cosmos_tokenizer(seven, damaged, tmp_path, monkeypatch):
    folder = damaged / "cosmos"
    save_image_tokenizer(folder, DV, random_tensors(DV, dtype=torch.float32))
    ways = {
        "folded": ([], {}),
        "plain": (["tokenizer.fold=false"], {"fold": False}),
        "coarse": (["extract.dtype=bf16"], {"dtype": torch.bfloat16}),
    }
    pixels = [adm_center_crop(load_image(damaged / "images" / f"{i}.png"), 32) for i in (0, 1, 2, 4, 5, 6)]
    found, loaded = {}, []
    monkeypatch.setattr(
        "vtrain.extract.load_image_tokenizer",
        lambda *given, **options: loaded.append(options) or load_image_tokenizer(*given, **options),
    )
    for name, (overrides, options) in ways.items():
        run(damaged, tmp_path / name, *seven, "input.resolution=32", f"tokenizer.image={folder}", *overrides)
        dataset, image = Dataset(tmp_path / name), load_image_tokenizer(folder, **options)
        assert loaded.pop() == {"dtype": torch.float32, "fold": True} | options
        assert dataset.schema.image_tokenizer == image.sha256
        assert dataset.schema.vocab["visual"].size == 64000
        ids, segments = dataset.read(np.arange(6))[0], dataset.segments(np.arange(6))[0]
        assert segments[["h", "w"]][2::3].tolist() == [(2, 2)] * 6
        found[name] = ids[ids >= dataset.schema.vocab["visual"].base] - dataset.schema.vocab["visual"].base
        expected = image.encode(to_tensor(np.stack(pixels))).flatten().numpy()
        assert (found[name] == expected).mean() > 0.9  # in other batches; a code at a rounding edge may differ
    assert (found["folded"] == found["plain"]).mean() > 0.9
    assert 0 < (found["folded"] != found["coarse"]).mean() < 1


def test_a_dataset_begun_before_these_keys_goes_on(finished):
    """Keys that came later are named only where they are used."""
    identity = json.loads((finished / "extract.json").read_text())
    assert [key for key in identity if not key.startswith("input.")] == sorted(
        ["vocab", "specials", "text_tokenizer", "image_tokenizer", "resolution", "downscale", "filter"]
        + ["samples_per_shard"]
    )
    assert list(Dataset(finished).schema.to_json()) == [
        "vocab", "specials", "text_tokenizer", "image_tokenizer", "image", "modalities", "roles", "segment_flags"
    ]  # fmt: skip


def test_short_captions_of_one_caption_only(inputs, tmp_path):
    captions = [["one. two."], ["one. two.", "three"], ["no stop"], ["one."]]
    lines = [{"image": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(inputs, tmp_path / "out", f"input.records={tmp_path / 'captions.jsonl'}", "extract.short_captions=true")
    expected = [["one.", "one. two."], ["one. two.", "three"], ["no stop"], ["one."]]
    assert [texts for texts, _ in contents(tmp_path / "out", 3)] == expected


def test_records_of_no_or_several_pictures_are_left_out(inputs, tmp_path):
    lines = [
        {"image": ["0.png", "1.png"], "caption": "two"},
        {"image": "../images/2.png", "caption": "outside"},
        {"image": "3.png", "caption": "one"},
    ]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(inputs, tmp_path / "out", f"input.records={tmp_path / 'captions.jsonl'}")
    entries = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert entries == [
        {"name": "captions.jsonl:1", "reason": "2 images; expected one"},
        {"name": "captions.jsonl:2", "reason": "path '../images/2.png' leads out of its folder"},
    ]
    assert [texts for texts, _ in contents(tmp_path / "out", 1)] == [["one"]]


def test_a_folder_without_captions(inputs, tmp_path, capsys):
    run(inputs, tmp_path / "out", "input.records=")
    assert "'0.png', no caption" in capsys.readouterr().out
    assert [texts for texts, _ in contents(tmp_path / "out", 3)] == [[]] * IMAGES


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_ranks(ranks, damaged, tmp_path):
    run(damaged, tmp_path / "one")
    run_ranks(ranks, run, damaged, tmp_path / "many")
    assert tree(tmp_path / "many") == tree(tmp_path / "one")
    assert (tmp_path / "one" / "skipped.jsonl").exists()


def test_threads_do_not_change_bytes(inputs, finished, tmp_path):
    run(inputs, tmp_path / "out", "input.threads=1")
    assert tree(tmp_path / "out") == tree(finished)


def test_bad_images_are_listed_and_counted(damaged, tmp_path, capsys):
    run(damaged, tmp_path / "out")
    assert "18 samples" in (said := capsys.readouterr().out)
    assert "5 records skipped (see " in said
    entries = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [e["name"] for e in entries] == [f"captions.jsonl:{i + 1}" for i in (2, 3, 9, 10, 22)]
    assert [e["reason"] for e in entries[:2]] == [
        f"{damaged / 'images/2.png'}: no such image file",
        f"{damaged / 'images/3.png'}: cannot read the image: the file is empty",
    ]
    assert all(e["reason"].startswith(f"{damaged}") for e in entries)
    dataset = Dataset(tmp_path / "out")
    assert dataset.manifest.skipped == 5
    kept = [stable_key(f"{i}.png") for i in range(IMAGES) if i not in (2, 3, 9, 10, 22)]
    assert dataset.keys(np.arange(len(dataset))).tolist() == kept


def test_too_many_bad_images(damaged, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"skipped.jsonl: \d of \d+ records .* expected at most 1 \(input.max_skipped\)"
    ):
        run(damaged, out, "input.max_skipped=1")
    assert not list(out.glob("manifest-*"))
    run(damaged, out, "input.max_skipped=5")  # the limit is not what a dataset is made of
    run(damaged, tmp_path / "undisturbed")
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_no_readable_image_at_all(inputs, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"23 of 23 records were skipped; expected at least one that is usable"):
        run(inputs, tmp_path / "out", f"input.images={tmp_path / 'images'}")
    assert not list((tmp_path / "out").glob("manifest-*"))


def test_repaired_images_are_taken_in_by_the_next_try(inputs, damaged, finished, tmp_path):
    with pytest.raises(ValueError, match=r"5 of 23 records"):
        run(damaged, tmp_path / "out", "input.max_skipped=4")
    shutil.rmtree(damaged / "images")
    shutil.copytree(inputs / "images", damaged / "images")
    run(damaged, tmp_path / "out", "input.max_skipped=4")
    assert tree(tmp_path / "out") == tree(finished)


KILLED = """
    import os, signal
    import vtrain.extract as extract
    from vtrain.data import build, writer
    from vtrain.config import load
    from vtrain.settings import ExtractSettings

    calls = 0
    def deadly(function, last):
        def wrapper(*args, **kwargs):
            global calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapper

    {patch}
    extract.main(load(ExtractSettings, None, {arguments!r}))
"""
PATCHES = {
    "inside a shard": "writer.ShardWriter.append_batch = deadly(writer.ShardWriter.append_batch, 8)",
    "between shard and note": "build.write_durably = deadly(build.write_durably, 3)",
    "before the manifest": "build.next_generation = deadly(build.next_generation, 1)",
}


@pytest.mark.parametrize(
    "moment",
    [
        "inside a shard",
        pytest.param("between shard and note", marks=pytest.mark.slow),
        pytest.param("before the manifest", marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(moment, damaged, tmp_path):
    out = tmp_path / "out"
    script = textwrap.dedent(KILLED).format(patch=PATCHES[moment], arguments=extract_arguments(damaged, out))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert result.returncode == -9, result.stderr.decode()
    assert not list(out.glob("manifest-*"))
    noted = [out / f"{path.stem.replace('unit', 'shard')}.vts" for path in (out / "progress").iterdir()]
    before = [path.stat().st_mtime_ns for path in noted]
    assert noted
    run(damaged, out)
    assert [path.stat().st_mtime_ns for path in noted] == before
    run(damaged, tmp_path / "undisturbed")
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_a_damaged_shard_is_made_again(damaged, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="max_skipped"):
        run(damaged, out, "input.max_skipped=4")
    shard = out / "shard-00001.vts"
    data = bytearray(shard.read_bytes())
    data[4100] ^= 1
    shard.write_bytes(data)
    (out / "shard-00002.vts").unlink()
    (out / "progress" / "unit-00003.json").write_bytes(b"{")
    run(damaged, out)
    run(damaged, tmp_path / "undisturbed")
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_a_second_run_does_nothing(inputs, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    run(inputs, finished)
    assert "complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("input.resolution=32", "resolution 16, now 32"),
        ("extract.samples_per_shard=6", "samples_per_shard 5, now 6"),
        ("input.filter=nearest", 'filter "bicubic", now "nearest"'),
        ('tokenizer.specials=["<|t2i|>"]', "vocab [["),
        ("input.crop=adm", 'crop null, now "adm"; filter "bicubic", now null'),
        ("extract.dtype=bf16", 'dtype null, now "bf16"'),
        ("tokenizer.fold=false", "fold null, now false"),
        ("extract.short_captions=true", "short_captions null, now true"),
        ("extract.caption_space=true", "caption_space null, now true"),
    ],
)
def test_other_settings_are_refused(override, said, inputs, finished, tmp_path):
    before = tree(finished)
    with pytest.raises(ValueError) as error:
        run(inputs, finished, override)
    assert said in str(error.value)
    assert str(finished / "extract.json") in str(error.value)
    assert tree(finished) == before


def test_a_dataset_of_before_these_keys_is_still_the_same(finished):
    """What extract.json and the schema have held from the first: further keys are there only where they are set."""
    keys = {"vocab", "specials", "text_tokenizer", "image_tokenizer", "resolution", "downscale", "filter",
            "input.kind", "input.records", "input.fields", "samples_per_shard"}  # fmt: skip
    assert json.loads((finished / "extract.json").read_text()).keys() == keys
    schema = Dataset(finished).schema.to_json()
    assert schema.keys() == {"vocab", "specials", "text_tokenizer", "image_tokenizer", "image", "modalities", "roles",
                             "segment_flags"}  # fmt: skip
    assert schema["image"] == {"resolution": 16, "downscale": 4, "filter": "bicubic"}


def test_another_tokenizer_and_other_captions_are_refused(inputs, finished, tmp_path):
    train_sentencepiece([*CAPTIONS, "abc"], 40, tmp_path / "other.model")
    with pytest.raises(ValueError, match="text_tokenizer"):
        run(inputs, finished, f"tokenizer.text={tmp_path / 'other.model'}")
    changed = (inputs / "captions.jsonl").read_text().replace("red", "green")
    (tmp_path / "captions.jsonl").write_text(changed)
    with pytest.raises(ValueError, match=r"input\.records"):
        run(inputs, finished, f"input.records={tmp_path / 'captions.jsonl'}")


def test_a_foreign_dataset_is_not_touched(inputs, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "foreign")
    (tmp_path / "foreign" / "extract.json").unlink()
    with pytest.raises(ValueError, match=r"not made by vtrain\.extract"):
        run(inputs, tmp_path / "foreign")


def test_mistakes_are_one_line_and_exit_code_2(inputs, tmp_path, capsys):
    (tmp_path / "broken.jsonl").write_text('{"image": "0.png", "caption": "x"}\n{"image": \n')
    cases = {
        f"input.records={tmp_path / 'broken.jsonl'}": f"error: {tmp_path / 'broken.jsonl'}:2: not JSON",
        "input.resolution=18": "error: input.resolution is 18; expected a multiple of 4 pixels",
        f"tokenizer.text={tmp_path / 'none.model'}": f"error: {tmp_path / 'none.model'}: no such text tokenizer file",
        "extract.sample_per_shard=4": "did you mean extract.samples_per_shard?",
    }
    for override, said in cases.items():
        with pytest.raises(SystemExit) as stopped:
            run_command(ExtractSettings, main, extract_arguments(inputs, tmp_path / "out", override))
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_names_and_captions_that_no_terminal_shows_are_described(inputs, tmp_path, capsys):
    lines = tmp_path / "odd.jsonl"
    lines.write_text(json.dumps({"image": "\ud800.png", "caption": "\ud800" + "x" * 10_000}) + "\n")
    arguments = extract_arguments(inputs, tmp_path / "out", f"input.records={lines}")
    run_command(ExtractSettings, main, [*arguments, "--dry-run"])
    said = capsys.readouterr().out
    said.encode()
    assert r"first: 'odd.jsonl:1', '\ud800xxx" in said
    assert max(map(len, said.splitlines())) < 1000


def test_dry_run_writes_nothing(inputs, tmp_path, capsys):
    run_command(ExtractSettings, main, [*extract_arguments(inputs, tmp_path / "out"), "--dry-run"])
    said = capsys.readouterr().out
    assert "23 images" in said
    assert "5 shards" in said
    assert "'a red square' -> [" in said
    assert not (tmp_path / "out").exists()
