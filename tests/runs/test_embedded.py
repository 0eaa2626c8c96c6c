"""The embedded default from corpus to report at a size of seconds, killed in every stage and started again."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from domino_jax.data.stdlib_chats import TASKS
from domino_jax.runs.monitor import read_rows

STAGES = ("train the target:", "responses:", "train the drafter:", "report: greedy:")


@pytest.fixture(scope="module")
def undisturbed(start_tiny, finish, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    said = finish(start_tiny(output))
    return output / "tiny", said


@pytest.mark.slow
def test_a_run_leaves_everything_that_was_promised(undisturbed):
    folder, said = undisturbed
    assert "corpus.num_hidden_layers: 3" in said  # the resolved configuration is printed
    report = (folder / "report" / "report.md").read_text()
    for part in ("6 of 6", "exact match", "repeated 4-grams", "Best block width here", "head on"):
        assert part in report, part
    assert report in said
    for name in ("target/model.safetensors", "target/tokenizer.json", "draft/model.safetensors", "responses.jsonl"):
        assert (folder / name).stat().st_size > 0, name
    tasks = {row["task"] for row in read_rows(folder / "corpus" / "train.jsonl")}
    assert tasks == set(TASKS)
    assert len(read_rows(folder / "responses.jsonl")) == 24


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_bits(start_tiny, finish, undisturbed, tmp_path):
    whole, _ = undisturbed
    for marker in STAGES:
        process = start_tiny(tmp_path)
        for line in process.stdout:
            if line.startswith(marker):
                break
        process.kill()
        process.stdout.close()
        process.wait(timeout=60)
    finish(start_tiny(tmp_path))
    folder = tmp_path / "tiny"
    for name in ("target", "draft", "draft_latest"):
        before, after = load_file(whole / name / "model.safetensors"), load_file(folder / name / "model.safetensors")
        assert before.keys() == after.keys()
        for tensor, values in before.items():
            np.testing.assert_array_equal(values, after[tensor], err_msg=f"{name} {tensor}")
    assert (whole / "responses.jsonl").read_bytes() == (folder / "responses.jsonl").read_bytes()

    def rows(root):
        return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_rows(root / "metrics.jsonl")]

    assert rows(whole) == rows(folder)


@pytest.mark.slow
def test_mistakes_are_found_before_anything_is_built(start_tiny, tmp_path):
    for override, said in (
        ({"draft.target_layer_ids": "9"}, "the target has layers 0 .. 2"),
        ({"train.eval_max_new_tokens": 320}, "prompt and answer share corpus.max_length 320"),
        ({"data.max_length": 400}, "data.max_length is 400"),
        ({"draft.intermediate_size": 64}, "intermediate_size is 64, the target's is 48"),
        ({"draft.block_sise": 3}, "block_size"),
    ):
        process = start_tiny(tmp_path, **override)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 2 and said in out and "Traceback" not in out, out
    assert not (tmp_path / "tiny").exists()
