"""Initial weights from which a small target can already copy.

In: freshly drawn target parameters. Out: the same tree, where layer 0 has heads that look one and two tokens back and
layer 1 has heads that look for earlier occurrences of the last two tokens and repeat what followed (an induction
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

EMBEDDING_GAIN = 3.0
"""Spread of the embeddings over the usual one: a copied token's logit is their length times sqrt(width), and at the
usual spread a sure copy would still be an unsure prediction."""
CONSTANT_SHARE = 0.5
"""Length of the direction all embeddings share, over the length of the rest: what a position-only head reads."""
PREVIOUS_SHARPNESS, MATCH_SHARPNESS = 2.5, 2.0
"""q/k-norm weights of layers 0 and 1; scores grow with their square times sqrt(head width)."""
PREVIOUS_GAIN, COPY_GAIN = 2.0, 8.0
"""Size of what the two kinds of head write, over the size of an embedding."""
PAIR_SHARE = 0.5
"""Weight of the token before the current one in the search; what it is read from is PREVIOUS_GAIN times as long."""
FAST_PAIRS = 4
"""RoPE pairs, fastest first, that tell a distance of 1 from its neighbours."""


def _orthonormal(drawn: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    return jnp.linalg.qr(drawn)[0]


def seed_copying(params: Params, config: TargetConfig, key: Array) -> Params:
    """Return `params` with previous-token heads in layer 0 and copying heads in layer 1.

    Raises:
        ConfigError: the target has fewer than two layers, no two query heads, or heads too narrow or too wide.
    """
    width, head = config.hidden_size, config.head_dim
    if config.num_hidden_layers < 2 or config.num_attention_heads < 2 or not 4 * FAST_PAIRS <= head <= width:
        raise ConfigError(
            f"a copying start needs 2 layers, 2 heads and {4 * FAST_PAIRS} <= head_dim <= hidden_size; got "
            f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, head_dim {head}, width {width}"
        )
    space_key, match_key = jax.random.split(key)
    constant = jnp.ones((width,)) * width**-0.5
    # Where a token's identity is read from, and where layer 0 leaves those of the previous token and the one before.
    spaces = _separate_spaces(space_key, constant, head)
    read, first, second = spaces
    embeddings = params["embed_tokens"]
    embeddings = EMBEDDING_GAIN * (embeddings - (embeddings @ constant)[:, None] * constant)
    length = jnp.sqrt(jnp.mean(jnp.sum(embeddings**2, -1)))
    # Values are of normed states (length sqrt(width)); embeddings are much shorter.
    to_embedding = length * width**-0.5
    return dict(params) | {
        "embed_tokens": embeddings + CONSTANT_SHARE * length * constant,
        "layers_0": _seed_previous(params["layers_0"], config, constant, read, (first, second), to_embedding),
        "layers_1": _seed_match(params["layers_1"], config, spaces, match_key, to_embedding),
    }


def _separate_spaces(key: Array, constant: Float[Array, " D"], head: int) -> tuple[Array, Array, Array]:
    """Return three `[D, H]` bases without the constant direction, orthogonal to each other as far as D goes."""
    width = constant.shape[0]
    drawn = jax.random.normal(key, (width, 3 * head + 1)).at[:, 0].set(constant)
    basis = _orthonormal(drawn[:, :width])[:, 1:]
    columns = jnp.arange(3 * head) % basis.shape[1]
    return tuple(basis[:, columns[i * head : (i + 1) * head]] for i in range(3))


def _groups(config: TargetConfig) -> int:
    return config.num_attention_heads // config.num_key_value_heads


def _seed_previous(
    params: Params, config: TargetConfig, constant: Array, read: Array, writes: tuple[Array, Array], scale: Array
) -> Params:
    layer, head, half = dict(params), config.head_dim, config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half) / half)
    is_fast = jnp.arange(half) < FAST_PAIRS
    key_direction = jnp.concatenate([is_fast, jnp.zeros(half)])
    outputs = jnp.zeros_like(layer["o_proj"])
    for i, write in enumerate(writes):
        columns, kv = slice(i * head, (i + 1) * head), i // _groups(config)
        kv_columns = slice(kv * head, (kv + 1) * head)
        # Rotated back by the distance, so that query and key agree there.
        turn = -(i + 1) * frequencies
        direction = jnp.concatenate([is_fast * jnp.cos(turn), is_fast * jnp.sin(turn)])
        layer["q_proj"] = layer["q_proj"].at[:, columns].set(jnp.outer(constant, direction))
        layer["k_proj"] = layer["k_proj"].at[:, kv_columns].set(jnp.outer(constant, key_direction))
        layer["v_proj"] = layer["v_proj"].at[:, kv_columns].set(read)
        outputs = outputs.at[columns].set(PREVIOUS_GAIN * scale * write.T)
    layer["o_proj"] = outputs
    layer["q_norm"], layer["k_norm"] = (jnp.full((head,), PREVIOUS_SHARPNESS, jnp.float32) for _ in range(2))
    return layer


def _seed_match(
    params: Params, config: TargetConfig, spaces: tuple[Array, Array, Array], key: Array, scale: Array
) -> Params:
    layer, head, half = dict(params), config.head_dim, config.head_dim // 2
    read, first, second = spaces
    # Slow RoPE pairs hardly turn within a chat: what they compare is content, not distance.
    slow = jnp.concatenate([jnp.arange(half) >= half // 2] * 2)
    mix_key, pair_key, value_key = jax.random.split(key, 3)
    mix, pair_mix = (_orthonormal(jax.random.normal(k, (head, head))) * slow for k in (mix_key, pair_key))
    query, match = read @ mix + PAIR_SHARE * first @ pair_mix, first @ mix + second @ pair_mix
    values = _orthonormal(jax.random.normal(value_key, (config.hidden_size, config.hidden_size)))
    outputs = jnp.zeros_like(layer["o_proj"])
    for kv in range(min(config.num_key_value_heads, config.hidden_size // head)):
        columns, start = slice(kv * head, (kv + 1) * head), kv * _groups(config) * head
        rows = slice(start, start + head)
        layer["q_proj"] = layer["q_proj"].at[:, rows].set(query)
        layer["k_proj"] = layer["k_proj"].at[:, columns].set(match)
        layer["v_proj"] = layer["v_proj"].at[:, columns].set(values[:, columns])
        outputs = outputs.at[rows].set(COPY_GAIN * scale * values[:, columns].T)
    layer["o_proj"] = outputs
    layer["q_norm"], layer["k_norm"] = (jnp.full((head,), MATCH_SHARPNESS, jnp.float32) for _ in range(2))
    return layer
