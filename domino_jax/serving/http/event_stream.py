"""Server-sent events of a generation, and the watch for clients that leave."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from domino_jax.records import TokenEvent
from domino_jax.serving.http.answer import Answer
from domino_jax.serving.http.answer_json import AnswerForm, to_text
from domino_jax.serving.http.errors import ApiError

_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


@contextlib.asynccontextmanager
async def watch_disconnect(receive: Receive, answer: Answer) -> AsyncIterator[None]:
    """End `answer` when its client goes away while the block runs; the body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        answer.inbox.end("disconnected")

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


class EventStream(Response):
    """Streams an answer; whatever ends the stream, nothing of it runs on in the engine."""

    def __init__(self, answer: Answer, form: AnswerForm) -> None:
        """Stream `answer`, which has been submitted."""
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._answer, self._form = answer, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        answer = self._answer
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with watch_disconnect(receive, answer):
                async for text in self._write():
                    await send({"type": "http.response.body", "body": text.encode("utf-8"), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            answer.close("disconnected")

    async def _write(self) -> AsyncIterator[str]:
        answer = self._answer
        chunks: list[str] = []
        try:
            async for events in answer.events():
                for event in events:
                    chunks += self._write_event(event)
                yield "".join(chunks) if events else ": keep-alive\n\n"
                chunks.clear()
        except ApiError as error:
            if error.status != 499:
                yield f"{''.join(chunks)}data: {to_text(error.to_json())}\n\n"
            return
        if answer.plan.include_usage:
            yield f"data: {self._form.write_usage_chunk()}\n\n"
        yield "data: [DONE]\n\n"

    def _write_event(self, event: TokenEvent) -> list[str]:
        taken = self._answer.take(event)
        if taken is None:
            return []
        choice, delta = taken
        return [f"data: {self._form.write_chunk(choice, delta, self._answer.is_finished)}\n\n"]
