"""These tests run the Triton kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreter`.

The variable must be set before the first import of triton, hence a process of their own (scripts/test.sh starts it).
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import bfloat16_in_interpreter

    bfloat16_in_interpreter.mend()


@pytest.fixture(autouse=True)
def triton_backend():
    """Every op that has Triton kernels is served by them."""
    import vkernels
    from vkernels.registry import ops

    forced = [op for op in ops() if "triton" in vkernels.backends(op)]
    for op in forced:
        vkernels.force(op, "triton")
    yield
    for op in forced:
        vkernels.force(op, None)
