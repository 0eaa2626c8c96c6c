"""A request that holds a slot, and what goes between its host records and the arrays of a one-row state."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from domino_jax.decoding.slots import CallResult, SlotState
from domino_jax.ops.sampling import SamplingParams
from domino_jax.ops.scoring import Scores
from domino_jax.records import SOURCE_NAMES, FinishReason, Penalties, Request, TokenLogprobs


@dataclass
class PromptRun:
    """A prompt on its way into the caches.

    Attributes:
        row: its state, one row of `positions` positions.
        done_len: prompt tokens that are in the caches.
        num_cached: those of them that came from the prefix cache.
        chunks: lengths still to run.
        logprobs: of the prompt's tokens so far, where the request wants them.
    """

    row: SlotState
    positions: int
    done_len: int
    num_cached: int
    chunks: deque[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class ServedSequence:
    """A request that holds a slot.

    Attributes:
        tokens: prompt and output.
        limit_len: number of tokens at which it ends.
        queue_s: seconds it waited for the slot.
        prompt_run: while its prompt is run.
        is_running: whether its slot takes part in rounds.
        missing: positions whose features the draft's context lacks, because plain rounds do not write them.
    """

    request: Request
    slot: int
    tokens: list[int]
    limit_len: int
    queue_s: float
    prompt_run: PromptRun | None = None
    is_running: bool = False
    missing: range = range(0)

    @property
    def context_len(self) -> int:
        """Positions from the start that both caches hold; the newest token, the anchor, is in neither."""
        return self.missing.start if self.missing else len(self.tokens) - 1

    def miss_from(self, start: int) -> None:
        """Note that positions `start` .. anchor were decoded plainly."""
        self.missing = range(self.missing.start if self.missing else start, len(self.tokens) - 1)

    def take_tokens(self, result: CallResult, row: int, start: int, count: int) -> dict[str, Any]:
        """Append new tokens of a call; return the fields of their event."""
        new = result.tokens[row, start : start + count].tolist()
        self.tokens += new
        num_top = self.request.num_top_logprobs
        logprobs = None
        if num_top is not None:
            logprobs = [read_logprobs(result.scores, row, start + i, num_top) for i in range(count)]
        sources = [SOURCE_NAMES[source] for source in result.sources[row, start : start + count]]
        return {"token_ids": new, "token_sources": sources, "logprobs": logprobs}

    def find_end(self, result: CallResult, row: int) -> FinishReason | None:
        """Return why the sequence is done after the tokens of a call were taken, None where it goes on."""
        if not result.is_done[row]:
            return None
        if result.has_stopped[row]:
            return "stop"
        budget = len(self.request.prompt_ids) + self.request.max_new_tokens
        return "length" if len(self.tokens) >= budget else "context"


def fill_row(row: SlotState, sequence: ServedSequence) -> SlotState:
    """Return a free one-row state with a request's prompt and settings put in."""
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
    )


def read_logprobs(scores: Scores, row: int, position: int, num_top: int) -> TokenLogprobs:
    """Return the record of one token's scores."""
    ids = scores.top_ids[row, position, :num_top].tolist()
    values = scores.top[row, position, :num_top].tolist()
    return TokenLogprobs(float(scores.chosen[row, position]), list(zip(ids, values, strict=True)))
