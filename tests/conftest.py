"""Shared fixtures. The package is imported inside fixtures only: the shape-checking hook must be in place first."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

REPOSITORY = Path(__file__).resolve().parent.parent

MAX_MAPPINGS = 16_000
"""Memory mappings of a test process after which it forgets what it compiled; Linux allows 65 530, then XLA crashes."""


LEVEL = "--xla_backend_optimization_level"
"""How much LLVM optimises what XLA hands to it."""


def compile_quickly(config):
    """Let LLVM optimise nothing in quick tests, which mostly wait for it; XLA's own passes are as always.

    A file of decoding tests took 33 s so, and 48 s with what XLA asks of LLVM for users. XLA_FLAGS may say otherwise.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if os.environ["JAX_PLATFORMS"] == "cpu" and "not slow" in config.option.markexpr and LEVEL not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {LEVEL}=0".strip()


def pytest_configure(config):
    """Keep compiled programs in pytest's cache, for workers, for the processes that tests start and for the next run.

    Tests mostly wait for XLA, which compiles the same small programs again in every process. A program is found by
    its code, its compiler's version and options, so one that has changed is compiled; `--cache-clear` deletes all.
    """
    compile_quickly(config)
    if config.pluginmanager.hasplugin("cacheprovider"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("xla")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what would begin after DOMINO_TESTS_UNTIL, seconds since 1970, so that a run whose time is limited ends."""
    until = os.environ.get("DOMINO_TESTS_UNTIL")
    if until is not None and time.time() > float(until):
        pytest.skip("no time was left (DOMINO_TESTS_UNTIL)")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Free compiled programs after a module where there are many: each holds memory mappings as long as it lives."""
    yield
    forget_where_many()


def forget_where_many() -> None:
    """Free compiled programs where the process has more than `MAX_MAPPINGS`."""
    mappings = Path("/proc/self/maps")
    if mappings.exists() and len(mappings.read_bytes().splitlines()) > MAX_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Directory of golden cases: DOMINO_GOLDEN, else the one beside the tests."""
    return Path(os.environ.get("DOMINO_GOLDEN") or REPOSITORY / "tests" / "golden")
