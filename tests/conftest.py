"""Shared fixtures. The package is imported inside fixtures only: the shape-checking hook must be in place first."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Directory of golden cases: DOMINO_GOLDEN, else beside the repository; the test is skipped without one."""
    named = os.environ.get("DOMINO_GOLDEN")
    candidate = Path(named) if named else REPOSITORY.parent / "shared" / "golden"
    if not (candidate / "manifest.json").is_file():
        pytest.skip("no golden data: set DOMINO_GOLDEN to a directory that holds manifest.json")
    return candidate
