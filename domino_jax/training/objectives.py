"""What a slot of a block weighs, which slots count, and how far a drafter's distribution is from the target's.

Arrays of logits, losses and masks go in, arrays of the same slots come out; nothing here knows parameters or batches.
Weights and supports are constants to the gradient.

Source: D-PACE, arXiv 2605.18810; accept-until-fail, arXiv 2607.01893; LK losses, arXiv 2602.23881.
"""

import jax
import jax.numpy as jnp

from domino_jax.run_config import Match
from domino_jax.shapes import Array, Float

_MIN_OVERLAP = 1e-9


def dpace_weights(
    losses: Float[Array, "blocks slots"], is_scored: Float[Array, "blocks slots"], alpha: float
) -> Float[Array, "blocks slots"]:
    """Return w_j = sum_{m >= j} prod_{i <= m} ((1 - alpha) q_i + alpha), q_i = exp(-loss_i), over the scored slots.

    It is the gradient of the expected accepted length with respect to log q_j, confidences smoothed by `alpha`. A slot
    that is not scored weighs 0 and is passed over by products and sums.

    Source: D-PACE, arXiv 2605.18810, equations 7 and 8.
    """
    confidence = jnp.exp(-jax.lax.stop_gradient(losses))
    smoothed = jnp.where(is_scored > 0, (1 - alpha) * confidence + alpha, 1.0)
    reached = jnp.cumprod(smoothed, axis=-1) * is_scored
    return jnp.flip(jnp.cumsum(jnp.flip(reached, -1), axis=-1), -1) * is_scored


def accepted_support(
    is_right: Float[Array, "blocks slots"], is_scored: Float[Array, "blocks slots"]
) -> Float[Array, "blocks slots"]:
    """Return 1 for the scored slots up to and including the first wrong one, 0 after it.

    What a drafter says after its first mistake is thrown away when decoding, so nothing is learned from it. A slot
    that is not scored does not end the support.

    Source: accept-until-fail, arXiv 2607.01893.
    """
    goes_on = jnp.cumprod(jnp.where(is_scored > 0, is_right, 1.0), axis=-1)
    is_reached = jnp.concatenate([jnp.ones_like(goes_on[..., :1]), goes_on[..., :-1]], axis=-1)
    return jax.lax.stop_gradient(is_reached * is_scored)


def match_distance(
    match: Match,
    target_logits: Float[Array, "*slots V"],
    draft_logits: Float[Array, "*slots V"],
    lk_eta: float,
) -> Float[Array, "*slots"]:
    """Return the distance of the drafter's distribution q from the target's p at each slot, at temperature 1.

    With the overlap a = sum min(p, q), the acceptance rate of speculative sampling: `kl` is KL(p || q), `tv` is 1 - a,
    `lk-alpha` is -log a, `lk-hybrid` is l KL + (1 - l) (1 - a) with l = exp(-lk_eta a), a constant to the gradient.

    Raises:
        ValueError: `match` is none of these.
    Source: LK losses, arXiv 2602.23881.
    """
    target_log, draft_log = jax.nn.log_softmax(target_logits), jax.nn.log_softmax(draft_logits)
    target = jnp.exp(target_log)
    if match == "kl":
        return jnp.sum(target * (target_log - draft_log), axis=-1)
    overlap = jnp.sum(jnp.minimum(target, jnp.exp(draft_log)), axis=-1)
    if match == "tv":
        return 1 - overlap
    if match == "lk-alpha":
        return -jnp.log(jnp.maximum(overlap, _MIN_OVERLAP))
    if match == "lk-hybrid":
        share = jnp.exp(-lk_eta * jax.lax.stop_gradient(overlap))
        divergence = jnp.sum(target * (target_log - draft_log), axis=-1)
        return share * divergence + (1 - share) * (1 - overlap)
    raise ValueError(f"match is {match!r}; it must be kl, tv, lk-alpha or lk-hybrid")
