"""Forms of answers, for the OpenAPI description; the answers themselves are written without them (`answer_json`)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from domino_jax.records import SOURCE_NAMES


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """Body of every answer but 200, and of an error inside a stream."""

    error: ErrorDetail


class PromptTokensDetails(_Answer):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(_Answer):
    """Token counts; a prompt counts once, whatever `n`."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenSource(_Answer):
    """A piece of text and who wrote it."""

    text: str
    source: Literal[SOURCE_NAMES]


class DraftMeasurements(_Answer):
    """Counts of speculative decoding; null where nothing was drafted."""

    mean_acceptance_length: float | None
    acceptance_rate: float | None
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_length_histogram: dict[str, int]


class Measurements(_Answer):
    """What generating the answer took, in seconds."""

    speculative_decoding: DraftMeasurements
    time_to_first_token_s: float | None
    decode_s: float | None
    tokens_per_s: float | None


class ChatTopLogprob(_Answer):
    """A likely token; `bytes:` and hexadecimal bytes where it is no text by itself."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    """A chosen token."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(_Answer):
    """Log-probabilities of a chat choice, in nats."""

    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(_Answer):
    """Log-probabilities of a completion choice, in nats."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _Choice(_Answer):
    index: int
    finish_reason: Literal["stop", "length"] | None


class _WholeChoice(_Answer):
    index: int
    finish_reason: Literal["stop", "length"]


class ChatMessage(_Answer):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatDelta(_Answer):
    """What a chunk adds to the model's turn."""

    content: str
    role: Literal["assistant"] = "assistant"


class _MaybeSources(BaseModel):
    token_sources: list[TokenSource] = []


class ChatChoice(_WholeChoice, _MaybeSources):
    """A choice of a whole chat answer."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(_Choice, _MaybeSources):
    """What a chunk adds to a choice."""

    delta: ChatDelta
    logprobs: ChatLogprobs | None


class CompletionChoice(_WholeChoice, _MaybeSources):
    """A choice of a whole completion."""

    text: str
    logprobs: CompletionLogprobs | None


class CompletionChunkChoice(_Choice, _MaybeSources):
    """What a chunk adds to a choice."""

    text: str
    logprobs: CompletionLogprobs | None


class _Head(_Answer):
    id: str
    created: int
    model: str


class ChatAnswer(_Head):
    """A whole chat answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    metrics: Measurements | None = None


class ChatChunk(_Head):
    """An event of a chat stream; after the last one comes `data: [DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    metrics: Measurements | None = None


class CompletionAnswer(_Head):
    """A whole completion."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    metrics: Measurements | None = None


class CompletionChunk(_Head):
    """An event of a completion stream; after the last one comes `data: [DONE]`."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
    metrics: Measurements | None = None


class ModelCard(_Answer):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Answer):
    """All served models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(_Answer):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeAnswer(_Answer):
    """Text of token ids."""

    prompt: str


class StatusAnswer(_Answer):
    """State of the server."""

    status: Literal["ok", "ready"]
