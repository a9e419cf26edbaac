"""Image tokenizers as the commands use them: pixels in, codes out.

A folder of config.json and model.safetensors, which `save` writes; or one that holds NVIDIA's Cosmos-Tokenizer
DV8x16x16 or DI16x16 as it is published: encoder.jit and decoder.jit (or both as .safetensors).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch

from vtrain.files import write_durably
from vtrain.visual.cosmos import CosmosConfig, CosmosVideo
from vtrain.visual.cosmos_fold import CosmosImages
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig
from vtrain.visual.weights import build_cosmos, find_halves, read_halves, read_tensors, without_constants

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
AUTOENCODER, COSMOS = "autoencoder", "cosmos"  # "type" in config.json
COSMOS_KEYS = ("variant", "resolution")  # of config.json; the widths are those of the tensors


class ImageTokenizer:
    """A frozen network in evaluation mode. `ImageTokenizer(model)` shares the model's weights.

    tensors: what `save` writes where the model computes in other numbers (another dtype, folded); None = its own.
    """

    def __init__(self, model: Autoencoder | CosmosVideo | CosmosImages, tensors: dict[str, torch.Tensor] | None = None):
        self.model = model.eval().requires_grad_(False)
        self._tensors = tensors

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that it was made for; it takes others, too."""
        return self.model.config.resolution

    @property
    def num_codes(self) -> int:
        return self.model.config.num_codes

    @property
    def downscale(self) -> int:
        """Pixels along one side of a code."""
        return self.model.config.downscale

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def _first(self) -> torch.Tensor:
        return next(self.model.parameters())

    @cached_property
    def sha256(self) -> str:
        """Of the two files as `save` writes them, config first; device, dtype and folding are no part of it."""
        return hashlib.sha256(_config_bytes(self.model.config) + _weights_bytes(self._saved())).hexdigest()

    def to(self, device: torch.device | str) -> ImageTokenizer:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images float [B,3,H,W] in [-1,1] -> ids int64 [B,h,w] in 0..num_codes-1, on the model's device.

        ValueError when H or W is not a multiple of `downscale`.
        """
        channels = self.model.config.in_channels
        if (
            images.ndim != 4
            or images.shape[1] != channels
            or any(side == 0 or side % self.downscale for side in images.shape[2:])
        ):
            raise ValueError(
                f"images have shape {list(images.shape)}; expected [B, {channels}, H, W] "
                f"with H and W multiples of {self.downscale}"
            )
        return self.model.encode(images.to(self.device, self._first.dtype)).long()

    @torch.no_grad()
    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int [B,h,w] -> images float32 [B,3,H,W] in [-1,1]. ValueError names an id outside 0..num_codes-1."""
        if ids.ndim != 3:
            raise ValueError(f"codes have shape {list(ids.shape)}; expected [B, h, w]")
        outside = ids[(ids < 0) | (ids >= self.num_codes)]
        if len(outside):
            raise ValueError(f"code {int(outside[0])} is outside the codebook 0..{self.num_codes - 1}")
        return self.model.decode(ids.to(self.device)).float().clamp(-1.0, 1.0)

    def save(self, folder: str | os.PathLike) -> None:
        save_image_tokenizer(folder, self.model.config, self._saved())

    def _saved(self) -> dict[str, torch.Tensor]:
        return self.model.weights() if self._tensors is None else self._tensors


def save_image_tokenizer(
    folder: str | os.PathLike, config: AutoencoderConfig | CosmosConfig, tensors: dict[str, torch.Tensor]
) -> None:
    """Write config.json and model.safetensors (`Autoencoder.weights`, or those published), each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / WEIGHTS_FILE, _weights_bytes(tensors))
    write_durably(folder / CONFIG_FILE, _config_bytes(config))


def load_image_tokenizer(
    folder: str | os.PathLike,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    fold: bool = True,
) -> ImageTokenizer:
    """Read a folder that `save` wrote, or one of NVIDIA's. ValueError names the file; it lists all wrong tensors.

    dtype: what is computed in; codes are rounded or looked up in float32 all the same. fold: a video tokenizer
    (DV8x16x16) becomes the plain network that it is for single images, which is exact and less work.
    """
    folder = Path(folder)
    if halves := find_halves(folder):
        tensors = read_halves(halves)
        model = build_cosmos(tensors, str(folder), dtype=dtype, folded=fold)
        return ImageTokenizer(model, tensors).to(device)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name}: no such file; an image tokenizer is {CONFIG_FILE} and {WEIGHTS_FILE}, "
                "or Cosmos' encoder.jit and decoder.jit"
            )
    config = read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    tensors = read_tensors(weights)
    if isinstance(config, CosmosConfig):
        tensors = without_constants(tensors, str(weights))
        stated = {key: getattr(config, key) for key in COSMOS_KEYS}
        model = build_cosmos(tensors, str(weights), **stated, dtype=dtype, folded=fold)
        return ImageTokenizer(model, tensors).to(device)
    with torch.random.fork_rng(devices=()):  # weights about to be overwritten must not use up the caller's draws
        model = Autoencoder(config)
    model.load_weights(tensors, origin=str(weights))
    if dtype == torch.float32:
        return ImageTokenizer(model).to(device)
    for part in (model.encoder, model.quant_conv, model.post_quant_conv, model.decoder):
        part.to(dtype)
    return ImageTokenizer(model, tensors).to(device)


def read_config(path: str | os.PathLike) -> AutoencoderConfig | CosmosConfig:
    """ValueError names the file and the key."""
    try:
        values = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    kind = values.pop("type", None) if isinstance(values, dict) else None
    if kind == AUTOENCODER:
        cls, known = AutoencoderConfig, {field.name: field.default for field in fields(AutoencoderConfig)}
    elif kind == COSMOS:
        cls, known = CosmosConfig, {"variant": "", "resolution": CosmosConfig.resolution}
    else:
        raise ValueError(f"{path}: type is {kind!r}; expected {AUTOENCODER!r} or {COSMOS!r}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        _check_type(f"{path}: {key}", values[key], known[key])
    try:
        return cls(**{**known, **values})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_type(name: str, value: object, default: object) -> None:
    """JSON tells integers, floats, booleans and text apart; a tuple of integers is a list there."""
    if isinstance(default, tuple):
        fits, expected = type(value) is list and all(type(v) is int for v in value), "a list of int"
    else:
        fits, expected = type(value) is type(default), type(default).__name__
        fits |= isinstance(default, float) and type(value) is int
    if not fits:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _config_bytes(config: AutoencoderConfig | CosmosConfig) -> bytes:
    if isinstance(config, CosmosConfig):
        values = {"type": COSMOS, **{key: getattr(config, key) for key in COSMOS_KEYS}}
    else:
        values = {"type": AUTOENCODER, **asdict(config)}
    return (json.dumps(values, indent=2) + "\n").encode()


def _weights_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
