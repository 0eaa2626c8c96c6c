"""Log-probabilities in the two forms of the OpenAI API."""

import math
from collections.abc import Sequence
from typing import Any

from domino_jax.records import TokenLogprobs
from domino_jax.serving.http.text_codec import TextCodec

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks; as vLLM writes it."""


def token_text(codec: TextCodec, token_id: int) -> str:
    """Return a token's text; `bytes:` and its bytes where they are no UTF-8 by themselves."""
    raw = codec.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(codec: TextCodec, ids: Sequence[int], scores: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Return the `logprobs` object of a chat choice."""
    content = [
        {
            **_chat_entry(codec, token_id, score.logprob),
            "top_logprobs": [_chat_entry(codec, i, value) for i, value in score.top],
        }
        for token_id, score in zip(ids, scores, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    codec: TextCodec, ids: Sequence[int], scores: Sequence[TokenLogprobs | None], offsets: Sequence[int]
) -> dict[str, Any]:
    """Return the `logprobs` object of a completion choice; a prompt's first token has no score."""
    rows = list(zip(ids, scores, strict=True))
    return {
        "tokens": [token_text(codec, i) for i in ids],
        "token_logprobs": [None if score is None else _finite(score.logprob) for _, score in rows],
        "top_logprobs": [None if score is None else _top_dict(codec, i, score) for i, score in rows],
        "text_offset": list(offsets),
    }


def _chat_entry(codec: TextCodec, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(codec, token_id),
        "logprob": _finite(logprob),
        "bytes": list(codec.token_bytes(token_id)),
    }


def _top_dict(codec: TextCodec, token_id: int, score: TokenLogprobs) -> dict[str, float]:
    # The chosen token is there even where it is none of the most likely; of two that read alike the likelier stays.
    top: dict[str, float] = {}
    for i, value in (*score.top, (token_id, score.logprob)):
        top.setdefault(token_text(codec, i), _finite(value))
    return top


def _finite(value: float) -> float:
    return max(float(value), _LOWEST) if not math.isnan(value) else _LOWEST
