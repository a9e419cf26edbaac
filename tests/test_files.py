"""Writing files: whole or not at all, errors that name the file, and the tidying after processes that were killed."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from crashes import tree

from vtrain import files


@contextmanager
def file_size_limit(size: int):
    """Writes past `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [files.write_whole, files.write_durably])
def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path, write):
    path = tmp_path / "a.json"
    write(path, "old")
    with file_size_limit(1000), pytest.raises(OSError, match=r"File too large: '.*/a.json'"):
        write(path, bytes(5000))
    assert tree(tmp_path) == {"a.json": b"old"}
    write(path, "new")
    assert tree(tmp_path) == {"a.json": b"new"}


def test_tensors_that_do_not_fit_on_the_disk_are_an_oserror_with_the_name(tmp_path):
    """safetensors raises an exception of its own there."""
    with file_size_limit(1000), pytest.raises(OSError, match=r"File too large: '.*/a.safetensors'"):
        files.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(5000)})
    with pytest.raises(OSError, match=r"No such file or directory: '.*/gone/a.safetensors'"):
        files.write_tensors(tmp_path / "gone" / "a.safetensors", {"x": torch.zeros(5)})


def test_a_copied_file_is_whole_or_not_there_and_a_link_is_the_same_file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(5000))
    with file_size_limit(1000), pytest.raises(OSError, match=r"File too large"):
        files.copy_file(tmp_path / "a", tmp_path / "b")
    assert tree(tmp_path) == {"a": bytes(5000)}
    files.copy_file(tmp_path / "a", tmp_path / "b")
    files.link(tmp_path / "a", tmp_path / "c")
    assert tree(tmp_path) == dict.fromkeys("abc", bytes(5000))
    assert [(tmp_path / name).samefile(tmp_path / "a") for name in "bc"] == [False, True]


def test_an_appended_line_is_in_the_file_at_once(tmp_path):
    with open(tmp_path / "lines", "ab") as file:
        files.append(file, "one\n")
        assert (tmp_path / "lines").read_bytes() == b"one\n"
        with file_size_limit(4), pytest.raises(OSError, match=r"File too large: '.*/lines'"):
            files.append(file, "two\n")


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path):
    files.replace_folder(folder(tmp_path / ".tmp-a", "1"), tmp_path / "a")
    assert tree(tmp_path) == {"a/file": b"1"}
    folder(tmp_path / ".old-a", "from a killed process")
    files.replace_folder(folder(tmp_path / ".tmp-a", "2"), tmp_path / "a")
    assert tree(tmp_path) == {"a/file": b"2"}


def test_what_killed_processes_left_is_cleared(tmp_path):
    folder(tmp_path / ".tmp-a", "half")
    (tmp_path / ".tmp-b").write_text("half")
    folder(tmp_path / ".old-c", "put aside, not replaced")
    folder(tmp_path / ".old-d", "put aside, replaced")
    folder(tmp_path / "d", "its successor")
    (tmp_path / ".hidden").write_text("not ours")
    files.clear_leftovers(tmp_path)
    assert tree(tmp_path) == {".hidden": b"not ours", "c/file": b"put aside, not replaced", "d/file": b"its successor"}
    files.clear_leftovers(tmp_path / "missing")


def test_deleting_what_is_missing_is_nothing(tmp_path):
    files.delete(tmp_path / "a")
    files.delete_folder(tmp_path / "a")
    files.delete_folder(folder(tmp_path / "a", "1"))
    folder(tmp_path / ".tmp-a", "from a killed process")
    files.delete_folder(folder(tmp_path / "a", "2"))
    files.fresh_folder(tmp_path / "b" / "c")
    (tmp_path / "b" / "c" / "file").touch()
    files.fresh_folder(tmp_path / "b" / "c")
    assert os.listdir(tmp_path / "b" / "c") == []
    assert os.listdir(tmp_path) == ["b"]


def test_copied_folders_are_equal(tmp_path):
    folder(folder(tmp_path / "a", "1") / "b", "2")
    files.copy_folder(tmp_path / "a", tmp_path / "c" / "a")
    assert tree(tmp_path / "c" / "a") == tree(tmp_path / "a") == {"file": b"1", "b/file": b"2"}
