"""Which backend was measured to be fastest, by GPU, op and facts of the call: `measured/<gpu>.json`.

A file is `{"<op>": [{"where": {fact: value, ...}, "order": [backend, ...]}, ...]}`; the first entry whose `where`
agrees with the call counts. It is written by `bench/run.py --table` from rows that a GPU produced, never by hand.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "measured"


def order(op: str, device: torch.device, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The backends that were measured for such a call, the fastest first; () where nothing was measured."""
    for entry in _table(_gpu(device)).get(op, ()):
        if all(facts.get(fact) == value for fact, value in entry["where"].items()):
            return tuple(entry["order"])
    return ()


@functools.cache
def _gpu(device: torch.device) -> str:
    return slug(torch.cuda.get_device_name(device)) if device.type == "cuda" and torch.cuda.is_available() else ""


def slug(name: str) -> str:
    """A GPU's name as the name of its file: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _table(gpu: str) -> dict[str, list[dict[str, Any]]]:
    path = FOLDER / f"{gpu}.json"
    return json.loads(path.read_text()) if gpu and path.is_file() else {}
