"""The `backend` fixture: a test that takes it runs once per backend that this machine can run."""

import pytest

import vkernels
from vkernels.registry import ops


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    """Every op served by one backend; an op without it keeps its own."""
    forced = [op for op in ops() if request.param in vkernels.backends(op)]
    for op in forced:
        vkernels.force(op, request.param)
    yield request.param
    for op in forced:
        vkernels.force(op, None)
