"""Prompt files: what is read from each kind, and how a broken one is named."""

import csv
import json
from collections import Counter

import pytest

from vtrain.generate.prompts import draw_openers, read_prompts, with_prefixes

COLUMNS = ["item_id", "text", "keywords", "proposition_id", "question_natural_language"]


def write_table(path, rows, columns=COLUMNS):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_lines_and_objects(tmp_path):
    text = tmp_path / "p.txt"
    text.write_text("  a cat \nein Hündchen\n\n\n", encoding="utf-8")
    assert read_prompts(text) == [{"prompt": "a cat"}, {"prompt": "ein Hündchen"}]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a", "tag": "counting", "include": [1]}\n{"prompt": "b\u2028c"}\n')
    assert read_prompts(lines) == [{"prompt": "a", "tag": "counting", "include": [1]}, {"prompt": "b\u2028c"}]


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
        ("p.jsonl", b'{"prompt": "a", "prefix": 3}\n', "p.jsonl: line 1: found the prefix 3; expected a style opener"),
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


@pytest.mark.parametrize("bench", ["", "geneval", "dpg"])
def test_a_missing_prompt_file_is_named(tmp_path, bench):
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read_prompts(tmp_path / "none.txt", bench)


def test_a_folder_is_for_dpg_alone(tmp_path):
    with pytest.raises(ValueError, match=r"a folder; expected a file"):
        read_prompts(tmp_path)


def test_geneval_lines_are_what_its_scorer_needs(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    entry = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}
    path.write_text(json.dumps(entry) + "\n")
    assert read_prompts(path, "geneval") == [entry]
    for key in ("tag", "include", "prompt"):
        lacking = {name: value for name, value in entry.items() if name != key}
        path.write_text(f"{json.dumps(entry)}\n{json.dumps(lacking)}\n")
        with pytest.raises(ValueError, match=rf"line 2: found .*`{key}`"):
            read_prompts(path, "geneval")


def test_dpg_folder_and_table_give_the_same_prompts(tmp_path):
    texts = {"256": "A pickup, red.\n", "COCOval2014000000000042": 'two "big"\ndogs', "midjourney9": "é"}
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("no prompt")
    expected = [{"prompt": text.strip(), "name": name} for name, text in texts.items()]
    assert read_prompts(folder, "dpg") == expected
    rows = [(name, text, "", n, "is there?") for name, text in texts.items() for n in range(1, 4)]
    assert read_prompts(write_table(tmp_path / "dpg_bench.csv", rows), "dpg") == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"bench.csv: nothing in it; expected rows of item_id, text"),
        ([("a", "x", "", 1, "?"), ("b", "y", "", 1, "?"), ("a", "z", "", 2, "?")],
         r"bench.csv: line 4: another text for item_id a"),
        ([("a", " ", "", 1, "?")], r"bench.csv: a: empty prompt"),
        ([("", "x", "", 1, "?")], r"the name ''; expected one without dots"),
        ([("a.b", "x", "", 1, "?")], r"the name 'a.b'; expected one without dots and slashes"),
        ([("a/b", "x", "", 1, "?")], r"the name 'a/b'; expected one without dots and slashes"),
        ([("a",)], r"a: empty prompt"),
    ],
)  # fmt: skip
def test_a_broken_dpg_table(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write_table(tmp_path / "bench.csv", rows), "dpg")


def test_dpg_needs_its_columns_and_prompts(tmp_path):
    with pytest.raises(ValueError, match=r"no column item_id and text; found \['id', 'prompt'\]"):
        read_prompts(write_table(tmp_path / "bench.csv", [("a", "b")], ["id", "prompt"]), "dpg")
    (tmp_path / "bench.csv").write_text('item_id,text\na,"b\n')
    with pytest.raises(ValueError, match=r"bench.csv: unexpected end of data"):
        read_prompts(tmp_path / "bench.csv", "dpg")
    (tmp_path / "p.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"p.jsonl: expected DPG-Bench's folder of prompts or its dpg_bench.csv"):
        read_prompts(tmp_path / "p.jsonl", "dpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: nothing in it; expected NAME.txt"):
        read_prompts(tmp_path / "empty", "dpg")
    (tmp_path / "empty" / "v1.2.txt").write_text("a")
    with pytest.raises(ValueError, match=r"the name 'v1.2'"):
        read_prompts(tmp_path / "empty", "dpg")


def test_prefixes_are_drawn_from_seed_and_number():
    entries = [{"prompt": f"cat {n}", "tag": "x"} for n in range(600)]
    openers = ("A photo of ", "A sketch of", "")
    drawn = with_prefixes(entries, openers, seed=3)
    assert [{k: v for k, v in entry.items() if k != "prefix"} for entry in drawn] == entries
    assert with_prefixes(entries[:7], openers, seed=3) == drawn[:7]
    assert with_prefixes(entries, openers, seed=4) != drawn
    counts = Counter(entry["prefix"] for entry in drawn)
    assert all(abs(counts[opener] - 200) < 5 * (600 * 2 / 9) ** 0.5 for opener in openers)  # five sigma
    assert [entry["prefix"] for entry in drawn] == draw_openers(openers, 600, seed=3)
    assert with_prefixes(entries, (), seed=3) == entries
    assert draw_openers((), 2, seed=3) == ["", ""]
    with pytest.raises(ValueError, match=r"prompt 1 has a `prefix` already"):
        with_prefixes([{"prompt": "a"}, {"prompt": "b", "prefix": "x"}], openers, 0)
