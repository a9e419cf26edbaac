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


def embed(ids, tables, bases, *, sizes, projections=None, terms=(), slots=(), order=None):
    """slots: (rows, index, role). Projections are weights [C, D] or (weight, bias [C])."""
    projections = projections or [None] * len(tables)

    def project(row, projection):
        weight, bias = projection if isinstance(projection, tuple) else (projection, None)
        row = row if weight is None else weight.double() @ row
        return row if bias is None else row + bias.double()

    rows, nothing = [], sum(project(t[0].double(), p) * 0 for t, p in zip(tables, projections))
    nothing = nothing + sum(t.double().sum() * 0 for t in [*(t for _, t in terms), *(s[0] for s in slots)])
    for t, i in enumerate(ids.tolist()):
        row = nothing
        for table, base, size, projection in zip(tables, bases, sizes, projections):
            if base <= i < base + size:
                row = row + project(table[i - base].double(), projection)
        for values, index, role in slots:
            for n in (index == t).nonzero().flatten().tolist():
                row = values[n].double() + (nothing if role == "replace" else row)
        for index, table in terms:
            if 0 <= index[t] < len(table):
                row = row + table[index[t]].double()
        rows.append(row)
    return torch.stack(rows) if rows else nothing.expand(0, -1)


def linear_cross_entropy(
    h, weights, bases, labels, *, sizes, row_weight=None, row_class=None, rows=None, class_cu=None,
    z_loss=0.0, label_smoothing=0.0, softcap=0.0, joint=False, metrics=False,
):  # fmt: skip
    """-> (sum, count) float64[ranges], float64[] if joint; with metrics also (loss, count, scored, correct)."""
    total = [h.double().sum() * 0 for _ in bases]
    counts = torch.zeros(3, len(bases), dtype=torch.float64)
    for t, kind, x, at in _head_rows(h, weights, bases, labels, sizes, row_class, rows, class_cu, softcap):
        weight = 1.0 if row_weight is None else float(row_weight[t])
        if weight == 0:
            continue
        lse = x.logsumexp(0)
        target = x[at] if at is not None else lse.detach() * 0 - math.inf
        loss = (1 - label_smoothing) * (lse - target) + label_smoothing * (lse - x.mean()) + z_loss * lse.square()
        total[kind] = total[kind] + weight * loss
        counts[:, kind] += torch.tensor([weight, 1, x.tolist().index(x.max()) == at])
    total = torch.stack(total)
    head = (total.sum(), counts[0].sum()) if joint else (total, counts[0])
    return (*head, (total.detach(), *counts)) if metrics else head


def linear_logprob(
    h, weights, bases, labels, *, sizes, row_class=None, rows=None, class_cu=None, temperature=1.0, softcap=0.0,
    entropy=False,
):  # fmt: skip
    """-> float64[T], or with entropy two of them."""
    none = h.double().sum() * 0
    logprob, spread = [none] * len(labels), [none] * len(labels)
    for t, _, x, at in _head_rows(h, weights, bases, labels, sizes, row_class, rows, class_cu, softcap):
        p = (x / temperature).log_softmax(0)
        logprob[t] = p[at] if at is not None else none - math.inf
        spread[t] = -(p.exp() * p).sum()
    logprob, spread = (torch.stack(x) if x else none.expand(0) for x in (logprob, spread))
    return (logprob, spread) if entropy else logprob


def _head_rows(h, weights, bases, labels, sizes, row_class, rows, class_cu, softcap):
    """For every row with a label: (row, range of its label, the logits it may choose from, the label among them)."""
    listed = [(t, -1 if row_class is None else int(row_class[t])) for t in range(len(labels))]
    if rows is not None:
        groups = [*range(len(sizes)), -1]
        listed = [(t, g) for g, a, b in zip(groups, class_cu, class_cu[1:]) for t in rows[a:b].tolist()]
    for t, only in listed:
        label = int(labels[t]) if 0 <= t < len(labels) else -1
        kind = next((i for i, (b, n) in enumerate(zip(bases, sizes)) if b <= label < b + n), None)
        if kind is None:
            continue
        seen = [only] if only >= 0 else range(len(sizes))
        x = torch.cat([weights[i][: sizes[i]].double() @ h[t].double() for i in seen])
        before = sum(sizes[i] for i in seen if i < kind)
        yield (
            t,
            kind,
            softcap * torch.tanh(x / softcap) if softcap else x,
            (before + label - bases[kind] if kind in seen else None),
        )


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


