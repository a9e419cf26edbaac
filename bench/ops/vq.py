"""Vector quantisation: the nearest code, the sums of the codes' rows, and quantisers without a codebook."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Cost, Judged, On, Problem, case, compiled, eager

import vkernels
from vkernels import oracle

ROWS = 64
CHUNK_SCORES = 1 << 28  # distances of a chunk of rows that the plain peers hold at once


def chunked(part: Callable, K: int) -> Callable:
    def run(x, codebook):
        return torch.cat([part(rows, codebook) for rows in x.split(max(1, CHUNK_SCORES // K))])

    return run


def by_product(x, codebook):
    return torch.addmm(codebook.square().sum(1).mul(-0.5), x, codebook.t()).argmax(1)


def flash_kmeans() -> Callable:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    def run(x, codebook):
        return euclid_assign_triton(x[None], codebook[None], x.square().sum(1)[None])[0]

    return run


def vq_pytorch(D: int, K: int, codebook: torch.Tensor) -> Callable:
    """The library's quantiser in evaluation: distances to all codes, ids and looked-up rows."""

    def build() -> Callable:
        from vector_quantize_pytorch import VectorQuantize

        module = VectorQuantize(dim=D, codebook_size=K).to(codebook.device).eval()
        module.codebook = codebook
        return lambda x, _: module(x[None])[1][0]

    return build


TOY = {"N": 2048, "D": 32, "K": 1024}


@case("vq_nearest", "D=32 K=16k", value=95, full={"N": 65536, "D": 32, "K": 16384}, small=TOY)
@case("vq_nearest", "D=8 K=16k", value=72, full={"N": 65536, "D": 8, "K": 16384}, small={**TOY, "D": 8})
@case("vq_nearest", "D=256 K=16k", value=71, full={"N": 65536, "D": 256, "K": 16384}, small={**TOY, "D": 64})
@case("vq_nearest", "D=32 K=262k", value=73, full={"N": 65536, "D": 32, "K": 262144}, small={**TOY, "K": 8192})
@case("vq_nearest", "D=32 K=16k, fast", value=69, full={"N": 65536, "D": 32, "K": 16384, "exact": False},
      small={**TOY, "exact": False})  # fmt: skip
def vq_nearest(on: On, N: int, D: int, K: int, exact: bool = True) -> Problem:
    x, codebook = on.randn(N, D, dtype=torch.float32), on.randn(K, D, dtype=torch.float32)
    peers = {
        "torch eager": eager(chunked(by_product, K)), "torch.compile": lambda: chunked(compiled(by_product)(), K),
        "flash-kmeans": flash_kmeans, "vector-quantize-pytorch": vq_pytorch(D, K, codebook),
    }  # fmt: skip

    def ours(x, codebook):
        return vkernels.vq_nearest(x, codebook, exact=exact)

    judged = Judged(by_product, [x[:ROWS], codebook], ROWS)
    return Problem([x, codebook], ours, peers, judged=judged, forward=Cost(2.0 * N * K * D, 4 * (N * D + K * D + N)))


def one_hot(x, ids, K):
    """As vector-quantize-pytorch adds up."""
    hot = F.one_hot(ids.long(), K).to(x.dtype)
    return hot.sum(0), hot.t() @ x


def index_add(x, ids, K):
    counts = torch.bincount(ids, minlength=K).float()
    return counts, x.new_zeros(K, x.shape[1]).index_add_(0, ids.long(), x)


@case("vq_code_sums", value=45, full={"N": 65536, "D": 32, "K": 16384}, small=TOY)
def vq_code_sums(on: On, N: int, D: int, K: int) -> Problem:
    x, ids = on.randn(N, D, dtype=torch.float32), on.randint(0, K, N)

    def bound(way: Callable) -> Callable:
        return lambda x: way(x, ids, K)

    peers = {"torch eager": eager(bound(index_add)), "one-hot product": eager(bound(one_hot))}
    return Problem([x], bound(vkernels.vq_code_sums), peers, forward=Cost(0.0, 4 * (N * D + K * D + N)))


@case("vq_straight_through", value=15, full={"N": 1 << 20, "D": 32, "K": 16384}, small=TOY)
def vq_straight_through(on: On, N: int, D: int, K: int) -> Problem:
    x, codebook = on.randn(N, D, dtype=torch.float32), on.randn(K, D, dtype=torch.float32)
    ids = on.randint(0, K, N)

    def plain(x, ids=ids):
        codes = codebook.to(x.dtype)[ids.long()]
        return x + (codes - x).detach(), (x - codes).square().mean(-1)

    def ours(x):
        return vkernels.vq_straight_through(x, codebook, ids)

    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain)}
    judged = Judged(lambda x: plain(x, ids[:ROWS]), [x[:ROWS]], ROWS)
    size = 4 * N * D
    return Problem([x], ours, peers, judged=judged, forward=Cost(0.0, 3 * size), backward=Cost(0.0, 4 * size))


LEVELS = [8, 8, 8, 5, 5, 5]


def plain_fsq(z):
    """As the paper's code: bound, round, straight through; ids."""
    levels = torch.tensor(LEVELS, device=z.device)
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    y = torch.tanh(z + torch.atanh(offset / half)) * half - offset
    q = y + (y.round() - y).detach()
    basis = torch.tensor([1, *torch.tensor(LEVELS[:-1]).cumprod(0).tolist()], device=z.device)
    ids = ((q.detach() + levels // 2) * basis).sum(-1).int()
    return (q / (levels // 2)).to(z.dtype), ids


def fsq_of_library(on: On) -> Callable:
    def build() -> Callable:
        from vector_quantize_pytorch import FSQ

        return FSQ(LEVELS).to(on.device)

    return build


@case("fsq_quantize", value=44, full={"N": 1 << 22}, small={"N": 65536})
def fsq_quantize(on: On, N: int) -> Problem:
    z = on.randn(1, N, len(LEVELS), dtype=torch.float32)
    # On the device beforehand: a plain model would hold them as buffers.
    peers = {
        "torch eager": eager(plain_fsq), "torch.compile": compiled(plain_fsq),
        "vector-quantize-pytorch": fsq_of_library(on),
    }  # fmt: skip

    def ours(z):
        return vkernels.fsq_quantize(z, LEVELS)

    size = 4 * N * len(LEVELS)
    judged = Judged(lambda z: oracle.fsq_quantize(z, LEVELS), [z], 1)
    return Problem([z], ours, peers, judged=judged, forward=Cost(0.0, 2 * size + 4 * N), backward=Cost(0.0, 3 * size))


@case("lfq_quantize", value=10, full={"N": 1 << 22, "d": 18}, small={"N": 32768, "d": 18})
def lfq_quantize(on: On, N: int, d: int) -> Problem:
    z = on.randn(N, d, dtype=torch.float32)
    powers = 1 << torch.arange(d, device=on.device)

    def plain(z):
        codes = torch.where(z > 0, 1.0, -1.0)
        return z + (codes - z).detach(), ((z > 0) * powers).sum(-1).int()

    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain)}
    judged = Judged(lambda z: z + (torch.where(z > 0, 1.0, -1.0) - z).detach(), [z[:ROWS]], ROWS)
    size = 4 * N * d
    return Problem(
        [z],
        vkernels.lfq_quantize,
        peers,
        judged=judged,
        forward=Cost(0.0, 2 * size + 4 * N),
        backward=Cost(0.0, 2 * size),
    )
