"""How the next rounds are run: the block size, and the rounds a call, that promise most tokens a second at this load.

The cost of a round is measured at warm-up; what a round brings is known from how far drafts survived in past rounds.
Under load there is more to it. A call takes longer than its rounds did at warm-up, by about as much whatever they are:
tokens are handed on after it and still sent while the next one runs. So a call should bring many tokens. But a slot
stands still from the end of its sequence until its client's next request has come, which waits for the end of a call:
the more rounds, the longer. And prompts are run between calls. Drafting shortens neither of the last two; both weigh by
the length of sequences. The choice never looks at the tokens it decides about: it changes how fast a text comes, not
which. Standard library only.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

_SURVIVAL_START = 0.88
"""A fresh drafter is taken to keep each further token with this chance: high, so that it gets tried."""
_RATE = 0.003
"""Weight of one row's round in the running means of survival."""
_FORGETTING = 0.0002
"""Share of the way back to the start that the means go in a round that is plain by choice, where nothing is learned."""
_LENGTH_RATE = 0.05
"""Weight of one sequence in the running mean of lengths, and of one call in those of time between calls."""
_PROMPT_RATE = 0.01
"""Weight of one prompt in the running means of what prompts take, once some are known: a load begins with many."""
_CALL_RATE = 0.01
"""Weight of one call in the running means of what calls take, once there have been some."""
_SLOWNESS_RATE, _SLOWNESS_FORGETTING = 0.05, 0.005
"""Weight of one call in the running mean of the machine's slowness, and its way back to none."""
_CALLS_TO_KNOW = 20
"""Calls of a kind before one that takes longer than the others did speaks of the machine."""
_DRIFT = 0.0005
"""Weight of one call, or prompt, in the running means of block sizes that are not used, lest they grow old."""
_CALLS_BETWEEN_TRIALS = 16
"""After so many calls one has a round more or less than seems best: warm-up times are not exact, and this shows it."""
_ADVANTAGE_TO_BEGIN, _ADVANTAGE_TO_GO_ON = 1.03, 1.0
"""Drafting has to promise that much more than plain decoding: to begin means to catch contexts up; estimates waver."""
_CHOICES_TO_BEGIN, _MOST_CHOICES_TO_BEGIN = 40, 5120
"""And it has to promise it so many times in a row, twice as many after every time that it was given up again."""
_CHOICES_TO_PROVE = 500
"""So many calls of drafting show that it was right to begin."""
_ADVANTAGE_TO_WIDEN = 1.02
"""A wider block has to promise that much more than a narrower one: of its last slots least is known."""


