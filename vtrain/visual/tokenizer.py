"""Image tokenizers as the commands use them: pixels in, codes out. A folder of config.json and model.safetensors."""

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
from vtrain.visual.vqgan import Autoencoder, AutoencoderConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
KIND = "autoencoder"  # the one value of "type" in config.json so far


class ImageTokenizer:
    """A frozen autoencoder in evaluation mode. `ImageTokenizer(model)` shares the model's weights."""

    def __init__(self, model: Autoencoder):
        self.model = model.eval().requires_grad_(False)

    @property
    def config(self) -> AutoencoderConfig:
        return self.model.config

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @property
    def downscale(self) -> int:
        """Pixels along one side of a code."""
        return self.config.downscale

    @cached_property
    def sha256(self) -> str:
        """Of the two files as `save` writes them, config first: two tokenizers that agree in it give the same codes."""
        return hashlib.sha256(
            _config_bytes(self.config) + safetensors.torch.save(_on_host(self.model.weights()))
        ).hexdigest()

    def to(self, device: torch.device | str) -> ImageTokenizer:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images float [B,3,H,W] in [-1,1] -> ids int64 [B,h,w] in 0..num_codes-1, on the model's device.

        ValueError when H or W is not a multiple of `downscale`.
        """
        if (
            images.ndim != 4
            or images.shape[1] != self.config.in_channels
            or any(side == 0 or side % self.downscale for side in images.shape[2:])
        ):
            raise ValueError(
                f"images have shape {list(images.shape)}; expected [B, {self.config.in_channels}, H, W] "
                f"with H and W multiples of {self.downscale}"
            )
        weight = self.model.quant_conv.weight
        return self.model.encode(images.to(weight.device, weight.dtype)).long()

    @torch.no_grad()
    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int [B,h,w] -> images float32 [B,3,H,W] in [-1,1]. ValueError names an id outside 0..num_codes-1."""
        if ids.ndim != 3:
            raise ValueError(f"codes have shape {list(ids.shape)}; expected [B, h, w]")
        outside = ids[(ids < 0) | (ids >= self.num_codes)]
        if len(outside):
            raise ValueError(f"code {int(outside[0])} is outside the codebook 0..{self.num_codes - 1}")
        return self.model.decode(ids.to(self.model.quant_conv.weight.device)).float().clamp(-1.0, 1.0)

    def save(self, folder: str | os.PathLike) -> None:
        save_image_tokenizer(folder, self.config, self.model.weights())


def save_image_tokenizer(
    folder: str | os.PathLike, config: AutoencoderConfig, tensors: dict[str, torch.Tensor]
) -> None:
    """Write config.json and model.safetensors (tensors as of `Autoencoder.weights`), each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / WEIGHTS_FILE, safetensors.torch.save(_on_host(tensors)))
    write_durably(folder / CONFIG_FILE, _config_bytes(config))


def load_image_tokenizer(folder: str | os.PathLike, device: torch.device | str = "cpu") -> ImageTokenizer:
    """Read a folder that `save` wrote. ValueError names the file and what is wrong; it lists all wrong tensors."""
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file; an image tokenizer is {CONFIG_FILE} and {WEIGHTS_FILE}")
    config = read_config(folder / CONFIG_FILE)
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: not a whole safetensors file: {error}") from error
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {', '.join(broken)}: NaN or infinity; expected finite numbers")
    with torch.random.fork_rng(devices=()):  # weights about to be overwritten must not use up the caller's draws
        model = Autoencoder(config)
    model.load_weights(tensors, origin=str(folder / WEIGHTS_FILE))
    return ImageTokenizer(model).to(device)


def read_config(path: str | os.PathLike) -> AutoencoderConfig:
    """ValueError names the file and the key."""
    try:
        values = json.loads(Path(path).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    kind = values.pop("type", None) if isinstance(values, dict) else None
    if kind != KIND:
        raise ValueError(f"{path}: type is {kind!r}; expected {KIND!r}")
    known = {field.name: field.default for field in fields(AutoencoderConfig)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        _check_type(f"{path}: {key}", values[key], known[key])
    try:
        return AutoencoderConfig(**values)
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


def _config_bytes(config: AutoencoderConfig) -> bytes:
    return (json.dumps({"type": KIND, **asdict(config)}, indent=2) + "\n").encode()


def _on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
