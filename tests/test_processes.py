"""What processes tell each other: alone, and three of them on this machine joined by gloo."""

import pytest

from domino_jax import processes
from tests.together import run_together

COUNT = 3


@pytest.fixture(scope="module")
def said(repository):
    """What each process found, by its number."""
    return run_together(repository, "tests.exchanging", COUNT)


def test_one_decides_and_all_follow(said):
    assert [one["is_first"] for one in said] == [True, False, False]
    assert [one["called"] for one in said] == [[0], [], []]
    assert all(one["decided"] == {"from": 0, "text": "ä" * 5000} and one["nothing"] is None for one in said)


def test_an_error_of_the_first_is_raised_in_all(said):
    assert said[0]["first_fails"] == ["OSError", "[Errno 28] no room"]
    assert [one["first_fails"] for one in said[1:]] == [["ProcessError", "process 0: [Errno 28] no room"]] * 2
    assert [one["first_says_nothing"][1] for one in said[1:]] == ["process 0: Silent"] * 2
    assert said[0]["not_json"][0] == "TypeError" and said[1]["not_json"][0] == "ProcessError"


def test_an_error_of_any_is_raised_in_all(said):
    assert [one["own"] for one in said] == [0, 1, 2]
    assert [one["last_fails"] for one in said] == [["ProcessError", "process 2: no such file"]] * 2 + [
        ["ValueError", "no such file"]
    ]


def test_other_values_than_the_first_ones_are_told_in_all(said):
    assert [one["same"] for one in said] == [None] * 3
    message = (
        "process 2 differs from process 0 ('stored' is process 0's); use one command:\n  b: 0 / 1"  # both lines whole
    )
    assert said[2]["other"] == ["ProcessError", message]
    assert [one["other"] for one in said[:2]] == [["ProcessError", f"process 2: {message}"]] * 2


def test_values_of_all_are_known_to_all(said):
    assert [one["shared"] for one in said] == [[[], [1, "x" * 300], [2, "x" * 600]]] * COUNT
    assert [one["nothing_shared"] for one in said] == [[[]] * COUNT] * COUNT


def test_errors_leave_the_processes_in_step(said):
    assert [one["after"] for one in said] == ["still in step"] * COUNT


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", None)
    kept = object()
    assert processes.is_first()
    assert processes.on_first(lambda: kept) is kept and processes.on_all(lambda: kept) is kept
    assert processes.share([1]) == [[1]]
    processes.check_same({"a": 1}, lambda first, own: ["unused"], "unused")
    for call in (processes.on_first, processes.on_all):
        with pytest.raises(OSError, match="as it was"):
            call(lambda: (_ for _ in ()).throw(OSError("as it was")))
