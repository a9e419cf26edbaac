"""How long a checkpoint holds up training beside how long it takes to be on disk.

    python bench/checkpoint.py [--mb 500] [--rounds 5] [--out bench/results/<machine>/<date>-<commit>.jsonl]

The state is that of a model and its AdamW, of the given size, on CPU. `blocks` is the time that training waits (a copy
on the host), `takes` the time until the checkpoint has its name. Medians over rounds, both from the same checkpoints.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from vtrain.dist.fsdp import shard
from vtrain.dist.mesh import world
from vtrain.train.checkpoint import module_tensors
from vtrain.train.optim import AdamW
from vtrain.train.saver import Saver

WIDTH = 1024


def one_round(root: nn.Module, optimizer: AdamW, saver: Saver, step: int) -> dict[str, float]:
    tensors = module_tensors(root, "root").joined(optimizer.tensors("optim"))
    start = time.perf_counter()
    saver.begin(step, tensors, {"step": step}, {}, "", set())
    blocks = time.perf_counter() - start
    saver.wait()
    return {"blocks": blocks, "takes": time.perf_counter() - start}


def measure(megabytes: int, rounds: int) -> list[dict]:
    layers = max(round(megabytes * 1e6 / (3 * 4 * WIDTH * WIDTH)), 1)  # weights and two moments, float32
    folder = Path(tempfile.mkdtemp(prefix="vtrain-bench-"))
    try:
        with world("cpu") as here:
            root = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
            shard(root, root, here, torch.float32)
            optimizer = AdamW(root.named_parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
            root(torch.randn(8, WIDTH)).square().mean().backward()  # moments that are not untouched zero pages
            optimizer.clip(0.0, torch.zeros(()))
            optimizer.step(torch.ones(()))
            saver = Saver(folder, here, keep=1)
            samples = [one_round(root, optimizer, saver, n) for n in range(rounds + 1)][1:]
    finally:
        shutil.rmtree(folder)
    rows = []
    for impl in ("blocks", "takes"):
        values = sorted(s[impl] for s in samples)
        quantiles = {f"p{q}": round(values[min(int(q / 100 * len(values)), len(values) - 1)], 4) for q in (20, 80)}
        median = statistics.median(values)
        ratio = round(median / statistics.median(s["takes"] for s in samples), 3)
        rows.append({"impl": impl, "p50": round(median, 4), **quantiles, "ratio": ratio})
    return rows


def environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "unknown")  # noqa: SIM115
    return {
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{cpu}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = []
    for row in measure(arguments.mb, arguments.rounds):
        case = {"suite": "checkpoint", "case": "adamw state", "shape": {"mb": arguments.mb}, "dtype": "float32"}
        lines.append(json.dumps({**case, **row, "unit": "s", "rounds": arguments.rounds, "env": environment()}))
        print(lines[-1])
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.out, "a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
