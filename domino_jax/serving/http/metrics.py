"""Prometheus metrics of the server, under vLLM's names where vLLM has them.

Gauges and the engine's totals are read when they are asked for; the rest is counted on the event loop, from the same
events that answers are made of.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from domino_jax.records import TokenEvent
from domino_jax.serving.contract import CallTimes, Engine
from domino_jax.serving.http.choice import ChoiceDelta

_FAST_S = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 5.0)
_SLOW_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_COMPILE_PHASES = ("warmup", "serving")


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, model_id: str) -> None:
        self._engine, self._labels = engine, {"model_name": model_id}

    def collect(self) -> Iterable[Metric]:
        status = self._engine.status()
        yield self._gauge("vllm:num_requests_running", "Requests that hold a slot.", float(status.num_running))
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", float(status.num_waiting))
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the cache in use, 0 .. 1.", status.cache_usage)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", float(status.num_prefix_queries))
        yield self._counter("vllm:prefix_cache_hits", "Of those, tokens found.", float(status.num_prefix_hits))
        for name, text, value in (
            ("domino_engine_busy_seconds", "With something to do.", status.busy_s),
            ("domino_engine_device_seconds", "Of those, in device calls.", status.device_s),
        ):
            family = CounterMetricFamily(name, text)
            family.add_metric([], value)
            yield family
        yield GaugeMetricFamily("domino_ready", "1 while requests are taken.", float(status.is_ready))
        compiles = CounterMetricFamily("domino_jit_compiles", "Programs compiled.", labels=["phase"])
        for phase in {**dict.fromkeys(_COMPILE_PHASES, 0), **status.num_compiles}:
            compiles.add_metric([phase], status.num_compiles.get(phase, 0))
        yield compiles

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


class ServerMetrics:
    """Counts what happens; all methods but `observe_call` belong to the event loop."""

    def __init__(self, engine: Engine, model_id: str) -> None:
        """Register everything in a registry of its own, so that every sample is there from the start."""
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, model_id))
        self._model_id = model_id
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Rounds that drafted.")
        self._draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._accepted_at = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by place in the draft from 0.",
            ["model_name", "position"],
            registry=self.registry,
        )
        self._finished = Counter(
            "vllm:request_success",
            "Choices that ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model_id, reason)
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "From arrival.", _SLOW_S)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between tokens.", _FAST_S)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _SLOW_S)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Waiting for a slot.", _SLOW_S)
        self._verify = Histogram(
            "domino_verify_step_seconds", "Verifying, a round.", buckets=_FAST_S, registry=self.registry
        )
        self._draft = Histogram(
            "domino_draft_step_seconds", "Drafting, a round.", buckets=_FAST_S, registry=self.registry
        )
        self._accepted_by_position: list[Counter] = []
        self._recent_whole_s = 0.0

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self.registry).labels(self._model_id)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
        return metric.labels(self._model_id)

    def observe_call(self, times: CallTimes) -> None:
        """Record a device call's rounds; safe from any thread."""
        if times.num_rounds <= 0:
            return
        round_s = times.call_s / times.num_rounds
        for _ in range(times.num_rounds):
            self._verify.observe(round_s * (1 - times.draft_share))
            if times.draft_share > 0:
                self._draft.observe(round_s * times.draft_share)

    def count_begin(self, event: TokenEvent, num_prompt_tokens: int) -> None:
        """Record a choice's first event; `num_prompt_tokens` is 0 where another choice has counted the prompt."""
        self._prompt_tokens.inc(num_prompt_tokens)
        if event.queue_s is not None:
            self._queue.observe(event.queue_s)

    def count_delta(self, event: TokenEvent, delta: ChoiceDelta, since_s: float, is_first_token: bool) -> None:
        """Record what an event added; `since_s`: since the choice's last token, or since arrival for the first."""
        num_tokens = len(delta.token_ids)
        self._generated.inc(num_tokens)
        if is_first_token:
            self._first_token.observe(since_s)
        else:
            for _ in range(num_tokens):
                self._between.observe(since_s / num_tokens)
        if event.acceptance_len is not None and event.num_draft_tokens > 0:
            self._drafts.inc()
            self._draft_tokens.inc(event.num_draft_tokens)
            self._accepted.inc(event.acceptance_len - 1)
            for position in range(event.acceptance_len - 1):
                self._count_accepted_at(position)

    def _count_accepted_at(self, position: int) -> None:
        while position >= len(self._accepted_by_position):
            place = str(len(self._accepted_by_position))
            self._accepted_by_position.append(self._accepted_at.labels(self._model_id, place))
        self._accepted_by_position[position].inc()

    def count_end(self, reason: str, whole_s: float) -> None:
        """Record a choice's end: `stop`, `length`, `abort` or `error`."""
        self._finished.labels(self._model_id, reason).inc()
        if reason in ("stop", "length"):
            self._whole.observe(whole_s)
            self._recent_whole_s += 0.1 * (whole_s - self._recent_whole_s)

    def estimate_wait_s(self, num_waiting: int, num_running: int) -> int:
        """Return whole seconds, 1 .. 60, after which a full queue may have room."""
        wait_s = self._recent_whole_s * (num_waiting + 1) / max(num_running, 1) / max(num_waiting, 1)
        return round(min(60.0, max(1.0, wait_s)))

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self.registry)
