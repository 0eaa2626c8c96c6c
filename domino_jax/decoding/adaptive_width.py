"""The right width: every round drafts the block size, and verifies what part of it, that promise most tokens a second.

What to draft is decided before a round, from how far drafts survived so far; plain decoding is one of the choices. How
much of the block to verify is decided once it is there, from the chance that each slot survives. Seconds of every
choice are measured at warm-up. Drafts that are not verified are dropped: the round is one whose drafts end there.

Under the greedy and the seed-exact rule the text is the target's whatever is chosen. Under the rejection rule a choice
must not know the token it decides about, or the law of the text would change: whether slot k is verified depends on the
drafter's laws of slots 1 .. k and on tokens before k (a stopping rule over the slots), and what a later round drafts on
committed tokens alone, for noise of discarded drafts is used again at the positions they had. So under that rule a row
is decoded alone: a width that rows share would carry one's discarded noise to another and, a round later, back.

Source: the stopping rule's argument as for speculative sampling, arXiv 2211.17192: given what was known before a draft
token is drawn, accepting or replacing it by the ratio follows the target's law, and so does drawing from it at once.
"""

import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding.plain import choose_next, plain_step
from domino_jax.decoding.rollout import Proposal
from domino_jax.decoding.speculative import (
    Propose,
    accept_block,
    commit_accepted,
    propose_block,
    read_block,
    verify_block,
    write_features,
)
from domino_jax.decoding.state import SOURCE_TARGET, DecodeSettings, DecodeState, ModelParams, commit_tokens
from domino_jax.decoding.survival import SurvivalCalibration
from domino_jax.decoding.width_choice import (
    DRAFTED,
    PLAIN_STRETCH,
    PLAIN_TO_THE_END,
    Progress,
    WidthTable,
    choose_width,
    count_drafts,
    fit_costs,
    init_progress,
    make_table,
    observe,
    plan_next,
)
from domino_jax.ops.precision import in_full_precision
from domino_jax.shapes import Array, Int

_STRETCH_LEN = 32
"""Plain rounds between two trials of drafting."""
_MEASURED_ROUNDS, _MEASURED_REPEATS = 12, 5

_T = TypeVar("_T")

FREE = np.array([-1, 0, 0], np.int32)
"""The order that leaves every choice to the rounds themselves."""


def _run_if(predicate: Array, run: Callable[[_T], _T], value: _T) -> _T:
    """Return `run(value)` where the predicate holds, else `value`: a `cond` that updates buffers in place.

    A loop of one turn or none: XLA may copy what a conditional passes through, and caches are large.
    """
    return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), run(c[1])), (predicate, value))[1]


