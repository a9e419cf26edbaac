"""Checkpoints: sharded safetensors and JSON, no pickle. Any number of ranks can load what any other number wrote.

    checkpoints/step-00000200/
      rank-00000.safetensors   this rank's rows of every parameter and optimizer state (buffers and scalars: rank 0)
      rank-00000.json          {"tensors": {name: [first row, rows of the whole]}, "own": this rank's state}; first row
                               -1 = not sharded
      state.json               step, task state (loader cursor ...), and what names the run (model, vocabulary)
      config.toml              the resolved configuration
      manifest.json            size and crc32c of every file above; written last, checked before anything is read

A folder is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from vtrain._host import crc32c
from vtrain.dist.comm import raise_together
from vtrain.dist.fsdp import local, local_rows
from vtrain.dist.mesh import World
from vtrain.files import delete_folder, replace_folder, write_durably, write_tensors

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file, what was found and what was expected."""


@dataclass
class Tensors:
    """The tensors of a run on this rank: `sharded` hold rows of dimension 0 over ranks, `whole` are equal on all."""

    sharded: dict[str, tuple[torch.Tensor, int]]  # name -> (local rows, rows of the whole)
    whole: dict[str, torch.Tensor]

    def joined(self, other: Tensors) -> Tensors:
        return Tensors(self.sharded | other.sharded, self.whole | other.whole)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the whole tensors by name."""
        sharded = {name: (rows, *t.shape[1:]) for name, (t, rows) in self.sharded.items()}
        return sharded | {name: tuple(t.shape) for name, t in self.whole.items()}

    def copied(self) -> Tensors:
        """Copies on the host, so that training may go on while they are written."""
        return Tensors(
            {name: (t.detach().to("cpu", copy=True), rows) for name, (t, rows) in self.sharded.items()},
            {name: t.detach().to("cpu", copy=True) for name, t in self.whole.items()},
        )


def module_tensors(module: torch.nn.Module, prefix: str, *, frozen: bool = True) -> Tensors:
    """Parameters and persistent buffers of a module under `prefix`, as views of their storage.

    frozen: with the parameters that are not trained.
    """
    left_out = set() if frozen else {name for name, p in module.named_parameters() if not p.requires_grad}
    sharded, whole = {}, {}
    for name, tensor in module.state_dict().items():
        if name in left_out:
            continue
        if isinstance(tensor, DTensor):
            sharded[f"{prefix}.{name}"] = (local(tensor), tensor.shape[0])
        else:
            whole[f"{prefix}.{name}"] = tensor
    return Tensors(sharded, whole)


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def list_steps(root: Path) -> list[int]:
    """Steps that have a folder under `root`, ascending; temporary folders do not count."""
    return sorted(int(p.name[5:]) for p in root.glob("step-*") if p.name[5:].isdigit())


def open_folder(folder: Path) -> None:
    """Make the folder that a checkpoint is written in before it gets its name (the main rank does)."""
    temporary = _temporary(folder)
    delete_folder(temporary)
    temporary.mkdir()  # not its parents: a run's folder that is gone is an error, not a new folder


def write_rank(folder: Path, tensors: Tensors, own: Mapping, world: World) -> None:
    """Write this rank's tensors and its own JSON-able state."""
    _write_rank(_temporary(folder), tensors, own, world)


def write_state(folder: Path, state: Mapping, config: str, world: World) -> None:
    """Write what all ranks share."""
    content = json.dumps({"format": FORMAT, "ranks": world.size, **state}, indent=1)
    write_durably(_temporary(folder) / "state.json", content)
    write_durably(_temporary(folder) / "config.toml", config)


def complete(folder: Path) -> None:
    """All ranks have written: seal the checkpoint with its manifest and give it its name."""
    write_manifest(_temporary(folder))
    replace_folder(_temporary(folder), folder)


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".tmp-{folder.name}")


def load(folder: Path, tensors: Tensors, world: World, state: dict | None = None) -> tuple[dict, list[dict]]:
    """Fill this rank's tensors in place from a checkpoint; its state, and the own states of the ranks that wrote it.

    state: what `read_state` has returned, if it has been called: every file is read to be checked, once is enough.
    CheckpointError lists every tensor that is missing, unexpected or of another shape.
    """
    state = read_state(folder) if state is None else state
    with _failing_together():
        parts, own = _read_index(folder, state["ranks"])
        _compare(folder, _shapes(folder, parts), tensors.shapes())
        _fill(folder, parts, tensors, {name: name for name in tensors.shapes()}, world)
    return state, own


def load_named(folder: Path, tensors: Tensors, names: Mapping[str, str], world: World, state: Mapping) -> None:
    """Fill those of this rank's tensors that `names` has from what the checkpoint calls names[name], of equal shape."""
    with _failing_together():
        parts, _ = _read_index(folder, state["ranks"])
        _fill(folder, parts, tensors, names, world)


def shapes(folder: Path, state: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a checkpoint with this state."""
    with _failing_together():
        parts, _ = _read_index(folder, state["ranks"])
        return _shapes(folder, parts)


def read_state(folder: Path) -> dict:
    """`state.json` of a checkpoint after its manifest has been checked."""
    check_manifest(folder)
    return peek(folder)


def peek(folder: Path) -> dict:
    """`state.json` of a checkpoint; whether its files are whole is left to `read_state`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text())
        found = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the state of a checkpoint: {error}") from error
    if found != FORMAT:
        raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}")
    return state


