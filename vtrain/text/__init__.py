"""Text tokenizers behind one face: SentencePiece, tiktoken rank files, byte-level BPE as Hugging Face ships it."""

from vtrain.text.spm import train_sentencepiece
from vtrain.text.tokenizer import DEFAULT_SPECIALS, TextTokenizer, load_text_tokenizer

__all__ = ["DEFAULT_SPECIALS", "TextTokenizer", "load_text_tokenizer", "train_sentencepiece"]
