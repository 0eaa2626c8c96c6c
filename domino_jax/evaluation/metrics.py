"""Numbers computed from benchmark rows: tau, acceptance by slot, speed-up, repeated text.

In come rows as `evaluation.benchmark` writes them (dictionaries, see `benchmark.ROW_FIELDS`), or their lists;
out come plain Python numbers. Nothing here knows models, devices or files, and only numpy is imported, so that a
published table can be recomputed from raw rows anywhere.

Rows hold acceptance lengths as public implementations record them: a round that runs over a stop token counts in full.
tau and acceptance by slot count committed tokens only, so rows are cut by `committed_lengths` first.

Source: tau and speed-up as Domino (arXiv 2605.29707) counts them; both means of tau are kept because they differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
_NUM_BOOTSTRAP = 2000


@dataclass(frozen=True)
class SlotAcceptance:
    """How often a slot of the draft was accepted.

    Attributes:
        slot: 1 for the first drafted token.
        num_observed: rounds in which token budget and stop token left room for this slot to be accepted.
        num_accepted: of those, rounds that accepted at least `slot` drafted tokens.
    """

    slot: int
    num_observed: int
    num_accepted: int

    @property
    def share(self) -> float | None:
        """Share of the observed rounds that accepted the slot; None without an observed round."""
        return self.num_accepted / self.num_observed if self.num_observed else None


@dataclass(frozen=True)
class SpeedUp:
    """A ratio of decode seconds a token with its percentile interval.

    Attributes:
        ratio: plain seconds a token over speculative seconds a token.
        low: lower end of the interval; None where there are too few independent measurements for one.
        high: upper end of the interval; None likewise.
    """

    ratio: float
    low: float | None
    high: float | None


def committed_lengths(acceptance_lengths: Sequence[int], num_decoded: int) -> list[int]:
    """Return the acceptance lengths without what lies past a stop token: their sum is at most `num_decoded`.

    `num_decoded` counts the tokens the rounds committed (see `decoded_tokens`).
    """
    left, cut = num_decoded, []
    for length in acceptance_lengths:
        cut.append(min(length, left))
        left -= cut[-1]
    return cut


def tau_over_prompts(lengths_by_prompt: Sequence[Sequence[int]]) -> float | None:
    """Return the mean over prompts of each prompt's mean acceptance length; prompts without a round are left out.

    tau_p = mean_r a_pr, tau = mean_p tau_p. None where no prompt has a round.

    Source: the paper's way of counting ("per sample" in the public benchmark of jianuo-huang/Domino).
    """
    means = [float(np.mean(lengths)) for lengths in lengths_by_prompt if len(lengths)]
    return float(np.mean(means)) if means else None


def tau_over_rounds(lengths_by_prompt: Sequence[Sequence[int]]) -> float | None:
    """Return the mean acceptance length over all rounds of all prompts; None without a round."""
    pooled = [length for lengths in lengths_by_prompt for length in lengths]
    return float(np.mean(pooled)) if pooled else None


def acceptance_by_slot(
    lengths_by_prompt: Sequence[Sequence[int]],
    num_draft_tokens: int,
    budgets: Sequence[int | None],
    num_decoded: Sequence[int],
) -> list[SlotAcceptance]:
    """Return, for every drafted slot, the rounds that could have accepted it and those that did.

    A round that may commit m more tokens accepts at most m - 1 drafted ones (the last is the target's own), so its
    slots m and up say nothing and are not counted, neither as accepted nor as rejected; nor are slots past an accepted
    stop token. `lengths_by_prompt` are as recorded, not cut. `budgets` holds the new tokens each prompt was allowed,
    the prefill's token included; None: no limit was met. `num_decoded` holds the tokens its rounds committed.

    Raises:
        ValueError: the three sequences differ in length.
    """
    observed = np.zeros(num_draft_tokens, int)
    accepted = np.zeros(num_draft_tokens, int)
    slots = np.arange(1, num_draft_tokens + 1)
    for lengths, budget, total in zip(lengths_by_prompt, budgets, num_decoded, strict=True):
        num_committed = 1
        for length in lengths:
            room = num_draft_tokens if budget is None else budget - num_committed - 1
            if num_committed + length > 1 + total:  # a drafted stop token was accepted
                room = min(room, 1 + total - num_committed)
            is_observed = slots <= room
            observed += is_observed
            accepted += is_observed & (slots <= length - 1)
            num_committed += length
    return [SlotAcceptance(int(s), int(o), int(a)) for s, o, a in zip(slots, observed, accepted, strict=True)]


def repeated_ngram_share(token_ids: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams that occurred before in the same text: 1 - distinct / all; 0 for a short text."""
    num_ngrams = len(token_ids) - n + 1
    if num_ngrams <= 0:
        return 0.0
    distinct = {tuple(token_ids[i : i + n]) for i in range(num_ngrams)}
    return 1.0 - len(distinct) / num_ngrams


def decoded_tokens(output_ids: Sequence[int]) -> int:
    """Return the tokens the decode loop wrote: all new tokens but the first, which the prefill chose."""
    return max(0, len(output_ids) - 1)


def speed_up(
    plain_s: Sequence[float],
    plain_tokens: Sequence[int],
    decode_s: Sequence[float],
    tokens: Sequence[int],
    confidence: float = 0.95,
    seed: int = 0,
) -> SpeedUp | None:
    """Return (sum plain_s / sum plain_tokens) / (sum decode_s / sum tokens) and a percentile bootstrap interval.

    An entry is one independent measurement (a prompt; a batch where several were decoded together), and entries are
    resampled as a whole. None where nothing was decoded. Fewer than two entries give no interval.

    Raises:
        ValueError: the sequences differ in length.
    """
    if not len(plain_s) == len(plain_tokens) == len(decode_s) == len(tokens):
        raise ValueError(
            f"speed_up got {len(plain_s)} plain and {len(decode_s)} speculative measurements; pair them one to one"
        )
    table = np.array([plain_s, plain_tokens, decode_s, tokens], float)
    table = table[:, (table[1] > 0) & (table[3] > 0) & (table[2] > 0)]
    if table.shape[1] == 0:
        return None
    ratio = float(_ratio(table.sum(axis=1)))
    if table.shape[1] < 2:
        return SpeedUp(ratio, None, None)
    picks = np.random.default_rng(seed).integers(0, table.shape[1], (_NUM_BOOTSTRAP, table.shape[1]))
    ratios = _ratio(table[:, picks].sum(axis=2))
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return SpeedUp(ratio, float(low), float(high))


def _ratio(sums: np.ndarray) -> np.ndarray | np.floating:
    plain_s, plain_tokens, decode_s, tokens = sums
    return (plain_s / plain_tokens) / (decode_s / tokens)


def _budget(row: Row) -> int | None:
    if row.get("finish_reason") == "context":
        return len(row["output_ids"])
    return row.get("max_new_tokens")


def _by_batch(rows: Sequence[Row], seconds: str, tokens: str) -> tuple[list[float], list[int]]:
    batches: dict[Any, list[Row]] = {}
    for i, row in enumerate(rows):
        batches.setdefault(row.get("batch_id", i), []).append(row)
    return (
        [sum(row[seconds] for row in group) for group in batches.values()],
        [sum(decoded_tokens(row[tokens]) for row in group) for group in batches.values()],
    )


def _tokens_per_s(seconds: Sequence[float], tokens: Sequence[int]) -> float | None:
    return sum(tokens) / sum(seconds) if sum(seconds) > 0 and sum(tokens) > 0 else None


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the table of one benchmark: what `bench.py` prints, from its rows alone.

    Keys: num_rows, num_new_tokens, plain_tokens_per_s, repeated_ngrams, finish_reasons; for speculative rows also
    tau_prompts, tau_rounds, acceptance_by_slot, tokens_per_s, speed_up, num_identical and num_compared.
    A value is None where the rows cannot say it (plain decoding only, `identical` not expected).
    """
    speculative = [row for row in rows if row["acceptance_lengths"] is not None]
    plain = [row for row in rows if row["plain_output_ids"] is not None]
    reasons = [row["finish_reason"] for row in rows]
    table: dict[str, Any] = {
        "num_rows": len(rows),
        "num_new_tokens": sum(len(row["output_ids"]) for row in rows),
        "repeated_ngrams": float(np.mean([repeated_ngram_share(row["output_ids"]) for row in rows])) if rows else None,
        "finish_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "plain_tokens_per_s": _tokens_per_s(*_by_batch(plain, "plain_decode_s", "plain_output_ids")),
    }
    if not speculative:
        return table
    recorded = [row["acceptance_lengths"] for row in speculative]
    num_decoded = [decoded_tokens(row["output_ids"]) for row in speculative]
    lengths = [committed_lengths(*pair) for pair in zip(recorded, num_decoded, strict=True)]
    # Where rounds chose what they verified, a slot that was not accepted may not have been tried.
    num_draft_tokens = max(0 if row.get("verify_widths") else row["num_draft_tokens"] for row in speculative)
    both = [row for row in speculative if row["plain_output_ids"] is not None]
    compared = [row["identical"] for row in speculative if row["identical"] is not None]
    table |= {
        "tau_prompts": tau_over_prompts(lengths),
        "tau_rounds": tau_over_rounds(lengths),
        "acceptance_by_slot": acceptance_by_slot(
            recorded, num_draft_tokens, [_budget(row) for row in speculative], num_decoded
        ),
        "tokens_per_s": _tokens_per_s(*_by_batch(speculative, "decode_s", "output_ids")),
        "speed_up": speed_up(
            *_by_batch(both, "plain_decode_s", "plain_output_ids"), *_by_batch(both, "decode_s", "output_ids")
        ),
        "num_identical": sum(compared),
        "num_compared": len(compared),
    }
    return table
