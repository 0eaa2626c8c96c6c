"""From a checked body to engine requests: limits, defaults, the context's length, seeds, token ids."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from domino_jax.config import SamplingConfig
from domino_jax.records import Penalties, Request
from domino_jax.serving.contract import Engine
from domino_jax.serving.http.errors import ApiError, shorten
from domino_jax.serving.http.request_types import ChatBody, CompletionBody, GenerationBody, Message
from domino_jax.serving.http.settings import ApiSettings
from domino_jax.serving.http.text_codec import TextCodec
from domino_jax.serving.http.text_stream import StopRules, TextStream

_MAX_SEED = 2**32


@dataclass(frozen=True)
class Prompt:
    """A prompt and the text it is echoed as.

    Attributes:
        text: as given; None where ids were given.
    """

    ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True)
class RequestPlan:
    """All that an answer needs to know of its request.

    Attributes:
        requests: engine requests, choice by choice: prompt p's choice j stands at p * n + j.
        num_choices_per_prompt: n.
        num_logprobs: top log-probabilities told a token; None: none are told.
        echo: the text begins with the prompt.
        drops_output: only the prompt is wanted (`max_tokens` 0).
        echo_texts: with `echo`: the text of every prompt.
        echo_offsets: with `echo`: for every prompt, where in its text each token begins.
    """

    prompts: Sequence[Prompt]
    requests: Sequence[Request]
    num_choices_per_prompt: int
    rules: StopRules
    skip_special_tokens: bool
    num_logprobs: int | None
    streams: bool
    include_usage: bool
    continuous_usage: bool
    return_token_sources: bool
    return_metrics: bool
    echo: bool = False
    drops_output: bool = False
    echo_texts: Sequence[str] = ()
    echo_offsets: Sequence[Sequence[int]] = ()


def messages_for_template(messages: Sequence[Message], settings: ApiSettings) -> list[dict[str, Any]]:
    """Return messages as chat templates expect them: content a string, `developer` as `system`.

    Raises:
        ApiError: too many messages, or one with tool calls.
    """
    if len(messages) > settings.max_messages:
        raise ApiError(
            400, f"messages has {len(messages)} entries; at most {settings.max_messages} are allowed", "messages"
        )
    rows = []
    for index, message in enumerate(messages):
        extra = {name: value for name, value in (message.model_extra or {}).items() if value not in (None, [], {})}
        for name in ("tool_calls", "function_call", "audio"):
            if name in extra:
                where = f"messages.{index}.{name}"
                raise ApiError(400, f"{where} is not supported; leave it out", where, "unsupported_parameter")
        content = message.content
        if content is None:
            content = ""
        elif not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        rows.append({**extra, "role": role, "content": content})
    return rows


class Planner:
    """Turns bodies into plans; holds what does not change between requests."""

    def __init__(self, engine: Engine, codec: TextCodec, settings: ApiSettings, new_id: Callable[[], str]) -> None:
        """Plan for `engine`."""
        self._engine, self._codec, self._settings, self._new_id = engine, codec, settings, new_id

    def plan_chat(self, body: ChatBody, prompt_ids: Sequence[int]) -> RequestPlan:
        """Plan a chat request.

        Raises:
            ApiError: a value that cannot be used.
        """
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise ApiError(
                400,
                f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}; give one",
                "max_completion_tokens",
            )
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._plan(body, [Prompt(prompt_ids)], max_tokens, num_logprobs, "top_logprobs")

    def plan_completion(self, body: CompletionBody, prompts: Sequence[Prompt]) -> RequestPlan:
        """Plan a completion request.

        Raises:
            ApiError: a value that cannot be used.
        """
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens is 0; it must be at least 1, or 0 with echo: true", "max_tokens")
        return self._plan(body, prompts, body.max_tokens, body.logprobs, "logprobs", bool(body.echo))

    def _plan(
        self,
        body: GenerationBody,
        prompts: Sequence[Prompt],
        max_tokens: int | None,
        num_logprobs: int | None,
        logprobs_field: str,
        echo: bool = False,
    ) -> RequestPlan:
        n = _or(body.n, 1)
        skips = _or(body.skip_special_tokens, True)
        self._check_limits(body, n, len(prompts), num_logprobs, logprobs_field)
        stream_options = body.stream_options
        if stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        seed = secrets.randbelow(_MAX_SEED) if body.seed is None else body.seed
        bias = self._read_bias(body)
        own_ids = () if body.ignore_eos else self._codec.stop_ids
        requests = []
        for prompt in prompts:
            budget = self._budget(prompt, max_tokens)
            min_tokens = _or(body.min_tokens, 0)
            if min_tokens > budget:
                raise ApiError(
                    400, f"min_tokens is {min_tokens}; at most {budget} tokens may be generated", "min_tokens"
                )
            requests += [
                Request(
                    request_id=self._new_id(),
                    prompt_ids=prompt.ids,
                    max_new_tokens=max(budget, 1),
                    sampling=self._sampling(body, (seed + j) % _MAX_SEED),
                    penalties=_penalties(body),
                    logit_bias=bias,
                    stop_ids=tuple(dict.fromkeys([*own_ids, *(body.stop_token_ids or [])])),
                    min_new_tokens=min_tokens,
                    num_top_logprobs=num_logprobs,
                    num_prompt_logprobs=num_logprobs if echo else None,
                    use_draft=_or(body.use_draft, True),
                    block_size=body.block_size,
                )
                for j in range(n)
            ]
        return RequestPlan(
            prompts=prompts,
            requests=requests,
            num_choices_per_prompt=n,
            rules=StopRules(_stops(body), bool(body.include_stop_str_in_output), _or(body.min_tokens, 0)),
            skip_special_tokens=skips,
            num_logprobs=num_logprobs,
            streams=bool(body.stream),
            include_usage=bool(stream_options and stream_options.include_usage),
            continuous_usage=bool(stream_options and stream_options.continuous_usage_stats),
            return_token_sources=bool(body.return_token_sources),
            return_metrics=bool(body.return_metrics),
            echo=echo,
            drops_output=max_tokens == 0,
            echo_texts=[self._echo_text(prompt, skips) for prompt in prompts] if echo else (),
            echo_offsets=[self._echo_offsets(prompt, skips) for prompt in prompts] if echo else (),
        )

    def _echo_text(self, prompt: Prompt, skips: bool) -> str:
        return self._codec.decode(prompt.ids, skips) if prompt.text is None else prompt.text

    def _echo_offsets(self, prompt: Prompt, skips: bool) -> list[int]:
        stream = TextStream(self._codec.token_bytes, self._codec.special_ids if skips else frozenset(), StopRules())
        stream.add(prompt.ids)
        return stream.token_offsets

    def _budget(self, prompt: Prompt, max_tokens: int | None) -> int:
        limit, size = self._engine.max_model_len, len(prompt.ids)
        wanted = max_tokens or 1  # the engine needs room for a token even where only the prompt is scored
        if size + wanted > limit:
            asked = f" and max_tokens is {max_tokens}" if max_tokens is not None else ""
            raise ApiError(
                400,
                f"the prompt has {size} tokens{asked}; together they may be {limit} (the model's context)",
                "max_tokens" if size < limit and max_tokens is not None else "prompt",
                "context_length_exceeded",
            )
        return limit - size if max_tokens is None else max_tokens

    def _sampling(self, body: GenerationBody, seed: int) -> SamplingConfig:
        default = self._settings.default_sampling
        return SamplingConfig(
            temperature=_or(body.temperature, default.temperature),
            top_k=max(0, _or(body.top_k, default.top_k)),
            top_p=_or(body.top_p, default.top_p),
            min_p=_or(body.min_p, default.min_p),
            seed=seed,
        )

    def _read_bias(self, body: GenerationBody) -> dict[int, float]:
        bias = {}
        for key, value in (body.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < self._engine.vocab_size):
                raise ApiError(
                    400,
                    f"logit_bias has the key {shorten(key)}; keys are token ids 0 .. {self._engine.vocab_size - 1}",
                    "logit_bias",
                )
            bias[int(key)] = value
        return bias

    def _check_limits(
        self, body: GenerationBody, n: int, num_prompts: int, num_logprobs: int | None, logprobs_field: str
    ) -> None:
        settings, vocab_size = self._settings, self._engine.vocab_size
        stops, stop_ids = _stops(body), body.stop_token_ids or []
        checks = [
            (n * num_prompts, settings.max_choices, "n", "choices (prompts times n)"),
            (len(stops), settings.max_stops, "stop", "stop strings"),
            (max(map(len, stops), default=0), settings.max_stop_len, "stop", "letters in a stop string"),
            (len(stop_ids), settings.max_stops, "stop_token_ids", "stop ids"),
            (len(body.logit_bias or {}), settings.max_logit_bias, "logit_bias", "entries in logit_bias"),
            (num_logprobs or 0, self._engine.max_logprobs, logprobs_field, "top log-probabilities a token"),
        ]
        for value, allowed, name, what in checks:
            if value > allowed:
                raise ApiError(400, f"{name}: {value} {what} were asked for; at most {allowed} are allowed", name)
        sizes = self._engine.block_sizes
        if body.block_size is not None and body.use_draft is False:
            raise ApiError(400, "block_size is for drafts and use_draft is false; leave one out", "block_size")
        if body.block_size is not None and body.block_size not in sizes:
            allowed = f"served are {', '.join(map(str, sizes))}" if sizes else "there is no drafter; leave it out"
            raise ApiError(400, f"block_size is {body.block_size}; {allowed}", "block_size")
        for token_id in stop_ids:
            if token_id >= vocab_size:
                raise ApiError(
                    400, f"stop_token_ids has {token_id}; token ids are 0 .. {vocab_size - 1}", "stop_token_ids"
                )


def check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Refuse token ids outside the vocabulary.

    Raises:
        ApiError: one is.
    """
    if ids and max(ids) >= vocab_size:
        raise ApiError(400, f"{name} has the token id {max(ids)}; token ids are 0 .. {vocab_size - 1}", name)


def _penalties(body: GenerationBody) -> Penalties:
    return Penalties(
        _or(body.presence_penalty, 0.0), _or(body.frequency_penalty, 0.0), _or(body.repetition_penalty, 1.0)
    )


def _stops(body: GenerationBody) -> tuple[str, ...]:
    stop = body.stop
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
