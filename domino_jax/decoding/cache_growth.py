"""Caches that grow with the text, so that attention reads what is written and not all that a budget allows.

Caches have a static length, so each length is a program of its own: few lengths, far apart, and the loop leaves the
device only where a row has reached the end of one.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from domino_jax.decoding.state import DecodeState
from domino_jax.ops.kv_cache import KVCache, fit_cache
from domino_jax.shapes import Array, Bool
from domino_jax.sharding import constrain_tree

SHORTEST = 512
"""Positions of the shortest caches of a batch that may get longer ones."""

_FACTOR = 4


def first_cache_len(needed: int, longest: int) -> int:
    """Return the length to start with where `needed` positions are used at once and `longest` at most."""
    length = SHORTEST
    while length < needed:
        length *= _FACTOR
    return length if 2 * length <= longest else longest


def can_go_on(state: DecodeState, num_new: int) -> Bool[Array, ""]:
    """Return whether a row is not done and the caches hold another `num_new` positions of every such row."""
    fits = state.committed_len + num_new <= state.target_cache.num_positions
    # One number a row, so that devices that share the rows ask each other once.
    return jnp.max(jnp.where(state.is_done, 0, jnp.where(fits, 1, 2))) == 1


def decode_growing(run: Callable[[DecodeState], DecodeState], state: DecodeState) -> DecodeState:
    """Run a loop until every row is done, with longer caches whenever it returns before."""
    state = run(state)
    longest = state.tokens.shape[1]
    while state.target_cache.num_positions < longest and not bool(jnp.all(state.is_done)):
        # In two steps: nothing holds the shorter caches while the loop runs.
        state = _grow(state, first_cache_len(state.target_cache.num_positions + 1, longest))
        state = run(state)
    return state


def _grow(state: DecodeState, num_positions: int) -> DecodeState:
    caches = {"target_cache": state.target_cache, "draft_cache": state.draft_cache}
    return state.replace(**_lengthen(caches, num_positions))


@partial(jax.jit, static_argnums=1)
def _lengthen(caches: dict[str, KVCache | None], num_positions: int) -> dict[str, KVCache | None]:
    return constrain_tree({name: cache and fit_cache(cache, num_positions) for name, cache in caches.items()})
