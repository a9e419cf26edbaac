"""Vector quantisation: nearest code, straight-through rows, and codebooks that are moving averages of their rows."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from vkernels import _host
from vkernels.arguments import require_floats, require_indices
from vkernels.host import to_numpy
from vkernels.registry import (
    Backend,
    accumulate_dtype,
    anywhere,
    below_autograd,
    define,
    define_autograd,
    define_backward,
    jit,
    on_cpu,
)

_CHUNK_SCORES = 16 << 20  # scores of one block: 64 MB in float32


def vq_nearest(x: torch.Tensor, codebook: torch.Tensor, *, exact: bool = True) -> torch.Tensor:
    """The index of the code nearest to each row. x[N, D], codebook[K, D] -> int32[N]; ties give the lowest index.

    On the CPU by float64. On a GPU, where several codes come that near, the squared distance may exceed the least by
    2e-6 of |x|^2 + max |e|^2; not exact: by 1e-3 of that, from one product of values rounded to 11 bits instead of
    three. Codes wider than 256 are as exact there as torch's float32 products. Memory is O(N + K).
    """
    _check_codebook("vq_nearest", x, codebook)
    return _nearest(x, codebook, exact)


def vq_straight_through(
    x: torch.Tensor, codebook: torch.Tensor, ids: torch.Tensor, *, beta: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x[N, D], codebook[K, D], ids int[N] -> (codebook[ids] of x's dtype, commitment float32[N]).

    The gradient of the rows passes straight to x. commitment = beta * mean over D of (x - code)^2, whose gradient moves
    x only: the codebook follows by `vq_ema_update`, which may run before the backward pass. Rows with an id outside the
    codebook are zero, without commitment.
    """
    _check_codebook("vq_straight_through", x, codebook)
    if codebook.requires_grad:
        raise ValueError("vq_straight_through: the codebook requires a gradient; expected one that vq_ema_update moves")
    _check_ids("vq_straight_through", x, ids)
    return _straight_through(x, codebook, ids, beta)


