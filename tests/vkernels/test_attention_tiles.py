"""The work list of packed attention: what its tiles say is held against every pair of query and key."""

import heapq
import math
import random

import pytest
import torch

import vkernels
from vkernels.tiles import BLOCK_K, BLOCK_Q, STEP, WIDTH, counts


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def visible_pairs(c_q, c_k, kv_lo, kv_hi):
    """bool[Tq, Tk], and the document of every query and key."""
    Tq, Tk = int(c_q[-1]), int(c_k[-1])
    of_q, of_k = (torch.repeat_interleave(torch.arange(len(c) - 1), c.diff().long()) for c in (c_q, c_k))
    row, key = torch.arange(Tq)[:, None], torch.arange(Tk)[None]
    lo = torch.zeros(Tq, 1) if kv_lo is None else kv_lo[:, None]
    hi = row + 1 + (c_k - c_q)[1:].long()[of_q][:, None] if kv_hi is None else kv_hi[:, None]
    return (of_q[:, None] == of_k[None]) & (key >= lo) & (key < hi), of_q, of_k


def layouts(number):
    rng = random.Random(0)
    torch.manual_seed(0)
    for trial in range(number):
        of_q = [rng.choice([0, 1, 63, 64, 65, 127, 128, 129, 300]) for _ in range(rng.randint(1, 5))]
        of_k = [rng.choice([n, n, n + 3, 0, 260]) for n in of_q]
        Tq, Tk = sum(of_q), sum(of_k)
        rows = torch.arange(Tq, dtype=torch.int32)
        kv_lo = [None, rows - 70, torch.randint(-3, Tk + 3, (Tq,), dtype=torch.int32)][trial % 3]
        kv_hi = [None, (rows // 50 + 1) * 50, torch.randint(-3, Tk + 3, (Tq,), dtype=torch.int32)][trial // 3 % 3]
        yield cu(*of_q), cu(*of_k), kv_lo, kv_hi


def parts(tiles):
    header = tiles[0].tolist()
    NQ, NK = header[3], header[4]
    assert tiles.shape == (1 + NQ + NK, WIDTH)
    return header, tiles[1 : 1 + NQ].tolist(), tiles[1 + NQ :].tolist()


def test_tiles_hold_what_is_visible():
    for c_q, c_k, kv_lo, kv_hi in layouts(45):
        seen, of_q, of_k = visible_pairs(c_q, c_k, kv_lo, kv_hi)
        header, q_tiles, k_tiles = parts(vkernels.attention_tiles(c_q, c_k, kv_lo=kv_lo, kv_hi=kv_hi))
        assert header[1:] == [BLOCK_Q, BLOCK_K, len(q_tiles), len(k_tiles), *seen.shape, len(c_q) - 1]
        for tiles, pairs, own, other, block in (
            (q_tiles, seen, of_q, of_k, BLOCK_Q),
            (k_tiles, seen.T, of_k, of_q, BLOCK_K),
        ):
            covered = torch.zeros(len(pairs), dtype=torch.int64)
            for a, b, lo, full_lo, full_hi, hi, shift, _ in tiles:
                if a == b:
                    continue
                covered[a:b] += 1
                assert b - a <= block
                assert own[a:b].unique().numel() == 1
                assert 0 <= lo <= full_lo <= full_hi <= hi <= pairs.shape[1]
                assert (other[lo:hi] == own[a]).all()
                assert not pairs[a:b, :lo].any()
                assert not pairs[a:b, hi:].any()
                assert pairs[a:b, full_lo:full_hi].all()
                assert shift == c_k[own[a] + 1] - c_q[own[a] + 1] + 1
            assert (covered == 1).all()
            lengths = [tile[5] - tile[2] for tile in tiles]
            assert lengths == sorted(lengths, reverse=True)


def test_a_causal_list_is_tight():
    _, q_tiles, k_tiles = parts(vkernels.attention_tiles(cu(300)))
    assert q_tiles == [[256, 300, 0, 0, 257, 300, 1, 0], [128, 256, 0, 0, 129, 256, 1, 0], [0, 128, 0, 0, 1, 128, 1, 0]]
    assert k_tiles == [[0, 128, 0, 128, 256, 300, 1, 0], [128, 256, 128, 128, 128, 300, 1, 0],
                       [256, 300, 256, 256, 256, 300, 1, 0]]  # fmt: skip
    assert STEP == 64  # rows 256 to 300 are no whole step


def test_the_shape_depends_on_the_sizes_only():
    assert counts(8192, 8192, 16) == (8192 // BLOCK_Q + 16, 8192 // BLOCK_K + 16)
    shapes = {vkernels.attention_tiles(cu(*n)).shape for n in ((512, 0, 0), (1, 510, 1), (170, 171, 171))}
    assert shapes == {(1 + 2 * (512 // 128 + 3), WIDTH)}
    assert vkernels.attention_tiles(cu()).shape == (1, WIDTH)


@pytest.mark.parametrize(
    ("arguments", "bounds", "what"),
    [
        ((torch.tensor([0, 4, 2]),), {}, "decreases"),
        ((torch.tensor([1, 4]),), {}, "begin with 0"),
        ((torch.tensor([0, 4]), torch.tensor([0, 2, 4])), {}, "same length"),
        ((torch.zeros(0, dtype=torch.int32),), {}, "empty"),
        ((torch.zeros(2, 2, dtype=torch.int32),), {}, r"\[2, 2\] on cpu, expected one dimension"),
        ((torch.tensor([0, 4]),), {"kv_lo": torch.zeros(3, dtype=torch.int32)}, "one int32 per query"),
        ((torch.tensor([0, 4]).to("meta"),), {}, "on meta, expected one dimension on cpu"),
    ],
)
def test_bad_arguments_are_named(arguments, bounds, what):
    with pytest.raises(ValueError, match=what):
        vkernels.attention_tiles(*arguments, **bounds)


def busy(costs, programs=132):
    """The share of the time that multiprocessors work when each takes the next unit as soon as it is free."""
    free = [0] * programs
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return sum(costs) / (programs * max(free))


@pytest.mark.parametrize(
    ("lengths", "least"),
    [((8192,), 0.98), ((2048,) * 4, 0.98), ((3000, 500, 1800, 92, 2800), 0.98), ((256,) * 32, 0.96)],
)
def test_the_longest_first_keep_all_multiprocessors_busy(lengths, least):
    """A model of 132 multiprocessors, 8k tokens and 16 heads; time is counted in blocks of keys."""
    _, q_tiles, _ = parts(vkernels.attention_tiles(cu(*lengths)))
    blocks = [(q0, math.ceil((kv_hi - kv_lo) / 64)) for q0, q1, kv_lo, _, _, kv_hi, _, _ in q_tiles if q1 > q0]
    natural = busy([cost for _ in range(16) for _, cost in sorted(blocks)])  # one head after the other
    assert busy([cost for _, cost in blocks for _ in range(16)]) >= max(least, natural + 0.05)
