"""A whole run on a target of a few thousand parameters: resume, reports, refusals."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from domino_jax.checkpoints.train_state import TrainCheckpoints
from domino_jax.config import ConfigError
from domino_jax.data.responses import read_chats, write_chats
from domino_jax.run_config import DataConfig, DraftSettings, ObjectiveConfig, RunConfig, TargetSource, TrainConfig
from domino_jax.runs import draft as draft_module
from domino_jax.runs import training_run as training_run_module
from domino_jax.runs.draft import read_held_out, resolve_draft
from domino_jax.runs.errors import EXIT_MISTAKE, EXIT_STOPPED, RunStopped, explain_or_raise
from domino_jax.runs.folder import RunError, open_run
from domino_jax.runs.monitor import RunMonitor, read_rows
from domino_jax.runs.training_run import load_target_model, run_training
from domino_jax.training.step import create_train_state


def make_config(material, output_dir, **train) -> RunConfig:
    steps = {"num_steps": 6, "log_every": 1, "checkpoint_every": 2, "eval_every": 3} | train
    return RunConfig(
        name="run",
        output_dir=str(output_dir),
        target=TargetSource(str(material / "target")),
        draft=DraftSettings(num_hidden_layers=1, block_size=4, gru_hidden_dim=8, emb_dim=4),
        data=DataConfig(
            str(material / "train.jsonl"), str(material / "eval.jsonl"), max_length=48, batch_size=4, micro_steps=2
        ),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=2),
        train=TrainConfig(eval_prompts=2, eval_max_new_tokens=8, **steps),
    )


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    run_training(make_config(material, output))
    return output / "run"


def without_clock(rows):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def test_a_stopped_run_goes_on_to_the_same_bits(material, finished, tmp_path, monkeypatch):
    """Stop at a step that is no checkpoint step; the second process-like start equals the undisturbed run."""
    config = make_config(material, tmp_path)
    log = RunMonitor.log

    def log_and_stop(self, stage, step, values):
        log(self, stage, step, values)
        if stage == "draft" and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RunMonitor, "log", log_and_stop)
        with pytest.raises(RunStopped, match=r"step [34] of 6"):
            run_training(config)
    assert not (tmp_path / "run" / "draft").exists()
    run_training(config)
    for name in ("draft", "draft_latest"):
        whole = load_file(finished / name / "model.safetensors")
        resumed = load_file(tmp_path / "run" / name / "model.safetensors")
        assert whole.keys() == resumed.keys()
        for tensor, values in whole.items():
            np.testing.assert_array_equal(values, resumed[tensor], err_msg=tensor)
    whole_rows, rows = read_rows(finished / "metrics.jsonl"), read_rows(tmp_path / "run" / "metrics.jsonl")
    assert without_clock(whole_rows) == without_clock(rows)


def test_a_finished_run_holds_what_was_promised(finished):
    report = (finished / "report" / "report.md").read_text()
    for name in ("losses.png", "tau.png", "acceptance_by_slot.png", "samples.html", "rows_greedy.jsonl"):
        assert (finished / "report" / name).stat().st_size > 0, name
    assert "4 of 4" in report and "Best block width here" in report
    assert json.loads((finished / "config.json").read_text())["train"]["num_steps"] == 6
    assert list((finished / "tensorboard").glob("events*"))
    held_out = [row for row in read_rows(finished / "metrics.jsonl") if row["stage"] == "held_out"]
    assert [row["step"] for row in held_out] == [3, 6]
    assert all(1 <= row["tau"] <= 5 and 1 <= row["tau_head_off"] <= 5 for row in held_out)


def test_the_best_drafter_is_kept_when_a_later_one_is_worse(material, tmp_path, monkeypatch):
    """tau falls from the first decode to the last: the exported drafter is the one of step 3, the latest that of 6."""
    taus = iter([3.0, 2.0])
    monkeypatch.setattr(draft_module, "measure_tau", lambda *_: {"tau": next(taus)})
    monkeypatch.setattr(training_run_module, "write_report", lambda *_: None)
    run_training(make_config(material, tmp_path))
    shorter = make_config(material, tmp_path / "shorter", num_steps=6, eval_every=6)
    taus = iter([1.0])
    run_training(shorter)
    best, latest = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("draft", "draft_latest"))
    last = load_file(tmp_path / "shorter" / "run" / "draft" / "model.safetensors")
    assert all(np.array_equal(latest[name], last[name]) for name in latest)
    assert any(not np.array_equal(best[name], latest[name]) for name in best)
    config = make_config(material, tmp_path)
    target = load_target_model(config, open_run(config))
    like = create_train_state(resolve_draft(config, target), config.optimizer, jax.random.key(0))
    stored = TrainCheckpoints(tmp_path / "run" / "checkpoints", 2)
    state, _, _ = stored.restore(like, 3)
    stored.close()
    np.testing.assert_array_equal(best["norm.weight"], state.params["backbone"]["norm"])


def test_a_prompt_that_was_left_out_does_not_shift_the_others(material, tmp_path):
    chats = [messages for _, messages in read_chats(material / "eval.jsonl")]
    long = [{"role": "user", "content": "alpha " * 60}, {"role": "assistant", "content": "x"}]
    path = tmp_path / "eval.jsonl"
    write_chats(path, [chats[0], long, chats[1]])
    with path.open("a") as file:
        file.write("{broken\n")
    config = make_config(material, tmp_path)
    target = load_target_model(config, open_run(config))
    said = []
    monitor = RunMonitor(None, None)
    monitor.say = said.append
    held_out = read_held_out(config, str(path), target, 10, monitor)
    assert held_out.line_nos == [1, 3]
    assert any("1 skipped" in line for line in said) and any("1 prompts of more than" in line for line in said)
    strict = replace(config, data=replace(config.data, bad_rows="fail"))
    with pytest.raises(ValueError, match=r"eval\.jsonl:4: malformed JSON"):
        read_held_out(strict, str(path), target, 10, monitor)


def test_a_missing_file_of_chats_is_found_first_and_can_be_mended(material, tmp_path):
    config = make_config(material, tmp_path)
    wrong = replace(config, data=replace(config.data, eval_path=str(tmp_path / "none.jsonl")))
    with pytest.raises(RunError, match=r"data\.eval_path is '.*none\.jsonl', which is no file"):
        run_training(wrong)
    open_run(wrong)
    open_run(config)


def test_a_finished_run_is_left_alone(material, finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "report").iterdir()}
    run_training(make_config(material, finished.parent))
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "report").iterdir()}


def test_another_configuration_is_refused_with_the_difference(material, finished):
    config = make_config(material, finished.parent)
    changed = replace(config, draft=replace(config.draft, block_size=5))
    with pytest.raises(RunError, match=r"draft\.block_size: stored 4, now 5"):
        run_training(changed)


def test_sequences_longer_than_the_context_are_refused(material, tmp_path):
    config = make_config(material, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.max_length is 97; the context of the target .* holds 96 tokens"):
        run_training(replace(config, data=replace(config.data, max_length=97)))


def test_no_held_out_chats_gives_a_report_of_curves(material, tmp_path):
    config = make_config(material, tmp_path, num_steps=2)
    run_training(replace(config, data=replace(config.data, eval_path="")))
    assert "nothing was decoded" in (tmp_path / "run" / "report" / "report.md").read_text()
    assert (tmp_path / "run" / "draft" / "model.safetensors").exists()


def test_a_run_says_what_it_left_out_of_the_data(material, tmp_path, capsys):
    data = tmp_path / "chats.jsonl"
    data.write_text((material / "train.jsonl").read_text() + 'not json\n{"messages": []}\n')
    config = make_config(material, tmp_path, num_steps=1)
    config = replace(config, data=replace(config.data, train_path=str(data), eval_path="", max_length=24))
    for _ in range(2):
        run_training(config)
        said = capsys.readouterr().out
        assert "data: 20 rows (20 cut to max_length 24)" in said
        log = tmp_path / "run" / "bad_rows.jsonl"
        assert "20 rows used, 2 skipped" in said and str(log) in said
        assert [(row["line"], row["reason"]) for row in read_rows(log)] == [(21, "malformed JSON"), (22, "no messages")]


def test_a_run_in_buckets_compiles_once_a_width(material, tmp_path, capsys):
    """19 rows in 2 widths for 1.5 epochs: 28 rows, 7 batches of 4; a long answer sits in the wide bucket."""
    chats = [messages for _, messages in read_chats(str(material / "train.jsonl"), None)][:19]
    for messages in chats[:8]:
        messages[1]["content"] += " and so on and so on"
    write_chats(tmp_path / "train.jsonl", chats)
    config = make_config(material, tmp_path, num_steps=0, num_epochs=1.5, eval_every=100)
    data = replace(
        config.data, train_path=str(tmp_path / "train.jsonl"), eval_path="", max_length=96, bucket_widths=(40,)
    )
    run_training(replace(config, data=data))
    said = capsys.readouterr().out
    assert "rows by padded length: 11 of up to 40, 8 of up to 96 tokens" in said
    assert [said.count(f"compiled for batches padded to {width} tokens") for width in (40, 96)] == [1, 1]
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "draft"]
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert all(np.isfinite(row["loss"]) and row["num_blocks"] > 0 for row in rows)


def test_how_a_run_ends(capsys):
    def fail(error):
        raise error

    assert explain_or_raise(lambda: None) == 0
    assert explain_or_raise(lambda: fail(RunError("no room; give another folder"))) == EXIT_MISTAKE
    assert explain_or_raise(lambda: fail(RunStopped("saved"))) == EXIT_STOPPED
    assert capsys.readouterr().err.splitlines() == ["error: no room; give another folder", "saved"]
    with pytest.raises(ValueError, match="ours"):
        explain_or_raise(lambda: fail(ValueError("ours")))


def call(repository, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_train_tells_mistakes_in_a_sentence(material, repository, tmp_path):
    qwen3 = ["train.py", "--config", "configs/qwen3.py:8b", f"--config.output_dir={tmp_path}"]
    no_data = call(repository, *qwen3, "--config.data.train_path=")
    assert no_data.returncode == EXIT_MISTAKE and "data.train_path is empty" in no_data.stderr
    wrong_name = call(repository, *qwen3, "--config.train.num_step=3")
    assert wrong_name.returncode == EXIT_MISTAKE and "num_steps" in wrong_name.stderr
    no_target = call(repository, *qwen3, "--config.data.train_path=x.jsonl", f"--config.target.path={tmp_path}")
    assert no_target.returncode == EXIT_MISTAKE and no_target.stderr.startswith("error: ")
    for failed in (no_data, wrong_name, no_target):
        assert "Traceback" not in failed.stderr
