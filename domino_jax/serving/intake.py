"""What other threads hand to the engine's own: requests, cancellations and the end, all under one lock."""

import threading
import time
from dataclasses import dataclass
from typing import Any

from domino_jax.records import Request
from domino_jax.serving.contract import EngineUnavailableError
from domino_jax.serving.scheduler import Scheduler


@dataclass(frozen=True)
class Admission:
    """A request that has got a slot, `queue_s` seconds after it came."""

    request: Request
    slot: int
    queue_s: float


class Intake:
    """Open requests, who of them waits and who runs, and the state: not started, starting, what is done, ready, ...

    `draining`, `stopped` and `failed` are not left for an earlier one.
    """

    def __init__(self, num_slots: int, max_waiting: int) -> None:
        """Begin with every slot free."""
        self._lock = threading.Condition()
        self._scheduler = Scheduler(num_slots, max_waiting)
        self._requests: dict[str, Request] = {}
        self._arrived_s: dict[str, float] = {}
        self._cancelled: set[str] = set()
        self._state = "not started"
        self._failure: str | None = None

    # ------------------------------------------------------------------------------------------------------ any thread

    def begin(self) -> None:
        """Be starting, unless the end has been asked for already."""
        with self._lock:
            if self._state == "not started":
                self._state = "starting"

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineUnavailableError: not ready.
            QueueFullError: as many wait as may.
            ValueError: its id is in use.
        """
        with self._lock:
            if self._state != "ready":
                raise EngineUnavailableError(f"the engine is {self._state}; it takes no requests")
            self._scheduler.submit(request.request_id)
            self._requests[request.request_id] = request
            self._arrived_s[request.request_id] = time.monotonic()
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        """Ask for the end of a request; one that is not open is left."""
        with self._lock:
            if request_id in self._requests:
                self._cancelled.add(request_id)
                self._lock.notify()

    def drain(self) -> None:
        """Take no further requests."""
        with self._lock:
            if self._state not in ("failed", "stopped"):
                self._state = "draining"
                self._lock.notify()

    def stop(self) -> None:
        """Ask for the end of everything."""
        with self._lock:
            if self._state != "failed":
                self._state = "stopped"
                self._lock.notify()

    def read_status(self) -> dict[str, Any]:
        """Return the fields of `EngineStatus` that are known here."""
        with self._lock:
            return {
                "is_ready": self._state == "ready",
                "progress": self._state,
                "failure": self._failure,
                "num_running": self._scheduler.num_running,
                "num_waiting": self._scheduler.num_waiting,
            }

    # ------------------------------------------------------------------------------------------ the engine's own thread

    def set_progress(self, text: str) -> None:
        """Tell how far the start is; `ready` opens the door."""
        with self._lock:
            if self._state not in ("draining", "stopped"):
                self._state = text

    def fail(self, failure: str) -> None:
        """Be failed, for the reason given."""
        with self._lock:
            self._state, self._failure = "failed", failure

    def is_stopped(self) -> bool:
        """Return whether the end has been asked for."""
        with self._lock:
            return self._state == "stopped"

    def wait_for_work(self) -> bool:
        """Sleep until there is something to do; return False when the engine shall end."""
        with self._lock:
            while self._state != "stopped" and not (self._requests or self._cancelled):
                self._lock.wait()
            return self._state != "stopped"

    def take_cancelled(self) -> list[str]:
        """Return the open requests whose end has been asked for since the last call."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            return [request_id for request_id in cancelled if request_id in self._requests]

    def admit(self) -> Admission | None:
        """Give the oldest waiting request the lowest free slot; None where nobody waits or no slot is free."""
        with self._lock:
            admitted = self._scheduler.admit()
            if admitted is None:
                return None
            request_id, slot = admitted
            return Admission(self._requests[request_id], slot, time.monotonic() - self._arrived_s[request_id])

    def release(self, request_id: str) -> None:
        """Forget a request that has ended."""
        with self._lock:
            self._scheduler.release(request_id)
            del self._requests[request_id], self._arrived_s[request_id]
            self._cancelled.discard(request_id)

    def open_ids(self) -> list[str]:
        """Return all requests that have not ended."""
        with self._lock:
            return list(self._requests)

    def has_waiting(self) -> bool:
        """Return whether requests wait for a slot."""
        with self._lock:
            return self._scheduler.num_waiting > 0

    def compact(self, num_slots: int) -> dict[int, int]:
        """See `Scheduler.compact`."""
        with self._lock:
            return self._scheduler.compact(num_slots)
