import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests import golden_check

GOLDEN = Path(__file__).parent / "golden"
CASES = list(golden_check.find_cases(GOLDEN))


def test_every_kind_is_there():
    kinds = {case.name.split("/")[0] for case in CASES}
    assert kinds == {"target_io", "backbone", "spec_generate", "train"}
    assert len(CASES) == 99


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(case):
    with jax.default_matmul_precision("highest"):
        result = golden_check.run_case(case)
    assert not result.failures


def test_a_wrong_number_fails():
    result = golden_check.Result()
    result.compare("logits", [1.0, 2.0], [1.0, 2.001])
    result.equal("ids", [1, 2], [1, 3])
    result.compare("nan", [float("nan")], [0.0])
    assert len(result.failures) == 3
    assert "ids differs, first at (1,)" in result.failures[1]


def test_a_directory_of_another_layout_is_refused(tmp_path):
    script = Path(golden_check.__file__)
    done = subprocess.run([sys.executable, script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no case" in done.stderr


def test_a_case_with_missing_files_fails_by_name(tmp_path):
    (tmp_path / "target_io").mkdir()
    (tmp_path / "target_io" / "other.safetensors").write_bytes(b"")
    (case,) = golden_check.find_cases(tmp_path)
    result = golden_check.run_case(case)
    assert result.failures and "Error" in result.failures[0]
