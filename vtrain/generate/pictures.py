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
    captions: Sequence[str],
    tokenizer: TextTokenizer,
    vocab: Vocabulary,
    negative: str = "",
    *,
    openers: Sequence[str] | None = None,
    caption_space: bool = False,
) -> tuple[list[list[int]], list[int]]:
    """Global ids of `<|t2i|> opener caption <|soi|>` per caption, and of the prompt that guidance leads away from.

    That is `<|t2i|> negative <|soi|>`; empty, it is what training shows in place of a dropped caption. openers: one per
    caption, "" for none (default: none at all); a space joins them, whether the opener ends with one or not.

    The ids are those of a training document with this opener and caption. For that caption_space has to be what the
    dataset's schema has in `text` (extract.caption_space): if so, its captions begin with a space, and so do here a
    caption without opener and `negative`. So an opener that was trained (data.prefixes) is to be given as an opener:
    written into the caption, it would get the space. ValueError if the vocabulary has no text, or the tokenizer not
    both specials.
    """
    try:
        base = vocab["text"].base
        start, image = (base + tokenizer.special_id(name) for name in (TEXT_TO_IMAGE, START_OF_IMAGE))
    except KeyError as error:
        raise ValueError(f"text to image: {error.args[0]}") from None
    texts = [_joined(*pair, caption_space) for pair in zip(openers or [""] * len(captions), captions, strict=True)]
    texts.append(_joined("", negative, caption_space))
    *prompts, away = ([start, *(base + i for i in tokenizer.encode(text)), image] for text in texts)
    return prompts, away


def _joined(opener: str, caption: str, caption_space: bool) -> str:
    opener = opener.removesuffix(" ")
    return f"{opener} {caption}" if caption and (opener or caption_space) else opener + caption


@torch.no_grad()
def decode_pictures(
    ids: torch.Tensor, tokenizer: ImageTokenizer, vocab: Vocabulary, *, grid: tuple[int, int], batch_size: int = 64
) -> np.ndarray:
    """Pictures uint8[N, H, W, 3] from sampled global ids int64[N, h*w] of the visual range, raster order.

    grid: (h, w) in codes. ValueError if an id is no code of the tokenizer.
    """
    codes = ids - vocab["visual"].base
    return np.concatenate([to_uint8(tokenizer.decode(part)) for part in codes.view(-1, *grid).split(batch_size)])
