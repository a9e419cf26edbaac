"""How an op is judged: against float64, by at most 1.5 times the error that eager torch makes in the same dtype."""

import torch

from vkernels.check.judge import FLOOR, error


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def run(op, inputs, cotangents):
    """-> the outputs of op(*inputs) and the gradients of the inputs for the given output gradients."""
    inputs = leaves(*inputs)
    outputs = op(*inputs)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    grads = torch.autograd.grad(outputs, inputs, [c.to(o.dtype) for c, o in zip(cotangents, outputs)])
    return [o.detach() for o in outputs], list(grads)


def judge(op, eager, oracle, inputs, dtype, floor=FLOOR):
    """Outputs and every gradient of op(*inputs) in `dtype`, against the float64 oracle and eager torch."""
    inputs = [x.to(dtype) for x in inputs]
    with torch.no_grad():
        shapes = oracle(*[x.double() for x in inputs])
    shapes = shapes if isinstance(shapes, (tuple, list)) else [shapes]
    cotangents = [torch.randn(o.shape, dtype=torch.float64).to(dtype) for o in shapes]
    truth = run(oracle, [x.double() for x in inputs], cotangents)
    ours, theirs = run(op, inputs, cotangents), run(eager, inputs, cotangents)
    for kind, a, b, t in zip(("output", "gradient"), ours, theirs, truth):
        for i, (mine, other, true) in enumerate(zip(a, b, t)):
            assert mine.shape == true.shape, (kind, i)
            bound = 1.5 * error(other, true) + floor[dtype]
            assert error(mine, true) <= bound, (kind, i, error(mine, true), bound)


def poison(monkeypatch):
    """Let torch.empty and new_empty hand out NaN, so that whatever a kernel forgets to write shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def filled(*args, _make=make, **kwargs):
            out = _make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-(2**7))

        monkeypatch.setattr(owner, name, filled)


def compiles(op, *inputs):
    """op traces into one graph with its backward, and the compiled form gives the same numbers."""
    torch._dynamo.reset()
    plain, compiled = leaves(*inputs), leaves(*inputs)
    total = torch.compile(lambda *x: op(*x) * 2, fullgraph=True, backend="aot_eager")(*compiled)
    expected = op(*plain) * 2
    torch.testing.assert_close(total, expected, rtol=0, atol=0)
    total.sum().backward()
    expected.sum().backward()
    for a, b in zip(compiled, plain):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
