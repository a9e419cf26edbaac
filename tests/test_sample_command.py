"""The sample command on a tiny model folder: the tree it writes, any number of ranks, and what it refuses."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from vtrain import sample
from vtrain.config import load as load_settings
from vtrain.config import run_command
from vtrain.generate import job as job_module
from vtrain.generate.benchmarks import write_sheet
from vtrain.generate.engine import generate
from vtrain.generate.job import Job, Model, make_pictures, open_folder
from vtrain.generate.sampler import Sampling
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.models.hf import export_hf, read_vocabulary
from vtrain.rng import fold
from vtrain.sample import OPTIONS, load_model, main
from vtrain.settings import SampleSettings
from vtrain.text import load_text_tokenizer, train_sentencepiece
from vtrain.visual import ImageTokenizer
from vtrain.visual.preprocess import to_uint8
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig
from vtrain.vocab import Vocabulary

PROMPTS = ["the digit three", "a seven", "the digit one, drawn twice"]
CODES = 12


def save_decoder(folder: Path, vocab: Vocabulary) -> None:
    shape = DecoderConfig(layers=2, hidden=32, heads=2, kv_heads=1, ffn=48, max_positions=96, init_std=0.3)
    decoder = Decoder(shape, vocab)
    export_hf(decoder.state_dict().items(), shape, vocab, folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A model folder as pretrain leaves it, with random weights: pictures of 16 pixels, 4 x 4 codes."""
    root = tmp_path_factory.mktemp("model")
    folder = root / "final"
    train_sentencepiece(PROMPTS, 40, root / "text.model")
    text = load_text_tokenizer(root / "text.model")
    save_decoder(folder, Vocabulary.of(text=text.vocab_size, visual=CODES))
    text.save(folder / "text_tokenizer")
    config = AutoencoderConfig(
        resolution=16, base_channels=8, channel_multiplier=(1, 1, 1), num_res_blocks=1, latent_channels=4,
        attention=False, embed_dim=4, num_embeddings=CODES,
    )  # fmt: skip
    torch.manual_seed(0)
    autoencoder = Autoencoder(config)
    weights = {name: torch.randn_like(tensor) * 0.3 for name, tensor in autoencoder.weights().items()}
    autoencoder.load_weights(weights)
    ImageTokenizer(autoencoder).save(folder / "image_tokenizer")
    return folder


@pytest.fixture
def broken(model_folder, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "broken"))


def settings(model: Path, out: Path, *overrides: str, texts=PROMPTS) -> SampleSettings:
    base = [f"run.out={out}", f"model.path={model}", "run.device=cpu", "sample.per_prompt=3", "sample.batch_size=4"]
    prompts = [f"prompts.texts={json.dumps(texts)}"] if texts else []
    return load_settings(SampleSettings, None, [*base, *prompts, *overrides])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def codes_of(model: Model, prompt: str, number: int, sample: int, negative: str = "", **options) -> torch.Tensor:
    """The codes [1, h, w] of one sample, drawn alone."""
    text, vocab = model.text, model.decoder.vocab
    t2i, soi = text.special_id("<|t2i|>"), text.special_id("<|soi|>")
    ids = generate(
        model.decoder,
        [[t2i, *text.encode(prompt), soi]],
        [fold(0, number, sample)],
        steps=model.grid[0] * model.grid[1],
        uncond_prompts=[[t2i, *(text.encode(negative) if negative else ()), soi]],
        **options,
    )
    return (ids - vocab["visual"].base).view(1, *model.grid)


def assert_shows(path: Path, model: Model, codes: torch.Tensor) -> None:
    """Another batch size rounds matrix products differently: one grey level at most."""
    difference = np.asarray(Image.open(path)).astype(int) - to_uint8(model.image.decode(codes))[0]
    assert np.abs(difference).max() <= 1


