"""How a run ends early: on request; or by a mistake, told in one sentence (a traceback if the mistake is ours)."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from domino_jax.durable import NO_ROOM

EXIT_MISTAKE, EXIT_STOPPED = 2, 130


class RunStopped(Exception):
    """The run was asked to stop and has saved; the same command goes on."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying of them; a second one does what it always did."""
    received: list[int] = []
    before = {}

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain_or_raise(run: Callable[[], None]) -> int:
    """Call `run` and return the exit status: 0, 2 for a mistake (printed as a sentence), 130 for a stop on request.

    Every room reports what a user can mend as a `ValueError` of its own class, and what the machine refuses is an
    `OSError` (disk full, no permission); a bare `ValueError` is ours and is raised on.
    """
    try:
        run()
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        return EXIT_STOPPED
    except OSError as error:
        advice = "; make room, then the same command goes on from what is saved" if error.errno in NO_ROOM else ""
        print(f"error: {error}{advice}", file=sys.stderr)
        return EXIT_MISTAKE
    except ValueError as error:
        if not type(error).__module__.startswith("domino_jax."):
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    return 0
