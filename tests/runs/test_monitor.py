"""Progress and metrics: what a person sees, and rows that stay whole when a run is cut and goes on."""

import json

import pytest
from rich.console import Console

from domino_jax.runs import monitor as monitor_module
from domino_jax.runs.monitor import RunMonitor, read_rows


@pytest.fixture
def monitor(tmp_path):
    monitor = RunMonitor(tmp_path / "metrics.jsonl", tmp_path / "tensorboard")
    yield monitor
    monitor.close()


def count_scalars(tmp_path):
    files = list((tmp_path / "tensorboard").glob("events*"))
    return len(files), sum(file.read_bytes().count(b"draft/loss") for file in files)


def test_rows_after_a_restart_are_not_there_twice(tmp_path, monitor):
    for step in range(1, 5):
        monitor.log("draft", step, {"loss": float(step)})
    monitor.log("target", 9, {"loss": 0.5})
    monitor.drop_rows_after("draft", 2)
    monitor.log("draft", 3, {"loss": 3.5})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [("draft", 1), ("draft", 2), ("target", 9), ("draft", 3)]
    monitor.close()
    assert count_scalars(tmp_path) == (1, 3)


def test_a_row_that_was_cut_does_not_hide_later_ones(tmp_path, monitor):
    monitor.log("draft", 1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "draft", "st')
    monitor.drop_rows_after("draft", 1)
    monitor.log("draft", 2, {"loss": 2.0})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_lines_of_a_log_say_loss_tau_rate_and_time_left(monkeypatch, monitor, capsys):
    now = [100.0]
    monkeypatch.setattr(monitor_module.time, "monotonic", lambda: now[0])
    monitor.console = Console(highlight=False, soft_wrap=True, force_terminal=False)
    with monitor.stage("train the drafter", 40, 10) as progress:
        now[0] += 20
        progress.advance(10, loss=1.5, tau=2.25, **{"tokens/s": 1234.0}, left_out=None)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "train the drafter: 10/40"
    assert said[1] == "train the drafter: 20/40  loss 1.5  tau 2.25  tokens/s 1,234  left 0:40"


def test_a_terminal_gets_a_moving_bar_with_the_same_values(monitor):
    console = Console(force_terminal=True, width=120, record=True, highlight=False)
    monitor.console = console
    with monitor.stage("train the drafter", 2) as progress:
        progress.advance(loss=0.5, tau=3.0)
        progress.advance(loss=0.25, tau=3.5)
    text = console.export_text()
    assert "train the drafter" in text and "2/2" in text and "loss 0.25" in text and "tau 3.5" in text


def test_rows_are_json_with_stage_and_step(tmp_path, monitor):
    monitor.log("draft", 3, {"loss": 1.0, "accept_rate_by_slot": [0.5, 0.25]})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"stage": "draft", "step": 3, "loss": 1.0, "accept_rate_by_slot": [0.5, 0.25]}
