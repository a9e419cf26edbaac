import numpy as np
import pytest

from vtrain.data.mixture import Mixture


def run(mixture: Mixture, draws: int, seed: int = 0, low: int = 1, high: int = 1300) -> list[tuple[int, int, int]]:
    """(source, epoch, position) of the draws; the length of a sample depends on the sample alone."""
    lengths = np.random.default_rng(seed).integers(low, high + 1, 4096).tolist()
    drawn = []
    for _ in range(draws):
        source = mixture.next()
        if source is None:
            break
        cursor = mixture.cursors[source]
        drawn.append((source, cursor.epoch, cursor.position))
        mixture.advance(source, lengths[(source * 977 + cursor.epoch * 31 + cursor.position) % 4096])
    return drawn


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.9, 0.1], [7, 2, 1], [0.001, 1, 3.3], [5, 4, 3, 2, 1]])
def test_token_shares_stay_within_a_sample_at_all_times(weights):
    mixture = Mixture(weights, [1000] * len(weights))
    shares = np.array(weights) / sum(weights)
    lengths = np.random.default_rng(1).integers(1, 1301, 3000).tolist()
    for length in lengths:
        mixture.advance(mixture.next(), length)
        tokens = np.array([c.tokens for c in mixture.cursors])
        assert np.all(np.abs(tokens - shares * tokens.sum()) <= 1300)


def test_first_draw_is_the_heaviest_and_ties_go_to_the_first():
    assert Mixture([1, 3, 2], [9, 9, 9]).next() == 1
    assert Mixture([2, 2], [9, 9]).next() == 0


def test_weight_zero_is_never_drawn():
    drawn = run(Mixture([0, 1, 0], [10, 10, 10]), 500)
    assert {source for source, _, _ in drawn} == {1}


def test_cursors_walk_every_position_of_every_epoch_once():
    drawn = run(Mixture([3, 1], [17, 5]), 2000)
    for source, size in ((0, 17), (1, 5)):
        walked = [(epoch, position) for s, epoch, position in drawn if s == source]
        assert walked == [divmod(i, size) for i in range(len(walked))]


def test_finished_sources_leave_and_the_rest_share_in_proportion():
    mixture = Mixture([5, 3, 1], [40, 10_000, 10_000], [2, None, None])
    drawn = run(mixture, 8000)
    assert sum(source == 0 for source, _, _ in drawn) == 80
    assert mixture.cursors[0].epoch == 2
    one, two = mixture.cursors[1].tokens, mixture.cursors[2].tokens
    assert abs(one - 3 * two) <= 4 * 1300


def test_ends_when_all_sources_are_finished():
    mixture = Mixture([5, 0, 1], [7, 3, 4], [1, None, 3])
    drawn = run(mixture, 1000)
    assert len(drawn) == 7 + 12
    assert mixture.next() is None


@pytest.mark.parametrize("at", [0, 1, 57, 399, 1000])
def test_state_goes_on_exactly(at):
    def new() -> Mixture:
        return Mixture([0.3, 0.5, 0.2], [30, 41, 50], [4, None, 9])

    whole = run(new(), 1500)
    first, second = new(), new()
    run(first, at)
    second.load(first.state())
    assert run(second, 1500 - at) == whole[at:]


def test_samples_without_tokens_advance_the_cursor():
    mixture = Mixture([1, 1], [3, 3])
    for _ in range(4):
        mixture.advance(0, 0)
    assert (mixture.cursors[0].epoch, mixture.cursors[0].position, mixture.cursors[0].tokens) == (1, 1, 0)


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="mixture weights"):
        Mixture(weights, [1] * len(weights))


def test_bad_states():
    mixture = Mixture([1, 1], [3, 3])
    good = mixture.state()
    for bad in (
        good[:1],
        [good[0], {"epoch": 0, "position": 3, "tokens": 0}],
        [good[0], {"epoch": 0, "position": -1, "tokens": 0}],
        [good[0], {"epoch": -1, "position": 0, "tokens": 0}],
    ):
        with pytest.raises(ValueError, match="mixture state"):
            mixture.load(bad)
