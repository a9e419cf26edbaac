"""Which parameters train: shell patterns over parameter names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn


def apply_trainable(model: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters whose name matches a pattern train, all others are frozen.

    ValueError for a pattern that matches nothing, with the nearest parameter name.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"train.trainable: {pattern!r} matches none of {len(names)} parameters{hint}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, p) for p in patterns))
