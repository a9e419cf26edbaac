"""Vector quantisation ops against float64 loops."""

import pytest
import torch
from op_check import compiles, error

import vkernels
from vkernels import oracle, vq
from vkernels.check.vq import CHECKS, EXACT


def assert_nearest(ids, x, codebook):
    """The index of the float64 argmin, unless the two distances agree to EXACT of the size of the vectors."""
    true, distances = oracle.vq_nearest(x, codebook)
    rows = torch.arange(len(true))
    gap = distances[rows, ids.long()] - distances[rows, true]
    size = x.double().square().sum(1) + codebook.double().square().sum(1).max()
    assert ids.dtype == torch.int32
    assert ((ids == true) | (gap <= EXACT * size)).all()
    return int((ids != true).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K", "D"), [(1, 1, 1), (0, 5, 3), (257, 64, 16), (100, 1000, 7), (33, 3, 256)])
def test_nearest(backend, N, K, D, dtype):
    torch.manual_seed(0)
    x, codebook = torch.randn(N, D).to(dtype), torch.randn(K, D).to(dtype)
    assert_nearest(vkernels.vq_nearest(x, codebook), x, codebook)


def test_nearest_of_far_off_clusters_is_exact():
    """Distances of 1e-3 among vectors of length 100: float32 scores alone would mistake many rows."""
    torch.manual_seed(0)
    codebook = 25 + torch.randn(64, 16) * 1e-3
    x = codebook[torch.randint(64, (500,))] + torch.randn(500, 16) * 3e-4
    true, _ = oracle.vq_nearest(x, codebook)
    assert torch.equal(vkernels.vq_nearest(x, codebook).long(), true)
    float32 = (x @ codebook.T - codebook.square().sum(1) / 2).argmax(1)
    assert (float32 != true).any()


def test_ties_take_the_lowest_index(backend):
    torch.manual_seed(0)
    codebook = torch.randn(40, 19)
    codebook[20:] = codebook[:20]  # every code twice
    x = codebook + torch.randn(40, 19) * 0.01
    assert torch.equal(vkernels.vq_nearest(x, codebook), torch.arange(20, dtype=torch.int32).repeat(2))
    assert (vkernels.vq_nearest(x, torch.zeros(7, 19)) == 0).all()
    assert vkernels.vq_nearest(torch.zeros(1, 2), torch.tensor([[0.0, 1], [1, 0], [0, -1]])).tolist() == [0]


def test_nearest_in_blocks(backend, monkeypatch):
    torch.manual_seed(0)
    x, codebook = torch.randn(50, 8), torch.randn(16, 8)
    whole = vkernels.vq_nearest(x, codebook)
    monkeypatch.setattr(vq, "_CHUNK_SCORES", 16 * 6)
    assert torch.equal(vkernels.vq_nearest(x, codebook), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [c for c in CHECKS if c.small], ids=lambda c: f"{c.op}-{c.name}")
def test_checks(backend, check, dtype):
    if dtype in check.dtypes:
        for finding in check.run(torch.device("cpu"), dtype):
            assert finding.fine, finding


@pytest.mark.parametrize(("x", "codebook"), [((3, 4), (5, 3)), ((3,), (5, 3)), ((3, 4), (0, 4)), ((3, 0), (2, 0))])
def test_shapes_that_do_not_fit_are_named(x, codebook):
    with pytest.raises(ValueError, match=r"vq_nearest: x \[.*\] and codebook \[.*\]; expected"):
        vkernels.vq_nearest(torch.zeros(x), torch.zeros(codebook))


def test_wide_codes_are_refused_with_a_reason():
    reason = vq._fits({"dim": 257})
    assert "256" in reason
    assert vq._fits({"dim": 256}) is None


def test_straight_through_may_follow_a_codebook_that_moves(backend):
    """The codebook changes in place between forward and backward; the gradient is that of the codes that were read."""
    torch.manual_seed(0)
    x, codebook, ids = torch.randn(9, 4, requires_grad=True), torch.randn(5, 4), torch.randint(5, (9,))
    away = (x - codebook[ids]).detach()
    codes, commitment = vkernels.vq_straight_through(x, codebook, ids, beta=0.5)
    codebook.zero_()
    (codes.sum() + commitment.sum()).backward()
    torch.testing.assert_close(x.grad, 1 + 0.25 * away)


def test_straight_through_is_the_formula_of_the_autoencoder(backend):
    torch.manual_seed(0)
    x, codebook, ids = torch.randn(12, 4, requires_grad=True), torch.randn(5, 4), torch.randint(5, (12,))
    codes, commitment = vkernels.vq_straight_through(x, codebook, ids)
    plain = x + (codebook[ids] - x).detach(), (x - codebook[ids]).square().mean(1)
    torch.testing.assert_close([codes, commitment], list(plain))
    cotangents = torch.randn(12, 4), torch.randn(12)
    mine, true = (torch.autograd.grad(out, x, cotangents)[0] for out in ((codes, commitment), plain))
    torch.testing.assert_close(mine, true)


def test_ids_outside_the_codebook_give_zero_rows(backend):
    x = torch.randn(4, 3, requires_grad=True)
    codes, commitment = vkernels.vq_straight_through(x, torch.ones(2, 3), torch.tensor([-1, 0, 1, 2]))
    assert codes[:, 0].tolist() == [0, 1, 1, 0]
    assert (commitment == 0).tolist() == [True, False, False, True]
    (codes.sum() + commitment.sum()).backward()
    assert torch.equal(x.grad[[0, 3]], torch.ones(2, 3))


def test_a_codebook_with_gradient_is_refused():
    with pytest.raises(ValueError, match="vq_straight_through: the codebook requires a gradient"):
        vkernels.vq_straight_through(torch.zeros(2, 3), torch.zeros(4, 3, requires_grad=True), torch.zeros(2).int())


def test_commitment_gradcheck(backend):
    torch.manual_seed(0)
    x, codebook = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    ids = torch.tensor([0, 3, 1, 1, -1, 4, 2])
    assert torch.autograd.gradcheck(lambda x: vkernels.vq_straight_through(x, codebook, ids, beta=0.3)[1], x)


def test_dead_codes_begin_anew_in_order(backend):
    size, book = torch.tensor([4.0, 0, 2, 0, 0]), torch.arange(5.0)[:, None].repeat(1, 2)
    total, rows = book * size[:, None], torch.tensor([[10.0, 10], [20, 20], [30, 30]])
    reset = vkernels.vq_reset_codes(size, total, book, size < 1, rows, torch.tensor(2))
    assert reset.item() == 2
    assert book[:, 0].tolist() == [0, 10, 2, 20, 4]
    assert size.tolist() == pytest.approx([4, 1.2, 2, 1.2, 0])
    assert total[:, 0].tolist() == pytest.approx([0, 12, 4, 24, 0])
    assert vkernels.vq_reset_codes(size, total, book, size < 1, rows).item() == 1
    assert book[4, 0] == 10
    assert vkernels.vq_reset_codes(size, total, book, size < 9, rows[:0]).item() == 0


def test_usage():
    used, perplexity = vkernels.vq_usage(torch.tensor([3.0, 3.0, 0.0, 3.0]))
    assert used.item() == 3
    assert perplexity.item() == pytest.approx(3)
    assert [t.item() for t in vkernels.vq_usage(torch.zeros(4))] == [0, 1]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("N", "K", "D"), [(0, 3, 2), (1, 1, 1), (301, 17, 33)])
