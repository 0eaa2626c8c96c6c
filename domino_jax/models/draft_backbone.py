"""The block-parallel draft backbone: a few decoder layers that read the target's features as injected context.

In comes `[E[anchor], E[mask], ...]` and the projected context of all positions before the anchor; out come hidden
states of every slot in one pass. The same context vector feeds every layer and is never updated. The backbone owns
neither embedding nor output head; it borrows the target's.

Source: Domino, arXiv 2605.29707; DFlash (z-lab/dflash).
"""

import flax.linen as nn
import jax.numpy as jnp

from domino_jax.config import DraftConfig
from domino_jax.models.layers import INIT_STDDEV, DecoderLayer, make_layer, rms_norm, run_traced_once
from domino_jax.ops.attention import attend_blocks
from domino_jax.ops.kv_cache import KVCache, init_cache, write_layer
from domino_jax.ops.products import cast_weight, multiply
from domino_jax.shapes import Array, Float, Int
from domino_jax.sharding import constrain, gather_parameter


class DraftBackbone(nn.Module):
    """Draft layers with injected context.

    Attributes:
        dtype: type of the activations; parameters are cast to it where they are used.
    """

    config: DraftConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        feature_width = c.hidden_size * len(c.target_layer_ids)
        self.fc = self.param("fc", nn.initializers.normal(INIT_STDDEV), (feature_width, c.hidden_size))
        self.hidden_norm = self.param("hidden_norm", nn.initializers.ones, (c.hidden_size,))
        self.layers = [make_layer(c, self.dtype) for _ in range(c.num_hidden_layers)]
        self.norm = self.param("norm", nn.initializers.ones, (c.hidden_size,))

    def project_context(self, features: Float[Array, "B T CD"]) -> Float[Array, "B T D"]:
        """Return the context vectors c = RMSNorm(fc f) of target features."""
        weight = gather_parameter(cast_weight(self.fc, self.dtype), "backbone/fc")
        features = constrain(features.astype(self.dtype), "features")
        projected = constrain(multiply(features, weight), "states")
        return rms_norm(projected, self.hidden_norm, self.config.rms_norm_eps)

    def write_context(self, context: Float[Array, "B T D"], start: Int[Array, " B"], cache: KVCache) -> KVCache:
        """Write every layer's keys and values of context vectors at positions `start ..`; they must fit the cache."""
        positions = start[:, None] + jnp.arange(context.shape[1])
        for i, layer in enumerate(self.layers):
            cache = cache.with_layer(
                i, run_traced_once(_write_context, layer, cache.layer(i), context, positions, start)
            )
        return cache

    def draft(
        self, block_embeddings: Float[Array, "B P D"], anchor_pos: Int[Array, " B"], cache: KVCache
    ) -> Float[Array, "B P D"]:
        """Return the final-normed states of one block a row; the context is the cache before `anchor_pos`.

        The block's own keys and values are not cached: a block is drafted anew every round.
        """
        positions = anchor_pos[:, None] + jnp.arange(block_embeddings.shape[1])
        x = block_embeddings.astype(self.dtype)
        for i, layer in enumerate(self.layers):
            x = run_traced_once(_draft_layer, layer, cache.layer(i), x, positions, anchor_pos)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def train(
        self,
        context: Float[Array, "B S D"],
        block_embeddings: Float[Array, "B A P D"],
        anchor_pos: Int[Array, "B A"],
        attention_chunk: int | None = None,
    ) -> Float[Array, "B A P D"]:
        """Return the states of all blocks of every sequence in one pass; a block never sees another.

        `attention_chunk` anchors a sequence are attended at a time; None: all of them.
        """
        context_positions = jnp.broadcast_to(jnp.arange(context.shape[1]), context.shape[:2])
        positions = anchor_pos[..., None] + jnp.arange(block_embeddings.shape[2])
        x = block_embeddings.astype(self.dtype)
        for layer in self.layers:
            context_keys, context_values = layer.keys_values(context, context_positions)
            normed = layer.normed_input(x)
            block_keys, block_values = layer.keys_values(normed, positions)
            mixed = attend_blocks(
                layer.queries(normed, positions),
                context_keys.transpose(0, 2, 3, 1),
                context_values.transpose(0, 2, 1, 3),
                block_keys,
                block_values,
                anchor_pos,
                attention_chunk,
            )
            x = layer.finish(x, mixed)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def _touch_all(self, features: Array) -> Array:
        context = self.project_context(features)
        blocks = jnp.zeros((1, 1, 2, self.config.hidden_size), self.dtype)
        return self.train(context, blocks, jnp.zeros((1, 1), jnp.int32))


def _write_context(layer: DecoderLayer, own: KVCache, context: Array, positions: Array, start: Array) -> KVCache:
    keys, values = layer.keys_values(context, positions)
    return write_layer(own, keys, values, start)


def _draft_layer(layer: DecoderLayer, own: KVCache, x: Array, positions: Array, anchor_pos: Array) -> Array:
    normed = layer.normed_input(x)
    block = (layer.queries(normed, positions), *layer.keys_values(normed, positions))
    queries, keys, values = (states[:, None] for states in block)
    mixed = attend_blocks(queries, own.keys[0], own.values[0], keys, values, anchor_pos[:, None])
    return layer.finish(x, mixed[:, 0])


def init_draft_cache(config: DraftConfig, batch: int, num_positions: int, dtype: jnp.dtype) -> KVCache:
    """Return an empty context cache for `batch` rows."""
    return init_cache(
        config.num_hidden_layers, batch, config.num_key_value_heads, config.head_dim, num_positions, dtype
    )


def init_backbone_params(config: DraftConfig, key: Array) -> dict:
    """Return freshly drawn float32 backbone parameters."""
    features = jnp.zeros((1, 1, config.hidden_size * len(config.target_layer_ids)))
    return DraftBackbone(config).init(key, features, method="_touch_all")["params"]