def vq_straight_through(x, codebook, ids, *, beta=1.0):
    x, codes = x.double(), x.detach().double().clone()
    for row, i in enumerate(ids.tolist()):
        codes[row] = codebook[i].double() if 0 <= i < len(codebook) else x[row].detach()
    outside = ((ids < 0) | (ids >= len(codebook)))[:, None]
    return x + (codes.masked_fill(outside, 0) - x).detach(), beta * (x - codes).square().mean(1)


def vq_reset_codes(cluster_size, embed_sum, codebook, dead, rows, available=None):
    """-> the new (cluster_size, embed_sum, codebook) and how many codes began anew."""
    size, total, book = (t.double().clone() for t in (cluster_size, embed_sum, codebook))
    share = cluster_size.double().mean()
    fresh = list(rows.double())[: None if available is None else int(available)]
    turn = 0
    for i in range(len(size)):
        if dead[i] and turn < len(fresh):
            size[i], total[i], book[i] = share, fresh[turn] * share, fresh[turn]
            turn += 1
    return size, total, book, turn


def lfq_quantize(z, *, scale=1.0):
    """-> (codes float64[..., d] with straight-through gradient, ids int64[...])."""
    signs = torch.where(z.detach() > 0, scale, -scale).double()
    ids = sum((z[..., i].detach() > 0).long() << i for i in range(z.shape[-1]))
    return z.double() + (signs - z.double()).detach(), ids


def lfq_entropy(z, groups, temperature, *, scale=1.0):
    """-> (entropy of each row's softmax over all codes, entropy of the mean, summed over groups of bits)."""
    per_row, batch = 0, 0
    for part in z.double().chunk(groups, dim=-1):
        codes = torch.cartesian_prod(*[torch.tensor([-scale, scale], dtype=torch.float64)] * part.shape[-1])
        codes = codes.reshape(-1, part.shape[-1])
        p = torch.softmax(-(part.unsqueeze(-2) - codes).square().sum(-1) / temperature, dim=-1)
        per_row = per_row + torch.special.entr(p).sum(-1)
        batch = batch + torch.special.entr(p.reshape(-1, len(codes)).mean(0)).sum()
    return per_row, batch


