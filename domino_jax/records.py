"""Host-side records that cross rooms: what data hands to training and decoding hands to whoever asked.

Plain dataclasses of numpy arrays and Python values; no jax, no behaviour beyond simple derived numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


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
    """Token ids of one optimizer step, right-padded to the width of the batch.

    Attributes:
        input_ids: int32 [sequences, width]; padding is 0.
        loss_mask: float32 [sequences, width]; 1 on the assistant tokens that are learned, 0 on prompt and padding.
        lengths: int32 [sequences]; tokens that are not padding.
        line_nos: int64 [sequences]; 1-based line of the data file each sequence comes from, 0 where it has none.
        features: [sequences, width, captured layers x hidden size] of the target, where they were computed before.
        last_hidden: [sequences, width, hidden size], the target's final-normed states, where they were computed before.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray
    line_nos: np.ndarray
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
