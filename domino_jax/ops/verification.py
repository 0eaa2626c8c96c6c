"""Accept the part of a drafted block that the target stands behind.

Two lossless rules. By equality: the target's own choice at every position is known (greedy, or sampled with noise
keyed by seed and position), a draft token is accepted while it equals that choice. By rejection: accept d with
probability min(1, p(d) / q(d)), and after the first refusal draw from max(p - q, 0).

Source: speculative sampling, arXiv 2211.17192 and 2302.01318.
"""

import jax
import jax.numpy as jnp

from domino_jax.ops.vocabulary import choose
from domino_jax.shapes import Array, Bool, Float, Int


def count_leading(is_accepted: Bool[Array, "B P"]) -> Int[Array, " B"]:
    """Return how many leading entries of each row are True."""
    return jnp.sum(jnp.cumprod(is_accepted.astype(jnp.int32), axis=-1), axis=-1)


def accept_equal(
    draft_tokens: Int[Array, "B P"], target_choices: Int[Array, "B W"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Return the accepted count and the target's own token that follows: accepted = leading k with d_k == choice_k."""
    num_accepted = count_leading(draft_tokens == target_choices[:, : draft_tokens.shape[1]])
    return num_accepted, jnp.take_along_axis(target_choices, num_accepted[:, None], axis=1)[:, 0]


def accept_by_ratio(
    draft_tokens: Int[Array, "B P"],
    draft_probs: Float[Array, "B P V"],
    target_probs: Float[Array, "B W V"],
    accept_uniform: Float[Array, "B P"],
) -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
    """Return the accepted count and the unnormalised law of the token that follows.

    accept_k iff u_k q_k(d_k) < p_k(d_k); law = max(p - q, 0) at the refused position, p after a full block. Where
    rounding leaves no residual mass although a token was refused, the law is p.
    """
    num_drafts = draft_tokens.shape[1]
    chosen = draft_tokens[..., None]
    p_chosen = jnp.take_along_axis(target_probs[:, :num_drafts], chosen, axis=-1)[..., 0]
    q_chosen = jnp.take_along_axis(draft_probs, chosen, axis=-1)[..., 0]
    num_accepted = count_leading(accept_uniform * q_chosen < p_chosen)
    at = num_accepted[:, None, None]
    target_law = jnp.take_along_axis(target_probs, at, axis=1)[:, 0]
    padded = jnp.pad(draft_probs, ((0, 0), (0, 1), (0, 0)))
    residual = jnp.maximum(target_law - jnp.take_along_axis(padded, at, axis=1)[:, 0], 0.0)
    has_mass = jnp.sum(residual, axis=-1, keepdims=True) > 0
    return num_accepted, jnp.where(has_mass, residual, target_law)


def sample_law(law: Float[Array, "B V"], gumbel: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Return a token a row drawn from an unnormalised law; tokens of weight 0 are never drawn."""
    return choose(jnp.where(law > 0, jnp.log(law) + gumbel, -jnp.inf))


def first_stop(
    tokens: Int[Array, "B W"], num_tokens: Int[Array, " B"], stop_ids: Int[Array, "B stops"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Cut each row's new tokens after its first stop token; return the kept counts and whether a row stopped.

    Unused entries of `stop_ids` are -1, which no token equals.
    """
    in_row = jnp.arange(tokens.shape[1]) < num_tokens[:, None]
    is_stop = jnp.any(tokens[..., None] == stop_ids[:, None], axis=-1) & in_row
    has_stopped = jnp.any(is_stop, axis=-1)
    kept = jnp.where(has_stopped, jnp.argmax(is_stop, axis=-1) + 1, num_tokens)
    return kept, has_stopped


def write_rows(
    buffer: Int[Array, "B S"], new: Int[Array, "B W"], start: Int[Array, " B"], count: Int[Array, " B"]
) -> Int[Array, "B S"]:
    """Write the first `count` entries of `new` at each row's `start`; `start + W` must fit the buffer."""

    def one(row: Array, values: Array, at: Array, num: Array) -> Array:
        old = jax.lax.dynamic_slice(row, (at,), values.shape)
        return jax.lax.dynamic_update_slice(row, jnp.where(jnp.arange(values.shape[0]) < num, values, old), (at,))

    return jax.vmap(one)(buffer, new.astype(buffer.dtype), start, count)
