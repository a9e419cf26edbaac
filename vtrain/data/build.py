"""Make a dataset in units of one shard each, by any number of processes, across any number of kills.

A unit's bytes depend on the settings and its number alone. What is done is noted in progress/ after its shard is on
the disk; a finished dataset has neither notes nor locks, so it does not tell how often or by how many it was made.

    build = Build(out, command="vtrain.extract", identity={...}, units=12, assets={"text_tokenizer": tokenizer})
    if not build.open():                                # True: complete already
        for unit in build.share(part, parts):
            if build.finished(unit) is None:
                with build.make(unit, schema) as made:
                    made.shard.append_batch(...)
                    made.skipped.append({"key": ..., "reason": ...})
        build.finish(schema)                            # publishes where no unit is missing
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from vtrain.data import sidecars
from vtrain.data.format import ShardInfo, shard_info
from vtrain.data.manifest import generations, load, locked, next_generation
from vtrain.data.schema import Schema, canonical_json
from vtrain.data.twins import TwinInfo, twin_info
from vtrain.data.verify import verify
from vtrain.data.writer import ShardWriter
from vtrain.files import (
    clear_leftovers,
    delete,
    delete_folder,
    naming,
    replace,
    sync,
    sync_folder,
    write,
    write_durably,
)

SKIPPED_FILE = "skipped.jsonl"
PROGRESS_FOLDER = "progress"  # a file per finished unit
LOCK_FILE = ".units.lock"  # byte u is held by the process that makes unit u


class Asset(Protocol):
    """What a dataset carries beside its shards, such as a tokenizer."""

    def save(self, folder: Path) -> None: ...


@dataclass
class Making:
    """A unit in work. note: {"shard": ShardInfo as a dict, "twins": {...}, "skipped": [...]}, when it is done."""

    shard: ShardWriter
    skipped: list[dict] = field(default_factory=list)
    note: dict | None = None


class Build:
    """The folder of one dataset while it is made. Files are vtrain.files' kind: whole or not there.

    command: who makes it, its last word names the identity file ("vtrain.extract": extract.json). identity: all that
    decides which sample stands where and what its ids mean, JSON without paths. assets: folder name -> what to save.
    """

    def __init__(
        self, out: Path | str, *, command: str, identity: dict, units: int, assets: Mapping[str, Asset] | None = None
    ) -> None:
        self.out = Path(out)
        self.command = command
        self.identity = json.loads(canonical_json(identity))  # as it comes back from the file: lists, not tuples
        self.units = units
        self.assets = dict(assets or {})
        self.skipped_file = self.out / SKIPPED_FILE
        self.identity_file = self.out / f"{re.split(r'[ .]', command)[-1]}.json"

    def open(self) -> bool:
        """Lay the folder out, or check that it is this build's. True = there is nothing left to do.

        ValueError where the folder was made with other settings or by somebody else; nothing in it is touched then.
        """
        self._check_folder()
        if self._complete() and not self._untidy():
            return True  # without a lock: the folder may be read-only
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out):
            self._check_folder()  # again: another process may have come first
            if self._complete():
                self._tidy()
                return True
            (self.out / PROGRESS_FOLDER).mkdir(exist_ok=True)
            for name, asset in self.assets.items():
                asset.save(self.out / name)
            write_durably(self.identity_file, json.dumps(self.identity, indent=1, sort_keys=True) + "\n")
        return False

    def share(self, part: int, parts: int) -> range:
        """The units of process `part` of `parts`."""
        if not 0 <= part < parts:
            raise ValueError(f"part {part} of {parts}; expected 0..{parts - 1}")
        return range(part, self.units, parts)

    def uuid(self, unit: int) -> bytes:
        return hashlib.sha256(canonical_json([self.identity, unit])).digest()[:16]

    def finished(self, unit: int) -> dict | None:
        """The note of a unit (see Making), after a check of every byte of its files; None where it is to be made.

        One of which nothing was usable is made again: its files may have been looked for in the wrong folder.
        """
        path = self._shard_file(unit)
        try:
            note = json.loads(self._note_file(unit).read_bytes())
            info = ShardInfo(**note["shard"])
            twins = [TwinInfo(**twin["file"]) for twin in note["twins"].values()]
            whole = isinstance(note["skipped"], list) and (info.samples > 0 or not note["skipped"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if not whole or verify(path) or shard_info(path) != info:
            return None
        files = [(self.out / twin.file, twin) for twin in twins]
        return note if all(not verify(file) and twin_info(file) == twin for file, twin in files) else None

    @contextmanager
    def make(
        self, unit: int, schema: Schema, beside: Callable[[Path], dict[str, dict]] | None = None, **options
    ) -> Iterator[Making]:
        """`with` gives a Making; its end names the shard, has its twins written, and notes them.

        beside(path of the shard) writes twins and returns {name: {kind, dim, dtype, producer, file: TwinInfo as a
        dict}}. options: of ShardWriter. ValueError where another process is making the same unit at this moment.
        """
        with self._claimed(unit):
            path = self._shard_file(unit)
            with ShardWriter(path, schema, uuid=self.uuid(unit), **options) as writer:
                made = Making(writer)
                yield made
            twins = beside(path) if beside else {}
            (self.out / PROGRESS_FOLDER).mkdir(exist_ok=True)  # gone where others, who knew this unit, have published
            made.note = {"shard": asdict(writer.info), "twins": twins, "skipped": made.skipped}
            write_durably(self._note_file(unit), canonical_json(made.note))

    def finish(
        self, schema: Schema, *, max_skipped: int = -1, records: str = "images", limit: str = "input.max_skipped"
    ) -> bool:
        """List what was skipped and publish the dataset; False where units of other processes are still missing.

        Every process may call it when its own units are done. ValueError where nothing was usable or, with max_skipped
        >= 0, more than that was skipped (`records`, `limit`: how the message calls them); the units stay for next time.
        """
        with locked(self.out):
            if self._complete():
                self._tidy()
                return True
            infos, twins, skipped = self._gather()
            total = sum(info.samples for info in infos) + skipped
            whole = len(infos) == self.units
            if 0 <= max_skipped < skipped or (whole and skipped == total):
                expected = "at least one that is usable" if skipped == total else f"at most {max_skipped} ({limit})"
                raise ValueError(
                    f"{self.skipped_file}: {skipped} of {total} {records} were skipped; expected {expected}"
                    f"{self._first_reason()}"
                )
            if whole:
                files = sidecars.measure(self.out, [self.identity_file.name, self.skipped_file.name, *self.assets])
                next_generation(self.out, None, schema, infos, skipped=skipped, twins=twins, files=files)
                self._tidy()
            return whole

    def _first_reason(self) -> str:
        """The end of a message about what was skipped: all of it often has the one reason."""
        if not self.skipped_file.is_file():
            return ""
        with open(self.skipped_file, encoding="utf-8") as file:
            return f"; the first: {json.loads(file.readline())['reason']}"

    def _check_folder(self) -> None:
        if self.identity_file.is_file():
            self._check_identity()
        elif self.out.exists() and (not self.out.is_dir() or generations(self.out) or any(self.out.glob("*.vts"))):
            name = self.identity_file.name
            raise ValueError(f"{self.out}: not made by {self.command} (no {name}); take another folder")

    def _check_identity(self) -> None:
        path = self.identity_file
        try:
            found = json.loads(path.read_bytes())
            differences = [
                f"{key} {_shown(found.get(key))}, now {_shown(self.identity.get(key))}"
                for key in sorted(found.keys() | self.identity.keys())
                if found.get(key) != self.identity.get(key)
            ]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not what {self.command} writes: {error}") from None
        if differences:
            raise ValueError(
                f"{path}: the dataset was begun with other settings: {'; '.join(differences)}; take another folder"
            )

    def _complete(self) -> bool:
        """Whether a manifest lists every unit; ValueError where one was published that does not."""
        if not self.out.is_dir() or not generations(self.out):
            return False
        manifest = load(self.out)
        listed = {info.file for info in manifest.shards}
        missing = [unit for unit in range(self.units) if self._shard_file(unit).name not in listed]
        if missing:
            raise ValueError(
                f"{manifest.path}: published before {self.command} was finished: {len(missing)} of {self.units} shards "
                f"are not listed, the first {self._shard_file(missing[0]).name}; take another folder"
            )
        return True

    def _untidy(self) -> bool:
        names = (PROGRESS_FOLDER, LOCK_FILE)
        return any((self.out / name).exists() for name in names) or any(self.out.glob(".tmp-*"))

    def _tidy(self) -> None:
        delete_folder(self.out / PROGRESS_FOLDER)
        clear_leftovers(self.out)
        delete(self.out / LOCK_FILE)

    def _shard_file(self, unit: int) -> Path:
        return self.out / f"shard-{unit:05d}.vts"

    def _note_file(self, unit: int) -> Path:
        return self.out / PROGRESS_FOLDER / f"unit-{unit:05d}.json"

    def _gather(self) -> tuple[list[ShardInfo], dict[str, dict], int]:
        """(shards of the noted units in order, their twins as manifests list them, number of skipped records), and
        skipped.jsonl written anew."""
        infos: list[ShardInfo] = []
        twins: dict[str, dict] = {}
        skipped = 0
        listing = self.skipped_file
        temporary = listing.with_name(f".tmp-{listing.name}")
        with open(temporary, "wb") as file:  # a unit at a time: the entries of all need not fit in memory
            for path in filter(Path.exists, map(self._note_file, range(self.units))):
                result = json.loads(path.read_bytes())
                for name, twin in result["twins"].items():
                    listed = twins.setdefault(name, {**twin, "files": [None] * self.units})
                    listed["files"][len(infos)] = twin["file"]
                infos.append(ShardInfo(**result["shard"]))
                skipped += len(result["skipped"])
                if result["skipped"]:
                    lines = "".join(json.dumps(entry) + "\n" for entry in result["skipped"])
                    write(file, lines.encode(), listing)
            sync(file, listing)
        if skipped:
            replace(temporary, listing)
            sync_folder(self.out)
        else:
            delete(temporary)
            delete(listing)
        for twin in twins.values():
            del twin["file"]
        return infos, twins, skipped

    @contextmanager
    def _claimed(self, unit: int) -> Iterator[None]:
        """Hold byte `unit` of the lock file, which the kernel takes back from a process that dies. A process makes one
        unit at a time: closing any descriptor of a file drops all its locks on it."""
        path = self.out / LOCK_FILE
        with open(path, "ab") as file:
            try:
                with naming(path):
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit)
            except (BlockingIOError, PermissionError):
                raise ValueError(
                    f"{self.out}: unit {unit} is being made by another process; expected one start of each part"
                ) from None
            yield


def _shown(value: object) -> str:
    text = json.dumps(value)
    return f'{text[:17]}.."' if isinstance(value, str) and len(text) > 40 else text
