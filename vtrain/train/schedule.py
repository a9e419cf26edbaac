"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math


def lr_factor(step: int, steps: int, *, kind: str, warmup: int, decay: float, floor: float) -> float:
    """The factor on the base rate for the update of `step` (0-based) out of `steps`.

    Linear warmup over `warmup` updates (the first uses 1/warmup), then `constant`; `cosine` down to `floor`; or `wsd`
    (warmup, stable, decay): constant, then linear to `floor` over the last `decay` share of all steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        progress = (step - warmup) / max(steps - warmup, 1)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    if kind == "wsd":
        length = max(round(decay * steps), 1)
        left = max(steps - step, 0)
        return floor + (1.0 - floor) * min(left / length, 1.0)
    raise ValueError(f"optim.schedule: {kind!r}, expected constant, cosine or wsd")
