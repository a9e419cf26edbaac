"""Whole training steps of a decoder on one device: ours, a plain compiled torch model, and Hugging Face's.

All train one shape on the same packed documents: float32 weights, bf16 compute on a GPU, clipping at 1, AdamW with
float32 states. MFU = (6 * weights in matrix products * tokens + 3 * attention's forward over the visible pairs) / time
/ the data sheet's bf16 peak of the GPU. A peer is built, warmed up, timed step by step and freed before the next comes.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from gpu import Timer, free_afterwards, one_line
from harness import Rows
from measure import NO_TIME
from ops.attention import documents
from torch import nn
from torch_model import TorchModel, document_attention, whole_logits

from vtrain.batch import Document, PackedBatch
from vtrain.dist.fsdp import shard
from vtrain.dist.mesh import world
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.models.flops import peak_flops, train_flops
from vtrain.models.presets import preset, to_hf_config
from vtrain.objectives.next_token import NextToken
from vtrain.train.optim import AdamW
from vtrain.train.tasks.root import Root
from vtrain.vocab import Vocabulary

BASELINE = "torch.compile"
WARM_UP = 3  # steps: compilation, the optimizer's states, the allocator
MOST_STEPS = 20
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
Step = Callable[[], object]


class Work(NamedTuple):
    """One micro-batch and the model it is for. B documents of L tokens, where all are of one length, else B = 1."""

    config: DecoderConfig
    vocab: Vocabulary
    batch: PackedBatch
    device: torch.device
    dtype: torch.dtype

    @property
    def lengths(self) -> list[int]:
        return self.batch.lengths.tolist()

    @property
    def rows(self) -> int:
        return len(self.lengths) if len(set(self.lengths)) == 1 else 1

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class Case(NamedTuple):
    model: str
    kind: str  # of documents, see ops/attention.py
    tokens: int


CASES = {
    "cuda": [
        Case("qwen3-0.6b", "even", 32768), Case("qwen3-0.6b", "mixed", 32768), Case("qwen3-1.7b", "even", 16384),
        Case("qwen3-1.7b", "mixed", 16384),
    ],
    "cpu": [Case("tiny", "even", 512), Case("tiny", "mixed", 512)],
}  # fmt: skip
TEXT = {"cuda": 151936, "cpu": 1000}  # ids of the vocabulary


def make_work(case: Case, device: torch.device, dtype: torch.dtype) -> Work:
    vocab = Vocabulary.of(text=TEXT[device.type])
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(vocab.size, (n,), generator=generator).int().numpy()
           for n in documents(case.kind, case.tokens).lengths]  # fmt: skip
    batch = PackedBatch.build([Document(x, key=i + 1) for i, x in enumerate(ids)], vocab)
    config = replace(preset(case.model), max_positions=max(case.tokens, preset(case.model).max_positions))
    return Work(config, vocab, batch.to(device), device, dtype)


def ours(work: Work, place) -> Step:
    """The pieces of vtrain's own loop: FSDP2's mixed precision, the objective, the optimizer."""
    with torch.device("meta"):
        model = Decoder(work.config, work.vocab)
    root = Root(model, NextToken())
    shard(root, model.layers, place, work.dtype)
    root.to_empty(device=work.device)
    model.init_weights(0)
    optimizer = AdamW(root.named_parameters(), **ADAMW)

    def step() -> torch.Tensor:
        terms, _ = root(work.batch)
        loss = terms["next_token"][0] / work.batch.scored
        loss.backward()
        norm = optimizer.clip(1.0, loss.detach())
        optimizer.step(norm.isfinite().float())
        return loss

    return step


def trained(module: nn.Module, loss_of: Callable[[], torch.Tensor], work: Work) -> Step:
    """A step as plain torch has it."""
    optimizer = torch.optim.AdamW(module.parameters(), fused=True, **ADAMW)

    def step() -> torch.Tensor:
        with work.autocast():
            loss = loss_of() / work.batch.scored
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def plain(work: Work, compiled: bool, head: Callable = whole_logits) -> Step:
    # FlexAttention has no backward pass on the CPU.
    attention = document_attention(work.lengths, work.device, flex=compiled and work.device.type == "cuda")
    with work.device:
        model = TorchModel(work.config, work.vocab.size, attention)
    if compiled:
        torch._dynamo.reset()
        for layer in model.layers:
            layer.compile(dynamic=False, fullgraph=True)
        head = torch.compile(head, dynamic=False) if head is whole_logits else head
    inputs = work.batch.ids.long(), work.batch.positions, work.batch.labels.long()
    return trained(model, lambda: model(*inputs, head), work)


def with_liger_head(work: Work) -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    def head(h, weight, labels):
        return fused(h, weight.to(h.dtype), labels, reduction="sum", accum_dtype=torch.float32)

    return plain(work, True, head)


def hugging_face(work: Work, change: Callable[[nn.Module], object] = lambda model: None) -> Step:
    """transformers' model of the same shape, after `change`: documents of one length as rows, others by positions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = to_hf_config(work.config, work.vocab)
    config = AutoConfig.for_model(made.pop("model_type"), **made, use_cache=False)
    with work.device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    change(model)
    ids, positions = (x.long().view(work.rows, -1) for x in (work.batch.ids, work.batch.positions))
    labels = work.batch.labels.long().view(work.rows, -1)

    def loss() -> torch.Tensor:
        asked = {"shift_labels": labels, "num_items_in_batch": 1, "use_cache": False}  # the sum, not the mean
        return model(ids, position_ids=positions, labels=ids, **asked).loss

    return trained(model, loss, work)


