"""How vtrain puts bytes on disk: whole files and folders or none, durable before they are named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def write_whole(path: str | os.PathLike, data: bytes | str) -> None:
    """Give `path` its bytes in one step (temporary file beside it, rename); a power cut may still lose them."""
    _write(Path(path), data, durable=False)


def write_durably(path: str | os.PathLike, data: bytes | str) -> None:
    """`write_whole`, and on the disk when it returns: fdatasync of the file, fsync of the folder."""
    _write(Path(path), data, durable=True)
    sync_folder(Path(path).parent)


def _write(path: Path, data: bytes | str, *, durable: bool) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if durable:
                os.fdatasync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file from tensors of any device, fsynced. Not in one step: for a folder that is not named yet."""
    from safetensors.torch import save_file  # here: it imports torch, which text needs not

    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    os.chmod(path, 0o666 & ~_umask())  # safetensors makes files that only their owner can read
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def replace_folder(new: Path, folder: Path) -> None:
    """Put the finished folder `new` in the place of `folder`, which may exist, and make that durable."""
    sync_folder(new)
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old)
    else:
        new.rename(folder)
    sync_folder(folder.parent)


def sync_folder(folder: str | os.PathLike) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
