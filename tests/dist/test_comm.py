"""Collectives on host values, alone and on 3 gloo ranks."""

import pytest
from ranks import run_ranks

from vtrain.dist.comm import barrier, max_over_ranks, raise_together, sum_over_ranks
from vtrain.dist.mesh import world


def collect(problems):
    """On a rank: sums and maxima, then the message that raise_together raises, and a sum that proves all go on."""
    with world("cpu") as w:
        barrier()
        sums = sum_over_ranks([w.rank, 2.0**53, 0.1])
        maxima = max_over_ranks([-w.rank, w.rank])
        empty = sum_over_ranks([]), max_over_ranks([])
        try:
            raise_together(problems[w.rank])
            message = None
        except ValueError as error:
            message = str(error)
        return sums, maxima, empty, message, sum_over_ranks([1.0])


@pytest.mark.parametrize(
    ("problems", "messages"),
    [
        ([None, None, None], [None, None, None]),
        ([None, "disk full", None], ["rank 1 failed", "disk full", "rank 1 failed"]),
        (["a", None, "c"], ["a", "rank 0 failed", "c"]),
        ([None, None, "c"], ["rank 2 failed", "rank 2 failed", "c"]),
        ([None, "", None], ["rank 1 failed", "", "rank 1 failed"]),
    ],
)
def test_three_ranks(problems, messages):
    for (sums, maxima, empty, message, after), expected in zip(run_ranks(3, collect, problems), messages):
        assert sums == [3.0, 3 * 2.0**53, pytest.approx(0.3)]
        assert maxima == [0.0, 2.0]
        assert empty == ([], [])
        if expected is None:
            assert message is None
        elif expected.startswith("rank"):
            assert message == f"{expected}; its own message names the cause"
        else:
            assert message == expected
        assert after == [3.0]


def test_alone_without_a_process_group():
    assert sum_over_ranks([1.5, -2]) == [1.5, -2.0]
    assert max_over_ranks([3]) == [3.0]
    barrier()
    raise_together(None)
    with pytest.raises(ValueError, match="disk full"):
        raise_together("disk full")
