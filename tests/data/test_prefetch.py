import gc
import subprocess
import sys
import threading
import time
import traceback

import pytest

from vtrain.data.prefetch import prefetch


def counted(made: list[int], stop: int):
    for i in range(stop):
        made.append(i)
        yield i


def new_threads(others: set[threading.Thread]) -> set[threading.Thread]:
    """`others` are there already: those of iterators that other tests left to the garbage collector, which may end."""
    return set(threading.enumerate()) - others


def settled(made: list[int]) -> list[int]:
    """What a thread has made once it has stopped making more."""
    before = -1
    while before != len(made):
        before = len(made)
        time.sleep(0.02)
    return made


@pytest.mark.parametrize("ahead", [0, 1, 2, 50])
def test_same_items_in_order(ahead):
    assert list(prefetch(iter(range(20)), ahead)) == list(range(20))
    assert list(prefetch([None, None], ahead)) == [None, None]
    assert list(prefetch([], ahead)) == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_works_ahead_by_no_more_than_asked(ahead):
    made: list[int] = []
    items = prefetch(counted(made, 100), ahead)
    for i in range(5):
        assert next(items) == i
        assert len(settled(made)) == i + 1 + ahead
    items.close()


def failing():
    yield 1
    raise KeyError("broken record")


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_exceptions_surface_in_order_with_their_traceback(ahead):
    items = prefetch(failing(), ahead)
    assert next(items) == 1
    with pytest.raises(KeyError, match="broken record") as caught:
        next(items)
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


@pytest.mark.parametrize("how", ["close", "drop", "raise"])
def test_thread_ends_when_the_consumer_stops_early(how):
    others = set(threading.enumerate())
    made: list[int] = []
    items = prefetch(counted(made, 10**9), 2)
    next(items)
    assert len(new_threads(others)) == 1
    if how == "close":
        items.close()
    elif how == "drop":
        del items
    else:
        with pytest.raises(RuntimeError):
            items.throw(RuntimeError())
    assert not new_threads(others)
    assert len(made) <= 4


def test_interpreter_exits_cleanly_with_a_live_iterator():
    """The thread is inside torch without the GIL: killed there, it would abort the process."""
    code = """
import itertools, torch
from vtrain.data.prefetch import prefetch
items = prefetch((torch.randn(200_000).sort() and i for i in itertools.count()), 2)
print(next(items), next(items))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")


def test_the_garbage_collector_may_drop_it_in_its_own_thread(monkeypatch):
    """A generator in a cycle of references is closed by whichever thread collects."""
    noise, begun, dropped = [], threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "unraisablehook", lambda found: noise.append(found.exc_value))

    def numbers():
        yield 0
        begun.set()
        assert dropped.wait(10)
        gc.collect()
        yield 1

    others = set(threading.enumerate())
    items = prefetch(numbers(), 1)
    assert next(items) == 0
    [thread] = new_threads(others)
    assert begun.wait(10)
    gc.disable()
    try:
        cycle = [items]
        cycle.append(cycle)
        del items, cycle
        dropped.set()
        thread.join(10)
    finally:
        gc.enable()
    assert not thread.is_alive()
    assert noise == []
