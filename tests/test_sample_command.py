"""The sample command on a tiny model folder: the tree it writes, any number of ranks, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks

from vtrain.config import load as load_settings
from vtrain.generate.engine import generate
from vtrain.generate.sampler import Sampling
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.models.hf import export_hf
from vtrain.rng import fold
from vtrain.sample import load_model, main, read_prompts, sample_pictures
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


def test_writes_the_tree_of_pictures(model_folder, tmp_path, capsys):
    main(settings(model_folder, tmp_path / "out", "sample.cfg=2.0", "run.seed=5"))
    files = tree(tmp_path / "out")
    expected = {"grid.png"}
    for i in range(3):
        expected |= {f"{i:05d}/metadata.jsonl", *(f"{i:05d}/samples/{k:04d}.png" for k in range(3))}
    assert set(files) == expected
    assert str(tmp_path / "out" / "grid.png") in capsys.readouterr().out
    model = load_model(model_folder)
    assert model.grid == (4, 4)
    text, vocab = model.text, model.decoder.vocab
    t2i, soi = text.special_id("<|t2i|>"), text.special_id("<|soi|>")
    for i, prompt in enumerate(PROMPTS):
        assert json.loads(files[f"{i:05d}/metadata.jsonl"]) == {"prompt": prompt}
        for k in range(3):
            ids = generate(
                model.decoder,
                [[t2i, *text.encode(prompt), soi]],
                [fold(0, i, k)],
                steps=16,
                cfg=2.0,
                seed=5,
                uncond_prompts=[[t2i, soi]],
            )
            codes = (ids - vocab["visual"].base).view(1, 4, 4)
            picture = np.asarray(Image.open(tmp_path / "out" / f"{i:05d}" / "samples" / f"{k:04d}.png"))
            # Another batch size rounds matrix products differently: one grey level at most.
            difference = picture.astype(int) - to_uint8(model.image.decode(codes))[0]
            assert np.abs(difference).max() <= 1
    assert len({files[f"{i:05d}/samples/{k:04d}.png"] for i in range(3) for k in range(3)}) == 9


def test_a_rerun_writes_the_same_bytes_over_old_ones(model_folder, tmp_path):
    main(settings(model_folder, tmp_path / "out"))
    first = tree(tmp_path / "out")
    (tmp_path / "out/00001/samples/0002.png").write_bytes(b"damaged")
    main(settings(model_folder, tmp_path / "out"))
    assert tree(tmp_path / "out") == first
    main(settings(model_folder, tmp_path / "out", "run.seed=1"))
    assert tree(tmp_path / "out").keys() == first.keys()
    assert tree(tmp_path / "out")["00000/samples/0000.png"] != first["00000/samples/0000.png"]


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_together_write_what_one_writes(model_folder, tmp_path, ranks):
    """Each rank's share in turn, rank 0 last as it draws the grid: with 7 ranks for 3 batches, some have nothing."""
    model = load_model(model_folder)
    entries = [{"prompt": p} for p in PROMPTS]
    options = {"sampling": Sampling(cfg=1.5), "per_prompt": 3, "batch_size": 4}
    sample_pictures(model, entries, tmp_path / "one", **options)
    for rank in reversed(range(ranks)):
        sample_pictures(model, entries, tmp_path / "many", rank=rank, ranks=ranks, **options)
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_real_ranks_write_identical_files(model_folder, tmp_path):
    sizes = ["sample.cfg=3.0", "sample.per_prompt=2"]
    main(settings(model_folder, tmp_path / "one", *sizes))
    run_ranks(2, main, settings(model_folder, tmp_path / "two", *sizes))
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_a_wrong_model_is_one_line_and_exit_code_2(tmp_path):
    keys = [f"run.out={tmp_path}/out", f"model.path={tmp_path}/nowhere", 'prompts.texts=["x"]', "run.device=cpu"]
    done = subprocess.run([sys.executable, "-m", "vtrain.sample", *keys], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: model.path {tmp_path}/nowhere: no such folder; expected the final/ folder of a vtrain.pretrain run"
    )
    assert not (tmp_path / "out").exists()


def test_dry_run_says_the_plan_and_writes_nothing(model_folder, tmp_path, capsys):
    main(settings(model_folder, tmp_path / "out"), dry_run=True)
    assert "3 prompts x 3 pictures of 4 x 4 codes" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_another_resolution_changes_the_grid_of_codes(model_folder, tmp_path):
    main(settings(model_folder, tmp_path / "out", "model.resolution=24", "sample.per_prompt=1"))
    assert Image.open(tmp_path / "out/00000/samples/0000.png").size == (24, 24)
    with pytest.raises(ValueError, match=r"model.resolution is 18; expected a multiple of 4 pixels"):
        load_model(model_folder, resolution=18)


@pytest.mark.parametrize("part", ["vocabulary.json", "text_tokenizer", "image_tokenizer"])
def test_a_folder_with_a_part_missing_is_refused(broken, part):
    path = broken / part
    path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(ValueError, match=f"broken: no {part}; expected the final/ folder"):
        load_model(broken)


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


def test_prompt_files(tmp_path):
    text = tmp_path / "p.txt"
    text.write_text("  a cat \nein Hündchen\n\n\n", encoding="utf-8")
    assert read_prompts(text) == [{"prompt": "a cat"}, {"prompt": "ein Hündchen"}]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a", "tag": "counting", "include": [1]}\n{"prompt": "b"}\n')
    assert read_prompts(lines) == [{"prompt": "a", "tag": "counting", "include": [1]}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt: the file is empty"),
        ("p.txt", b" \n\n", "p.txt: the file is empty"),
        ("p.txt", b"a\n\nb\n", "p.txt: line 2: empty prompt"),
        ("p.txt", b"a\n\xff\n", "p.txt: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "p.jsonl: line 2: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "p.jsonl: line 2: found .*string `prompt`"),
        ("p.jsonl", b'{"prompt": 3}\n', "p.jsonl: line 1: found .*string `prompt`"),
        ("p.jsonl", b'["a"]\n', "p.jsonl: line 1: found .*string `prompt`"),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "p.jsonl: line 1: not JSON: .*surrogates not allowed"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl: line 1: not JSON: .*recursion"),
        ("p.jsonl", b'{"prompt": " "}\n', "p.jsonl: line 1: empty prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}\n', "p.jsonl: line 2: not JSON"),
    ],
    ids=str,
)
def test_a_broken_prompt_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, name):
    content = "a seven" if name == "p.txt" else json.dumps({"prompt": "a seven"})
    (tmp_path / name).write_text(f"{content}\r\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / name) == [{"prompt": "a seven"}]


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read_prompts(tmp_path / "none.txt")


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