def test_writes_the_tree_of_pictures(model_folder, tmp_path, capsys):
    main(settings(model_folder, tmp_path / "out", "sample.cfg=2.0", "run.seed=5"))
    files = tree(tmp_path / "out")
    expected = {"grid.png", "sampling.json"}
    for i in range(3):
        expected |= {f"{i:05d}/metadata.jsonl", *(f"{i:05d}/samples/{k:05d}.png" for k in range(3))}
    assert set(files) == expected
    assert str(tmp_path / "out" / "grid.png") in capsys.readouterr().out
    model = load_model(model_folder)
    assert model.grid == (4, 4)
    for i, prompt in enumerate(PROMPTS):
        assert json.loads(files[f"{i:05d}/metadata.jsonl"]) == {"prompt": prompt}
        for k in range(3):
            path = tmp_path / "out" / f"{i:05d}" / "samples" / f"{k:05d}.png"
            assert_shows(path, model, codes_of(model, prompt, i, k, cfg=2.0, seed=5))
    assert len({files[f"{i:05d}/samples/{k:05d}.png"] for i in range(3) for k in range(3)}) == 9


def test_every_key_of_sampling_reaches_the_engine(model_folder, tmp_path):
    """Prefix, negative prompt and penalty; each of them changes the codes."""
    keys = ["sample.per_prompt=1", "sample.cfg=2.5", "sample.temperature=0.9", "sample.top_k=9", "sample.top_p=0.95"]
    options = {"cfg": 2.5, "temperature": 0.9, "top_k": 9, "top_p": 0.95}
    more = ['prompts.prefixes=["a digit "]', "sample.negative=one one", "sample.repetition_penalty=1.7"]
    main(settings(model_folder, tmp_path / "out", *keys, *more))
    model = load_model(model_folder)
    seen = {"negative": "one one", "repetition_penalty": 1.7}
    for i, prompt in enumerate(PROMPTS):
        drawn = codes_of(model, f"a digit {prompt}", i, 0, **options, **seen)
        assert_shows(tmp_path / "out" / f"{i:05d}/samples/00000.png", model, drawn)
        entry = json.loads((tmp_path / "out" / f"{i:05d}/metadata.jsonl").read_text())
        assert entry == {"prompt": prompt, "prefix": "a digit "}
    without = [
        codes_of(model, PROMPTS[0], 0, 0, **options, **seen),
        codes_of(model, f"a digit {PROMPTS[0]}", 0, 0, **options, repetition_penalty=1.7),
        codes_of(model, f"a digit {PROMPTS[0]}", 0, 0, **options, negative="one one"),
    ]
    whole = codes_of(model, f"a digit {PROMPTS[0]}", 0, 0, **options, **seen)
    assert not any(torch.equal(whole, other) for other in without)


def test_few_large_pictures_are_decoded_at_a_time(model_folder, tmp_path, monkeypatch, finished):
    sizes = []
    decode = ImageTokenizer.decode
    monkeypatch.setattr(ImageTokenizer, "decode", lambda self, ids: sizes.append(len(ids)) or decode(self, ids))
    monkeypatch.setattr(job_module, "_DECODED_PIXELS", 3 * 16 * 16 + 1)
    main(settings(model_folder, tmp_path / "out"))
    assert sizes == [3, 1, 3, 1, 1]
    assert tree(tmp_path / "out").keys() == tree(finished).keys()


def damage(out: Path) -> None:
    """Two files of the first batch of four samples, one of the last."""
    (out / "00000/samples/00001.png").unlink()
    (out / "00001/samples/00000.png").write_bytes((out / "00001/samples/00000.png").read_bytes()[:60])
    Image.new("RGB", (8, 8)).save(out / "00002/samples/00002.png")


@pytest.mark.parametrize("batch_size", [4, 3])
def test_a_rerun_keeps_what_is_whole_and_makes_the_rest_anew(model_folder, tmp_path, capsys, batch_size):
    out = tmp_path / "out"
    main(settings(model_folder, out))
    first = tree(out)
    damage(out)
    inodes = {path: path.stat().st_ino for path in out.rglob("*.png")}
    capsys.readouterr()
    main(settings(model_folder, out, f"sample.batch_size={batch_size}"))
    assert tree(out) == first
    assert "3 files written, 6 kept" in capsys.readouterr().out
    renewed = {path.relative_to(out).as_posix() for path, inode in inodes.items() if path.stat().st_ino != inode}
    assert renewed == {"grid.png", "00001/samples/00000.png", "00002/samples/00002.png"}


