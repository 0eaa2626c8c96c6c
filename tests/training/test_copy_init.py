"""The copying start: an untrained target already continues what it has seen, also after a token that came up often."""

import functools

import jax
import jax.numpy as jnp
import pytest

from domino_jax.config import ConfigError, TargetConfig
from domino_jax.models.qwen3 import Qwen3, init_target_params
from domino_jax.training.copy_init import seed_copying

init_params = jax.jit(init_target_params, static_argnums=0)


def _config(num_layers: int = 2) -> TargetConfig:
    return TargetConfig(512, 192, 256, num_layers, 4, 2, 64, rope_theta=1_000_000.0, tie_word_embeddings=True)


@functools.partial(jax.jit, static_argnums=0)
def _repeat_accuracy(config: TargetConfig, params: dict) -> jax.Array:
    first = jax.random.randint(jax.random.key(1), (8, 24), 4, config.vocab_size).at[:, 3::3].set(7)
    tokens = jnp.concatenate([first, first], axis=1)
    model = Qwen3(config)
    hidden = model.apply({"params": params}, tokens).hidden
    predicted = jnp.argmax(model.apply({"params": params}, hidden, method="logits"), -1)
    return jnp.mean(predicted[:, 24:-1] == tokens[:, 25:])


def test_a_repeated_sequence_is_continued_before_any_training():
    config = _config()
    params = init_params(config, jax.random.key(0))
    seeded = seed_copying(params, config, jax.random.key(2))
    assert _repeat_accuracy(config, params) < 0.05
    assert _repeat_accuracy(config, seeded) > 0.9


def test_only_values_change():
    config = _config(num_layers=3)
    params = init_params(config, jax.random.key(0))
    seeded = seed_copying(params, config, jax.random.key(2))
    assert jax.tree.map(jnp.shape, seeded) == jax.tree.map(jnp.shape, params)
    untouched = jax.tree.map(jnp.array_equal, seeded["layers_2"], params["layers_2"])
    assert all(jax.tree.leaves(untouched))


def test_a_target_too_small_is_refused():
    config = _config(num_layers=1)
    with pytest.raises(ConfigError, match="needs 2 layers"):
        seed_copying(init_params(config, jax.random.key(0)), config, jax.random.key(2))
