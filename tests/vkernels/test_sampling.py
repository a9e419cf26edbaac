"""sample_logits: the exact distribution, Hugging Face's filters, published random numbers, equal backends."""

import math
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import vkernels
from vkernels import oracle, sampling
from vkernels.check.sampling import CHECKS
from vkernels.philox import signed

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_against_float64(backend, check, dtype):
    for finding in check.run(CPU, dtype):
        assert finding.fine, finding


# The known answers of Random123 (kat_vectors): counter, key, random words.
KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_random_numbers_are_the_published_ones(counter, key, words):
    words = [int(w, 16) for w in words.split()]
    assert oracle.philox(counter, key) == words
    step, row, seed = (signed(hi << 32 | lo) for lo, hi in (counter[:2], counter[2:], key))
    found = sampling.random_words(seed, torch.tensor([step]), torch.tensor([row]))
    assert [int(x) for x in found] == words[:2]


def test_the_share_of_a_total_is_exact():
    draw = random.Random(0)
    ends = [(1, 0), (1, 2**64 - 1), (2**62 - 1, 2**64 - 1), (2**40, 2**63), (2**61 + 1, 2**32), (2**32, 2**32 - 1)]
    for total, r in ends + [
        (draw.randrange(1, 2 ** draw.randrange(1, 62)), draw.randrange(2**64)) for _ in range(2000)
    ]:
        found = sampling.scaled(torch.tensor(total), torch.tensor(r % 2**32), torch.tensor(r >> 32))
        assert int(found) == total * r >> 64


def test_weights_are_exponentials():
    x = torch.cat([-torch.logspace(-6, 1.4, 3000), torch.tensor([0.0, -0.0, -60.0, -1e30, -torch.inf])])
    w = sampling.weights(x)
    expected = x.double().exp() * sampling.ONE
    assert ((w - expected).abs() <= expected * 2.0**-22 + 1).all()
    assert w[-5:].tolist() == [sampling.ONE, sampling.ONE, 0, 0, 0]
    assert (w[:3000].diff() <= 0).all()


def random_setting(draw: random.Random) -> dict:
    return {
        "guidance": draw.choice([1.0, 0.0, 2.5]),
        "penalty": draw.choice([1.0, 1.2]),
        "temperature": draw.choice([1.0, 0.6, 2.0]),
        "top_k": draw.choice([0, 1, 3, 11, 40]),
        "top_p": draw.choice([1.0, 0.9, 0.4, 1e-6]),
    }


def filters_of_hugging_face(logits, uncond, seen, setting) -> torch.Tensor:
    """bool[R, V]: what the processors keep, applied in the order of sample_logits."""
    x = logits
    if setting["penalty"] != 1:
        # They take ids: a row of V ids that are all seen, the first of them standing in for the others.
        ids = torch.stack([torch.where(row, torch.arange(len(row)), int(row.nonzero()[0])) for row in seen])
        x = RepetitionPenaltyLogitsProcessor(setting["penalty"])(ids, x)
    if setting["guidance"] != 1:
        c, u = x.log_softmax(-1), uncond.log_softmax(-1)
        x = u + setting["guidance"] * (c - u)
    x = TemperatureLogitsWarper(setting["temperature"])(None, x)
    if setting["top_k"]:
        x = TopKLogitsWarper(setting["top_k"])(None, x)
    if setting["top_p"] < 1:
        x = TopPLogitsWarper(setting["top_p"])(None, x)
    return x.isfinite()


def kept_by_us(logits, uncond, seen, setting) -> torch.Tensor:
    top = {k: setting[k] for k in ("top_k", "top_p")}
    x = sampling.scores(
        logits,
        uncond if setting["guidance"] != 1 else None,
        seen if setting["penalty"] != 1 else None,
        *(setting[k] for k in ("guidance", "penalty", "temperature")),
    )
    return sampling.kept(x, **top) > 0


def test_the_filtered_set_is_that_of_hugging_face():
    draw = random.Random(1)
    torch.manual_seed(0)
    for _ in range(60):
        logits, uncond, setting = 2 * torch.randn(3, 40), 2 * torch.randn(3, 40), random_setting(draw)
        seen = torch.rand(3, 40) < 0.3
        seen[:, 5] = True
        expected = filters_of_hugging_face(logits, uncond, seen, setting)
        assert torch.equal(kept_by_us(logits, uncond, seen, setting), expected), setting


