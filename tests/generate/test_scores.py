"""Summaries of the scorers' result files beside slow ones of numpy, and what is refused."""

import json
import re
from itertools import groupby

import numpy as np
import pytest

from vtrain.generate.scores import read_dpg, read_geneval, summarize, table

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def geneval_lines(seed: int, prompts: int = 30, per_prompt: int = 4) -> list[dict]:
    """What evaluate_images.py writes, pictures in any order, tasks of unequal size."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(prompts):
        entry = {"tag": TAGS[int(rng.integers(6)) if i >= 6 else i], "include": [], "prompt": f"a photo of {i}"}
        for k in range(per_prompt):
            correct = bool(rng.random() < 0.2 + 0.1 * TAGS.index(entry["tag"]))
            lines.append(
                {"filename": f"out/{i:05d}/samples/{k:05d}.png", "tag": entry["tag"], "prompt": entry["prompt"],
                 "correct": correct, "reason": "" if correct else "expected x>=1, found 0",
                 "metadata": json.dumps(entry), "details": "{}"}
            )  # fmt: skip
    return [lines[n] for n in rng.permutation(len(lines))]


def write_geneval(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_geneval_like_its_own_summary(tmp_path):
    lines = geneval_lines(0)
    found = read_geneval(write_geneval(tmp_path / "r.jsonl", lines))
    tasks = {tag: [line["correct"] for line in lines if line["tag"] == tag] for tag in TAGS}
    for tag, correct in tasks.items():
        assert found.values[tag] == pytest.approx(np.mean(correct), abs=1e-12)
        assert found.counts[tag] == len(correct)
    assert found.values["overall"] == pytest.approx(np.mean([np.mean(c) for c in tasks.values()]), abs=1e-12)
    assert found.values["pictures"] == pytest.approx(np.mean([line["correct"] for line in lines]), abs=1e-12)
    ordered = sorted(lines, key=lambda line: line["metadata"])
    any_right = [any(line["correct"] for line in group) for _, group in groupby(ordered, lambda li: li["metadata"])]
    assert found.values["prompts"] == pytest.approx(np.mean(any_right), abs=1e-12)
    assert (found.counts["prompts"], found.counts["pictures"]) == (30, 120)
    assert abs(found.values["overall"] - found.values["pictures"]) > 1e-3  # the data tell the two means apart


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.clear(), r"r.jsonl: no results"),
        (lambda lines: lines.append(lines[3]), r"r.jsonl: line 121: out/.* comes twice"),
        (lambda lines: lines[1].pop("tag"), r"line 2: found .*; expected an object of GenEval's"),
        (lambda lines: lines[1].update(correct=1), r"line 2: found .* a boolean correct"),
        (lambda lines: lines.insert(4, [1]), r"line 5: found \[1\]"),
        (lambda lines: lines[1].update(metadata={}), r"line 2"),
    ],
)
def test_broken_geneval_results(tmp_path, change, message):
    lines = geneval_lines(0)
    change(lines)
    with pytest.raises(ValueError, match=message):
        read_geneval(write_geneval(tmp_path / "r.jsonl", lines))


def test_geneval_results_that_are_no_json(tmp_path):
    for content in (b"\xff", b"{", b"[" * 100_000):
        (tmp_path / "r.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"r\.jsonl: (not UTF-8|line 1: found)"):
            read_geneval(tmp_path / "r.jsonl")


CATEGORIES = {"entity - whole": 90.0, "entity - part": 81.25, "attribute - color": 100.00000000000001, "global": 75.5}


def dpg_text(seed: int = 0, files: int = 12) -> str:
    """What compute_dpg_bench.py writes, with the numbers as Python prints them."""
    rng = np.random.default_rng(seed)
    text, means = "", []
    for n in range(files):
        scores = [int(s) / 7 for s in rng.integers(0, 8, 4)]
        means.append(sum(scores) / len(scores))
        text += f"out/images, new/prompt{n}.jpg, " + ", ".join(str(s) for s in scores) + f", {means[-1]}\n"
    text += "Model: images\nL1 category scores:\n\tentity: 85.0\n\tattribute: 99.5\n\tglobal: 75.5\n"
    text += "L2 category scores:\n" + "".join(f"\t{name}: {value}\n" for name, value in CATEGORIES.items())
    return text + f"Image path: out/images\nSave results to: r.txt\nDPG-Bench score: {np.mean(means) * 100}\n"


def test_dpg_like_its_own_summary(tmp_path):
    (tmp_path / "r.txt").write_text(dpg_text())
    found = read_dpg(tmp_path / "r.txt")
    expected = float(dpg_text().rsplit(": ", 1)[1])
    assert found.values == {
        "overall": expected,
        "L1 entity": 85.0,
        "L1 attribute": 99.5,
        "L1 global": 75.5,
        **{f"L2 {name}": value for name, value in CATEGORIES.items()},
    }
    assert next(iter(found.values)) == "overall"
    assert found.counts == {"overall": 12}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("Model: images\n", "", r"no line `Model:`"),
        ("DPG-Bench score", "Score", r"no `DPG-Bench score:`"),
        ("entity: 85.0", "entity: many", r"r.txt: entity: found 'many'; expected a percentage"),
        ("entity: 85.0", "entity: 185.0", r"expected a percentage"),
        ("entity: 85.0", "entity: nan", r"expected a percentage"),
        ("prompt3.jpg, ", "prompt3.jpg, 1", r"line 4: the mean .*; expected .*, that of its scores"),
        ("prompt3.jpg, ", "prompt3.jpg; ", r"line 4"),
        (
            "\nout/images, new/prompt5",
            "\nout/images, new/prompt5 failed\nout/images, new/prompt5",
            r"line 6: found out/",
        ),
    ],
)
def test_broken_dpg_results(tmp_path, before, after, message):
    text = dpg_text()
    assert before in text
    (tmp_path / "r.txt").write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        read_dpg(tmp_path / "r.txt")


def test_dpg_results_of_forks(tmp_path):
    """Means without the scores of the four pictures, and further lines at the end."""
    text = re.sub(r"(?m)^(out.*?\.jpg), .*, ", r"\1, ", dpg_text())
    text = text.replace("Image path:", "Question CSV: q.csv\nImage path:") + "Took: 3 h\n"
    assert "prompt0.jpg, 0." in text
    (tmp_path / "fork.txt").write_text(text)
    (tmp_path / "r.txt").write_text(dpg_text())
    assert read_dpg(tmp_path / "fork.txt") == read_dpg(tmp_path / "r.txt")


def test_dpg_results_with_lines_lost_are_refused(tmp_path):
    lines = dpg_text().splitlines(keepends=True)
    (tmp_path / "r.txt").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=r"expected .*, the mean of its 11 files"):
        read_dpg(tmp_path / "r.txt")
    (tmp_path / "r.txt").write_text("".join(lines[12:]))
    with pytest.raises(ValueError, match=r"the mean of its 0 files"):
        read_dpg(tmp_path / "r.txt")


def test_several_seeds(tmp_path):
    for seed in range(3):
        (tmp_path / f"seed{seed}").mkdir()
        write_geneval(tmp_path / f"seed{seed}" / "r.jsonl", geneval_lines(seed))
    found, path = summarize("geneval", f"{tmp_path}/seed*/r.jsonl")
    assert path == tmp_path / "scores.json"
    single = [read_geneval(tmp_path / f"seed{seed}" / "r.jsonl").values["overall"] for seed in range(3)]
    overall = found["scores"]["overall"]
    assert overall["values"] == single
    assert overall["mean"] == pytest.approx(np.mean(single), abs=1e-12)
    assert overall["std"] == pytest.approx(np.std(single, ddof=1), abs=1e-12)
    assert json.loads(json.dumps(found)) == found
    text = table(found)
    assert "3 result files" in text
    assert f"{np.mean(single):.5f}  +- {np.std(single, ddof=1):.5f}" in text

    one, path = summarize("geneval", str(tmp_path / "seed1" / "r.jsonl"))
    assert path == tmp_path / "seed1" / "scores.json"
    assert one["scores"]["overall"] == {"mean": single[1], "std": None, "values": [single[1]], "counts": [6]}
    assert "+-" not in table(one)


def test_several_files_have_the_same_scores(tmp_path):
    write_geneval(tmp_path / "a.jsonl", geneval_lines(0))
    write_geneval(tmp_path / "b.jsonl", [line for line in geneval_lines(0) if line["tag"] != "colors"])
    with pytest.raises(ValueError, match=r"b.jsonl: not the same scores as .*a.jsonl: colors"):
        summarize("geneval", f"{tmp_path}/*.jsonl")
    with pytest.raises(
        ValueError, match=r"--summary .*none.jsonl: no such file; expected results of the scorer of geneval"
    ):
        summarize("geneval", f"{tmp_path}/none.jsonl")
