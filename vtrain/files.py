"""How vtrain puts bytes on disk: whole files and folders or none, durable before they are named.

What is not finished is called `.tmp-<name>`; a folder that is being replaced is `.old-<name>` until its successor has
the name. Errors name the file. Every operation passes a failpoint, so tests can kill the process in any of them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vtrain.failpoints import point

if TYPE_CHECKING:
    import torch

_COPY_CHUNK = 16 << 20


def write_whole(path: str | os.PathLike, data: bytes | str) -> None:
    """Give `path` its bytes in one step (temporary file beside it, rename); a power cut may still lose them."""
    _write(Path(path), data, durable=False)


def write_durably(path: str | os.PathLike, data: bytes | str) -> None:
    """`write_whole`, and on the disk when it returns: fdatasync of the file, fsync of the folder."""
    _write(Path(path), data, durable=True)
    sync_folder(Path(path).parent)


def _write(path: Path, data: bytes | str, *, durable: bool) -> None:
    temporary = _temporary(path)
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file, data.encode() if isinstance(data, str) else data, path)
            if durable:
                sync(file, path)
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file from tensors of any device, fsynced. Not in one step: for a folder that is not named yet."""
    from safetensors import SafetensorError  # here: it imports torch, which text needs not
    from safetensors.torch import save_file

    with naming(path):
        point("write", path)
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
        except SafetensorError as error:  # of a full disk it makes an error of its own, with the number in the text
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error)) from None
        os.chmod(path, 0o666 & ~_umask())  # safetensors makes files that only their owner can read
        with open(path, "rb") as file:
            sync(file, path)


def write(file: BinaryIO, data: bytes | memoryview, path: str | os.PathLike) -> None:
    """Write to an open file that is called `path` or will be."""
    with naming(path):
        point("write", path, file, data)
        file.write(data)


def append(file: BinaryIO, text: str) -> None:
    """Add text to an open file; it is out of this process when this returns. A kill may leave a part of it."""
    write(file, text.encode(), file.name)
    with naming(file.name):
        file.flush()


def sync(file: BinaryIO, path: str | os.PathLike) -> None:
    """Bring an open file that is called `path` or will be to the disk."""
    with naming(path):
        file.flush()
        point("fsync", path)
        os.fdatasync(file.fileno())


def sync_folder(folder: str | os.PathLike) -> None:
    """Make renames inside a folder durable."""
    with naming(folder):
        point("fsync", folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Rename a file, over an older one where there is one, or a folder to a name that is free."""
    with naming(target):
        point("rename", target)
        os.replace(source, target)
        point("renamed", target)


def replace_folder(new: Path, folder: Path) -> None:
    """Put the finished folder `new` in the place of `folder`, which may exist, and make that durable."""
    sync_folder(new)
    old = _old(folder)
    if folder.exists():
        delete_folder(old)
        replace(folder, old)
    replace(new, folder)
    sync_folder(folder.parent)
    delete_folder(old)


def delete(path: str | os.PathLike) -> None:
    """Delete a file that may be missing."""
    with naming(path):
        point("delete", path)
        Path(path).unlink(missing_ok=True)


def delete_folder(folder: str | os.PathLike) -> None:
    """Delete a folder that may be missing. Its name goes first: half of a folder never has it."""
    folder = Path(folder)
    if not folder.exists():
        return
    doomed = folder if folder.name.startswith(".tmp-") else _temporary(folder)
    with naming(folder):
        point("delete", folder)
        if doomed != folder:
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(folder, doomed)
        for path in sorted(doomed.rglob("*"), reverse=True):  # what is in a folder comes before it
            point("empty", folder)
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        doomed.rmdir()


def fresh_folder(folder: str | os.PathLike) -> None:
    """An empty folder in the place of what was there."""
    delete_folder(folder)
    Path(folder).mkdir(parents=True)


def link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Give a file a second name on the same file system."""
    point("link", target)
    os.link(source, target)


def copy_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a file of any size, durably; the copy has its name when it is whole."""
    target = Path(target)
    temporary = _temporary(target)
    try:
        with naming(target), open(source, "rb") as origin, open(temporary, "wb") as file:
            point("write", target)
            shutil.copyfileobj(origin, file, _COPY_CHUNK)
            sync(file, target)
        replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def copy_folder(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a folder's files durably, for a folder that is not named yet."""
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            write_durably(target / path.name, path.read_bytes())


def clear_leftovers(folder: str | os.PathLike) -> None:
    """Delete what killed processes left in a folder; what one had put aside and not replaced gets its name back."""
    for old in Path(folder).glob(".old-*"):
        place = old.with_name(old.name.removeprefix(".old-"))
        if place.exists():
            delete_folder(old)
        else:
            replace(old, place)
    for path in Path(folder).glob(".tmp-*"):
        if path.is_dir():
            delete_folder(path)
        else:
            delete(path)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Add the file to errors that do not name one, as those of write and fsync."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}")


def _old(path: Path) -> Path:
    return path.with_name(f".old-{path.name}")


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