def test_a_finished_run_draws_nothing(model_folder, tmp_path, monkeypatch):
    main(settings(model_folder, tmp_path / "out"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    monkeypatch.setattr(job_module, "generate", None)
    main(settings(model_folder, tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("run.seed=1", "run.seed 0, now 1"),
        ("sample.cfg=1.5", "sample.cfg 1.0, now 1.5"),
        ("sample.negative=x", "sample.negative '', now 'x'"),
        ("sample.per_prompt=4", "sample.per_prompt 3, now 4"),
        ("sample.repetition_penalty=1.1", "sample.repetition_penalty 1.0, now 1.1"),
        ("model.resolution=24", r"codes \[4, 4\], now \[6, 6\]"),
        ('prompts.texts=["another"]', r"prompts '\w{8}', now '\w{8}'"),
        ('prompts.prefixes=["a "]', r"prompts '\w{8}', now '\w{8}'"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_other_settings_in_the_same_folder_are_refused(model_folder, finished, key, message, dry_run):
    before = tree(finished)
    with pytest.raises(ValueError, match=rf"sampling.json: made with {message}.*; take another run.out, or delete"):
        main(settings(model_folder, finished, key), dry_run=dry_run)
    assert tree(finished) == before


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory) -> Path:
    """A finished run, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    main(settings(model_folder, out))
    return out


def test_another_model_in_the_same_folder_is_refused(broken, finished):
    before = tree(finished)
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[-4] ^= 1  # the lowest bit of one number
    (broken / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"sampling.json: made with decoder '\w+', now '\w+'; take another"):
        main(settings(broken, finished))
    assert tree(finished) == before


def test_pictures_of_unknown_origin_are_neither_kept_nor_replaced(model_folder, tmp_path):
    out = tmp_path / "out"
    (out / "00001/samples").mkdir(parents=True)
    (out / "00001/samples/00002.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"00001/samples/00002.png is there, but no sampling.json"):
        main(settings(model_folder, out))
    assert tree(out) == {"00001/samples/00002.png": b"mine"}
    (out / "sampling.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sampling.json: not what vtrain.sample writes"):
        main(settings(model_folder, out))


@pytest.mark.parametrize("bench", ["", "dpg"])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_together_make_what_one_makes(model_folder, tmp_path, bench, ranks):
    """Each rank's share in turn: with 7 ranks for 3 batches, some have nothing. No file is made twice."""
    entries = [{"prompt": prompt, "name": f"n{i}"} for i, prompt in enumerate(PROMPTS)]
    job = Job(load_model(model_folder), entries, tmp_path / "one", Sampling(cfg=1.5), 4, 5, bench)
    many = replace(job, out=tmp_path / "many")
    for one in (job, many):
        open_folder(one)
    made = [make_pictures(many, rank, ranks) for rank in reversed(range(ranks))]
    assert sum(made) == make_pictures(job) == (3 if bench else 12)
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_real_ranks_write_identical_files_also_when_they_resume(model_folder, tmp_path):
    keys = ["sample.cfg=3.0", "sample.per_prompt=4", f"prompts.file={dpg_folder(tmp_path)}"]
    for out in ("one", "two"):
        call = settings(model_folder, tmp_path / out, *keys, texts=None)
        run_ranks(2, run_dpg, call) if out == "two" else run_dpg(call)
    expected = tree(tmp_path / "one")
    assert {name for name in expected if name.startswith("images/")} == {f"images/{name}.jpg" for name in NAMES}
    assert tree(tmp_path / "two") == expected
    (tmp_path / "one/images/b2.jpg").unlink()
    run_ranks(2, run_dpg, settings(model_folder, tmp_path / "one", *keys, texts=None))
    assert tree(tmp_path / "one") == expected


NAMES = ("a1", "b2", "c3")


def dpg_folder(folder: Path) -> Path:
    """PROMPTS as DPG-Bench has its own."""
    (folder / "prompts").mkdir()
    for name, prompt in zip(NAMES, PROMPTS):
        (folder / "prompts" / f"{name}.txt").write_text(prompt)
    return folder / "prompts"


def run_dpg(call: SampleSettings) -> None:
    main(call, bench="dpg")


def test_dpg_has_the_samples_of_a_plain_run(model_folder, tmp_path):
    four = ["sample.per_prompt=4"]
    main(settings(model_folder, tmp_path / "plain", *four))
    main(
        settings(model_folder, tmp_path / "dpg", *four, f"prompts.file={dpg_folder(tmp_path)}", texts=None), bench="dpg"
    )
    assert set(tree(tmp_path / "dpg")) == {"grid.png", "sampling.json", *(f"images/{name}.jpg" for name in NAMES)}
    for i, name in enumerate(NAMES):
        samples = [np.asarray(Image.open(tmp_path / f"plain/{i:05d}/samples/{k:05d}.png")) for k in range(4)]
        expected = np.block([[[samples[0]], [samples[1]]], [[samples[2]], [samples[3]]]])
        image = Image.open(tmp_path / f"dpg/images/{name}.jpg")
        written = io.BytesIO()
        Image.fromarray(expected).save(written, format="jpeg", quality=95, subsampling=0)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(written)))


def test_geneval_keeps_the_objects_of_its_prompts(model_folder, tmp_path):
    entry = {"tag": "counting", "include": [{"class": "seven", "count": 1}], "prompt": "a seven"}
    (tmp_path / "p.jsonl").write_text(json.dumps(entry) + "\n" + json.dumps({**entry, "prompt": "a"}) + "\n")
    call = settings(model_folder, tmp_path / "out", f"prompts.file={tmp_path}/p.jsonl", texts=None)
    main(call, bench="geneval")
    assert json.loads((tmp_path / "out/00000/metadata.jsonl").read_text()) == entry
    assert len(list((tmp_path / "out").glob("0000?/samples/0000?.png"))) == 6
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match=r"p.jsonl: line 1: found .*GenEval's `tag`"):
        main(settings(model_folder, tmp_path / "no", f"prompts.file={tmp_path}/p.jsonl", texts=None), bench="geneval")
    assert not (tmp_path / "no").exists()


def test_what_a_benchmark_refuses(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"--bench is 'genval'; expected geneval or dpg"):
        main(settings(model_folder, tmp_path / "out"), bench="genval")
    with pytest.raises(ValueError, match=r"--bench is ''; expected geneval or dpg"):
        main(settings(model_folder, tmp_path / "out"), summary="r.jsonl")
    with pytest.raises(ValueError, match=r"--bench dpg: prompts.texts is set; expected prompts.file"):
        main(settings(model_folder, tmp_path / "out"), bench="dpg")
    call = settings(model_folder, tmp_path / "out", f"prompts.file={dpg_folder(tmp_path)}", texts=None)
    with pytest.raises(ValueError, match=r"sample.per_prompt is 3; expected 4"):
        main(call, bench="dpg")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("killed_at", [1, 4, 8])
def test_a_killed_run_goes_on(model_folder, tmp_path, monkeypatch, finished, killed_at):
    """An error while any file is written; what an uninterrupted run wrote comes out."""
    numbers = count(1)

    def dies(*arguments):
        if next(numbers) >= killed_at:
            raise OSError(28, "No space left on device")
        return write_sheet(*arguments)

    monkeypatch.setattr(job_module, "write_sheet", dies)
    with pytest.raises(OSError, match="No space left"):
        main(settings(model_folder, tmp_path / "out"))
    assert len(list((tmp_path / "out").rglob("*.png"))) == killed_at - 1
    monkeypatch.undo()
    main(settings(model_folder, tmp_path / "out"))
    assert tree(tmp_path / "out") == tree(finished)


def test_summary_from_the_shell(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "load_model", None)  # nothing is drawn
    entry = {"tag": "counting", "include": [], "prompt": "x"}
    line = {"filename": "a.png", "tag": "counting", "prompt": "x", "correct": True, "metadata": json.dumps(entry)}
    for seed in range(2):
        (tmp_path / f"r{seed}.jsonl").write_text(json.dumps({**line, "correct": seed == 0}) + "\n")
    shell = ["--cfg", "simplear/geneval", "--bench", "geneval", "--summary", f"{tmp_path}/r?.jsonl", "run.device=cpu"]
    run_command(SampleSettings, main, [*shell, "--dry-run"], options=OPTIONS)
    assert not (tmp_path / "scores.json").exists()
    capsys.readouterr()
    run_command(SampleSettings, main, shell, options=OPTIONS)
    printed = capsys.readouterr().out
    assert re.search(r"^overall +0\.50000  \+- 0\.70711", printed, re.MULTILINE)
    assert f"written to {tmp_path}/scores.json" in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["scores"]["counting"]["values"] == [1.0, 0.0]
    assert {path.name for path in tmp_path.iterdir()} == {"r0.jsonl", "r1.jsonl", "scores.json"}


def test_a_wrong_model_is_one_line_and_exit_code_2(tmp_path):
    keys = [f"run.out={tmp_path}/out", f"model.path={tmp_path}/nowhere", 'prompts.texts=["x"]', "run.device=cpu"]
    done = subprocess.run([sys.executable, "-m", "vtrain.sample", *keys], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: model.path {tmp_path}/nowhere: no such folder; expected the final/ folder of a vtrain.pretrain run"
    )
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_no_numbers_is_named(broken, tmp_path):
    vocab = read_vocabulary(broken)
    decoder = load_model(broken).decoder
    decoder.norm.fill_(float("nan"))
    export_hf(decoder.state_dict().items(), decoder.config, vocab, tmp_path / "nan")
    shutil.copy(tmp_path / "nan/model.safetensors", broken)
    with pytest.raises(ValueError, match=r"model.path .*broken: generate: the decoder's logits are not finite"):
        main(settings(broken, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.png"))


def test_dry_run_says_the_plan_and_what_is_there(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(settings(model_folder, out), dry_run=True)
    assert "3 prompts x 3 pictures of 4 x 4 codes, 9 files" in capsys.readouterr().out
    assert not out.exists()
    main(settings(model_folder, out))
    damage(out)
    before = tree(out)
    capsys.readouterr()
    main(settings(model_folder, out), dry_run=True)
    assert "6 files are there, 3 to be made" in capsys.readouterr().out
    assert tree(out) == before


def test_the_resolution_is_what_the_model_was_trained_on(broken, tmp_path):
    path = broken / "vocabulary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image": {"resolution": 24, "downscale": 4}}))
    assert load_model(broken).grid == (6, 6)
    assert load_model(broken, resolution=8).grid == (2, 2)


def test_another_resolution_changes_the_grid_of_codes(model_folder, tmp_path):
    main(settings(model_folder, tmp_path / "out", "model.resolution=24", "sample.per_prompt=1"))
    assert Image.open(tmp_path / "out/00000/samples/00000.png").size == (24, 24)
    with pytest.raises(ValueError, match=r"model.resolution is 18; expected a multiple of 4 pixels"):
        load_model(model_folder, resolution=18)


@pytest.mark.parametrize("part", ["vocabulary.json", "text_tokenizer", "image_tokenizer"])
def test_a_folder_with_a_part_missing_is_refused(broken, part):
    path = broken / part
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(ValueError, match=f"broken: no {part}; expected the final/ folder") as error:
        load_model(broken)
    assert ("copy the one of its codes there" in str(error.value)) == (part == "image_tokenizer")


def test_a_model_without_visual_range_is_refused(broken):
    text = load_text_tokenizer(broken / "text_tokenizer")
    save_tables_of(broken, Vocabulary.of(text=text.vocab_size))
    with pytest.raises(ValueError, match=r"vocabulary.json: no range visual; found \[\[\"text\""):
        load_model(broken)


def test_tokenizers_of_another_size_are_refused(broken):
    text = load_text_tokenizer(broken / "text_tokenizer")
    save_tables_of(broken, Vocabulary.of(text=text.vocab_size, visual=CODES + 1))
    with pytest.raises(ValueError, match=r"broken/image_tokenizer: 12 ids; expected 13, the range visual"):
        load_model(broken)
    save_tables_of(broken, Vocabulary.of(text=text.vocab_size + 2, visual=CODES))
    with pytest.raises(ValueError, match=rf"text_tokenizer: {text.vocab_size} ids; expected {text.vocab_size + 2}"):
        load_model(broken)


def save_tables_of(folder: Path, vocab: Vocabulary) -> None:
    """Put a decoder over another vocabulary into a model folder, its tokenizers kept."""
    save_decoder(folder.with_name("other"), vocab)
    for file in folder.with_name("other").iterdir():
        shutil.copy(file, folder / file.name)


def test_metadata_keeps_the_keys_of_a_prompt_object(model_folder, tmp_path):
    entry = {"prompt": "a seven", "tag": "digits", "include": [{"class": "seven"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(entry) + "\n")
    main(settings(model_folder, tmp_path / "out", f"prompts.file={tmp_path}/p.jsonl", texts=None))
    lines = (tmp_path / "out/00000/metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [entry]


def test_a_prompt_too_long_for_the_model_is_refused(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ ids; expected 1 to 80"):
        main(settings(model_folder, tmp_path / "out", texts=["a", "word " * 60]))
    assert not (tmp_path / "out").exists()
