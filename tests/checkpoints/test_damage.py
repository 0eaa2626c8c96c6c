"""Damaged checkpoints: the file is named, the folder is kept aside, the step before is used."""

import errno
import os
import random
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.checkpoints.manifest import MANIFEST_FILE, find_damage, write_manifest
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.checkpoints.train_state import TrainCheckpoints

LIKE = {"weight": jnp.zeros((3, 5)), "step": jnp.int32(0)}


def make_state(step: int):
    return {"weight": jnp.full((3, 5), step / 7), "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Steps 2 and 4 of a run, as files."""
    directory = tmp_path_factory.mktemp("stored") / "run"
    checkpoints = TrainCheckpoints(directory, keep=2)
    for step, metric in ((2, 1.5), (4, 2.5)):
        checkpoints.save(step, make_state(step), {"position": step}, {"config": {"seed": 3}}, metric)
    checkpoints.close()
    return directory


@pytest.fixture
def directory(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "run")
    return tmp_path / "run"


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def truncate(path, generator):
    content = path.read_bytes()
    keep = generator.randrange(len(content))
    path.write_bytes(content[:keep])
    return f"{len(content) - keep} bytes shorter"


def flip_bit(path, generator):
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    return "has changed"


def extend(path, generator):
    path.write_bytes(path.read_bytes() + b"\n")
    return "1 bytes longer"


def delete(path, generator):
    path.unlink()
    return "is missing"


def replace_by_folder(path, generator):
    path.unlink()
    path.mkdir()
    return "is a folder|longer|shorter"


def read(directory, keep=2):
    """Return what the latest step gives, with what was said."""
    said = []
    checkpoints = TrainCheckpoints(directory, keep, said.append)
    try:
        return checkpoints.restore(LIKE), said
    finally:
        checkpoints.close()


def assert_step_2_is_used(directory, file, problem):
    """The damage of step 4 is said, nothing of it is lost, and step 2 is restored whole."""
    damaged = {name: (directory / "4" / name).read_bytes() for name in files_of(directory / "4")}
    restored, said = read(directory)
    assert restored is not None
    np.testing.assert_array_equal(restored[0]["weight"], make_state(2)["weight"])
    assert restored[0]["step"] == 2 and restored[1:] == ({"position": 2}, {"config": {"seed": 3}})
    assert len(said) == 2
    assert f"step 4 in {directory} is damaged: " in said[0]
    assert re.search(rf"{re.escape(file)} [^;]*({problem})", said[0]), said[0]
    assert said[1] == "the latest step stored is 2"
    aside = directory / "damaged" / "4"
    assert {name: (aside / name).read_bytes() for name in files_of(aside)} == damaged
    assert not (directory / "4").exists()
    assert read(directory)[1] == []


def test_what_is_saved_is_whole(stored):
    for step in ("2", "4"):
        assert find_damage(stored / step) == []
        assert len(files_of(stored / step)) > 8
    restored, said = read(stored)
    assert restored[0]["step"] == 4 and said == []


@pytest.mark.parametrize("damage", [truncate, flip_bit, delete, extend, replace_by_folder])
def test_every_damaged_file_is_named_and_the_step_before_is_used(stored, tmp_path, damage):
    names = files_of(stored / "4")
    assert MANIFEST_FILE in names and "_CHECKPOINT_METADATA" in names
    for i, name in enumerate(names):
        directory = tmp_path / str(i)
        shutil.copytree(stored, directory)
        problem = damage(directory / "4" / name, random.Random(i))
        if name == MANIFEST_FILE and damage in (truncate, extend):
            problem = "has changed"
        assert_step_2_is_used(directory, name, problem)


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_anywhere_are_noticed(directory, seed):
    """Random bytes are put over a random place of a random file, which may grow by it or keep its length."""
    generator = random.Random(seed)
    name = generator.choice(files_of(directory / "4"))
    path = directory / "4" / name
    content = bytearray(path.read_bytes())
    first = generator.randrange(len(content))
    noise = generator.randbytes(generator.randint(1, 64))
    if content[first : first + len(noise)] == noise:
        noise = bytes(byte ^ 1 for byte in noise)
    content[first : first + len(noise)] = noise
    path.write_bytes(content)
    assert_step_2_is_used(directory, name, "has changed|longer")


def test_a_missing_part_is_named(directory):
    shutil.rmtree(directory / "4" / "state")
    restored, said = read(directory)
    assert restored[0]["step"] == 2
    assert re.search(r"state/\S+ is missing; .*; and \d+ more files", said[0])


def test_the_files_of_another_step_are_not_taken(directory):
    shutil.rmtree(directory / "4")
    shutil.copytree(directory / "2", directory / "4")
    assert_step_2_is_used(directory, MANIFEST_FILE, "is that of 2")


def test_a_step_that_is_asked_for_is_refused_and_left_in_place(directory):
    delete(directory / "2" / "state" / "_METADATA", None)
    checkpoints = TrainCheckpoints(directory, 2)
    with pytest.raises(CheckpointError, match=r"step 2 in .* is damaged: state/_METADATA is missing"):
        checkpoints.restore(LIKE, 2)
    checkpoints.close()
    assert (directory / "2").exists()


def test_with_none_left_the_run_is_stopped_until_somebody_decides(directory):
    for step in ("2", "4"):
        truncate(directory / step / "_CHECKPOINT_METADATA", random.Random(0))
    for _ in range(2):  # never from the first step again by itself
        with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged; put a copy .* or remove .*damaged"):
            read(directory)
    assert sorted(path.name for path in (directory / "damaged").iterdir()) == ["2", "4"]
    shutil.rmtree(directory / "damaged")
    assert read(directory) == (None, [])


def test_a_step_damaged_twice_is_kept_twice(directory):
    for _ in range(2):
        flip_bit(directory / "4" / MANIFEST_FILE, random.Random(1))
        read(directory)
        checkpoints = TrainCheckpoints(directory, 2)
        checkpoints.save(4, make_state(4), {}, {})
        checkpoints.close()
    assert sorted(path.name for path in (directory / "damaged").iterdir()) == ["4", "4.2"]
    assert read(directory)[0][0]["step"] == 4


def test_a_damaged_best_step_gives_way_to_the_next_best(directory):
    flip_bit(next((directory / "4" / "state" / "d").iterdir()), random.Random(2))
    said = []
    checkpoints = TrainCheckpoints(directory, 2, said.append)
    step, state = checkpoints.restore_best(LIKE)
    assert step == 2
    np.testing.assert_array_equal(state["weight"], make_state(2)["weight"])
    assert "step 4" in said[0] and "state/d/" in said[0] and "next best" in said[1]
    flip_bit(directory / "2" / "state" / "_sharding", random.Random(2))
    assert checkpoints.restore_best(LIKE) is None
    checkpoints.close()


def test_a_metric_that_cannot_be_trusted_is_not_ranked_while_saving(directory):
    flip_bit(directory / "2" / "record" / "metadata", random.Random(3))
    said = []
    checkpoints = TrainCheckpoints(directory, 2, said.append)
    checkpoints.save(6, make_state(6), {}, {}, 0.5)
    assert checkpoints.best_step() == 4
    checkpoints.close()
    assert "step 2" in said[0] and "record/metadata has changed" in said[0]


def test_dropping_a_step_cut_short_leaves_no_damaged_step(directory, monkeypatch):
    checkpoints = TrainCheckpoints(directory, 1)

    def die(path):
        (path / "_CHECKPOINT_METADATA").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(6, make_state(6), {}, {}, 3.5)
    checkpoints.close()
    restored, said = read(directory)
    assert restored[0]["step"] == 6 and said == []
    assert not (directory / "damaged").exists()


def test_a_manifest_lists_every_file_below(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"")
    (tmp_path / "d").write_bytes(b"text")
    write_manifest(tmp_path, tmp_path.name)
    assert find_damage(tmp_path) == []
    (tmp_path / "a" / "b" / "c").write_bytes(b"x")
    (tmp_path / "d").write_bytes(b"tex")
    assert find_damage(tmp_path) == ["a/b/c is 1 bytes longer than it was", "d is 1 bytes shorter than it was"]
    assert find_damage(tmp_path, "a/") == ["a/b/c is 1 bytes longer than it was"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("name", [MANIFEST_FILE, "state/_METADATA"])
def test_what_the_system_refuses_to_read_is_no_damage(directory, monkeypatch, code, name):
    """An error that passes must not move every step aside."""
    unreadable = directory / "4" / name
    open_path = Path.open

    def refuse(path, *arguments, **options):
        if path == unreadable:
            raise OSError(code, os.strerror(code))
        return open_path(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointError, match=rf"4/{name} cannot be read now \({os.strerror(code)}\)"):
            read(directory)
    assert not (directory / "damaged").exists()
    assert read(directory)[0][0]["step"] == 4
