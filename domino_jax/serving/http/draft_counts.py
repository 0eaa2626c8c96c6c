"""Counts of speculative decoding: what was drafted and what of it was accepted."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DraftCounts:
    """Rounds with a draft, as vLLM counts them; plain steps and the prefill are no drafts.

    Attributes:
        num_drafts: rounds that drafted.
        num_draft_tokens: tokens drafted in them.
        num_accepted_tokens: of those, accepted ones (cut at the token budget alone).
        histogram: rounds by acceptance length (accepted + 1).
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    histogram: Counter[int] = field(default_factory=Counter)

    def add(self, acceptance_len: int, num_draft_tokens: int) -> None:
        """Count a round."""
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += acceptance_len - 1
        self.histogram[acceptance_len] += 1

    def to_json(self) -> dict[str, Any]:
        """Return the counts with mean acceptance length and rate; those are None without a draft."""
        has_drafts = self.num_drafts > 0
        return {
            "mean_acceptance_length": 1 + self.num_accepted_tokens / self.num_drafts if has_drafts else None,
            "acceptance_rate": self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None,
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "acceptance_length_histogram": {str(n): self.histogram[n] for n in sorted(self.histogram)},
        }


def add_up(counts: Iterable[DraftCounts]) -> DraftCounts:
    """Return the counts of several sequences together."""
    total = DraftCounts()
    for one in counts:
        total.num_drafts += one.num_drafts
        total.num_draft_tokens += one.num_draft_tokens
        total.num_accepted_tokens += one.num_accepted_tokens
        total.histogram.update(one.histogram)
    return total
