"""Log-probabilities of tokens, and the most likely ones beside them, from a model's raw logits."""

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.ops.vocabulary import choose_top
from domino_jax.shapes import Array, Float, Int


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class Scores:
    """Log-probabilities in nats at each position.

    Attributes:
        chosen: of the token that stands there.
        top_ids: the most likely tokens, in descending order.
        top: theirs.
    """

    chosen: Float[Array, "B T"]
    top_ids: Int[Array, "B T top"]
    top: Float[Array, "B T top"]


def no_scores(batch: int, length: int, num_top: int) -> Scores:
    """Return scores that say nothing, all 0."""
    return Scores(
        chosen=jnp.zeros((batch, length), jnp.float32),
        top_ids=jnp.zeros((batch, length, num_top), jnp.int32),
        top=jnp.zeros((batch, length, num_top), jnp.float32),
    )


def score_tokens(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], num_top: int) -> Scores:
    """Return log softmax(logits) of the given and of the `num_top` most likely tokens, in float32."""
    logits = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - normaliser
    top_ids = choose_top(logits, num_top)
    top = jnp.take_along_axis(logits, top_ids, axis=-1)
    return Scores(chosen, top_ids.astype(jnp.int32), top - normaliser[..., None])
