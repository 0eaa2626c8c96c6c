"""Runs an engine as the API would, and collects what comes back."""

import threading
from collections import defaultdict

from domino_jax.decoding.state import ModelParams
from domino_jax.serving.engine import SlotEngine
from domino_jax.serving.engine_config import EngineConfig

PATIENCE_S = 300


class EngineDriver:
    """A started engine; `run` submits requests and waits for their ends."""

    def __init__(self, decoder, load_params=None, layout=None, **config):
        settings = decoder.settings
        self.engine = SlotEngine(
            settings.target,
            settings.draft,
            load_params or (lambda: decoder.params),
            EngineConfig(**config),
            layout=layout,
        )
        self.events = defaultdict(list)
        self.calls = []
        self._changed = threading.Condition()
        self.engine.start(self._deliver, self.calls.append)

    def _deliver(self, events):
        with self._changed:
            for event in events:
                self.events[event.request_id].append(event)
            self._changed.notify_all()

    def wait_until_ready(self):
        pause = threading.Event()
        for _ in range(PATIENCE_S * 20):
            status = self.engine.status()
            assert status.failure is None, status.failure
            if status.is_ready:
                return self
            pause.wait(0.05)
        raise TimeoutError(self.engine.status())

    def wait_for(self, is_reached, what="the events waited for"):
        with self._changed:
            assert self._changed.wait_for(is_reached, PATIENCE_S), f"{what} did not come: {self.engine.status()}"

    def wait_for_end(self, request_id):
        self.wait_for(lambda: self.events[request_id] and self.events[request_id][-1].finish_reason, request_id)
        return Answer(self.events[request_id])

    def run(self, requests):
        for request in requests:
            self.engine.submit(request)
        return [self.wait_for_end(request.request_id) for request in requests]


class Answer:
    """The events of one request, joined."""

    def __init__(self, events):
        assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
        self.events = events
        self.output_ids = [token for event in events for token in event.token_ids]
        self.sources = [source for event in events for source in event.token_sources]
        self.logprobs = [entry for event in events for entry in event.logprobs or ()]
        self.acceptance_lengths = [e.acceptance_len for e in events if e.acceptance_len is not None]
        self.finish_reason, self.error = events[-1].finish_reason, events[-1].error
        self.num_cached_tokens = events[0].num_cached_tokens
        self.prompt_logprobs = events[0].prompt_logprobs


def make_params(decoder, **target_changes):
    """Return the decoder's parameters with some of the target's replaced."""
    return ModelParams({**decoder.params.target, **target_changes}, decoder.params.draft)
