"""A drafter that two processes hold in parts, written by the first: one tensor at a time on its host, no other."""

import jax
import pytest

from domino_jax.checkpoints.gathered_tensors import write_gathered
from domino_jax.checkpoints.huggingface import draft_table, save_draft
from tests.checkpoints.saving import DRAFT, draw
from tests.together import run_together

COUNT = 2


@pytest.fixture(scope="module")
def saved(repository, tmp_path_factory):
    """The folder that both save to, and what each of them found."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_together(repository, "tests.checkpoints.saving", COUNT, folder)


def test_the_file_is_that_of_one_process(saved, tmp_path):
    save_draft(tmp_path / "alone", DRAFT, draw())
    for name in ("model.safetensors", "config.json"):
        assert (saved[0] / "draft" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_the_first_host_alone_holds_a_tensor_and_one_at_a_time(saved):
    first, second = saved[1]
    assert first["num_on_host"] == len(draft_table(DRAFT)) and second["num_on_host"] == 0
    assert first["most_on_host"] == 1
    assert first["num_gathered"] == second["num_gathered"] > 10
    assert first["most_gathered"] == second["most_gathered"] == 1


def test_a_write_that_fails_is_told_to_all_and_nobody_waits(saved):
    first, second = saved[1]
    assert first["too_large"][0] == "CheckpointError" and "float16 cannot hold" in first["too_large"][1]
    assert second["too_large"] == ["ProcessError", f"process 0: {first['too_large'][1]}"]
    assert first["no_folder"][0] == "FileExistsError" and second["no_folder"][0] == "ProcessError"
    assert first["out_of_order"] == ["ValueError", "b is asked for where a is next: names are gathered in their order"]
    assert first["sum"] == second["sum"]


def test_alone_any_order_will_do():
    arrays = {"a": jax.numpy.arange(6).reshape(2, 3), "b": jax.numpy.ones(2)}
    got = []
    write_gathered(arrays, {"a"}, lambda read: got.extend((read("b"), read("a"))))
    assert got[0].shape == (2,) and got[1].tolist() == [[0, 3], [1, 4], [2, 5]]
