"""What the benchmarks' own scorers found, read from their result files and summed up over several runs."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

_TOLERANCE = 1e-6  # of a mean of printed doubles; a lost line moves it by 1e-4 or more


@dataclass(frozen=True)
class Scores:
    """One result file. values: name -> score, "overall" first; counts: name -> what it is a score of."""

    values: dict[str, float]
    counts: dict[str, int]


def read_geneval(path: str | Path) -> Scores:
    """The JSONL that GenEval's evaluate_images.py writes, a line per picture; scores are shares in 0..1.

    As in its summary_scores.py: a task's score is the share of its pictures that are right, "overall" the mean over
    tasks, "prompts" the share of prompts with at least one right picture.
    """
    tasks: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    files: set[str] = set()
    for number, line in enumerate(_lines(path), start=1):
        filename, tag, group, correct = _geneval_line(line, f"{path}: line {number}")
        if filename in files:
            raise ValueError(f"{path}: line {number}: {filename} comes twice; expected a line per picture")
        files.add(filename)
        tasks.setdefault(tag, []).append(correct)
        prompts[group] = prompts.get(group, False) or correct
    if not files:
        raise ValueError(f"{path}: no results; expected a line per picture, as evaluate_images.py writes them")
    by_task = {tag: fmean(found) for tag, found in sorted(tasks.items())}
    pictures = fmean(correct for found in tasks.values() for correct in found)
    return Scores(
        {"overall": fmean(by_task.values()), **by_task, "pictures": pictures, "prompts": fmean(prompts.values())},
        {
            "overall": len(tasks),
            **{tag: len(tasks[tag]) for tag in by_task},
            "pictures": len(files),
            "prompts": len(prompts),
        },
    )


def _geneval_line(line: str, where: str) -> tuple[str, str, str, bool]:
    try:
        value = json.loads(line)
        found = tuple(value[key] for key in ("filename", "tag", "metadata", "correct"))
    except (ValueError, KeyError, TypeError, RecursionError):
        found = ()
    if [type(part) for part in found] != [str, str, str, bool]:
        raise ValueError(
            f"{where}: found {line[:80]}; expected an object of GenEval's evaluate_images.py with strings filename, "
            "tag, metadata and a boolean correct"
        )
    return found


def read_dpg(path: str | Path) -> Scores:
    """The text that DPG-Bench's compute_dpg_bench.py writes (dpg-bench_*_results.txt); scores are percentages.

    A line per file (`path, score, ..., mean`, or with nothing but the mean), then `Model:`, two lists of categories and
    `DPG-Bench score:`, which is "overall"; other lines are passed over from `Model:` on. ValueError where the score is
    not the mean of the files' lines: some were lost, or another run's are there.
    """
    lines = _lines(path)
    start = next((n for n, line in enumerate(lines) if line.startswith("Model:")), None)
    if start is None:
        raise ValueError(f"{path}: no line `Model:`; expected the results of compute_dpg_bench.py, run to its end")
    means = [_dpg_line(line, f"{path}: line {number}") for number, line in enumerate(lines[:start], start=1)]
    values = _dpg_summary(lines[start:], f"{path}")
    mean = 100 * fmean(means) if means else float("nan")
    if not abs(mean - values["overall"]) <= _TOLERANCE * 100:
        raise ValueError(
            f"{path}: DPG-Bench score {values['overall']}; expected {mean}, the mean of its {len(means)} files"
        )
    return Scores(values, {"overall": len(means)})


def _dpg_line(line: str, where: str) -> float:
    """The mean that ends the line of a file, in 0..1."""
    found = re.fullmatch(r"(.+?)((?:, [-+.\deE]+)+)", line)
    try:
        *scores, mean = map(float, found[2].split(", ")[1:])
    except (TypeError, ValueError):
        raise ValueError(f"{where}: found {line[:80]}; expected `path, score, ..., mean`") from None
    if scores and not abs(fmean(scores) - mean) <= _TOLERANCE:
        raise ValueError(f"{where}: the mean {mean}; expected {fmean(scores)}, that of its scores")
    return mean


def _dpg_summary(lines: list[str], where: str) -> dict[str, float]:
    categories: dict[str, float] = {}
    overall, level = None, ""
    for line in lines:
        name, _, value = (part.strip() for part in line.rpartition(":"))
        if found := re.fullmatch(r"(L[12]) category scores:", line):
            level = found[1]
        elif line.startswith("\t") and level:
            categories[f"{level} {name}"] = _percentage(value, f"{where}: {name}")
        elif name == "DPG-Bench score":
            overall = _percentage(value, f"{where}: {name}")
    if overall is None or not categories:
        raise ValueError(f"{where}: no `DPG-Bench score:` or no category; expected a run to its end")
    return {"overall": overall, **dict(sorted(categories.items()))}


def _percentage(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 100 + _TOLERANCE:
        raise ValueError(f"{where}: found {text!r}; expected a percentage")
    return value


READERS: dict[str, Callable[[str | Path], Scores]] = {"geneval": read_geneval, "dpg": read_dpg}


def summarize(bench: str, pattern: str) -> tuple[dict, Path]:
    """(what scores.json holds, where it belongs) of the result files that `pattern` names: one, or several seeds'.

    {"bench", "files", "scores": {name: {"mean", "std", "values", "counts"}}}, with the standard deviation over files
    (N - 1; None for a single one). It belongs into the folder that all files are in. ValueError where there is no
    file, or one has other names of scores.
    """
    paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"--summary {pattern}: no such file; expected results of the scorer of {bench}")
    runs = [READERS[bench](path) for path in paths]
    for path, run in zip(paths, runs):
        if other := run.values.keys() ^ runs[0].values.keys():
            raise ValueError(f"{path}: not the same scores as {paths[0]}: {', '.join(sorted(other))}")
    scores = {}
    for name in runs[0].values:
        values = [run.values[name] for run in runs]
        counts = [run.counts[name] for run in runs if name in run.counts]
        scores[name] = {
            "mean": fmean(values),
            "std": stdev(values) if len(values) > 1 else None,
            "values": values,
            "counts": counts,
        }
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return {"bench": bench, "files": paths, "scores": scores}, Path(folder) / "scores.json"


def table(summary: dict) -> str:
    """The summary for a terminal: a line per score."""
    many = len(summary["files"]) > 1
    digits = 5 if summary["bench"] == "geneval" else 2
    width = max(len(name) for name in summary["scores"])
    lines = [f"{summary['bench']}, {len(summary['files'])} result file{'s' if many else ''}"]
    for name, score in summary["scores"].items():
        words = f"{name:<{width}}  {score['mean']:>9.{digits}f}"
        if many:
            words += f"  +- {score['std']:.{digits}f}"
        if counts := sorted(set(score["counts"])):
            words += f"  of {' / '.join(map(str, counts))}"
        lines.append(words)
    return "\n".join(lines)


def _lines(path: str | Path) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    return text.split("\n") if text else []
