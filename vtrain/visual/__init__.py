"""Pictures: preprocessing, image autoencoders and the image tokenizers made of them."""

from vtrain.visual.tokenizer import ImageTokenizer, load_image_tokenizer

__all__ = ["ImageTokenizer", "load_image_tokenizer"]
