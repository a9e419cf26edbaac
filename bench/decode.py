"""Decoding beside Hugging Face's `generate`, on the same weights: milliseconds for one more token of every row.

    PYTHONPATH=. python bench/decode.py [--device cpu|cuda] [--budget SECONDS] [--out DIR] [--only REGEX]
                                        [--without IMPL]

A Qwen2-shaped model with text ids and 64,000 codes is written once and loaded by two processes, ours and theirs, which
take turns. Theirs: a dynamic cache, a static one, and a static one whose forward `generate` itself compiles. Guidance
is its own `guidance_scale` with `negative_prompt_ids` (a second, dynamic cache and a second forward), and as in
SimpleAR no id is masked: it scores text ids, too, and keeps the 64,000 likeliest. Ours scores the codes alone, on a GPU
from a CUDA graph. A time is that of a call less that of one which draws one token (`first_ms`: the prompts), over the
steps between; ratio: the best of theirs over it. Before timing, greedy tokens of both over all ids are compared:
`agree` is the share that is equal; in float32 all have to be. peak_bytes: the most memory that was in use during a
call, weights included (on a CPU: resident).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Child, Rows, interleaved, serve
from measure import NO_TIME
from run import Budget, device_name

from vtrain.generate.engine import generate
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.models.hf import export_hf, load_decoder
from vtrain.models.presets import preset
from vtrain.vocab import Vocabulary

CODES = 64000
PROMPT, NEGATIVE = 32, 48  # ids
CFG = 6.0
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
MOST_ROUNDS = 5
GREEDY = {"batch": 4, "steps": 3}


class Size(NamedTuple):
    """A model, and how many tokens are drawn from it."""

    name: str
    config: DecoderConfig
    text: int
    steps: int


SIZES = {
    "cpu": [
        Size("40m", preset("qwen2.5-0.5b", layers=8, hidden=384, heads=6, kv_heads=2, ffn=1024), 8000, 32),
        Size("0.5b", preset("qwen2.5-0.5b"), 151672, 16),
    ],
    "cuda": [
        Size("0.5b", preset("qwen2.5-0.5b"), 151672, 1024),
        Size("1.5b", preset("qwen2.5-1.5b"), 151672, 1024),
    ],
}


class Case(NamedTuple):
    batch: int
    cfg: float
    steps: int
    threads: int


def cases(size: Size, device: str) -> list[Case]:
    """The most valuable first: guided, one picture at a time."""
    threads = [1] if device == "cuda" else sorted({1, len(os.sched_getaffinity(0))})
    return [Case(b, cfg, size.steps, t) for t in threads for b, cfg in ((1, CFG), (4, CFG), (1, 1.0), (4, 1.0))]


def prompts(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1000, (batch, length), generator=torch.Generator().manual_seed(length))


class Ours:
    """vtrain's engine; IMPLS name its options."""

    IMPLS = {"cpu": {"vtrain": {}}, "cuda": {"vtrain": {}, "vtrain, no graph": {"graph": False}}}

    def __init__(self, folder: Path, device: str) -> None:
        self.decoder = load_decoder(folder, device, DTYPES[device])

    def sample(self, options: dict[str, Any], case: Case) -> None:
        self._generate(case.batch, case.steps, cfg=case.cfg, top_k=CODES, **options)

    def greedy(self, batch: int, steps: int) -> list:
        return self._generate(batch, steps, temperature=0.0, vocab_range=None).tolist()

    def _generate(self, batch: int, steps: int, **options: Any) -> torch.Tensor:
        away = prompts(batch, NEGATIVE).tolist()
        ids = prompts(batch, PROMPT).tolist()
        return generate(self.decoder, ids, range(batch), steps=steps, uncond_prompts=away, **options)


class HuggingFace:
    """transformers' own `generate`."""

    _ALL = {
        "HF dynamic": {},
        "HF static": {"cache_implementation": "static", "disable_compile": True},
        "HF static, compiled": {"cache_implementation": "static"},
    }
    IMPLS = {"cpu": _ALL, "cuda": _ALL}

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM, CompileConfig

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[device], attn_implementation="sdpa")
        self.model.to(device).eval()
        self.device = device
        self._compile = CompileConfig()
        self._compile._compile_all_devices = True  # else it compiles on GPUs only

    def sample(self, options: dict[str, Any], case: Case) -> None:
        options = {"do_sample": True, "temperature": 1.0, "top_k": CODES, "top_p": 1.0, **options}
        if "cache_implementation" in options and "disable_compile" not in options:
            options["compile_config"] = self._compile
        if case.cfg != 1:
            options |= {
                "guidance_scale": case.cfg,
                "negative_prompt_ids": prompts(case.batch, NEGATIVE).to(self.device),
            }
        self._generate(case.batch, case.steps, **options)

    def greedy(self, batch: int, steps: int) -> list:
        return self._generate(batch, steps, do_sample=False)[:, PROMPT:].tolist()

    def _generate(self, batch: int, steps: int, **options: Any) -> torch.Tensor:
        ids = prompts(batch, PROMPT).to(self.device)
        fixed = {"max_new_tokens": steps, "min_new_tokens": steps, "eos_token_id": None, "pad_token_id": 0}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **options)


SIDES = {"ours": Ours, "theirs": HuggingFace}


