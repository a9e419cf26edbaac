"""Where metrics go: `metrics.jsonl` always, the console, and the trackers that are asked for by name."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

from vtrain.files import append, sync, write_durably

SINKS = ("console", "tensorboard", "wandb")


class Jsonl:
    """`out/metrics.jsonl`: one JSON object a line, {"step": n, ...}. Resuming cuts the lines past the checkpoint."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = []
        if path.exists():
            lines = path.read_text(errors="replace").splitlines(True)
            kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= resume_step]
        write_durably(path, "".join(kept))
        self.file = open(path, "ab")  # noqa: SIM115 - closed by close()

    def write(self, record: dict) -> None:
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in record.items()}
        append(self.file, json.dumps(finite) + "\n")

    def sync(self) -> None:
        """What a checkpoint must not be ahead of is on the disk when this returns."""
        sync(self.file, self.file.name)

    def close(self) -> None:
        with suppress(OSError):  # only a line is left to write that could not be written before
            self.file.close()


class Console:
    """One readable line per record."""

    def write(self, record: dict) -> None:
        print(console_line(record), flush=True)

    def sync(self) -> None:
        """No resume reads it."""

    def close(self) -> None:
        pass


class Tensorboard:
    """Scalars for TensorBoard under `out/tensorboard/` (needs the extra `trackers`)."""

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"))

    def write(self, record: dict) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """No resume reads it."""

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A Weights & Biases run (needs the extra `trackers`; WANDB_MODE=offline works without a network)."""

    def __init__(self, out: Path, name: str) -> None:
        import wandb

        self.run = wandb.init(project="vtrain", name=name or out.name, dir=str(out))

    def write(self, record: dict) -> None:
        self.run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def sync(self) -> None:
        """No resume reads it."""

    def close(self) -> None:
        self.run.finish()


def open_sinks(names: tuple[str, ...], out: Path, run_name: str, resume_step: int) -> list:
    """The sinks of the main rank. ValueError names a tracker whose package is not installed."""
    sinks: list = [Jsonl(out / "metrics.jsonl", resume_step)]
    for name in names:
        try:
            if name == "console":
                sinks.append(Console())
            elif name == "tensorboard":
                sinks.append(Tensorboard(out))
            elif name == "wandb":
                sinks.append(Wandb(out, run_name))
            else:
                raise ValueError(f"log.sinks: {name!r}, expected some of {', '.join(SINKS)}")
        except ImportError as error:
            raise ValueError(
                f"log.sinks: {name!r} needs a package: pip install 'vtrain[trackers]' ({error})"
            ) from error
    return sinks


def console_line(record: dict) -> str:
    """`step 120/600 | loss 2.3456 (text 0.51, visual 2.61) | lr 1.0e-03 | ...`, or an evaluation's line."""
    head = f"step {record['step']}/{record['steps']}"
    if record["kind"] == "eval":
        values = [f"{k.removeprefix('eval/')} {v:.4f}" for k, v in record.items() if k.startswith("eval/")]
        return f"{head} | eval | " + ", ".join(values) + (" | best so far" if record["best"] else "")
    parts = [f"{k.removeprefix('loss/')} {v:.4f}" for k, v in record.items() if k.startswith("loss/")]
    unit = record["unit"]
    fields = [
        head,
        f"loss {record['loss']:.4f}" + (f" ({', '.join(parts)})" if parts else ""),
        f"lr {record['lr']:.2e}",
        f"grad_norm {record['grad_norm']:.3f}",
        f"{_short(record[f'{unit}_per_s'])} {unit}/s",
        f"padding {100 * record['padding']:.1f}%",
        f"data wait {100 * record['data_wait']:.1f}%",
        f"mem {record['memory_gb']:.2f} GB",
    ]
    if "mfu" in record:
        fields.append(f"mfu {100 * record['mfu']:.1f}%")
    fields += [f"{k.removeprefix('stat/')} {v:.4g}" for k, v in record.items() if k.startswith("stat/")]
    fields.append(f"eta {_clock(record['eta_s'])}")
    return " | ".join(fields)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash


def _short(value: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f}{suffix}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
