"""The smoke set of docs/simplear.md: crops of 14 real photographs and scanned digits with captions, all from installed
packages, and the score of pictures drawn after training.

python scripts/photographs.py export DATA            # PNGs, train.json, valid.json, prompts.txt
python scripts/photographs.py score DATA SAMPLES...  # how many drawn pictures show what their prompts say
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32  # pixels of a crop, the larger of the two resolutions
SCALES = (1.0, 0.75, 0.6)  # sides of crops, as shares of the photograph's shorter side
STRIDE = 1 / 8  # of a crop's side: neighbours are a whole code of the larger resolution apart, and so share codes
REACH = 2  # strides from the photograph's middle, at most
SCANS = 50  # of a digit
HELD_OUT = 10  # every so many crops or scans, one

# Package, file, and captions whose first sentence stands for the whole where a short one is wanted.
PHOTOGRAPHS = {
    "astronaut": (
        "skimage", "data/astronaut.png",
        "an astronaut in an orange suit. She smiles in front of a flag and a model of the shuttle.",
        "a smiling woman in a space suit. The suit is orange, and a helmet lies beside her.",
    ),
    "cameraman": (
        "skimage", "data/camera.png",
        "a man with a camera on a tripod. He wears a dark coat and stands on a meadow.",
        "a black and white picture of a cameraman. Towers rise far behind him.",
    ),
    "cat": (
        "skimage", "data/chelsea.png",
        "a tabby cat. Its green eyes look past us, and its nose is pink.",
        "the face of a ginger cat. The fur has dark stripes.",
    ),
    "temple": (
        "sklearn", "datasets/images/china.jpg",
        "a Chinese temple above a lake. Trees stand all around its four roofs.",
        "a pagoda in front of a pale sky. The roofs are curved, and the walls are red.",
    ),
    "coffee": (
        "skimage", "data/coffee.png",
        "a cup of coffee on a red saucer. A spoon lies beside it on a wooden table.",
        "an espresso in a white and red cup. The table is made of brown planks.",
    ),
    "coins": (
        "skimage", "data/coins.png",
        "rows of old coins. They are grey and lie on dark cloth.",
        "ancient Greek coins from Pompeii. Four rows of them lie in a tray.",
    ),
    "flower": (
        "sklearn", "datasets/images/flower.jpg",
        "an orange dahlia. The leaves behind it are dark and out of focus.",
        "a round flower with many petals. It glows orange before a dark green garden.",
    ),
    "galaxies": (
        "skimage", "data/hubble_deep_field.jpg",
        "galaxies in deep space. Hundreds of small lights fill a black sky.",
        "a field of far stars. The Hubble telescope looked at it for days.",
    ),
    "tissue": (
        "skimage", "data/ihc.png",
        "stained tissue under a microscope. Brown glands lie in pale blue cells.",
        "a section of a gland. The stain is brown, and the nuclei are blue.",
    ),
    "moon": (
        "skimage", "data/moon.png",
        "the surface of the moon. Small craters lie in a grey plain.",
        "craters on the moon. The light falls from one side, and the ground is grey.",
    ),
    "motorcycle": (
        "skimage", "data/motorcycle_left.png",
        "a red motorcycle in a garage. Shelves and boxes fill the wall behind it.",
        "a motorbike with a red tank. It stands between crates in a workshop.",
    ),
    "page": (
        "skimage", "data/page.png",
        "a page of printed text. The paper is grey, and its corner lies in shadow.",
        "black letters on paper. The page is lit from one side.",
    ),
    "retina": (
        "skimage", "data/retina.jpg",
        "the retina of an eye. Fine red vessels leave a bright yellow spot.",
        "the inside of an eye as a doctor sees it. The round picture is red.",
    ),
    "rocket": (
        "skimage", "data/rocket.jpg",
        "a rocket on its launch pad. Lamps shine at dusk, and the sky is dark blue.",
        "a white rocket at night. Two towers hold the lightning rods beside it.",
    ),
}  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_CAPTIONS = (
    "a handwritten {}. The digit is white on black.",
    "the digit {}. Somebody wrote it by hand, and it was scanned.",
)


def export(out: Path) -> None:
    """Write the pictures, SimpleAR's lists of {image_path, caption}, and a prompt for every subject."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    lists: dict[str, list[dict]] = {"train": [], "valid": []}
    for subject, captions, pictures in (*_photographs(), *_digits()):
        for number, picture in enumerate(pictures):
            name = f"images/{subject}-{number:03d}.png"
            picture.save(out / name)
            entry = {"image_path": name, "caption": captions[number % len(captions)]}
            lists["valid" if number % HELD_OUT == HELD_OUT - 1 else "train"].append(entry)
    for name, entries in lists.items():
        (out / f"{name}.json").write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    prompts = [captions[0] for captions in _captions().values()]
    (out / "prompts.txt").write_text("\n".join(prompts) + "\n")
    counts = ", ".join(f"{len(entries)} in {name}.json" for name, entries in lists.items())
    print(f"{out}: {SIDE}x{SIDE} pictures of {len(prompts)} subjects, {counts}")


