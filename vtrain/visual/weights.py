"""Weights of image tokenizers out of files, checked before use; what a set of Cosmos tensors is, read off it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from vtrain.visual.cosmos import LEVELS, CosmosConfig, CosmosVideo
from vtrain.visual.cosmos_fold import CosmosImages, fold, network
from vtrain.visual.jit_archive import read_jit_state
from vtrain.visual.vqgan import mismatches

# Buffers that published files hold beside the weights: constants of the wavelets and of the quantizer.
CONSTANTS = ("wavelets", "_arange", "patch_size_buffer", "_levels", "_basis", "implicit_codebook")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` or TorchScript (`.jit`) file. ValueError names the file and what is wrong."""
    if path.suffix == ".jit":
        tensors = read_jit_state(path)
    else:
        try:
            tensors = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path}: {', '.join(broken)}: NaN or infinity; expected finite numbers")
    return tensors


def find_halves(folder: Path) -> tuple[Path, Path] | None:
    """encoder and decoder as NVIDIA publishes them (.jit), or the same as .safetensors, which go first."""
    for suffix in ("safetensors", "jit"):
        halves = folder / f"encoder.{suffix}", folder / f"decoder.{suffix}"
        if all(half.is_file() for half in halves):
            return halves
    return None


def read_halves(halves: tuple[Path, Path]) -> dict[str, torch.Tensor]:
    """The tensors of both files. ValueError where a tensor is in the file of the other half."""
    parts = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
    together = {}
    for path, (half, prefixes) in zip(halves, parts.items()):
        tensors = without_constants(read_tensors(path), str(path))
        if strays := [name for name in tensors if not name.startswith(prefixes)]:
            raise ValueError(f"{path}: unexpected {', '.join(strays)}; expected the tensors of the {half}")
        together |= tensors
    return together


def without_constants(tensors: Mapping[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """Only what is learned. ValueError if the quantizer has other levels than ours."""
    for name, tensor in tensors.items():
        if name.endswith("._levels") and tensor.flatten().tolist() != list(LEVELS):
            raise ValueError(f"{origin}: {name} is {tensor.flatten().tolist()}; expected {list(LEVELS)}")
    return {name: t for name, t in tensors.items() if not name.endswith(CONSTANTS)}


def cosmos_config(tensors: Mapping[str, torch.Tensor], resolution: int) -> CosmosConfig:
    """Variant and widths as the names and shapes tell; what they do not tell is as published."""
    video = any(".conv3d." in name for name in tensors)
    pair, conv = (".0.conv3d.weight", ".conv3d.weight") if video else (".weight", ".weight")
    usual = CosmosConfig("DV8x16x16" if video else "DI16x16", resolution)

    def side(name: str, axis: int, default: int) -> int:
        shape = tensors[name].shape if name in tensors else ()
        return shape[axis] if len(shape) > axis and shape[axis] else default

    channels = side(f"encoder.conv_in{pair}", 0, usual.channels)
    widths = [side(f"encoder.down.{i}.block.0.conv1{pair}", 0, usual.widths[i]) for i in range(3)]
    norm = ".norm1.norm.weight" if video else ".norm1.weight"
    blocks = sum(name.startswith("encoder.down.0.block.") and name.endswith(norm) for name in tensors)
    return CosmosConfig(
        usual.variant,
        resolution,
        channels=channels,
        channel_multiplier=tuple(max(1, width // channels) for width in widths),
        num_res_blocks=blocks or usual.num_res_blocks,
        latent_channels=side(f"quant_conv{conv}", 1, usual.latent_channels),
    )


def build_cosmos(
    tensors: Mapping[str, torch.Tensor],
    origin: str,
    *,
    resolution: int = 1024,
    variant: str = "",
    dtype: torch.dtype = torch.float32,
    folded: bool = True,
) -> CosmosVideo | CosmosImages:
    """The network of published weights; of DV8x16x16 the folded one unless `folded` is false.

    variant: what is expected; empty = any. ValueError lists every tensor that does not fit.
    """
    try:
        config = cosmos_config(tensors, resolution)
        with torch.device("meta"):
            published = CosmosVideo(config) if config.video else network(config)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    if variant and config.variant != variant:
        raise ValueError(f"{origin}: tensors of {config.variant}; expected {variant}")
    problems = mismatches(tensors, published.state_dict())
    problems += [f"{name} is {t.dtype}, expected floats" for name, t in tensors.items() if not t.is_floating_point()]
    if problems:
        shape = f"{config.variant}, channels {config.channels}, widths {list(config.widths)}"
        raise ValueError(f"{origin} does not fit Cosmos ({shape}): {'; '.join(problems)}")
    if config.video and not folded:
        published.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
        return published
    tensors = fold(tensors, config) if config.video else tensors
    return CosmosImages(config, {name: tensor.to(dtype) for name, tensor in tensors.items()})
