"""Continuous batching: rows that join and leave between device calls, each with its own settings.

A device call runs several rounds over all rows and hands back what each round added. The rounds are those of
`speculative` and `plain`, so a row's text is the one that `generate` gives for it alone; what comes on top is decided
row by row at run time: sampling, adjusted logits, log-probabilities, whether the row is drafted for.

A row that failed or is free takes no part. It still computes something, which no other row sees.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar, no_type_check

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.decoding.plain import choose_next, read_anchor
from domino_jax.decoding.prefill import run_chunk
from domino_jax.decoding.rollout import choice_noise, choose_block
from domino_jax.decoding.speculative import backbone_block, verify_block
from domino_jax.decoding.state import (
    SOURCE_BONUS,
    SOURCE_CORRECTED,
    SOURCE_DRAFTED,
    SOURCE_PROMPT,
    SOURCE_TARGET,
    DecodeSettings,
    DecodeState,
    ModelParams,
    commit_tokens,
)
from domino_jax.models.draft_backbone import init_draft_cache
from domino_jax.models.qwen3 import Qwen3, init_target_cache
from domino_jax.ops.adjustment import Adjustment, adjust_block, count_tokens, no_adjustment
from domino_jax.ops.precision import in_full_precision
from domino_jax.ops.sampling import SamplingParams
from domino_jax.ops.scoring import Scores, no_scores, score_tokens
from domino_jax.ops.verification import accept_equal
from domino_jax.shapes import Array, Bool, Float, Int
from domino_jax.sharding import constrain, constrain_tree

_T = TypeVar("_T")

MAX_TOP_LOGPROBS = 20
"""Most likely tokens that are scored beside the chosen one. Source: the limit of the OpenAI API."""


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class SlotState:
    """What a batch of slots carries from call to call; donated to each call and returned by it.

    Attributes:
        decode: caches, tokens and sampling; its rounds and acceptance lengths are those of the last call.
        adjustment: changes of the logits, row by row.
        wants_scores: rows whose new tokens are scored.
        has_failed: rows whose states are no longer finite; they are done, and their last token was not committed.
    """

    decode: DecodeState
    adjustment: Adjustment
    wants_scores: Bool[Array, " B"]
    has_failed: Bool[Array, " B"]


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class CallResult:
    """What one device call did, row by row.

    Attributes:
        tokens: new tokens in order, of all rounds; meaningless past `num_new`.
        sources: who wrote them, an index into `SOURCE_NAMES`.
        scores: of the new tokens of rows that want them; width 0 where the call could add nothing.
        acceptance_lengths: per round, accepted draft tokens + 1, cut at the budget alone.
        num_rounds: rounds the row took part in.
    """

    tokens: Int[Array, "B new"]
    sources: Int[Array, "B new"]
    scores: Scores
    num_new: Int[Array, " B"]
    acceptance_lengths: Int[Array, "B rounds"]
    num_rounds: Int[Array, " B"]
    has_stopped: Bool[Array, " B"]
    is_done: Bool[Array, " B"]
    has_failed: Bool[Array, " B"]


def init_slots(settings: DecodeSettings, batch: int, num_positions: int, num_stops: int, max_rounds: int) -> SlotState:
    """Return `batch` free slots of `num_positions` cache positions, with room for `num_stops` stop ids a row."""
    dtype = jnp.dtype(settings.dtype)
    decode = DecodeState(
        tokens=jnp.zeros((batch, num_positions), jnp.int32),
        sources=jnp.full((batch, num_positions), SOURCE_PROMPT, jnp.int8),
        committed_len=jnp.ones(batch, jnp.int32),
        limit_len=jnp.ones(batch, jnp.int32),
        stop_ids=jnp.full((batch, num_stops), -1, jnp.int32),
        has_stopped=jnp.zeros(batch, bool),
        is_done=jnp.ones(batch, bool),
        acceptance_lengths=jnp.zeros((batch, max_rounds), jnp.int32),
        num_rounds=jnp.zeros(batch, jnp.int32),
        sampling=SamplingParams(
            temperature=jnp.zeros(batch, jnp.float32),
            top_k=jnp.zeros(batch, jnp.int32),
            top_p=jnp.ones(batch, jnp.float32),
            min_p=jnp.zeros(batch, jnp.float32),
            seed=jnp.zeros(batch, jnp.uint32),
        ),
        target_cache=init_target_cache(settings.target, batch, num_positions, dtype),
        draft_cache=init_draft_cache(settings.draft, batch, num_positions, dtype) if settings.draft else None,
    )
    return SlotState(
        decode=decode,
        adjustment=no_adjustment(batch, settings.target.vocab_size),
        wants_scores=jnp.zeros(batch, bool),
        has_failed=jnp.zeros(batch, bool),
    )


def _by_sampling(settings: DecodeSettings, state: DecodeState, run: Callable[[DecodeSettings], _T]) -> _T:
    """Return `run`'s result under the cheapest settings that serve every row that is not done."""
    sampling, is_active = state.sampling, ~state.is_done
    is_sampled = is_active & (sampling.temperature > 0)
    is_filtered = is_sampled & ((sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0))
    choices = [("greedy", False), ("seed-exact", False), ("seed-exact", True)]
    branches = [
        partial(lambda inner: run(inner), replace(settings, rule=rule, has_filters=has_filters))
        for rule, has_filters in choices
    ]
    return jax.lax.switch(jnp.any(is_sampled).astype(jnp.int32) + jnp.any(is_filtered), branches)