def _captions() -> dict[str, Sequence[str]]:
    """{subject: its captions}."""
    digits = {word: [caption.format(word) for caption in DIGIT_CAPTIONS] for word in DIGITS}
    return {subject: entry[2:] for subject, entry in PHOTOGRAPHS.items()} | digits


def _photographs() -> Iterator[tuple[str, Sequence[str], Iterator[Image.Image]]]:
    """(subject, captions, pictures) of every photograph."""
    for subject, (package, file, *captions) in PHOTOGRAPHS.items():
        photograph = Image.open(_package_folder(package) / file).convert("RGB")
        yield subject, captions, _crops(photograph)


def _package_folder(package: str) -> Path:
    """Where a package is installed, found without importing it."""
    spec = find_spec(package)
    if spec is None:
        raise SystemExit(f"error: the package {package} is not installed; expected the extra vtrain[quickstart]")
    return Path(spec.origin).parent


def _crops(photograph: Image.Image) -> Iterator[Image.Image]:
    """Overlapping squares on a lattice around the photograph's middle, at every scale."""
    for scale in SCALES:
        side = scale * min(photograph.size)
        columns, rows = (_offsets(length, side) for length in photograph.size)
        for top, left in itertools.product(rows, columns):
            box = (left, top, left + side, top + side)
            yield photograph.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)


def _offsets(length: int, side: float) -> list[float]:
    """Where crops of `side` pixels begin along an edge of `length` pixels."""
    middle, stride = (length - side) / 2, side * STRIDE
    steps = min(REACH, int(middle / stride))
    return [middle + step * stride for step in range(-steps, steps + 1)]


def _digits() -> Iterator[tuple[str, Sequence[str], Iterator[Image.Image]]]:
    """(subject, captions, pictures) of every digit: scans of 8x8 pixels, enlarged."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    pixels = np.round(scans.images * (255 / 16)).astype(np.uint8)
    for digit, word in enumerate(DIGITS):
        pictures = (Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
                    for p in pixels[scans.target == digit][:SCANS])  # fmt: skip
        yield word, _captions()[word], pictures


def score(data: Path, samples: Path) -> float:
    """The share of pictures in a folder of vtrain.sample whose nearest training crop shows what the prompt says.

    Nearest is by the squared difference of all pixels, at the resolution of the drawn pictures.
    """
    subjects = {caption: subject for subject, captions in _captions().items() for caption in captions}
    drawn = [(subjects[prompt], path) for prompt, path in _drawn(samples, subjects)]
    size = Image.open(drawn[0][1]).size
    entries = json.loads((data / "train.json").read_text())
    crops = np.stack([_read(data / entry["image_path"], size) for entry in entries])
    pictures = np.stack([_read(path, size) for _, path in drawn])
    distances = np.square(crops).sum(axis=1) - 2 * pictures @ crops.T  # up to the norm of the picture
    shown = [subjects[entries[n]["caption"]] for n in distances.argmin(axis=1)]
    _print_subjects([subject for subject, _ in drawn], shown)
    share = float(np.mean([subject == found for (subject, _), found in zip(drawn, shown)]))
    print(f"score: {share:.3f} of {len(drawn)} pictures of {size[0]}x{size[1]} have their nearest training crop "
          f"under the prompt's subject ({samples})")  # fmt: skip
    return share


def _drawn(samples: Path, known: Container[str]) -> list[tuple[str, Path]]:
    """(prompt, picture) of everything in a folder of vtrain.sample."""
    found = []
    for file in sorted(samples.glob("*/metadata.jsonl")):
        prompt = json.loads(file.read_text().splitlines()[0])["prompt"]
        if prompt not in known:
            raise SystemExit(f"error: {file}: the prompt is {prompt!r}; expected a caption of the smoke set")
        found += [(prompt, path) for path in sorted((file.parent / "samples").glob("*.png"))]
    if not found:
        raise SystemExit(f"error: {samples}: no sampled pictures (NNNNN/metadata.jsonl and NNNNN/samples/*.png)")
    return found


def _print_subjects(asked: Sequence[str], shown: Sequence[str]) -> None:
    """A line per subject: how many pictures show it, and what the others show."""
    by_subject = defaultdict(Counter)
    for subject, found in zip(asked, shown):
        by_subject[subject][found] += 1
    for subject, counts in by_subject.items():
        others = ", ".join(f"{count} {name}" for name, count in counts.most_common() if name != subject)
        print(f"{subject}: {counts[subject]} of {counts.total()}" + (f" (others: {others})" if others else ""))


def _read(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A picture brought to `size`, as float32[h * w * 3] of 0..1."""
    picture = Image.open(path).convert("RGB")
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32).reshape(-1) / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("export").add_argument("out", type=Path)
    scoring = commands.add_parser("score")
    scoring.add_argument("data", type=Path, help="what export has written")
    scoring.add_argument("samples", type=Path, nargs="+", help="folders of vtrain.sample")
    scoring.add_argument("--require", type=float, default=0.0, help="exit with 1 where a folder is below this share")
    arguments = parser.parse_args()
    if arguments.command == "export":
        export(arguments.out)
    elif min([score(arguments.data, folder) for folder in arguments.samples]) < arguments.require:
        sys.exit(1)


if __name__ == "__main__":
    main()
