"""The embedded default from corpus to report at a size of seconds, killed in every stage and started again."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from domino_jax.data.stdlib_chats import TASKS
from domino_jax.run_config import CorpusConfig, RunConfig
from domino_jax.runs import embedded as embedded_module
from domino_jax.runs.embedded import build_target
from domino_jax.runs.errors import RunStopped
from domino_jax.runs.folder import RunError, open_run
from domino_jax.runs.monitor import RunMonitor, read_rows
from tests.runs.late_stop import request_late

STAGES = ("train the target:", "responses:", "train the drafter:", "report: greedy:")


@pytest.fixture(scope="module")
def undisturbed(start_tiny, finish, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    said = finish(start_tiny(output))
    return output / "tiny", said


@pytest.fixture(scope="module")
def build(material):
    """Train a target of a few thousand parameters for 8 steps, saved every other; return folder and messages."""
    corpus = CorpusConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_length=64,
        bucket_widths=(48,),
        tokens_per_batch=192,
        target_steps=8,
        response_max_new_tokens=8,
    )

    def build(output, stop_at=0):
        config = RunConfig(name="run", output_dir=str(output), corpus=corpus)
        folder = open_run(config)
        if not folder.train_chats.exists():
            folder.train_chats.parent.mkdir()
            shutil.copyfile(material / "train.jsonl", folder.train_chats)
        said, monitor = [], RunMonitor(folder.metrics, None)
        monitor.say = said.append
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(embedded_module, "_CHECKPOINT_EVERY", 2)
            patched.setattr(embedded_module, "_LOG_EVERY", 1)
            if stop_at:
                log = monitor.log

                def log_and_stop(stage, step, values):
                    log(stage, step, values)
                    if step == stop_at:
                        os.kill(os.getpid(), signal.SIGTERM)

                patched.setattr(monitor, "log", log_and_stop)
            build_target(config, corpus, folder, monitor)
        return folder, said

    return build


@pytest.fixture(scope="module")
def target(build, tmp_path_factory):
    folder, _ = build(tmp_path_factory.mktemp("target"))
    return (folder.target / "model.safetensors").read_bytes()


def test_a_damaged_checkpoint_of_the_target_gives_way_to_the_one_before(build, target, tmp_path):
    with pytest.raises(RunStopped, match="stopped at step 5 of the target and saved"):
        build(tmp_path, stop_at=5)
    stored = tmp_path / "run" / "target_checkpoints"
    assert sorted(path.name for path in stored.iterdir()) == ["4", "5"]
    with (stored / "5" / "state" / "_METADATA").open("ab") as file:
        file.write(b"x")
    folder, said = build(tmp_path)
    assert f"step 5 in {stored} is damaged: state/_METADATA is 1 bytes longer than it was" in said[1]
    assert said[3] == "going on from step 4"
    assert (folder.target / "model.safetensors").read_bytes() == target
    assert [row["step"] for row in read_rows(folder.metrics)] == list(range(1, 9))


def test_a_stop_that_comes_late_in_a_step_is_not_said_to_be_saved_there(build, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_module, "stop_requests", request_late)
    with pytest.raises(RunStopped, match="stopped at step 2 of the target and saved"):
        build(tmp_path)
    assert (tmp_path / "run" / "target_checkpoints" / "2").is_dir()


def test_chats_edited_below_the_target_are_refused(build, tmp_path):
    with pytest.raises(RunStopped):
        build(tmp_path, stop_at=3)
    chats = tmp_path / "run" / "corpus" / "train.jsonl"
    before = chats.read_text()
    chats.write_text(before.replace("say", "said", 1))
    with pytest.raises(
        RunError, match=r"train\.jsonl has changed since the target's checkpoints were saved \(hash \w+"
    ):
        build(tmp_path)


@pytest.mark.slow
def test_a_run_leaves_everything_that_was_promised(undisturbed):
    folder, said = undisturbed
    assert "corpus.num_hidden_layers: 3" in said  # the resolved configuration is printed
    report = (folder / "report" / "report.md").read_text()
    for part in ("6 of 6", "exact match", "repeated 4-grams", "Best block width here", "head on"):
        assert part in report, part
    assert report in said and "WARNING" not in said
    assert json.loads((folder / "responses.jsonl.settings.json").read_text())["target"]["path"] == str(
        folder / "target"
    )
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
