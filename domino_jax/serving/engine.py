"""The engine: one thread that owns the device state and runs requests through it, round after round.

In: `Request`s from any thread. Out: `TokenEvent`s, a batch of them a device call. Between two calls requests join
(a prompt is run in chunks on a row of its own, then takes a slot) and leave. Knows nothing about text or HTTP.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from domino_jax.config import DraftConfig, TargetConfig
from domino_jax.decoding.slots import MAX_TOP_LOGPROBS, CallResult
from domino_jax.decoding.state import ModelParams
from domino_jax.records import FinishReason, Request, TokenEvent
from domino_jax.serving.compile_listener import listen_for_compiles
from domino_jax.serving.contract import CallTimes, Deliver, EngineStatus
from domino_jax.serving.engine_config import EngineConfig, find_max_model_len, find_settings, plan_ladders
from domino_jax.serving.intake import Intake
from domino_jax.serving.known_tokens import KnownTokens
from domino_jax.serving.programs import MAX_STOP_IDS, Programs, Shape
from domino_jax.serving.round_costs import Costs, Manner, count_call_rounds, find_manner, measure_rounds
from domino_jax.serving.sequence import PromptRun, ServedSequence
from domino_jax.serving.slot_batch import SlotBatch
from domino_jax.serving.width_policy import WidthPolicy
from domino_jax.sharding import Layout

_CALLS_BEFORE_SHRINKING = 8
"""Calls in a row that a smaller batch would have held; moving slots costs about as much as a round."""
_NUMERIC_FAULT = (
    "the model's states for this request are not finite (NaN or infinity); its text so far stands, other requests are "
    "not concerned"
)


class SlotEngine:
    """Continuous batching with speculative rounds; see `contract.Engine` for what it promises.

    Attributes:
        programs: what it runs.
        costs: what their rounds cost; known once it is ready.
        policy: chooses the block size.
    """

    def __init__(
        self,
        target: TargetConfig,
        draft: DraftConfig | None,
        load_params: Callable[[], ModelParams],
        config: EngineConfig,
        dtype: str = "float32",
        layout: Layout | None = None,
    ) -> None:
        """Plan the engine; nothing is loaded before `start`. With a layout `load_params` gives parameters laid out so.

        Raises:
            ConfigError: the configuration does not fit the models.
        """
        self.max_model_len = find_max_model_len(config, target)
        self.vocab_size = target.vocab_size
        self.max_logprobs = MAX_TOP_LOGPROBS
        self._config = config
        self._ladders = plan_ladders(config, target, draft)
        self.block_sizes = tuple(size for size in self._ladders.block_sizes if size > 1)
        self._load_params = load_params
        self.programs = Programs(find_settings(config, target, draft, dtype), self._ladders, layout)
        num_drafts = {size: self.programs.num_draft_tokens(size) for size in self._ladders.block_sizes}
        self.policy = WidthPolicy(num_drafts)
        self._num_draft_tokens = num_drafts
        self.costs: Costs = {}
        self._batch = SlotBatch(self.programs)
        self._known_tokens = KnownTokens(self._batch, config.prefill_tokens_per_call)
        self._sequences: dict[str, ServedSequence] = {}
        self._events: list[TokenEvent] = []
        self._calls_too_large = 0
        self._intake = Intake(config.max_slots, config.max_waiting)
        self._compiles_lock = threading.Lock()
        self._num_compiles = {"warmup": 0, "serving": 0}
        self._busy_s = 0.0
        self._cache_usage = 0.0
        self._thread: threading.Thread | None = None
        self._is_warming_up = True

    def start(self, deliver: Deliver, observe: Callable[[CallTimes], None] = lambda times: None) -> None:
        """See `contract.Engine.start`."""
        self._deliver = deliver
        self._observe = observe
        self._intake.begin()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """See `contract.Engine.submit`.

        Raises:
            ValueError: the request cannot be served: its prompt is empty or fills the context, an id is outside the
                vocabulary, it asks for more stop ids or log-probabilities than there can be, or for a block size that
                is not served.
        """
        self._check(request)
        self._intake.submit(request)

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
        if request.block_size is not None and request.block_size not in self.block_sizes:
            raise ValueError(f"block size {request.block_size} is asked for; {self.block_sizes} are served")

    def cancel(self, request_id: str) -> None:
        """See `contract.Engine.cancel`."""
        self._intake.cancel(request_id)

    def drain(self) -> None:
        """See `contract.Engine.drain`."""
        self._intake.drain()

    def stop(self) -> None:
        """See `contract.Engine.stop`."""
        self._intake.stop()
        if self._thread is not None:
            self._thread.join()

    def status(self) -> EngineStatus:
        """See `contract.Engine.status`."""
        with self._compiles_lock:
            num_compiles = dict(self._num_compiles)
        return EngineStatus(
            **self._intake.read_status(),
            cache_usage=self._cache_usage,
            num_compiles=num_compiles,
            num_prefix_queries=self._batch.prefixes.num_queries,
            num_prefix_hits=self._batch.prefixes.num_hits,
            busy_s=self._busy_s,
            device_s=self._batch.device_s,
        )

    # ------------------------------------------------------------------------------------------ the engine's own thread

    def _run(self) -> None:
        try:
            with listen_for_compiles(self._count_compile):
                self._warm_up()
                while self._intake.wait_for_work():
                    self._step()
            self._end_all("cancelled", "")
        except BaseException as error:
            self._intake.fail(f"{type(error).__name__}: {error}")
            self._end_all("error", "the engine has failed; the server is going down")
            raise

    def _count_compile(self) -> None:
        if self._is_warming_up or threading.current_thread() is self._thread:
            with self._compiles_lock:
                self._num_compiles["warmup" if self._is_warming_up else "serving"] += 1

    def _warm_up(self) -> None:
        intake = self._intake
        intake.set_progress("loading weights")
        self.programs.take_params(self._load_params())
        self.programs.compile_all(
            lambda done, total: intake.set_progress(f"compiled {done}/{total}"), intake.is_stopped
        )
        if not intake.is_stopped():
            intake.set_progress("measuring rounds")
            self.costs = measure_rounds(self.programs, intake.is_stopped)
        if intake.is_stopped():
            return
        self._batch.allocate()
        self._is_warming_up = False
        intake.set_progress("ready")

    def _step(self) -> None:
        began, shape = time.perf_counter(), self._batch.shape
        self._take_cancellations()
        self._admit()
        has_prompts = any(not s.is_running for s in self._sequences.values())
        num_begun = self._run_prompts()
        self._deliver_events()  # first tokens do not wait for the rounds of others
        size, rounds_s, teaches = self._run_rounds()
        self._deliver_events()
        used = sum(len(s.tokens) for s in self._sequences.values())
        self._cache_usage = used / (self._ladders.rows[-1] * self._ladders.positions[-1])
        step_s = time.perf_counter() - began
        self._busy_s += step_s
        if teaches and shape == self._batch.shape:  # a change takes long and comes seldom
            self.policy.observe_between(shape, size, step_s - rounds_s, num_begun, has_prompts)

    def _deliver_events(self) -> None:
        events, self._events = self._events, []
        if events:
            self._deliver(events)

    def _take_cancellations(self) -> None:
        for request_id in self._intake.take_cancelled():
            sequence = self._sequences.get(request_id)
            if sequence is not None and sequence.is_running:
                self._store(sequence)  # a stop string ends a request this way
                self._batch.cancel(sequence.slot)
            self._events.append(self._end(request_id, "cancelled"))

    def _admit(self) -> None:
        while (admission := self._intake.admit()) is not None:
            request, tokens = admission.request, list(admission.request.prompt_ids)
            limit_len = min(len(tokens) + request.max_new_tokens, self.max_model_len)
            self._sequences[request.request_id] = ServedSequence(
                request, admission.slot, tokens, limit_len, admission.queue_s
            )

    def _end(self, request_id: str, reason: FinishReason, error: str = "", **event: Any) -> TokenEvent:
        """Forget a request and return its last event."""
        self._sequences.pop(request_id, None)
        self._intake.release(request_id)
        return TokenEvent(request_id, finish_reason=reason, error=error, **event)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        self._events += [self._end(request_id, reason, error) for request_id in self._intake.open_ids()]
        self._deliver_events()

    # Prompts

    def _run_prompts(self) -> int:
        """Run prompts, oldest first, as far as the budget of the step goes; return how many are done."""
        self._known_tokens.begin_step()
        num_done = 0
        for sequence in [s for s in self._sequences.values() if not s.is_running]:
            if self._known_tokens.budget <= 0:
                break
            done = self._known_tokens.run_prompt(sequence)
            if done is not None:
                self._events.append(self._finish_prompt(sequence, *done))
                num_done += 1
        return num_done

    def _finish_prompt(self, sequence: ServedSequence, run: PromptRun, result: CallResult) -> TokenEvent:
        """Take the first token and let the sequence run; return its first event."""
        request_id = sequence.request.request_id
        details: dict[str, Any] = {"num_cached_tokens": run.num_cached, "queue_s": sequence.queue_s}
        if sequence.request.num_prompt_logprobs is not None:
            details["prompt_logprobs"] = run.logprobs
        if result.has_failed[0]:
            return self._end(request_id, "error", _NUMERIC_FAULT, **details)
        self._batch.store_prefix(run.row, run.positions, sequence.tokens)
        details |= sequence.take_tokens(result, 0, 0, 1)
        reason = sequence.find_end(result, 0)
        if reason is not None:
            return self._end(request_id, reason, **details)
        self._batch.insert(run.row, run.positions, sequence.slot)
        sequence.is_running = True
        return TokenEvent(request_id, **details)

    # Rounds

    def _run_rounds(self) -> tuple[int, float, bool]:
        """Run a call of rounds and read its results.

        Returns its block size, its seconds on the device, and whether the policy may learn times from it: what was
        asked for was not its choice, and filling contexts of drafts counts neither as the call nor as between calls.
        """
        running = [s for s in self._sequences.values() if s.is_running]
        if not running:
            return 1, 0.0, False
        self._shrink_batch(running)
        manner = find_manner(s.request.sampling for s in running)
        asked = {s.request.block_size for s in running if s.request.use_draft} - {None}
        size, num_rounds = self._choose_rounds(running, manner, min(asked, default=None))
        drafted, has_caught_up = self._choose_drafted(running) if size > 1 else (set(), False)
        num_new = num_rounds * (self._num_draft_tokens[size] + 1)
        self._batch.hold_positions(max(min(len(s.tokens) + num_new, s.limit_len) for s in running))
        cost = self.costs[self._batch.shape, size, manner]
        wants_scores = any(s.request.num_top_logprobs is not None for s in running)
        result, call_s = self._batch.run(size, drafted, num_rounds, self._intake.has_waiting(), wants_scores)
        accepted: list[int] = []
        for sequence in running:
            self._events += self._read_row(sequence, result, size, sequence.slot in drafted, accepted)
        num_run = int(result.num_rounds.max())
        self._observe(CallTimes(num_run, call_s, cost.draft_share))
        if not asked:
            self.policy.observe(size, accepted)
        teaches = not asked and not has_caught_up
        if teaches:
            self.policy.observe_call(self._batch.shape, size, num_run, cost.seconds, call_s)
        return size, call_s, teaches

    def _choose_rounds(self, running: list[ServedSequence], manner: Manner, asked: int | None) -> tuple[int, int]:
        """Return the block size and the rounds of the next call; `asked` is a block size that was asked for."""
        num_drafted = sum(s.request.use_draft for s in running)
        shape, sizes = self._batch.shape, self._ladders.block_sizes
        if asked is not None:
            sizes = (asked,)
        elif not self._config.is_adaptive:
            sizes = sizes[:1] if num_drafted else sizes[-1:]
        costs = {size: self.costs[shape, size, manner].seconds for size in sizes}
        max_rounds = {size: count_call_rounds(seconds, self._ladders.max_rounds) for size, seconds in costs.items()}
        # A slot stands still until its client's next request has come, unless others wait for it or it is the only one.
        has_free = len(self._sequences) < self._ladders.rows[-1] and shape.rows > 1
        num_plain = len(running) - num_drafted
        size, num_rounds = self.policy.choose(shape, costs, max_rounds, num_drafted, num_plain, has_free)
        # Who wants his prompt run waits for the end of the call.
        return size, num_rounds if len(running) == len(self._sequences) else 1

    def _choose_drafted(self, running: list[ServedSequence]) -> tuple[set[int], bool]:
        """Return the slots to draft for, and whether contexts of drafts were filled for it.

        Drafted for are, of the sequences that want it, those whose draft's context is complete.
        """
        wanting = [s for s in running if s.request.use_draft]
        has_caught_up = self._known_tokens.catch_up(wanting)
        return {s.slot for s in wanting if not s.missing}, has_caught_up

    def _read_row(
        self, sequence: ServedSequence, result: CallResult, size: int, is_drafted: bool, accepted: list[int]
    ) -> list[TokenEvent]:
        """Return a sequence's events of a call, one a round; `accepted` gets the drafts it kept, by round."""
        row, request_id = sequence.slot, sequence.request.request_id
        anchor_pos = len(sequence.tokens) - 1
        num_drafts = self._num_draft_tokens[size] if is_drafted else 0
        num_new, at, rounds = int(result.num_new[row]), 0, []
        for length in result.acceptance_lengths[row, : result.num_rounds[row]].tolist():
            kept = min(length, num_new - at)  # a stop id cuts the last round
            fields = sequence.take_tokens(result, row, at, kept)
            rounds.append(fields | {"acceptance_len": length, "num_draft_tokens": num_drafts})
            at += kept
            if is_drafted:
                accepted.append(max(kept - 1, 0))
        if size == 1 and self.programs.settings.draft is not None:
            sequence.miss_from(anchor_pos)
        if result.has_failed[row]:
            told = [TokenEvent(request_id, **fields) for fields in rounds]
            return [*told, self._end(request_id, "error", _NUMERIC_FAULT)]
        reason = sequence.find_end(result, row)
        if reason is None:
            return [TokenEvent(request_id, **fields) for fields in rounds]
        self._store(sequence)
        self.policy.observe_end(len(sequence.tokens) - len(sequence.request.prompt_ids))
        told = [TokenEvent(request_id, **fields) for fields in rounds[:-1]]
        return [*told, self._end(request_id, reason, **rounds[-1])]

    def _store(self, sequence: ServedSequence) -> None:
        """Keep what a sequence has computed for whoever continues it."""
        self._batch.store_slot(sequence.slot, sequence.tokens[: sequence.context_len])

    def _shrink_batch(self, running: list[ServedSequence]) -> None:
        """Move to a smaller batch when one would have held the sequences for a while."""
        smaller = self._ladders.rows_for(len(self._sequences))
        num_new = self._config.rounds_per_call * (max(self._num_draft_tokens.values()) + 1)
        longest = max(min(len(s.tokens) + num_new, s.limit_len) for s in running)
        shorter = self._ladders.positions_for(longest + self._ladders.margin)
        is_too_large = smaller < self._batch.shape.rows or shorter < self._batch.shape.positions
        self._calls_too_large = self._calls_too_large + 1 if is_too_large else 0
        if self._calls_too_large < _CALLS_BEFORE_SHRINKING:
            return
        self._calls_too_large = 0
        moved = {}
        if smaller < self._batch.shape.rows:
            moved = self._intake.compact(smaller)
        for sequence in self._sequences.values():
            sequence.slot = moved.get(sequence.slot, sequence.slot)
        now = self._batch.shape
        shape = Shape(min(smaller, now.rows), min(shorter, now.positions))
        self._batch.shrink(shape, moved, {s.slot for s in running})
