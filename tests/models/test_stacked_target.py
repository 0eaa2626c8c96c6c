"""The forward over stacked layers is that over layers one by one, and a program of it does not grow with depth."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import TargetConfig
from domino_jax.models.qwen3 import Qwen3, init_target_params
from domino_jax.models.stacked_target import run_stacked, split_layers, stack_params, unstack_layers

TARGET = TargetConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
)  # fmt: skip
FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def params():
    fresh = init_target_params(TARGET, jax.random.key(0))
    return jax.tree.map(lambda p: 8 * p if p.ndim > 1 else p, fresh)


@pytest.fixture(scope="module")
def token_ids():
    return jax.random.randint(jax.random.key(1), (2, 9), 0, TARGET.vocab_size)


@pytest.mark.parametrize("capture_layers", [(0, 2, 3), (2, 0), (1, 1), ()])
def test_features_and_states_are_those_of_layers_one_by_one(params, token_ids, capture_layers):
    wanted = jax.jit(Qwen3(TARGET, capture_layers).apply)({"params": params}, token_ids)
    run = jax.jit(partial(run_stacked, TARGET, capture_layers, True, FLOAT32))
    features, last_hidden = run(stack_params(params), token_ids)
    np.testing.assert_allclose(features, wanted.features, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(last_hidden, wanted.hidden, rtol=1e-6, atol=1e-6)


def test_layers_after_the_last_captured_one_do_not_matter(params, token_ids):
    stacked = stack_params(params)
    run = jax.jit(partial(run_stacked, TARGET, (0, 2), False, FLOAT32))
    broken = stacked | {"layers": jax.tree.map(lambda x: x.at[3].set(np.nan), stacked["layers"])}
    features, last_hidden = run(stacked, token_ids)
    assert last_hidden is None
    np.testing.assert_array_equal(features, run(broken, token_ids)[0])
    third = broken | {"layers": jax.tree.map(lambda x: x.at[2].set(np.nan), stacked["layers"])}
    assert np.isnan(run(third, token_ids)[0]).any()


def test_a_program_does_not_grow_with_depth():
    def lines(num_layers):
        config = replace(TARGET, num_hidden_layers=num_layers)
        shapes = jax.eval_shape(lambda: stack_params(init_target_params(config, jax.random.key(0))))
        run = jax.jit(partial(run_stacked, config, (0, 3), True, FLOAT32))
        return run.lower(shapes, jax.ShapeDtypeStruct((2, 9), jnp.int32)).as_text().count("\n")

    assert lines(40) == lines(4)


def test_stacking_is_undone(params):
    outer, _ = split_layers(params)
    assert sorted(outer) == ["embed_tokens", "lm_head", "norm"]
    stacked = stack_params(params)
    assert stacked["layers"]["q_proj"].shape == (4, 16, 16)
    layers = unstack_layers(dict(stacked["layers"]), list)
    again = outer | layers
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_layers_are_stacked_by_number_not_by_name():
    config = replace(TARGET, num_hidden_layers=11)
    params = {
        f"layers_{i}": {"input_layernorm": jnp.full(2, i)} for i in sorted(range(config.num_hidden_layers), key=str)
    }
    assert stack_params(params)["layers"]["input_layernorm"][:, 0].tolist() == list(range(11))