def _choose(
    settings: DecodeSettings,
    slots: SlotState,
    logits: Float[Array, "B W V"],
    drafts: Int[Array, "B P"],
    noise: Float[Array, "B W V"] | None = None,
) -> Int[Array, "B W"]:
    """Return the target's own choices after the adjustments of each row; `noise` as in `choose_next`."""
    state = slots.decode
    is_adjusted = jnp.any(slots.adjustment.is_used & ~state.is_done)
    adjusted = jax.lax.cond(
        is_adjusted,
        lambda: adjust_block(logits, drafts, state.committed_len, state.stop_ids, slots.adjustment),
        lambda: logits,
    )
    positions = state.committed_len[:, None] + jnp.arange(logits.shape[1])
    return _by_sampling(settings, state, lambda inner: choose_next(adjusted, positions, state, inner, noise))


def _commit(
    slots: SlotState,
    scores: Scores,
    start_len: Int[Array, " B"],
    hidden: Float[Array, "B W D"],
    logits: Float[Array, "B W V"],
    new_tokens: Int[Array, "B W"],
    num_new: Int[Array, " B"],
    sources: Int[Array, "B W"],
) -> tuple[SlotState, Scores]:
    """Commit a round's tokens, its scores and counts; a row whose states are not finite fails instead."""
    state = slots.decode
    is_active = ~state.is_done
    in_use = jnp.arange(hidden.shape[1]) < num_new[:, None]
    # A logit that is not a number is chosen before all others.
    chosen = jnp.take_along_axis(logits, new_tokens[..., None], axis=-1)[..., 0]
    is_finite = jnp.all((jnp.isfinite(hidden).all(axis=-1) & jnp.isfinite(chosen)) | ~in_use, axis=-1)
    fails_now = is_active & ~is_finite
    state = state.replace(is_done=state.is_done | fails_now)
    before = state.committed_len
    state, acceptance_len = commit_tokens(state, new_tokens, num_new, sources)
    num_kept = state.committed_len - before
    rows = jnp.arange(before.shape[0])
    recorded = state.acceptance_lengths.at[rows, state.num_rounds].add(acceptance_len, mode="drop")
    state = state.replace(acceptance_lengths=recorded, num_rounds=state.num_rounds + (is_active & is_finite))

    def with_scores() -> Scores:
        num_top = scores.top.shape[-1]
        new = score_tokens(logits, new_tokens, num_top)
        index = jnp.arange(new_tokens.shape[1])
        at = jnp.where(index < num_kept[:, None], (before - start_len)[:, None] + index, scores.chosen.shape[1])
        return jax.tree.map(lambda old, value: old.at[rows[:, None], at].set(value, mode="drop"), scores, new)

    scores = jax.lax.cond(jnp.any(slots.wants_scores & is_active), with_scores, lambda: scores)
    adjustment = jax.lax.cond(
        jnp.any(slots.adjustment.is_used & is_active),
        lambda: count_tokens(slots.adjustment, new_tokens, num_kept),
        lambda: slots.adjustment,
    )
    slots = slots.replace(decode=state, adjustment=adjustment, has_failed=slots.has_failed | fails_now)
    return slots, scores


