import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from domino_jax.training.loss import zero_sums
from tests import golden_check, golden_draft, golden_files

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


@pytest.fixture
def one_case(tmp_path):
    """A directory with one case, three rounds of drafter C, and the file of its tensors."""
    for name in ("target_tied", "draft/C"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    file = tmp_path / "backbone" / "C.safetensors"
    file.parent.mkdir()
    shutil.copy(GOLDEN / "backbone" / "C.safetensors", file)
    return tmp_path, file


def test_an_intact_copy_passes(one_case, capsys):
    assert golden_check.main([str(one_case[0])]) == 0
    printed = capsys.readouterr().out
    assert "ok   backbone/C" in printed and "1 of 1 cases passed" in printed


def test_one_changed_number_and_one_renamed_tensor_fail(one_case, capsys):
    directory, file = one_case
    tensors = load_file(file)
    tensors["round1.base_logits"] = tensors["round1.base_logits"].copy()
    tensors["round1.base_logits"][0, 0, 7] += 1e-2
    tensors["round2.states_of_gru"] = tensors.pop("round2.gru_states")
    tensors["prompt"] = tensors["prompt_ids"]
    save_file(tensors, file)
    assert golden_check.main([str(directory)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL backbone/C" in printed and "0 of 1 cases passed" in printed
    assert "round1.base_logits differs by" in printed
    assert "round2.states_of_gru is recorded, but nothing here is compared with it" in printed
    assert "\n       prompt is recorded, but nothing" in printed
    assert printed.count("\n       ") == 3


def test_a_damaged_file_fails_its_case_and_the_rest_go_on(one_case, capsys):
    directory, file = one_case
    file.write_bytes(b"no header")
    (directory / "train").mkdir()
    for name in ("lambda_base.json", "target_layer_ids.json"):
        shutil.copy(GOLDEN / "train" / name, directory / "train")
    assert golden_check.main([str(directory)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL backbone/C" in printed and "SafetensorError: " in printed
    assert "2 of 3 cases passed" in printed


@pytest.mark.parametrize("error", [SafetensorError, TypeError, IndexError, AssertionError, RuntimeError])
def test_whatever_a_case_raises_is_its_failure(error):
    def fail():
        raise error("shapes (2, 3) and (4,)")

    result = golden_check.run_case(golden_check.Case("name", fail))
    assert result.failures == [f"{error.__name__}: shapes (2, 3) and (4,)"]


def test_a_recorded_number_of_training_that_nothing_is_compared_with_fails():
    numbers = golden_files.read_json(GOLDEN / "train" / "A.json")["runs"]["gamma_7.lambda_0.5"]
    sums = zero_sums(golden_files.open_draft(GOLDEN / "draft" / "A").config)
    renamed = {**numbers, "mean_accept_len": 2.0, "terms": {**numbers["terms"], "other_num": 1.0}}
    result = golden_check.Result()
    golden_draft.compare_numbers(result, "run", sums, golden_files.Recorded(renamed))
    unread = [sentence for sentence in result.failures if "recorded, but" in sentence]
    assert [sentence.split()[1] for sentence in unread] == ["mean_accept_len", "terms.other_num"]


def test_the_attention_mask_is_found_by_attending():
    """Two anchors, blocks of two: context strictly before the anchor, and the own block."""
    seen = golden_draft.find_attended(np.array([[1, 3]], np.int32), 4, 2)
    first, second = [1, 0, 0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(seen.astype(int), [[[first, first], [second, second]]])
