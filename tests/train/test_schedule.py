"""Learning-rate factors against closed forms: warmup, the three kinds, their joints and their ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtrain.train.schedule import lr_factor

KINDS = ("constant", "cosine", "wsd")


def factors(steps, **options):
    options = {"kind": "constant", "warmup": 0, "decay": 0.2, "floor": 0.0} | options
    return [lr_factor(step, steps, **options) for step in range(steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_is_linear_and_the_peak_follows(kind):
    assert factors(100, kind=kind, warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_constant():
    assert factors(5) == [1.0] * 5


def test_cosine_is_symmetric_around_its_middle():
    down = factors(101, kind="cosine", warmup=1, floor=0.2)[1:]
    assert down[0] == 1.0
    assert down[50] == pytest.approx(0.6)
    assert down[25] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    for i in range(1, 50):
        assert down[50 - i] + down[50 + i] == pytest.approx(1.2)


def test_wsd_is_stable_then_linear():
    got = factors(20, kind="wsd", decay=0.25, floor=0.5)
    assert got[:16] == [1.0] * 16
    assert got[16:] == pytest.approx([0.9, 0.8, 0.7, 0.6])


@given(
    st.sampled_from(KINDS), st.integers(1, 60), st.integers(0, 60), st.floats(0, 1), st.floats(0, 1), st.integers(0, 50)
)
def test_bounds_and_direction(kind, steps, warmup, decay, floor, past):
    """Never above 1, above 0 while training, up in the warmup and never up again, `floor` where the steps end."""
    warmup = min(warmup, steps)
    options = {"kind": kind, "warmup": warmup, "decay": decay, "floor": floor}
    got = factors(steps, **options)
    assert all(0 < f <= 1 for f in got)
    assert got[:warmup] == sorted(got[:warmup])
    assert got[warmup:] == sorted(got[warmup:], reverse=True)
    if steps > warmup or past:
        end = lr_factor(steps + past, steps, **options)
        assert end == pytest.approx(1.0 if kind == "constant" else floor, abs=1e-12)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"optim\.schedule: 'linear', expected constant, cosine or wsd"):
        lr_factor(3, 10, kind="linear", warmup=0, decay=0.1, floor=0.0)
