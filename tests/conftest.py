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
    """Directory of golden cases: DOMINO_GOLDEN, else the one beside the tests."""
    return Path(os.environ.get("DOMINO_GOLDEN") or REPOSITORY / "tests" / "golden")
