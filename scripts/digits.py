"""scikit-learn's 1,797 scanned digits as the quickstart's pictures, and the score of pictures drawn after training.

python scripts/digits.py export runs/quickstart/data     # PNGs, train.jsonl, valid.jsonl, prompts.txt
python scripts/digits.py score runs/quickstart/samples   # how many drawn digits a classifier of real ones recognises
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {}", "the digit {}", "a scan of the number {}")
HELD_OUT = 397  # the last ones, by other writers than the first 1,400


def export(out: Path) -> None:
    """Write every picture as an 8x8 grey PNG, two caption files, and one prompt per digit."""
    digits = load_digits()
    pictures = np.round(digits.images * (255 / 16)).astype(np.uint8)
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for n, (pixels, digit) in enumerate(zip(pictures, digits.target)):
        name = f"images/{n:04d}.png"
        Image.fromarray(pixels).save(out / name)
        captions = [template.format(WORDS[digit]) for template in CAPTIONS]
        lines.append(json.dumps({"image": name, "caption": captions}) + "\n")
    (out / "train.jsonl").write_text("".join(lines[:-HELD_OUT]))
    (out / "valid.jsonl").write_text("".join(lines[-HELD_OUT:]))
    (out / "prompts.txt").write_text("".join(CAPTIONS[0].format(word) + "\n" for word in WORDS))
    print(f"{out}: {len(lines)} digits, the last {HELD_OUT} held out")


def score(samples: Path, required: float, distinct_required: int) -> bool:
    """Print the share of recognised pictures and, per digit, how many differ pairwise; whether both suffice."""
    digits = load_digits()
    train, held_out = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    classifier = SVC(gamma=0.001).fit(digits.data[train], digits.target[train])
    real = classifier.score(digits.data[held_out], digits.target[held_out])
    right = total = 0
    fewest = None
    for folder in sorted(p for p in samples.iterdir() if (p / "metadata.jsonl").is_file()):
        prompt = json.loads((folder / "metadata.jsonl").read_text().splitlines()[0])["prompt"]
        (digit,) = (n for n, word in enumerate(WORDS) if word in prompt.split())
        pictures = [_read(path) for path in sorted((folder / "samples").glob("*.png"))]
        found = classifier.predict(np.stack(pictures))
        distinct = len({p.tobytes() for p in pictures})
        print(f"{prompt!r}: {np.sum(found == digit)} of {len(pictures)} recognised, {distinct} distinct")
        right, total = right + int(np.sum(found == digit)), total + len(pictures)
        fewest = distinct if fewest is None else min(fewest, distinct)
    if not total:
        raise SystemExit(f"error: {samples}: no sampled pictures (NNNNN/metadata.jsonl and NNNNN/samples/*.png)")
    print(
        f"score: {right / total:.3f} of {total} drawn digits recognised (real held-out digits: {real:.3f}), "
        f"at least {fewest} distinct pictures per digit"
    )
    return right / total >= required and fewest >= distinct_required


def _read(path: Path) -> np.ndarray:
    """A picture in the classifier's form: float[64], 8x8 pixels of 0..16."""
    grey = Image.open(path).convert("L")
    if grey.size != (8, 8):
        grey = grey.resize((8, 8), Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.float64).reshape(-1) * (16 / 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("export").add_argument("out", type=Path)
    scoring = commands.add_parser("score")
    scoring.add_argument("samples", type=Path)
    scoring.add_argument("--require", type=float, default=0.0, help="exit with 1 below this share")
    scoring.add_argument("--distinct", type=int, default=0, help="exit with 1 below so many distinct pictures a digit")
    arguments = parser.parse_args()
    if arguments.command == "export":
        export(arguments.out)
    elif not score(arguments.samples, arguments.require, arguments.distinct):
        sys.exit(1)


if __name__ == "__main__":
    main()
