"""The decode bench, in one process and on a tiny model: both sides draw from the same model, rows compare them."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.utils import logging

from vtrain.models.presets import preset


@pytest.fixture
def tiny(monkeypatch):
    """The bench with few codes, so that a step takes no time."""
    import decode

    monkeypatch.setattr(decode, "CODES", 300)
    config = preset("qwen2.5-0.5b", layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, init_std=0.2)
    return decode, decode.Size("tiny", config, 1000, 4)


def test_both_sides_draw_from_the_same_model(tiny, tmp_path):
    decode, size = tiny
    logging.set_verbosity_error()
    decode.write_model(size, tmp_path / "model")
    sides = {side: decode.Answers(side, tmp_path / "model", "cpu") for side in decode.SIDES}
    greedy = [answers({"do": "greedy"}) for answers in sides.values()]
    assert decode.agreement(*greedy) == 1
    other = {"ids": (torch.tensor(greedy[0]["ids"]) + 1).tolist()}
    assert decode.agreement(greedy[0], other) == 0
    for side, impl in (("ours", "vtrain"), ("theirs", "HF dynamic"), ("theirs", "HF static")):
        for case in decode.Case(2, decode.CFG, 3, 1), decode.Case(1, 1.0, 3, 1):
            found = sides[side]({"do": "sample", "impl": impl, "case": case._asdict()})
            assert found["first_ms"] > 0
            assert found["peak_bytes"] > 1 << 20


class Stub:
    """A child whose answers are known."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def ask(self, request):
        return self.answers.pop(0)


def test_rows_compare_with_the_best_of_theirs_and_keep_failures(tiny, tmp_path, capsys):
    decode, size = tiny
    case = decode.Case(1, 6.0, 4, 1)
    ms = [
        [{"ms": m, "first_ms": 1.0, "peak_bytes": 7} for m in (99.0, *[m] * decode.MOST_ROUNDS)]
        for m in (2.0, 5.0, 4.0)
    ]
    impls = dict(zip(("vtrain", "HF dynamic", "HF static"), (Stub(*answers) for answers in ms)))
    impls["HF static, compiled"] = Stub({"error": "no compiler"})
    answers = decode.take_turns(impls, case, 60)
    path = tmp_path / "rows.jsonl"
    decode.write_rows(decode.Rows("decode", path), size, case, answers, "cpu", 1.0)
    rows = {row["impl"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert {name: row["p50"] for name, row in rows.items()} == {
        "vtrain": 2.0, "HF dynamic": 5.0, "HF static": 4.0, "HF static, compiled": None,
    }  # fmt: skip
    assert [rows[name]["ratio"] for name in ("vtrain", "HF dynamic", "HF static")] == [2.0, 0.8, 1.0]
    assert rows["HF static, compiled"]["error"] == "no compiler"
    assert rows["vtrain"]["rounds"] == decode.MOST_ROUNDS
    assert rows["vtrain"]["shape"] == {"model": "tiny", "batch": 1, "cfg": 6.0, "steps": 4, "threads": 1}
