"""The ablation script: its variants are valid, its table is computed from rows, an interrupted grid goes on."""

import importlib.util
import json
import shutil

import numpy as np
import pytest

from domino_jax.config import to_json_dict
from domino_jax.config_flags import load_config_file
from domino_jax.run_config import CorpusConfig, DataConfig, DraftSettings, ObjectiveConfig, RunConfig, TrainConfig
from domino_jax.runs.errors import EXIT_MISTAKE, explain_or_raise
from domino_jax.runs.folder import RunError
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_ablations", REPOSITORY / "scripts" / "run_ablations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_row(variant, seed, tau, **more):
    return {"variant": variant, "seed": seed, "steps": 2, "batch_size": 4, "tau": tau, "tau_rounds": tau} | more


def test_every_variant_is_a_configuration_of_its_own(script):
    base = script.change_config(load_config_file(str(REPOSITORY / "configs" / "tiny.py")), script.PUBLISHED)
    configs = [
        script.change_config(base, {k: v for k, v in changes.items() if k != "data.train_path"})
        for changes in script.VARIANTS.values()
    ]
    # The default and the one that differs in its data alone are the same configuration.
    assert len(set(configs)) == len(configs) - 1
    assert configs[list(script.VARIANTS).index(script.BASELINE)] == base


def test_means_intervals_and_paired_differences(script):
    taus = {script.BASELINE: [4.0, 5.0, 6.0], "KL": [4.5, 5.6, 6.4]}
    rows = [make_row(name, seed, tau) for name, values in taus.items() for seed, tau in enumerate(values)]
    mean, half = script.mean_interval(taus[script.BASELINE])
    assert (mean, half) == (5.0, pytest.approx(4.303 / np.sqrt(3), rel=1e-3))
    difference, half = script.compare(rows, "KL", "tau", script.BASELINE)
    assert difference == pytest.approx(0.5)
    assert half == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=1e-3)
    table = script.render_results(rows)
    assert "+0.500 ± 0.248" in table
    assert script.compare(rows[:4], "KL", "tau", script.BASELINE) == (0.5, None)
    assert script.compare(rows, "TV", "tau", script.BASELINE) is None


@pytest.mark.slow
def test_an_interrupted_grid_goes_on(script, material, tmp_path, monkeypatch):
    run, output = tmp_path / "run", tmp_path / "results"
    (run / "corpus").mkdir(parents=True)
    shutil.copytree(material / "target", run / "target")
    shutil.copy(material / "train.jsonl", run / "responses.jsonl")
    shutil.copy(material / "train.jsonl", run / "corpus" / "train.jsonl")
    shutil.copy(material / "eval.jsonl", run / "corpus" / "eval.jsonl")
    config = RunConfig(
        name="tiny",
        corpus=CorpusConfig(num_draft_chats=20),
        draft=DraftSettings(
            num_hidden_layers=1,
            target_layer_ids=(0, 2),
            block_size=4,
            gru_hidden_dim=8,
            emb_dim=4,
            initial_weights="target",
        ),
        data=DataConfig(max_length=64, batch_size=4),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=8),
        train=TrainConfig(eval_max_new_tokens=12),
    )
    (run / "config.json").write_text(json.dumps(to_json_dict(config)))
    chosen = ["default", "LK hybrid", "original answers", "no head (DFlash)"]
    command = ["--run", str(run), "--output", str(output), "--steps", "2", "--batch-size", "4"]
    command += ["--seeds", "0", "--variants", *chosen]
    real, calls = script.train_and_judge, []

    def stop_after_two(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(script, "train_and_judge", stop_after_two)
    assert explain_or_raise(lambda: script.run(script.parse_arguments(command))) == 130
    assert explain_or_raise(lambda: script.run(script.parse_arguments(command))) == 0
    rows = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == chosen
    assert all(row["tau"] >= 1 and row["num_skipped"] == 0 for row in rows)
    assert all(("tau_head_off" in row) == ("no head" not in row["variant"]) for row in rows)
    # Answers of the run and of the corpus are the same file here: the same drafter must come out.
    by_name = {row["variant"]: row for row in rows}
    assert by_name["original answers"]["loss"] == by_name["default"]["loss"]
    assert {"table.md", "ablations.png", "rows.jsonl", "settings.json"} == {path.name for path in output.iterdir()}
    other = [*command, "--eval-prompts", "3"]
    with pytest.raises(RunError, match=r"rows of other settings.*\n  eval_prompts: stored 120, now 3"):
        script.run(script.parse_arguments(other))


def test_a_folder_without_a_run_is_named(script, tmp_path, capsys):
    arguments = script.parse_arguments(["--run", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert explain_or_raise(lambda: script.run(arguments)) == EXIT_MISTAKE
    assert "holds no target and responses" in capsys.readouterr().err
