"""A run's folder: parts of the configuration are fixed by results that come from them, and only by those."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from domino_jax.run_config import CorpusConfig, DataConfig, RunConfig, TargetSource
from domino_jax.runs.folder import RunError, hold_run, open_run


def make_config(tmp_path) -> RunConfig:
    return RunConfig(name="run", output_dir=str(tmp_path), corpus=CorpusConfig())


def test_a_mistyped_configuration_is_replaced_while_nothing_was_built(tmp_path):
    config = make_config(tmp_path)
    folder = open_run(config)
    open_run(replace(config, seed=7))
    assert json.loads(folder.config.read_text())["seed"] == 7


def test_a_built_corpus_fixes_what_it_was_built_from(tmp_path):
    config = make_config(tmp_path)
    folder = open_run(config)
    folder.train_chats.parent.mkdir()
    folder.train_chats.write_text("{}\n")
    open_run(replace(config, draft=replace(config.draft, block_size=5)))
    with pytest.raises(RunError, match=r"corpus\.vocab_size: stored 2048, now 512"):
        open_run(replace(config, corpus=CorpusConfig(vocab_size=512)))
    with pytest.raises(RunError, match=r"seed: stored 0, now 1"):
        open_run(replace(config, seed=1))


def test_responses_fix_how_chats_are_read_and_a_checkpoint_fixes_all(tmp_path):
    config = make_config(tmp_path)
    folder = open_run(config)
    folder.train_chats.parent.mkdir()
    folder.train_chats.write_text("{}\n")
    folder.responses.write_text("{}\n")
    with pytest.raises(RunError, match=r"data\.enable_thinking"):
        open_run(replace(config, data=replace(config.data, enable_thinking=True)))
    open_run(replace(config, train=replace(config.train, num_steps=3)))
    (folder.checkpoints / "2").mkdir(parents=True)
    with pytest.raises(RunError, match=r"train\.num_steps: stored 3, now 0"):
        open_run(config)


def with_data(config, **changes):
    return replace(config, data=replace(config.data, **changes))


def test_a_feature_cache_may_be_moved_but_not_given_up_once_it_was_trained_from(tmp_path):
    config = make_config(tmp_path)
    cached = with_data(config, feature_cache="a")
    folder = open_run(cached)
    folder.train_chats.parent.mkdir()
    folder.train_chats.write_text("{}\n")
    folder.responses.write_text("{}\n")
    open_run(config)  # nothing was trained yet
    open_run(with_data(cached, feature_dtype="bfloat16", damaged_shards="skip"))
    open_run(cached)
    (folder.checkpoints / "2").mkdir(parents=True)
    moved = with_data(cached, feature_cache="b")
    open_run(moved)
    assert json.loads(folder.config.read_text())["data"]["feature_cache"] == "b"
    for changed, difference in (
        (config, r"data\.feature_cache: stored 'a directory', now ''"),
        (with_data(moved, feature_dtype="bfloat16"), r"data\.feature_dtype: stored 'float32', now 'bfloat16'"),
        (with_data(moved, damaged_shards="skip"), r"data\.damaged_shards: stored 'rebuild', now 'skip'"),
    ):
        with pytest.raises(RunError, match=difference):
            open_run(changed)


def test_a_run_that_began_without_features_takes_none_up(tmp_path):
    config = make_config(tmp_path)
    (open_run(config).checkpoints / "2").mkdir(parents=True)
    with pytest.raises(RunError, match=r"data\.feature_cache: stored '', now 'a directory'"):
        open_run(with_data(config, feature_cache="a"))


def test_a_folder_that_was_moved_goes_on(tmp_path):
    config = make_config(tmp_path / "full")
    folder = open_run(config)
    (folder.checkpoints / "2").mkdir(parents=True)
    (tmp_path / "roomy").mkdir()
    folder.root.rename(tmp_path / "roomy" / "other")
    moved = open_run(replace(config, output_dir=str(tmp_path / "roomy"), name="other"))
    assert (moved.checkpoints / "2").is_dir()
    assert json.loads(moved.config.read_text())["name"] == "other"


def test_where_the_target_lies_is_free_while_checkpoints_know_it_by_content(tmp_path):
    config = RunConfig(
        name="run", output_dir=str(tmp_path), target=TargetSource("a"), data=DataConfig(train_path="train.jsonl")
    )
    moved = replace(config, target=TargetSource("b"))
    folder = open_run(config)
    folder.best_draft.mkdir()
    with pytest.raises(RunError, match=r"target\.path: stored 'a', now 'b'"):
        open_run(moved)
    (folder.checkpoints / "2").mkdir(parents=True)
    open_run(moved)
    with pytest.raises(RunError, match=r"target\.dtype"):
        open_run(replace(moved, target=TargetSource("b", dtype="bfloat16")))


def test_a_second_process_is_refused_at_once_and_changes_nothing(tmp_path):
    config = make_config(tmp_path)
    with hold_run(config) as folder:
        before = {path: path.stat().st_mtime_ns for path in folder.root.iterdir()}
        other = replace(config, train=replace(config.train, wandb_project="other"))
        refusal = rf"process {os.getpid()} on \S+ works in {folder.root}; wait for its end"
        with pytest.raises(RunError, match=refusal), hold_run(other):
            pytest.fail("two work in one folder")
        assert before == {path: path.stat().st_mtime_ns for path in folder.root.iterdir()}
    with hold_run(other):
        pass


HOLD = """
import sys, time
from domino_jax.run_config import CorpusConfig, RunConfig
from domino_jax.runs.folder import hold_run
with hold_run(RunConfig(name="run", output_dir=sys.argv[1], corpus=CorpusConfig())):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_killed_process_lets_go(tmp_path, repository):
    environment = os.environ | {"PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=r"process \d+ on "), hold_run(make_config(tmp_path)):
            pytest.fail("two work in one folder")
        holder.kill()
        holder.wait()
        with hold_run(make_config(tmp_path)):
            pass
