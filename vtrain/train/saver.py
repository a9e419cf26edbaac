"""Checkpoints written behind the training: a step is held up for a copy of its state, not for the disk.

Every rank writes its own file in a thread. The loop tells, with the numbers that it sums over ranks anyway, when all
have: then the main rank's thread adds manifest and name (`commit`). `wait` ends what is under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from vtrain.dist.comm import raise_together
from vtrain.dist.mesh import World
from vtrain.files import delete_folder
from vtrain.train import checkpoint


class Saver:
    """One checkpoint at a time. All ranks call `begin`, `commit` and `wait` at the same steps."""

    def __init__(self, root: Path, world: World, keep: int) -> None:
        self.root, self.world, self.keep = root, world, keep
        self.folder: Path | None = None  # of the checkpoint under way
        self._protected: set[int] = set()
        self._work: _Task | None = None  # this rank's file, later (main rank) the commit
        self._committing = False

    @property
    def written(self) -> bool:
        """Whether this rank has ended its part of the checkpoint under way (or failed to), and commit is due."""
        return self.folder is not None and not self._committing and not self._work.running

    @property
    def failed(self) -> bool:
        """Whether the checkpoint under way could not be completed (known to the main rank); `wait` raises it."""
        return self._committing and self._work.error is not None

    def begin(
        self, step: int, tensors: checkpoint.Tensors, state: Mapping, own: Mapping, config: str, protected: set[int]
    ) -> None:
        """Copy the state and start to write it. state: equal on all ranks; own: this rank's; both JSON-able."""
        self.wait()
        folder = checkpoint.step_folder(self.root, step)
        copy = tensors.copied()
        self._on_main(lambda: checkpoint.open_folder(folder))
        self.folder, self._protected, self._committing = folder, protected, False

        def write() -> None:
            checkpoint.write_rank(folder, copy, own, self.world)
            if self.world.main:
                checkpoint.write_state(folder, state, config, self.world)

        self._work = _Task(write)

    def commit(self) -> None:
        """All ranks have written: name the checkpoint, in the main rank's thread."""
        self._raise_together()
        self._committing = True
        if self.world.main:
            self._work = _Task(self._commit)

    def wait(self) -> None:
        """Until the checkpoint under way is complete. ValueError on all ranks if it could not be written."""
        if self.folder is None:
            return
        if not self._committing:
            self._work.join()
            self.commit()
        if self.world.main:
            self._work.join()
        self._raise_together()
        self.folder = None

    def _commit(self) -> None:
        checkpoint.complete(self.folder)
        self.prune(self._protected)

    def prune(self, protected: set[int]) -> None:
        """Delete all but the newest checkpoints and the protected steps (on the main rank, none being written)."""
        if self.keep > 0:
            for step in checkpoint.list_steps(self.root)[: -self.keep]:
                if step not in protected:
                    delete_folder(checkpoint.step_folder(self.root, step))

    def _raise_together(self) -> None:
        error = self._work.error if self._work is not None else None
        raise_together(f"{self.folder}: rank {self.world.rank} cannot write the checkpoint: {error}" if error else None)

    def _on_main(self, action: Callable[[], None]) -> None:
        problem = None
        if self.world.main:
            try:
                action()
            except OSError as error:
                problem = str(error)
        raise_together(problem)


class _Task:
    """A function in a thread; what it raises is kept in `error`."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.error: Exception | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except Exception as error:
            self.error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()