def vq_code_sums(x: torch.Tensor, ids: torch.Tensor, num_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x[N, D], ids int[N] -> (counts float32[K], sums float32[K, D]) of the rows of each code.

    Rows with an id outside 0..K-1 are left out.
    """
    require_floats("vq_code_sums", x=x)
    _check_ids("vq_code_sums", x, ids)
    if num_codes < 1:
        raise ValueError(f"vq_code_sums: num_codes {num_codes}, expected a positive one")
    return _code_sums(x, ids, num_codes)


def vq_ema_update(
    cluster_size: torch.Tensor,
    embed_sum: torch.Tensor,
    codebook: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    decay: float,
    eps: float,
) -> None:
    """Move cluster_size[K] and embed_sum[K, D] towards counts and sums and set codebook[K, D] to their ratio, in place.

    The divisor is Laplace-smoothed: (size + eps) / (n + K * eps) * n with n = sum of the sizes. Codes of size 0 keep
    their vector.
    """
    state = {"cluster_size": cluster_size, "embed_sum": embed_sum, "counts": counts, "sums": sums}
    _check_state("vq_ema_update", codebook, state)
    if not (0 <= decay <= 1 and eps >= 0):
        raise ValueError(f"vq_ema_update: decay {decay}, eps {eps}; expected one in [0, 1] and one of at least 0")
    _ema_update(cluster_size, embed_sum, codebook, counts, sums, decay, eps)


def vq_reset_codes(
    cluster_size: torch.Tensor,
    embed_sum: torch.Tensor,
    codebook: torch.Tensor,
    dead: torch.Tensor,
    rows: torch.Tensor,
    available: torch.Tensor | None = None,
) -> torch.Tensor:
    """Let the j-th code of `dead` (bool[K]) begin anew as rows[j] (rows[R, D]), in place. -> how many did, int64[].

    Its size becomes the mean of cluster_size[K], its embed_sum that many times the row. Dead codes beyond R, or beyond
    `available` (int[] on the device: how many of the rows there are), stay as they are. Which codes are dead and which
    rows replace them is the caller's to say: `dead = cluster_size < 0.1 * cluster_size.mean()`.
    """
    state = {"cluster_size": cluster_size, "embed_sum": embed_sum, "dead": dead}
    _check_state("vq_reset_codes", codebook, state)
    require_floats("vq_reset_codes", rows=rows)
    if rows.dim() != 2 or rows.shape[1] != codebook.shape[1]:
        raise ValueError(f"vq_reset_codes: rows {list(rows.shape)}; expected [R, {codebook.shape[1]}]")
    if available is None:
        available = torch.full((), rows.shape[0], dtype=torch.int64, device=rows.device)
    return _reset_codes(cluster_size, embed_sum, codebook, dead, rows, available)


def vq_usage(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """counts[K] -> (codes used int64[], perplexity float32[]): exp of the entropy of their use, K if all alike.

    Both stay on the device; used / K is the share of the codebook in use.
    """
    if not isinstance(counts, torch.Tensor) or counts.dim() != 1 or counts.is_complex():
        raise ValueError(f"vq_usage: counts {getattr(counts, 'shape', counts)}, expected a tensor [K] of counts")
    shares = counts / counts.sum().clamp(min=1)
    return (counts > 0).sum(), torch.special.entr(shares).sum().exp()


def _check_codebook(op: str, x: torch.Tensor, codebook: torch.Tensor) -> None:
    require_floats(op, x=x, codebook=codebook)
    if x.dim() != 2 or codebook.dim() != 2 or x.shape[1] != codebook.shape[1] or 0 in codebook.shape:
        found = f"x {list(x.shape)} and codebook {list(codebook.shape)}"
        raise ValueError(f"{op}: {found}; expected [N, D] and [K, D] with K, D > 0")


def _check_ids(op: str, x: torch.Tensor, ids: torch.Tensor) -> None:
    require_indices(op, ids=ids)
    if x.dim() != 2 or ids.shape != x.shape[:1] or ids.dtype not in (torch.int32, torch.int64):
        found = f"x {list(x.shape)} and ids {ids.dtype} {list(ids.shape)}"
        raise ValueError(f"{op}: {found}; expected [N, D] and int32 or int64 [N]")


def _check_state(op: str, codebook: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
    """Vectors of K and tables of [K, D], as `codebook` has them."""
    require_floats(op, codebook=codebook, **{name: t for name, t in state.items() if name != "dead"})
    for name, t in state.items():
        if name == "dead" and getattr(t, "dtype", None) != torch.bool:
            raise ValueError(f"{op}: dead is {getattr(t, 'dtype', t)}, expected a tensor of torch.bool")
        shape = codebook.shape if name in ("embed_sum", "sums") else codebook.shape[:1]
        if codebook.dim() != 2 or t.shape != shape:
            raise ValueError(f"{op}: {name} {list(t.shape)} for a codebook {list(codebook.shape)}; expected [K, D]"
                             f" and {name} {list(shape)}")  # fmt: skip


def _scores(x, codebook):
    """x . e - |e|^2 / 2, whose argmax is the nearest code: [n, K]."""
    return torch.addmm(codebook.square().sum(1).mul_(-0.5), x, codebook.t())


def _first_best(scores, tolerance):
    """The lowest index among the scores within `tolerance`[n] of the row's best."""
    best = scores.amax(1, keepdim=True)
    return (scores >= best - tolerance.unsqueeze(1)).to(torch.int8).argmax(1)


def _nearest_torch(x, codebook, exact=True):
    x, codebook = x.float(), codebook.float()
    ids = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    reach = codebook.square().sum(1).max().sqrt()
    step = max(1, _CHUNK_SCORES // codebook.shape[0])
    for a in range(0, x.shape[0], step):
        part = x[a : a + step]
        ids[a : a + step] = _first_best(_scores(part, codebook), 2.0**-22 * reach * (part.norm(dim=1) + reach))
    return ids


def _nearest_cpu(x, codebook, exact=True):
    """As on other devices, then rows with more than one candidate are decided in float64."""
    x, codebook = x.detach(), codebook.detach()
    acc = torch.promote_types(x.dtype, torch.float32)
    X, E = x.to(acc), codebook.to(acc)
    E64 = codebook.double()
    ids = torch.empty(x.shape[0], dtype=torch.int32)
    reach = E64.square().sum(1).max().sqrt().item()
    step = max(1, _CHUNK_SCORES // (2 * E.shape[0]))  # all of a block's rows may need float64
    for a in range(0, X.shape[0], step):
        part = X[a : a + step]
        scores = _scores(part, E)
        best, first = scores.max(1)
        # A float32 score errs by less than (D + 2) 2^-24 |e| (|x| + |e|), the difference of two by twice that.
        error = part.norm(dim=1).add_(reach).mul_(reach * (E.shape[1] + 2) * 2.0**-23)
        close = ((scores >= (best - error).unsqueeze(1)).sum(1) > 1).nonzero().squeeze(1)
        if close.numel():
            exact = part[close].double()
            first[close] = _first_best(_scores(exact, E64), (exact.norm(dim=1) + reach).mul_(reach * 1e-14))
        ids[a : a + step] = first
    return ids


def _code_sums_cpu(x, ids, num_codes):
    ids = ids.long()
    counts = torch.bincount(ids[(ids >= 0) & (ids < num_codes)], minlength=num_codes).float()
    sums = torch.zeros(num_codes, x.shape[1])
    rows = to_numpy(x.float().contiguous())
    _host.add_rows(rows, to_numpy(ids.contiguous()), 0, num_codes, to_numpy(sums), torch.get_num_threads())
    return counts, sums


def _code_sums_torch(x, ids, num_codes):
    # One more row takes the rows that are left out: no selection whose shape depends on the data.
    ids = torch.where((ids >= 0) & (ids < num_codes), ids, num_codes)
    counts = torch.zeros(num_codes + 1, device=x.device).index_add_(0, ids, torch.ones(ids.shape[0], device=x.device))
    sums = torch.zeros(num_codes + 1, x.shape[1], device=x.device).index_add_(0, ids, x.float())
    return counts[:num_codes].clone(), sums[:num_codes].clone()


def _ema_update_torch(cluster_size, embed_sum, codebook, counts, sums, decay, eps):
    cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
    embed_sum.mul_(decay).add_(sums, alpha=1 - decay)
    n = cluster_size.sum()
    smoothed = (cluster_size + eps) / (n + cluster_size.shape[0] * eps) * n
    alive = (cluster_size > 0).unsqueeze(1)
    codebook.copy_(torch.where(alive, embed_sum / smoothed.unsqueeze(1), codebook))


def _reset_codes_torch(cluster_size, embed_sum, codebook, dead, rows, available):
    if rows.shape[0] == 0:
        return torch.zeros((), dtype=torch.int64, device=rows.device)
    share = cluster_size.mean()
    turn = dead.cumsum(0) - 1
    reset = dead & (turn < available.clamp(max=rows.shape[0]))
    fresh = rows.index_select(0, turn.clamp(0, rows.shape[0] - 1))
    codebook.copy_(torch.where(reset[:, None], fresh, codebook))
    embed_sum.copy_(torch.where(reset[:, None], fresh * share, embed_sum))
    cluster_size.copy_(torch.where(reset, share, cluster_size))
    return reset.sum()


def _straight_through_forward(x, codebook, ids, beta):
    acc = accumulate_dtype(x.dtype)
    inside = ((ids >= 0) & (ids < codebook.shape[0])).unsqueeze(1)
    codes = codebook.index_select(0, ids.clamp(0, codebook.shape[0] - 1)).to(acc)
    away = torch.where(inside, x.to(acc) - codes, 0)
    commitment = away.square().mean(1).mul_(beta)
    return torch.where(inside, codes, 0).to(x.dtype), commitment


def _straight_through_backward(dcodes, dcommitment, x, codes, ids, num_codes, beta):
    acc = accumulate_dtype(x.dtype)
    inside = (ids >= 0) & (ids < num_codes)
    pull = torch.where(inside, dcommitment * (2 * beta / max(x.shape[1], 1)), 0).unsqueeze(1)
    away = torch.where(inside.unsqueeze(1), x.to(acc) - codes, 0)  # what is left out may be infinite
    return away.mul_(pull).add_(dcodes).to(x.dtype)


def _dim(x, codebook, exact=True):
    return {"dim": x.shape[1]}


def _fits(facts):
    return None if facts["dim"] <= 256 else f"it takes at most 256 dimensions, the codes have {facts['dim']}"


def _rows_are_dense(cluster_size, embed_sum, codebook, *_):
    return {"dense": all(t.stride(-1) == 1 for t in (cluster_size, embed_sum, codebook))}


def _only_dense(facts):
    return None if facts["dense"] else "it writes in place to rows whose elements lie side by side only"


_nearest = define(
    "vq_nearest",
    "(Tensor x, Tensor codebook, bool exact=True) -> Tensor",
    fake=lambda x, codebook, exact=True: x.new_empty(x.shape[0], dtype=torch.int32),
    facts=_dim,
    cpu=Backend(_nearest_cpu, None, on_cpu),
    triton=jit("vq", "vq_nearest", takes=_fits),
    torch=Backend(_nearest_torch, None, anywhere),
)
_code_sums = define(
    "vq_code_sums",
    "(Tensor x, Tensor ids, int num_codes) -> (Tensor, Tensor)",
    fake=lambda x, ids, num_codes: (
        x.new_empty(num_codes, dtype=torch.float32),
        x.new_empty(num_codes, x.shape[1], dtype=torch.float32),
    ),
    cpu=Backend(_code_sums_cpu, None, on_cpu),
    triton=jit("vq_codebook", "vq_code_sums"),
    torch=Backend(_code_sums_torch, None, anywhere),
)
_ema_update = define(
    "vq_ema_update",
    "(Tensor(a!) cluster_size, Tensor(b!) embed_sum, Tensor(c!) codebook, Tensor counts, Tensor sums, float decay,"
    " float eps) -> ()",
    fake=lambda *args: None,
    facts=_rows_are_dense,
    triton=jit("vq_codebook", "vq_ema_update", takes=_only_dense),
    torch=Backend(_ema_update_torch, None, anywhere),
)
_reset_codes = define(
    "vq_reset_codes",
    "(Tensor(a!) cluster_size, Tensor(b!) embed_sum, Tensor(c!) codebook, Tensor dead, Tensor rows, Tensor available)"
    " -> Tensor",
    fake=lambda cluster_size, *_: cluster_size.new_empty((), dtype=torch.int64),
    facts=_rows_are_dense,
    triton=jit("vq_codebook", "vq_reset_codes", takes=_only_dense),
    torch=Backend(_reset_codes_torch, None, anywhere),
)
_straight_through = define(
    "vq_straight_through",
    "(Tensor x, Tensor codebook, Tensor ids, float beta) -> (Tensor, Tensor)",
    fake=lambda x, codebook, ids, beta: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype)),
    ),
    triton=jit("vq_codebook", "vq_straight_through", "vq_straight_through_backward"),
    torch=Backend(_straight_through_forward, _straight_through_backward, anywhere),
)
_straight_through_grad = define_backward(
    "vq_straight_through",
    "(Tensor dcodes, Tensor dcommitment, Tensor x, Tensor codes, Tensor ids, int num_codes, float beta) -> Tensor",
    fake=lambda dcodes, dcommitment, x, codes, ids, num_codes, beta: x.new_empty(x.shape),
)


class _StraightThrough(torch.autograd.Function):
    """Saves the chosen codes, not the codebook, which may move before the backward pass."""

    @staticmethod
    def forward(ctx, x, codebook, ids, beta):
        with below_autograd():
            codes, commitment = _straight_through(x, codebook, ids, beta)
        ctx.save_for_backward(x, codes, ids)
        ctx.num_codes, ctx.beta = codebook.shape[0], beta
        return codes, commitment

    @staticmethod
    @once_differentiable
    def backward(ctx, dcodes, dcommitment):
        dx = _straight_through_grad(dcodes, dcommitment, *ctx.saved_tensors, ctx.num_codes, ctx.beta)
        return dx, None, None, None


define_autograd("vq_straight_through", _StraightThrough)
