"""Checks of vector quantisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import vkernels
from vkernels import oracle
from vkernels.check.judge import Check, Finding, error, judge, poisoned

# What a row may lose, as a share of |x|^2 + max |e|^2: of the float64 minimum of |x - e|^2.
EXACT, FAST = 2e-6, 1e-3


def rows_and_codes(n: int, k: int, d: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x[n, d] and a codebook[k, d] in float32; what `kind` says is what makes a nearest code hard to find."""
    g = torch.Generator().manual_seed(n + k + d)
    codebook = torch.randn(k, d, generator=g)
    if kind == "random":
        return torch.randn(n, d, generator=g), codebook
    pick = torch.randint(k, (n,), generator=g)
    if kind == "twins":  # every code at least twice: the lower one counts
        codebook[(k + 1) // 2 :] = codebook[: k // 2]
        return codebook[pick] + 0.01 * torch.randn(n, d, generator=g), codebook
    if kind == "near ties":  # half-way between two codes, but for 1e-5
        other = torch.randint(k, (n,), generator=g)
        a, b = codebook[pick], codebook[other]
        return (a + b) / 2 + 1e-5 * torch.randn(n, 1, generator=g) * (a - b), codebook
    if kind == "sizes":  # rows and codes of very different lengths
        codebook *= torch.exp2(torch.randint(-12, 12, (k, 1), generator=g).float())
        return torch.randn(n, d, generator=g) * torch.exp2(
            torch.randint(-40, 40, (n, 1), generator=g).float()
        ), codebook
    raise ValueError(f"kind {kind!r}; expected random, twins, near ties or sizes")


def distances_to(x: torch.Tensor, codebook: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (x.double() - codebook.double()[ids.long()]).square().sum(1)


def nearest(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The float64 argmin of |x - e|^2, the lowest of equals, a few rows at a time."""
    x, e = x.double(), codebook.double()
    step = max(1, (1 << 24) // e.shape[0])
    ids = [(e.square().sum(1) / 2 - part @ e.T).argmin(1) for part in x.split(step)]
    return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64, device=x.device)


def _nearest(n: int, k: int, d: int, kind: str = "random", *, exact: bool = True, small: bool = True) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        x, codebook = (t.to(device, dtype) for t in rows_and_codes(n, k, d, kind))
        with poisoned():
            ids = vkernels.vq_nearest(x, codebook, exact=exact)
            again = vkernels.vq_nearest(x, codebook, exact=exact)
        if ids.dtype != torch.int32 or ids.shape != (n,) or not ((ids >= 0) & (ids < k)).all():
            return [Finding("indices", math.inf, 0.0)]
        true = nearest(x, codebook)
        gap = distances_to(x, codebook, ids) - distances_to(x, codebook, true)
        size = x.double().square().sum(1) + codebook.double().square().sum(1).max()
        findings = [
            Finding("lost distance", (gap / size).max().item() if n else 0.0, EXACT if exact else FAST),
            Finding("again", 0.0 if torch.equal(ids, again) else math.inf, 0.0),
        ]
        if kind == "twins":
            findings.append(Finding("highest of twins", ids.max().item() if n else 0, (k + 1) // 2 - 1))
        return findings

    mode = "" if exact else " fast"
    return Check("vq_nearest", f"{n} rows, {k} codes of {d}, {kind}{mode}", run, small=small)


def _straight_through(n: int, k: int, d: int, *, small: bool = True) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        x, codebook = rows_and_codes(n, k, d, "random")
        ids = torch.randint(k, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.int32)

        def eager(x, codebook, ids, beta):
            codes = F.embedding(ids, codebook.to(x.dtype))
            return x + (codes - x).detach(), beta * (x - codes).square().mean(1)

        others = {"codebook": codebook.to(dtype), "ids": ids, "beta": 0.25}
        return judge(vkernels.vq_straight_through, eager, oracle.vq_straight_through, [x], device, dtype, others=others)

    return Check("vq_straight_through", f"{n} rows, {k} codes of {d}", run, small=small)


def _code_sums(n: int, k: int, d: int, skew: float, *, small: bool = True) -> Check:
    """skew: the share of rows that all take one code."""

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(n)
        x, ids = torch.randn(n, d, generator=g).to(dtype), torch.randint(-1, k, (n,), generator=g, dtype=torch.int32)
        ids = torch.where(torch.rand(n, generator=g) < skew, k // 2, ids)
        true = [torch.zeros(k + 1, dtype=torch.float64), torch.zeros(k + 1, d, dtype=torch.float64)]
        where = torch.where(ids < 0, k, ids).long()
        true[0].index_add_(0, where, torch.ones(n, dtype=torch.float64))
        true[1].index_add_(0, where, x.double())
        with poisoned():
            found, again = (vkernels.vq_code_sums(x.to(device), ids.to(device), k) for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(found, again))
        return [
            Finding("counts", error(found[0], true[0][:k]), 0.0),
            Finding("sums", error(found[1], true[1][:k]), 1e-6),
            Finding("again", 0.0 if same else math.inf, 0.0),
        ]

    return Check("vq_code_sums", f"{n} rows, {k} codes of {d}, {skew:.0%} at one", run, small=small)


def _in_place(op: str, k: int, d: int, arguments: Callable, *, small: bool = True) -> Check:
    """The state [K], [K, D], [K, D] after `op` beside the oracle's."""

    def run(device: torch.device, dtype: torch.dtype) -> list[Finding]:
        g = torch.Generator().manual_seed(k)
        size = torch.rand(k, generator=g) * (torch.rand(k, generator=g) < 0.8)
        state = [size, torch.randn(k, d, generator=g), torch.randn(k, d, generator=g)]
        others = arguments(g)
        true = getattr(oracle, op)(*state, *others)
        mine = [t.to(device, copy=True) for t in state]
        getattr(vkernels, op)(*mine, *[a.to(device) if isinstance(a, torch.Tensor) else a for a in others])
        return [Finding(f"state {i}", error(a, b), 1e-6) for i, (a, b) in enumerate(zip(mine, true))]

    return Check(op, f"{k} codes of {d}", run, dtypes=(torch.float32,), small=small)


def _ema_update(k: int, d: int, **options) -> Check:
    def arguments(g):
        counts = torch.randint(5, (k,), generator=g).float()
        return counts, torch.randn(k, d, generator=g) * counts[:, None], 0.9, 1e-5

    return _in_place("vq_ema_update", k, d, arguments, **options)


def _reset_codes(k: int, d: int, rows: int, available: int, **options) -> Check:
    def arguments(g):
        return torch.rand(k, generator=g) < 0.4, torch.randn(rows, d, generator=g), torch.tensor(available)

    return _in_place("vq_reset_codes", k, d, arguments, **options)


CHECKS = [
    _nearest(1, 1, 1),
    _nearest(0, 5, 3),
    _nearest(33, 3, 256),
    _nearest(130, 257, 33),
    _nearest(1, 4099, 8),
    _nearest(70, 1030, 8, "near ties"),
    _nearest(65, 2101, 5, "twins"),
    _nearest(80, 300, 16, "sizes"),
    _nearest(80, 1000, 32, exact=False),
    *[
        _nearest(n, k, d, kind, exact=exact, small=False)
        for n, k, d in [(65536, 16384, 8), (65537, 8192, 32), (4096, 262144, 64), (2049, 16383, 256), (3, 262144, 16)]
        for kind in ("random", "near ties", "twins")
        for exact in (True, False)
    ],
    _straight_through(0, 4, 3),
    _straight_through(1, 1, 1),
    _straight_through(57, 11, 19),
    _straight_through(65536, 16384, 32, small=False),
    _code_sums(0, 3, 2, 0.0),
    _code_sums(1, 1, 1, 0.0),
    _code_sums(301, 17, 33, 0.0),
    _code_sums(600, 40, 8, 0.7),
    _code_sums(65536, 16384, 32, 0.0, small=False),
    _code_sums(65536, 262144, 64, 0.9, small=False),
    _ema_update(1, 1),
    _ema_update(57, 19),
    _ema_update(262144, 32, small=False),
    _reset_codes(1, 1, 1, 1),
    _reset_codes(57, 19, 57, 7),
    _reset_codes(40, 8, 5, 40),
    _reset_codes(262144, 32, 65536, 60000, small=False),
]
