"""The slow truth of every op: float64, loops where clearer, gradients by autograd. For tests, never dispatched.

Each takes the arguments of the public op (tensors of any float dtype are raised to float64).
"""

from __future__ import annotations

import math

import torch


def rms_norm(x, weight, eps=1e-6):
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


def swiglu(gate, up):
    gate = gate.double()
    return gate / (1 + torch.exp(-gate)) * up.double()


def rope(q, k, cos, sin):
    def turn(x):
        z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double()).unsqueeze(1)
        return torch.cat([z.real, z.imag], dim=-1)

    return turn(q), turn(k)


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k=None, *, kv_lo=None, kv_hi=None, scale=None):
    """-> (o[Tq, Hq, D], lse[Hq, Tq]), one query row at a time."""
    _, Hq, D = q.shape
    cu_q = cu_seqlens_q.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    scale = 1 / math.sqrt(D) if scale is None else scale
    group = Hq // k.shape[1]
    K, V = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    out, lse = [], []
    for s in range(len(cu_q) - 1):
        for i in range(cu_q[s], cu_q[s + 1]):
            lo = cu_k[s] if kv_lo is None else max(cu_k[s], int(kv_lo[i]))
            hi = cu_k[s + 1] - (cu_q[s + 1] - 1 - i) if kv_hi is None else min(cu_k[s + 1], int(kv_hi[i]))
            if hi <= lo:
                out.append(0 * q[i].double())
                lse.append(torch.full((Hq,), -math.inf, dtype=torch.float64))
                continue
            scores = torch.einsum("hd,jhd->hj", q[i].double(), K[lo:hi]) * scale
            out.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), V[lo:hi]))
            lse.append(scores.logsumexp(-1))
    if not out:
        return q.double() * 1, torch.zeros(Hq, 0, dtype=torch.float64)
    return torch.stack(out), torch.stack(lse, dim=1)


def embed(ids, tables, bases, *, sizes):
    nothing = sum(t[0].double() * 0 for t in tables)
    rows = []
    for i in ids.tolist():
        row = nothing
        for table, base, size in zip(tables, bases, sizes):
            if base <= i < base + size:
                row = row + table[i - base].double()
        rows.append(row)
    return torch.stack(rows) if rows else nothing.expand(0, -1)


def linear_cross_entropy(h, weights, bases, labels, *, sizes, row_weight=None, row_class=None):
    """-> (sum float64[ranges], count float64[ranges]), one row at a time."""
    total = [h.double().sum() * 0 for _ in bases]
    count = [0.0 for _ in bases]
    for t, label in enumerate(labels.tolist()):
        kind = next((i for i, (b, n) in enumerate(zip(bases, sizes)) if b <= label < b + n), None)
        if kind is None:
            continue
        parts = [w[:n].double() @ h[t].double() for w, n in zip(weights, sizes)]
        target = parts[kind][label - bases[kind]]
        only = -1 if row_class is None else int(row_class[t])
        if only >= 0:
            parts = [parts[only]]
            target = target if only == kind else target * 0 - math.inf
        weight = 1.0 if row_weight is None else float(row_weight[t])
        total[kind] = total[kind] + weight * (torch.cat(parts).logsumexp(0) - target)
        count[kind] += weight
    return torch.stack(total), torch.tensor(count, dtype=torch.float64)


def vq_nearest(x, codebook):
    """-> (ids int64[N], squared distances float64[N, K])."""
    distances = (x.double()[:, None] - codebook.double()[None]).square().sum(-1)
    ids = [row.index(min(row)) for row in distances.tolist()]  # list.index: the first of equals
    return torch.tensor(ids, dtype=torch.int64), distances


def vq_code_sums(x, ids, num_codes):
    counts = torch.zeros(num_codes, dtype=torch.float64)
    sums = torch.zeros(num_codes, x.shape[1], dtype=torch.float64)
    for row, i in zip(x.double(), ids.tolist()):
        if i >= 0:
            counts[i] += 1
            sums[i] += row
    return counts, sums


def vq_ema_update(cluster_size, embed_sum, codebook, counts, sums, decay, eps):
    """-> the new (cluster_size, embed_sum, codebook)."""
    size = decay * cluster_size.double() + (1 - decay) * counts.double()
    total = decay * embed_sum.double() + (1 - decay) * sums.double()
    book = codebook.double().clone()
    for i, n in enumerate(size.tolist()):
        if n > 0:
            book[i] = total[i] / ((n + eps) / (size.sum() + len(size) * eps) * size.sum())
    return size, total, book


def fsq_quantize(z, levels):
    """-> (codes float64[..., d] with straight-through gradient, ids int64[...])."""
    codes, ids, basis = [], 0, 1
    for i, L in enumerate(levels):
        half = (L - 1) * (1 + 1e-3) / 2
        offset = 0.5 if L % 2 == 0 else 0.0
        y = torch.tanh(z[..., i].double() + math.atanh(offset / half)) * half - offset
        q = torch.round(y)  # half to even
        codes.append((y + (q - y).detach()) / (L // 2))
        ids = ids + (q.detach().long() + L // 2) * basis
        basis *= L
    return torch.stack(codes, dim=-1), ids


def fsq_dequantize(ids, levels):
    codes, rest = [], ids.long()
    for L in levels:
        codes.append((rest % L - L // 2).double() / (L // 2))
        rest = rest // L
    return torch.stack(codes, dim=-1)
