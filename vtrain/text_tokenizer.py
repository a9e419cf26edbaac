"""Train a SentencePiece text tokenizer on captions.

    python -m vtrain.text_tokenizer --cfg quickstart/text

Writes run.out/tokenizer.model, which vtrain.extract takes as tokenizer.text. A tokenizer that a language model brings
along (Llama's rank file, Qwen's tokenizer.json) is used as it is: this command is for models trained from scratch.
"""

from __future__ import annotations

from pathlib import Path

from vtrain.config import run_command
from vtrain.data.sources.image_folder import ImageFolder
from vtrain.settings import TextTokenizerSettings
from vtrain.text import load_text_tokenizer, train_sentencepiece


def main(settings: TextTokenizerSettings, dry_run: bool = False) -> None:
    source, out = settings.input, Path(settings.run.out)
    records = ImageFolder(source.images, source.captions)
    captions = [caption for record in records for caption in record.captions]
    print(f"{source.captions}: {len(captions)} captions, {len(set(captions))} different", flush=True)
    if dry_run:
        return
    train_sentencepiece(captions, settings.tokenizer.vocab_size, out / "tokenizer.model")
    tokenizer = load_text_tokenizer(out)
    tokens = sum(len(tokenizer.encode(caption)) for caption in captions)
    print(f"{out}: {tokenizer.vocab_size} ids with bytes and specials, {tokens / len(captions):.1f} tokens a caption")


if __name__ == "__main__":
    run_command(TextTokenizerSettings, main)
