"""A target's weights are held once, whichever form is asked for."""

import gc

import jax
import numpy as np
import pytest

from domino_jax.config import TargetConfig
from domino_jax.models.qwen3 import init_target_params
from domino_jax.models.stacked_target import stack_params
from domino_jax.runs.target_model import HeldWeights

TARGET = TargetConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture
def params():
    return jax.jit(init_target_params, static_argnums=0)(TARGET, jax.random.key(0))


def count_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_each_form_is_what_was_given(params):
    held = HeldWeights(params)
    wanted = stack_params(params)
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, held.stacked(), wanted)
        jax.tree.map(np.testing.assert_array_equal, held.by_layer(), params)
    assert held.vocabulary().keys() == {"embed_tokens", "lm_head"}


def test_one_form_is_held_at_a_time():
    before = count_bytes()
    held = HeldWeights(jax.jit(init_target_params, static_argnums=0)(TARGET, jax.random.key(0)))
    once = count_bytes() - before
    held.stacked()
    assert count_bytes() - before == once
    held.vocabulary()
    assert held.stacked()["layers"]["q_proj"] is held.stacked()["layers"]["q_proj"]
    held.by_layer()
    assert count_bytes() - before == once


def test_what_was_handed_out_stays_as_it_is(params):
    held = HeldWeights(params)
    by_layer = held.by_layer()
    held.stacked()
    jax.tree.map(np.testing.assert_array_equal, by_layer, params)
    assert jax.tree.structure(params) == jax.tree.structure(by_layer)
