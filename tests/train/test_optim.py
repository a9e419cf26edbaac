"""The optimizer against torch's own, and the form of its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vtrain.train.ema import Ema
from vtrain.train.optim import AdamW

SETTINGS = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ON, OFF = torch.ones(()), torch.zeros(())
LOSS = torch.zeros(())


def parameters() -> dict[str, nn.Parameter]:
    """A matrix, a vector, a convolution, a frozen matrix, and one of which this rank holds no row."""
    torch.manual_seed(0)
    shapes = {"w": (5, 3), "bias": (7,), "conv": (4, 2, 3, 3), "frozen": (2, 2), "far": (0, 3)}
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    named["frozen"].requires_grad_(False)
    return named


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=generator) * (1 + step) if p.requires_grad else None


def torch_adamw(named: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    trained = [p for p in named.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": SETTINGS["weight_decay"]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **SETTINGS)


def torch_step(theirs: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, step: int, max_norm: float) -> float:
    give_gradients(theirs, step)
    norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), max_norm if max_norm > 0 else float("inf"))
    optimizer.step()
    return norm


def our_step(named: dict[str, nn.Parameter], optimizer: AdamW, step: int, max_norm=1.0, kept=ON) -> torch.Tensor:
    give_gradients(named, step)
    norm = optimizer.clip(max_norm, LOSS)
    optimizer.step(kept)
    return norm


def assert_near(ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]) -> None:
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name], p, atol=2e-6, rtol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def everything(optimizer: AdamW) -> list[torch.Tensor]:
    state = optimizer.tensors("o")
    tensors = [*optimizer.shards.values(), *state.whole.values(), *(t for t, _ in state.sharded.values())]
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_equal_to_torch_with_clipping_and_a_schedule(max_norm):
    ours, theirs = parameters(), parameters()
    optimizer, reference = AdamW(ours.items(), **SETTINGS), torch_adamw(theirs)
    for step in range(5):
        lr = SETTINGS["lr"] / (1 + step)
        optimizer.set_lr(lr)
        for group in reference.param_groups:
            group["lr"] = lr
        expected = torch_step(theirs, reference, step, max_norm)
        torch.testing.assert_close(our_step(ours, optimizer, step, max_norm), expected)
        assert all(p.grad is None for p in ours.values())
    assert_near(ours, theirs)


def test_a_step_that_is_not_kept_changes_no_bit():
    named = parameters()
    optimizer = AdamW(named.items(), **SETTINGS)
    our_step(named, optimizer, 0)
    before = everything(optimizer)
    our_step(named, optimizer, 1, kept=OFF)
    assert all(map(torch.equal, everything(optimizer), before))
    our_step(named, optimizer, 1)
    plain = parameters()
    straight = AdamW(plain.items(), **SETTINGS)
    our_step(plain, straight, 0)
    our_step(plain, straight, 1)
    assert all(map(torch.equal, everything(optimizer), everything(straight)))


@pytest.mark.parametrize(("gradient", "loss"), [(float("inf"), 0.0), (float("nan"), 0.0), (0.0, float("nan"))])
def test_the_norm_tells_what_is_not_finite(gradient, loss):
    named = parameters()
    optimizer = AdamW(named.items(), **SETTINGS)
    before = everything(optimizer)
    give_gradients(named, 0)
    named["w"].grad[0, 0] += gradient
    norm = optimizer.clip(1.0, torch.tensor(loss))
    assert not norm.isfinite()
    optimizer.step(norm.isfinite().float())
    assert all(map(torch.equal, everything(optimizer), before))


def test_a_parameter_without_a_gradient_stays_as_it_is():
    named = parameters()
    optimizer = AdamW(named.items(), **SETTINGS)
    our_step(named, optimizer, 0)
    kept = [t.clone() for t in (named["conv"], optimizer.averages["conv"], optimizer.squares["conv"])]
    give_gradients(named, 1)
    named["conv"].grad = None
    optimizer.clip(1.0, LOSS)
    optimizer.step(ON)
    assert all(map(torch.equal, kept, (named["conv"], optimizer.averages["conv"], optimizer.squares["conv"])))


def test_the_state_has_the_form_of_torchs_own_and_goes_on_from_it():
    """As checkpoints have always held it: torch's state by name, which another optimizer continues."""
    theirs = parameters()
    reference = torch_adamw(theirs)
    for step in range(3):
        torch_step(theirs, reference, step, 1.0)
    ours = parameters()
    optimizer = AdamW(ours.items(), **SETTINGS)
    with torch.no_grad():
        for name, p in ours.items():
            p.copy_(theirs[name])
    state = optimizer.tensors("optim.adamw")
    trained = [name for name, p in theirs.items() if p.requires_grad]
    expected = {f"optim.adamw.{n}.{key}": s for n in trained for key, s in reference.state[theirs[n]].items()}
    assert state.whole.keys() | state.sharded.keys() == expected.keys()
    for name, value in expected.items():
        target = state.whole[name] if name in state.whole else state.sharded[name][0]
        assert target.dtype == value.dtype
        assert target.shape == value.shape
        target.copy_(value)
    for step in range(3, 5):
        torch_step(theirs, reference, step, 1.0)
        our_step(ours, optimizer, step)
    assert_near(ours, theirs)


def test_parameters_that_are_counted_apart_begin_as_in_a_new_optimizer():
    """Also a second time, and after the state went through a checkpoint; one norm clips them all."""
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours.items(), **SETTINGS)
    references = {name: torch_adamw({name: p}) for name, p in theirs.items() if p.requires_grad}

    def restart(*names: str) -> None:
        optimizer.count_apart(names)
        for name in names:
            references[name] = torch_adamw({name: theirs[name]})
            for moments in (optimizer.averages, optimizer.squares):
                moments[name].zero_()

    def step(number: int) -> None:
        our_step(ours, optimizer, number)
        give_gradients(theirs, number)
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        for reference in references.values():
            reference.step()
        assert_near(ours, theirs)

    step(0)
    step(1)
    restart("conv", "bias")
    step(2)
    restart("conv")
    step(3)
    counts = {name: float(t) for name, t in optimizer.tensors("o").whole.items()}
    assert counts == {"o.w.step": 4, "o.bias.step": 2, "o.conv.step": 1, "o.far.step": 4}

    again = AdamW(ours.items(), **SETTINGS)
    again.count_apart(["conv", "bias"])
    again.count_apart(["conv"])
    saved, fresh = optimizer.tensors("o"), again.tensors("o")
    for name, tensor in fresh.whole.items():
        tensor.copy_(saved.whole[name])
    for name, (tensor, _) in fresh.sharded.items():
        tensor.copy_(saved.sharded[name][0])
    optimizer = again
    step(4)


def test_a_rank_without_any_row_counts_with_the_others():
    named = {"far": nn.Parameter(torch.empty(0, 3))}
    optimizer = AdamW(named.items(), **SETTINGS)
    ema = Ema([optimizer], 0.9)
    for kept in (ON, OFF, ON):
        norm = optimizer.clip(1.0, LOSS)
        optimizer.step(kept)
        ema.update(kept)
        assert norm == 0
    assert optimizer.updates == 2
    assert ema.tensors().sharded["ema.far"][0].shape == (0, 3)
