"""The sampler against slow references: exact order of operations, exact distribution, independence from the batch."""

import math

import numpy as np
import pytest
import torch

from vtrain.generate import sampler
from vtrain.generate.sampler import (
    Sampling,
    guide,
    gumbel_noise,
    keep_top_k,
    keep_top_p,
    noise_keys,
    sample_token,
)
from vtrain.rng import fold, uniform


def slow_distribution(cond, uncond, cfg, temperature, top_k, top_p) -> np.ndarray:
    """The exact probabilities of one row in float64, one token at a time."""

    def log_softmax(values):
        top = max(values)
        norm = top + math.log(sum(math.exp(v - top) for v in values))
        return [v - norm for v in values]

    scores = list(cond)
    if cfg != 1.0:
        scores = [u + cfg * (c - u) for c, u in zip(log_softmax(cond), log_softmax(uncond))]
    scores = [s / temperature for s in scores]
    kept = set(range(len(scores)))
    if top_k:
        limit = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        kept = {i for i in kept if scores[i] >= limit}
    if top_p < 1:
        order = sorted(kept, key=lambda i: -scores[i])
        norm = sum(math.exp(scores[i]) for i in order)
        mass, limit = 0.0, scores[order[0]]
        for i in order:
            if mass >= top_p:
                break
            mass += math.exp(scores[i]) / norm
            limit = scores[i]
        kept = {i for i in kept if scores[i] >= limit}
    weights = np.array([math.exp(s) if i in kept else 0.0 for i, s in enumerate(scores)])
    return weights / weights.sum()


def draws(cond, uncond, sampling, count) -> np.ndarray:
    """How often each token comes in `count` draws with sample keys 0, 1, 2, ..."""
    keys = noise_keys(sampling.seed, range(count), 1)[0]
    rows = torch.tensor(cond).expand(count, -1)
    other = torch.tensor(uncond).expand(count, -1) if sampling.guided else None
    tokens, scores = sample_token(rows, other, keys, sampling)
    assert scores.isfinite().all()
    return np.bincount(tokens.numpy(), minlength=len(cond))


COND = [0.3, -1.2, 2.0, 0.9, -0.4, 1.7, 0.0, -3.0, 1.1, 0.5]
UNCOND = [1.0, 0.2, 0.5, 0.9, -1.4, 2.2, 0.1, -0.5, 0.3, -0.2]
CASES = [
    {},
    {"cfg": 2.5},
    {"cfg": 0.0},
    {"temperature": 0.6},
    {"temperature": 2.0, "top_k": 4},
    {"top_p": 0.7},
    {"cfg": 1.7, "temperature": 0.8, "top_k": 6, "top_p": 0.85},
    {"cfg": 3.0, "temperature": 3.0, "top_p": 0.5},  # top-p before the temperature would keep fewer tokens
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_analytic_distribution(case):
    sampling = Sampling(seed=11, **case)
    expected = slow_distribution(COND, UNCOND, sampling.cfg, sampling.temperature, sampling.top_k, sampling.top_p)
    count = 50_000
    found = draws(COND, UNCOND, sampling, count)
    assert (found[expected == 0] == 0).all()
    live = expected > 0
    chi2 = float(((found[live] - count * expected[live]) ** 2 / (count * expected[live])).sum())
    freedom = int(live.sum()) - 1
    # Wilson-Hilferty: the 99.99 % point of chi-square; the seed is fixed, so this never flickers.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert chi2 < limit, (chi2, limit, found, count * expected)


@pytest.mark.parametrize("wrong", [{"cfg": 2.0}, {"temperature": 0.9}, {"top_k": 9}, {"top_p": 0.97}], ids=str)
def test_the_chi_square_is_sharp_enough_to_see_a_wrong_setting(wrong):
    expected = slow_distribution(COND, UNCOND, 1.0, 1.0, 0, 1.0)
    found = draws(COND, UNCOND, Sampling(seed=11, **wrong), 50_000)
    chi2 = float(((found - 50_000 * expected) ** 2 / (50_000 * expected)).sum())
    assert chi2 > 60


def test_order_is_guide_temperature_top_k_top_p():
    torch.manual_seed(0)
    for _ in range(50):
        cond, uncond = torch.randn(2, 23).double()
        cfg, temperature = 1 + 3 * torch.rand(2).double()
        top_k, top_p = int(torch.randint(1, 24, ())), float(0.05 + 0.9 * torch.rand(()))
        guided = guide(cond[None], uncond[None], float(cfg)) / float(temperature)
        kept = keep_top_p(keep_top_k(guided, top_k), top_p)
        probs = kept.double().softmax(-1)[0].numpy()
        expected = slow_distribution(cond.tolist(), uncond.tolist(), float(cfg), float(temperature), top_k, top_p)
        np.testing.assert_allclose(probs, expected, atol=2e-6)


def test_guidance_formula_and_scale_one():
    cond, uncond = torch.randn(2, 5, 7)
    c, u = cond.double().log_softmax(-1), uncond.double().log_softmax(-1)
    torch.testing.assert_close(guide(cond, uncond, 4.0).double(), u + 4 * (c - u), atol=1e-5, rtol=1e-5)
    keys = noise_keys(3, range(5), 1)[0]
    alone, _ = sample_token(cond, None, keys, Sampling(seed=3))
    mixed = guide(cond, uncond, 1.0) + gumbel_noise(keys, 7)
    assert alone.tolist() == mixed.argmax(-1).tolist()


def test_top_k_edges():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    inf = -math.inf
    assert keep_top_k(logits, 0) is logits
    assert keep_top_k(logits, 4) is logits
    assert keep_top_k(logits, 9) is logits
    assert keep_top_k(logits, 3).tolist() == [[inf, 3.0, 3.0, 2.0]]
    assert keep_top_k(logits, 1).tolist() == [[inf, 3.0, 3.0, inf]]  # equal tokens share their fate
    assert keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 1).tolist() == [[inf, 3.0, inf]]


