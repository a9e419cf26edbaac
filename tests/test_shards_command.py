"""`python -m vtrain.shards`: what it prints, what it draws, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from shard_model import Sample, overwrite, write_shard

from vtrain.data import manifest
from vtrain.data.format import SEGMENT, Modality, Role, Schema, SegmentFlag, read_pages
from vtrain.data.reader import Dataset, Shard
from vtrain.data.twins import FeatureWriter
from vtrain.data.writer import ShardWriter
from vtrain.inspection import decode_pictures
from vtrain.shards import main
from vtrain.text import load_text_tokenizer, train_sentencepiece
from vtrain.visual import ImageTokenizer, load_image_tokenizer
from vtrain.visual.preprocess import to_uint8
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig
from vtrain.vocab import Vocabulary

CAPTIONS = [f"a picture of the digit {word}" for word in ("zero", "one", "two", "three", "four")]
CONFIG = AutoencoderConfig(
    resolution=8,
    base_channels=8,
    channel_multiplier=(1, 1),
    num_res_blocks=1,
    latent_channels=8,
    attention=False,
    embed_dim=4,
    num_embeddings=16,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, codes [5,4,4]): five captioned pictures in two shards, and both tokenizers."""
    folder = tmp_path_factory.mktemp("shards") / "digits"
    folder.mkdir()
    train_sentencepiece(CAPTIONS * 5, 60, folder.parent / "text.model")
    text = load_text_tokenizer(folder.parent / "text.model")
    text.save(folder / "text_tokenizer")
    torch.manual_seed(0)
    image = ImageTokenizer(Autoencoder(CONFIG))
    image.save(folder / "image_tokenizer")
    vocab = Vocabulary.of(text=text.vocab_size, visual=image.num_codes)
    schema = Schema(vocab, {"<|soi|>": text.special_id("<|soi|>")}, text.sha256, image.sha256, {"resolution": 8})
    codes = torch.randint(0, 16, (5, 4, 4))
    found = []
    for n, caption in enumerate(CAPTIONS):
        ids = text.encode(caption)
        segments = [(0, Modality.TEXT, Role.INPUT, 3, 0, 0, 0, 0, 0), (len(ids), 1, Role.TARGET, 0, 0, 1, 4, 4, 0)]
        picture = (codes[n].flatten() + vocab["visual"].base).tolist()
        found.append(Sample(100 + n, ids + picture, segments, [(len(ids), 0), (16, 1)]))
    infos = [write_shard(folder / f"{k}.vts", schema, part) for k, part in enumerate((found[:2], found[2:]))]
    manifest.publish(folder, schema, infos, skipped=4)
    return folder, codes


@pytest.fixture
def dataset(made, tmp_path):
    """A copy to spoil."""
    subprocess.run(["cp", "-r", str(made[0]), str(tmp_path / "digits")], check=True)
    return tmp_path / "digits"


def test_inspect_shows_schema_lengths_and_captions(made, tmp_path, capsys):
    folder, _ = made
    assert main(["inspect", str(folder), "--out", str(tmp_path / "sheet.png"), "--count", "4"]) == 0
    shown = capsys.readouterr().out
    found = Dataset(folder)
    expected = [
        f"5 samples, {found.tokens} tokens, shards: 2",
        found.hash,
        "4 records skipped",
        f"ids 0..{found.schema.vocab['text'].end - 1} ({found.schema.vocab['text'].size})",
        f"<|soi|>={found.schema.specials['<|soi|>']}",
        found.schema.text_tokenizer,
        found.schema.image_tokenizer,
        "resolution=8",
        "u16",
        "key 0x0000000000000066",
        "target image, variant 0, 16 tokens, grid 1 x 4 x 4",
        "input text, variant 3",
        "2 loss runs",
        *(repr(caption) for caption in CAPTIONS[:4]),
        "4 pictures: ",
    ]
    assert [line for line in expected if line not in shown] == []
    assert CAPTIONS[4] not in shown
    histogram = [line.split() for line in shown.splitlines() if line.endswith("#")]
    assert sum(int(row[1]) for row in histogram) == 5