def write_manifest(folder: Path) -> None:
    """Size and crc32c of every file in the folder, into `manifest.json`."""
    files = {p.name: _fingerprint(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST}
    write_durably(folder / MANIFEST, json.dumps({"files": files}, indent=1))


def check_manifest(folder: Path) -> None:
    """CheckpointError unless every file the manifest names is there, whole and unchanged."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}: not a complete checkpoint")
    try:
        files = json.loads(path.read_text())["files"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a manifest: {error}") from error
    for name, expected in files.items():
        target = folder / name
        if not target.is_file():
            raise CheckpointError(f"{target}: missing; the manifest names it with {expected['size']} bytes")
        found = _fingerprint(target)
        if found != expected:
            raise CheckpointError(f"{target}: found {found}, the manifest says {expected}")


def check_identity(folder: Path, found: dict, expected: dict) -> None:
    """CheckpointError with all differences unless a checkpoint is of a run like this one."""
    expected = json.loads(json.dumps(expected))  # tuples as the checkpoint has them: lists
    names = sorted(found.keys() | expected.keys())
    differences = [
        f"{n}: checkpoint {found.get(n)}, this run {expected.get(n)}" for n in names if found.get(n) != expected.get(n)
    ]
    if differences:
        raise CheckpointError(f"{folder}: checkpoint of another run: " + "; ".join(differences))


def _write_rank(folder: Path, tensors: Tensors, own: Mapping, world: World) -> None:
    held: dict[str, torch.Tensor] = {}
    index: dict[str, list[int]] = {}
    for name, (tensor, rows) in tensors.sharded.items():
        first, stop = local_rows(rows, world)
        if stop - first != tensor.shape[0]:
            raise AssertionError(f"{name}: rank {world.rank} holds {tensor.shape[0]} rows, expected {first}..{stop}")
        if stop > first:
            held[name], index[name] = tensor, [first, rows]
    if world.main:
        for name, tensor in tensors.whole.items():
            held[name], index[name] = tensor, [-1, 0]
    stem = f"rank-{world.rank:05d}"
    path = folder / f"{stem}.safetensors"
    write_tensors(path, held)
    write_durably(folder / f"{stem}.json", json.dumps({"tensors": index, "own": own}))


def _read_index(folder: Path, ranks: int) -> tuple[dict[str, list[tuple[str, int]]], list[dict]]:
    """({name: [(file, first row), ...] in row order; first row -1 for a whole tensor}, own states of the ranks)."""
    parts: dict[str, list[tuple[str, int]]] = {}
    own = []
    for rank in range(ranks):
        stem = f"rank-{rank:05d}"
        try:
            content = json.loads((folder / f"{stem}.json").read_text())
            index = content["tensors"]
            own.append(content["own"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder / stem}.json: {error}") from error
        for name, (first, _) in index.items():
            parts.setdefault(name, []).append((f"{stem}.safetensors", first))
    return parts, own


class _Files:
    """Safetensors files of a checkpoint, opened when first used."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.open_files = folder, {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.open_files.clear()

    def __getitem__(self, name: str):
        if name not in self.open_files:
            try:
                self.open_files[name] = safe_open(self.folder / name, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{self.folder / name}: not a safetensors file: {error}") from error
        return self.open_files[name]


def _shapes(folder: Path, parts: dict) -> dict[str, tuple[int, ...]]:
    found = {}
    with _Files(folder) as files:
        for name, pieces in parts.items():
            first, *others = (files[file].get_slice(name).get_shape() for file, _ in pieces)
            found[name] = (first[0] + sum(s[0] for s in others), *first[1:]) if first else ()
    return found


def _compare(folder: Path, found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> None:
    problems = [f"missing {n}" for n in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {n}" for n in sorted(found.keys() - expected.keys())]
    problems += [
        f"{n} is {list(found[n])}, expected {list(expected[n])}"
        for n in sorted(expected.keys() & found.keys())
        if found[n] != expected[n]
    ]
    if problems:
        raise CheckpointError(f"{folder}: checkpoint of another model: " + "; ".join(problems))


def _fill(folder: Path, parts: dict, tensors: Tensors, names: Mapping[str, str], world: World) -> None:
    """Copy this rank's rows of the tensors that are called names[name] in the checkpoint."""
    with _Files(folder) as files:
        for name, (target, rows) in tensors.sharded.items():
            if name in names:
                _read_rows(files, names[name], parts[names[name]], target, *local_rows(rows, world))
        for name, target in tensors.whole.items():
            if name in names:
                file, _ = parts[names[name]][0]
                target.copy_(files[file].get_tensor(names[name]).reshape(target.shape))


@contextmanager
def _failing_together() -> Iterator[None]:
    """Where one rank meets a CheckpointError inside the block, all raise ValueError at its end."""
    problem = None
    try:
        yield
    except CheckpointError as error:
        problem = str(error)
    raise_together(problem)


def _read_rows(files: _Files, name: str, parts: list, target: torch.Tensor, first: int, stop: int) -> None:
    for file, start in parts:
        piece = files[file].get_slice(name)
        end = start + piece.get_shape()[0]
        low, high = max(first, start), min(stop, end)
        if low < high:
            target[low - first : high - first].copy_(piece[low - start : high - start])


def _fingerprint(path: Path) -> dict[str, int]:
    size = path.stat().st_size
    value = 0
    if size:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        value = crc32c(data)
    return {"size": size, "crc32c": value}
