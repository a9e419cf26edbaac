"""From a picture file to what an image tokenizer takes, and back: uint8 [H,W,3] <-> float32 [3,H,W] in [-1,1]."""

from __future__ import annotations

import io
import os

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

MAX_RATIO = 100  # of the sides of a picture

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def load_image(source: str | os.PathLike | bytes, name: str = "") -> Image.Image:
    """The whole picture of a file (or its bytes) as RGB: alpha is dropped, not blended; grey is repeated; no EXIF
    rotation.

    Colours of 16 bits lose the lower 8. ValueError names the file (or `name`) when it is missing, empty, truncated,
    broken, grey of more than 8 bits (which PIL would clip to white), or more than MAX_RATIO times as long as wide.
    """
    name = name or ("bytes" if isinstance(source, bytes) else str(source))
    try:
        if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if max(image.size) > MAX_RATIO * min(image.size):  # brought to size it would be larger still
                raise ValueError(f"{image.width} x {image.height} pixels, expected sides of at most {MAX_RATIO} : 1")
            if image.mode.startswith(("I", "F")):  # PIL would clip these to white
                raise ValueError(f"pixel mode {image.mode}, expected 8 bits per channel")
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{name}: no such image file") from None
    except UnidentifiedImageError as error:  # its text may hold an address, and no two runs would report the same
        raise ValueError(f"{name}: cannot read the image: cannot identify its format") from error
    except Exception as error:  # each of PIL's decoders raises what it likes on broken bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: cannot read the image: {reason}") from error


def center_crop_resize(image: Image.Image, resolution: int, filter: str = "bicubic") -> np.ndarray:
    """uint8 [resolution, resolution, 3]: the shorter side is brought to `resolution`, then the middle is cut out.

    Larger pictures are reduced with Lanczos; `filter` (nearest, bicubic, lanczos) enlarges smaller ones;
    pictures whose shorter side already fits keep their pixels.
    """
    if filter not in FILTERS:
        raise ValueError(f"resize filter {filter!r}; expected one of {', '.join(FILTERS)}")
    image = image.convert("RGB")
    shorter = min(image.size)
    if shorter != resolution:
        size = tuple(resolution if side == shorter else resolution * side // shorter for side in image.size)
        image = image.resize(size, FILTERS[filter] if shorter < resolution else Image.Resampling.LANCZOS)
    return _middle(image, resolution)


def adm_center_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """uint8 [resolution, resolution, 3], as ADM, LlamaGen and SimpleAR prepare pictures.

    Halved by averaging while the shorter side is at least twice `resolution`, brought to it with bicubic (the longer
    side is rounded, not cut), then the middle is cut out. Every picture is resampled, also one that fits already.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _middle(image, resolution)


def square(image: Image.Image, resolution: int, crop: str = "center", filter: str = "bicubic") -> np.ndarray:
    """uint8 [resolution, resolution, 3] by the key `input.crop`: center (which reads `filter`) or adm."""
    if crop == "center":
        return center_crop_resize(image, resolution, filter)
    if crop == "adm":
        return adm_center_crop(image, resolution)
    raise ValueError(f"crop {crop!r}; expected one of center, adm")


def _middle(image: Image.Image, resolution: int) -> np.ndarray:
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return np.array(image.crop((left, top, left + resolution, top + resolution)))


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}; expected uint8 [..., H, W, 3]")
    channels_first = np.ascontiguousarray(np.moveaxis(pixels, -1, -3))
    return torch.from_numpy(channels_first).float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3]; values outside are clipped."""
    levels = ((images.detach().float() + 1.0) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()
