"""One HTTP request's answer while it is generated: choices, counts, ending; what chat and completions share."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from domino_jax.records import TokenEvent
from domino_jax.serving.contract import EngineUnavailableError, QueueFullError
from domino_jax.serving.http.choice import Choice, ChoiceDelta
from domino_jax.serving.http.draft_counts import add_up
from domino_jax.serving.http.errors import ApiError
from domino_jax.serving.http.event_router import EventRouter, Inbox
from domino_jax.serving.http.metrics import ServerMetrics
from domino_jax.serving.http.request_plan import RequestPlan
from domino_jax.serving.http.text_codec import TextCodec


@dataclass
class Answer:
    """The choices of one request; used as a context, at whose end all that still runs is cancelled.

    Attributes:
        answer_id: told to the client.
        created: seconds since the epoch.
        arrived_s: `time.monotonic` of the request's arrival.
        deadline_s: `time.monotonic` after which it is given up.
        record: the line for the log, filled when the answer has ended.
        outcome: a finish reason, `disconnected`, `timeout`, `aborted`, `error` or an error's status.
    """

    answer_id: str
    model_id: str
    plan: RequestPlan
    codec: TextCodec
    router: EventRouter
    metrics: ServerMetrics
    arrived_s: float
    deadline_s: float
    keep_alive_s: float
    record: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    outcome: str = ""

    def __post_init__(self) -> None:
        plan = self.plan
        self.inbox = Inbox()
        self.choices = [
            Choice(
                index=index,
                prompt_index=index // plan.num_choices_per_prompt,
                codec=self.codec,
                rules=plan.rules,
                skip_special_tokens=plan.skip_special_tokens,
                drops_output=plan.drops_output,
            )
            for index in range(len(plan.requests))
        ]
        self._by_id = {request.request_id: choice for request, choice in zip(plan.requests, self.choices, strict=True)}
        self._has_begun: set[str] = set()

    def submit(self) -> None:
        """Hand all choices to the engine, or none.

        Raises:
            ApiError: the queue is full (429) or the engine takes no requests (503).
        """
        try:
            for request in self.plan.requests:
                self.router.submit(request, self.inbox)
        except QueueFullError as error:
            self.close("429", counts=False)
            status = self.router.status()
            wait_s = self.metrics.estimate_wait_s(status.num_waiting, status.num_running)
            raise ApiError(
                429,
                f"the queue has no room for {len(self.plan.requests)} more; try again in {wait_s} s",
                code="queue_full",
                headers={"Retry-After": str(wait_s)},
            ) from error
        except EngineUnavailableError as error:
            self.close("503", counts=False)
            raise unavailable(str(error)) from error

    async def events(self) -> AsyncIterator[list[TokenEvent]]:
        """Yield what arrived until every choice has ended, a batch at a time; each event must be given to `take`.

        A batch is empty after `keep_alive_s` without an event.

        Raises:
            ApiError: the deadline (504), or the client is gone (499).
        """
        while not self.is_finished:
            left_s = self.deadline_s - time.monotonic()
            if left_s <= 0:
                self.close("timeout")
                raise ApiError(504, "the request took longer than this server allows", code="request_timeout")
            events = await self.inbox.take_all(min(left_s, self.keep_alive_s))
            if self.inbox.reason is not None:
                self.close(self.inbox.reason)
                raise ApiError(499, "the client is gone", code=self.inbox.reason)
            yield events
        self._end(",".join(sorted({choice.finish_reason or "" for choice in self.choices})))

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    def close(self, outcome: str, counts: bool = True) -> None:
        """Cancel what still runs; a second call does nothing. `counts`: the choices count as ended ones."""
        open_ids = [i for i, choice in self._by_id.items() if choice.finish_reason is None]
        for request_id in self._by_id:
            self.router.close(request_id)
        if not self.outcome:
            self._end(outcome)
            if counts:
                reason = "error" if outcome == "error" else "abort"
                for _ in open_ids:
                    self.metrics.count_end(reason, time.monotonic() - self.arrived_s)

    def _end(self, outcome: str) -> None:
        self.outcome = outcome
        measured = self.measurements()
        usage = self.usage()
        self.record |= {
            "finish_reason": outcome,
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "choices": len(self.choices),
            "time_to_first_token_s": measured["time_to_first_token_s"],
            "decode_s": measured["decode_s"],
            "mean_acceptance_length": measured["speculative_decoding"]["mean_acceptance_length"],
        }

    def take(self, event: TokenEvent) -> tuple[Choice, ChoiceDelta] | None:
        """Take an event and return what it added to which choice; None where that choice has ended before.

        Raises:
            ApiError: a fault of the engine (500), or the server ends (503).
        """
        choice = self._by_id[event.request_id]
        if choice.finish_reason is not None:
            return None
        now_s = time.monotonic()
        if event.finish_reason == "error":
            self.close("error")
            raise ApiError(500, f"generation failed: {event.error or 'unknown fault'}", code="engine_error")
        if event.finish_reason == "cancelled":
            self.close("aborted")
            raise unavailable("the server is shutting down")
        plan = self.plan
        if event.request_id not in self._has_begun:
            self._has_begun.add(event.request_id)
            is_first_of_prompt = choice.index % plan.num_choices_per_prompt == 0
            num_prompt_tokens = len(plan.prompts[choice.prompt_index].ids) if is_first_of_prompt else 0
            self.metrics.count_begin(event, num_prompt_tokens)
        before_s = choice.last_token_s
        delta = choice.take(event, now_s)
        if event.token_ids:
            since_s = now_s - (self.arrived_s if before_s is None else before_s)
            self.metrics.count_delta(event, delta, since_s, is_first_token=before_s is None)
        if delta.finish_reason is not None:
            self.router.close(event.request_id)
            self.metrics.count_end(delta.finish_reason, now_s - self.arrived_s)
        return choice, delta

    def usage(self) -> dict[str, Any]:
        """Return the token counts so far; a prompt counts once, whatever `n`."""
        num_prompt = sum(len(prompt.ids) for prompt in self.plan.prompts)
        num_new = sum(choice.num_tokens for choice in self.choices)
        num_cached = sum(c.num_cached_tokens for c in self.choices if c.index % self.plan.num_choices_per_prompt == 0)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def measurements(self) -> dict[str, Any]:
        """Return acceptance lengths and times; `tokens_per_s` counts tokens after each choice's first."""
        firsts = [c.first_token_s for c in self.choices if c.first_token_s is not None]
        lasts = [c.last_token_s for c in self.choices if c.last_token_s is not None]
        decode_s = max(lasts) - min(firsts) if lasts else None
        num_after = sum(max(c.num_tokens - 1, 0) for c in self.choices)
        return {
            "speculative_decoding": add_up(c.drafts for c in self.choices).to_json(),
            "time_to_first_token_s": min(firsts) - self.arrived_s if firsts else None,
            "decode_s": decode_s,
            "tokens_per_s": num_after / decode_s if decode_s else None,
        }


def unavailable(message: str) -> ApiError:
    """Return the error of a server that takes no requests now."""
    return ApiError(
        503, message or "the server takes no requests now", code="unavailable", headers={"Retry-After": "2"}
    )
