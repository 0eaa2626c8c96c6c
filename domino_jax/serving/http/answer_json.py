"""An answer as JSON: whole, or chunk by chunk for an event stream, in the chat and the completion form.

Chunks are joined from strings that are encoded once, because a busy server writes hundreds a second.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from domino_jax.records import TokenLogprobs
from domino_jax.serving.http.answer import Answer
from domino_jax.serving.http.choice import Choice, ChoiceDelta
from domino_jax.serving.http.logprobs_json import chat_logprobs, completion_logprobs


@runtime_checkable
class AnswerForm(Protocol):
    """How an answer is written."""

    def write_chunk(self, choice: Choice, delta: ChoiceDelta, is_last: bool) -> str:
        """Return the chunk of one delta; `is_last`: of the whole stream."""
        ...

    def write_usage_chunk(self) -> str:
        """Return the chunk without choices that tells the usage."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the whole answer."""
        ...


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def to_text(value: Any) -> str:
    """Return compact JSON."""
    return _ENCODER.encode(value)


class _Form(ABC):
    whole_object: str
    chunk_object: str

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        head = self._head(self.chunk_object)
        self._chunk_head = to_text(head)[:-1]

    def _head(self, kind: str) -> dict[str, Any]:
        answer = self._answer
        return {"id": answer.answer_id, "object": kind, "created": answer.created, "model": answer.model_id}

    def write_chunk(self, choice: Choice, delta: ChoiceDelta, is_last: bool) -> str:
        """Return the chunk of one delta."""
        plan = self._answer.plan
        parts = [self._chunk_head, f',"choices":[{{"index":{choice.index},', self._content(choice, delta)]
        logprobs = self._logprobs(choice, [delta])
        parts.append(f',"logprobs":{"null" if logprobs is None else to_text(logprobs)}')
        parts.append(f',"finish_reason":"{delta.finish_reason}"' if delta.finish_reason else ',"finish_reason":null')
        if plan.return_token_sources:
            parts.append(f',"token_sources":{to_text(self._sources(choice, [delta]))}')
        parts.append("}]")
        if plan.continuous_usage:
            parts.append(f',"usage":{to_text(self._answer.usage())}')
        elif plan.include_usage:
            parts.append(',"usage":null')
        if is_last and plan.return_metrics and not plan.include_usage:
            parts.append(f',"metrics":{to_text(self._answer.measurements())}')
        parts.append("}")
        return "".join(parts)

    def write_usage_chunk(self) -> str:
        """Return the chunk without choices that tells the usage."""
        chunk = {**self._head(self.chunk_object), "choices": [], "usage": self._answer.usage()}
        if self._answer.plan.return_metrics:
            chunk["metrics"] = self._answer.measurements()
        return to_text(chunk)

    def to_json(self) -> dict[str, Any]:
        """Return the whole answer."""
        answer = self._answer
        choices = []
        for choice in answer.choices:
            entry = {
                "index": choice.index,
                **self._whole_content(choice),
                "logprobs": self._logprobs(choice, choice.deltas),
                "finish_reason": choice.finish_reason,
            }
            if answer.plan.return_token_sources:
                entry["token_sources"] = self._sources(choice, choice.deltas)
            choices.append(entry)
        whole = {**self._head(self.whole_object), "choices": choices, "usage": answer.usage()}
        if answer.plan.return_metrics:
            whole["metrics"] = answer.measurements()
        return whole

    def _sources(self, choice: Choice, deltas: Sequence[ChoiceDelta]) -> list[dict[str, str]]:
        pieces = [{"text": text, "source": source} for delta in deltas for text, source in delta.sources]
        echoed = self._echo(choice) if deltas[0].is_first else ""
        return [{"text": echoed, "source": "prompt"}, *pieces] if echoed else pieces

    def _echo(self, choice: Choice) -> str:
        plan = self._answer.plan
        return plan.echo_texts[choice.prompt_index] if plan.echo else ""

    @abstractmethod
    def _content(self, choice: Choice, delta: ChoiceDelta) -> str: ...

    @abstractmethod
    def _whole_content(self, choice: Choice) -> Mapping[str, Any]: ...

    @abstractmethod
    def _logprobs(self, choice: Choice, deltas: Sequence[ChoiceDelta]) -> dict[str, Any] | None: ...


class ChatForm(_Form):
    """`chat.completion` and its chunks; the first chunk of a choice carries the role."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _content(self, choice: Choice, delta: ChoiceDelta) -> str:
        role = '"role":"assistant",' if delta.is_first else ""
        return f'"delta":{{{role}"content":{to_text(delta.text)}}}'

    def _whole_content(self, choice: Choice) -> Mapping[str, Any]:
        return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}

    def _logprobs(self, choice: Choice, deltas: Sequence[ChoiceDelta]) -> dict[str, Any] | None:
        if self._answer.plan.num_logprobs is None:
            return None
        ids, scores, _ = _join_scores(deltas)
        return chat_logprobs(self._answer.codec, ids, scores)


class CompletionForm(_Form):
    """`text_completion`, whole and in chunks; with `echo` the first begins with the prompt."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def _content(self, choice: Choice, delta: ChoiceDelta) -> str:
        echoed = self._echo(choice) if delta.is_first else ""
        return f'"text":{to_text(echoed + delta.text)}'

    def _whole_content(self, choice: Choice) -> Mapping[str, Any]:
        return {"text": self._echo(choice) + choice.text}

    def _logprobs(self, choice: Choice, deltas: Sequence[ChoiceDelta]) -> dict[str, Any] | None:
        answer = self._answer
        if answer.plan.num_logprobs is None:
            return None
        ids, scores, offsets = _join_scores(deltas)
        if not answer.plan.echo:
            return completion_logprobs(answer.codec, ids, scores, offsets)
        shift = len(self._echo(choice))
        offsets = [shift + offset for offset in offsets]
        if deltas[0].is_first:
            prompt = answer.plan.prompts[choice.prompt_index].ids
            ids = [*prompt, *ids]
            scores = [None, *(choice.prompt_logprobs or ()), *scores]
            offsets = [*answer.plan.echo_offsets[choice.prompt_index], *offsets]
        return completion_logprobs(answer.codec, ids, scores, offsets)


def _join_scores(deltas: Sequence[ChoiceDelta]) -> tuple[list[int], list[TokenLogprobs], list[int]]:
    ids = [i for delta in deltas for i in delta.token_ids]
    scores = [score for delta in deltas for score in (delta.logprobs or ())]
    return ids, scores, [offset for delta in deltas for offset in delta.offsets]
