"""The data benches work: every way of ours on a tiny corpus, a child that fails, tables that are what the rows say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("variant", ["int32", "uint16", "17-bit"])
def test_our_ways_deliver_what_was_written(tmp_path, variant):
    from corpus import Corpus
    from loader import PICTURES, PLAIN, Answers

    from vtrain.data import Dataset

    for kind, ways in (("plain", PLAIN), ("pictures", PICTURES)):
        corpus = Corpus(kind, variant, 0.002)
        for way in ways.values():
            answers = Answers(corpus, way, tmp_path)
            sizes = answers({"do": "prepare"})
            counts = way.counts(corpus, answers.folder)
            assert next(counts) > 0
            assert answers({"do": "read", "seconds": 0.01})["rate"] > 0
        dataset = Dataset(answers.folder)
        assert (dataset.lengths(np.arange(len(dataset))) == corpus.lengths).all()
        assert (dataset.read(np.arange(len(dataset)))[0] == corpus.ids).all()
        assert sizes["ids"] >= {"int32": 4, "uint16": 2, "17-bit": 2.125}[variant] * corpus.cu[-1]
        assert answers({"do": "verify"})["rate"] > 0
        assert answers({"do": "write", "scratch": str(tmp_path)})["rate"] > 0


def test_every_packer_of_ours_makes_a_packing():
    import packer

    for pack_tokens, draw in packer.LAWS.values():
        lengths = draw(np.random.default_rng(3), 3000).astype(np.int32)
        for name in ("vtrain, pool 512", "next fit (Python)"):
            order, bin_cu = packer.PACKERS[name][0](lengths, pack_tokens)
            assert packer.check(order, bin_cu, lengths, pack_tokens).sum() == lengths.sum()
            with pytest.raises(ValueError, match="missing or twice"):
                packer.check(np.zeros_like(order), bin_cu, lengths, pack_tokens)


def test_evenness_tells_a_shuffle_from_what_is_none():
    import packer

    n = 100_003
    good = packer.evenness(np.random.default_rng(0).permutation(n))
    assert all(abs(good[name] - 1) < 0.2 for name in good if name.startswith("chi2"))
    assert min(packer.evenness(np.arange(n)).values()) > 0.9  # the order as it is stored: r is 1, chi2 is huge


def test_waits_are_those_of_the_slowest_rank():
    import packer

    costs = np.ones(packer.RANKS * 2)
    assert packer.waits(costs, 2) == 1
    costs[7] = 3  # sorted, it waits in one of the two micro-steps: (1 + 3) / (2 + 2 / 64)
    assert packer.waits(costs, 2) == pytest.approx(4 / (2 + 2 / packer.RANKS))


def test_a_child_that_fails_is_an_error_and_not_asked_again(tmp_path):
    from harness import Child, interleaved

    script = tmp_path / "child.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\nfrom harness import serve\n"
        "def answer(request):\n    print('noise')\n    if sys.argv[1] == 'bad': raise KeyError('x')\n"
        "    if sys.argv[1] == 'dead': sys.exit(3)\n    return {'rate': request['n']}\nserve(answer)\n"
    )
    children = {name: Child([str(script), name], tmp_path / name) for name in ("good", "bad", "dead")}
    found = interleaved(children, {"n": 5}, rounds=3)
    for child in children.values():
        child.close()
    assert found == {
        "good": [{"rate": 5}] * 3,
        "bad": [{"error": "KeyError: 'x'"}],
        "dead": [{"error": "the process ended with code 3"}],
    }


def test_rows_and_the_tables_made_of_them(tmp_path):
    import plot
    from harness import Rows

    rows = Rows("loader", tmp_path / "2026.jsonl")
    common = {"dtype": "int32", "shape": {"samples": 9, "tokens": 99}}
    rows.add("shuffled packs", "Megatron IndexedDataset", [1, 100, 300], "Mtok/s", baseline=100, **common)
    rows.add("shuffled packs", "vtrain raw", [390], "Mtok/s", baseline=100, **common)
    rows.add("shuffled packs", "litdata", [], "Mtok/s", error="ImportError: no", **common)
    lines = [json.loads(line) for line in (tmp_path / "2026.jsonl").read_text().splitlines()]
    assert [(x["p20"], x["p50"], x["p80"], x["ratio"]) for x in lines[:2]] == [(1, 100, 300, 1), (390, 390, 390, 3.9)]
    assert lines[2]["p50"] is None
    assert lines[2]["error"] == "ImportError: no"

    results = plot.Results(tmp_path)
    table = "\n".join(plot.loader_table(results))
    assert "| **vtrain** | 390 | 3.9 |" in table
    assert "litdata StreamingDataset | failed" in table
    assert "| raw packs beside Megatron IndexedDataset | 3.9 x | >= 4 | missed |" in plot.target_table(results)

    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n")
    with pytest.raises(SystemExit, match="to write between"):
        plot.write_readme(readme, results)
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    plot.write_readme(readme, results)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert table in text
