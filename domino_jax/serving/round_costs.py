"""What a round costs: timed at start for every shape, block size and manner of sampling."""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax
import numpy as np

from domino_jax.config import SamplingConfig
from domino_jax.decoding.slots import SlotState
from domino_jax.serving.programs import Programs, Shape

CALL_S = 0.02
"""Seconds a device call should take at most, unless a single round takes longer."""
_TIMED_ROUNDS = 5
"""Times that each is timed; the first one more, which warms up, does not count."""

Manner = Literal["greedy", "sampled", "filtered"]
"""How a batch chooses its tokens: its dearest row decides."""
_SAMPLING: dict[Manner, SamplingConfig] = {
    "greedy": SamplingConfig(),
    "sampled": SamplingConfig(temperature=1.0),
    "filtered": SamplingConfig(temperature=1.0, top_p=0.95),
}


def find_manner(samplings: Iterable[SamplingConfig]) -> Manner:
    """Return the manner of a batch of rows."""
    sampled = [s for s in samplings if s.temperature > 0]
    if any(s.top_k > 0 or s.top_p < 1 or s.min_p > 0 for s in sampled):
        return "filtered"
    return "sampled" if sampled else "greedy"


@dataclass(frozen=True)
class RoundCost:
    """What a round costs, with all rows running.

    Attributes:
        draft_share: part of it that drafting takes; 0 for plain steps. Drafting is timed in a call of its own, so for a
            tiny model, whose rounds cost less than a call, the part is told too large, up to 1.
    """

    seconds: float
    draft_share: float


Costs: TypeAlias = Mapping[tuple[Shape, int, Manner], RoundCost]
"""By shape, block size and manner."""


def count_call_rounds(round_s: float, max_rounds: int) -> int:
    """Return the rounds of a call: as many as fit `CALL_S`, 1 .. `max_rounds`."""
    return max(1, min(max_rounds, int(CALL_S / round_s)))


def measure_rounds(programs: Programs, is_stopped: Callable[[], bool]) -> Costs:
    """Time a round of every shape, block size and manner of sampling, all rows running.

    A round is timed in calls of as many rounds as serving makes: what a call costs by itself is shared by them. All are
    timed in turns, so that a slow moment of a shared machine does not hit all times of one; the fastest counts, which
    noise changes least. Returns early, and nothing, where `is_stopped`.
    """
    sizes, shapes = programs.ladders.block_sizes, programs.ladders.shapes
    round_s, draft_s = defaultdict[tuple, list[float]](list), defaultdict[tuple, list[float]](list)
    for _, shape, manner in itertools.product(range(1 + _TIMED_ROUNDS), shapes, _SAMPLING):
        if is_stopped():
            return {}
        state = _running_slots(programs, shape, _SAMPLING[manner])
        all_rows = np.ones(shape.rows, bool)
        for size in sizes:
            key = shape, size, manner
            num_rounds = count_call_rounds(round_s[key][-1], programs.ladders.max_rounds) if round_s[key] else 1
            began = time.perf_counter()
            if size > 1:
                jax.block_until_ready(programs.draft_only(state, shape, size))
            drafted_at = time.perf_counter()
            state, result = programs.run(state, shape, size, ~all_rows, all_rows, num_rounds, False)
            jax.block_until_ready(result)
            call_s = time.perf_counter() - drafted_at
            draft_s[key].append(drafted_at - began)
            round_s[key].append(call_s / max(int(np.max(result.num_rounds)), 1))
    costs = {}
    for key in itertools.product(shapes, sizes, _SAMPLING):
        seconds = min(round_s[key][1:])
        share = min(min(draft_s[key][1:]) / seconds, 1.0) if key[1] > 1 else 0.0
        costs[key] = RoundCost(seconds, share)
    return costs


def _running_slots(programs: Programs, shape: Shape, sampling: SamplingConfig) -> SlotState:
    """Return slots that all run, with room for the rounds that are timed."""
    state = programs.init_slots(shape)
    room = shape.positions - programs.ladders.margin
    decode = state.decode.replace(
        committed_len=np.full(shape.rows, min(16, room - 1), np.int32),
        limit_len=np.full(shape.rows, room, np.int32),
        is_done=np.zeros(shape.rows, bool),
        sampling=state.decode.sampling.replace(
            temperature=np.full(shape.rows, sampling.temperature, np.float32),
            top_p=np.full(shape.rows, sampling.top_p, np.float32),
        ),
    )
    return state.replace(decode=decode)
