"""Style openers before captions ("A photo of "): their ids, and that they join the stored captions as text would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vtrain.data.reader import Dataset
from vtrain.text import TextTokenizer, load_text_tokenizer

PROBES = ("a cat", "Two red cars, parked.", "3 dogs", '"quoted" (twice)', "\u00e9t\u00e9 \u732b")


def encode_prefixes(prefixes: Sequence[str], folders: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    """Global ids of each prefix, without a space at its end: the captions of the datasets in `folders` bring that.

    ValueError where a dataset has no text tokenizer or another one than the first, and where prefix and captions, as
    they are stored there, are not what the tokenizer makes of the joined text.
    """
    if not prefixes or not folders:
        return ()
    datasets = [Dataset(folder) for folder in folders]
    for dataset in datasets:
        if not (dataset.path / "text_tokenizer").is_dir():
            raise ValueError(f"data.prefixes: {dataset.path} has no text_tokenizer to encode them with")
        if dataset.schema.text_tokenizer != datasets[0].schema.text_tokenizer:
            raise ValueError(
                f"data.prefixes: {dataset.path} has the text tokenizer {dataset.schema.text_tokenizer or 'none'}; "
                f"expected that of {datasets[0].path}, {datasets[0].schema.text_tokenizer or 'none'}"
            )
    tokenizer = load_text_tokenizer(datasets[0].path / "text_tokenizer")
    bare = [prefix.removesuffix(" ") for prefix in prefixes]
    for dataset in datasets:
        spaced = bool(dataset.schema.text.get("caption_space"))
        for prefix in bare:
            _check_join(tokenizer, prefix, spaced, dataset.path)
    base = datasets[0].schema.vocab["text"].base
    return tuple(tuple(base + token for token in tokenizer.encode(prefix)) for prefix in bare)


def _check_join(tokenizer: TextTokenizer, prefix: str, spaced: bool, folder: Path) -> None:
    bad = _first_apart(tokenizer, prefix, spaced)
    if bad is None:
        return
    if _first_apart(tokenizer, prefix, not spaced) is None:
        remedy = f"expected a dataset made with extract.caption_space = {str(not spaced).lower()}"
    else:
        remedy = "expected a prefix and captions that it cuts at the space"
    raise ValueError(
        f"data.prefixes: {prefix!r} before the caption {bad!r}, as {folder} has it with extract.caption_space = "
        f"{str(spaced).lower()}, has other ids than the text tokenizer gives the joined text; {remedy}"
    )


def _first_apart(tokenizer: TextTokenizer, prefix: str, spaced: bool) -> str | None:
    """The first probe whose ids after a prefix are not those of the two joined by a space; None = all are.

    spaced: captions are encoded with a space before them.
    """
    first = tokenizer.encode(prefix)
    for probe in PROBES if prefix else ():
        if first + tokenizer.encode(f" {probe}" if spaced else probe) != tokenizer.encode(f"{prefix} {probe}"):
            return probe
    return None