def _propose(
    settings: DecodeSettings, params: ModelParams, state: DecodeState
) -> tuple[Int[Array, "B P"], Float[Array, "B W V"]]:
    """Return drafts, and the noise of the target's own choices: 0 where no row draws."""
    block = backbone_block(settings, params, state)
    noise = jax.eval_shape(partial(choice_noise, settings), state)
    noise = jax.lax.cond(
        jnp.any(~state.is_done & (state.sampling.temperature > 0)),
        lambda: choice_noise(settings, state),
        lambda: constrain(jnp.zeros(noise.shape, noise.dtype), "logits"),
    )
    drafts = _by_sampling(settings, state, lambda inner: choose_block(inner, params, state, *block, noise).tokens)
    return drafts, noise


def _speculative_round(
    settings: DecodeSettings,
    params: ModelParams,
    slots: SlotState,
    scores: Scores,
    start_len: Int[Array, " B"],
    is_drafted: Bool[Array, " B"],
) -> tuple[SlotState, Scores]:
    state = slots.decode
    drafts, noise = _propose(settings, params, state)
    logits, hidden, state = verify_block(settings, params, state, drafts)
    slots = slots.replace(decode=state)
    choices = _choose(settings, slots, logits, drafts, noise)
    # A row without drafts takes the target's first choice, as a refused first draft would.
    num_accepted, next_token = accept_equal(jnp.where(is_drafted[:, None], drafts, -1), choices)
    num_drafts = drafts.shape[1]
    is_draft = jnp.arange(num_drafts + 1) < num_accepted[:, None]
    new_tokens = jnp.where(is_draft, jnp.pad(drafts, ((0, 0), (0, 1))), next_token[:, None])
    own_source = jnp.where(num_accepted == num_drafts, SOURCE_BONUS, SOURCE_CORRECTED)
    own_source = jnp.where(is_drafted, own_source, SOURCE_TARGET)[:, None]
    sources = jnp.where(is_draft, SOURCE_DRAFTED, own_source)
    return _commit(slots, scores, start_len, hidden, logits, new_tokens, num_accepted + 1, sources)


def _plain_round(
    settings: DecodeSettings, params: ModelParams, slots: SlotState, scores: Scores, start_len: Int[Array, " B"]
) -> tuple[SlotState, Scores]:
    logits, hidden, state = read_anchor(settings, params, slots.decode)
    return _commit_choice(settings, slots.replace(decode=state), scores, start_len, hidden, logits)


def _commit_choice(
    settings: DecodeSettings,
    slots: SlotState,
    scores: Scores,
    start_len: Int[Array, " B"],
    hidden: Float[Array, "B 1 D"],
    logits: Float[Array, "B 1 V"],
) -> tuple[SlotState, Scores]:
    """Commit the target's own choice of the next token of each row."""
    chosen = _choose(settings, slots, logits, jnp.zeros((logits.shape[0], 0), jnp.int32))
    sources = jnp.full_like(chosen, SOURCE_TARGET)
    return _commit(slots, scores, start_len, hidden, logits, chosen, jnp.ones_like(chosen[:, 0]), sources)


@partial(jax.jit, static_argnums=0)
@in_full_precision
def draft_only(settings: DecodeSettings, params: ModelParams, slots: SlotState) -> Int[Array, "B P"]:
    """Return the drafts of the next round; to time drafting by itself."""
    return _propose(settings, params, slots.decode)[0]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@in_full_precision
def run_rounds(
    settings: DecodeSettings,
    params: ModelParams,
    slots: SlotState,
    is_cancelled: Bool[Array, " B"],
    is_drafted: Bool[Array, " B"],
    num_rounds: Int[Array, ""],
    ends_early: Bool[Array, ""],
) -> tuple[SlotState, CallResult]:
    """Run up to `num_rounds` rounds; `slots` is donated.

    `settings.block_size` 1 runs plain steps, which leave the draft's context as it is. Wider blocks write every row's;
    rows that are not drafted for take one token a round. Cancelled rows are done before the first round. With
    `ends_early` the call returns as soon as another row is done. `num_rounds` is at most the width of the state's
    `acceptance_lengths`.
    """
    state = slots.decode
    state = state.replace(
        is_done=state.is_done | is_cancelled,
        acceptance_lengths=jnp.zeros_like(state.acceptance_lengths),
        num_rounds=jnp.zeros_like(state.num_rounds),
    )
    start_len, was_done = state.committed_len, state.is_done
    width = settings.num_draft_tokens + 1
    batch, max_rounds = state.acceptance_lengths.shape
    run_round = partial(_speculative_round, is_drafted=is_drafted) if settings.num_draft_tokens else _plain_round

    def goes_on(carry: tuple) -> Array:
        done, slots, _ = carry
        is_done = slots.decode.is_done
        return (done < num_rounds) & ~jnp.all(is_done) & ~(ends_early & jnp.any(is_done & ~was_done))

    def step(carry: tuple) -> tuple:
        done, slots, scores = carry
        slots, scores = run_round(settings, params, slots, scores, start_len)
        return done + 1, constrain_tree(slots), scores

    start = (jnp.int32(0), slots.replace(decode=state), no_scores(batch, max_rounds * width, MAX_TOP_LOGPROBS))
    _, slots, scores = jax.lax.while_loop(goes_on, step, start)
    slots = constrain_tree(slots)
    return slots, _read_result(slots, scores, start_len, max_rounds * width)


