"""One step of generation: attention over the cache with the new key and value, and the choice of a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import Cost, Judged, On, Problem, case, compiled, eager

import vkernels

ROWS = 4
TOY = {"B": 8, "L": 512, "Hq": 8, "Hk": 4, "D": 64}


@case("decode_attention", "64 rows, 1k of 4k", value=78,
      full={"B": 64, "L": 4096, "length": 1024, "Hq": 16, "Hk": 8, "D": 128}, small={**TOY, "length": 128})  # fmt: skip
@case("decode_attention", "64 rows, 4k of 4k", value=77,
      full={"B": 64, "L": 4096, "length": 4095, "Hq": 16, "Hk": 8, "D": 128}, small={**TOY, "length": 511})  # fmt: skip
@case("decode_attention", "4 rows, 4k of 4k", value=42,
      full={"B": 4, "L": 4096, "length": 4095, "Hq": 16, "Hk": 8, "D": 128}, small={**TOY, "B": 1, "length": 511},
)  # fmt: skip
def decode_attention(on: On, B: int, L: int, length: int, Hq: int, Hk: int, D: int) -> Problem:
    q, k_new, v_new = on.randn(B, Hq, D), on.randn(B, Hk, D), on.randn(B, Hk, D)
    k_cache, v_cache = on.randn(B, L, Hk, D), on.randn(B, L, Hk, D)
    column = torch.tensor([length], device=on.device)
    mask = (torch.arange(L, device=on.device) <= length)[None, None, None]

    def ours(q, k_new, v_new, k_cache, v_cache):
        return vkernels.decode_attention(q, k_new, v_new, k_cache, v_cache, column[0])

    def append(cache, new):
        cache.index_copy_(1, column, new[:, None])
        return cache.transpose(1, 2)

    def plain(q, k_new, v_new, k_cache, v_cache):
        """A static cache, as Hugging Face's: all columns, those beyond the length masked."""
        k, v = append(k_cache, k_new), append(v_cache, v_new)
        return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]

    def grown(q, k_new, v_new, k_cache, v_cache):
        """The cache as long as it is: no graph could replay it for the next token."""
        k, v = append(k_cache, k_new), append(v_cache, v_new)
        k, v = k[:, :, : length + 1], v[:, :, : length + 1]
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def exact(q, k_new, v_new, k, v):
        k, v = (torch.cat([c[:, :length], new[:, None]], 1) for c, new in ((k, k_new), (v, v_new)))
        k, v = (x.repeat_interleave(Hq // Hk, 2) for x in (k, v))
        scores = torch.einsum("bhd,blhd->bhl", q, k) / D**0.5
        return torch.einsum("bhl,blhd->bhd", scores.softmax(-1), v)

    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain), "torch SDPA, grown": eager(grown)}
    leaves = [q, k_new, v_new, k_cache, v_cache]
    size = on.dtype.itemsize
    moved = size * B * (2 * (length + 1) * Hk * D + 2 * Hq * D + 4 * Hk * D)
    return Problem(
        leaves, ours, peers, judged=Judged(exact, [x[:ROWS] for x in leaves], min(ROWS, B)), graph=True,
        forward=Cost(4.0 * B * Hq * D * (length + 1), moved),
    )  # fmt: skip


def nucleus(x, top_k: int, top_p: float):
    """Top-k, then top-p, as Hugging Face's processors do it, and a draw."""
    if top_k:
        x = x.masked_fill(x < x.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ranked, order = x.sort(dim=-1)
        out = ranked.softmax(-1).cumsum(-1) <= 1 - top_p
        x = x.masked_fill(out.scatter(1, order, out), -torch.inf)
    # Gumbel: torch.multinomial would wait for the device
    return (x.softmax(-1) / torch.empty_like(x).exponential_()).argmax(-1)


@case("sample_logits", "64 rows of 16k, guided, top-k", value=67,
      full={"R": 64, "V": 16384, "top_k": 2000, "top_p": 1.0}, small={"R": 8, "V": 8192, "top_k": 500, "top_p": 1.0},
)  # fmt: skip
@case("sample_logits", "64 rows of 152k, guided, top-k, top-p", value=66,
      full={"R": 64, "V": 151936, "top_k": 2000, "top_p": 0.9}, small={"R": 8, "V": 8192, "top_k": 500, "top_p": 0.9},
)  # fmt: skip
def sample_logits(on: On, R: int, V: int, top_k: int, top_p: float) -> Problem:
    logits, uncond = on.randn(R, V, scale=3.0), on.randn(R, V, scale=3.0)
    step = torch.zeros((), dtype=torch.int64, device=on.device)

    def ours(logits, uncond):
        return vkernels.sample_logits(
            logits, uncond=uncond, guidance=3.0, top_k=top_k, top_p=top_p, temperature=0.9, seed=1, step=step
        )

    def plain(logits, uncond):
        l, u = logits.float(), uncond.float()
        return nucleus((u + 3.0 * (l - u)) / 0.9, top_k, top_p)

    peers = {"torch eager": eager(plain), "torch.compile": compiled(plain)}
    moved = 2 * R * V * on.dtype.itemsize + 8 * R
    return Problem([logits, uncond], ours, peers, graph=True, forward=Cost(0.0, moved))
