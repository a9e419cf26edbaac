"""Kill a toy training with SIGKILL at random moments, start it again each time, and compare with an undisturbed run.

python scripts/kill_test.py 100 --seed 1    # exit code 1 unless weights and metrics are the same, bit by bit

Trainings on one and on two ranks take turns; of two ranks one is killed, and the other has to end, too. A training is
killed a few times, then left to end. A moment lies anywhere in the time that such a run takes, start and end included.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from crashes import GRACE_S, Job, leftovers, tree  # noqa: E402
from toys import pretrain_arguments, write_dataset  # noqa: E402

KILLS_PER_TRAINING = 5
NOTICE_S = 2  # for a rank whose fellow was killed
TIMES = ("step_s", "eta_s", "tokens_per_s", "data_wait", "memory_gb")  # differ from run to run


@dataclass
class Undisturbed:
    """What a training on some ranks leaves when nothing happens to it, and the seconds it takes."""

    result: dict
    seconds: float


def result(out: Path) -> dict:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    return {"final": tree(out / "final"), "metrics": metrics, "leftovers": leftovers(out)}


def start(data: Path, out: Path, ranks: int) -> Job:
    return Job("pretrain", pretrain_arguments(data, out), data / f"log-{out.name}", ranks=ranks)


def finish(job: Job, out: Path) -> dict:
    """Wait for a job that nobody disturbs; what it left."""
    for rank, ended in enumerate(job.wait()):
        if ended.code != 0:
            raise RuntimeError(f"{out}: rank {rank} ended with {ended.code}:\n{ended.output}")
    return result(out)


def kill(job: Job, out: Path, after_s: float, rank: int) -> tuple[bool, bool]:
    """SIGKILL to one rank after some seconds: (whether it still ran, whether the other one then hung).

    The other one notices by itself, but for the time in which ranks wait to meet; so it gets a SIGTERM as torchrun
    sends it, which ends such a wait, and would not end a step.
    """
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline and job.running():
        time.sleep(0.002)
    if not job.running():
        finish(job, out)
        return False, False
    job.processes[rank].kill()
    ended = job.ended_within(NOTICE_S)
    if not ended:
        for process in job.processes:
            process.terminate()
        ended = job.ended_within(GRACE_S)
    if not ended:
        job.abort()
        print("\n".join(log.read_text() for log in job.logs), flush=True)
    return True, not ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_dataset(data / "train", 100)
        write_dataset(data / "valid", 30, seed=1)
        undisturbed = {ranks: measure(data, ranks) for ranks in (1, 2)}
        kills = on_two = late = hung = trainings = 0
        wrong: list[str] = []
        while kills < arguments.kills:
            trainings += 1
            ranks = 1 + trainings % 2
            out = data / f"out-{trainings}"
            for _ in range(min(KILLS_PER_TRAINING, arguments.kills - kills)):
                moment, rank = rng.uniform(0.0, undisturbed[ranks].seconds), rng.randrange(ranks)
                hit, stuck = kill(start(data, out, ranks), out, moment, rank)
                kills, hung, on_two = kills + hit, hung + stuck, on_two + (hit and ranks == 2)
                late += hit and any(out.glob("checkpoints/step-*"))
                if not hit:
                    break  # it has ended before
            found = finish(start(data, out, ranks), out)
            wrong += [f"{out.name} ({ranks} ranks): {name}" for name in found
                      if found[name] != undisturbed[ranks].result[name]]  # fmt: skip
    for line in wrong:
        print(f"differs: {line}")
    print(
        f"{kills} kills in {trainings} trainings: {on_two} of one of two ranks, {late} with a checkpoint to go on from"
    )
    print(f"{hung} times a rank hung when the other one was dead")
    print("verdict: " + ("DIFFERENT" if wrong or hung else "the same weights and metrics, bit by bit"))
    return 1 if wrong or hung else 0


def measure(data: Path, ranks: int) -> Undisturbed:
    finish(start(data, data / f"warm-{ranks}", ranks), data / f"warm-{ranks}")  # the first one imports
    started, out = time.monotonic(), data / f"undisturbed-{ranks}"
    found = finish(start(data, out, ranks), out)
    return Undisturbed(found, time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
