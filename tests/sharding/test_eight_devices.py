"""Runs the files of `eight_devices` in a process that has eight virtual devices; jax has to know at its start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).with_name("eight_devices")
FILES = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "conftest.py"})
SLOW_FILES = [file for file in FILES if file.stem != "table"]  # whose tests are all quick

FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
"""Of two levels the later holds; what LLVM optimises says nothing about meshes, and they are many programs."""


def run_files(files, marker):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("DOMINO_TESTS_UNTIL", None)  # what has begun runs to its end
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-m", marker]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout


def test_a_few_meshes():
    run_files(FILES, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", SLOW_FILES, ids=lambda path: path.stem)
def test_every_mesh(file):
    run_files([file], "slow")
