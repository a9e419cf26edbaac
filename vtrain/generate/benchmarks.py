"""Which picture files a run of the sample command has, and how they are written: plain and GenEval trees, DPG-Bench.

""         {i:05d}/samples/{k:05d}.png and {i:05d}/metadata.jsonl, for prompt i and its sample k
"geneval"  the same, which is what GenEval's evaluate_images.py reads
"dpg"      images/{name}.jpg with four samples as 2 x 2, which is what DPG-Bench's compute_dpg_bench.py cuts apart; they
           have a folder of their own, because it takes every file beside them for a picture
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vtrain.files import write_whole
from vtrain.visual.preprocess import load_image
from vtrain.visual.sheets import write_png

BENCHES = ("geneval", "dpg")
_DPG_SIDE = 2  # samples along a side of its pictures
_JPEG = {"quality": 95, "subsampling": 0}  # full colour resolution: a scorer is to judge the model, not the file


@dataclass(frozen=True)
class Sheet:
    """One picture file: its path under run.out, and the samples (prompt number, sample number) in it, row by row."""

    path: str
    samples: tuple[tuple[int, int], ...]

    @property
    def side(self) -> int:
        """Samples along a side."""
        return round(len(self.samples) ** 0.5)


def layout(bench: str, entries: Sequence[dict], per_prompt: int) -> list[Sheet]:
    """All picture files, by prompt and sample. entries: as `prompts.read_prompts(..., bench)` gives them."""
    if bench != "dpg":
        return [
            Sheet(f"{_folder(i)}/samples/{k:05d}.png", ((i, k),))
            for i in range(len(entries))
            for k in range(per_prompt)
        ]
    if per_prompt != _DPG_SIDE**2:
        raise ValueError(f"sample.per_prompt is {per_prompt}; expected {_DPG_SIDE**2}, which --bench dpg puts as 2 x 2")
    return [
        Sheet(f"images/{entry['name']}.jpg", tuple((i, k) for k in range(per_prompt)))
        for i, entry in enumerate(entries)
    ]


def metadata(bench: str, entries: Sequence[dict]) -> dict[str, str]:
    """What is written beside the pictures: {path under run.out: text}."""
    if bench == "dpg":
        return {}
    return {
        f"{_folder(i)}/metadata.jsonl": json.dumps(entry, ensure_ascii=False) + "\n" for i, entry in enumerate(entries)
    }


def write_sheet(path: Path, pictures: np.ndarray, side: int) -> None:
    """Write uint8[side*side, H, W, 3] as one picture, row by row and without gaps, whole or not at all."""
    _, height, width, channels = pictures.shape
    rows = pictures.reshape(side, side, height, width, channels).transpose(0, 2, 1, 3, 4)
    image = Image.fromarray(rows.reshape(side * height, side * width, channels))
    if path.suffix == ".png":
        write_png(path, image)
    else:
        data = io.BytesIO()
        image.save(data, format="jpeg", **_JPEG)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data.getvalue())


def is_whole(path: Path, size: tuple[int, int]) -> bool:
    """Whether a picture is there, can be read to its end, and is of `size` (width, height)."""
    if not path.is_file():
        return False
    try:
        return load_image(path).size == size
    except ValueError:
        return False


def _folder(prompt: int) -> str:
    return f"{prompt:05d}"
