"""Text to image around the engine: captions -> prompts, sampled codes -> pictures. Shared by command and training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vtrain.text import TextTokenizer
from vtrain.visual import ImageTokenizer
from vtrain.visual.preprocess import to_uint8
from vtrain.vocab import Vocabulary

TEXT_TO_IMAGE, START_OF_IMAGE = "<|t2i|>", "<|soi|>"


def text_to_image_prompts(
    captions: Sequence[str], tokenizer: TextTokenizer, vocab: Vocabulary, negative: str = ""
) -> tuple[list[list[int]], list[int]]:
    """Global ids of `<|t2i|> caption <|soi|>` per caption, and of the prompt that guidance leads away from.

    That is `<|t2i|> negative <|soi|>`; empty, it is what training shows in place of a dropped caption. ValueError if
    the vocabulary has no text, or the tokenizer not both specials.
    """
    try:
        base = vocab["text"].base
        start, image = (base + tokenizer.special_id(name) for name in (TEXT_TO_IMAGE, START_OF_IMAGE))
    except KeyError as error:
        raise ValueError(f"text to image: {error.args[0]}") from None
    *prompts, away = ([start, *(base + i for i in tokenizer.encode(text)), image] for text in (*captions, negative))
    return prompts, away


@torch.no_grad()
def decode_pictures(
    ids: torch.Tensor, tokenizer: ImageTokenizer, vocab: Vocabulary, *, grid: tuple[int, int], batch_size: int = 64
) -> np.ndarray:
    """Pictures uint8[N, H, W, 3] from sampled global ids int64[N, h*w] of the visual range, raster order.

    grid: (h, w) in codes. ValueError if an id is no code of the tokenizer.
    """
    codes = ids - vocab["visual"].base
    return np.concatenate([to_uint8(tokenizer.decode(part)) for part in codes.view(-1, *grid).split(batch_size)])
