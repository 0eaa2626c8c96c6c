"""Run prompts of any length through the target in chunks of a few static lengths, and choose the first token.

Rows of a batch share the chunks; what a shorter row writes past its prompt is overwritten before it is ever seen.
"""

from functools import partial

import jax
import jax.numpy as jnp

from domino_jax.decoding.plain import choose_next
from domino_jax.decoding.speculative import write_features
from domino_jax.decoding.state import SOURCE_TARGET, DecodeSettings, DecodeState, ModelParams, commit_tokens
from domino_jax.models.qwen3 import Qwen3
from domino_jax.ops.precision import in_full_precision
from domino_jax.shapes import Array, Float, Int
from domino_jax.sharding import constrain, constrain_tree

CHUNK_LENGTHS = (16, 64, 256)
"""Static lengths a prompt is cut into; few, because each is compiled once for a batch and cache size."""

MAX_PADDING = 32
"""Positions past a prompt that its last chunk may write."""


def split_into_chunks(prompt_len: int) -> list[int]:
    """Return chunk lengths that cover `prompt_len`, the longest first, with less than `MAX_PADDING` to spare."""
    short, medium, long = CHUNK_LENGTHS
    num_long, rest = divmod(prompt_len, long)
    num_medium, rest = divmod(rest, medium)
    num_short = -(-rest // short)
    if num_short > 2:  # one wider chunk costs less
        num_medium, num_short = num_medium + 1, 0
    return [long] * num_long + [medium] * num_medium + [short] * num_short


def run_chunk(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, chunk_len: int, start: Int[Array, ""]
) -> tuple[DecodeState, Float[Array, "B T D"]]:
    """Run positions `start .. start + chunk_len - 1` of every row; return `state`, caches written, and last states."""
    layers = settings.draft.target_layer_ids if settings.draft else ()
    target = Qwen3(settings.target, layers, jnp.dtype(settings.dtype))
    tokens = jax.lax.dynamic_slice_in_dim(state.tokens, start, chunk_len, axis=1)
    starts = jnp.full_like(state.committed_len, start)
    output = target.apply({"params": params.target}, tokens, starts, state.target_cache, method=Qwen3.forward_cached)
    state = state.replace(target_cache=output.cache)
    if settings.draft:
        draft_cache = write_features(settings, params, output.features, starts, state.draft_cache)
        state = state.replace(draft_cache=draft_cache)
    return state, output.hidden


@partial(jax.jit, static_argnums=(0, 3), donate_argnums=(2, 5))
@in_full_precision
def prefill_chunk(
    settings: DecodeSettings,
    params: ModelParams,
    state: DecodeState,
    chunk_len: int,
    start: Int[Array, ""],
    last_hidden: Float[Array, "B D"],
) -> tuple[DecodeState, Float[Array, "B D"]]:
    """Run prompt positions `start .. start + chunk_len - 1`; `state` and `last_hidden` are donated.

    Returns the state with caches written and, for rows whose prompt ends in this chunk, its last hidden state.
    `state.committed_len` is the prompt length here: nothing has been generated yet.
    """
    state, hidden = run_chunk(settings, params, state, chunk_len, start)
    offset = state.committed_len - 1 - start
    inside = (offset >= 0) & (offset < chunk_len)
    at = jnp.clip(offset, 0, chunk_len - 1)[:, None, None]
    ending = jnp.take_along_axis(hidden, at, axis=1)[:, 0]
    return constrain_tree(state), constrain(jnp.where(inside[:, None], ending, last_hidden), "states")


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@in_full_precision
def choose_first(
    settings: DecodeSettings, params: ModelParams, state: DecodeState, last_hidden: Float[Array, "B D"]
) -> DecodeState:
    """Commit the token after each prompt, the target's own; `state` is donated."""
    target = Qwen3(settings.target, dtype=jnp.dtype(settings.dtype))
    logits = target.apply({"params": params.target}, last_hidden[:, None], method=Qwen3.logits)
    chosen = choose_next(logits, state.committed_len[:, None], state, settings)
    ones = jnp.ones_like(state.committed_len)
    return constrain_tree(commit_tokens(state, chosen, ones, jnp.full_like(chosen, SOURCE_TARGET))[0])