def _draft(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, propose: Propose, size: Array
) -> Proposal:
    """Draft a block of the chosen size, padded to the largest."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, settings.num_draft_tokens - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    def draft(block_size: int) -> Proposal:
        proposal = propose(replace(settings, block_size=block_size), params, state)
        if proposal.confidence is None:
            raise ValueError("`propose` returns no confidence, which `verify_widths` are chosen by; fill it in")
        return jax.tree.map(pad, proposal.replace(noise=None))

    return jax.lax.switch(size, [partial(draft, block_size) for block_size in settings.verify_widths])


def verify_width(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, proposal: Proposal, num_drafts: int
) -> tuple[DecodeState, Int[Array, " B"]]:
    """Verify and commit the first drafts of a block; return the state and how many of them each row accepted."""
    cut = jax.tree.map(lambda x: x[:, :num_drafts], proposal.replace(noise=None))
    logits, _, state = verify_block(settings, params, state, cut.tokens)
    num_accepted, next_token = accept_block(settings, state, cut, logits)
    return commit_accepted(state, cut.tokens, num_accepted, next_token), num_accepted


def _run_drafted(
    settings: DecodeSettings,
    params: ModelParams,
    table: WidthTable,
    propose: Propose,
    order: Array,
    carry: tuple[DecodeState, Progress],
) -> tuple[DecodeState, Progress]:
    """Draft, choose a width, verify it; `order` as in `decode_adaptive`."""
    state, progress = carry
    is_active, before = ~state.is_done, state.committed_len
    size = jnp.where(order[0] < 0, progress.size, order[1])
    proposal = _draft(settings, params, state, propose, size)
    width = choose_width(settings, table, size, proposal.confidence, is_active, progress.tokens_per_s)
    width = jnp.where(order[0] < 0, width, order[2])

    def verify(num_drafts: int, carry: tuple[DecodeState, Progress]) -> tuple[DecodeState, Progress]:
        state, progress = carry
        state, num_accepted = verify_width(settings, params, state, proposal, num_drafts)
        num_kept = jnp.minimum(num_accepted, state.committed_len - before)
        # What a round would have kept that the budget ended is not known.
        is_known = is_active & (~state.is_done | state.has_stopped)
        return state, observe(progress, num_kept, num_drafts, is_known)

    for i, num_drafts in enumerate(count_drafts(settings)):
        state, progress = _run_if(width == i, partial(verify, int(num_drafts)), (state, progress))
    places = jnp.arange(len(settings.verify_widths))
    is_choice = (places[:, None] == size) & (places == width)
    progress = progress.replace(num_rounds=progress.num_rounds + 1, choices=progress.choices + is_choice)
    return state, plan_next(settings, table, progress)


def _record_plain(before: DecodeState, state: DecodeState) -> DecodeState:
    """Record the plain rounds between two states: each has committed one token."""
    num_new = state.committed_len - before.committed_len
    rounds, first = jnp.arange(state.acceptance_lengths.shape[1]), state.num_rounds[:, None]
    is_plain = (rounds >= first) & (rounds < first + num_new[:, None])
    return state.replace(
        acceptance_lengths=jnp.where(is_plain, 1, state.acceptance_lengths), num_rounds=state.num_rounds + num_new
    )


def _run_plain(
    settings: DecodeSettings,
    params: ModelParams,
    max_rounds: Array,
    is_stretch: Array,
    carry: tuple[DecodeState, Progress],
) -> tuple[DecodeState, Progress]:
    """Run plain steps: a stretch of them, after which the draft's context is caught up, or all that are left."""
    before, progress = carry
    start = before.anchor_pos
    stretch_len = min(_STRETCH_LEN, before.target_cache.num_positions)
    width = settings.draft.hidden_size * len(settings.draft.target_layer_ids)
    features = jnp.zeros((start.shape[0], stretch_len, width), jnp.dtype(settings.dtype))

    def goes_on(state: DecodeState, count: Array) -> Array:
        return ~jnp.all(state.is_done) & (progress.num_rounds + count < max_rounds)

    def step_of_stretch(carry: tuple) -> tuple:
        state, count, features = carry
        logits, output = read_block(settings, params, state, jnp.zeros((start.shape[0], 0), jnp.int32))
        state = state.replace(target_cache=output.cache)
        chosen = choose_next(logits, state.committed_len[:, None], state, settings)
        state, _ = commit_tokens(state, chosen, jnp.ones_like(start), jnp.full_like(chosen, SOURCE_TARGET))
        return state, count + 1, jax.lax.dynamic_update_slice(features, output.features, (0, count, 0))

    state, count, features = jax.lax.while_loop(
        lambda c: is_stretch & goes_on(*c[:2]) & (c[1] < stretch_len),
        step_of_stretch,
        (before, jnp.zeros((), jnp.int32), features),
    )
    # A row that ended within the stretch may get its last positions spoiled: nothing is drafted for it any more.
    draft_cache = _run_if(
        is_stretch, lambda cache: write_features(settings, params, features, start, cache), state.draft_cache
    )
    state, count = jax.lax.while_loop(
        lambda c: ~is_stretch & goes_on(*c),
        lambda c: (plain_step(settings, params, c[0]), c[1] + 1),
        (state.replace(draft_cache=draft_cache), count),
    )
    return _record_plain(before, state), progress.replace(
        kind=jnp.int32(DRAFTED), num_rounds=progress.num_rounds + count, num_plain=progress.num_plain + count
    )


