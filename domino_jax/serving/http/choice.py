"""One choice of an answer: the token events of one engine request, turned into text, counts and an ending."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from domino_jax.records import TokenEvent, TokenLogprobs
from domino_jax.serving.http.draft_counts import DraftCounts
from domino_jax.serving.http.text_codec import TextCodec
from domino_jax.serving.http.text_stream import StopRules, TextStream

_PUBLIC_REASONS = {"stop": "stop", "length": "length", "context": "length"}


@dataclass(frozen=True)
class ChoiceDelta:
    """What one token event added to a choice, after stop strings.

    Attributes:
        text: new text, whatever is held back left out.
        sources: (text, source) of every piece of it.
        token_ids: new tokens that count.
        logprobs: one entry for each of them, where asked for.
        offsets: where in the text each of them begins.
        is_first: the first of its choice.
        finish_reason: `stop` or `length` in the last delta.
    """

    text: str
    sources: Sequence[tuple[str, str]]
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None
    offsets: Sequence[int]
    is_first: bool
    finish_reason: str | None


@dataclass
class Choice:
    """A choice while it is generated, and after.

    Attributes:
        index: its place among the answer's choices.
        prompt_index: the prompt it answers.
        drops_output: the tokens are not wanted, only the prompt's scores (`max_tokens` 0 with `echo`).
        finish_reason: `stop` or `length`; None while it is open.
        prompt_logprobs: scores of the prompt's tokens but the first, where asked for.
        num_cached_tokens: prompt tokens that the prefix cache spared.
        num_tokens: tokens so far.
        first_token_s, last_token_s: on the caller's clock; None before there is one.
    """

    index: int
    prompt_index: int
    codec: TextCodec
    rules: StopRules = field(default_factory=StopRules)
    skip_special_tokens: bool = True
    drops_output: bool = False
    finish_reason: str | None = None
    deltas: list[ChoiceDelta] = field(default_factory=list)
    drafts: DraftCounts = field(default_factory=DraftCounts)
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    num_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None

    def __post_init__(self) -> None:
        skip_ids = self.codec.special_ids if self.skip_special_tokens else frozenset()
        self._stream = TextStream(self.codec.token_bytes, skip_ids, self.rules)
        self._sources: list[str] = []
        self._has_begun = False

    def take(self, event: TokenEvent, now_s: float) -> ChoiceDelta:
        """Take an event and return what it added; `finish_reason` is set where it was the last.

        The event's own reason must be one of None, `stop`, `length` and `context`.
        """
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        if event.token_ids:
            self.first_token_s = now_s if self.first_token_s is None else self.first_token_s
            self.last_token_s = now_s
        if self.drops_output:
            delta = self._end_without_output()
        else:
            delta = self._extend(event)
        self._has_begun = True
        self.deltas.append(delta)
        self.finish_reason = delta.finish_reason
        return delta

    def _end_without_output(self) -> ChoiceDelta:
        return ChoiceDelta("", (), (), None, (), not self._has_begun, "length")

    def _extend(self, event: TokenEvent) -> ChoiceDelta:
        if event.acceptance_len is not None and event.num_draft_tokens > 0:
            self.drafts.add(event.acceptance_len, event.num_draft_tokens)
        self._sources.extend(event.token_sources)
        written = self._stream.add(
            event.token_ids, ends_with_stop_id=event.finish_reason == "stop", is_last=event.finish_reason is not None
        )
        before, self.num_tokens = self.num_tokens, self.num_tokens + written.num_tokens
        return ChoiceDelta(
            text=written.text,
            sources=[(piece, self._sources[index]) for piece, index in written.pieces],
            token_ids=event.token_ids[: written.num_tokens],
            logprobs=None if event.logprobs is None else event.logprobs[: written.num_tokens],
            offsets=self._stream.token_offsets[before : self.num_tokens],
            is_first=not self._has_begun,
            finish_reason="stop" if written.is_stopped else _PUBLIC_REASONS.get(event.finish_reason or ""),
        )

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(delta.text for delta in self.deltas)