def test_code_sums(backend, N, K, D, index):
    torch.manual_seed(0)
    x, ids = torch.randn(N, D), torch.randint(-1, K, (N,)).to(index)
    counts, sums = vkernels.vq_code_sums(x, ids, K)
    true_counts, true_sums = oracle.vq_code_sums(x, ids, K)
    assert torch.equal(counts.double(), true_counts)
    assert counts.dtype == sums.dtype == torch.float32
    assert error(sums, true_sums) < 1e-6
    half = vkernels.vq_code_sums(x.bfloat16(), ids, K)[1]
    assert error(half, oracle.vq_code_sums(x.bfloat16(), ids, K)[1]) < 1e-6


def test_ema_update_over_many_steps(backend):
    """In place, equal to float64; a code that never had a row keeps its vector to the last bit."""
    torch.manual_seed(0)
    K, D = 12, 5
    state = [torch.zeros(K), torch.zeros(K, D), torch.randn(K, D)]
    truth, first = [t.double() for t in state], state[2].clone()
    for _ in range(20):
        x, ids = torch.randn(30, D), torch.randint(0, K - 2, (30,))
        counts, sums = vkernels.vq_code_sums(x, ids, K)
        vkernels.vq_ema_update(*state, counts, sums, 0.9, 1e-5)
        truth = list(oracle.vq_ema_update(*truth, counts, sums, 0.9, 1e-5))
    for mine, true in zip(state, truth):
        assert error(mine, true) < 1e-5
    assert torch.equal(state[2][-2:], first[-2:])
    assert not torch.equal(state[2][:-2], first[:-2])


def test_a_code_that_holds_all_rows_moves_to_their_mean(backend):
    x = torch.randn(50, 4)
    state = [torch.zeros(2), torch.zeros(2, 4), torch.zeros(2, 4)]
    counts, sums = vkernels.vq_code_sums(x, torch.zeros(50, dtype=torch.int32), 2)
    vkernels.vq_ema_update(*state, counts, sums, 0.0, 1e-9)
    torch.testing.assert_close(state[2][0], x.mean(0), rtol=1e-5, atol=1e-6)


def test_an_update_without_rows_keeps_everything_finite(backend):
    state = [torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2)]
    vkernels.vq_ema_update(*state, torch.zeros(3), torch.zeros(3, 2), 0.99, 1e-5)
    assert torch.equal(state[2], torch.ones(3, 2))


