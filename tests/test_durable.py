"""Order of flushes and renames: content first, then the name, then the folder that holds the name. Locks and room."""

import errno
import os
import stat

import pytest

from domino_jax import durable
from domino_jax.durable import find_room, flush_tree, format_bytes, hold_lock, move, remove, write_atomically


@pytest.fixture
def events(monkeypatch):
    """What is flushed and renamed, in order, by name."""
    happened = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        happened.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_replace(source, destination):
        happened.append(("rename", os.path.basename(destination)))
        replace(source, destination)

    monkeypatch.setattr(durable.os, "fsync", record_fsync)
    monkeypatch.setattr(durable.os, "replace", record_replace)
    return happened


def test_a_file_is_flushed_renamed_and_its_name_flushed(tmp_path, events):
    folder = tmp_path / "folder"
    folder.mkdir()
    with write_atomically(folder / "a.txt") as file:
        file.write(b"text")
    assert (folder / "a.txt").read_bytes() == b"text"
    assert events[0][0] == "flush" and events[0][1].startswith(".a.txt.")
    assert events[1:] == [("rename", "a.txt"), ("flush", "folder")]


def test_a_file_that_fails_leaves_the_old_one(tmp_path, events):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), write_atomically(tmp_path / "a.txt") as file:
        file.write(b"half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and events == []
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_tree_is_flushed_from_the_leaves_up_and_both_folders_after_a_move(tmp_path, events):
    (tmp_path / "from" / "step" / "part").mkdir(parents=True)
    (tmp_path / "from" / "step" / "part" / "file").write_text("x")
    (tmp_path / "to").mkdir()
    flush_tree(tmp_path / "from" / "step")
    move(tmp_path / "from" / "step", tmp_path / "to" / "4")
    assert events == [
        ("flush", "file"),
        ("flush", "part"),
        ("flush", "step"),
        ("rename", "4"),
        ("flush", "to"),
        ("flush", "from"),
    ]
    assert (tmp_path / "to" / "4" / "part" / "file").exists()


def test_a_file_system_that_cannot_flush_folders_is_none_to_refuse(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(durable.os, "fsync", refuse_folders)
    with write_atomically(tmp_path / "a.txt") as file:
        file.write(b"text")
    assert (tmp_path / "a.txt").read_bytes() == b"text"


def test_what_is_removed_may_be_a_file_a_folder_or_nothing(tmp_path):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "below" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file", "nothing"):
        remove(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_lock_is_held_by_one_and_passed_on(tmp_path):
    def refuse(holder):
        raise BlockingIOError(holder)

    lock = tmp_path / ".lock"
    held = rf"^process {os.getpid()} on \S+$"
    with hold_lock(lock, refuse), pytest.raises(BlockingIOError, match=held), hold_lock(lock, refuse):
        pytest.fail("two hold the lock")
    with hold_lock(lock, refuse):
        pass


def test_room_is_that_of_the_nearest_folder(tmp_path):
    assert find_room(tmp_path / "a" / "b")[0] == tmp_path
    (tmp_path / "file").write_text("x")
    there, free = find_room(tmp_path / "file")
    assert there == tmp_path and free > 0


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB")]
)
def test_sizes_in_words(size, text):
    assert format_bytes(size) == text
