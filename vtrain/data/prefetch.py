"""Run an iterator in a background thread, a bounded number of items ahead of the consumer."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def prefetch(items: Iterable[Item], ahead: int) -> Iterator[Item]:
    """The same items, up to `ahead` of them made before they are asked for; 0 = no thread.

    An exception of `items` is raised here, with its own traceback. When the consumer stops early (closes or drops this
    generator, or the interpreter exits) the thread ends after the item that it is making.
    """
    if ahead < 1:
        yield from items
        return
    ready: SimpleQueue = SimpleQueue()
    slots = threading.Semaphore(ahead)
    stop = threading.Event()

    def produce() -> None:
        error = None
        try:
            slots.acquire()
            for item in items:
                ready.put(item)
                slots.acquire()
                if stop.is_set():
                    return
        except BaseException as raised:
            error = raised
        ready.put(_End(error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)

    def shut_down() -> None:
        stop.set()
        slots.release()
        if thread is not threading.current_thread():  # the garbage collector may run in it, and drop this generator
            thread.join()

    # A generator left in a global is finalised after daemon threads are frozen, too late to join: hence atexit.
    atexit.register(shut_down)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            slots.release()
            yield item
    finally:
        shut_down()
        atexit.unregister(shut_down)
    if item.error is not None:
        raise item.error
