"""Initial weights from which a small target can already copy.

In: freshly drawn target parameters. Out: the same tree, where layer 0 has a head that looks at the previous token and
layer 1 has heads that look for earlier occurrences of the current token and repeat what followed (an induction
circuit). On a CPU budget of minutes a small model spends most of its training waiting for this circuit to form;
the other heads of the two layers start silent, everything
else is left as drawn, and all of it is trained on.
Knows nothing about data or optimizers.

Source: the circuit is that of "In-context Learning and Induction Heads", Olsson et al. 2022; starting attention from
a useful structure follows "Mimetic Initialization of Self-Attention Layers", Trockman and Kolter 2023.
"""

import jax
import jax.numpy as jnp

from domino_jax.config import ConfigError, TargetConfig
from domino_jax.shapes import Array, Float, Params

CONSTANT_SHARE = 0.5
"""Length of the direction all embeddings share, over the length of the rest: what a position-only head reads."""
PREVIOUS_SHARPNESS, MATCH_SHARPNESS = 2.5, 1.3
"""q/k-norm weights of layers 0 and 1; scores grow with their square times sqrt(head width)."""
PREVIOUS_GAIN, COPY_GAIN = 2.0, 5.0
"""Size of what the two kinds of head write, over the size of an embedding."""
FAST_PAIRS = 4
"""RoPE pairs, fastest first, that tell a distance of 1 from its neighbours."""


def seed_copying(params: Params, config: TargetConfig, key: Array) -> Params:
    """Return `params` with a previous-token head in layer 0 and copying heads in layer 1.

    Raises:
        ConfigError: the target has fewer than two layers, or heads wider than the residual stream or too narrow.
    """
    width, head = config.hidden_size, config.head_dim
    if config.num_hidden_layers < 2 or not 4 * FAST_PAIRS <= head <= width:
        raise ConfigError(
            f"a copying start needs 2 layers and {4 * FAST_PAIRS} <= head_dim <= hidden_size; got "
            f"{config.num_hidden_layers} layers, head_dim {head}, hidden_size {width}"
        )
    read_key, write_key, match_key = jax.random.split(key, 3)
    constant = jnp.ones((width,)) * width**-0.5
    read, write = _orthonormal(read_key, width, head), _orthonormal(write_key, width, head)
    read, write = (m - jnp.outer(constant, constant @ m) for m in (read, write))
    embeddings = params["embed_tokens"]
    embeddings = embeddings - (embeddings @ constant)[:, None] * constant
    length = jnp.sqrt(jnp.mean(jnp.sum(embeddings**2, -1)))
    seeded = dict(params)
    seeded["embed_tokens"] = embeddings + CONSTANT_SHARE * length * constant
    seeded["layers_0"] = _seed_previous(dict(params["layers_0"]), config, constant, read, write)
    seeded["layers_1"] = _seed_match(dict(params["layers_1"]), config, read, write, match_key)
    # A head's output is a sum of normed states (length sqrt(width)); embeddings are much shorter.
    to_embedding = length * width**-0.5
    outputs = jnp.zeros_like(seeded["layers_0"]["o_proj"])
    seeded["layers_0"]["o_proj"] = outputs.at[:head].set(PREVIOUS_GAIN * to_embedding * write.T)
    return _scale_copies(seeded, config, COPY_GAIN * to_embedding)


def _orthonormal(key: Array, rows: int, columns: int) -> Float[Array, "rows columns"]:
    return jnp.linalg.qr(jax.random.normal(key, (rows, columns)))[0]


def _seed_previous(layer: dict, config: TargetConfig, constant: Array, read: Array, write: Array) -> dict:
    head, half = config.head_dim, config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half) / half)
    is_fast = jnp.arange(half) < FAST_PAIRS
    key_direction = jnp.concatenate([is_fast, jnp.zeros(half)])
    # Rotated back by one position, so that query and key agree at distance 1.
    query_direction = jnp.concatenate([is_fast * jnp.cos(-frequencies), is_fast * jnp.sin(-frequencies)])
    layer["q_proj"] = layer["q_proj"].at[:, :head].set(jnp.outer(constant, query_direction))
    layer["k_proj"] = layer["k_proj"].at[:, :head].set(jnp.outer(constant, key_direction))
    layer["v_proj"] = layer["v_proj"].at[:, :head].set(read)
    layer["q_norm"], layer["k_norm"] = jnp.full((head,), PREVIOUS_SHARPNESS), jnp.full((head,), PREVIOUS_SHARPNESS)
    return layer


def _seed_match(layer: dict, config: TargetConfig, read: Array, write: Array, key: Array) -> dict:
    head, half = config.head_dim, config.head_dim // 2
    groups = config.num_attention_heads // config.num_key_value_heads
    slow = jnp.concatenate([jnp.arange(half) >= half // 2] * 2)
    for i in range(config.num_key_value_heads):
        columns = slice(i * head, (i + 1) * head)
        query_columns = slice(i * groups * head, (i * groups + 1) * head)
        mix = _orthonormal(jax.random.fold_in(key, i), head, head) * slow
        layer["q_proj"] = layer["q_proj"].at[:, query_columns].set(read @ mix)
        layer["k_proj"] = layer["k_proj"].at[:, columns].set(write @ mix)
    values = _orthonormal(jax.random.fold_in(key, 1000), config.hidden_size, config.hidden_size)
    num_values = min(config.hidden_size, config.num_key_value_heads * head)
    layer["v_proj"] = layer["v_proj"].at[:, :num_values].set(values[:, :num_values])
    layer["q_norm"], layer["k_norm"] = jnp.full((head,), MATCH_SHARPNESS), jnp.full((head,), MATCH_SHARPNESS)
    return layer


def _scale_copies(seeded: dict, config: TargetConfig, gain: Float[Array, ""]) -> dict:
    head = config.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    layer = seeded["layers_1"]
    layer["o_proj"] = jnp.zeros_like(layer["o_proj"])
    for i in range(config.num_key_value_heads):
        rows = slice(i * groups * head, (i * groups + 1) * head)
        layer["o_proj"] = layer["o_proj"].at[rows].set(gain * layer["v_proj"][:, i * head : (i + 1) * head].T)
    return seeded
