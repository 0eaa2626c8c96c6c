"""Brings token events from the engine's thread to the requests that wait for them on the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from domino_jax.records import Request, TokenEvent
from domino_jax.serving.contract import Engine, EngineStatus


class Inbox:
    """The events of one HTTP request's choices, in order of arrival.

    Attributes:
        reason: why nothing more is wanted (`disconnected`, `timeout`); None while it is.
    """

    def __init__(self) -> None:
        """Begin empty; must be made on the event loop."""
        self._events: deque[TokenEvent] = deque()
        self._wake = asyncio.Event()
        self.reason: str | None = None

    def put(self, event: TokenEvent) -> None:
        """Add an event."""
        self._events.append(event)
        self._wake.set()

    def end(self, reason: str) -> None:
        """Wake the reader and tell it that nothing more is wanted; the first reason stays."""
        self.reason = self.reason or reason
        self._wake.set()

    async def take_all(self, timeout_s: float | None = None) -> list[TokenEvent]:
        """Return what has arrived, waiting for the first; empty after `timeout_s` or `end`."""
        if not self._events and self.reason is None:
            self._wake.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return []
        taken = list(self._events)
        self._events.clear()
        return taken


class EventRouter:
    """Knows which inbox an engine request's events go to.

    Attributes:
        num_open: engine requests that are waited for.
    """

    def __init__(self, engine: Engine) -> None:
        """Route the events of `engine`; `bind` must be called on the loop before the first arrives."""
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._last_number = 0

    @property
    def num_open(self) -> int:
        """Engine requests that are waited for."""
        return len(self._inboxes)

    def status(self) -> EngineStatus:
        """Return the engine's state."""
        return self._engine.status()

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand events over on `loop` from now on."""
        self._loop = loop

    def new_id(self) -> str:
        """Return an engine request id that was never used before."""
        self._last_number += 1
        return f"r{self._last_number}"

    def submit(self, request: Request, inbox: Inbox) -> None:
        """Submit a request whose events go to `inbox`.

        Raises:
            QueueFullError: the engine's queue is full.
            EngineUnavailableError: the engine takes no requests.
        """
        self._inboxes[request.request_id] = inbox
        try:
            self._engine.submit(request)
        except BaseException:
            del self._inboxes[request.request_id]
            raise

    def close(self, request_id: str) -> None:
        """Cancel a request unless its last event has arrived; no further event of it is handed on."""
        if self._inboxes.pop(request_id, None) is not None:
            self._engine.cancel(request_id)

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Take the events of one device call, in any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._hand_over(self._route, events)

    def fail_all(self, message: str) -> None:
        """End every open request with an error; for an engine that no longer answers."""
        for request_id in list(self._inboxes):
            self._route([TokenEvent(request_id, finish_reason="error", error=message)])

    def cancel_all(self) -> None:
        """Cancel every open request; each is told that the server ends."""
        for request_id in list(self._inboxes):
            self._engine.cancel(request_id)
            self._route([TokenEvent(request_id, finish_reason="cancelled")])

    def _hand_over(self, route: Callable[[Sequence[TokenEvent]], None], events: Sequence[TokenEvent]) -> None:
        try:
            self._loop.call_soon_threadsafe(route, events)
        except RuntimeError:  # the loop was closed in between; nobody waits any more
            self._inboxes.clear()

    def _route(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            inbox = self._inboxes.get(event.request_id)
            if inbox is not None:
                if event.finish_reason is not None:
                    del self._inboxes[event.request_id]
                inbox.put(event)
