"""A whole run on a target of a few thousand parameters: resume, reports, refusals."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from domino_jax.checkpoints.huggingface import load_target, save_target
from domino_jax.checkpoints.train_state import TrainCheckpoints
from domino_jax.config import ConfigError
from domino_jax.data.chat_template import load_tokenizer
from domino_jax.data.pipeline import build_dataset
from domino_jax.data.responses import ResponsesError, read_chats, write_chats
from domino_jax.evaluation.metrics import summarise
from domino_jax.run_config import DataConfig, DraftSettings, ObjectiveConfig, RunConfig, TargetSource, TrainConfig
from domino_jax.runs import draft as draft_module
from domino_jax.runs import training_run as training_run_module
from domino_jax.runs.draft import read_held_out, resolve_draft
from domino_jax.runs.errors import EXIT_MISTAKE, EXIT_STOPPED, RunStopped, explain_or_raise
from domino_jax.runs.folder import RunError, hold_run, open_run
from domino_jax.runs.monitor import RunMonitor, read_rows
from domino_jax.runs.provenance import describe_directory, settings_path
from domino_jax.runs.skip_watch import TrainingError
from domino_jax.runs.training_run import cache_features, load_target_model, run_training
from domino_jax.training.step import create_train_state
from tests.runs.late_stop import request_late


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


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Let trainings of this file share their compiled steps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(draft_module, "make_train_step", functools.cache(draft_module.make_train_step))
        yield


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


def test_the_card_holds_the_numbers_of_the_rows_and_of_the_data(material, finished):
    card = (finished / "draft" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "domino_jax" and "base_model" not in front  # a local directory is no hub id
    assert "domino" in front["tags"] and "speculative-decoding" in front["tags"]
    greedy = summarise(read_rows(finished / "report" / "rows_greedy.jsonl"))
    tau = f"| head on | {greedy['tau_prompts']:.3g} | {greedy['tau_rounds']:.3g} |"
    assert tau in card
    for slot in greedy["acceptance_by_slot"]:
        assert f"| {slot.slot} | {slot.share:.3g} |" in card
    speed = summarise(read_rows(finished / "report" / "rows_width_4.jsonl"))["speed_up"]
    assert f"| {speed.ratio:.3g} | {speed.low:.3g} | {speed.high:.3g} |" in card
    num_tokens = build_dataset(
        str(material / "train.jsonl"), load_tokenizer(str(material / "target")), DataConfig(max_length=48), 300, 0
    )[1].num_tokens
    assert f"| rows used | 20 |\n| tokens | {num_tokens:,} |" in card
    assert "not recorded (train.jsonl.settings.json is missing)" in card
    assert f"jax {jax.__version__}" in card and "block size | 4, 4 tokens drafted a round" in card
    assert not re.search(r"\b(None|nan)\b", card)
    assert (finished / "draft_latest" / "README.md").exists()


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


def test_a_damaged_best_checkpoint_is_said_and_the_next_best_exported(material, tmp_path, monkeypatch, capsys):
    """Steps 2, 4 and 6 have tau 3, 1 and 2; of the two that are left the better one is exported."""
    taus = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(draft_module, "measure_tau", lambda *_: {"tau": next(taus)})
    monkeypatch.setattr(training_run_module, "write_report", lambda *_: None)
    config = make_config(material, tmp_path, checkpoint_every=2, eval_every=2, keep_checkpoints=2)
    run_training(config)
    assert f"drafters: {tmp_path / 'run' / 'draft'} (step 2)" in capsys.readouterr().out
    stored = tmp_path / "run" / "checkpoints"
    (stored / "2" / "state" / "_METADATA").unlink()
    run_training(config)
    said = capsys.readouterr().out
    assert f"step 2 in {stored} is damaged: state/_METADATA is missing" in said and "the next best is used" in said
    assert f"drafters: {tmp_path / 'run' / 'draft'} (step 6)" in said
    best, latest = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("draft", "draft_latest"))
    assert all(np.array_equal(best[name], latest[name]) for name in latest)


def test_a_drafter_nothing_is_known_of_is_not_the_best(material, tmp_path, monkeypatch, capsys):
    """tau is 0 where no prompt needed a round, and not a number where decoding went wrong."""
    taus = iter([0.0, float("nan"), 0.0])
    monkeypatch.setattr(draft_module, "measure_tau", lambda *_: {"tau": next(taus)})
    monkeypatch.setattr(training_run_module, "write_report", lambda *_: None)
    run_training(make_config(material, tmp_path, eval_every=2))
    assert f"drafters: {tmp_path / 'run' / 'draft'} (step 6)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "has_logged"), [(RuntimeError("RESOURCE_EXHAUSTED"), False), (KeyboardInterrupt(), True)]
)
def test_a_decode_cut_short_costs_no_step_and_is_made_up_for(
    material, finished, tmp_path, monkeypatch, capsys, error, has_logged
):
    """The step is stored without its tau, and the next start decodes before it trains on: all bits as undisturbed."""
    evaluate = draft_module._Training.evaluate

    def fail(self, state, step):
        if has_logged:
            evaluate(self, state, step)
        raise error

    monkeypatch.setattr(training_run_module, "write_report", lambda *_: None)
    config = make_config(material, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(draft_module._Training, "evaluate", fail)
        with pytest.raises(type(error)):
            run_training(config)
    assert "saved step 3" in capsys.readouterr().out
    run_training(config)
    said = capsys.readouterr().out
    assert "going on from step 3\nstep 3 lacks its tau: decoding the held-out prompts\nsaved step 3\n" in said
    for name in ("draft", "draft_latest"):
        whole, resumed = (load_file(run / name / "model.safetensors") for run in (finished, tmp_path / "run"))
        assert all(np.array_equal(values, resumed[tensor]) for tensor, values in whole.items())
    rows = [without_clock(read_rows(run / "metrics.jsonl")) for run in (finished, tmp_path / "run")]
    assert rows[0] == rows[1]
    for step in ("2", "3", "6"):
        records = [run / "checkpoints" / step / "record" / "metadata" for run in (finished, tmp_path / "run")]
        assert records[0].exists() == records[1].exists()
        if records[0].exists():
            metrics = [json.loads(path.read_text())["metric"] for path in records]
            assert metrics[0] == metrics[1]
    run_training(config)
    assert "lacks its tau" not in capsys.readouterr().out


def test_a_stop_that_comes_late_in_a_step_is_not_said_to_be_saved_there(material, tmp_path, monkeypatch):
    monkeypatch.setattr(draft_module, "shared_stop_requests", request_late)
    with pytest.raises(RunStopped, match="stopped at step 2 of 6 and saved"):
        run_training(make_config(material, tmp_path, checkpoint_every=5))
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_on_them(material, tmp_path, monkeypatch):
    order = []
    flush, save = RunMonitor.flush, TrainCheckpoints.save

    def record_flush(self):
        order.append(("rows", max(row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl"))))
        flush(self)

    def record_save(self, step, *arguments):
        order.append(("step", step))
        return save(self, step, *arguments)

    monkeypatch.setattr(training_run_module, "write_report", lambda *_: None)
    monkeypatch.setattr(RunMonitor, "flush", record_flush)
    monkeypatch.setattr(TrainCheckpoints, "save", record_save)
    config = make_config(material, tmp_path, num_steps=4)
    run_training(replace(config, data=replace(config.data, eval_path="")))
    assert order == [("rows", 2), ("step", 2), ("rows", 3), ("step", 3), ("rows", 4), ("step", 4)]


@pytest.fixture(scope="module")
def movable(material, tmp_path_factory):
    """A run of two steps on its own copy of target and chats."""
    root = tmp_path_factory.mktemp("movable")
    shutil.copytree(material, root / "material")
    config = make_config(root / "material", root / "runs", num_steps=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training_run_module, "write_report", lambda *_: None)
        run_training(config)
    return root, config


def test_chats_edited_below_a_run_are_refused(movable):
    root, config = movable
    for name, error, said in (
        (
            "train",
            ResponsesError,
            r"another stream than .*train\.jsonl: hash of the usable rows was '\w+' and is '\w+'",
        ),
        ("eval", RunError, r"held-out prompts are not those of step 2[^$]*held_out: stored '\w+', now '\w+'"),
    ):
        path = root / "material" / f"{name}.jsonl"
        before = path.read_text()
        path.write_text(before.replace("say", "said", 1))
        with pytest.raises(error, match=said):
            run_training(config)
        path.write_text(before)


def test_a_target_of_another_shape_below_a_run_is_refused(movable):
    root, config = movable
    path = root / "material" / "target"
    shutil.copytree(path, root / "before")
    target, params = load_target(str(path), "float32")
    other = replace(target, num_hidden_layers=3)
    save_target(path, other, {name: leaf for name, leaf in params.items() if name != "layers_3"})
    with pytest.raises(ValueError, match=r"target_layer_ids|num_target_layers: stored 4, now 3"):
        run_training(config)
    other = replace(target, rope_theta=5e5)
    save_target(path, other, params)
    with pytest.raises(
        RunError, match=r"the target .* not those of step 2[^$]*draft\.rope_theta: stored 1000000\.0, now 500000\.0"
    ):
        run_training(config)
    shutil.rmtree(path)
    shutil.copytree(root / "before", path)


def test_other_weights_of_the_same_shapes_or_another_template_below_a_run_are_refused(movable):
    root, config = movable
    path = root / "material" / "target"
    shutil.copytree(path, root / "kept")
    target, params = load_target(str(path), "float32")
    tuned = params | {"norm": params["norm"] * 1.5}
    save_target(path, target, tuned)
    with pytest.raises(
        RunError, match=r"the target .* not those of step 2[^$]*target\.weights: stored '\w+', now '\w+'"
    ):
        run_training(config)
    shutil.rmtree(path)
    shutil.copytree(root / "kept", path)
    (template,) = path.glob("*template*.jinja")
    template.write_text(template.read_text() + "{# as before #}")
    with pytest.raises(RunError, match=r"its tokenizer .*[^$]*tokenizer\.chat_template: stored '\w+', now '\w+'"):
        run_training(config)
    shutil.rmtree(path)
    shutil.copytree(root / "kept", path)


def test_a_target_that_was_moved_is_the_same(movable, capsys):
    root, config = movable
    shutil.copytree(root / "material" / "target", root / "elsewhere")
    run_training(replace(config, target=TargetSource(str(root / "elsewhere"))))
    assert "going on from step 2" in capsys.readouterr().out


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


def test_a_folder_that_another_process_works_in_is_left_alone(material, tmp_path):
    config = make_config(material, tmp_path)
    cached = replace(config, data=replace(config.data, feature_cache=str(tmp_path / "cache")))
    with hold_run(config) as folder:
        for start in (lambda: run_training(config), lambda: cache_features(cached)):
            with pytest.raises(RunError, match=rf"process \d+ on \S+ works in {folder.root}"):
                start()
        assert sorted(path.name for path in folder.root.iterdir()) == [".lock", "config.json"]


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


def test_a_run_says_when_the_answers_are_not_its_targets(material, tmp_path, capsys, monkeypatch):
    for stage in ("train_draft", "write_report", "write_model_cards"):
        monkeypatch.setattr(training_run_module, stage, lambda *_: None)
    data = tmp_path / "chats.jsonl"
    shutil.copyfile(material / "train.jsonl", data)
    config = make_config(material, tmp_path, num_steps=1)
    config = replace(config, data=replace(config.data, train_path=str(data), eval_path=""))
    run_training(config)
    assert f"WARNING: nothing says who wrote the answers in {data}" in capsys.readouterr().out
    writer = describe_directory(material / "target", load_tokenizer(str(material / "target")))
    settings = settings_path(data)
    settings.write_text(json.dumps({"target": writer, "enable_thinking": False}))
    run_training(config)
    assert "WARNING" not in capsys.readouterr().out
    settings.write_text(
        json.dumps({"target": writer | {"weights": "other", "path": "/of/another"}, "enable_thinking": True})
    )
    run_training(config)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")]
    assert len(said) == 2 and "/of/another" in said[0] and "--config.data.enable_thinking=True" in said[1]


def test_updates_that_stay_not_finite_stop_the_run_and_name_the_batch(material, tmp_path, capsys):
    config = make_config(material, tmp_path, num_steps=20, checkpoint_every=20, eval_every=20, max_skipped=3)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e38, warmup_ratio=0.0, clip_norm=0.0))
    with pytest.raises(TrainingError, match=r"3 updates in a row were not finite.*step \d+ \(lines [\d, ]+ of"):
        run_training(config)
    said = capsys.readouterr().out
    assert re.search(r"update skipped: step \d+ \(lines [\d, ]+ of .*\): loss \S+, gradient norm \S+; 2 in a row", said)


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
    assert explain_or_raise(lambda: fail(OSError(errno.ENOSPC, "No space left on device"))) == EXIT_MISTAKE
    assert explain_or_raise(lambda: fail(PermissionError(errno.EACCES, "Permission denied", "x"))) == EXIT_MISTAKE
    assert capsys.readouterr().err.splitlines() == [
        "error: no room; give another folder",
        "saved",
        "error: [Errno 28] No space left on device; make room, then the same command goes on from what is saved",
        "error: [Errno 13] Permission denied: 'x'",
    ]
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
