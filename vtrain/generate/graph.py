"""A CUDA graph of a function that works on the same tensors at every call: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


class Replay:
    """Calls `function`, from the second call on by replaying a graph of it.

    The first call is a plain one, on the stream that is captured later: it compiles and allocates what the function
    needs. Between calls the function's tensors may be written to (never replaced). What it allocates belongs to the
    graph: nothing but what it writes into older tensors may be read after a call.
    """

    def __init__(self, function: Callable[[], object], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._warm_up()
                return
            if self._graph is None:
                self._capture()
            self._graph.replay()

    def _warm_up(self) -> None:
        self._stream = _side_stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # It records, and runs nothing. What other threads do, such as page-locking the next batch, does not end it.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._function()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device: cuBLAS keeps a workspace (32 MiB on Hopper) for every stream it has seen."""
    return torch.cuda.Stream(device)