def test_equal_tokens_stay_or_go_together():
    """Hugging Face's top-k keeps all that equal the k-th; its top-p cuts equal tokens as they happen to be sorted."""
    draw = random.Random(2)
    torch.manual_seed(0)
    for _ in range(60):
        logits = torch.randint(-4, 5, (3, 40)) / 2
        setting = {**random_setting(draw), "guidance": 1.0, "penalty": 1.0, "temperature": 1.0}
        theirs, ours = filters_of_hugging_face(logits, None, None, setting), kept_by_us(logits, None, None, setting)
        least = logits.masked_fill(~theirs, torch.inf).amin(-1, keepdim=True)
        assert torch.equal(ours, logits >= least), setting


COND = [0.3, -1.2, 2.0, 0.9, -0.4, 1.7, 0.0, -3.0, 1.1, 0.5]
UNCOND = [1.0, 0.2, 0.5, 0.9, -1.4, 2.2, 0.1, -0.5, 0.3, -0.2]
SETTINGS = [
    {},
    {"guidance": 2.5},
    {"temperature": 0.6},
    {"temperature": 2.0, "top_k": 4},
    {"top_p": 0.7},
    {"penalty": 1.5, "guidance": 1.7, "temperature": 0.8, "top_k": 6, "top_p": 0.85},
    {"lo": 2, "hi": 7, "top_k": 3},
]


def chi_square(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """-> (the statistic, its 99.99 % point by Wilson and Hilferty)."""
    live = expected > 0
    assert (found[~live] == 0).all()
    freedom = max(int(live.sum()) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((found[live] - expected[live]) ** 2 / expected[live]).sum()), limit


def draw_counts(setting: dict, count: int) -> torch.Tensor:
    rows, uncond = torch.tensor(COND).expand(count, -1), torch.tensor(UNCOND).expand(count, -1)
    seen = (torch.arange(10) % 3 == 0).expand(count, -1)
    ids = vkernels.sample_logits(rows, uncond=uncond, seen=seen, seed=11, step=0, **setting)
    return torch.bincount(ids, minlength=10).double()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_exact_distribution(backend, setting):
    seen = (torch.arange(10) % 3 == 0)[None]
    expected = oracle.sample_distribution(torch.tensor([COND]), uncond=torch.tensor([UNCOND]), seen=seen, **setting)[0]
    statistic, limit = chi_square(draw_counts(setting, 50_000), 50_000 * expected)
    assert statistic < limit


@pytest.mark.parametrize("wrong", [{"guidance": 2.0}, {"temperature": 0.9}, {"penalty": 1.2}, {"top_p": 0.97}], ids=str)
def test_the_chi_square_is_sharp_enough_to_see_a_wrong_setting(wrong):
    expected = torch.tensor(COND).double().softmax(0)
    assert float(((draw_counts(wrong, 50_000) - 50_000 * expected) ** 2 / (50_000 * expected)).sum()) > 60


def test_a_draw_depends_on_seed_step_and_key_only(backend):
    torch.manual_seed(0)
    logits, keys = torch.randn(50, 300), torch.arange(50) * 2**40 - 7
    ids = vkernels.sample_logits(logits, seed=1, step=2, keys=keys)
    turn = torch.randperm(50)
    assert torch.equal(vkernels.sample_logits(logits[turn], seed=1, step=2, keys=keys[turn]), ids[turn])
    assert torch.equal(vkernels.sample_logits(logits, seed=1 + 2**64, step=torch.tensor(2), keys=keys), ids)
    for other in ({"seed": 2}, {"step": 3}, {"keys": keys + 1}, {"seed": 1 + 2**32}, {"step": 2 + 2**32}):
        changed = vkernels.sample_logits(logits, **{"seed": 1, "step": 2, "keys": keys, **other})
        assert (changed != ids).sum() > 40
    rows = vkernels.sample_logits(logits, seed=1, step=2)
    assert torch.equal(rows, vkernels.sample_logits(logits, seed=1, step=2, keys=torch.arange(50)))


def test_rows_without_a_valid_logit_are_told_by_their_logprob(backend):
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[0.0, 1.0, -inf], [0.0, nan, 1.0], [-inf] * 3, [0.0, inf, 1.0], [-inf, -inf, 0.0]])
    for setting in ({}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.9}):
        ids, logprob = vkernels.sample_logits(logits, seed=0, step=0, return_logprob=True, **setting)
        assert logprob.isfinite().tolist() == [True, False, False, False, True]
        assert ids[1:].tolist() == [0, 0, 0, 2]
        assert ids[0] < 2