class WidthPolicy:
    """Running means of how many drafts survive.

    Attributes:
        survival: for k = 1 ..: chance that at least k drafts of a block are accepted and kept.
        mean_len: new tokens of a sequence; None until one has ended.
        slowness: how many times longer than usual calls take at the moment.
        prompt_s: seconds outside calls for every sequence that begins, by shape and by whether rounds are drafted for:
            more of what was drafted for is kept for others, and prompts take longer beside many rows.
    """

    def __init__(self, num_draft_tokens: Mapping[int, int]) -> None:
        """Take the tokens drafted by each block size; 1 is plain decoding and drafts none."""
        self._num_drafts = dict(num_draft_tokens)
        self._start = [_SURVIVAL_START**k for k in range(1, max(self._num_drafts.values()) + 1)]
        self.survival = list(self._start)
        self.mean_len: float | None = None
        self.slowness = 1.0
        self.prompt_s: dict[tuple[Hashable, bool], float] = {}
        self._not_yet_shared_s = 0.0
        self._between_s: dict[Hashable, float] = {}
        self._excess_s: dict[tuple[Hashable, int], dict[int, float]] = {}
        self._num_calls: Counter[tuple[Hashable, int, int]] = Counter()
        self._num_prompts: Counter[tuple[Hashable, bool]] = Counter()
        self._num_choices = 0
        self._to_begin: dict[Hashable, int] = {}
        self._num_better: Counter[Hashable] = Counter()
        self._num_drafting: Counter[Hashable] = Counter()
        self._last = max(self._num_drafts)
        self._has_chosen = True

    def expected_tokens(self, block_size: int) -> float:
        """Return the tokens a drafted-for row commits in a round, the target's own token counted."""
        return 1.0 + sum(self.survival[: self._num_drafts[block_size]])

    def choose(
        self,
        shape: Hashable,
        round_s: Mapping[int, float],
        max_rounds: Mapping[int, int],
        num_drafted: int,
        num_plain: int,
        has_free: bool,
    ) -> tuple[int, int]:
        """Return block size and rounds of a call in which `num_drafted` rows are drafted for and `num_plain` are not.

        For every block size that may be taken, `round_s` holds the seconds that a round of this shape took at warm-up
        and `max_rounds` the most rounds of a call. True `has_free`: a slot that becomes free waits for a request while
        others run.
        """
        sizes = [size for size in round_s if size == 1 or num_drafted > 0]
        promises = {
            (size, n): self._promise(shape, round_s[size], size, n, num_drafted, num_plain, has_free)
            for size in sizes
            for n in range(1, max_rounds[size] + 1)
        }
        best = plain = None
        for size in sorted(sizes):
            option = max((o for o in promises if o[0] == size), key=lambda o: (promises[o], o))
            needed = 1.0
            if best is not None:
                begins = _ADVANTAGE_TO_BEGIN if self._last == 1 else _ADVANTAGE_TO_GO_ON
                needed = begins if best[0] == 1 else _ADVANTAGE_TO_WIDEN
            if best is None or promises[option] >= needed * promises[best]:
                best = option
            if size == 1:
                plain = option
        assert best is not None
        self._has_chosen = len(sizes) > 1
        if self._has_chosen:
            if plain is not None and not self._may_draft(shape, best[0] > 1):
                best = plain
            self._last = best[0]
        self._num_choices += 1
        if self._num_choices % _CALLS_BETWEEN_TRIALS == 0:
            lengths = [n for n in (best[1] - 1, best[1] + 1) if 1 <= n <= max_rounds[best[0]]] or [best[1]]
            best = best[0], lengths[self._num_choices // _CALLS_BETWEEN_TRIALS % len(lengths)]
        return best

    def _may_draft(self, shape: Hashable, is_better: bool) -> bool:
        """Return whether rounds may be drafted for, where drafting promises more (`is_better`) or does not."""
        to_begin = self._to_begin.get(shape, _CHOICES_TO_BEGIN)
        if self._last == 1:
            self._num_better[shape] = self._num_better[shape] + 1 if is_better else 0
            self._num_drafting[shape] = 0
            return is_better and self._num_better[shape] >= to_begin
        self._num_better[shape] = 0
        self._num_drafting[shape] += 1
        if not is_better:
            self._to_begin[shape] = min(2 * to_begin, _MOST_CHOICES_TO_BEGIN)
        elif self._num_drafting[shape] >= _CHOICES_TO_PROVE:
            self._to_begin[shape] = _CHOICES_TO_BEGIN
        return is_better

    def _promise(
        self,
        shape: Hashable,
        round_s: float,
        block_size: int,
        num_rounds: int,
        num_drafted: int,
        num_plain: int,
        has_free: bool,
    ) -> float:
        """Return tokens a second of calls of that block size and number of rounds; see `choose`."""
        call_s = self.excess_s(shape, block_size, num_rounds) + self._between_s.get(shape, 0.0)
        seconds = round_s + call_s / num_rounds
        if self.mean_len is None:
            return (num_drafted * self.expected_tokens(block_size) + num_plain) / seconds
        # Rounds that a slot stands still for: half of the rest of the call its sequence ends in, and the next one.
        pause = (3 * num_rounds - 1) / 2 if has_free else 0.0
        drafted = 1 / (1 / self.expected_tokens(block_size) + pause / self.mean_len)
        plain = 1 / (1 + pause / self.mean_len)
        prompt_s = self._find_prompt_s(shape, block_size > 1)
        return 1 / (seconds / (num_drafted * drafted + num_plain * plain) + prompt_s / self.mean_len)

    def excess_s(self, shape: Hashable, block_size: int, num_rounds: int) -> float:
        """Return the seconds that a call takes beyond what its rounds took at warm-up.

        A call of a length that has not been seen yet is taken to be as the one next to it, and a block size that has
        not been used at this shape as the one that was used last.
        """
        known = self._excess_s.get((shape, block_size)) or self._excess_s.get((shape, self._last))
        return known[min(known, key=lambda n: abs(n - num_rounds))] if known else 0.0

    def _find_prompt_s(self, shape: Hashable, is_drafted: bool) -> float:
        """Return what a prompt takes; what is not known of one manner of rounds is taken to be as of the other."""
        return self.prompt_s.get((shape, is_drafted), self.prompt_s.get((shape, not is_drafted), 0.0))

    def observe_end(self, num_tokens: int) -> None:
        """Learn from the new tokens of a sequence that has ended."""
        if self.mean_len is None:
            self.mean_len = float(num_tokens)
        self.mean_len += _LENGTH_RATE * (num_tokens - self.mean_len)

    def observe_between(
        self, shape: Hashable, block_size: int, seconds: float, num_begun: int, has_prompts: bool
    ) -> None:
        """Learn from the seconds before and after a call; `num_begun` sequences began.

        True `has_prompts`: prompts were run.
        """
        seconds /= self.slowness
        each_call_s = self._between_s.get(shape, 0.0 if has_prompts else seconds)
        if not has_prompts:
            self._between_s[shape] = each_call_s + _LENGTH_RATE * (seconds - each_call_s)
            return
        self._not_yet_shared_s += seconds - each_call_s
        if not num_begun:
            return
        each_s, self._not_yet_shared_s = self._not_yet_shared_s / num_begun, 0.0
        own, other = (shape, block_size > 1), (shape, block_size == 1)
        if own not in self.prompt_s:
            self.prompt_s[own] = self.prompt_s.get(other, each_s)
        for _ in range(num_begun):
            self._num_prompts[own] += 1
            rate = max(_PROMPT_RATE, 1 / (self._num_prompts[own] + 1))
            self.prompt_s[own] += rate * (each_s - self.prompt_s[own])
            if other in self.prompt_s and self._has_chosen:
                self.prompt_s[other] += _DRIFT * (each_s - self.prompt_s[other])

    def observe_call(self, shape: Hashable, block_size: int, num_rounds: int, round_s: float, call_s: float) -> None:
        """Learn from the seconds that a call took, whose rounds took `round_s` each at warm-up.

        A machine that others use is slower for a while, whatever is run: seconds are divided by how much slower than
        usual it is now, so that a slow moment does not speak against what was used in it.
        """
        warm_s = num_rounds * round_s
        before_s = self.excess_s(shape, block_size, num_rounds)
        # Few calls have a length that is only tried: their mean is one of equals at first.
        count = self._num_calls[shape, block_size, num_rounds] = self._num_calls[shape, block_size, num_rounds] + 1
        if count > _CALLS_TO_KNOW:
            usual = call_s / max(warm_s + before_s, warm_s / 10)
            self.slowness += _SLOWNESS_RATE * (usual - self.slowness)
        self.slowness += _SLOWNESS_FORGETTING * (1.0 - self.slowness)
        excess_s = call_s / self.slowness - warm_s
        own = self._excess_s.setdefault((shape, block_size), {})
        own[num_rounds] = before_s + max(_CALL_RATE, 1 / (count + 1)) * (excess_s - before_s)
        if not self._has_chosen:
            return
        for key, known in self._excess_s.items():
            if key[0] == shape and key[1] != block_size:
                for n, known_s in known.items():
                    known[n] = known_s + _DRIFT * (excess_s - known_s)

    def observe(self, block_size: int, num_accepted: Sequence[int]) -> None:
        """Learn from the drafts that every drafted-for row of a round accepted and kept."""
        num_drafts = self._num_drafts[block_size]
        if num_drafts == 0 and not self._has_chosen:
            return
        if num_drafts == 0:
            self.survival = [s + _FORGETTING * (start - s) for s, start in zip(self.survival, self._start, strict=True)]
            return
        for accepted in num_accepted:
            for k in range(num_drafts):
                self.survival[k] += _RATE * ((accepted > k) - self.survival[k])