def hugging_face_liger(work: Work) -> Step:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    return hugging_face(work, lambda model: _apply_liger_kernel_to_instance(model=model))


def hugging_face_patched(work: Work) -> Step:
    import vkernels

    return hugging_face(work, vkernels.patch)


def peers(work: Work, place) -> dict[str, Callable[[], Step]]:
    return {
        "vtrain": lambda: ours(work, place),
        BASELINE: lambda: plain(work, True),
        "HF + Liger": lambda: hugging_face_liger(work),
        "torch.compile, Liger head": lambda: with_liger_head(work),
        "HF": lambda: hugging_face(work),
        "HF + vkernels.patch": lambda: hugging_face_patched(work),
        "torch eager": lambda: plain(work, False),
    }


def step_times(build: Callable[[], Step], timer: Timer, seconds: float) -> tuple[list[float], float]:
    """Microseconds of each step, and the loss after all of them."""
    step = build()
    for _ in range(WARM_UP):
        loss = step()
    timer.synchronize()
    times, end = [], time.perf_counter() + seconds
    while len(times) < MOST_STEPS and (not times or time.perf_counter() < end):
        start = time.perf_counter()
        loss = step()
        timer.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return times, loss.item()


def run(rows: Rows, timer: Timer, dtype: torch.dtype, only: str, without: Sequence[str], left: Callable) -> None:
    """Every case that `only` is found in, every peer but those `without`, until no time is left."""
    device = timer.device
    chosen = [c for c in CASES[device.type] if re.search(only, " ".join(map(str, c)))]
    with world(device.type) as place:
        for number, case in enumerate(chosen):
            work = make_work(case, device, dtype)
            _measure(rows, timer, case, work, place, without, left, 1 / (len(chosen) - number))


def _measure(rows: Rows, timer: Timer, case: Case, work: Work, place, without, left: Callable, share: float) -> None:
    """One case in its share of the time that is left."""
    print(f"{case.model}: {case.tokens} tokens, {case.kind} documents", flush=True)
    chosen = {name: build for name, build in peers(work, place).items() if not name.startswith(tuple(without))}
    end = max(left() * (1 - share), 0)
    found: dict[str, dict[str, Any]] = {}
    for name, build in chosen.items():
        if left() <= end:
            found[name] = {"times": [], "error": NO_TIME}
            continue
        with free_afterwards(timer.device):
            found[name] = _try(build, timer, (left() - end) / len(chosen) / 2)  # half of it is building and warming up
    baseline = median(found[BASELINE]["times"]) if BASELINE in found else None
    for name, columns in found.items():
        times = columns.pop("times")
        package = "liger-kernel" if "Liger" in name else "transformers" if name.startswith("HF") else ""
        about = {"device": timer.device.type, "name": f"{case.model}, {case.kind}", "shape": case._asdict()}
        about |= {"dtype": str(work.dtype).removeprefix("torch."), "package": package, **_rates(work, timer, times)}
        rows.add("training step", name, times, "us", baseline=baseline, less=True, **about, **columns)


def _try(build: Callable[[], Step], timer: Timer, seconds: float) -> dict[str, Any]:
    """The times of a peer's steps and other columns of its row; why there are none, where it fails."""
    try:
        if timer.on_gpu:
            torch.cuda.reset_peak_memory_stats(timer.device)
        times, loss = step_times(build, timer, seconds)
        peak = torch.cuda.max_memory_allocated(timer.device) if timer.on_gpu else None
        return {"times": times, "loss": loss, "peak_bytes": peak}
    except ModuleNotFoundError as missing:
        return {"times": [], "error": f"not installed: {missing.name}"}
    except Exception as error:  # a peer that fails is a result
        return {"times": [], "error": one_line(error)}


def _rates(work: Work, timer: Timer, times: Sequence[float]) -> dict[str, Any]:
    if not times:
        return {}
    flops, seconds = train_flops(work.config, work.vocab, work.batch.lengths, work.batch.scored), median(times) / 1e6
    peak = peak_flops(torch.cuda.get_device_name(timer.device)) if timer.on_gpu else None
    return {
        "tokens_per_s": round(work.batch.tokens / seconds), "flops": flops, "tflops": round(flops / seconds / 1e12, 4),
        "mfu": round(flops / seconds / peak, 4) if peak else None,
    }  # fmt: skip


def median(times: Sequence[float]) -> float | None:
    return statistics.median(times) if times else None
