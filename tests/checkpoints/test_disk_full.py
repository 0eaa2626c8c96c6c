"""A full disk: said with what is needed, free and stored; the steps before are as they were; with room it goes on."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.checkpoints import train_state as train_state_module
from domino_jax.checkpoints.manifest import find_damage
from domino_jax.checkpoints.safetensors_io import CheckpointError
from domino_jax.checkpoints.train_state import TrainCheckpoints

LIKE = {"weight": jnp.zeros((3, 5)), "step": jnp.int32(0)}


def make_state(step: int):
    return {"weight": jnp.full((3, 5), step / 7), "step": jnp.int32(step)}


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = TrainCheckpoints(tmp_path / "run", keep=2, say=pytest.fail)
    checkpoints.save(2, make_state(2), {}, {})
    yield checkpoints
    checkpoints.close()


def assert_only_step_2(checkpoints):
    assert [path.name for path in checkpoints.directory.iterdir()] == ["2"]
    assert find_damage(checkpoints.directory / "2") == []
    restored = checkpoints.restore(LIKE)
    np.testing.assert_array_equal(restored[0]["weight"], make_state(2)["weight"])


def assert_it_goes_on(checkpoints):
    checkpoints.save(4, make_state(4), {}, {})
    assert find_damage(checkpoints.directory / "4") == []
    assert checkpoints.restore(LIKE)[0]["step"] == 4


def test_a_disk_without_room_is_left_alone(checkpoints, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1_000_000, 1_000_000))
        patched.setattr(checkpoints, "_write", pytest.fail)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(4, make_state(4), {}, {})
    assert str(caught.value) == (
        "no room to save step 4: it needs 1 MiB, 977 KiB are free for "
        f"{checkpoints.directory} (a quota or a limit on file sizes may allow less); the latest step stored is 2. "
        "Make room, then the same command goes on"
    )
    assert_only_step_2(checkpoints)
    assert_it_goes_on(checkpoints)


def test_the_room_needed_grows_with_the_state(checkpoints, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 11_000_000))
    with pytest.raises(CheckpointError, match=r"it needs 12\.4 MiB, 10\.5 MiB are free"):
        checkpoints.save(4, {"a": np.zeros(10**6, np.float64), "b": np.zeros(10**6, np.float32)}, {}, {})
    checkpoints.save(4, {"a": np.zeros(10**6, np.float64)}, {}, {})


CALLS = [("fsync", i) for i in (1, 2, 9, 20)] + [("replace", 1), ("replace", 2)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize(("name", "number"), CALLS)
def test_a_write_that_fails_halfway_leaves_the_step_before(checkpoints, monkeypatch, name, number, code):
    original, num_calls = getattr(os, name), 0

    def fail(*arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls == number:
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    said = "no room to save step 4" if code != errno.EIO else r"step 4 cannot be written to .*Input/output error.*Mend"
    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        with pytest.raises(CheckpointError, match=said):
            checkpoints.save(4, make_state(4), {}, {})
    assert num_calls >= number
    assert_only_step_2(checkpoints)
    assert_it_goes_on(checkpoints)


def test_an_error_that_is_not_the_systems_is_raised_as_it_is(checkpoints, monkeypatch):
    def fail(*arguments):
        raise ValueError("ours")

    with monkeypatch.context() as patched:
        patched.setattr(train_state_module, "write_manifest", fail)
        with pytest.raises(ValueError, match="ours"):
            checkpoints.save(4, make_state(4), {}, {})
    assert_only_step_2(checkpoints)


REAL = """
import os, resource, shutil, sys
from collections import namedtuple
import numpy as np
from domino_jax.checkpoints.train_state import TrainCheckpoints
from domino_jax.checkpoints.safetensors_io import CheckpointError

directory, way = sys.argv[1:]
state = lambda step: {"weight": np.random.default_rng(step).normal(size=(300, 1000)), "step": np.int32(step)}
checkpoints = TrainCheckpoints(os.path.join(directory, "run"), 2)
checkpoints.save(2, state(2), {}, {})
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=10**9)  # somebody else fills the disk after the check
if way == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
else:
    with open(os.path.join(directory, "filler"), "wb") as filler:
        filler.write(b"x" * (usage(directory).free - 1_000_000))
try:
    checkpoints.save(4, state(4), {}, {})
except CheckpointError as error:
    print(error)
print(sorted(os.listdir(checkpoints.directory)))
restored = checkpoints.restore(state(0))[0]
assert restored["step"] == 2 and np.array_equal(restored["weight"], state(2)["weight"])
if way == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
else:
    os.remove(os.path.join(directory, "filler"))
again = TrainCheckpoints(os.path.join(directory, "run"), 2)
again.save(4, state(4), {}, {})
restored = again.restore(state(0))[0]
assert restored["step"] == 4 and np.array_equal(restored["weight"], state(4)["weight"])
print("went on")
"""


def run_real(repository, directory, way, *before):
    command = [*before, sys.executable, "-c", REAL, str(directory), way]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    error, stored, last = done.stdout.splitlines()
    assert error.startswith("no room to save step 4: it needs 3.29 MiB, ")
    assert error.endswith("; the latest step stored is 2. Make room, then the same command goes on")
    assert stored == "['2']" and last == "went on"


def test_a_real_limit_on_file_sizes(repository, tmp_path):
    run_real(repository, tmp_path, "limit")


def may_mount() -> bool:
    mount = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not may_mount(), reason="no file system may be mounted here; the limit on file sizes is tested")
def test_a_real_full_file_system(repository, tmp_path):
    script = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"'
    run_real(repository, tmp_path, "fill", "unshare", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path))
