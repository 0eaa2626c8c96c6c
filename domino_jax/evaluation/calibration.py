"""Survival of drafted tokens on held-out prompts: the data that `verify_widths` are chosen by."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from domino_jax.config import SamplingConfig
from domino_jax.decoding.adaptive_width import verify_width
from domino_jax.decoding.generate import Decoder
from domino_jax.decoding.speculative import propose_block
from domino_jax.decoding.state import DecodeSettings, DecodeState, ModelParams
from domino_jax.decoding.survival import CalibrationError, SlotSurvival, SurvivalCalibration
from domino_jax.ops.precision import in_full_precision
from domino_jax.shapes import Array, Bool, Float, Int

_PRIOR_WEIGHT = 1.0
"""Weight of the drafter's own probability as it is (slope 1, intercept 0), in squared distance of the two numbers: a
slot that was always kept, or never seen, has a finite fit."""


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@in_full_precision
def _run_recorded(
    settings: DecodeSettings, params: ModelParams, state: DecodeState
) -> tuple[DecodeState, Array, Array]:
    """Run a round of the full block; return the state, the drafter's confidence and the drafts that rows kept."""
    before = state.committed_len
    proposal = propose_block(settings, params, state)
    state, num_accepted = verify_width(settings, params, state, proposal, settings.num_draft_tokens)
    return state, proposal.confidence, jnp.minimum(num_accepted, state.committed_len - before)


def calibrate_survival(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    block_sizes: Sequence[int],
    sampling: SamplingConfig = SamplingConfig(),
    stop_ids: Sequence[int] = (),
    rule: str = "seed-exact",
    batch_size: int = 8,
) -> SurvivalCalibration:
    """Decode the prompts with blocks of every size and fit each slot's survival; prompt i uses seed + i.

    A round that the token budget ended is left out: what it would have kept is not known.

    Raises:
        CalibrationError: no round is left.
    """
    rule = "greedy" if sampling.temperature == 0 else rule
    has_filters = sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    sizes = {}
    for size in sorted(block_sizes):
        loop = replace(decoder.settings, block_size=size, rule=rule, has_filters=has_filters, verify_widths=(size,))
        confidence, num_kept = [], []
        for first in range(0, len(prompts), batch_size):
            rows = list(prompts[first : first + batch_size])
            seeds = [replace(sampling, seed=(sampling.seed + first + i) % 2**32) for i in range(len(rows))]
            settings = ([max_new_tokens] * len(rows), seeds, [tuple(stop_ids)] * len(rows))
            params, state = decoder.start_batch(loop, rows, *settings, batch_size)
            while not (is_done := np.asarray(state.is_done)).all():
                state, sure, kept = _run_recorded(loop, params, state)
                is_known = ~is_done & np.asarray(~state.is_done | state.has_stopped)
                confidence.append(np.asarray(sure)[is_known])
                num_kept.append(np.asarray(kept)[is_known])
        if sum(map(len, num_kept)) == 0:
            raise CalibrationError(
                f"no round of block {size} is left to calibrate on: every text ended at its first token or by its "
                f"budget of {max_new_tokens} tokens; allow more, or give more prompts"
            )
        sizes[size] = fit_slots(np.concatenate(confidence), np.concatenate(num_kept))
    return SurvivalCalibration(sizes, decoder.settings.draft_vocab_size)


def fit_slots(confidence: Float[np.ndarray, "rounds P"], num_kept: Int[np.ndarray, " rounds"]) -> SlotSurvival:
    """Fit every slot's map by penalised logistic regression on the rounds that kept all drafts before it."""
    log_odds = logit(np.clip(np.asarray(confidence, np.float64), 1e-6, 1 - 1e-6))
    slots = []
    for k in range(log_odds.shape[1]):
        reached = num_kept >= k
        is_kept = (num_kept > k)[reached]
        slope, intercept = _fit_map(log_odds[reached, k], is_kept)
        slots.append((slope, intercept, (is_kept.sum() + 1) / (is_kept.size + 2)))
    return SlotSurvival(*(tuple(float(v) for v in column) for column in zip(*slots, strict=True)))


def _fit_map(log_odds: Float[np.ndarray, " n"], is_kept: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    def find_loss(numbers: Float[np.ndarray, " 2"]) -> tuple[float, Float[np.ndarray, " 2"]]:
        slope, intercept = numbers
        z = slope * log_odds + intercept
        loss = np.sum(np.logaddexp(0, z) - is_kept * z) + _PRIOR_WEIGHT / 2 * ((slope - 1) ** 2 + intercept**2)
        error = expit(z) - is_kept
        gradient = [error @ log_odds + _PRIOR_WEIGHT * (slope - 1), error.sum() + _PRIOR_WEIGHT * intercept]
        return float(loss), np.array(gradient)

    found = minimize(find_loss, np.array([1.0, 0.0]), jac=True, bounds=[(0, None), (None, None)], method="L-BFGS-B")
    return float(found.x[0]), float(found.x[1])