def _read_result(slots: SlotState, scores: Scores, start_len: Int[Array, " B"], num_new: int) -> CallResult:
    state = slots.decode

    def window(buffer: Array) -> Array:
        # A row near the end of its cache: XLA would move the slice back, so the buffer is made longer.
        padded = jnp.pad(buffer, ((0, 0), (0, num_new)))
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (num_new,)))(padded, start_len)

    return CallResult(
        tokens=window(state.tokens),
        sources=window(state.sources),
        scores=scores,
        num_new=state.committed_len - start_len,
        acceptance_lengths=state.acceptance_lengths,
        num_rounds=state.num_rounds,
        has_stopped=state.has_stopped,
        is_done=state.is_done,
        has_failed=slots.has_failed,
    )


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@in_full_precision
def choose_first_token(
    settings: DecodeSettings, params: ModelParams, slots: SlotState, last_hidden: Float[Array, "B D"]
) -> tuple[SlotState, CallResult]:
    """Commit the token after each prompt, the target's own, from the prompt's last state; `slots` is donated.

    The call has no rounds.
    """
    state = slots.decode
    start_len = state.committed_len
    target = Qwen3(settings.target, dtype=jnp.dtype(settings.dtype))
    hidden = last_hidden[:, None]
    logits = target.apply({"params": params.target}, hidden, method=Qwen3.logits)
    scores = no_scores(start_len.shape[0], 1, MAX_TOP_LOGPROBS)
    slots, scores = _commit_choice(settings, slots, scores, start_len, hidden, logits)
    state = slots.decode
    slots = slots.replace(
        decode=state.replace(
            acceptance_lengths=jnp.zeros_like(state.acceptance_lengths), num_rounds=jnp.zeros_like(state.num_rounds)
        )
    )
    return constrain_tree(slots), _read_result(slots, scores, start_len, 1)


@partial(jax.jit, static_argnums=(0, 3), donate_argnums=2)
@in_full_precision
def prefill_slots(
    settings: DecodeSettings,
    params: ModelParams,
    slots: SlotState,
    chunk_len: int,
    start: Int[Array, ""],
) -> tuple[SlotState, Float[Array, "B T D"]]:
    """Run prompt positions `start .. start + chunk_len - 1` of every row; `slots` is donated.

    Returns the target's last states of the chunk; `start + chunk_len` must fit the cache. A row whose states are not
    finite somewhere before its committed length has failed.
    """
    state, hidden = run_chunk(settings, params, slots.decode, chunk_len, start)
    is_known = start + jnp.arange(chunk_len) < state.committed_len[:, None]
    fails = jnp.any(is_known & ~jnp.isfinite(hidden).all(axis=-1), axis=-1)
    slots = slots.replace(decode=state, has_failed=slots.has_failed | fails)
    return constrain_tree(slots), constrain(hidden, "states")


@partial(jax.jit, static_argnums=0)
@in_full_precision
def score_chunk(
    settings: DecodeSettings, params: ModelParams, hidden: Float[Array, "B T D"], next_tokens: Int[Array, "B T"]
) -> Scores:
    """Return the scores of the tokens that follow each position of a prefilled chunk."""
    target = Qwen3(settings.target, dtype=jnp.dtype(settings.dtype))
    logits = target.apply({"params": params.target}, hidden, method=Qwen3.logits)
    return score_tokens(logits, next_tokens, MAX_TOP_LOGPROBS)
