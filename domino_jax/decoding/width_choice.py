"""What a round drafts and what of it is verified: the choice, from costs, calibrated chances and what a text has shown.

Under the rejection rule no choice knows the token that it decides about; `domino_jax.decoding.adaptive_width` says why.
"""

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding.state import DecodeSettings
from domino_jax.decoding.survival import SurvivalCalibration
from domino_jax.shapes import Array, Bool, Float, Int

_TRIALS_AT_START = 20.0
"""Drafts that the held-out rates of a slot weigh as much as, against those of the text at hand."""
_REMEMBERED = 0.9
"""Share of what was seen that a further drafted round leaves of it."""
_ADVANTAGE = 1.1
"""Drafting has to promise that much more than plain decoding: a batch ends with its slowest row, not with the mean one,
and what is measured at warm-up has everything in caches."""
_HOPELESS = 1.0
"""Below that share of plain decoding's promise drafting is not tried again: features of plain steps would have to be
projected for it, which costs about what there is to gain."""
_ADVANTAGE_TO_WIDEN = 1.02
"""A wider block has to promise that much more than a narrower one: of its last slots least is known, and what it drafts
past the end of a text is lost."""

PLAIN_TO_THE_END, PLAIN_STRETCH, DRAFTED = range(3)


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class WidthTable:
    """What is known before the first round; sizes and widths are the settings' `verify_widths`, in their order.

    Attributes:
        slope: of the logit of the chance that a slot is kept, over the logit of the drafter's confidence.
        intercept: of the same.
        rate: chance that a slot is kept where those before it were, whatever the confidence.
        plain_s: seconds of a plain step.
        round_s: seconds of a round that drafts a size (first axis) and verifies a width (second); infinite where the
            width is the larger.
    """

    slope: Float[Array, "sizes P"]
    intercept: Float[Array, "sizes P"]
    rate: Float[Array, "sizes P"]
    plain_s: Float[Array, ""]
    round_s: Float[Array, "sizes sizes"]


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class Progress:
    """What rounds learn and count.

    Attributes:
        kept: drafts of each slot that were kept, older rounds weighing less.
        tried: verified drafts of each slot whose predecessors were all kept, weighed alike.
        kind: what the next rounds are: plain to the end, a plain stretch, or drafted.
        size: place in `verify_widths` of the block size to draft.
        tokens_per_s: what a row is promised by the better of drafting and plain decoding.
        num_rounds: rounds so far, plain ones included.
        choices: rounds by size drafted and width verified.
        num_plain: plain rounds.
    """

    kept: Float[Array, " P"]
    tried: Float[Array, " P"]
    kind: Int[Array, ""]
    size: Int[Array, ""]
    tokens_per_s: Float[Array, ""]
    num_rounds: Int[Array, ""]
    choices: Int[Array, "sizes sizes"]
    num_plain: Int[Array, ""]


def init_progress(settings: DecodeSettings, table: WidthTable) -> Progress:
    """Return what is known of a text before its first round: nothing but what held-out texts say."""
    num_sizes, zero = len(settings.verify_widths), jnp.zeros((), jnp.int32)
    progress = Progress(
        kept=jnp.zeros(settings.num_draft_tokens),
        tried=jnp.zeros(settings.num_draft_tokens),
        kind=zero,
        size=zero,
        tokens_per_s=jnp.zeros(()),
        num_rounds=zero,
        choices=jnp.zeros((num_sizes, num_sizes), jnp.int32),
        num_plain=zero,
    )
    return plan_next(settings, table, progress)


def fit_costs(
    seconds: Float[np.ndarray, "orders repeats"], rounds: list[tuple[int, int]]
) -> tuple[float, Float[np.ndarray, "sizes sizes"]]:
    """Return seconds of a plain step and of every round, infinite where the width is the larger.

    `seconds` are those of plain steps and of `rounds`, (size, width). Each repeat counts over its own mean, so that a
    machine whose speed drifts says the same; a round is a draft, which depends on the size, and a verify pass, which
    depends on the width: least squares over such sums, by parts of what was measured.
    """
    scale = np.exp(np.log(seconds).mean(axis=0))
    plain_s, *measured_s = np.median(seconds / scale, axis=1) * np.median(scale)
    num_sizes = max(size for size, _ in rounds) + 1
    steps = np.arange(1, num_sizes)
    terms = np.array([[1, *(steps <= size), *(steps <= width)] for size, width in rounds], np.float64)
    parts = np.linalg.lstsq(terms / np.array(measured_s)[:, None], np.ones(len(rounds)), rcond=None)[0]
    round_s = np.full((num_sizes, num_sizes), np.inf)
    for (size, width), fitted_s in zip(rounds, terms @ parts, strict=True):
        round_s[size, width] = fitted_s
    return float(plain_s), round_s