def run_adaptive(
    settings: DecodeSettings,
    params: ModelParams,
    state: DecodeState,
    table: WidthTable,
    order: Int[Array, " 3"],
    max_rounds: Int[Array, ""],
    propose: Propose = propose_block,
) -> tuple[DecodeState, Progress]:
    """Run rounds until every row is done, `max_rounds` at most.

    `order` is `FREE`, or what every round does: its kind, and place of size and width in `verify_widths`.
    """

    def goes_on(carry: tuple[DecodeState, Progress]) -> Array:
        return ~jnp.all(carry[0].is_done) & (carry[1].num_rounds < max_rounds)

    def find_kind(progress: Progress) -> Array:
        return jnp.where(order[0] < 0, progress.kind, order[0])

    def run(carry: tuple[DecodeState, Progress]) -> tuple[DecodeState, Progress]:
        carry = jax.lax.while_loop(
            lambda c: goes_on(c) & (find_kind(c[1]) == DRAFTED),
            partial(_run_drafted, settings, params, table, propose, order),
            carry,
        )
        kind = find_kind(carry[1])
        run_plain = partial(_run_plain, settings, params, max_rounds, kind == PLAIN_STRETCH)
        return _run_if(goes_on(carry) & (kind != DRAFTED), run_plain, carry)

    return jax.lax.while_loop(goes_on, run, (state, init_progress(settings, table)))


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
@in_full_precision
def decode_adaptive(
    settings: DecodeSettings,
    params: ModelParams,
    state: DecodeState,
    table: WidthTable,
    order: Int[Array, " 3"],
    max_rounds: Int[Array, ""],
    propose: Propose = propose_block,
) -> tuple[DecodeState, Progress]:
    """Compile `run_adaptive`; `state` is donated."""
    return run_adaptive(settings, params, state, table, order, max_rounds, propose)


def measure_costs(
    settings: DecodeSettings,
    params: ModelParams,
    state: DecodeState,
    calibration: SurvivalCalibration,
    propose: Propose = propose_block,
) -> WidthTable:
    """Time rounds of every kind from copies of a state, in the program that decodes; return the table for its shape.

    From a few counts (`fit_costs`), after one that may compile. Caches are there twice meanwhile.
    """
    num_sizes = len(settings.verify_widths)
    orders = [(PLAIN_TO_THE_END, 0, 0)]
    orders += [(DRAFTED, size, width) for size in range(num_sizes) for width in range(size + 1)]
    table = make_table(settings, calibration, 1.0, np.ones((num_sizes, num_sizes)))
    # Rows may be few and about to end; what is measured is kept for all batches of the shape.
    limit = state.tokens.shape[1] - settings.num_draft_tokens - 1
    start = max(limit - _MEASURED_ROUNDS * (settings.num_draft_tokens + 1), 1)
    state = state.replace(
        stop_ids=jnp.full_like(state.stop_ids, -1),
        limit_len=jnp.full_like(state.limit_len, limit),
        committed_len=jnp.minimum(state.committed_len, start),
        is_done=jnp.zeros_like(state.is_done),
        has_stopped=jnp.zeros_like(state.has_stopped),
    )
    seconds: dict[tuple[int, int, int], list[float]] = {order: [] for order in orders}
    for repeat in range(1 + _MEASURED_REPEATS):
        # In another sequence each time, so that none always follows the same one.
        for order in random.Random(repeat).sample(orders, len(orders)):
            copy = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            arguments = (table, jnp.asarray(order, jnp.int32), jnp.int32(_MEASURED_ROUNDS))
            began = time.perf_counter()
            _, progress = jax.block_until_ready(decode_adaptive(settings, params, copy, *arguments, propose))
            seconds[order].append((time.perf_counter() - began) / max(int(progress.num_rounds), 1))
    plain_s, round_s = fit_costs(
        np.array([seconds[order][1:] for order in orders]), [order[1:] for order in orders[1:]]
    )
    return make_table(settings, calibration, plain_s, round_s)
