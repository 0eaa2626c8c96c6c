"""Metrics on Weights & Biases: the same scalars, one W&B run a folder, nothing twice, and never the end of a run."""

import errno
import json
import sys
import types
from dataclasses import replace

import pytest

from domino_jax.run_config import CorpusConfig, DataConfig, DraftSettings, RunConfig, TrainConfig
from domino_jax.runs import wandb_log as wandb_log_module
from domino_jax.runs.folder import RunError, open_run
from domino_jax.runs.monitor import RunMonitor
from domino_jax.runs.training_run import check_run
from domino_jax.runs.wandb_log import WandbLog


class FakeRun:
    def __init__(self, arguments):
        self.arguments, self.logged, self.metrics, self.is_finished = arguments, [], {}, False

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch):
    """The W&B runs that were opened with a package that keeps what it is told."""
    opened = []

    def init(**arguments):
        opened.append(FakeRun(arguments))
        return opened[-1]

    fake = types.ModuleType("wandb")
    fake.init, fake.Settings = init, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return opened


def make_config(tmp_path, project="drafters") -> RunConfig:
    return RunConfig(
        "run",
        str(tmp_path),
        draft=DraftSettings(num_hidden_layers=1),
        data=DataConfig(max_length=144),
        corpus=CorpusConfig(),
        train=TrainConfig(wandb_project=project, eval_max_new_tokens=100),
    )


def start(config, said=None):
    folder = open_run(config)
    monitor = RunMonitor(folder.metrics, folder.root / "tensorboard")
    if config.train.wandb_project:
        monitor.also_log_to(WandbLog(config, folder, (said if said is not None else []).append))
    return monitor


def test_the_scalars_of_tensorboard_go_out_with_a_step_of_their_stage(tmp_path, runs):
    monitor = start(make_config(tmp_path))
    monitor.log("draft", 10, {"loss": 2.0, "accept_rate_by_slot": [0.5, 0.25]})
    monitor.log("held_out", 10, {"tau": 3.0})
    monitor.close()
    (run,) = runs
    assert run.logged == [{"draft/loss": 2.0, "draft/step": 10}, {"held_out/tau": 3.0, "held_out/step": 10}]
    assert run.metrics["draft/*"] == "draft/step" and run.metrics["held_out/*"] == "held_out/step"
    assert run.arguments["project"] == "drafters" and run.arguments["config"]["train"]["log_every"] == 10
    assert run.is_finished


def test_a_run_that_goes_on_continues_its_wandb_run_and_repeats_nothing(tmp_path, runs):
    monitor = start(make_config(tmp_path))
    for step in (10, 20, 30):
        monitor.log("draft", step, {"loss": float(step)})
    monitor.close()
    monitor = start(make_config(tmp_path))
    monitor.drop_rows_after("draft", 10)
    for step in (20, 30, 40):
        monitor.log("draft", step, {"loss": float(step)})
    monitor.close()
    first, second = runs
    assert first.arguments["id"] == second.arguments["id"] and second.arguments["resume"] == "allow"
    assert [values["draft/step"] for values in first.logged + second.logged] == [10, 20, 30, 40]


def test_rows_from_before_it_was_switched_on_are_sent_and_another_project_is_another_run(tmp_path, runs):
    monitor = start(make_config(tmp_path, project=""))
    monitor.log("draft", 10, {"loss": 1.0})
    monitor.close()
    start(make_config(tmp_path)).close()
    start(make_config(tmp_path, "others")).close()
    first, second = runs
    assert first.logged == second.logged == [{"draft/loss": 1.0, "draft/step": 10}]
    assert first.arguments["id"] != second.arguments["id"]


def test_a_failure_is_told_once_and_the_rows_it_lost_are_sent_by_the_next_start(tmp_path, runs, monkeypatch):
    said = []
    monitor = start(make_config(tmp_path), said)
    monitor.log("draft", 10, {"loss": 1.0})

    def fail(values):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(runs[0], "log", fail)
    for step in (20, 30):
        monitor.log("draft", step, {"loss": 0.5})
    monitor.close()
    assert len(said) == 1 and "no route to host" in said[0] and "the run goes on" in said[0]
    start(make_config(tmp_path)).close()
    assert [values["draft/step"] for values in runs[1].logged] == [20, 30]


def test_a_start_without_network_is_told_and_goes_on(tmp_path, runs, monkeypatch):
    def init(**_):
        raise TimeoutError("init timed out")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    said = []
    monitor = start(make_config(tmp_path), said)
    monitor.log("draft", 10, {"loss": 1.0})
    monitor.close()
    assert len(said) == 1 and "init timed out" in said[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("content", ['{"project": "dra', "[]", '{"project": "drafters"}'])
def test_a_damaged_record_of_what_was_sent_is_told_and_ends_no_run(tmp_path, runs, content):
    open_run(make_config(tmp_path)).wandb.write_text(content)
    said = []
    monitor = start(make_config(tmp_path), said)
    monitor.log("draft", 10, {"loss": 1.0})
    monitor.close()
    assert len(said) == 1 and "wandb.json" in said[0] and "the run goes on without it" in said[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("num_written", [0, 1])
def test_a_disk_that_refuses_the_record_ends_no_run(tmp_path, runs, monkeypatch, num_written):
    writes = iter([wandb_log_module.write_text] * num_written)

    def write_or_fail(path, text):
        write = next(writes, None)
        if write is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(wandb_log_module, "write_text", write_or_fail)
    said = []
    monitor = start(make_config(tmp_path), said)
    for step in (10, 20):
        monitor.log("draft", step, {"loss": 1.0})
    monitor.close()
    assert len(said) == 1 and "No space left" in said[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["absent", "a folder of that name"])
def test_a_missing_package_is_found_before_anything_is_built(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(RunError, match=r"wandb is not installed; install the extra \(pip install -e \"\.\[wandb\]\"\)"):
        check_run(make_config(tmp_path))
    check_run(make_config(tmp_path, project=""))
    assert not list(tmp_path.iterdir())


def test_where_metrics_are_shown_may_change_in_a_run_with_results(tmp_path):
    config = make_config(tmp_path, project="")
    folder = open_run(config)
    (folder.checkpoints / "2").mkdir(parents=True)
    open_run(make_config(tmp_path))
    assert json.loads(folder.config.read_text())["train"]["wandb_project"] == "drafters"
    with pytest.raises(RunError, match=r"train\.log_every: stored 10, now 3") as refused:
        open_run(replace(config, train=replace(config.train, log_every=3)))
    assert "wandb_project" not in str(refused.value)


def test_the_real_package_takes_what_it_is_given_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config, said = make_config(tmp_path), []
    for steps in ((10, 20), (20, 30)):
        monitor = start(config, said)
        for step in steps:
            monitor.log("draft", step, {"loss": 1.0 / step, "accept_rate_by_slot": [0.5]})
        monitor.close()
    assert said == []
    sent = json.loads((tmp_path / "run" / "wandb.json").read_text())
    assert sent["project"] == "drafters" and sent["steps"] == {"draft": 30}
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{sent['id']}.wandb"}
    assert b"draft/loss" in b"".join(file.read_bytes() for file in files)
