"""Which block size the next rounds use: the one that is expected to give most tokens a second at the present load.

The cost of a round is measured at warm-up; what a round brings is known from how far drafts survived in past rounds.
Under load three things make drafting worth more or less than that. A call takes longer than its rounds did at warm-up,
by about as much whatever they are: the tokens of the call before are being sent meanwhile, and calls that bring fewer
tokens suffer more from it. A slot stands still from the end of its sequence until its client's next request has come;
prompts are run and answers handed on between calls. Drafting shortens neither of these two, and both weigh by the
length of sequences. The choice never looks at the tokens it decides about: it changes how fast a text comes, not which.
Standard library only.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

_SURVIVAL_START = 0.88
"""A fresh drafter is taken to keep each further token with this chance: high, so that it gets tried."""
_RATE = 0.003
"""Weight of one row's round in the running means of survival."""
_FORGETTING = 0.0002
"""Share of the way back to the start that the means go in a round that is plain by choice, where nothing is learned."""
_LENGTH_RATE = 0.05
"""Weight of one finished sequence in the running means of lengths and of time between calls."""
_CALL_RATE, _CALL_DRIFT = 0.03, 0.002
"""Weight of one call in the running means of its block size's calls, and in the excess of other block sizes."""
_ADVANTAGE_TO_BEGIN, _ADVANTAGE_TO_GO_ON = 1.02, 1.0
"""Drafting has to promise that much more than plain decoding; to begin means to catch contexts up."""


@dataclass(frozen=True)
class ServedCall:
    """What a call of rounds took, or running means of it.

    Attributes:
        num_rounds: rounds of the call.
        call_s: seconds of the call.
        warm_up_s: seconds that as many rounds took at warm-up.
    """

    num_rounds: float
    call_s: float
    warm_up_s: float

    @property
    def excess_s(self) -> float:
        """Seconds that the call took beyond what its rounds took at warm-up."""
        return self.call_s - self.warm_up_s

    def move(self, towards: "ServedCall", rate: float) -> "ServedCall":
        """Return means moved by a share `rate` of the way."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(towards), strict=True)
        return ServedCall(*(mean + rate * (now - mean) for mean, now in pairs))


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
        self._calls: dict[tuple[Hashable, int], ServedCall] = {}
        self._last = max(self._num_drafts)
        self._is_plain_by_choice = False

    def expected_tokens(self, block_size: int) -> float:
        """Return the tokens a drafted-for row commits in a round, the target's own token counted."""
        return 1.0 + sum(self.survival[: self._num_drafts[block_size]])

    def choose(
        self,
        shape: Hashable,
        round_s: Mapping[int, float],
        call_rounds: Mapping[int, int],
        num_drafted: int,
        num_plain: int,
        has_free: bool,
    ) -> int:
        """Return the block size for rounds of `num_drafted` rows that are drafted for and `num_plain` that are not.

        For every block size `round_s` holds the seconds that a round of this shape took at warm-up and `call_rounds`
        the rounds of a call. True `has_free`: not all slots are taken; one that becomes free waits for a request.
        """
        if num_drafted == 0:
            self._is_plain_by_choice = False
            return 1

        def tokens_per_s(block_size: int) -> float:
            own = self._calls.get((shape, block_size))
            known = own or self._calls.get((shape, self._last))
            num_rounds = own.num_rounds if own else call_rounds[block_size]
            seconds = round_s[block_size] + (known.excess_s / num_rounds if known else 0.0)
            if self.mean_len is None:
                return (num_drafted * self.expected_tokens(block_size) + num_plain) / seconds
            # Rounds that a slot stands still for: half of the rest of the call its sequence ends in, and the next one.
            pause = (3 * num_rounds - 1) / 2 if has_free else 0.0
            drafted = 1 / (1 / self.expected_tokens(block_size) + pause / self.mean_len)
            plain = 1 / (1 + pause / self.mean_len)
            return 1 / (seconds / (num_drafted * drafted + num_plain * plain) + self.between_s / self.mean_len)

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

    def observe_call(self, shape: Hashable, block_size: int, call: ServedCall) -> None:
        """Learn from a call; what is known of other block sizes at this shape drifts towards it, lest it grow old."""
        before = self._calls.get((shape, block_size))
        if before is None:
            other = self._calls.get((shape, self._last)) or call
            before = dataclasses.replace(call, call_s=call.warm_up_s + other.excess_s)
        self._calls[shape, block_size] = before.move(call, _CALL_RATE)
        for key, means in self._calls.items():
            if key[0] == shape and key[1] != block_size:
                drift_s = _CALL_DRIFT * (call.excess_s - means.excess_s)
                self._calls[key] = dataclasses.replace(means, call_s=means.call_s + drift_s)

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
