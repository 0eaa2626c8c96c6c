"""Order of flushes and renames: content first, then the name, then the folder that holds the name."""

import os

import pytest

from domino_jax.checkpoints import durable
from domino_jax.checkpoints.durable import flush_tree, move, write_atomically


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
