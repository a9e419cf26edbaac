"""From logits to token ids in one op, the same ids from every backend.

Three things make the backends equal bit by bit: scores are built from single roundings in a fixed order; weights are
integers, exp(score - maximum) in units of 2^-40, so that their sums have no order; and a row takes one 64-bit number
from a counter generator, which picks the token by inverting the cumulative weights.
"""

from __future__ import annotations

import ctypes

import torch

from vkernels import _host, cuda
from vkernels.host import to_numpy
from vkernels.philox import LOW, philox, signed
from vkernels.registry import Backend, anywhere, define, on_cpu

ONE = 1 << 40  # the weight of the likeliest token


def sample_logits(
    logits: torch.Tensor,
    *,
    seed: int,
    step: int | torch.Tensor,
    keys: torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    seen: torch.Tensor | None = None,
    penalty: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    lo: int = 0,
    hi: int | None = None,
    return_logprob: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Draw one id per row of logits[R, V]: ids int64[R], and with return_logprob their log-probabilities float32[R].

    logits: float32, bfloat16 or float16, computed on in float32; only the columns [lo, hi) count (default: all), and
    ids are column numbers. In this order:

    1. penalty (1 = off): logits of the ids that are True in seen (bool[R, V]) are divided by it where positive and
       multiplied where negative; uncond is left alone.
    2. guidance (1 = off): u + guidance * (l - u) with u = uncond[R, V], which is needed then. Both may be taken as
       they are or as log-probabilities: what a row has in common changes nothing from here on.
    3. temperature; 0 takes the highest score, the lowest id among equals, and ends here, with log-probability 0.
    4. top_k (0 = off): keep the k highest scores, and all that equal the k-th.
    5. top_p (1 = off): of these, keep a token while the probability of the strictly likelier ones is below top_p:
       Hugging Face's rule, except that equal tokens stay or go together.
    6. draw: the log-probability is that of the distribution drawn from.

    The draw is a function of (scores, seed, step, key): keys int64[R] name the rows' streams, so that a row draws the
    same anywhere in any batch (default: the row's number). step: the number of the token, an int, or an int64 scalar
    on the device, which a CUDA graph can count up. A token whose logit is -inf (in either branch) is never drawn. A row
    with NaN, +inf or nothing to draw gives id `lo` and log-probability NaN. Nothing waits for the device.
    ValueError: a setting out of its range, or operands that do not fit.
    """
    _check(logits, uncond, seen, keys, guidance, penalty, temperature, top_k, top_p)
    V = logits.shape[1]
    hi = V if hi is None else hi
    if not 0 <= lo < hi <= V:
        raise ValueError(f"sample_logits: columns [{lo}, {hi}) of {V}; expected 0 <= lo < hi <= {V}")
    if not isinstance(step, torch.Tensor):
        step = torch.full((), step, dtype=torch.int64, device=logits.device)
    if step.dtype != torch.int64 or step.dim():
        raise ValueError(f"sample_logits: step is {step.dtype} {tuple(step.shape)}; expected an int64 scalar")
    devices = {x.device for x in (logits, uncond, seen, keys, step) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"sample_logits: operands on {sorted(map(str, devices))}; expected one device")
    ids, logprob = _op(
        logits.detach(), uncond.detach() if guidance != 1 else None, seen if penalty != 1 else None, step, keys,
        signed(seed), guidance, penalty, temperature, min(top_k, hi - lo), top_p, lo, hi,
    )  # fmt: skip
    return (ids, logprob) if return_logprob else ids


def _check(logits, uncond, seen, keys, guidance, penalty, temperature, top_k, top_p) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"sample_logits: logits are {logits.dtype} {tuple(logits.shape)}; "
            "expected float32, bfloat16 or float16 [R, V]"
        )
    R, V = logits.shape
    if V > 1 << 22:
        raise ValueError(f"sample_logits: {V} columns; expected at most {1 << 22}, whose weights 64 bits can sum")
    rules = {
        "guidance": (guidance, guidance >= 0, "at least 0"),
        "penalty": (penalty, penalty > 0, "above 0"),
        "temperature": (temperature, temperature >= 0, "at least 0"),
        "top_k": (top_k, top_k >= 0, "at least 0 (0 = off)"),
        "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1 (1 = off)"),
    }
    for name, (value, holds, expected) in rules.items():
        if not holds:
            raise ValueError(f"sample_logits: {name} is {value}; expected {expected}")
    for name, x, needed, shape, dtype in (
        ("uncond", uncond, guidance != 1, (R, V), logits.dtype),
        ("seen", seen, penalty != 1, (R, V), torch.bool),
        ("keys", keys, False, (R,), torch.int64),
    ):
        if x is None and needed:
            raise ValueError(f"sample_logits: no {name}; expected it with guidance {guidance} and penalty {penalty}")
        if x is not None and (tuple(x.shape) != shape or x.dtype != dtype):
            raise ValueError(f"sample_logits: {name} is {x.dtype} {tuple(x.shape)}; expected {dtype} {list(shape)}")


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def scores(logits, uncond, seen, guidance, penalty, temperature) -> torch.Tensor:
    """Steps 1 to 3 in float32, each operation rounded by itself; -inf where a token is never drawn."""
    x = logits.float()
    if seen is not None:
        x = torch.where(seen, torch.where(x < 0, x * _float32(penalty), x * _float32(1 / penalty)), x)
    if uncond is not None:
        u = uncond.float()
        out = (x == -torch.inf) | (u == -torch.inf)
        x = x.sub(u).mul_(_float32(guidance)).add_(u).masked_fill_(out, -torch.inf)
    return x * _float32(1 / temperature) if temperature > 0 else x


def weights(x: torch.Tensor) -> torch.Tensor:
    """floor(2^40 e^x) of float32 x <= 0, to about 2^-22 of it, as int64."""
    x = x.clamp(min=-60.0)  # far below 2^-40 already, and NaN stays out of the integers by the caller's care
    n = torch.round(x * 1.44269504)
    # ln 2 in two parts: the first has 10 bits, so its product is exact.
    r = x - n * 0.693359375
    r = r + n * 2.12194440e-4
    p = torch.full_like(r, 1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p.mul_(r).add_(_float32(c))
    power = (n.to(torch.int32) + (127 + 40)).bitwise_left_shift_(23).view(torch.float32)
    return p.mul_(power).to(torch.int64)


def kept(x: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The weights int64[R, n] of scores x, 0 for what top-k and top-p leave out."""
    w = weights(x - x.amax(-1, keepdim=True))
    if 0 < top_k < x.shape[-1]:
        w = w * (x >= x.topk(top_k, dim=-1).values[:, -1:])
    if top_p < 1:
        total = w.sum(-1, keepdim=True)
        ordered = x.masked_fill(w == 0, -torch.inf).sort(dim=-1, descending=True).values
        sorted_w = weights(ordered - ordered[:, :1])
        above = sorted_w.cumsum(-1) - sorted_w
        stays = above < (total.double() * top_p).ceil().long()
        least = ordered.masked_fill(~stays, torch.inf).amin(-1, keepdim=True)
        w = w * (x >= least)
    return w


def random_words(seed: int, step: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two words of Philox with the counter (step, key), int64 tensors of which each fills two words."""
    return philox(seed, [step & LOW, (step >> 32) & LOW, key & LOW, (key >> 32) & LOW])[:2]


def scaled(total: torch.Tensor, r0: torch.Tensor, r1: torch.Tensor) -> torch.Tensor:
    """floor(total * (r1 2^32 + r0) / 2^64) for total below 2^62, in pieces that int64 holds."""
    t0, t1 = total & LOW, total >> 32
    cross = t0 * r1  # below 2^64: its upper half is read as unsigned
    middle = (t1 * r0 & LOW) + (cross & LOW) + (((t0 * r0) >> 32) & LOW)
    return t1 * r1 + (t1 * r0 >> 32) + ((cross >> 32) & LOW) + (middle >> 32)


def _forward(logits, uncond, seen, step, keys, seed, guidance, penalty, temperature, top_k, top_p, lo, hi):
    R = logits.shape[0]
    if not R:
        return step.new_empty(0), logits.new_empty(0, dtype=torch.float32)
    cut = [None if x is None else x[:, lo:hi] for x in (logits, uncond, seen)]
    x = scores(*cut, guidance, penalty, temperature)
    peak = x.amax(-1, keepdim=True)  # NaN where any is
    fine = (peak < torch.inf) & (peak > -torch.inf)
    x = torch.where(fine, x, 0.0)  # any valid row: its id is not used
    if temperature > 0:
        keys = torch.arange(R, device=logits.device) if keys is None else keys
        w = kept(x, top_k, top_p)
        total = w.sum(-1)
        target = scaled(total, *random_words(seed, step.expand(R), keys))
        at = (w.cumsum(-1) <= target.unsqueeze(-1)).sum(-1)
        chosen = w.gather(-1, at.unsqueeze(-1)).squeeze(-1)
        logprob = (chosen.double() / total.double()).log().float()
    else:
        at = (x == peak).to(torch.int8).argmax(-1)
        logprob = torch.zeros(R, dtype=torch.float32, device=logits.device)
    fine = fine.squeeze(-1)
    return torch.where(fine, at, 0) + lo, torch.where(fine, logprob, torch.nan)


def _cpu_forward(logits, uncond, seen, step, keys, seed, guidance, penalty, temperature, top_k, top_p, lo, hi):
    ids, logprob = _fake(logits)
    cut = [None if x is None else _rows(x[:, lo:hi]) for x in (logits, uncond, seen)]
    cut = [x if x is None or x.dtype == torch.bool else x.float() for x in cut]
    arrays = [None if x is None else to_numpy(x) for x in (*cut, None if keys is None else keys.contiguous())]
    setting = guidance, penalty, 1 / penalty, 1 / temperature if temperature > 0 else 1.0
    outputs = to_numpy(ids), to_numpy(logprob), torch.get_num_threads()
    _host.sample_logits(*arrays, seed, int(step), setting, top_k, top_p, temperature == 0, *outputs)
    return ids.add_(lo), logprob


def _rows(x):
    """With the elements of a row side by side; rows may be apart."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def _cuda_forward(logits, uncond, seen, step, keys, seed, guidance, penalty, temperature, top_k, top_p, lo, hi):
    R, device = logits.shape[0], logits.device
    ids, logprob = _fake(logits)
    rows = [_rows(x) for x in (logits, uncond, seen)]
    keys = None if keys is None else keys.contiguous()
    if R:
        parameters = cuda.Sampling(
            *(None if x is None else x.data_ptr() for x in (*rows, step, keys, ids, logprob)),
            *(0 if x is None else x.stride(0) for x in rows),
            seed, top_p, guidance, penalty, 1 / penalty, 1 / temperature if temperature > 0 else 1.0,
            R, lo, hi, top_k, cuda.TYPES[logits.dtype], temperature == 0, device.index or 0,
        )  # fmt: skip
        cuda.call("vk_sample", parameters, device)
    return ids, logprob


def _fake(logits, *rest):
    R = logits.shape[0]
    return logits.new_empty(R, dtype=torch.int64), logits.new_empty(R, dtype=torch.float32)


_op = define(
    "sample_logits",
    "(Tensor logits, Tensor? uncond, Tensor? seen, Tensor step, Tensor? keys, int seed, float guidance, float penalty,"
    " float temperature, int top_k, float top_p, int lo, int hi) -> (Tensor, Tensor)",
    fake=_fake,
    cpu=Backend(_cpu_forward, None, on_cpu),
    cuda=Backend(_cuda_forward, None, cuda.on_cuda),
    torch=Backend(_forward, None, anywhere),
)
