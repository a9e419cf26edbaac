"""vtrain.text_tokenizer: captions in, a tokenizer folder out; a mistake leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vtrain.config import run_command
from vtrain.settings import TextTokenizerSettings
from vtrain.text import load_text_tokenizer
from vtrain.text_tokenizer import main

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def run(tmp_path: Path, *arguments: str) -> Path:
    lines = [json.dumps({"image": f"{word}.png", "caption": f"the digit {word}"}) for word in WORDS]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    out = tmp_path / "with space" / "text"
    given = [f"input.images={tmp_path}", f"input.records={tmp_path / 'captions.jsonl'}", f"run.out={out}"]
    run_command(TextTokenizerSettings, main, [*given, *arguments])
    return out


def test_the_folder_loads_as_a_tokenizer(tmp_path, capsys):
    out = run(tmp_path, "tokenizer.vocab_size=40")
    tokenizer = load_text_tokenizer(out)
    assert tokenizer.decode(tokenizer.encode("the digit nine")) == "the digit nine"
    assert f"{out}: {tokenizer.vocab_size} ids" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tokenizer.vocab_size=5000", "tokenizer.model: the texts carry at most"),
        ("tokenizer.vocab_size=5", "tokenizer.model: vocab_size is 5; the texts' characters alone"),
        ("tokenizer.vocab_sise=50", "did you mean tokenizer.vocab_size?"),
        ("input.records=none.jsonl", "none.jsonl: no such file of records"),
        ("input.records=", ": empty; expected images"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(override, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, override)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "with space").exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    out = run(tmp_path, "--dry-run")
    assert "10 captions, 10 different" in capsys.readouterr().out
    assert not out.parent.exists()


def test_captions_of_another_kind_and_what_is_skipped(tmp_path, capsys):
    talks = [
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"the digit {word}"}]}
        for word in WORDS
    ]
    (tmp_path / "chat.json").write_text(json.dumps([*talks, {"id": 7}, "x"]))
    run(tmp_path, "input.kind=llava", f"input.records={tmp_path / 'chat.json'}", "tokenizer.vocab_size=40")
    said = capsys.readouterr().out
    assert "10 captions, 10 different" in said
    assert "2 records skipped, the first: chat.json[10]: conversations is null" in said
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(SystemExit):
        run(tmp_path, "input.records=")
    assert f"error: 1 images of {tmp_path}: no captions" in capsys.readouterr().err
