"""Train a SentencePiece text tokenizer on captions.

    python -m vtrain.text_tokenizer --cfg quickstart/text

Writes run.out/tokenizer.model, which vtrain.extract takes as tokenizer.text. A tokenizer that a language model brings
along (Llama's rank file, Qwen's tokenizer.json) is used as it is: this command is for models trained from scratch.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from vtrain.config import run_command
from vtrain.data.sources import Skipped, Source, open_source
from vtrain.settings import TextTokenizerSettings
from vtrain.text import load_text_tokenizer, train_sentencepiece

UNIT_RECORDS = 16384  # read in one go; nothing depends on it


def main(settings: TextTokenizerSettings, dry_run: bool = False) -> None:
    source, out = open_source(**settings.input.options()), Path(settings.run.out)
    captions, skipped = _captions(source)
    print(f"{source.describe()}: {len(captions)} captions, {len(set(captions))} different", flush=True)
    if skipped:
        print(f"{len(skipped)} records skipped, the first: {skipped[0].name}: {skipped[0].reason}", flush=True)
    if not captions:
        raise ValueError(f"{source.describe()}: no captions; expected texts to learn from")
    if dry_run:
        return
    train_sentencepiece(captions, settings.tokenizer.vocab_size, out / "tokenizer.model")
    tokenizer = load_text_tokenizer(out)
    tokens = sum(len(tokenizer.encode(caption)) for caption in captions)
    print(f"{out}: {tokenizer.vocab_size} ids with bytes and specials, {tokens / len(captions):.1f} tokens a caption")


def _captions(source: Source) -> tuple[list[str], list[Skipped]]:
    """All captions of a source, and the records that cannot be read."""
    captions: list[str] = []
    skipped: list[Skipped] = []
    records = (record for unit in source.units(UNIT_RECORDS) for record in source.read(unit, pictures=False))
    for record in tqdm(
        records, total=source.total(), unit="record", desc="reading captions", leave=False, disable=None
    ):
        if isinstance(record, Skipped):
            skipped.append(record)
        else:
            captions += record.captions
    return captions, skipped


if __name__ == "__main__":
    run_command(TextTokenizerSettings, main)