def make_table(
    settings: DecodeSettings, calibration: SurvivalCalibration, plain_s: float, round_s: Float[np.ndarray, "D D"]
) -> WidthTable:
    """Join calibration and costs."""

    def stack(name: str) -> Array:
        rows = [getattr(calibration.sizes[size], name) for size in settings.verify_widths]
        return jnp.asarray([[*row, *[0.0] * (settings.num_draft_tokens - len(row))] for row in rows], jnp.float32)

    return WidthTable(
        slope=stack("slope"),
        intercept=stack("intercept"),
        rate=stack("rate"),
        plain_s=jnp.asarray(plain_s, jnp.float32),
        round_s=jnp.asarray(round_s, jnp.float32),
    )


def count_drafts(settings: DecodeSettings) -> np.ndarray:
    """Return the tokens drafted by each of the sizes."""
    return np.array([settings.draft.num_draft_tokens(size) for size in settings.verify_widths])


def _expected_tokens(settings: DecodeSettings, rates: Float[Array, "*rows P"]) -> Float[Array, "*rows widths"]:
    """Return 1 + sum over the slots of a width of the chance that all drafts up to the slot are kept."""
    survival = jnp.cumprod(rates, axis=-1)
    return 1 + jnp.cumsum(survival, axis=-1)[..., count_drafts(settings) - 1]


def plan_next(settings: DecodeSettings, table: WidthTable, progress: Progress) -> Progress:
    """Choose kind and block size of the next round.

    The rate of a slot is that of held-out decodes, corrected by what this text has shown so far.
    """
    rates = (_TRIALS_AT_START * table.rate + progress.kept) / (_TRIALS_AT_START + progress.tried)
    promises = jnp.max(_expected_tokens(settings, rates) / table.round_s, axis=-1)
    over_plain = jnp.max(promises) * table.plain_s
    plain = jnp.where(over_plain < _HOPELESS, PLAIN_TO_THE_END, PLAIN_STRETCH)
    return progress.replace(
        kind=jnp.where(over_plain >= _ADVANTAGE, DRAFTED, plain).astype(jnp.int32),
        size=jnp.argmax(promises * _ADVANTAGE_TO_WIDEN >= jnp.max(promises)).astype(jnp.int32),
        tokens_per_s=jnp.maximum(jnp.max(promises), 1 / table.plain_s),
    )


def choose_width(
    settings: DecodeSettings,
    table: WidthTable,
    size: Int[Array, ""],
    confidence: Float[Array, "B P"],
    is_active: Bool[Array, " B"],
    tokens_per_s: Float[Array, ""],
) -> Int[Array, ""]:
    """Return the width at which expected tokens less what the round's seconds are worth elsewhere are most.

    `tokens_per_s` is that worth, for a row; a round that maximised its own ratio would linger over bad blocks.
    Under the rejection rule the decision is taken slot by slot: go on while some further width promises more, by the
    laws of drafted slots up to the next one and by mean rates after it.
    """
    logit = jax.scipy.special.logit(jnp.clip(confidence, 1e-6, 1 - 1e-6))
    rates = jax.nn.sigmoid(table.slope[size] * logit + table.intercept[size])
    seconds = table.round_s[size]

    def find_worth(rates: Float[Array, "B P"]) -> Float[Array, " widths"]:
        tokens = jnp.where(is_active[:, None], _expected_tokens(settings, rates), 0.0)
        return jnp.sum(tokens, axis=0) - tokens_per_s * jnp.sum(is_active) * seconds

    if settings.rule != "rejection":
        return jnp.argmax(find_worth(rates)).astype(jnp.int32)
    slots, num_widths = jnp.arange(rates.shape[1]), len(settings.verify_widths)
    stops = []
    for i, num_drafts in enumerate(count_drafts(settings)):
        worth = find_worth(jnp.where(slots <= num_drafts, rates, table.rate[size]))
        stops.append(jnp.argmax(jnp.where(jnp.arange(num_widths) >= i, worth, -jnp.inf)) == i)
    return jnp.argmax(jnp.stack(stops)).astype(jnp.int32)


def observe(
    progress: Progress, num_kept: Int[Array, " B"], num_verified: int, is_active: Bool[Array, " B"]
) -> Progress:
    """Learn from what rows kept of the drafts that were verified; slots after the first refused one say nothing."""
    slots = jnp.arange(progress.kept.shape[0])
    kept = is_active[:, None] & (slots < num_kept[:, None])
    tried = is_active[:, None] & (slots <= num_kept[:, None]) & (slots < num_verified)
    return progress.replace(
        kept=_REMEMBERED * progress.kept + jnp.sum(kept, axis=0),
        tried=_REMEMBERED * progress.tried + jnp.sum(tried, axis=0),
    )


def name_choices(settings: DecodeSettings, progress: Progress) -> dict[tuple[int, int], int]:
    """Return rounds by what was done: (size drafted, width verified), (1, 1) for plain ones."""
    sizes, choices = settings.verify_widths, np.asarray(progress.choices)
    return {(1, 1): int(progress.num_plain)} | {
        (sizes[drafted], sizes[width]): int(choices[drafted, width]) for drafted, width in np.argwhere(choices)
    }
