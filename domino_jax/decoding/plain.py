"""The lean autoregressive loop: one token a forward, on the same target code; the baseline of every speed-up.

Its text defines what speculative decoding must reproduce.
"""

from functools import partial

import jax
import jax.numpy as jnp

from domino_jax.decoding.cache_growth import can_go_on
from domino_jax.decoding.state import SOURCE_TARGET, DecodeSettings, DecodeState, ModelParams, commit_tokens
from domino_jax.models.qwen3 import Qwen3
from domino_jax.ops.precision import in_full_precision
from domino_jax.ops.sampling import choose_tokens, gumbel_noise, scale_and_filter
from domino_jax.ops.vocabulary import choose
from domino_jax.shapes import Array, Float, Int
from domino_jax.sharding import constrain_tree


def choose_next(
    logits: Float[Array, "B W V"],
    positions: Int[Array, "B W"],
    state: DecodeState,
    settings: DecodeSettings,
    noise: Float[Array, "B W V"] | None = None,
) -> Int[Array, "B W"]:
    """Return the target's own choice for the tokens at `positions`: the argmax, or a draw with the row's noise.

    `noise` is that of the positions where it was drawn before.
    """
    if settings.rule == "greedy":
        return choose(logits)
    if noise is None:
        noise = gumbel_noise(state.sampling.seed, positions, logits.shape[-1], "choice")
    return choose_tokens(scale_and_filter(logits, state.sampling, settings.has_filters), state.sampling, noise)


def read_anchor(
    settings: DecodeSettings, params: ModelParams, state: DecodeState
) -> tuple[Float[Array, "B 1 V"], Float[Array, "B 1 D"], DecodeState]:
    """Run the target over each row's newest token; return its logits, last states, and `state` with the cache written.

    The draft's context stays as it is.
    """
    target = Qwen3(settings.target, dtype=jnp.dtype(settings.dtype))
    variables = {"params": params.target}
    anchors = jnp.take_along_axis(state.tokens, state.anchor_pos[:, None], axis=1)
    output = target.apply(variables, anchors, state.anchor_pos, state.target_cache, method=Qwen3.forward_cached)
    logits = target.apply(variables, output.hidden, method=Qwen3.logits)
    return logits, output.hidden, state.replace(target_cache=output.cache)


def plain_step(settings: DecodeSettings, params: ModelParams, state: DecodeState) -> DecodeState:
    """Advance every row that is not done by one token."""
    logits, _, state = read_anchor(settings, params, state)
    chosen = choose_next(logits, state.committed_len[:, None], state, settings)
    ones = jnp.ones_like(state.committed_len)
    return constrain_tree(commit_tokens(state, chosen, ones, jnp.full_like(chosen, SOURCE_TARGET))[0])


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@in_full_precision
def decode_plain(settings: DecodeSettings, params: ModelParams, state: DecodeState) -> DecodeState:
    """Run `plain_step` until every row is done, or one needs longer caches for a step; `state` is donated."""
    return jax.lax.while_loop(partial(can_go_on, num_new=1), lambda s: plain_step(settings, params, s), state)
