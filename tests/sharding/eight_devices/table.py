"""What the table says of every tree, and what it refuses; run by `test_eight_devices.py`."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from domino_jax.config import ConfigError, DraftConfig, TargetConfig
from domino_jax.decoding.prefix_pool import init_pool
from domino_jax.decoding.slots import init_slots
from domino_jax.decoding.state import DecodeSettings, ModelParams
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from domino_jax.run_config import MeshConfig, OptimizerConfig
from domino_jax.runs.target_model import HeldWeights
from domino_jax.sharding import build_layout, check_sizes, find_layout
from domino_jax.training.step import StepInputs, create_train_state, pad_sequences
from tests.sharding.small_pair import make_batch, make_layout, make_pair

QWEN3_8B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TARGET = TargetConfig(num_hidden_layers=36, **QWEN3_8B)
DRAFT = DraftConfig(
    num_hidden_layers=5,
    num_target_layers=36,
    target_layer_ids=(1, 9, 17, 25, 33),
    block_size=16,
    mask_token_id=151669,
    shift_label=True,
    gru_hidden_dim=1024,
    emb_dim=256,
    **QWEN3_8B,
)
KEY = jax.random.key(0)


def shapes(function, *arguments):
    return jax.eval_shape(partial(function, *arguments), KEY)


def bytes_on_a_device(tree):
    """Bytes of the largest part that a device holds of a tree of placed shapes."""
    return sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def test_parameters_of_qwen3_8b_lie_as_megatron_has_them():
    layout = make_layout(1, 8)
    target = layout.shardings(shapes(init_target_params, TARGET))
    draft = layout.shardings(shapes(init_draft_params, DRAFT))
    for layers in (target["layers_35"], draft["backbone"]["layers_4"]):
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            assert layers[name].spec == P(None, "model"), name
        for name in ("o_proj", "down_proj"):
            assert layers[name].spec == P("model", None), name
        assert layers["input_layernorm"].spec == P(None)
    assert target["embed_tokens"].spec == target["lm_head"].spec == P("model", None)
    assert draft["head"]["up"].spec == P(None, "model")
    assert draft["head"]["gru_hidden"].spec == P(None, None)


def test_a_device_holds_its_share():
    target = shapes(init_target_params, TARGET)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(target))
    by_model = bytes_on_a_device(make_layout(1, 8).abstract(target))
    assert 1 / 8 <= by_model / whole < 1 / 8 + 0.001
    both = bytes_on_a_device(make_layout(2, 4, True).abstract(target))
    assert 1 / 8 <= both / whole < 1 / 8 + 0.001
    state = jax.eval_shape(lambda: create_train_state(DRAFT, OptimizerConfig(), jax.random.key(0)))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert bytes_on_a_device(make_layout(8, 1, True).abstract(state)) / whole < 1 / 8 + 0.001


def test_stacked_layers_lie_where_each_of_them_lies():
    layout, (_, target_params, _, _) = make_layout(2, 4, True), make_pair()
    held = HeldWeights(layout.place(target_params))
    for tree in (held.stacked(), held.by_layer()):
        for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(layout.shardings(tree)), strict=True):
            assert leaf.sharding.spec == wanted.spec
    assert held.stacked()["layers"]["q_proj"].sharding.spec == P(None, "data", "model")
    assert held.stacked()["layers"]["down_proj"].sharding.spec == P(None, "model", "data")
    assert held.stacked()["layers"]["q_norm"].sharding.spec == P(None, None)
    jax.tree.map(np.testing.assert_array_equal, held.by_layer(), target_params)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_lie_where_their_parameters_lie(kind):
    layout, draft = make_layout(2, 4, True), make_pair()[2]
    state = jax.eval_shape(lambda: create_train_state(draft, OptimizerConfig(kind=kind), jax.random.key(0)))
    placed = layout.shardings(state)
    specs = [s.spec for s in jax.tree.leaves(placed.opt_state) if len(s.spec) == 2]
    assert specs.count(P("data", "model")) >= 5  # q, k, v, gate, up of the one layer
    assert placed.params["backbone"]["layers_0"]["q_proj"].spec == P("data", "model")


def test_states_of_serving_have_rows_in_the_table():
    target, target_params, draft, draft_params = make_pair()
    layout, settings = make_layout(2, 4), DecodeSettings(target, draft)
    slots = layout.shardings(jax.eval_shape(lambda: init_slots(settings, 4, 128, 8, 2)))
    assert slots.decode.target_cache.keys[0].spec == P("data", "model", None, None)
    assert slots.decode.draft_cache.values[0].spec == P("data", "model", None, None)
    assert slots.adjustment.bias.spec == P("data", "model")
    pool = layout.shardings(jax.eval_shape(lambda: init_pool(settings, 3, 16)))
    assert pool.target.keys[0].spec == P(None, "model", None, None)
    layout.shardings(jax.eval_shape(lambda: ModelParams(target_params, draft_params)))


def test_what_does_not_divide_stays_whole():
    target = replace(make_pair()[0], vocab_size=63)
    placed = make_layout(1, 8).shardings(shapes(init_target_params, target))
    assert placed["embed_tokens"].spec == P(None, None)
    assert make_layout(4, 2).shardings({"tokens": jnp.zeros((3, 5))})["tokens"].spec == P(None, None)


def test_a_path_without_a_row_is_refused():
    with pytest.raises(ValueError, match=r"backbone/layers_0/router, with 2 axes, has no row in the table"):
        make_layout(1, 8).shardings({"backbone": {"layers_0": {"router": jnp.zeros((2, 2))}}})


def test_a_mesh_is_all_the_devices():
    assert dict(build_layout(MeshConfig()).mesh.shape) == {"data": 8, "model": 1}
    assert dict(find_layout(MeshConfig(model=4)).mesh.shape) == {"data": 2, "model": 4}
    with pytest.raises(ConfigError, match=r"mesh.model is 3, which does not divide the 8 devices; choose one of 1, 2,"):
        build_layout(MeshConfig(model=3))
    with pytest.raises(ConfigError, match=r"mesh.data 4 x mesh.model 4 is 16 devices, there are 8; give mesh.data 2"):
        build_layout(MeshConfig(4, 4))
    with pytest.raises(ConfigError, match=r"mesh.model is 0; it must be 1 or more"):
        MeshConfig(model=0)


def test_heads_that_do_not_divide_are_refused():
    target, _, draft, _ = make_pair()
    check_sizes(make_layout(1, 8), target, draft)
    check_sizes(None, target, draft)
    few = replace(draft, num_key_value_heads=2)
    message = (
        r"mesh.model is 8, which does not divide the drafter's num_key_value_heads, 2; these models can be split over "
        r"1, 2 devices"
    )
    with pytest.raises(ConfigError, match=message):
        check_sizes(make_layout(1, 8), target, few)


def test_filled_up_sequences_are_empty_and_keep_numbers():
    ids, loss_mask, lengths = make_batch(0, 6)
    inputs = StepInputs(ids.reshape(2, 3, -1), loss_mask.reshape(2, 3, -1), lengths.reshape(2, 3))
    filled = pad_sequences(inputs, 4)
    assert filled.input_ids.shape == (2, 4, 32)
    assert filled.lengths[:, 3].tolist() == [0, 0]
    assert filled.numbers[:, :3].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert pad_sequences(inputs, 3) is inputs
