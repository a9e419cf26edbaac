"""The sampler against a slow reference: exact order of operations, exact distribution, independence from the batch."""

import math

import numpy as np
import pytest
import torch

from vtrain.generate.sampler import Sampling, key_rows, sample_token


def slow_distribution(cond, uncond, cfg, temperature, top_k, top_p, penalty=1.0, seen=()) -> np.ndarray:
    """The exact probabilities of one row in float64, one token at a time."""

    def log_softmax(values):
        top = max(values)
        norm = top + math.log(sum(math.exp(v - top) for v in values))
        return [v - norm for v in values]

    scores = [(c * penalty if c < 0 else c / penalty) if i in seen else c for i, c in enumerate(cond)]
    if cfg != 1.0:
        scores = [u + cfg * (c - u) for c, u in zip(log_softmax(scores), log_softmax(uncond))]
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
    rows = torch.tensor(cond).expand(count, -1)
    other = torch.tensor(uncond).expand(count, -1) if sampling.guided else None
    seen = torch.tensor([i in SEEN for i in range(len(cond))]).expand(count, -1)
    tokens, logprob = sample_token(rows, other, key_rows(range(count)), 0, sampling, seen)
    assert logprob.isfinite().all()
    return np.bincount(tokens.numpy(), minlength=len(cond))


COND = [0.3, -1.2, 2.0, 0.9, -0.4, 1.7, 0.0, -3.0, 1.1, 0.5]
UNCOND = [1.0, 0.2, 0.5, 0.9, -1.4, 2.2, 0.1, -0.5, 0.3, -0.2]
SEEN = {1, 2, 4, 8}
CASES = [
    {},
    {"cfg": 2.5},
    {"cfg": 0.0},
    {"temperature": 0.6},
    {"temperature": 2.0, "top_k": 4},
    {"top_p": 0.7},
    {"cfg": 1.7, "temperature": 0.8, "top_k": 6, "top_p": 0.85},
    {"cfg": 3.0, "temperature": 3.0, "top_p": 0.5},  # top-p before the temperature would keep fewer tokens
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 1.6, "cfg": 2.0, "temperature": 0.7, "top_k": 6, "top_p": 0.9},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_analytic_distribution(case):
    sampling = Sampling(seed=11, **case)
    settings = sampling.cfg, sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty
    expected = slow_distribution(COND, UNCOND, *settings, SEEN)
    count = 50_000
    found = draws(COND, UNCOND, sampling, count)
    assert (found[expected == 0] == 0).all()
    live = expected > 0
    chi2 = float(((found[live] - count * expected[live]) ** 2 / (count * expected[live])).sum())
    freedom = int(live.sum()) - 1
    # Wilson-Hilferty: the 99.99 % point of chi-square; the seed is fixed, so this never flickers.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert chi2 < limit, (chi2, limit, found, count * expected)


@pytest.mark.parametrize(
    "wrong", [{"cfg": 2.0}, {"temperature": 0.9}, {"top_k": 9}, {"top_p": 0.97}, {"repetition_penalty": 1.1}], ids=str
)
def test_the_chi_square_is_sharp_enough_to_see_a_wrong_setting(wrong):
    expected = slow_distribution(COND, UNCOND, 1.0, 1.0, 0, 1.0)
    found = draws(COND, UNCOND, Sampling(seed=11, **wrong), 50_000)
    chi2 = float(((found - 50_000 * expected) ** 2 / (50_000 * expected)).sum())
    assert chi2 > 60


def test_log_probabilities_are_those_of_guide_temperature_top_k_top_p():
    rng = np.random.default_rng(0)
    for _ in range(50):
        cond, uncond = rng.normal(size=(2, 23)).astype(np.float32)
        settings = {"cfg": 1 + 3 * rng.random(), "temperature": 0.2 + rng.random()}
        settings |= {"top_k": int(rng.integers(1, 24)), "top_p": 0.05 + 0.9 * rng.random()}
        expected = slow_distribution(cond.tolist(), uncond.tolist(), **settings)
        rows = (torch.from_numpy(x).expand(64, -1) for x in (cond, uncond))
        tokens, logprob = sample_token(*rows, key_rows(range(64)), 0, Sampling(**settings))
        np.testing.assert_allclose(logprob.double().exp().numpy(), expected[tokens.numpy()], rtol=1e-4)


def test_scale_one_ignores_the_unconditional_branch():
    cond = torch.randn(5, 7)
    found = [sample_token(cond, uncond, key_rows(range(5)), 0, Sampling())[0] for uncond in (None, -cond)]
    assert torch.equal(*found)


def test_temperature_zero_is_argmax_of_the_guided_logits():
    cond, uncond = torch.randn(2, 40, 9)
    keys = key_rows(range(40))
    tokens, _ = sample_token(cond, uncond, keys, 0, Sampling(cfg=3.0, temperature=0, top_k=2, top_p=0.1))
    assert tokens.tolist() == (uncond + 3 * (cond - uncond)).argmax(-1).tolist()
    tokens, _ = sample_token(cond, None, keys, 0, Sampling(temperature=0))
    assert tokens.tolist() == cond.argmax(-1).tolist()


def test_a_draw_depends_on_seed_key_and_step_only():
    """Not on the row, nor on the rows beside it: the same logits under the same key, wherever they stand."""
    logits = torch.randn(1, 1 << 16).expand(4, -1)
    numbers = [10, 2**64 - 1, 30, 2**63]

    def run(seed=1, step=0, order=(0, 1, 2, 3)):
        tokens, _ = sample_token(
            logits[: len(order)], None, key_rows([numbers[i] for i in order]), step, Sampling(seed=seed)
        )
        return dict(zip(order, tokens.tolist()))

    whole = run()
    assert len(set(whole.values())) == 4
    assert run(order=(3, 1)) == {i: whole[i] for i in (3, 1)}
    for other in (run(seed=2), run(step=1)):
        assert all(other[i] != whole[i] for i in whole)


def test_keys_carry_the_bits_of_u64():
    assert key_rows([0, 5, 2**63, 2**64 - 1, -1]).tolist() == [0, 5, -(2**63), -1, -1]


def test_rows_that_are_not_finite_are_told_by_their_log_probability():
    rows = [[0.0, 1.0], [0.0, math.nan], [-math.inf, -math.inf], [0.0, math.inf], [-math.inf, 0.0]]
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature)
        tokens, logprob = sample_token(torch.tensor(rows), None, key_rows(range(5)), 0, sampling)
        assert logprob.isfinite().tolist() == [True, False, False, False, True]
        assert tokens[4] == 1


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"cfg": -1.0}, "cfg"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"speculate": -1}, "speculate"),
        ({"speculate": 16, "repetition_penalty": 1.1}, "repetition_penalty"),
    ],
)
def test_bad_settings_are_named(bad, word):
    with pytest.raises(ValueError, match=rf"sampling: {word} is .*expected"):
        Sampling(**bad)
