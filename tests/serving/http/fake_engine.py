"""An engine without a model: deterministic text, rounds of given sizes, delays, faults, a queue that fills."""

import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass, field

from domino_jax.records import TokenEvent, TokenLogprobs
from domino_jax.serving.contract import CallTimes, EngineStatus, EngineUnavailableError, QueueFullError


@dataclass
class FakeSettings:
    """How the engine behaves.

    Attributes:
        script: what every answer says, as ids; None: a made-up text that depends on prompt and seed alone.
        rounds: tokens a round, repeated; the first token comes with the prefill.
        round_s: seconds a device call takes.
        rounds_per_call: rounds that are delivered together.
        num_slots, max_waiting: requests that run and that wait.
        load_s: seconds until ready.
        fail_after: rounds after which a request fails; by itself (`row`) or with the whole engine (`engine`).
        ignores_cancel: cancelled requests go on for that many calls, as those in flight on a device do.
    """

    script: list[int] | None = None
    rounds: tuple[int, ...] = (3, 1, 5, 2)
    num_draft_tokens: int = 7
    round_s: float = 0.0
    rounds_per_call: int = 1
    num_slots: int = 8
    max_waiting: int = 64
    load_s: float = 0.0
    fail_after: int | None = None
    fails: str = "row"
    ignores_cancel: int = 0
    max_model_len: int = 512
    vocab_size: int = 300
    max_logprobs: int = 5
    block_sizes: tuple[int, ...] = (12, 6)
    stop_at: int | None = None


@dataclass
class _Row:
    request: object
    tokens: list = field(default_factory=list)
    ends_by: str = "length"
    num_sent: int = 0
    num_rounds: int = 0
    since: float = field(default_factory=time.monotonic)
    calls_after_cancel: int = -1


