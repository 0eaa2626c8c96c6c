"""Host-side records that cross rooms: what data hands to training and decoding hands to whoever asked.

Plain dataclasses of numpy arrays and Python values; no jax, no behaviour beyond simple derived numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from domino_jax.config import SamplingConfig


@dataclass(frozen=True)
class ChatRow:
    """One tokenised chat.

    Attributes:
        ids: token ids.
        loss_mask: 1 on the tokens that are learned.
        line_no: 1-based line of the data file; 0 where it has none.
        features: [tokens, captured layers x width] of the target, where they were computed before.
        last_hidden: [tokens, width], the target's final-normed states, where they were computed before.
    """

    ids: Sequence[int]
    loss_mask: Sequence[int]
    line_no: int = 0
    features: np.ndarray | None = None
    last_hidden: np.ndarray | None = None


@dataclass(frozen=True)
class TrainBatch:
    """Token ids of one optimizer step, right-padded to the width of the batch; of many processes each has its rows.

    Attributes:
        input_ids: int32 [sequences, width]; padding is 0.
        loss_mask: float32 [sequences, width]; 1 on the assistant tokens that are learned, 0 on prompt and padding.
        lengths: int32 [sequences]; tokens that are not padding.
        line_nos: int64; 1-based line of the data file of each sequence, 0 where it has none; those of all processes.
        num_tokens: sum of `lengths` over all processes.
        features: [sequences, width, captured layers x hidden size] of the target, where they were computed before.
        last_hidden: [sequences, width, hidden size], the target's final-normed states, where they were computed before.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray
    line_nos: np.ndarray
    num_tokens: int
    features: np.ndarray | None = None
    last_hidden: np.ndarray | None = None


@dataclass(frozen=True)
class RoundStats:
    """What the rounds of one generation did.

    Attributes:
        acceptance_lengths: per round, accepted draft tokens + 1, cut at the token budget
            (not at a stop token inside the block), as public implementations count it; the token that the
            prefill chose belongs to no round. Plain decoding has a round of 1 for every further token.
        num_draft_tokens: tokens drafted a round.
    """

    acceptance_lengths: list[int]
    num_draft_tokens: int


@dataclass(frozen=True)
class Generation:
    """One finished sequence.

    Attributes:
        prompt_ids: the prompt as given.
        output_ids: new tokens, the stop token included when one ended the text.
        token_sources: one of `SOURCE_NAMES` for every new token.
        finish_reason: `stop` (a stop id), `length` (token budget) or `context` (the model's context is full).
        stats: rounds of the generation.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    token_sources: list[str]
    finish_reason: str
    stats: RoundStats = field(default_factory=lambda: RoundStats([], 0))


SOURCE_NAMES = ("prompt", "target", "drafted", "corrected", "bonus")
"""Who wrote a token: the prompt, the target alone (prefill or plain step), an accepted draft, the target after a
rejected draft, the target after a fully accepted block."""

FinishReason = Literal["stop", "length", "context", "cancelled", "error"]
"""Why a served request ended: a stop id, its token budget, the model's context, its own wish, or a fault."""


@dataclass(frozen=True)
class Penalties:
    """How tokens that were seen before are made less likely, before temperature and filters.

    Attributes:
        presence: subtracted from the logit of every token of the output so far.
        frequency: subtracted once for every time a token stands in the output so far.
        repetition: positive logits of tokens of prompt and output are divided by it, negative ones multiplied.

    Source: OpenAI API reference (presence, frequency); CTRL, arXiv 1909.05858 (repetition), as vLLM applies them.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        request_id: unique among the requests an engine holds.
        max_new_tokens: at least 1.
        stop_ids: ids that end the text; the id itself is the last token of the output.
        min_new_tokens: stop ids cannot be chosen before that many tokens.
        num_top_logprobs: return each token's log-probability and those of that many most likely tokens; None: neither.
        num_prompt_logprobs: the same for the tokens of the prompt, all but the first.
        use_draft: False decodes this request plainly; its text is the same.
        block_size: slots of a block in all calls this request is in, whatever the load; of several that are asked for
            in a call the smallest counts. None: the engine chooses.
    """

    request_id: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    penalties: Penalties = field(default_factory=Penalties)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    num_top_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    use_draft: bool = True
    block_size: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of a token in nats, from the target's logits before penalties, bias, temperature and filters.

    Attributes:
        logprob: the chosen token's own.
        top: (id, log-probability) of the most likely tokens, in descending order.
    """

    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class TokenEvent:
    """What one round, or the prefill, added to a request.

    Attributes:
        token_ids: new tokens, the stop id included; empty in an event that only ends the request.
        token_sources: one of `SOURCE_NAMES` for every new token.
        logprobs: one entry for every new token where the request asked for them.
        acceptance_len: accepted draft tokens + 1, cut at the budget alone; None where no round was run (prefill, end).
        num_draft_tokens: tokens drafted in the round; 0 for a plain step.
        prompt_logprobs: with the first event where asked for: one entry for every prompt token but the first.
        num_cached_tokens: with the first event: prompt tokens that the prefix cache spared.
        queue_s: with the first event: seconds the request waited for a slot.
        finish_reason: set in the last event of a request.
        error: what went wrong, for people; set where `finish_reason` is `error`.
    """

    request_id: str
    token_ids: Sequence[int] = ()
    token_sources: Sequence[str] = ()
    logprobs: Sequence[TokenLogprobs] | None = None
    acceptance_len: int | None = None
    num_draft_tokens: int = 0
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    queue_s: float | None = None
    finish_reason: FinishReason | None = None
    error: str = ""
