"""A drafter that starts from its target sees what the target's own layer sees, and learns from there."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import ConfigError, DraftConfig, TargetConfig
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.draft_backbone import DraftBackbone, init_draft_cache
from domino_jax.models.layers import make_layer
from domino_jax.models.qwen3 import Qwen3, init_target_params
from domino_jax.training.draft_init import start_from_target

SIZES = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
TARGET = TargetConfig(40, 32, num_hidden_layers=4, **SIZES)
DRAFT = DraftConfig(
    40,
    32,
    num_hidden_layers=2,
    num_target_layers=4,
    target_layer_ids=(1, 3),
    block_size=4,
    mask_token_id=3,
    gru_hidden_dim=8,
    emb_dim=4,
    **SIZES,
)


@pytest.fixture(scope="module")
def pair():
    target_params = jax.jit(init_target_params, static_argnums=0)(TARGET, jax.random.key(0))
    return target_params, jax.jit(init_draft_params, static_argnums=0)(DRAFT, jax.random.key(1))


def test_the_first_layer_has_the_targets_keys_and_values(pair):
    target_params, fresh = pair
    params = start_from_target(fresh, DRAFT, TARGET, target_params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    tokens = jnp.arange(6)[None] + 5
    features = Qwen3(TARGET, DRAFT.target_layer_ids).apply({"params": target_params}, tokens).features
    backbone, variables = DraftBackbone(DRAFT), {"params": params["backbone"]}
    context = backbone.apply(variables, features, method=DraftBackbone.project_context)
    cache = init_draft_cache(DRAFT, 1, 6, jnp.dtype("float32"))
    cache = backbone.apply(variables, context, jnp.zeros(1, jnp.int32), cache, method=DraftBackbone.write_context)
    layer, layer_variables = make_layer(TARGET, jnp.dtype("float32")), {"params": target_params["layers_2"]}
    normed = layer.apply(layer_variables, features[..., :32], method="normed_input")
    keys, values = layer.apply(layer_variables, normed, jnp.arange(6)[None], method="keys_values")
    np.testing.assert_allclose(cache.keys[0], keys.transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(cache.values[0], values.transpose(0, 2, 1, 3), atol=1e-5)


def test_head_and_fresh_parameters_are_left_alone(pair):
    target_params, fresh = pair
    before = jax.tree.map(np.asarray, fresh)
    params = start_from_target(fresh, DRAFT, TARGET, target_params)
    jax.tree.map(np.testing.assert_array_equal, params["head"], before["head"])
    jax.tree.map(np.testing.assert_array_equal, fresh, before)


def test_what_does_not_match_is_named(pair):
    target_params, fresh = pair
    with pytest.raises(ConfigError, match="intermediate_size is 64, the target's is 48"):
        start_from_target(fresh, replace(DRAFT, intermediate_size=64), TARGET, target_params)
    with pytest.raises(ConfigError, match=r"need a target layer 4, the target has 0 \.\. 3"):
        start_from_target(fresh, replace(DRAFT, target_layer_ids=(2, 3)), TARGET, target_params)