class FakeEngine:
    def __init__(self, settings=None, **changes):
        self.settings = settings or FakeSettings(**changes)
        self.max_model_len = self.settings.max_model_len
        self.vocab_size = self.settings.vocab_size
        self.max_logprobs = self.settings.max_logprobs
        self.block_sizes = self.settings.block_sizes
        self.submitted, self.cancelled = [], []
        self.calls_of_deliver = 0
        self._lock = threading.Condition()
        self._waiting, self._running = deque(), []
        self._ready, self._drains, self._stops, self._failure = False, False, False, None
        self._thread = None
        self._started_s = 0.0

    def start(self, deliver, observe=lambda times: None):
        self._deliver, self._observe = deliver, observe
        self._started_s = time.monotonic()
        self._ready = self.settings.load_s == 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request):
        with self._lock:
            if self._failure or self._stops or self._drains or not self._ready:
                raise EngineUnavailableError("the fake engine takes no requests")
            if len(self._waiting) >= self.settings.max_waiting:
                raise QueueFullError("full")
            assert all(r.request_id != request.request_id for r in self.submitted)
            self.submitted.append(request)
            self._waiting.append(_Row(request, *self._write(request)))
            self._lock.notify()

    def cancel(self, request_id):
        with self._lock:
            self.cancelled.append(request_id)
            for row in [*self._waiting, *self._running]:
                if row.request.request_id == request_id and row.calls_after_cancel < 0:
                    row.calls_after_cancel = self.settings.ignores_cancel
            self._lock.notify()

    def drain(self):
        self._drains = True

    def stop(self):
        with self._lock:
            self._stops = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join(10)

    def status(self):
        with self._lock:
            running, waiting = len(self._running), len(self._waiting)
        num_prompt = sum(len(r.prompt_ids) for r in self.submitted)
        return EngineStatus(
            is_ready=self._ready and not self._drains and not self._failure,
            progress="" if self._ready else "compiled 3/12",
            failure=self._failure,
            num_running=running,
            num_waiting=waiting,
            cache_usage=running / self.settings.num_slots,
            num_compiles={"warmup": 12, "serving": 0},
            num_prefix_queries=num_prompt,
            num_prefix_hits=num_prompt // 2,
        )

    def _write(self, request):
        """All the tokens of a request, and how it ends."""
        if self.settings.script is not None:
            ids = list(self.settings.script)
        else:
            state = zlib.crc32(repr((list(request.prompt_ids), request.sampling.seed)).encode())
            ids = []
            for _ in range(60 + state % 40):
                state = zlib.crc32(b"x", state)
                ids.append(32 + state % 95)
            ids += [request.stop_ids[0]] if request.stop_ids else [65] * request.max_new_tokens
        if request.min_new_tokens:
            head = [i if i not in request.stop_ids else 66 for i in ids[: request.min_new_tokens]]
            ids = head + ids[len(head) :]
        ids += [67] * (request.max_new_tokens - len(ids))
        for place, token_id in enumerate(ids[: request.max_new_tokens]):
            if token_id in request.stop_ids:
                return ids[: place + 1], "stop"
        return ids[: request.max_new_tokens], "length"

    def _work(self):
        if self.settings.load_s:
            with self._lock:
                self._lock.wait_for(lambda: self._stops, self.settings.load_s)
            self._ready = True
        while True:
            with self._lock:
                if not self._running and not self._waiting and not self._stops:
                    self._lock.wait()
                if self._stops:
                    rows = [*self._running, *self._waiting]
                    self._running, self._waiting = [], deque()
                    break
                while self._waiting and len(self._running) < self.settings.num_slots:
                    self._running.append(self._waiting.popleft())
                rows = list(self._running)
                waiting_cancelled = [r for r in self._waiting if r.calls_after_cancel >= 0]
                for row in waiting_cancelled:
                    self._waiting.remove(row)
            if self.settings.round_s:
                time.sleep(self.settings.round_s)
            events = [TokenEvent(r.request.request_id, finish_reason="cancelled") for r in waiting_cancelled]
            for row in rows:
                for _ in range(self.settings.rounds_per_call):
                    events += [self._run_round(row)] if row in self._running else []
            if self._failure:
                with self._lock:
                    rows = [*self._running, *self._waiting]
                    self._running, self._waiting = [], deque()
                events += [TokenEvent(r.request.request_id, finish_reason="error", error=self._failure) for r in rows]
            self._send(events)
            self._observe(CallTimes(self.settings.rounds_per_call, 0.01, 0.25))
            if self._failure:
                return
        self._send([TokenEvent(r.request.request_id, finish_reason="cancelled") for r in rows])

    def _send(self, events):
        if events:
            self.calls_of_deliver += 1
            self._deliver(events)

    def _run_round(self, row):
        request, settings = row.request, self.settings
        if row.calls_after_cancel == 0:
            self._remove(row)
            return TokenEvent(request.request_id, finish_reason="cancelled")
        row.calls_after_cancel -= row.calls_after_cancel > 0
        is_prefill = row.num_sent == 0
        if settings.fail_after is not None and row.num_rounds >= settings.fail_after:
            self._remove(row)
            if settings.fails == "engine":
                self._failure = "the device is lost"
            return TokenEvent(request.request_id, finish_reason="error", error="logits are not finite")
        size = 1 if is_prefill or not request.use_draft else settings.rounds[row.num_rounds % len(settings.rounds)]
        row.num_rounds += not is_prefill
        ids = row.tokens[row.num_sent : row.num_sent + size]
        budget_left = request.max_new_tokens - row.num_sent
        row.num_sent += len(ids)
        is_end = row.num_sent == len(row.tokens)
        if is_end:
            self._remove(row)
        drafted = not is_prefill and request.use_draft
        return TokenEvent(
            request.request_id,
            token_ids=ids,
            token_sources=self._sources(len(ids), size, drafted),
            logprobs=None if request.num_top_logprobs is None else [self._score(i, request) for i in ids],
            acceptance_len=None if is_prefill else min(size, budget_left),
            num_draft_tokens=settings.num_draft_tokens if drafted else 0,
            prompt_logprobs=[self._score(i, request) for i in request.prompt_ids[1:]]
            if is_prefill and request.num_prompt_logprobs is not None
            else None,
            num_cached_tokens=len(request.prompt_ids) // 2 if is_prefill else 0,
            queue_s=time.monotonic() - row.since if is_prefill else None,
            finish_reason=row.ends_by if is_end else None,
        )

    def _remove(self, row):
        with self._lock:
            if row in self._running:
                self._running.remove(row)

    def _sources(self, num_tokens, size, drafted):
        if not drafted:
            return ["target"] * num_tokens
        last = "bonus" if size > self.settings.num_draft_tokens else "corrected"
        return (["drafted"] * (size - 1) + [last])[:num_tokens]

    def _score(self, token_id, request):
        top = [(token_id, -0.5), *(((token_id + k) % self.vocab_size, -1.0 - k) for k in range(1, 6))]
        return TokenLogprobs(-0.5, top[: request.num_top_logprobs])
