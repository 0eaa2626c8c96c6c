"""The engine: one thread that owns the device state and runs requests through it, round after round.

In: `Request`s from any thread. Out: `TokenEvent`s, a batch of them a device call. Between two calls requests join
(a prompt is run in chunks on a row of its own, then takes a slot) and leave. Knows nothing about text or HTTP.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.decoding.prefill import split_into_chunks
from domino_jax.decoding.slots import MAX_TOP_LOGPROBS, CallResult, SlotState
from domino_jax.decoding.state import DecodeSettings, ModelParams
from domino_jax.ops.sampling import SamplingParams
from domino_jax.ops.scoring import Scores
from domino_jax.records import SOURCE_NAMES, FinishReason, Penalties, Request, TokenEvent, TokenLogprobs
from domino_jax.serving.contract import CallTimes, Deliver, EngineStatus, EngineUnavailableError
from domino_jax.serving.engine_config import EngineConfig, find_max_model_len, plan_ladders
from domino_jax.serving.prefix_cache import PrefixCache
from domino_jax.serving.programs import MAX_STOP_IDS, Programs, Shape
from domino_jax.serving.scheduler import Scheduler
from domino_jax.serving.width_policy import WidthPolicy

_CALLS_BEFORE_SHRINKING = 8
"""Calls in a row that a smaller batch would have held; moving slots costs about as much as a round."""
_NUMERIC_FAULT = (
    "the model's states for this request are not finite (NaN or infinity); its text so far stands, other requests are "
    "not concerned"
)


@dataclass
class _Prefill:
    """A prompt being run.

    Attributes:
        row: its state, one row of `positions` positions.
        done_len: prompt tokens that are in the caches.
    """

    row: SlotState
    positions: int
    done_len: int
    num_cached: int
    chunks: deque[int]
    prompt_logprobs: list[TokenLogprobs]


@dataclass
class _Sequence:
    """A request that holds a slot.

    Attributes:
        tokens: prompt and output.
        limit_len: number of tokens at which it ends.
        queue_s: seconds it waited for the slot.
        prefill: until its prompt is done.
        context_len: positions whose features the draft's context holds.
    """

    request: Request
    slot: int
    tokens: list[int]
    limit_len: int
    queue_s: float
    prefill: _Prefill | None = None
    context_len: int = 0


class SlotEngine:
    """Continuous batching with speculative rounds; see `contract.Engine` for what it promises.

    Attributes:
        programs: what it runs; their costs are known once it is ready.
        policy: chooses the block size.
    """

    def __init__(
        self,
        target: TargetConfig,
        draft: DraftConfig | None,
        load_params: Callable[[], ModelParams],
        config: EngineConfig,
        dtype: str = "float32",
    ) -> None:
        """Plan the engine; nothing is loaded before `start`.

        Raises:
            ConfigError: the configuration does not fit the models.
        """
        self.max_model_len = find_max_model_len(config, target)
        self.vocab_size = target.vocab_size
        self.max_logprobs = MAX_TOP_LOGPROBS
        self._config = config
        self._ladders = plan_ladders(config, target, draft)
        self._load_params = load_params
        self.programs = Programs(DecodeSettings(target=target, draft=draft, dtype=dtype), self._ladders)
        num_drafts = {size: self.programs.num_draft_tokens(size) for size in self._ladders.block_sizes}
        self.policy = WidthPolicy(num_drafts)
        self._num_draft_tokens = num_drafts
        self._prefix_cache = PrefixCache(self._ladders.num_blocks, self._ladders.block_len)
        self._shape = Shape(self._ladders.rows[0], self._ladders.positions[0])
        self._sequences: dict[str, _Sequence] = {}
        self._cancelled_slots: set[int] = set()
        self._calls_too_large = 0
        # Shared with other threads, under the lock:
        self._lock = threading.Condition()
        self._scheduler = Scheduler(config.max_slots, config.max_waiting)
        self._requests: dict[str, Request] = {}
        self._arrived_s: dict[str, float] = {}
        self._cancelled: set[str] = set()
        self._state = "not started"
        self._failure: str | None = None
        self._num_compiles = {"warmup": 0, "serving": 0}
        self._busy_s = self._device_s = 0.0
        self._cache_usage = 0.0
        self._thread: threading.Thread | None = None
        self._is_warming_up = True

    def start(self, deliver: Deliver, observe: Callable[[CallTimes], None] = lambda times: None) -> None:
        """See `contract.Engine.start`."""
        self._deliver = deliver
        self._observe = observe
        self._state = "starting"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """See `contract.Engine.submit`.

        Raises:
            ValueError: the request cannot be served: its prompt is empty or fills the context, an id is outside the
                vocabulary, or it asks for more stop ids or log-probabilities than there can be.
        """
        self._check(request)
        with self._lock:
            if self._state != "ready":
                raise EngineUnavailableError(f"the engine is {self._state}; it takes no requests")
            self._scheduler.submit(request.request_id)
            self._requests[request.request_id] = request
            self._arrived_s[request.request_id] = time.monotonic()
            self._lock.notify()

    def _check(self, request: Request) -> None:
        prompt_len = len(request.prompt_ids)
        if not 1 <= prompt_len < self.max_model_len:
            raise ValueError(f"the prompt has {prompt_len} tokens; 1 .. {self.max_model_len - 1} are allowed")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}; it must be 1 or more")
        ids = [*request.prompt_ids, *request.stop_ids, *request.logit_bias]
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"a token id is outside the vocabulary, 0 .. {self.vocab_size - 1}")
        if len(request.stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"{len(request.stop_ids)} stop ids are given; {MAX_STOP_IDS} are allowed")
        for num_top in (request.num_top_logprobs, request.num_prompt_logprobs):
            if not 0 <= (num_top or 0) <= self.max_logprobs:
                raise ValueError(f"{num_top} log-probabilities are asked for; 0 .. {self.max_logprobs} are allowed")

    def cancel(self, request_id: str) -> None:
        """See `contract.Engine.cancel`."""
        with self._lock:
            if request_id in self._requests:
                self._cancelled.add(request_id)
                self._lock.notify()

    def drain(self) -> None:
        """See `contract.Engine.drain`."""
        with self._lock:
            if self._state != "failed":
                self._state = "draining"
                self._lock.notify()

    def stop(self) -> None:
        """See `contract.Engine.stop`."""
        with self._lock:
            if self._state != "failed":
                self._state = "stopped"
                self._lock.notify()
        if self._thread is not None:
            self._thread.join()

    def status(self) -> EngineStatus:
        """See `contract.Engine.status`."""
        with self._lock:
            return EngineStatus(
                is_ready=self._state == "ready",
                progress=self._state,
                failure=self._failure,
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                cache_usage=self._cache_usage,
                num_compiles=dict(self._num_compiles),
                num_prefix_queries=self._prefix_cache.num_queries,
                num_prefix_hits=self._prefix_cache.num_hits,
                busy_s=self._busy_s,
                device_s=self._device_s,
            )

    # ------------------------------------------------------------------------------------------ the engine's own thread

    def _run(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(self._count_compile)
        try:
            self._warm_up()
            while self._wait_for_work():
                self._step()
            self._end_all("cancelled", "")
        except BaseException as error:
            with self._lock:
                self._state, self._failure = "failed", f"{type(error).__name__}: {error}"
            self._end_all("error", "the engine has failed; the server is going down")
            raise

    def _count_compile(self, event: str, duration_s: float, **_: Any) -> None:
        is_own = self._is_warming_up or threading.current_thread() is self._thread
        if event == "/jax/core/compile/backend_compile_duration" and is_own:
            with self._lock:
                self._num_compiles["warmup" if self._is_warming_up else "serving"] += 1

    def _warm_up(self) -> None:
        self._set_progress("loading weights")
        self.programs.take_params(self._load_params())
        self.programs.compile_all(lambda done, total: self._set_progress(f"compiled {done}/{total}"), self._is_stopped)
        self._set_progress("measuring rounds")
        self.programs.measure(self._is_stopped)
        if self._is_stopped():
            return
        self._slots = self.programs.init_slots(self._shape)
        self._pool = self.programs.init_pool() if self._ladders.num_blocks else None
        jax.block_until_ready((self._slots, self._pool))
        self._is_warming_up = False
        with self._lock:
            if self._state != "draining":
                self._state = "ready"

    def _set_progress(self, text: str) -> None:
        with self._lock:
            if self._state not in ("draining", "stopped"):
                self._state = text

    def _is_stopped(self) -> bool:
        with self._lock:
            return self._state == "stopped"

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; return False when the engine shall end."""
        with self._lock:
            while self._state != "stopped" and not (self._requests or self._cancelled):
                self._lock.wait()
            return self._state != "stopped"

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Count the time of a device call, from dispatch until its results are on the host."""
        began = time.perf_counter()
        yield
        self._device_s += time.perf_counter() - began

    def _step(self) -> None:
        began = time.perf_counter()
        events: list[TokenEvent] = []
        self._take_cancellations(events)
        self._admit()
        self._run_prefills(events)
        if events:  # first tokens do not wait for the rounds of others
            self._deliver(events)
        events = []
        self._run_rounds(events)
        if events:
            self._deliver(events)
        self._busy_s += time.perf_counter() - began

    def _take_cancellations(self, events: list[TokenEvent]) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
        for request_id in cancelled:
            if request_id in self._requests:
                sequence = self._sequences.get(request_id)
                if sequence is not None and sequence.prefill is None:
                    self._cancelled_slots.add(sequence.slot)
                events.append(self._end(request_id, "cancelled"))

    def _admit(self) -> None:
        while True:
            with self._lock:
                admitted = self._scheduler.admit()
                if admitted is None:
                    return
                request = self._requests[admitted[0]]
                queue_s = time.monotonic() - self._arrived_s[admitted[0]]
            tokens = list(request.prompt_ids)
            limit_len = min(len(tokens) + request.max_new_tokens, self.max_model_len)
            self._sequences[admitted[0]] = _Sequence(request, admitted[1], tokens, limit_len, queue_s)

    def _end(self, request_id: str, reason: FinishReason, error: str = "", **event: Any) -> TokenEvent:
        """Forget a request and return its last event."""
        self._sequences.pop(request_id, None)
        with self._lock:
            self._scheduler.release(request_id)
            del self._requests[request_id], self._arrived_s[request_id]
        return TokenEvent(request_id, finish_reason=reason, error=error, **event)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        with self._lock:
            open_ids = list(self._requests)
        events = [self._end(request_id, reason, error) for request_id in open_ids]
        if events:
            self._deliver(events)

    # Prompts

    def _run_prefills(self, events: list[TokenEvent]) -> None:
        waiting = [s for s in self._sequences.values() if not self._is_running(s)]
        budget = self._config.prefill_tokens_per_call
        for sequence in waiting:
            prefill = sequence.prefill or self._start_prefill(sequence)
            while prefill.chunks and budget > 0:
                budget -= prefill.chunks[0]
                hidden, start = self._run_chunk(sequence, prefill)
            if prefill.chunks:
                return
            self._finish_prefill(sequence, prefill, hidden, start, events)
            if budget <= 0:
                return

    def _is_running(self, sequence: _Sequence) -> bool:
        return sequence.prefill is None and len(sequence.tokens) > len(sequence.request.prompt_ids)

    def _start_prefill(self, sequence: _Sequence) -> _Prefill:
        prompt = sequence.tokens
        positions = self._ladders.positions_for(len(prompt) + self._ladders.margin)
        row = _fill_row(self.programs.init_slots(Shape(1, positions)), sequence)
        blocks: list[int] = []
        if self._pool is not None and sequence.request.num_prompt_logprobs is None:
            # The last prompt token is always run: its state chooses the first new token.
            blocks = self._prefix_cache.match(prompt[:-1])
            if blocks:
                row = self.programs.load_prefix(self._pool, row, positions, blocks)
        num_cached = len(blocks) * self._ladders.block_len
        chunks = deque(split_into_chunks(len(prompt) - num_cached))
        sequence.prefill = _Prefill(row, positions, num_cached, num_cached, chunks, [])
        return sequence.prefill

    def _run_chunk(self, sequence: _Sequence, prefill: _Prefill) -> tuple[jax.Array, int]:
        length, start = prefill.chunks.popleft(), prefill.done_len
        with self._on_device():
            prefill.row, hidden = self.programs.prefill(prefill.row, prefill.positions, length, start)
        num_top = sequence.request.num_prompt_logprobs
        if num_top is not None:
            following = sequence.tokens[start + 1 : start + 1 + length]
            scores = jax.device_get(self.programs.score(hidden, following))
            prefill.prompt_logprobs += [_read_logprobs(scores, 0, i, num_top) for i in range(len(following))]
        prefill.done_len = min(start + length, len(sequence.tokens))
        return hidden, start

    def _finish_prefill(
        self, sequence: _Sequence, prefill: _Prefill, hidden: jax.Array, start: int, events: list[TokenEvent]
    ) -> None:
        prompt_len = len(sequence.tokens)
        with self._on_device():
            last_hidden = self.programs.take_position(hidden, prompt_len - 1 - start)
            row, result = self.programs.choose_first(prefill.row, prefill.positions, last_hidden)
            result = jax.device_get(result)
        sequence.prefill = None
        sequence.context_len = prompt_len
        details = {"num_cached_tokens": prefill.num_cached, "queue_s": sequence.queue_s}
        if sequence.request.num_prompt_logprobs is not None:
            details["prompt_logprobs"] = prefill.prompt_logprobs
        if result.has_failed[0]:
            events.append(self._end(sequence.request.request_id, "error", _NUMERIC_FAULT, **details))
            return
        self._store_prefix(row, prefill.positions, sequence.tokens)
        token_event = self._take_tokens(sequence, result, 0, 0, 1)
        reason = self._find_end(sequence, result, 0)
        if reason is None:
            self._insert(row, prefill.positions, sequence.slot)
            events.append(TokenEvent(sequence.request.request_id, **token_event, **details))
        else:
            events.append(self._end(sequence.request.request_id, reason, **token_event, **details))

    def _store_prefix(self, row: SlotState, positions: int, tokens: Sequence[int]) -> None:
        if self._pool is None:
            return
        to_fill = self._prefix_cache.insert(tokens)
        if to_fill:
            self._pool = self.programs.store_prefix(self._pool, row, positions, to_fill)

    def _insert(self, row: SlotState, positions: int, slot: int) -> None:
        rows = max(self._shape.rows, self._ladders.rows_for(slot + 1))
        self._reshape(Shape(rows, max(self._shape.positions, positions)))
        self._slots = self.programs.insert(self._slots, self._shape, row, positions, slot)
        self._cancelled_slots.discard(slot)

    # Rounds

    def _run_rounds(self, events: list[TokenEvent]) -> None:
        running = [s for s in self._sequences.values() if self._is_running(s)]
        if not running:
            return
        self._fit_rows(running)
        size = self._choose_block_size(running)
        if size > 1:
            for sequence in running:
                self._catch_up(sequence)
        with self._lock:
            others_wait = self._scheduler.num_waiting > 0
        is_busy = others_wait or len(running) < len(self._sequences)
        num_rounds = 1 if is_busy else self._config.rounds_per_call
        self._fit_positions(running, num_rounds * (self._num_draft_tokens[size] + 1))
        is_cancelled = np.zeros(self._shape.rows, bool)
        is_cancelled[[slot for slot in self._cancelled_slots if slot < self._shape.rows]] = True
        self._cancelled_slots.clear()
        wants_scores = any(s.request.num_top_logprobs is not None for s in running)
        before_s = self._device_s
        with self._on_device():
            self._slots, result = self.programs.run(
                self._slots, self._shape, size, is_cancelled, num_rounds, others_wait
            )
            result = jax.device_get(result if wants_scores else result.replace(scores=None))
        call_s = self._device_s - before_s
        self._read_call(running, result, size, events)
        self._observe(CallTimes(int(result.num_rounds.max()), call_s, self.programs.draft_share[self._shape, size]))
        with self._lock:
            used = sum(len(s.tokens) for s in self._sequences.values())
            self._cache_usage = used / (self._ladders.rows[-1] * self._ladders.positions[-1])

    def _choose_block_size(self, running: list[_Sequence]) -> int:
        num_drafted = sum(s.request.use_draft for s in running)
        if not self._config.is_adaptive:
            return self._ladders.block_sizes[0] if num_drafted else 1
        costs = {size: self.programs.round_s[self._shape, size] for size in self._ladders.block_sizes}
        return self.policy.choose(costs, num_drafted, len(running) - num_drafted)

    def _catch_up(self, sequence: _Sequence) -> None:
        """Bring the draft's context up to the anchor, where plain rounds have left it behind."""
        anchor_pos = len(sequence.tokens) - 1
        if not sequence.request.use_draft or sequence.context_len >= anchor_pos:
            return
        row = self.programs.extract(self._slots, self._shape, sequence.slot)
        start = sequence.context_len
        for length in split_into_chunks(anchor_pos - start):
            row, _ = self.programs.prefill(row, self._shape.positions, length, start)
            start += length
        self._slots = self.programs.insert(self._slots, self._shape, row, self._shape.positions, sequence.slot)
        sequence.context_len = anchor_pos

    def _read_call(self, running: list[_Sequence], result: CallResult, size: int, events: list[TokenEvent]) -> None:
        accepted = []
        num_drafts = self._num_draft_tokens[size]
        for sequence in running:
            row, request = sequence.slot, sequence.request
            lengths = result.acceptance_lengths[row, : result.num_rounds[row]].tolist()
            num_new, at = int(result.num_new[row]), 0
            reason = self._find_end(sequence, result, row, num_new)
            rounds = []
            for length in lengths:
                kept = min(length, num_new - at)
                rounds.append(
                    self._take_tokens(sequence, result, row, at, kept)
                    | {"acceptance_len": length, "num_draft_tokens": num_drafts if request.use_draft else 0}
                )
                at += kept
            if size > 1 and request.use_draft:
                accepted += [length - 1 for length in lengths]
                sequence.context_len = len(sequence.tokens) - 1
            if result.has_failed[row]:
                events += [TokenEvent(request.request_id, **fields) for fields in rounds]
                events.append(self._end(request.request_id, "error", _NUMERIC_FAULT))
                continue
            if reason is None:
                events += [TokenEvent(request.request_id, **fields) for fields in rounds]
                continue
            events += [TokenEvent(request.request_id, **fields) for fields in rounds[:-1]]
            if self._pool is not None:
                self._store_row(sequence)
            events.append(self._end(request.request_id, reason, **rounds[-1]))
        self.policy.observe(size, accepted)

    def _store_row(self, sequence: _Sequence) -> None:
        """Keep what a finished sequence has computed for whoever continues it."""
        num_known = len(sequence.tokens) - 1
        if sequence.context_len < num_known and self.programs.settings.draft is not None:
            num_known = sequence.context_len
        to_fill = self._prefix_cache.insert(sequence.tokens[:num_known])
        if to_fill:
            row = self.programs.extract(self._slots, self._shape, sequence.slot)
            self._pool = self.programs.store_prefix(self._pool, row, self._shape.positions, to_fill)

    def _take_tokens(self, sequence: _Sequence, result: CallResult, row: int, start: int, count: int) -> dict[str, Any]:
        """Append new tokens of a call to their sequence; return the fields of their event."""
        new = result.tokens[row, start : start + count].tolist()
        sequence.tokens += new
        num_top = sequence.request.num_top_logprobs
        logprobs = None
        if num_top is not None:
            logprobs = [_read_logprobs(result.scores, row, start + i, num_top) for i in range(count)]
        sources = [SOURCE_NAMES[source] for source in result.sources[row, start : start + count]]
        return {"token_ids": new, "token_sources": sources, "logprobs": logprobs}

    def _find_end(self, sequence: _Sequence, result: CallResult, row: int, num_new: int = 0) -> FinishReason | None:
        """Return why a sequence is done after `num_new` further tokens, None where it goes on."""
        if not result.is_done[row]:
            return None
        if result.has_stopped[row]:
            return "stop"
        budget = len(sequence.request.prompt_ids) + sequence.request.max_new_tokens
        return "length" if len(sequence.tokens) + num_new >= budget else "context"

    # Shapes

    def _fit_rows(self, running: list[_Sequence]) -> None:
        """Move to a smaller batch when one would have held the sequences for a while."""
        smaller = self._ladders.rows_for(len(self._sequences))
        if smaller >= self._shape.rows:
            self._calls_too_large = 0
            return
        self._calls_too_large += 1
        if self._calls_too_large < _CALLS_BEFORE_SHRINKING:
            return
        self._calls_too_large = 0
        with self._lock:
            moved = self._scheduler.compact(smaller)
        order = np.arange(self._shape.rows)
        for old, new in moved.items():
            order[new] = old
        for sequence in self._sequences.values():
            sequence.slot = moved.get(sequence.slot, sequence.slot)
        self._cancelled_slots.clear()  # only the running ones stay in use
        self._reshape(Shape(smaller, self._shape.positions), order, {s.slot for s in running})

    def _fit_positions(self, running: list[_Sequence], num_new: int) -> None:
        longest = max(min(len(s.tokens) + num_new, s.limit_len) for s in running)
        needed = self._ladders.positions_for(longest + self._ladders.margin)
        if needed > self._shape.positions:
            self._reshape(Shape(self._shape.rows, needed))

    def _reshape(self, shape: Shape, order: np.ndarray | None = None, used: set[int] | None = None) -> None:
        """Bring the slots to a shape; `order` names the row that each of the new ones takes over."""
        for step in self._ladders.steps_between(self._shape, shape):
            rows = np.arange(step.rows) if order is None else order[: step.rows]
            is_used = rows < self._shape.rows if used is None else np.isin(np.arange(step.rows), list(used))
            rows = np.minimum(rows, self._shape.rows - 1)
            self._slots = self.programs.resize(self._slots, self._shape, step, rows, is_used)
            self._shape, order = step, None


