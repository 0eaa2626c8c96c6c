"""The state that a batch of prompts is decoded from, sized by prompts, budgets and the model's context."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.config import SamplingConfig
from domino_jax.decoding import cache_growth
from domino_jax.decoding.cache_growth import first_cache_len
from domino_jax.decoding.prefill import split_into_chunks
from domino_jax.decoding.state import SOURCE_PROMPT, DecodeSettings, DecodeState
from domino_jax.models.draft_backbone import init_draft_cache
from domino_jax.models.qwen3 import init_target_cache
from domino_jax.ops.kv_cache import KVCache
from domino_jax.ops.sampling import SamplingParams
from domino_jax.shapes import Array, Float
from domino_jax.sharding import Layout

_CACHE_STEP = 128


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def init_last_hidden(settings: DecodeSettings, batch: int, layout: Layout | None = None) -> Float[Array, "B D"]:
    """Return the last prompt states before any chunk was run, as `prefill_chunk` takes them."""
    shape = jax.ShapeDtypeStruct((batch, settings.target.hidden_size), jnp.dtype(settings.dtype))
    return layout.zeros({"last_hidden": shape})["last_hidden"] if layout else jnp.zeros(shape.shape, shape.dtype)


def _init_caches(
    loop: DecodeSettings, batch: int, num_positions: int, layout: Layout | None
) -> dict[str, KVCache | None]:
    def make() -> dict[str, KVCache | None]:
        dtype = jnp.dtype(loop.dtype)
        return {
            "target_cache": init_target_cache(loop.target, batch, num_positions, dtype),
            "draft_cache": init_draft_cache(loop.draft, batch, num_positions, dtype) if loop.draft else None,
        }

    return layout.zeros(jax.eval_shape(make)) if layout else make()


def init_state(
    loop: DecodeSettings,
    prompts: list[Sequence[int]],
    budgets: list[int],
    sampling: list[SamplingConfig],
    stops: list[Sequence[int]],
    layout: Layout | None = None,
    may_grow: bool = False,
) -> DecodeState:
    """Return the state before prefill: committed lengths are the prompts', rows without a budget are done.

    Caches hold all that the budgets allow, or, where they `may_grow`, at first what `first_cache_len` says.
    """
    batch = len(prompts)
    context = loop.target.max_position_embeddings
    prompt_len = np.array([len(p) for p in prompts], np.int32)
    budgets = [min(budget, context) for budget in budgets]
    limit_len = np.minimum(prompt_len + np.array(budgets, np.int32), context)
    longest_prefill = sum(split_into_chunks(int(prompt_len.max())))
    margin = loop.num_draft_tokens + 1
    num_positions = round_up(max(int(limit_len.max()) + margin, longest_prefill), _CACHE_STEP)
    cache_len = num_positions
    if may_grow:
        cache_len = first_cache_len(max(int(prompt_len.max()) + margin + 1, longest_prefill), num_positions)
    if cache_len < num_positions:  # each length is another program more: fewer lengths
        num_positions = round_up(num_positions, cache_growth.SHORTEST)
    tokens = np.zeros((batch, num_positions), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    num_stops = max([len(s) for s in stops] + [1])
    stop_ids = np.full((batch, num_stops), -1, np.int32)
    for row, ids in enumerate(stops):
        stop_ids[row, : len(ids)] = ids
    params = SamplingParams(
        temperature=jnp.asarray([s.temperature for s in sampling], jnp.float32),
        top_k=jnp.asarray([s.top_k for s in sampling], jnp.int32),
        top_p=jnp.asarray([s.top_p for s in sampling], jnp.float32),
        min_p=jnp.asarray([s.min_p for s in sampling], jnp.float32),
        seed=jnp.asarray([s.seed for s in sampling], jnp.uint32),
    )
    state = DecodeState(
        tokens=jnp.asarray(tokens),
        sources=jnp.full((batch, num_positions), SOURCE_PROMPT, jnp.int8),
        committed_len=jnp.asarray(prompt_len),
        limit_len=jnp.asarray(limit_len),
        stop_ids=jnp.asarray(stop_ids),
        has_stopped=jnp.zeros(batch, bool),
        is_done=jnp.asarray(limit_len <= prompt_len),
        acceptance_lengths=jnp.zeros((batch, round_up(max(budgets), _CACHE_STEP)), jnp.int32),
        num_rounds=jnp.zeros(batch, jnp.int32),
        sampling=params,
        **_init_caches(loop, batch, cache_len, layout),
    )
    return layout.place(state) if layout else state
