"""What the API may ask of an engine, and what it gets back; standard library only.

An engine runs in its own thread. It answers a request with `TokenEvent`s, the last of which has a finish reason; every
accepted request gets exactly one such event, whatever happens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from domino_jax.records import Request, TokenEvent

Deliver = Callable[[Sequence[TokenEvent]], None]
"""Takes the events of one device call; called in the engine's thread, must neither block nor raise."""


class QueueFullError(RuntimeError):
    """The waiting queue holds as many requests as it may; try again later."""


class EngineUnavailableError(RuntimeError):
    """The engine takes no requests: it is loading, draining, stopped or has failed; the message says which."""


@dataclass(frozen=True)
class CallTimes:
    """Wall-clock seconds of one device call of `num_rounds` rounds.

    Attributes:
        call_s: from dispatch until the results are on the host.
        draft_share: part of a round that drafting takes, as measured at warm-up; 0 for plain steps.
    """

    num_rounds: int
    call_s: float
    draft_share: float


@dataclass(frozen=True)
class EngineStatus:
    """What an engine is doing now; the counts are totals since its start.

    Attributes:
        is_ready: weights are loaded, every program is compiled and requests are taken.
        progress: what a loading engine does, as "compiled 3/12".
        failure: why the engine ended; None while it has not.
        num_running: requests that hold a slot.
        num_waiting: requests in the queue.
        cache_usage: part of the slots' cache positions in use, 0 .. 1.
        num_compiles: programs compiled, by phase (`warmup`, `serving`); `serving` stays 0 unless there is a bug.
        num_prefix_queries: prompt tokens looked up in the prefix cache.
        num_prefix_hits: those of them that were found.
        busy_s: seconds in which the engine had something to do.
        device_s: those of them spent in device calls, from dispatch until the results were on the host.
    """

    is_ready: bool
    progress: str = ""
    failure: str | None = None
    num_running: int = 0
    num_waiting: int = 0
    cache_usage: float = 0.0
    num_compiles: Mapping[str, int] = field(default_factory=dict)
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    busy_s: float = 0.0
    device_s: float = 0.0


@runtime_checkable
class Engine(Protocol):
    """Continuous batching of requests on one device or mesh.

    Attributes:
        max_model_len: tokens a request's prompt and output may have together.
        vocab_size: ids are 0 .. vocab_size - 1.
        max_logprobs: most likely tokens whose log-probabilities a request may ask for.
        block_sizes: slots of a block that a drafted-for request may ask for; none without a drafter.
    """

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    block_sizes: tuple[int, ...]

    def start(self, deliver: Deliver, observe: Callable[[CallTimes], None] = lambda times: None) -> None:
        """Compile and begin to serve in a thread of its own; `observe` gets the times of every device call.

        Returns at once; `status().is_ready` turns True when requests are taken.
        """
        ...

    def submit(self, request: Request) -> None:
        """Queue a request; safe from any thread, never blocks.

        Raises:
            QueueFullError: the queue is full.
            EngineUnavailableError: not ready, draining or failed.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request soon, with `finish_reason` `cancelled`; one that has ended already, or is unknown, is left."""
        ...

    def drain(self) -> None:
        """Take no further requests; those that were taken run to their end."""
        ...

    def stop(self) -> None:
        """End all requests (`cancelled`) and the thread; returns when it has ended. A second call does nothing."""
        ...

    def status(self) -> EngineStatus:
        """Return a snapshot; safe from any thread, never blocks."""
        ...