def decode_attention(q, k_new, v_new, k_cache, v_cache, length, start=None, scale=None):
    """-> (o, the caches with the new column), nothing in place."""
    q, k_cache, v_cache = q.double(), k_cache.double().clone(), v_cache.double().clone()
    (B, Hq, D), Hk = q.shape, k_cache.shape[2]
    o = torch.zeros_like(q)
    for b, at in enumerate(length.expand(B).tolist()):
        k_cache[b, at], v_cache[b, at] = k_new[b].double(), v_new[b].double()
        lo = 0 if start is None else int(start[b])
        for h in range(Hq):
            keys, values = (cache[b, lo : at + 1, h * Hk // Hq] for cache in (k_cache, v_cache))
            o[b, h] = (keys @ q[b, h] * (D**-0.5 if scale is None else scale)).softmax(0) @ values
    return o, k_cache, v_cache


def sample_distribution(
    logits, *, uncond=None, guidance=1.0, seen=None, penalty=1.0, temperature=1.0, top_k=0, top_p=1.0, lo=0, hi=None
):
    """float64[R, V]: with which probability sample_logits draws each token."""
    out = torch.zeros(logits.shape, dtype=torch.float64)
    for r, row in enumerate(logits.double()):
        if penalty != 1:
            row = torch.where(seen[r], torch.where(row < 0, row * penalty, row / penalty), row)
        x = row[lo:hi]
        if guidance != 1:
            u = uncond[r, lo:hi].double()
            never = x.isinf() | u.isinf()
            x = (u.log_softmax(0) + guidance * (x.log_softmax(0) - u.log_softmax(0))).masked_fill(never, -torch.inf)
        if temperature == 0:
            out[r, lo + x.tolist().index(x.max())] = 1
            continue
        x = x / temperature
        if top_k:
            x = x.masked_fill(x < x.sort(descending=True).values[min(top_k, len(x)) - 1], -torch.inf)
        p = x.softmax(0)
        if top_p < 1:
            values, count = p.unique(return_counts=True)  # ascending; equal tokens share their fate
            above = (values * count).flip(0).cumsum(0).flip(0) - values * count
            p = p.masked_fill(p < values[above < top_p].min(), 0)
        out[r, lo:hi] = p / p.sum()
    return out


def philox(counter, key):
    """The four words of Philox4x32-10 for four counter words and two key words, all integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k0, b % 2**32, a >> 32 ^ c[3] ^ k1, a % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def adamw(params, grads, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, max_norm=0.0):
    """The weights after one step for each list of `grads`, clipped to a global norm if max_norm > 0."""
    params = [p.double() for p in params]
    m, v = [0 * p for p in params], [0 * p for p in params]
    for t, now in enumerate(grads, start=1):
        now = [g.double() for g in now]
        norm = math.sqrt(sum(float((g * g).sum()) for g in now))
        scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
        for i, g in enumerate(now):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * scale * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * (scale * g) ** 2
            mean, square = m[i] / (1 - betas[0] ** t), v[i] / (1 - betas[1] ** t)
            params[i] = params[i] * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps)
    return params


def newton_schulz(g, steps=5, coefficients=(3.4445, -4.7750, 2.0315), eps=1e-7):
    a, b, c = coefficients
    x = g.double() / (torch.linalg.matrix_norm(g.double(), keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def add_rms_norm(x, residual, weight, eps=1e-6):
    stream = x.double() + residual.double()
    return rms_norm(stream, weight, eps), stream


def layer_norm(x, weight, bias, eps=1e-5):
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double() + bias.double()


def geglu(gate, up, approximate="none"):
    gate = gate.double()
    if approximate == "tanh":
        share = (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
    else:
        share = (1 + torch.erf(gate / math.sqrt(2))) / 2
    return gate * share * up.double()


def quick_gelu(x):
    return x.double() / (1 + torch.exp(-1.702 * x.double()))


def qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=1e-6):
    return rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), cos, sin)


def embed_touched(dy, ids, base, size):
    """-> (rows int64[n], grads float64[n, C]) of the rows that were touched."""
    rows = sorted({i - base for i in ids.tolist() if base <= i < base + size})
    grads = torch.zeros(len(rows), dy.shape[1], dtype=torch.float64)
    for grad, row in zip(grads, rows):
        grad += dy[ids == row + base].double().sum(0)
    return torch.tensor(rows, dtype=torch.int64), grads


def lazy_adamw_rows(param, exp_avg, exp_avg_sq, rows, grads, *, step, lr, betas, eps, weight_decay, grad_scale=1.0):
    """-> the new (param, exp_avg, exp_avg_sq)."""
    p, m, v = (x.double().clone() for x in (param, exp_avg, exp_avg_sq))
    for row, grad in zip(rows.tolist(), grads.double() * grad_scale):
        m[row] = betas[0] * m[row] + (1 - betas[0]) * grad
        v[row] = betas[1] * v[row] + (1 - betas[1]) * grad**2
        unbiased = m[row] / (1 - betas[0] ** (step + 1)), v[row] / (1 - betas[1] ** (step + 1))
        p[row] = p[row] * (1 - lr * weight_decay) - lr * unbiased[0] / (unbiased[1].sqrt() + eps)
    return p, m, v
