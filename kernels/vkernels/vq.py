"""Vector quantisation: nearest code, per-code sums, and the exponential-moving-average update of a codebook."""

from __future__ import annotations

import torch

from vkernels import _host
from vkernels.host import to_numpy
from vkernels.registry import Backend, anywhere, define, on_cpu

_CHUNK_SCORES = 16 << 20  # scores of one block: 64 MB in float32


def vq_nearest(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The index of the code nearest to each row. x[N, D], codebook[K, D] -> int32[N]; ties give the lowest index.

    Equal to the float64 argmin unless two codes are nearer to a tie than 1e-6 of the size of their scores.
    """
    return _nearest(x, codebook)


def vq_code_sums(x: torch.Tensor, ids: torch.Tensor, num_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x[N, D], ids int[N] -> (counts float32[K], sums float32[K, D]) of the rows of each code; ids < 0 are left out."""
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
    _ema_update(cluster_size, embed_sum, codebook, counts, sums, decay, eps)


def _scores(x, codebook):
    """x . e - |e|^2 / 2, whose argmax is the nearest code: [n, K]."""
    return torch.addmm(codebook.square().sum(1).mul_(-0.5), x, codebook.t())


def _first_best(scores, tolerance):
    """The lowest index among the scores within `tolerance`[n] of the row's best."""
    best = scores.amax(1, keepdim=True)
    return (scores >= best - tolerance.unsqueeze(1)).to(torch.int8).argmax(1)


def _nearest_torch(x, codebook):
    x, codebook = x.float(), codebook.float()
    ids = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    reach = codebook.square().sum(1).max().sqrt()
    step = max(1, _CHUNK_SCORES // codebook.shape[0])
    for a in range(0, x.shape[0], step):
        part = x[a : a + step]
        ids[a : a + step] = _first_best(_scores(part, codebook), 2.0**-22 * reach * (part.norm(dim=1) + reach))
    return ids


def _nearest_cpu(x, codebook):
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
    counts = torch.bincount(ids[ids >= 0], minlength=num_codes).float()
    sums = torch.zeros(num_codes, x.shape[1])
    rows = to_numpy(x.float().contiguous())
    _host.add_rows(rows, to_numpy(ids.contiguous()), 0, num_codes, to_numpy(sums), torch.get_num_threads())
    return counts, sums


def _code_sums_torch(x, ids, num_codes):
    # One more row takes the rows that are left out: no selection whose shape depends on the data.
    ids = torch.where(ids >= 0, ids, num_codes)
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


_nearest = define(
    "vq_nearest",
    "(Tensor x, Tensor codebook) -> Tensor",
    fake=lambda x, codebook: x.new_empty(x.shape[0], dtype=torch.int32),
    cpu=Backend(_nearest_cpu, None, on_cpu),
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
    torch=Backend(_code_sums_torch, None, anywhere),
)
_ema_update = define(
    "vq_ema_update",
    "(Tensor(a!) cluster_size, Tensor(b!) embed_sum, Tensor(c!) codebook, Tensor counts, Tensor sums, float decay,"
    " float eps) -> ()",
    fake=lambda *args: None,
    torch=Backend(_ema_update_torch, None, anywhere),
)
