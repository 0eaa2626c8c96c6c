"""Bodies of requests, as OpenAI and vLLM name their fields; every type is strict, what is unknown is kept aside."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Ids = Annotated[list[_TokenId], Field(min_length=1)]
_Probability = Annotated[float, Field(ge=0, le=1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Stop = Annotated[str, Field(min_length=1)]

# Fields of the two APIs that would change the answer and cannot be honoured, with the values that ask for nothing.
_NOTHING = (None, False, [], {}, "")
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "tools": _NOTHING,
    "tool_choice": (*_NOTHING, "none"),
    "parallel_tool_calls": (*_NOTHING, True),
    "functions": _NOTHING,
    "function_call": (*_NOTHING, "none"),
    "response_format": (*_NOTHING, {"type": "text"}),
    "structured_outputs": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "audio": _NOTHING,
    "modalities": (*_NOTHING, ["text"]),
    "prediction": _NOTHING,
    "web_search_options": _NOTHING,
    "reasoning_effort": _NOTHING,
    "verbosity": (*_NOTHING, "medium"),
    "thinking_token_budget": _NOTHING,
    "best_of": (*_NOTHING, 1),
    "suffix": _NOTHING,
    "echo": _NOTHING,
    "top_logprobs": _NOTHING,
    "max_completion_tokens": _NOTHING,
    "use_beam_search": _NOTHING,
    "length_penalty": (*_NOTHING, 1, 1.0),
    "prompt_logprobs": _NOTHING,
    "prompt_embeds": _NOTHING,
    "bad_words": _NOTHING,
    "allowed_token_ids": _NOTHING,
    "truncate_prompt_tokens": _NOTHING,
    "spaces_between_special_tokens": (*_NOTHING, True),
    "add_generation_prompt": (None, True),
    "continue_final_message": _NOTHING,
    "chat_template": _NOTHING,
    "documents": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
    "logits_processors": _NOTHING,
    "vllm_xargs": _NOTHING,
    "kv_transfer_params": _NOTHING,
    "return_tokens_as_token_ids": _NOTHING,
    "return_token_ids": _NOTHING,
}

# Names in `chat_template_kwargs` that are no variables of a template but arguments of what renders it: with them a
# request would bring a template of its own, or change what comes out.
RESERVED_TEMPLATE_NAMES = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
     "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask", "return_dict", "return_tensors",
     "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation"}
)  # fmt: skip

# Fields that change nothing about the answer; accepted in silence.
INERT_FIELDS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "priority", "request_id", "cache_salt"}
)  # fmt: skip


def _add_unsupported(schema: dict[str, Any]) -> None:
    properties = schema.setdefault("properties", {})
    for name, nothing in UNSUPPORTED_FIELDS.items():
        properties.setdefault(name, {"enum": list(nothing), "description": "Not supported; other values are refused."})


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """What chat and completion requests share; null means left out."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, json_schema_extra=_add_unsupported)

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31, description="-1 and 0 keep all tokens.")] | None = None
    min_p: _Probability | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | list[_Stop] | None = None
    stop_token_ids: list[_TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: dict[str, _Bias] | None = None
    skip_special_tokens: bool | None = None
    user: str | None = None
    use_draft: Annotated[bool, Field(description="False decodes plainly; the text is the same.")] | None = None
    block_size: Annotated[int, Field(ge=2, lt=2**31, description="Always drafts blocks of so many slots.")] | None = (
        None
    )
    return_token_sources: (
        Annotated[bool, Field(description="Each choice tells who wrote each piece of its text.")] | None
    ) = None
    return_metrics: (
        Annotated[bool, Field(description="The answer carries its acceptance lengths and times.")] | None
    ) = None


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat; further fields are handed to the chat template."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None


class ChatBody(GenerationBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[list[_Ids], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31, description="0 only with echo.")] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None


class TokenizeBody(Body):
    """Body of `POST /tokenize`: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[_TokenId]
