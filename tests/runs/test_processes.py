"""One training in several processes of this machine, joined by gloo: same losses, one writer, a common end."""

import signal
import time

import jax
import numpy as np
import pytest

from domino_jax.checkpoints.huggingface import save_target
from domino_jax.config import ConfigError, TargetConfig
from domino_jax.data.responses import write_chats
from domino_jax.data.tokenizer import save_tokenizer, train_tokenizer
from domino_jax.models.qwen3 import init_target_params
from domino_jax.processes import ProcessError
from domino_jax.run_config import (
    DataConfig,
    DraftSettings,
    MeshConfig,
    ObjectiveConfig,
    RunConfig,
    TargetSource,
    TrainConfig,
)
from domino_jax.runs import folder as folder_module
from domino_jax.runs import training_run as training_run_module
from domino_jax.runs.draft import find_places
from domino_jax.runs.errors import EXIT_MISTAKE, EXIT_STOPPED
from domino_jax.runs.folder import hold_run
from domino_jax.runs.launch import EXIT_LOST, Launch, read_launch
from domino_jax.runs.monitor import read_rows
from domino_jax.runs.training_run import check_run, run_training
from domino_jax.sharding import Layout, build_layout
from tests.runs.many_processes import Processes

NUM_STEPS, LOSS_TOLERANCE = 20, 1e-5
ONE = MeshConfig()
END_TOGETHER_S = 60.0


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A random target whose heads two devices can share, and chats."""
    root = tmp_path_factory.mktemp("processes")
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    chats = [
        [
            {"role": "user", "content": f"say {words[i % 6]} {words[i // 6 % 6]}"},
            {"role": "assistant", "content": f"{words[i % 6]} and {words[i // 6 % 6]}, that is number {i}"},
        ]
        for i in range(30)
    ]
    tokenizer = train_tokenizer((m["content"] for chat in chats for m in chat), 300)
    config = TargetConfig(len(tokenizer), 16, 32, 4, 2, 2, 8, max_position_embeddings=96, tie_word_embeddings=True)
    save_tokenizer(tokenizer, root / "target")
    save_target(str(root / "target"), config, init_target_params(config, jax.random.key(0)))
    write_chats(root / "train.jsonl", chats[:26])
    write_chats(root / "eval.jsonl", chats[26:])
    return root


def make_config(material, output_dir, with_eval=False, mesh=ONE, initial_weights="fresh", **data):
    settings = {"max_length": 48, "batch_size": 8, "micro_steps": 2} | data
    return RunConfig(
        name="run",
        output_dir=str(output_dir),
        target=TargetSource(str(material / "target")),
        draft=DraftSettings(
            num_hidden_layers=1, block_size=4, gru_hidden_dim=8, emb_dim=4, initial_weights=initial_weights
        ),
        data=DataConfig(str(material / "train.jsonl"), str(material / "eval.jsonl") if with_eval else "", **settings),
        objective=ObjectiveConfig(num_anchors=4, head_chunk=2),
        train=TrainConfig(
            num_steps=NUM_STEPS,
            log_every=1,
            checkpoint_every=4,
            eval_every=10,
            eval_prompts=2,
            eval_max_new_tokens=8,
        ),
        mesh=mesh,
    )


@pytest.fixture(scope="module")
def start(repository):
    started = []

    def start(*arguments, **settings):
        started.append(Processes(repository, *arguments, **settings))
        return started[-1]

    yield start
    for run in started:
        for process in run.processes:
            process.kill()
            process.wait()
        run.files.close()


@pytest.fixture(scope="module")
def alone(material, tmp_path_factory):
    """Losses of one process, by step."""
    output = tmp_path_factory.mktemp("alone") / "out"
    run_training(make_config(material, output))
    return losses_of(output)


def losses_of(output):
    rows = [row for row in read_rows(output / "run" / "metrics.jsonl") if row["stage"] == "draft"]
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert rows[-1]["loss"] != rows[0]["loss"]
    return np.array([[row["loss"], row["corrected_loss"], row["base_loss"]] for row in rows])


def steps_in(output):
    return sorted(int(path.name) for path in (output / "run" / "checkpoints").iterdir() if path.name.isdigit())


def tree_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "checkpoints" not in path.parts)


def test_two_processes_have_the_losses_of_one(material, alone, start, tmp_path):
    run = start(make_config(material, tmp_path / "out"), 2)
    assert run.statuses() == [0, 0], run.texts()
    np.testing.assert_allclose(losses_of(tmp_path / "out"), alone, rtol=0, atol=LOSS_TOLERANCE)
    first, second = run.texts()
    assert "2 processes, 2 devices" in first and "saved step 20" in first and "drafters:" in first
    assert "saved" not in second and "step" not in second
    assert (tmp_path / "out" / "run" / "draft" / "model.safetensors").exists()
    assert (tmp_path / "out" / "run" / "draft" / "README.md").exists()


@pytest.mark.slow
def test_held_out_prompts_and_report_are_those_of_one_process(material, start, tmp_path):
    """Every process decodes, the first one alone writes: the folder holds the same files."""
    settings = {"with_eval": True, "initial_weights": "target", "bucket_widths": (28,)}
    run = start(make_config(material, tmp_path / "out", mesh=MeshConfig(fsdp=True), **settings), 2)
    assert run.statuses() == [0, 0], run.texts()
    run_training(make_config(material, tmp_path / "one" / "out", **settings))
    np.testing.assert_allclose(
        losses_of(tmp_path / "out"), losses_of(tmp_path / "one" / "out"), rtol=0, atol=LOSS_TOLERANCE
    )
    taus = [
        [(row["step"], row["tau"]) for row in read_rows(root / "run" / "metrics.jsonl") if row["stage"] == "held_out"]
        for root in (tmp_path / "out", tmp_path / "one" / "out")
    ]
    assert taus[0] == taus[1] and [step for step, _ in taus[0]] == [10, 20]
    ours, theirs = (tree_of(root / "run") for root in (tmp_path / "out", tmp_path / "one" / "out"))
    assert [name for name in ours if "events" not in name] == [name for name in theirs if "events" not in name]
    assert "4 of 4" in (tmp_path / "out" / "run" / "report" / "report.md").read_text()


@pytest.mark.slow
def test_four_processes_stop_together_and_two_go_on(material, alone, start, tmp_path):
    """SIGTERM reaches one of them; what they saved is read by another number of processes on another mesh."""
    output = tmp_path / "out"
    run = start(make_config(material, output, mesh=MeshConfig(model=2, fsdp=True)), 4, pace=0.5)
    run.wait_for(output / "run" / "checkpoints" / "4")
    run.processes[3].send_signal(signal.SIGTERM)
    assert run.statuses() == [EXIT_STOPPED] * 4, run.texts()
    stopped_at = steps_in(output)[-1]
    assert 4 <= stopped_at < NUM_STEPS
    assert all(f"stopped at step {stopped_at} of 20 and saved" in text for text in run.texts())
    run = start(make_config(material, output), 2)
    assert run.statuses() == [0, 0], run.texts()
    assert f"going on from step {stopped_at}" in run.texts()[0]
    np.testing.assert_allclose(losses_of(output), alone, rtol=0, atol=LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_other_and_one_goes_on(material, alone, start, tmp_path, victim):
    output = tmp_path / "out"
    run = start(make_config(material, output, mesh=MeshConfig(fsdp=True)), 2, pace=0.3)
    run.wait_for(output / "run" / "checkpoints" / "8")
    run.processes[victim].kill()
    killed_at = time.monotonic()
    statuses = run.statuses(2 * END_TOGETHER_S)
    assert time.monotonic() - killed_at < END_TOGETHER_S
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] in (EXIT_LOST, -signal.SIGABRT)
    told = run.texts()[1 - victim]
    # Whatever is noticed first: the broken connection of a collective (ours), or the coordinator's end (jax aborts).
    assert "lost contact to another one" in told or "another task died" in told
    assert 8 <= steps_in(output)[-1] < NUM_STEPS
    run_training(make_config(material, output))
    np.testing.assert_allclose(losses_of(output), alone, rtol=0, atol=LOSS_TOLERANCE)


def test_processes_with_other_settings_are_told_before_time_is_spent(material, start, tmp_path):
    run = start(make_config(material, tmp_path / "out"), 2, last=["--config.optimizer.learning_rate=0.5"])
    assert run.statuses() == [EXIT_MISTAKE] * 2, run.texts()
    first, second = run.texts()
    assert "error: process 1: " in first
    assert "config.optimizer.learning_rate: stored 0.0006, now 0.5" in first and "now 0.5" in second
    assert not (tmp_path / "out").exists()


FLAGS = {"distributed": False, "coordinator": "", "num-processes": 0, "process-id": -1}


def test_flags_of_many_processes():
    assert read_launch(FLAGS | {"distributed": True}) == Launch()
    given = FLAGS | {"coordinator": "host:8476", "num-processes": 2, "process-id": 1}
    assert read_launch(given) == Launch("host:8476", 2, 1)
    for change, message in (
        ({"coordinator": "", "process-id": -1}, "--num-processes need --coordinator=HOST:PORT"),
        ({"coordinator": "host"}, "'host'; give host and port"),
        ({"num-processes": 0, "process-id": 0}, "--num-processes is 0"),
        ({"process-id": 2}, r"--process-id is 2; give each process its own of 0 \.\. 1"),
        ({"process-id": -1}, "--process-id is -1"),
        ({"distributed": True}, "leave it out"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_launch(given | change)


def test_a_batch_that_the_processes_cannot_share_is_refused(material, tmp_path, monkeypatch):
    class TwoGroups:
        num_data = 2

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(training_run_module, "find_layout", lambda mesh: TwoGroups())
    with pytest.raises(ConfigError, match=r"is 3 rows at a time, which 2 groups .* a multiple of 4"):
        check_run(make_config(material, tmp_path, batch_size=6))
    check_run(make_config(material, tmp_path))


def test_each_process_reads_the_rows_that_its_devices_hold(material, tmp_path, monkeypatch):
    config, layout = make_config(material, tmp_path), build_layout(MeshConfig(), jax.devices()[:1])
    assert layout.find_places(4) == [0, 1, 2, 3]
    assert find_places(config, None) is None and find_places(config, layout) is None
    monkeypatch.setattr(Layout, "find_places", lambda self, num_rows: list(range(num_rows // 2, num_rows)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert find_places(config, layout) == [2, 3, 6, 7]


def test_a_folder_that_is_not_shared_is_refused(material, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    answers = iter([str(tmp_path / "run"), "process 7 on another-host"])
    monkeypatch.setattr(folder_module, "on_first", lambda function: next(answers))
    monkeypatch.setattr(folder_module, "on_all", lambda function: function())
    with (
        pytest.raises(ProcessError, match="is not the folder that process 7 on another-host holds"),
        hold_run(make_config(material, tmp_path)),
    ):
        pass
