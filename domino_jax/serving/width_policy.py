"""Which block size the next rounds use: the one that is expected to give most tokens a second at the present load.

The cost of a round is measured at warm-up; what a round brings is known from how far drafts survived in past rounds.
Two things that drafting does not shorten make it worth less under load, and both weigh by the length of sequences: a
slot stands still from the end of its sequence to the end of the call, and prompts are run and answers handed on between
calls. The choice never looks at the tokens it decides about, so it changes how fast a text comes and not which.
Standard library only.
"""

from collections.abc import Mapping, Sequence

_SURVIVAL_START = 0.88
"""A fresh drafter is taken to keep each further token with this chance: high, so that it gets tried."""
_RATE = 0.01
"""Weight of one row's round in the running means of survival."""
_FORGETTING = 0.001
"""Share of the way back to the start that the means go in a round that is plain by choice, where nothing is learned."""
_LENGTH_RATE = 0.05
"""Weight of one finished sequence in the running means of lengths and of time between calls."""
_ADVANTAGE_TO_BEGIN, _ADVANTAGE_TO_GO_ON = 1.02, 1.0
"""Drafting has to promise that much more than plain decoding; to begin means to catch contexts up."""


class WidthPolicy:
    """Running means of how many drafts survive.

    Attributes:
        survival: for k = 1 ..: chance that at least k drafts of a block are accepted and kept.
        mean_len: new tokens of a sequence; None until one has ended.
        between_s: seconds outside rounds for every sequence that ends.
    """

    def __init__(self, num_draft_tokens: Mapping[int, int]) -> None:
        """Take the tokens drafted by each block size; 1 is plain decoding and drafts none."""
        self._num_drafts = dict(num_draft_tokens)
        self._start = [_SURVIVAL_START**k for k in range(1, max(self._num_drafts.values()) + 1)]
        self.survival = list(self._start)
        self.mean_len: float | None = None
        self.between_s = 0.0
        self._not_yet_shared_s = 0.0
        self._last = max(self._num_drafts)
        self._is_plain_by_choice = False

    def expected_tokens(self, block_size: int) -> float:
        """Return the tokens a drafted-for row commits in a round, the target's own token counted."""
        return 1.0 + sum(self.survival[: self._num_drafts[block_size]])

    def choose(
        self, round_s: Mapping[int, float], call_rounds: Mapping[int, int], num_drafted: int, num_plain: int
    ) -> int:
        """Return the block size for rounds of `num_drafted` rows that are drafted for and `num_plain` that are not.

        For every block size `round_s` holds the seconds of a round and `call_rounds` the rounds of a call.
        """
        if num_drafted == 0:
            self._is_plain_by_choice = False
            return 1

        def with_pause(tokens_a_round: float, block_size: int) -> float:
            pause = (call_rounds[block_size] + 1) / 2
            return tokens_a_round if self.mean_len is None else 1 / (1 / tokens_a_round + pause / self.mean_len)

        def tokens_per_s(block_size: int) -> float:
            drafted = with_pause(self.expected_tokens(block_size), block_size)
            rate = (num_drafted * drafted + num_plain * with_pause(1.0, block_size)) / round_s[block_size]
            return rate if self.mean_len is None else 1 / (1 / rate + self.between_s / self.mean_len)

        best = max(round_s, key=lambda size: (tokens_per_s(size), size))
        advantage = _ADVANTAGE_TO_BEGIN if self._last == 1 else _ADVANTAGE_TO_GO_ON
        if tokens_per_s(best) < advantage * tokens_per_s(1):
            best = 1
        self._last = best
        self._is_plain_by_choice = best == 1
        return best

    def observe_end(self, num_tokens: int) -> None:
        """Learn from the new tokens of a sequence that has ended."""
        if self.mean_len is None:
            self.mean_len = float(num_tokens)
        self.mean_len += _LENGTH_RATE * (num_tokens - self.mean_len)

    def observe_between(self, seconds: float, num_ended: int) -> None:
        """Learn from the seconds between two calls and the sequences that ended in the one before."""
        self._not_yet_shared_s += seconds
        for _ in range(num_ended):
            self.between_s += _LENGTH_RATE * (self._not_yet_shared_s / num_ended - self.between_s)
        if num_ended:
            self._not_yet_shared_s = 0.0

    def observe(self, block_size: int, num_accepted: Sequence[int]) -> None:
        """Learn from the drafts that every drafted-for row of a round accepted and kept."""
        num_drafts = self._num_drafts[block_size]
        if num_drafts == 0 and not self._is_plain_by_choice:
            return
        if num_drafts == 0:
            self.survival = [s + _FORGETTING * (start - s) for s, start in zip(self.survival, self._start, strict=True)]
            return
        for accepted in num_accepted:
            for k in range(num_drafts):
                self.survival[k] += _RATE * ((accepted > k) - self.survival[k])
