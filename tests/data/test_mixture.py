"""The mixture as a plan draws it: with a pool of one sample the documents of the bins come in drawn order."""

from fractions import Fraction

import numpy as np
import pytest
from memory_dataset import texts

from vtrain.data.compose import LanguageModel
from vtrain.data.plan import Plan, Source

HIGH = 130


def sources(weights, sizes, max_epochs=None) -> list[Source]:
    draw = np.random.default_rng(len(weights))
    lengths = [draw.integers(1, HIGH + 1, n).tolist() for n in sizes]
    return [
        Source(texts(of, f"s{i}"), w, max_epochs=None if max_epochs is None else max_epochs[i])
        for i, (of, w) in enumerate(zip(lengths, weights))
    ]


def draws(of: list[Source], count: int) -> np.ndarray:
    """int64[4, at most count]: source, epoch, position and tokens of the draws."""
    plan = Plan(of, LanguageModel(), seed=1, pack_tokens=HIGH, bins_per_step=8, max_documents=99, pool=1)
    found, steps = np.zeros((4, 0), dtype=np.int64), iter(plan.next_step, None)
    while found.shape[1] < count and (step := next(steps, None)) is not None:
        found = np.concatenate((found, [step.source, step.epoch, step.position, step.length]), axis=1)
    return found[:, :count]


def tokens_by_source(drawn: np.ndarray, count: int) -> np.ndarray:
    """int64[draws, count] drawn so far."""
    return np.cumsum((drawn[0][:, None] == np.arange(count)) * drawn[3][:, None], axis=0)


@pytest.mark.parametrize("weights", [[1], [1, 1], [9, 1], [7, 2, 1], [1, 1000, 3300], [5, 4, 3, 2, 1], [1] * 40])
def test_token_shares_stay_within_a_sample_at_all_times(weights):
    """Ahead by a sample at most: the drawn source was not more than a token ahead. Behind by what the others are ahead
    of, so by a sample with two sources; with more it can be a little more."""
    drawn = draws(sources(weights, [300] * len(weights)), 6000)
    tokens = tokens_by_source(drawn, len(weights))
    for i, weight in enumerate(weights):
        share = Fraction(weight, sum(weights))
        for mine, total in zip(tokens[::7, i].tolist(), tokens[::7].sum(axis=1).tolist()):
            assert -(1 if len(weights) < 3 else 1.25) * HIGH - 1 <= mine - share * total <= HIGH + 1


@pytest.mark.parametrize(
    "schedules",
    [
        [[(0, 1.0), (200_000, 0.0)], [(0, 0.0), (200_000, 1.0)]],
        [[(50_000, 3.0), (50_000, 1.0)], 1.0],
        [[(10_000, 0.5), (90_000, 4.0), (90_000, 0.0), (150_000, 0.0), (200_000, 2.0)], 1.0, 0.25],
    ],
)
def test_scheduled_shares_follow_their_integral(schedules):
    drawn = draws(sources(schedules, [300] * len(schedules)), 5000)
    tokens = tokens_by_source(drawn, len(schedules))
    total = tokens.sum(axis=1)
    grid = np.arange(total[-1]) + 0.5  # the share of every single token, exact but for jumps inside a sample
    points = [of if isinstance(of, list) else [(0, of)] for of in schedules]
    weights = np.array([np.interp(grid, *zip(*of)) for of in points])
    expected = np.cumsum(weights / weights.sum(axis=0), axis=1)[:, total - 1].T
    # A sample weighs by its first token: a slope adds at most half a sample on the way from 0 to 1, a jump one.
    assert np.abs(tokens - expected).max() <= 2.5 * HIGH


def test_weights_of_a_schedule_at_its_points():
    """At a jump the later weight holds; before the first and after the last point the weight is constant."""
    of = sources([[(0, 1.0), (5000, 1.0), (5000, 0.0), (9000, 0.0), (9000, 1.0)], [(5000, 0.0), (5000, 1.0)]], [50, 50])
    drawn = draws(of, 600)
    before = np.concatenate(([0], np.cumsum(drawn[3])[:-1]))
    assert set(drawn[0][before < 5000]) == {0}
    assert set(drawn[0][(before >= 5000) & (before < 9000)]) == {1}
    assert set(drawn[0][before > 12_000]) == {0, 1}


def test_first_draw_is_the_heaviest_and_ties_go_to_the_first():
    assert draws(sources([1, 3, 2], [9, 9, 9]), 1)[0] == 1
    assert draws(sources([2, 2], [9, 9]), 1)[0] == 0


def test_weight_zero_is_never_drawn():
    assert set(draws(sources([0, 1, 0], [10, 10, 10]), 500)[0]) == {1}


def test_cursors_walk_every_position_of_every_epoch_once():
    drawn = draws(sources([3, 1], [17, 5]), 2000)
    for source, size in ((0, 17), (1, 5)):
        own = drawn[1:3, drawn[0] == source].T.tolist()
        assert own == [list(divmod(i, size)) for i in range(len(own))]


def test_finished_sources_leave_and_the_rest_share_in_proportion():
    drawn = draws(sources([5, 3, 1], [40, 3000, 3000], [2, None, None]), 4000)
    assert (drawn[0] == 0).sum() == 80
    one, two = (drawn[3, drawn[0] == i].sum() for i in (1, 2))
    assert abs(one - 3 * two) <= 4 * HIGH


def test_ends_when_all_sources_are_finished():
    drawn = draws(sources([5, 0, 1], [7, 3, 4], [1, None, 3]), 1000)
    assert drawn.shape[1] == 7 + 12


def test_a_source_that_is_scheduled_for_later_takes_over_when_the_others_have_left():
    """Tokens stand still then, so its time would never come."""
    later = [[(0, 0.0), (1000, 0.0), (1000, 1.0)], [(0, 0.0), (5000, 0.0), (9000, 3.0)]]
    drawn = draws(sources([1, *later], [4, 4, 4], [1, 1, 1]), 100)
    assert drawn[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_tiny_and_huge_weights():
    drawn = draws(sources([1e-12, 1e30], [50, 50]), 3000)
    assert set(drawn[0]) == {1}
    drawn = draws(sources([1e-12, 1.0], [50, 50], [None, 4]), 400)
    assert drawn[0].tolist() == [1] * 200 + [0] * 200  # the last one left takes it all


@pytest.mark.parametrize(
    "weights", [[0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1], [[(0, 1.0), (9, 0.0), (20, 0.0), (30, 1.0)], 0]]
)
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="mixture weights"):
        draws(sources(weights, [1] * len(weights)), 1)


def test_draws_never_change():
    """A resumed run on another version must draw the same: these numbers are for ever."""
    of = [Source(texts([5, 7, 9], "a"), 2.0), Source(texts([4, 4], "b"), [(0, 1.0), (60, 4.0)])]
    drawn = draws(of, 16)
    assert drawn[0].tolist() == [0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1]
    assert drawn[3].tolist() == [7, 4, 5, 4, 4, 9, 4, 4, 9, 4, 4, 4, 4, 5, 4, 4]
