"""The target: a dense Qwen3 decoder that returns hidden states and captured context features.

One forward runs whole sequences without a cache (`__call__`; that of a frozen target is in `stacked_target`), one is
for prefill, verification and plain decoding (`forward_cached`). The vocabulary projection is a separate method, so that
a prefill pays for one position.

Source: Hugging Face `Qwen3ForCausalLM`; features as in Domino, arXiv 2605.29707 (residual stream after a layer).
"""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from domino_jax.config import TargetConfig
from domino_jax.models.layers import INIT_STDDEV, DecoderLayer, make_layer, rms_norm, run_traced_once
from domino_jax.ops.cached_attention import attend_cached, write_deferred
from domino_jax.ops.kv_cache import KVCache, init_cache
from domino_jax.ops.products import cast_weight, multiply_turned
from domino_jax.ops.vocabulary import look_up
from domino_jax.shapes import Array, Float, Int, Params
from domino_jax.sharding import constrain, gather_parameter


@flax.struct.dataclass
class TargetOutput:
    """What a target forward returns.

    Attributes:
        hidden: states after the final norm; `Qwen3.logits` maps them to the vocabulary.
        features: residual streams after the captured layers, side by side in the order asked for; width 0 for none.
        cache: the written cache; None for a forward without one.
    """

    hidden: Float[Array, "B T D"]
    features: Float[Array, "B T CD"]
    cache: KVCache | None


def project_to_vocabulary(hidden: Float[Array, "*batch D"], head: Float[Array, "V D"]) -> Float[Array, "*batch V"]:
    """Return float32 logits; shared by the target and by every drafter that borrows its head."""
    weight = gather_parameter(cast_weight(head, hidden.dtype), "lm_head")
    return constrain(multiply_turned(hidden, weight), "logits")


def embed_tokens(
    embedding: Float[Array, "V D"], token_ids: Int[Array, "*batch"], dtype: jnp.dtype
) -> Float[Array, "*batch D"]:
    """Return token embeddings in `dtype`; shared by the target and by every drafter that borrows its embedding."""
    table = gather_parameter(cast_weight(embedding, dtype), "embed_tokens")
    return constrain(look_up(table, token_ids, dtype), "states")


class Qwen3(nn.Module):
    """Dense Qwen3.

    Attributes:
        capture_layers: 0-based layers whose output becomes a context feature.
        dtype: type of the activations; parameters are cast to it where they are used.
    """

    config: TargetConfig
    capture_layers: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        normal = nn.initializers.normal(INIT_STDDEV)
        self.embed_tokens = self.param("embed_tokens", normal, (c.vocab_size, c.hidden_size))
        # 1 / sqrt(2 x layers) keeps the size of the residual stream independent of depth.
        scale = (2 * c.num_hidden_layers) ** -0.5
        self.layers = [make_layer(c, self.dtype, scale) for _ in range(c.num_hidden_layers)]
        self.norm = self.param("norm", nn.initializers.ones, (c.hidden_size,))
        if not c.tie_word_embeddings:
            self.lm_head = self.param("lm_head", normal, (c.vocab_size, c.hidden_size))

    def __call__(self, token_ids: Int[Array, "B T"]) -> TargetOutput:
        """Run whole sequences from position 0; every token sees those up to itself."""
        positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
        x = self.embed(token_ids)
        captured = {}
        for i, layer in enumerate(self.layers):
            x = layer.run_causal(x, positions)
            captured[i] = x
        return self._output(x, captured, None)

    def forward_cached(self, token_ids: Int[Array, "B T"], start: Int[Array, " B"], cache: KVCache) -> TargetOutput:
        """Run T tokens at positions `start ..`, writing their keys and values there; `start + T` must fit the cache.

        A token sees every cache position up to its own, so what lies at later positions never matters.
        """
        positions = start[:, None] + jnp.arange(token_ids.shape[1])
        x = self.embed(token_ids)
        captured = {}
        entries = []
        for i, layer in enumerate(self.layers):
            own, x, entry = run_traced_once(_run_cached, layer, cache.layer(i), x, positions, start)
            cache = cache.with_layer(i, own)
            entries.append(entry)
            captured[i] = x
        cache, x = write_deferred(cache, entries, start, x)
        return self._output(x, captured, cache)

    def embed(self, token_ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """Return token embeddings in the activation type."""
        return embed_tokens(self.embed_tokens, token_ids, self.dtype)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return float32 logits of states after the final norm."""
        return project_to_vocabulary(hidden, self.embed_tokens if self.config.tie_word_embeddings else self.lm_head)

    def _output(self, x: Array, captured: dict[int, Array], cache: KVCache | None) -> TargetOutput:
        features = [captured[i] for i in self.capture_layers]
        stacked = jnp.concatenate(features, axis=-1) if features else jnp.zeros((*x.shape[:-1], 0), x.dtype)
        return TargetOutput(rms_norm(x, self.norm, self.config.rms_norm_eps), constrain(stacked, "states"), cache)


def _run_cached(
    layer: DecoderLayer, own: KVCache, x: Array, positions: Array, start: Array
) -> tuple[KVCache, Array, tuple[Array, Array]]:
    """Return a layer's cache, its output, and the keys and values that `write_deferred` asks for."""
    normed = layer.normed_input(x)
    keys, values = layer.keys_values(normed, positions)
    own, mixed = attend_cached(own, layer.queries(normed, positions), keys, values, start)
    # The cache holds no value that is not finite; the token that has one says so itself, by the head's own
    # queries: devices that share the heads need not ask each other.
    fault = jnp.where(jnp.isfinite(values).all(axis=-1), 0.0, jnp.nan).astype(x.dtype)
    mixed = mixed + jnp.repeat(fault, mixed.shape[2] // values.shape[2], axis=2)[..., None]
    return own, layer.finish(x, mixed), (keys, values)


def head_weight(params: Params) -> Float[Array, "V D"]:
    """Return the output head of target parameters: `lm_head`, or the embedding where the two are tied."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"]


def init_target_params(config: TargetConfig, key: Array) -> Params:
    """Return freshly drawn float32 target parameters."""
    return Qwen3(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_target_cache(config: TargetConfig, batch: int, num_positions: int, dtype: jnp.dtype) -> KVCache:
    """Return an empty cache for `batch` rows."""
    return init_cache(
        config.num_hidden_layers, batch, config.num_key_value_heads, config.head_dim, num_positions, dtype
    )
