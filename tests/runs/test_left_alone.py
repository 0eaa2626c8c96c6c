"""Runs that nobody watches: killed at any moment, asked to stop, out of disk, damaged. All end with the same bits."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from domino_jax.runs.errors import EXIT_MISTAKE, EXIT_STOPPED
from domino_jax.runs.monitor import read_rows

NUM_STEPS, NUM_KILLS, SAVED_EVERY, DECODED_EVERY = 36, 20, 3, 12
SETTINGS = {
    "train.num_steps": NUM_STEPS,
    "train.checkpoint_every": SAVED_EVERY,
    "train.eval_every": DECODED_EVERY,
}
TARGET_STEPS = 8
_MARKER = "train the drafter: "


class Run:
    """A started run, what it has said so far, and its folder."""

    def __init__(self, start, output, cache, log, **changes):
        self.folder, self._log = output / "tiny", log
        with log.open("w") as file:
            self.process = start(output, cache, stdout=file, **(SETTINGS | changes))

    def said(self):
        return self._log.read_text()

    def wait_for(self, seen):
        deadline = time.monotonic() + 300
        while not (found := seen(self)):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)
        return found

    def end(self, number):
        self.process.send_signal(number)
        return self.process.wait(timeout=300)

    def saved(self):
        """Return the last step that was said to be saved, here or, going on from it, before."""
        steps = re.findall(r"(?:^saved|^going on from) step (\d+)$", self.said(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def is_saving(self):
        checkpoints = self.folder / "checkpoints"
        return checkpoints.is_dir() and any(".partial" in name for name in os.listdir(checkpoints))


def leave_out_report(folder):
    """Have a report lie there, which a run leaves alone: its decodes say nothing here and take as long as the rest."""
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "report.md").write_text("left out\n")


@pytest.fixture(scope="module")
def whole(start_tiny, finish, tmp_path_factory):
    """An undisturbed run, the folder that its compiled programs are in, and the seconds that its last save took."""
    output = tmp_path_factory.mktemp("whole")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tmp_path_factory.mktemp("cache")
    leave_out_report(output / "tiny")
    finish(start_tiny(output, cache, **SETTINGS))
    folder = output / "tiny"
    written = [path.stat().st_mtime for path in (folder / "checkpoints" / str(NUM_STEPS)).rglob("*") if path.is_file()]
    return folder, cache, max(written) - min(written)


@pytest.fixture
def prebuilt(whole, tmp_path):
    """The folder of a run whose target and responses are there."""
    folder = tmp_path / "run" / "tiny"
    leave_out_report(folder)
    for name in ("corpus", "target"):
        shutil.copytree(whole[0] / name, folder / name)
    for name in ("responses.jsonl", "config.json"):
        shutil.copyfile(whole[0] / name, folder / name)
    rows = [row for row in read_rows(whole[0] / "metrics.jsonl") if row["stage"] == "target"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


@pytest.fixture
def start(start_tiny, whole, prebuilt, tmp_path):
    def start(**changes):
        return Run(start_tiny, prebuilt, whole[1], tmp_path / "log", **changes)

    return start


def read_raw(folder):
    """Return the arrays of a checkpoint as they are stored."""
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    names = reader.metadata(folder / "state").item_metadata
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(names.tree))
    arrays = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=arguments))
    reader.close()
    return arrays


def assert_same_arrays(before, after, where):
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.dtype == after[name].dtype and values.tobytes() == after[name].tobytes(), f"{where} {name}"


def assert_same_end(whole, folder, lost=()):
    """Both runs have the same drafters, checkpoints (but for `lost` steps) and rows."""
    for name in ("draft", "draft_latest"):
        before, after = (load_file(root / name / "model.safetensors") for root in (whole, folder))
        assert_same_arrays(before, after, name)
    steps = [
        sorted(int(path.name) for path in (root / "checkpoints").iterdir() if path.name.isdigit())
        for root in (whole, folder)
    ]
    assert [step for step in steps[0] if step not in lost] == steps[1] and NUM_STEPS in steps[1]
    for step in steps[1]:
        before, after = (root / "checkpoints" / str(step) for root in (whole, folder))
        assert_same_arrays(read_raw(before), read_raw(after), f"step {step}")
        records = [json.loads((path / "record" / "metadata").read_text()) for path in (before, after)]
        for record in records:
            del record["metadata"]["config"]["output_dir"]
        assert records[0] == records[1]

    def rows(root):
        return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_rows(root / "metrics.jsonl")]

    assert rows(whole) == rows(folder)


@pytest.mark.slow
def test_killed_at_twenty_moments_it_loses_no_saved_step_and_ends_with_the_same_bits(start, whole):
    """Half of the kills fall between two checkpoints, where steps have to be repeated, half into a save."""
    undisturbed, _, save_s = whole
    generator = random.Random(5)
    steps = sorted(generator.sample(range(1, NUM_STEPS - SAVED_EVERY), NUM_KILLS))
    num_inside, num_repeated, saved = 0, 0, 0
    for number, step in enumerate(steps):
        run = start()
        run.wait_for(lambda run: _MARKER in run.said())
        assert int(run.said().partition(_MARKER)[2].partition("/")[0]) >= saved
        if number % 2:
            run.wait_for(lambda run, step=step: run.saved() >= step - step % SAVED_EVERY)
            run.wait_for(Run.is_saving)
            time.sleep(generator.uniform(0, save_s / 2))
        else:
            run.wait_for(lambda run, step=step: _last_step(run) >= step)
        assert run.end(signal.SIGKILL) == -signal.SIGKILL
        num_inside += run.is_saving()
        saved = run.saved()
        num_repeated += max(0, _last_step(run) - saved)
    print(f"{num_inside} of {NUM_KILLS} kills fell into a save; {num_repeated} steps were trained again")
    assert num_inside >= NUM_KILLS / 4 and num_repeated >= NUM_KILLS / 2
    last = start()
    assert last.process.wait(timeout=300) == 0, last.said()
    assert int(re.search(r"going on from step (\d+)", last.said())[1]) >= saved
    assert "is damaged" not in last.said()
    assert_same_end(undisturbed, last.folder)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["first step", "training", "held-out decode", "last step"])
def test_asked_to_stop_while_it_trains_the_drafter_it_saves_and_says_so(start, whole, where):
    """The request may come while the step is compiled, between steps, or while held-out prompts are decoded."""
    moments = {
        "first step": lambda run: "train the drafter: 0" in run.said(),
        "training": lambda run: run.saved() >= 3,
        "held-out decode": lambda run: (
            run.saved() >= DECODED_EVERY - SAVED_EVERY and _last_row(run) == ("draft", DECODED_EVERY)
        ),
        "last step": lambda run: _last_row(run) == ("draft", NUM_STEPS),
    }
    run = start()
    run.wait_for(moments[where])
    assert run.end(signal.SIGTERM) == EXIT_STOPPED, run.said()
    stopped = int(
        re.search(rf"stopped at step (\d+) of {NUM_STEPS} and saved; the same command goes on", run.said())[1]
    )
    assert stopped == run.saved() and (run.folder / "checkpoints" / str(stopped)).is_dir()
    expected = {"first step": {1, 2}, "held-out decode": {DECODED_EVERY, DECODED_EVERY + 1}, "last step": {NUM_STEPS}}
    assert stopped in expected.get(where, range(3, NUM_STEPS))
    assert not (run.folder / "draft").exists()
    again = start()
    assert again.process.wait(timeout=300) == 0, again.said()
    assert f"going on from step {stopped}" in again.said()
    assert_same_end(whole[0], again.folder)


def _last_row(run):
    rows = read_rows(run.folder / "metrics.jsonl")
    return (rows[-1]["stage"], rows[-1]["step"]) if rows else None


def _last_step(run):
    """Return the last step of the drafter that was logged."""
    return max((row["step"] for row in read_rows(run.folder / "metrics.jsonl") if row["stage"] == "draft"), default=0)


@pytest.mark.slow
def test_asked_to_stop_while_it_trains_the_target_it_saves_and_says_so(start_tiny, whole, tmp_path):
    undisturbed, cache, _ = whole
    settings = {"train.num_steps": 2, "train.eval_every": 2}
    leave_out_report(tmp_path / "run" / "tiny")
    run = Run(start_tiny, tmp_path / "run", cache, tmp_path / "log", **settings)
    run.wait_for(lambda run: "train the target: " in run.said())
    assert run.end(signal.SIGTERM) == EXIT_STOPPED, run.said()
    stopped = int(re.search(r"stopped at step (\d+) of the target and saved; the same command goes on", run.said())[1])
    assert 1 <= stopped <= TARGET_STEPS
    again = Run(start_tiny, tmp_path / "run", cache, tmp_path / "log", **settings)
    assert again.process.wait(timeout=300) == 0, again.said()
    assert f"going on from step {stopped}" in again.said()
    before, after = (load_file(root / "target" / "model.safetensors") for root in (undisturbed, again.folder))
    assert_same_arrays(before, after, "target")


@pytest.mark.slow
def test_out_of_disk_it_keeps_what_it_saved_and_goes_on_when_there_is_room(
    start, start_tiny, whole, prebuilt, tmp_path
):
    """A limit on file sizes, which no check of free space foresees, refuses the arrays of the next checkpoint."""
    run = start()
    run.wait_for(lambda run: run.saved() >= 3)
    assert run.end(signal.SIGTERM) == EXIT_STOPPED
    saved = run.saved()
    arrays = run.folder / "checkpoints" / str(saved) / "state"
    limit = max(path.stat().st_size for path in arrays.rglob("*") if path.is_file()) // 2
    code = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); "
    code += "os.execv(sys.argv[2], sys.argv[2:])"
    with (tmp_path / "limited").open("w") as log:
        limited = start_tiny(
            prebuilt, whole[1], before=[sys.executable, "-c", code, str(limit)], stdout=log, **SETTINGS
        )
    assert limited.wait(timeout=300) == EXIT_MISTAKE
    said = (tmp_path / "limited").read_text().splitlines()[-1]
    following = saved - saved % SAVED_EVERY + SAVED_EVERY
    assert said.startswith(f"error: no room to save step {following}: it needs ") and "B are free for" in said
    assert said.endswith(f"the latest step stored is {saved}. Make room, then the same command goes on")
    again = start()
    assert again.process.wait(timeout=300) == 0, again.said()
    assert f"going on from step {saved}" in again.said()
    assert_same_end(whole[0], again.folder)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(start, whole):
    run = start()
    run.wait_for(lambda run: run.saved() >= 17)
    assert run.end(signal.SIGKILL) == -signal.SIGKILL
    steps = sorted(int(p.name) for p in (run.folder / "checkpoints").iterdir() if p.name.isdigit())
    damaged = max((run.folder / "checkpoints" / str(steps[-1]) / "state").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    again = start()
    assert again.process.wait(timeout=300) == 0, again.said()
    assert re.search(rf"step {steps[-1]} in \S+ is damaged: state/\S+ has changed", again.said())
    assert f"going on from step {steps[-2]}" in again.said()
    assert (run.folder / "checkpoints" / "damaged" / str(steps[-1])).is_dir()
    assert_same_end(whole[0], again.folder)
