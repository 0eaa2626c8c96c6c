import threading

import pytest

from domino_jax.records import Request
from domino_jax.serving.contract import EngineUnavailableError, QueueFullError
from domino_jax.serving.intake import Intake


def make_intake(num_slots=1, max_waiting=1):
    intake = Intake(num_slots, max_waiting)
    intake.begin()
    intake.set_progress("ready")
    return intake


def make_request(name):
    return Request(name, [1], 4)


def test_requests_are_taken_only_while_ready():
    intake = Intake(1, 1)
    states = ["not started", "starting", "compiled 1/2"]
    for state, step in zip(states, [lambda: None, intake.begin, lambda: intake.set_progress(states[2])], strict=True):
        step()
        assert intake.read_status()["progress"] == state
        with pytest.raises(EngineUnavailableError, match=f"the engine is {state}; it takes no requests"):
            intake.submit(make_request("a"))
    intake.set_progress("ready")
    intake.submit(make_request("a"))
    intake.drain()
    with pytest.raises(EngineUnavailableError, match="the engine is draining"):
        intake.submit(make_request("b"))
    assert intake.open_ids() == ["a"]


def test_an_end_that_was_asked_for_is_not_forgotten():
    for end, state in ((Intake.drain, "draining"), (Intake.stop, "stopped")):
        intake = Intake(1, 1)
        end(intake)
        intake.begin()
        intake.set_progress("ready")
        assert intake.read_status()["progress"] == state
    intake = make_intake()
    intake.fail("out of memory")
    intake.stop()
    intake.drain()
    assert intake.read_status() | {"progress": "failed", "failure": "out of memory", "is_ready": False} == (
        intake.read_status()
    )


def test_a_request_waits_gets_a_slot_and_is_forgotten():
    intake = make_intake()
    for name in "ab":
        intake.submit(make_request(name))
    with pytest.raises(QueueFullError):
        intake.submit(make_request("c"))
    assert intake.has_waiting()
    admission = intake.admit()
    assert (admission.request.request_id, admission.slot) == ("a", 0) and admission.queue_s >= 0
    assert intake.admit() is None
    assert (intake.read_status()["num_running"], intake.read_status()["num_waiting"]) == (1, 1)
    intake.release("a")
    assert intake.admit().request.request_id == "b"
    intake.release("b")
    assert intake.open_ids() == [] and not intake.has_waiting()


def test_only_open_requests_are_cancelled_and_once():
    intake = make_intake()
    intake.submit(make_request("a"))
    for name in ("a", "unknown"):
        intake.cancel(name)
    assert intake.take_cancelled() == ["a"]
    assert intake.take_cancelled() == []
    intake.cancel("a")
    intake.release("a")
    assert intake.take_cancelled() == []


def test_work_and_the_end_wake_the_engine():
    intake = make_intake()
    answers = []
    for wake in (lambda: intake.submit(make_request("a")), intake.stop):
        thread = threading.Thread(target=lambda: answers.append(intake.wait_for_work()))
        thread.start()
        wake()
        thread.join(timeout=10)
        if len(answers) == 1:
            intake.release("a")
    assert answers == [True, False]
