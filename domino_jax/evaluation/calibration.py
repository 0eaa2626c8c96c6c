"""Survival of drafted tokens on held-out prompts: the data that `verify_widths` are chosen by."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.config import SamplingConfig
from domino_jax.decoding.adaptive_width import verify_width
from domino_jax.decoding.generate import Decoder
from domino_jax.decoding.speculative import propose_block
from domino_jax.decoding.state import DecodeSettings, DecodeState, ModelParams
from domino_jax.decoding.survival import CalibrationError, SurvivalCalibration, fit_slots
from domino_jax.ops.precision import in_full_precision
from domino_jax.shapes import Array


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
