"""The quickstart's commands, from real scanned digits to recognised samples, with the shipped recipes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def steps_of_script() -> list[str]:
    """The commands of scripts/quickstart.sh in order, so that the test cannot drift away from it."""
    text = (ROOT / "scripts" / "quickstart.sh").read_text().replace("$runs", "runs/quickstart")
    commands = []
    for line in text.splitlines():
        found = re.search(r"(?:^|\|\| )(run|python) (.+)$", line)
        if found and not line.startswith("run()"):
            commands.append(found[2] if found[1] == "python" else f"-m {found[2]}")
    return commands


def call(command: str, cwd: Path) -> str:
    words = command.replace("scripts/digits.py", str(ROOT / "scripts" / "digits.py")).split()
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=900, env=ENV)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_quickstart_reaches_its_score_and_reuses_its_work(tmp_path):
    commands = steps_of_script()
    assert [c.split()[1] for c in commands if c.startswith("-m")] == [
        "vtrain.text_tokenizer",
        "vtrain.autoencoder",
        "vtrain.extract",
        "vtrain.extract",
        "vtrain.shards",
        "vtrain.pretrain",
        "vtrain.sample",
    ]
    printed = [call(command, tmp_path) for command in commands]
    call(f"scripts/digits.py score {tmp_path}/runs/quickstart/samples --require 0.9 --distinct 15", tmp_path)
    assert re.search(r"score: 0\.9\d\d of 200|score: 1\.000 of 200", printed[-1])

    runs = tmp_path / "runs" / "quickstart"
    for folder in (runs / "samples").glob("0*"):
        assert "handwritten" in json.loads((folder / "metadata.jsonl").read_text())["prompt"]
        assert len(list((folder / "samples").glob("*.png"))) == 20
    for picture in ("samples/grid.png", "ar/loss.png", "vq/reconstructions.png"):
        assert min(Image.open(runs / picture).size) > 100

    again = [call(command, tmp_path) for command in commands if "vtrain." in command and "sample" not in command]
    assert "already trained" in again[1]
    assert "already trained" in again[-1]

    for command in (
        f"-m vtrain.shards inspect {runs}/shards/train --out {tmp_path}/sheet.png",
        "-m vtrain.shards inspect --composed quickstart/ar",
    ):
        shown = call(command, tmp_path)
        assert "handwritten" in shown
    assert min(Image.open(tmp_path / "sheet.png").size) > 300
