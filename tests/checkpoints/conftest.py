"""The conversion script, as a function of its arguments."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture
def run_script(repository: Path):
    spec = importlib.util.spec_from_file_location(
        "convert_checkpoint", repository / "scripts" / "convert_checkpoint.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