class Answers:
    """A child's side: one model, asked for greedy tokens, or to draw in one way and tell how long it took."""

    def __init__(self, side: str, folder: Path, device: str) -> None:
        self.made, self.device = SIDES[side](folder, device), device

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "greedy":
            return {"ids": self.made.greedy(**GREEDY)}
        case = Case(**request["case"])
        torch.set_num_threads(case.threads)
        options = self.made.IMPLS[self.device][request["impl"]]
        forget_peak(self.device)
        first, whole = (self._ms(options, case._replace(steps=steps)) for steps in (1, case.steps))
        return {"ms": (whole - first) / (case.steps - 1), "first_ms": first, "peak_bytes": peak_bytes(self.device)}

    def _ms(self, options: dict[str, Any], case: Case) -> float:
        start = time.perf_counter()
        self.made.sample(options, case)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew


def peak_bytes(device: str) -> int:
    """The most memory in use since then."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


class Impl(NamedTuple):
    """One implementation of a child that has several, to be asked like a child of its own."""

    child: Child
    name: str

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return self.child.ask({**request, "impl": self.name})


def measure(rows: Rows, size: Size, chosen: Sequence[Case], args: argparse.Namespace, left: Callable) -> None:
    """Cases of one model in the time that is left for it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        folder = Path(folder) / "model"
        write_model(size, folder)
        children = {}
        for side in SIDES:
            command = [__file__, "--serve", side, "--model", str(folder), "--device", args.device]
            children[side] = stack.enter_context(Child(command, folder.parent / f"{side}.log"))
        agree = agreement(*(child.ask({"do": "greedy"}) for child in children.values()))
        if agree < 1 and DTYPES[args.device] == torch.float32:
            raise ValueError(f"{size.name}: only {agree:.0%} of the greedy tokens are equal: not the same model")
        impls = {
            name: Impl(children[side], name)
            for side, made in SIDES.items()
            for name in made.IMPLS[args.device]
            if not name.startswith(tuple(args.without))
        }
        for number, case in enumerate(chosen):
            share = left() / (len(chosen) - number)
            answers = take_turns(impls, case, share) if share > 0 else {name: [{"error": NO_TIME}] for name in impls}
            write_rows(rows, size, case, answers, args.device, agree)


def write_model(size: Size, folder: Path) -> None:
    vocab = Vocabulary.of(text=size.text, visual=CODES)
    decoder = Decoder(size.config, vocab)
    export_hf(decoder.named_parameters(), size.config, vocab, folder)


def agreement(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The share of greedy tokens that are equal."""
    for found in (one, other):
        if "error" in found:
            raise ValueError(f"greedy tokens: {found['error']}")
    return (torch.tensor(one["ids"]) == torch.tensor(other["ids"])).double().mean().item()


def take_turns(impls: dict[str, Impl], case: Case, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """The answers of every implementation, as many rounds as fit; the first, which compiles, is not counted."""
    request = {"do": "sample", "case": case._asdict()}
    end = time.perf_counter() + seconds
    first = {name: impl.ask(request) for name, impl in impls.items()}
    working = {name: impl for name, impl in impls.items() if "error" not in first[name]}
    one_round = sum(first[name]["ms"] * case.steps + 2 * first[name]["first_ms"] for name in working) / 1e3
    rounds = min(MOST_ROUNDS, max(1, int((end - time.perf_counter()) / max(one_round, 1e-3))))
    answers = interleaved(working, request, rounds, warm_up=0)
    return {name: answers.get(name, [found]) for name, found in first.items()}


def write_rows(rows: Rows, size: Size, case: Case, answers: dict[str, list], device: str, agree: float) -> None:
    times = {name: [a["ms"] for a in found if "ms" in a] for name, found in answers.items()}
    theirs = [statistics.median(t) for name, t in times.items() if name.startswith("HF") and t]
    for name, found in answers.items():
        told = [a for a in found if "ms" in a]
        rows.add(
            f"decode {size.name} b{case.batch} cfg {case.cfg:g}", name, times[name], "ms", less=True,
            shape={"model": size.name, **case._asdict()}, dtype=str(DTYPES[device]).removeprefix("torch."),
            baseline=min(theirs, default=None), package="transformers" if name.startswith("HF") else "",
            error=found[0].get("error", ""), device=device, agree=round(agree, 3),
            first_ms=statistics.median(a["first_ms"] for a in told) if told else None,
            peak_bytes=max((a["peak_bytes"] for a in told), default=None),
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--budget", type=float, default=600.0, metavar="SECONDS")
    p.add_argument("--out", type=Path, help="folder of the rows (default: bench/results/<device>)")
    p.add_argument("--only", default="", metavar="REGEX", help="models and cases that it is found in")
    p.add_argument("--without", action="append", default=[], metavar="IMPL", help="leave out those that begin so")
    p.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    p.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args(arguments)
    if args.serve:
        serve(Answers(args.serve, args.model, args.device))
        return 0
    out = args.out or Path(__file__).parent / "results" / device_name(args.device)
    path = out / f"{time.strftime('%Y-%m-%d-%H%M%S')}-decode.jsonl"
    budget, rows = Budget(args.budget), Rows("decode", path)
    chosen = {size: [c for c in cases(size, args.device) if re.search(args.only, f"{size.name} {c}")]
              for size in SIZES[args.device]}  # fmt: skip
    chosen = {size: some for size, some in chosen.items() if some}
    for number, (size, some) in enumerate(chosen.items()):
        later = budget.left() * (1 - 1 / (len(chosen) - number))  # what the sizes after this one keep
        measure(rows, size, some, args, lambda later=later: budget.left() - later)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
