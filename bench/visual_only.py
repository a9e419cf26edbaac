"""What loss.visual_softmax = visual_only saves of a training step: the products of codes with the texts' columns.

    PYTHONPATH=. python bench/visual_only.py [--rounds 5] [--out FILE] [--quick]

The decoder has a quarter of Qwen2.5-0.5B's width, heads, FFN and vocabulary, so the shares of attention, FFN and head
are about its own; documents are captions of 64 tokens and the codes of a picture. Both ways take turns. One
thread; seconds are the processor's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from harness import Rows
from padding import Trainer

from vtrain.batch import Document, PackedBatch
from vtrain.models.decoder import DecoderConfig
from vtrain.models.flops import train_flops
from vtrain.vocab import Vocabulary

VOCAB = Vocabulary.of(text=37918, visual=16000)
CONFIG = DecoderConfig(24, 224, 14, 2, 1216, head_dim=16, rope_theta=1e6, qkv_bias=True, tied=True)
TEXT, CODES = 64, 1024
WAYS = ("full", "visual_only")


def batch(documents: int) -> PackedBatch:
    rng = np.random.default_rng(0)
    text, visual = VOCAB.ranges
    made = [
        Document(
            np.concatenate([rng.integers(r.base, r.end, n) for r, n in ((text, TEXT), (visual, CODES))]), key=i + 1
        )
        for i in range(documents)
    ]
    return PackedBatch.build(made, VOCAB, tables=("rows_by_class",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    parser.add_argument("--quick", action="store_true", help="a look: two rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, data = Rows("visual_only", arguments.out), batch(1)
    trainers = {way: Trainer(CONFIG, VOCAB, way) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(1 + (2 if arguments.quick else arguments.rounds)):
        for way, trainer in trainers.items():
            start = time.process_time()
            trainer.step([data])
            times[way].append(time.process_time() - start)
    shape, baseline = {"hidden": CONFIG.hidden, "vocabulary": VOCAB.sizes, "text": TEXT, "codes": CODES}, None
    for way, trainer in trainers.items():
        scored = trainer.objective.logits(data, VOCAB) / VOCAB.size
        flops = train_flops(CONFIG, VOCAB, data.lengths, scored)
        row = rows.add("step", way, times[way][1:], "s", shape=shape, dtype="float32", baseline=baseline, less=True,
                       gflops=round(flops / 1e9, 1))  # fmt: skip
        baseline = baseline or row["p50"]


if __name__ == "__main__":
    main()