def _fill_row(row: SlotState, sequence: _Sequence) -> SlotState:
    """Return a one-row state that holds a request's prompt and settings."""
    request, prompt = sequence.request, sequence.tokens
    state, adjustment = row.decode, row.adjustment
    vocab_size = adjustment.bias.shape[1]
    tokens = np.zeros(state.tokens.shape, np.int32)
    tokens[0, : len(prompt)] = prompt
    stop_ids = np.full(state.stop_ids.shape, -1, np.int32)
    stop_ids[0, : len(request.stop_ids)] = request.stop_ids
    sampling, penalties = request.sampling, request.penalties
    decode = state.replace(
        tokens=tokens,
        committed_len=np.array([len(prompt)], np.int32),
        limit_len=np.array([sequence.limit_len], np.int32),
        stop_ids=stop_ids,
        is_done=np.array([False]),
        sampling=SamplingParams(
            temperature=np.array([sampling.temperature], np.float32),
            top_k=np.array([sampling.top_k], np.int32),
            top_p=np.array([sampling.top_p], np.float32),
            min_p=np.array([sampling.min_p], np.float32),
            seed=np.array([sampling.seed], np.uint32),
        ),
    )
    if request.logit_bias or request.min_new_tokens or penalties != Penalties():
        bias = np.zeros((1, vocab_size), np.float32)
        bias[0, list(request.logit_bias)] = list(request.logit_bias.values())
        prompt_seen = np.zeros((1, vocab_size), bool)
        prompt_seen[0, prompt] = True
        adjustment = adjustment.replace(
            is_used=np.array([True]),
            bias=bias,
            presence=np.array([penalties.presence], np.float32),
            frequency=np.array([penalties.frequency], np.float32),
            repetition=np.array([penalties.repetition], np.float32),
            min_len=np.array([len(prompt) + request.min_new_tokens], np.int32),
            prompt_seen=prompt_seen,
        )
    return row.replace(
        decode=decode,
        adjustment=adjustment,
        wants_scores=np.array([request.num_top_logprobs is not None]),
        uses_draft=np.array([request.use_draft]),
    )


def _read_logprobs(scores: Scores, row: int, position: int, num_top: int) -> TokenLogprobs:
    ids = scores.top_ids[row, position, :num_top].tolist()
    values = scores.top[row, position, :num_top].tolist()
    return TokenLogprobs(float(scores.chosen[row, position]), list(zip(ids, values, strict=True)))