def test_autocast_does_not_reach_the_products(backend):
    torch.manual_seed(0)
    x, codebook = torch.randn(100, 32), torch.randn(1000, 32)
    plain = vkernels.vq_nearest(x, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vkernels.vq_nearest(x, codebook), plain)


def test_rows_that_are_left_out(backend):
    """Ids on either side of the codebook count nowhere, and what their rows hold reaches no gradient."""
    ids = torch.tensor([0, 3, -1, 7, 2])
    counts, sums = vkernels.vq_code_sums(torch.ones(5, 2), ids, 3)
    assert counts.tolist() == [1, 0, 1]
    assert sums.tolist() == [[1, 1], [0, 0], [1, 1]]
    x = torch.ones(5, 2)
    x[1], x[2, 0], x[3, 1] = torch.inf, torch.nan, -torch.inf
    x.requires_grad_()
    codes, commitment = vkernels.vq_straight_through(x, torch.zeros(3, 2), ids)
    (codes.sum() + commitment.sum()).backward()
    assert x.grad.tolist() == [[2, 2], [1, 1], [1, 1], [1, 1], [2, 2]]


def test_a_codebook_that_moves_after_it_was_read_is_noticed(backend):
    """Autograd must not use what it saved of it."""
    x, codebook = torch.ones(3, 2, requires_grad=True), torch.ones(4, 2)
    state = [torch.ones(4), torch.ones(4, 2), codebook]
    for move in (
        lambda: vkernels.vq_ema_update(*state, torch.ones(4), torch.ones(4, 2), 0.9, 1e-5),
        lambda: vkernels.vq_reset_codes(*state, torch.ones(4, dtype=torch.bool), torch.ones(4, 2)),
    ):
        product = x @ codebook.T
        move()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_operands_that_do_not_fit_are_named():
    x, book, size, ids = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5), torch.zeros(3, dtype=torch.int64)
    for call, word in [
        (lambda: vkernels.vq_straight_through(x, torch.zeros(5, 3), ids), "vq_straight_through: x .3, 4. and codebook"),
        (lambda: vkernels.vq_straight_through(x, book, ids[:2]), "vq_straight_through: .* ids torch.int64 .2."),
        (lambda: vkernels.vq_code_sums(x, ids.float(), 5), "vq_code_sums: ids is torch.float32 .3."),
        (lambda: vkernels.vq_code_sums(x, torch.zeros(4, dtype=torch.int32), 5), "vq_code_sums: x .3, 4."),
        (lambda: vkernels.vq_ema_update(size, book, book, size, x, 0.9, 1e-5), "vq_ema_update: sums .3, 4."),
        (lambda: vkernels.vq_ema_update(size, book, book, size[:4], book, 0.9, 1e-5), "vq_ema_update: counts .4."),
        (lambda: vkernels.vq_reset_codes(size, book, book, size[:1] > 0, x), "vq_reset_codes: dead .1."),
        (lambda: vkernels.vq_reset_codes(size, book, book, size > 0, x[:, :3]), "vq_reset_codes: rows .3, 3."),
    ]:
        with pytest.raises(ValueError, match=f"{word}.*expected"):
            call()


def test_checks_and_compiles():
    torch.manual_seed(0)
    x, codebook = torch.randn(9, 4), torch.randn(5, 4)
    ids = vkernels.vq_nearest(x, codebook)
    torch.library.opcheck(torch.ops.vkernels.vq_nearest.default, (x, codebook))
    torch.library.opcheck(torch.ops.vkernels.vq_code_sums.default, (x, ids, 5))
    state = [torch.ones(5), torch.randn(5, 4), torch.randn(5, 4)]
    update = (*vkernels.vq_code_sums(x, ids, 5), 0.9, 1e-5)
    torch.library.opcheck(torch.ops.vkernels.vq_ema_update.default, (*state, *update))
    dead = torch.tensor([True, False, True, True, False]), torch.randn(2, 4), torch.tensor(1)
    torch.library.opcheck(torch.ops.vkernels.vq_reset_codes.default, (*state, *dead))
    straight = x.clone().requires_grad_(), codebook, ids, 0.25
    torch.library.opcheck(torch.ops.vkernels.vq_straight_through.default, straight)
    compiles(lambda x: torch.cat([t.flatten() for t in vkernels.vq_straight_through(x, codebook, ids)]), x)

    def step(x, cluster_size, embed_sum, codebook):
        counts, sums = vkernels.vq_code_sums(x, vkernels.vq_nearest(x, codebook), 5)
        vkernels.vq_ema_update(cluster_size, embed_sum, codebook, counts, sums, 0.9, 1e-5)

    plain, compiled = [t.clone() for t in state], [t.clone() for t in state]
    torch._dynamo.reset()
    torch.compile(step, fullgraph=True, backend="aot_eager")(x, *compiled)
    step(x, *plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled))
