"""What the activations' kernels compile to."""

import pytest
from sm90 import check, meta

from vkernels.jit import activations


def merged(act, rows=32768, columns=6144):
    def launch():
        both = meta(rows, 2 * columns)
        y = activations.gated_forward(both, None, act)
        activations.gated_backward(y, both, None, act)

    return launch


def apart(act, rows=32768, columns=6144):
    def launch():
        gate = meta(rows, columns)
        y = activations.gated_forward(gate, gate, act)
        activations.gated_backward(y, gate, gate, act)

    return launch


def quick_gelu():
    x = meta(16384, 4096)
    activations.quick_gelu_backward(activations.quick_gelu_forward(x), x)


def test_gated():
    check("swiglu", {"32k x 6144, merged": merged("silu")})
    check("geglu", {"32k x 6144, merged": merged("gelu")})


def test_quick_gelu():
    check("quick_gelu", {"16k x 4096": quick_gelu})


@pytest.mark.slow
def test_gated_otherwise():
    check("swiglu", {"32k x 6144": apart("silu"), "narrow": apart("silu", 4096, 176)})
    check("geglu", {"32k x 6144, tanh": merged("gelu_tanh")})