def test_the_contact_sheet_holds_the_decoded_pictures(made, tmp_path):
    folder, codes = made
    assert main(["inspect", str(folder), "--out", str(tmp_path / "sheet.png")]) == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    truth = to_uint8(load_image_tokenizer(folder / "image_tokenizer").decode(codes))
    rows = {bytes(sheet[y, x : x + 96]) for y in range(0, sheet.shape[0]) for x in range(0, sheet.shape[1] - 95, 8)}
    for picture in truth:
        assert {bytes(line) for line in picture.repeat(12, axis=1)} <= rows


def test_frames_stand_side_by_side_and_merged_pictures_are_left_out(made, tmp_path):
    folder, codes = made
    schema, base = Dataset(folder).schema, Dataset(folder).schema.vocab["visual"].base
    video = (codes[:2].flatten() + base).tolist()
    segments = [
        (0, Modality.VIDEO, Role.TARGET, 0, 0, 2, 4, 4, 0),
        (32, Modality.IMAGE, Role.TARGET, 0, SegmentFlag.MERGED, 1, 4, 4, 0),
        (40, Modality.IMAGE, Role.TARGET, 0, 0, 0, 0, 0, 0),
    ]
    write_shard(tmp_path / "a.vts", schema, [Sample(1, video + video[:8] + video[:3], segments), Sample(2, [])])
    image = load_image_tokenizer(folder / "image_tokenizer")
    (picture,) = decode_pictures(Shard(tmp_path / "a.vts"), 0, image)
    assert np.array_equal(picture, np.concatenate(list(to_uint8(image.decode(codes[:2]))), axis=1))
    assert decode_pictures(Shard(tmp_path / "a.vts"), 1, image) == []


def test_inspect_does_without_tokenizers(made, tmp_path, capsys):
    source = made[0] / "1.vts"
    (tmp_path / "1.vts").write_bytes(source.read_bytes())
    assert main(["inspect", str(tmp_path / "1.vts"), "--out", str(tmp_path / "sheet.png")]) == 0
    shown = capsys.readouterr().out
    assert "no contact sheet" in shown
    assert "ids " in shown
    assert not (tmp_path / "sheet.png").exists()


def test_verify_says_ok_or_names_every_problem(dataset, capsys):
    assert main(["verify", str(dataset)]) == 0
    assert "ok, no problem" in capsys.readouterr().out
    assert main(["verify", str(dataset / "0.vts")]) == 0
    capsys.readouterr()
    overwrite(dataset / "1.vts", read_pages(dataset / "1.vts")[0].sections["KEY"].offset, b"\xff")
    assert main(["verify", str(dataset)]) == 1
    shown = capsys.readouterr().out
    assert "section KEY: crc32c" in shown
    assert "block 0" in shown
    assert "2 problems" in shown
    assert "0.vts:" not in shown


def test_verify_looks_at_the_tokenizers_too(dataset, capsys):
    torch.manual_seed(1)
    ImageTokenizer(Autoencoder(CONFIG)).save(dataset / "image_tokenizer")
    (dataset / "text_tokenizer" / "tokenizer.model").unlink()
    assert main(["verify", str(dataset)]) == 1
    shown = capsys.readouterr().out
    assert f"{dataset / 'image_tokenizer'}: sha256" in shown
    assert "text_tokenizer" in shown
    assert "2 problems" in shown


def test_inspect_tells_when_a_tokenizer_is_not_the_one_of_the_shards(dataset, tmp_path, capsys):
    torch.manual_seed(1)
    ImageTokenizer(Autoencoder(CONFIG)).save(dataset / "image_tokenizer")
    assert main(["inspect", str(dataset), "--out", str(tmp_path / "sheet.png")]) == 0
    assert f"problem: {dataset / 'image_tokenizer'}: sha256" in capsys.readouterr().out


