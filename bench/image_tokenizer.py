"""Cosmos DV8x16x16 on single images: the video network as published beside the plain one that it is folded into.

    PYTHONPATH=. python bench/image_tokenizer.py [--side 256] [--batch 1] [--rounds 5] [--dtype fp32] [--out FILE]

Weights are random, for the time does not depend on them. One process; both take turns, round after round: on a GPU
where there is one, else on a CPU with the threads that OMP_NUM_THREADS allows. `same_ids` is the share of the codes
that agree with those of the video network.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import WARM_UP, Rows

from vtrain.visual.cosmos import CosmosConfig, CosmosVideo
from vtrain.visual.tokenizer import ImageTokenizer
from vtrain.visual.weights import build_cosmos

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASELINE = "video network"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    ways = tokenizers(DTYPES[given.dtype], device)
    images = torch.rand(given.batch, 3, given.side, given.side, device=device) * 2 - 1
    ids = ways[BASELINE].encode(images)
    agreement = {name: (way.encode(images) == ids).float().mean().item() for name, way in ways.items()}
    rows = Rows("image_tokenizer", given.out)
    for case, argument in (("encode", images), ("decode", ids)):
        calls = {name: functools.partial(getattr(way, case), argument) for name, way in ways.items()}
        seconds = in_turn(calls, given.rounds, device)
        for name, values in seconds.items():
            baseline = None if name == BASELINE else statistics.median(seconds[BASELINE])
            rows.add(
                f"{case} DV8x16x16",
                name,
                values,
                "s",
                shape={"batch": given.batch, "side": given.side},
                dtype=given.dtype,
                baseline=baseline,
                less=True,
                same_ids=round(agreement[name], 6),
            )


def tokenizers(dtype: torch.dtype, device: str) -> dict[str, ImageTokenizer]:
    tensors = CosmosVideo(CosmosConfig("DV8x16x16")).state_dict()
    names = {BASELINE: False, "folded": True}
    return {
        name: ImageTokenizer(build_cosmos(tensors, "random weights", dtype=dtype, folded=folded), tensors).to(device)
        for name, folded in names.items()
    }


def in_turn(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call, round after round; the first rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
