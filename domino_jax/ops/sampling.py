"""From logits to a token: temperature, top-k, top-p, min-p and noise that is a function of seed and position.

All settings are arrays with one entry a row. Noise is keyed by (seed, position, purpose) and by nothing else, so the
text of a row depends neither on its neighbours nor on how its tokens were grouped into rounds.

Source: the Gumbel-max trick (argmax of logits plus Gumbel noise is a softmax sample); filter order as in
Hugging Face transformers and vLLM (temperature, top-k, top-p, min-p).
"""

from typing import Literal, no_type_check

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.ops.vocabulary import choose
from domino_jax.shapes import Array, Float, Int, UInt32
from domino_jax.sharding import constrain

Purpose = Literal["choice", "draft", "accept", "residual"]
_PURPOSE_IDS: dict[str, int] = {"choice": 0, "draft": 1, "accept": 2, "residual": 3}


@no_type_check  # see `domino_jax.shapes`
@flax.struct.dataclass
class SamplingParams:
    """Per-row sampling settings; see `domino_jax.config.SamplingConfig` for their meaning and ranges."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seed: UInt32[Array, " B"]


def scale_and_filter(
    logits: Float[Array, "B T V"], sampling: SamplingParams, has_filters: bool
) -> Float[Array, "B T V"]:
    """Return log-weights of the law a row samples from: divided by temperature, filtered tokens at -inf.

    Rows of temperature 0 keep their logits. Tokens tied with the last kept one are kept. `has_filters` False
    promises that no row uses top-k, top-p or min-p and saves the sort.
    """
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None, None]
    scaled = logits / temperature
    if not has_filters:
        return scaled
    # Sorting needs all of a row: devices that share the vocabulary gather it, once.
    scaled = constrain(scaled, "states")
    ranked = -jnp.sort(-scaled, axis=-1)
    vocab_size = logits.shape[-1]
    num_kept = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab_size), vocab_size)[:, None, None]
    ranked = jnp.where(jnp.arange(vocab_size) < num_kept, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = sampling.top_p[:, None, None]
    # Rounding lets the cumulative mass reach 1 before the last token: top_p 1 has to keep all by name.
    is_kept = (mass_before < top_p) | (top_p >= 1) | (jnp.arange(vocab_size) == 0)
    is_kept &= probabilities >= sampling.min_p[:, None, None] * probabilities[..., :1]
    lowest = jnp.min(jnp.where(is_kept & jnp.isfinite(ranked), ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= lowest, scaled, -jnp.inf)


def row_probabilities(log_weights: Float[Array, "B T V"], sampling: SamplingParams) -> Float[Array, "B T V"]:
    """Return the law of `scale_and_filter`'s result; all mass on the argmax for rows of temperature 0."""
    greedy = jax.nn.one_hot(choose(log_weights), log_weights.shape[-1], dtype=log_weights.dtype)
    return jnp.where(sampling.temperature[:, None, None] > 0, jax.nn.softmax(log_weights, axis=-1), greedy)


def choose_tokens(
    log_weights: Float[Array, "B T V"], sampling: SamplingParams, gumbel: Float[Array, "B T V"] | None
) -> Int[Array, "B T"]:
    """Return argmax(log_weights + gumbel); rows of temperature 0, and all rows where `gumbel` is None, are greedy."""
    return choose(add_noise(log_weights, sampling, gumbel))


def add_noise(
    log_weights: Float[Array, "B T V"], sampling: SamplingParams, gumbel: Float[Array, "B T V"] | None
) -> Float[Array, "B T V"]:
    """Return the values whose argmax `choose_tokens` takes."""
    if gumbel is None:
        return log_weights
    return jnp.where(sampling.temperature[:, None, None] > 0, log_weights + gumbel, log_weights)


def _noise_keys(seed: UInt32[Array, " B"], positions: Int[Array, "B T"], purpose: Purpose) -> Array:
    def one(row_seed: Array, position: Array) -> Array:
        key = jax.random.key(row_seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, position), _PURPOSE_IDS[purpose])

    return jax.vmap(lambda s, row: jax.vmap(lambda p: one(s, p))(row))(seed, positions)


def gumbel_noise(
    seed: UInt32[Array, " B"], positions: Int[Array, "B T"], vocab_size: int, purpose: Purpose
) -> Float[Array, "B T V"]:
    """Return Gumbel noise for the token at each absolute position."""
    keys = _noise_keys(seed, positions, purpose)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,), jnp.float32)))(keys)
    return constrain(noise, "logits")


def uniform_noise(seed: UInt32[Array, " B"], positions: Int[Array, "B T"], purpose: Purpose) -> Float[Array, "B T"]:
    """Return one number of [0, 1) for each absolute position."""
    keys = _noise_keys(seed, positions, purpose)
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32)))(keys)
