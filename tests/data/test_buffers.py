import sys

import numpy as np
import pytest
import torch

from vtrain.data.buffers import SPARE, Buffers


def test_memory_is_used_again_when_nothing_refers_to_it():
    buffers = Buffers()
    array, first = buffers.take((3, 5), np.int32)
    array[...] = 3
    assert (first == 3).all()
    assert (first.shape, first.dtype) == ((3, 5), torch.int32)
    place = first.data_ptr()
    assert buffers.take((3, 5), np.int32)[1].data_ptr() != place
    del first
    assert buffers.take((3, 5), np.int32)[1].data_ptr() != place
    del array
    assert buffers.take((3, 5), np.int32)[1].data_ptr() == place
    assert buffers.take((3, 5), np.float32)[1].dtype == torch.float32
    assert buffers.take((0,), np.int64)[1].shape == (0,)


HOLDS = {
    "tensor": lambda t: t,
    "row": lambda t: t[1],
    "view of a row": lambda t: t[1].view(5, 1)[2:],
    "numpy": lambda t: t.numpy(),
    "numpy view": lambda t: t.numpy().reshape(-1)[3:7],
    "reinterpreted": lambda t: t.numpy().view(np.uint32)[2],
    "from numpy again": lambda t: torch.from_numpy(t.numpy()[:1]),
    "dlpack": lambda t: np.from_dlpack(t),
}


@pytest.mark.parametrize("how", HOLDS)
def test_memory_that_is_still_seen_is_never_given_out(how):
    buffers = Buffers()
    held = HOLDS[how](buffers.take((3, 5), np.int32)[1])
    held[...] = 7
    for _ in range(5):
        buffers.take((3, 5), np.int32)[1].fill_(0)
    assert (held == 7).all()
    size = buffers.bytes()
    del held
    for _ in range(5):
        buffers.take((3, 5), np.int32)
    assert buffers.bytes() == size


def test_what_was_needed_once_is_not_kept_for_ever():
    buffers = Buffers()
    many = [buffers.take((1000,), np.float32)[1] for _ in range(50)]
    assert buffers.bytes() == 50 * 4000
    del many
    buffers.take((1000,), np.float32)
    assert buffers.bytes() == SPARE * 4000
    assert sys.getrefcount(buffers) == 2


def test_pinned_memory_comes_from_torch():
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):
            Buffers(pinned=True).take((3,), np.float32)
        return
    _, taken = Buffers(pinned=True).take((3, 5), np.float32)
    assert taken.is_pinned()
    assert taken[1].is_pinned()