def test_guidance_never_draws_what_a_branch_excludes(backend):
    inf = math.inf
    cond, uncond = torch.tensor([[0.0, -inf, 5.0, -inf]]), torch.tensor([[0.0, 0.0, -inf, -inf]])
    for guidance in (0.0, 0.5, 3.0):
        ids = vkernels.sample_logits(
            cond.expand(100, -1), uncond=uncond.expand(100, -1), guidance=guidance, seed=0, step=0
        )
        assert not ids.any()


def test_temperature_zero_takes_the_first_of_the_highest(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0], [-0.0, 0.0, -1.0, 0.0]])
    ids, logprob = vkernels.sample_logits(logits, temperature=0, seed=0, step=0, return_logprob=True)
    assert ids.tolist() == [1, 0]
    assert logprob.tolist() == [0, 0]


def test_strided_logits(backend):
    torch.manual_seed(0)
    wide = torch.randn(60, 12)
    settings = {"seed": 3, "step": 1, "top_k": 20, "guidance": 2.0}
    plain = vkernels.sample_logits(wide.T.contiguous(), uncond=wide.T.contiguous() + 1, **settings)
    assert torch.equal(vkernels.sample_logits(wide.T, uncond=(wide + 1).T, **settings), plain)
    rows = torch.randn(4, 2, 50)
    found = vkernels.sample_logits(rows[:, 0], uncond=rows[:, 1], **settings)
    assert torch.equal(found, vkernels.sample_logits(rows[:, 0].clone(), uncond=rows[:, 1].clone(), **settings))


def test_any_number_of_threads():
    torch.manual_seed(0)
    logits, before = torch.randn(40, 2000), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(vkernels.sample_logits(logits, seed=0, step=0, top_p=0.9, return_logprob=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_torch_backend_waits_for_nothing():
    with FakeTensorMode():  # reading a value raises
        logits, keys = torch.randn(3, 9), torch.arange(3)
        seen, step = torch.ones(3, 9, dtype=torch.bool), torch.zeros((), dtype=torch.int64)
        ids, _ = sampling._forward(logits, logits + 1, seen, step, keys, 0, 2.0, 1.1, 0.5, 4, 0.9, 1, 8)
        assert ids.shape == (3,)


def test_compiles_and_checks():
    logits, step = torch.randn(3, 9), torch.tensor(4)
    seen, keys = torch.rand(3, 9) < 0.5, torch.arange(3)
    arguments = (logits, logits + 1, seen, step, keys, 5, 2.0, 1.1, 0.5, 4, 0.9, 1, 8)
    torch.library.opcheck(torch.ops.vkernels.sample_logits.default, arguments)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, s: vkernels.sample_logits(x, seed=5, step=s, top_k=3), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(logits, step), vkernels.sample_logits(logits, seed=5, step=4, top_k=3))


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"penalty": 0.0}, "penalty is 0.0"),
        ({"guidance": 2.0}, "no uncond"),
        ({"penalty": 2.0}, "no seen"),
        ({"uncond": torch.zeros(2, 5)}, "uncond is torch.float32"),
        ({"keys": torch.zeros(2)}, "keys is torch.float32"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, "step is"),
        ({"seen": torch.zeros(2, 4, dtype=torch.bool, device="meta")}, "operands on .*'cpu', 'meta'"),
        ({"lo": 3, "hi": 3}, r"columns \[3, 3\) of 4"),
        ({"hi": 5}, r"columns \[0, 5\) of 4"),
        ({"logits": torch.zeros(4)}, "logits are"),
        ({"logits": torch.zeros(2, 4).double()}, "logits are torch.float64"),
    ],
)
def test_bad_settings_are_named(bad, word):
    with pytest.raises(ValueError, match=rf"sample_logits: {word}.*expected"):
        vkernels.sample_logits(**{"logits": torch.zeros(2, 4), "seed": 0, "step": 0, **bad})