WRONG = {
    "verify": ["verify", "{nowhere}"],
    "inspect": ["inspect", "{nowhere}"],
    "stats": ["stats", "{nowhere}"],
    "build": ["build", "{nowhere}"],
    "append": ["append", "{new}", "{nowhere}"],
    "append from": ["append", "{new}", "--from", "{nowhere}"],
    "merge": ["merge", "{data}", "{nowhere}", "--out", "{new}"],
    "exclude": ["exclude", "{nowhere}", "--samples", "1"],
    "exclude keys": ["exclude", "{data}", "--keys", "{nowhere}"],
    "exclude block": ["exclude", "{data}", "--shard", "nowhere.vts", "--block", "0"],
    "shuffle": ["shuffle", "{nowhere}", "--out", "{new}"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_path_is_one_line_and_exit_code_2(name, made, tmp_path, capsys):
    places = {"nowhere": tmp_path / "nowhere", "new": tmp_path / "new", "data": made[0]}
    assert main([argument.format(**places) for argument in WRONG[name]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nowhere" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert Dataset(made[0]).manifest.generation == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exclude", "{data}", "--samples", "4-9"], "sample 9; the dataset has 5"),
        (["exclude", "{data}", "--samples", "x"], "expected numbers and spans"),
        (["exclude", "{data}", "--shard", "0.vts"], "needs --block N"),
        (["exclude", "{data}", "--shard", "0.vts", "--block", "7"], "no block 7"),
        (["stats", "{data}", "--pack-tokens", "0"], "pack_tokens: 0"),
        (["append", "{data}", "--from", "{data}/0.vts"], "0.vts"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(made, capsys, arguments, message):
    assert main([argument.format(data=made[0]) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_interrupt_is_exit_code_130(made, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vtrain.shards.measure", interrupt)
    assert main(["stats", str(made[0])]) == 130


def test_a_dataset_is_built_appended_to_merged_and_shuffled(dataset, tmp_path, capsys):
    """Adopt the shards without the manifest, append one, merge with a copy of the rest; pictures stay readable."""
    for path in dataset.glob("manifest-*"):
        path.unlink()
    (dataset / "1.vts").rename(tmp_path / "later.vts")
    (dataset / f".tmp-{'a' * 32}").write_bytes(b"dead")
    assert main(["build", str(dataset), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "adopted: 0.vts" in shown
    assert f"removed: .tmp-{'a' * 32}" in shown
    assert "generation 1, 2 samples in 1 shards" in shown
    assert main(["append", str(dataset), str(tmp_path / "later.vts")]) == 0
    shown = capsys.readouterr().out
    assert "generation 2, 5 samples in 2 shards" in shown
    assert "nothing new" not in shown
    assert main(["append", str(dataset), str(tmp_path / "later.vts")]) == 0
    assert "nothing new: the dataset has these shards already" in capsys.readouterr().out
    assert (dataset / "later.vts").samefile(tmp_path / "later.vts")
    assert main(["shuffle", str(dataset), "--out", str(tmp_path / "b"), "--seed", "3", "--samples-per-shard", "4"]) == 0
    assert main(["merge", str(dataset), str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    assert "generation 1, 10 samples in 4 shards" in capsys.readouterr().out
    assert main(["append", str(tmp_path / "d"), "--from", str(dataset), "--copy"]) == 0
    keys = Dataset(tmp_path / "c").keys(np.arange(10)).tolist()
    assert keys[:5] == [100, 101, 102, 103, 104]
    assert sorted(keys[5:]) == keys[:5]
    capsys.readouterr()
    for folder in ("c", "d"):
        assert main(["verify", str(tmp_path / folder)]) == 0
    assert main(["inspect", str(tmp_path / "c"), "--out", str(tmp_path / "sheet.png")]) == 0
    assert "10 pictures" in capsys.readouterr().out


def test_build_tells_what_it_leaves_out(dataset, capsys):
    (dataset / "2.vts").write_bytes((dataset / "0.vts").read_bytes()[:8192])
    assert main(["build", str(dataset)]) == 1
    assert f"problem: {dataset / '2.vts'}" in capsys.readouterr().out


def test_samples_are_excluded_and_taken_back(dataset, tmp_path, capsys):
    (tmp_path / "keys").write_text("0x68\n101\n")
    for arguments, change, ranges in (
        (["--samples", "0"], "1 samples more are excluded", [[0, 1]]),
        (["--keys", str(tmp_path / "keys")], "2 samples more are excluded", [[0, 2], [4, 5]]),
        (["--samples", "0-1", "--include"], "2 samples taken back", [[4, 5]]),
        (["--shard", "0.vts", "--block", "0"], "2 samples more are excluded", [[0, 2], [4, 5]]),
    ):
        assert main(["exclude", str(dataset), *arguments]) == 0
        assert change in capsys.readouterr().out
        assert Dataset(dataset).manifest.excluded.tolist() == ranges
    assert main(["inspect", str(dataset), "--out", str(tmp_path / "sheet.png")]) == 0
    shown = capsys.readouterr().out
    assert "3 samples excluded" in shown
    assert "2 pictures" in shown
    assert CAPTIONS[0] not in shown


def test_damage_is_excluded_from_verify(dataset, capsys):
    overwrite(dataset / "1.vts", 4096, b"\xff\xff")
    assert main(["exclude", str(dataset), "--from-verify"]) == 0
    assert "3 samples more are excluded" in capsys.readouterr().out
    overwrite(dataset / "0.vts", 100, b"\xff")
    assert main(["exclude", str(dataset), "--from-verify"]) == 1
    assert "problem: " in capsys.readouterr().out


def test_stats_prints_draws_and_gives_json(made, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    assert main(["stats", str(made[0]), "--pack-tokens", "64", "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    found = Dataset(made[0])
    for part in (f"tokens           {found.tokens}", "target image", "fill %", f"plot: {plot}"):
        assert part in shown
    assert Image.open(plot).size[0] > 1000
    assert main(["stats", str(made[0]), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["modalities"]["image"] == 80
    assert len(read["forecasts"]) == 3


def test_a_dataset_is_exported(made, tmp_path, capsys):
    arguments = ["export", "simplear", str(made[0]), "--out", str(tmp_path), "--name", "d", "--root", "there"]
    assert main(arguments) == 0
    meta = tmp_path / "d_8_5_meta.json"
    assert capsys.readouterr().out == f"{meta}: 5 pictures\n"
    entries = json.loads(meta.read_text())
    assert entries[4] == {"code_path": "there/d/8_codes/4.npy", "label_path": "there/d/8_labels/4.npy"}
    assert np.array_equal(np.load(tmp_path / "d/8_codes/4.npy")[0, 0], made[1][4])
    assert (tmp_path / "d/8_labels/4.npy").read_text() == CAPTIONS[4]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{meta}: 5 pictures: complete already\n"
    assert main([*arguments, "--resolution", "16"]) == 2
    assert capsys.readouterr().err.startswith("error: export simplear: resolution is 16; ")


def test_every_command_teaches(capsys):
    names = ["inspect", "stats", "verify", "import", "export", "build", "append", "merge", "exclude", "shuffle"]
    for command in ([], *([name] for name in names)):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) > 8


def test_inspect_tells_columns_labels_and_twins(tmp_path, capsys):
    schema = Schema(Vocabulary.of(text=40), columns={"score": "<f4"}, labels=True)
    segments = np.zeros(1, dtype=SEGMENT)
    with ShardWriter(tmp_path / "a.vts", schema, uuid=b"a" * 16) as writer:
        one = np.array([0, 1])
        writer.append_batch(
            np.array([7, 8]), np.array([0, 2]), segments, one, keys=np.array([9], np.uint64), labels=np.array([8, 9]),
            columns={"score": np.ones(1, dtype=np.float32)},
        )  # fmt: skip
    with FeatureWriter(tmp_path / "a.clip.vtf", tmp_path / "a.vts", "clip", dim=3, dtype="f2", producer="x") as twin:
        twin.append(np.zeros((2, 3), dtype=np.float32), np.array([2]))
    listed = {"kind": "features", "dim": 3, "dtype": "f2", "producer": "x", "files": [twin.info]}
    manifest.publish(tmp_path, schema, [writer.info], twins={"clip": listed})
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for part in ("score:<f4", "labels           stored", "features, rows of 3 f2, for 1 of 1 shards, by 'x'"):
        assert part in shown
    assert main(["verify", str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path / "a.clip.vtf")]) == 0


def test_inspect_refuses_a_broken_shard(dataset, capsys):
    (dataset / "0.vts").write_bytes((dataset / "0.vts").read_bytes()[:8000])
    assert main(["inspect", str(dataset)]) == 2
    assert "0.vts: file: 8000 bytes" in capsys.readouterr().err


def test_the_command_runs_as_a_module(dataset):
    (dataset / "0.vts").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "vtrain.shards", "verify", str(dataset)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "0.vts: file: missing" in done.stdout


def test_a_reader_that_stops_early_is_no_error(dataset, monkeypatch):
    """`shards inspect ... | head -1`: the reader is gone before the last byte comes."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:  # what is still buffered when it is closed must not fail, either
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["inspect", str(dataset), "--count", "0"]) == 0
