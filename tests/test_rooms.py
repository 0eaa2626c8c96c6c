"""Who may import whom: the contracts of pyproject.toml hold, and they notice when one is broken."""

import os
import shutil
import subprocess
import sys

import pytest

ENTRY_POINTS = ("train.py", "bench.py")
MAX_ENTRY_POINT_LINES = 150


def lint_imports(folder):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def package_copy(repository, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository / "domino_jax", tmp_path / "domino_jax", ignore=ignored)
    shutil.copy(repository / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_hold(package_copy):
    result = lint_imports(package_copy)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "module, line",
    [
        ("ops/attention.py", "import domino_jax.models.qwen3"),
        ("training/loss.py", "import domino_jax.data.pipeline"),
        ("data/pipeline.py", "import jax.numpy"),
        ("config.py", "import jax"),
        ("models/qwen3.py", "import torch"),
        ("training/step.py", "import safetensors.numpy"),
    ],
)
def test_a_broken_rule_is_noticed(package_copy, module, line):
    path = package_copy / "domino_jax" / module
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    result = lint_imports(package_copy)
    assert result.returncode == 1
    assert "BROKEN" in result.stdout


def test_a_room_without_a_place_is_noticed(package_copy):
    (package_copy / "domino_jax" / "misc.py").write_text('"""A room nobody planned."""\n', encoding="utf-8")
    assert lint_imports(package_copy).returncode == 1


def test_every_room_is_a_package(repository):
    rooms = [path for path in (repository / "domino_jax").iterdir() if path.is_dir() and any(path.glob("*.py"))]
    assert [room.name for room in rooms if not (room / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_stay_short(repository, name):
    assert len((repository / name).read_text(encoding="utf-8").splitlines()) <= MAX_ENTRY_POINT_LINES
