import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from domino_jax.serving.contract import QueueFullError
from domino_jax.serving.scheduler import Scheduler

NUM_SLOTS, MAX_WAITING = 4, 3


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, admissions, ends and moves, against a plain model of who waits and who runs."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(NUM_SLOTS, MAX_WAITING)
        self.waiting, self.running, self.count = [], {}, 0

    @rule()
    def submit(self):
        self.count += 1
        name = f"r{self.count}"
        if len(self.waiting) < MAX_WAITING + NUM_SLOTS - len(self.running):
            self.scheduler.submit(name)
            self.waiting.append(name)
        else:
            with pytest.raises(QueueFullError):
                self.scheduler.submit(name)

    @rule()
    def admit(self):
        admitted = self.scheduler.admit()
        if not self.waiting or len(self.running) == NUM_SLOTS:
            assert admitted is None
            return
        name, slot = admitted
        assert name == self.waiting.pop(0)
        assert slot == min(set(range(NUM_SLOTS)) - set(self.running.values()))
        self.running[name] = slot

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def release(self, data):
        name = data.draw(st.sampled_from([*self.waiting, *self.running]))
        assert self.scheduler.release(name) == self.running.pop(name, None)
        if name in self.waiting:
            self.waiting.remove(name)
        assert self.scheduler.release(name) is None

    @rule(num_slots=st.integers(1, NUM_SLOTS))
    def compact(self, num_slots):
        if len(self.running) > num_slots:
            with pytest.raises(ValueError, match="do not fit"):
                self.scheduler.compact(num_slots)
            return
        moved = self.scheduler.compact(num_slots)
        assert all(new < num_slots <= old for old, new in moved.items())
        self.running = {name: moved.get(slot, slot) for name, slot in self.running.items()}

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def submit_again(self, data):
        name = data.draw(st.sampled_from([*self.waiting, *self.running]))
        with pytest.raises(ValueError, match="unique"):
            self.scheduler.submit(name)

    @invariant()
    def every_request_is_in_one_place_and_every_slot_has_one_request(self):
        assert self.scheduler.running == self.running
        assert len(set(self.running.values())) == len(self.running)
        assert self.scheduler.num_running == len(self.running)
        assert self.scheduler.num_waiting == len(self.waiting)


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
