"""Runs the files of `eight_devices` in processes that have eight virtual devices; jax has to know at its start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in Path(__file__).with_name("eight_devices").glob("*.py"))


def run_file(name, marker):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    path = Path(__file__).parent / "eight_devices" / name
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", marker, str(path)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]


@pytest.mark.parametrize("name", FILES)
def test_on_eight_devices(name):
    run_file(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoding.py", "training.py"])
def test_every_mesh_on_eight_devices(name):
    run_file(name, "slow")
