"""Who runs: a bounded queue, first come first served, and a fixed number of slots. Standard library only.

Free slots are given lowest first, so that the slots in use stay few and close together; the engine runs a batch that
just holds them, and asks to move the highest ones down when a smaller batch would do.
"""

from collections import deque

from domino_jax.serving.contract import QueueFullError


class Scheduler:
    """Waiting requests in order, and which request holds which slot."""

    def __init__(self, num_slots: int, max_waiting: int) -> None:
        """Begin with every slot free; `max_waiting` requests may wait beside those that hold slots."""
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self._waiting: deque[str] = deque()
        self._slots: dict[str, int] = {}

    @property
    def running(self) -> dict[str, int]:
        """Requests that hold a slot -> the slot."""
        return dict(self._slots)

    @property
    def num_running(self) -> int:
        """Number of slots in use."""
        return len(self._slots)

    @property
    def num_waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._waiting)

    def submit(self, request_id: str) -> None:
        """Queue a request.

        Raises:
            QueueFullError: nobody can be taken, neither now nor into the queue.
            ValueError: the request is here already.
        """
        if request_id in self._slots or request_id in self._waiting:
            raise ValueError(f"request {request_id} is queued or running already; ids must be unique")
        if len(self._waiting) >= self.max_waiting + self.num_slots - len(self._slots):
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting and {len(self._slots)} are running, as many as this server "
                "takes; try again later"
            )
        self._waiting.append(request_id)

    def admit(self) -> tuple[str, int] | None:
        """Give the oldest waiting request the lowest free slot; None where nobody waits or no slot is free."""
        if not self._waiting or len(self._slots) == self.num_slots:
            return None
        taken = set(self._slots.values())
        slot = next(i for i in range(self.num_slots) if i not in taken)
        request_id = self._waiting.popleft()
        self._slots[request_id] = slot
        return request_id, slot

    def release(self, request_id: str) -> int | None:
        """Forget a request; return the slot it held, None where it was waiting or is unknown."""
        if request_id in self._slots:
            return self._slots.pop(request_id)
        if request_id in self._waiting:
            self._waiting.remove(request_id)
        return None

    def compact(self, num_slots: int) -> dict[int, int]:
        """Move the requests in slots `num_slots ..` to lower free ones; return old slot -> new slot of those moved.

        Raises:
            ValueError: more requests run than `num_slots`.
        """
        if len(self._slots) > num_slots:
            raise ValueError(f"{len(self._slots)} requests run; they do not fit {num_slots} slots")
        free = iter(sorted(set(range(num_slots)) - set(self._slots.values())))
        moved = {}
        for request_id, slot in sorted(self._slots.items(), key=lambda item: item[1]):
            if slot >= num_slots:
                self._slots[request_id] = moved[slot] = next(free)
        return moved