def test_top_p_edges():
    inf = -math.inf
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert keep_top_p(logits, 1.0) is logits
    assert keep_top_p(logits, 1e-9)[0, 1:].tolist() == [inf, inf, inf]
    assert keep_top_p(logits, 0.5)[0].isfinite().tolist() == [True, False, False, False]  # 0.5 is reached exactly
    assert keep_top_p(logits, 0.51)[0].isfinite().tolist() == [True, True, False, False]
    assert keep_top_p(logits, 0.76)[0].isfinite().tolist() == [True, True, True, True]  # ties stay together
    assert keep_top_p(torch.tensor([[2.0, 2.0, 1.0]]), 1e-9)[0].isfinite().tolist() == [True, True, False]
    masked = torch.tensor([[0.0, inf, inf, 0.0]])
    assert keep_top_p(masked, 0.9).tolist() == masked.tolist()


def test_temperature_zero_is_argmax_of_the_guided_logits():
    cond, uncond = torch.randn(2, 40, 9)
    keys = noise_keys(0, range(40), 1)[0]
    tokens, _ = sample_token(cond, uncond, keys, Sampling(cfg=3.0, temperature=0, top_k=2, top_p=0.1))
    assert tokens.tolist() == guide(cond, uncond, 3.0).argmax(-1).tolist()
    tokens, _ = sample_token(cond, None, keys, Sampling(temperature=0))
    assert tokens.tolist() == cond.argmax(-1).tolist()


def test_noise_is_the_documented_counter_function():
    keys = noise_keys(7, [5, 2**63 + 1], steps=4)
    assert keys.shape == (4, 2)
    noise = gumbel_noise(keys[3], 6).numpy()
    for row, key in enumerate([5, 2**63 + 1]):
        u = uniform(fold(7, key, 3), np.arange(6, dtype=np.uint64))
        np.testing.assert_allclose(noise[row], -np.log(-np.log(u + 2.0**-54)), rtol=1e-12)


def test_noise_depends_on_seed_key_and_step_only():
    table = noise_keys(1, [10, 20, 30], 3)
    assert torch.equal(noise_keys(1, [30, 10], 2), table[:2, [2, 0]])
    assert len(set(table.flatten().tolist())) == 9
    assert not (noise_keys(2, [10, 20, 30], 3) == table).any()


def test_rows_that_are_not_finite_are_told_by_their_score():
    logits = torch.tensor([[0.0, 1.0], [0.0, math.nan], [-math.inf, -math.inf]])
    _, scores = sample_token(logits, None, noise_keys(0, range(3), 1)[0], Sampling())
    assert scores.isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"cfg": -1.0}, "cfg"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_bad_settings_are_named(bad, word):
    with pytest.raises(ValueError, match=rf"sampling: {word} is .*expected"):
        Sampling(**bad)


def test_noise_is_finite_at_both_ends_of_the_uniform_draw(monkeypatch):
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-52, 1 - 2.0**-53], dtype=torch.float64)
    monkeypatch.setattr(sampler, "uniform_tensor", lambda keys, words: ends)
    noise = gumbel_noise(torch.zeros(1, dtype=torch.int64), len(ends))
    assert noise.isfinite().all()
    assert (noise.diff() > 0).all()
