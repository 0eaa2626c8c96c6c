import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

DRAFTS = ["A", "B", "C", "D", "E"]


def load_case(golden_dir, name):
    from domino_jax.checkpoints.huggingface import load_draft

    case = load_file(golden_dir / "train" / f"{name}.safetensors")
    about = json.loads((golden_dir / "train" / f"{name}.json").read_text())
    return load_draft(str(golden_dir / "draft" / name), "float32").config, case, about


def make_blocks(config, case, gamma):
    from domino_jax.training.anchors import build_blocks

    ids = jnp.asarray(case["input_ids"], jnp.int32)
    return build_blocks(
        config,
        ids,
        jnp.asarray(case["loss_mask"]),
        jnp.full(ids.shape[:1], ids.shape[1], jnp.int32),
        jnp.asarray(case["anchor_positions"], jnp.int32),
        jnp.asarray(case["block_keep_mask"]),
        gamma,
    )


@pytest.mark.parametrize("name", DRAFTS)
def test_blocks_equal_golden(golden_dir, name):
    config, case, about = load_case(golden_dir, name)
    blocks = make_blocks(config, case, 7.0)
    kept = case["block_keep_mask"]
    np.testing.assert_array_equal(blocks.token_ids.reshape(2, -1), case["noise_ids"])
    np.testing.assert_array_equal(blocks.labels, case["labels"])
    np.testing.assert_array_equal(blocks.is_scored, case["weight_mask_binary"])
    np.testing.assert_allclose(blocks.weights, case["weight_mask_gamma7"], rtol=1e-6)
    assert not np.asarray(blocks.weights)[~kept].any()
    if "head_token_ids" in case:
        np.testing.assert_array_equal(blocks.teacher_ids, case["head_token_ids"])
    no_decay = make_blocks(config, case, 0.0)
    np.testing.assert_array_equal(no_decay.weights, case["weight_mask_binary"])
    assert about["num_anchors"] == blocks.labels.shape[1]


def test_anchor_sampling_takes_the_same_candidates_as_golden(golden_dir):
    from domino_jax.training.anchors import choose_anchors

    _, case, _ = load_case(golden_dir, "A")
    anchors, keep = choose_anchors(jax.random.key(0), jnp.asarray(case["loss_mask"][1]), 6)
    np.testing.assert_array_equal(anchors, case["anchor_positions"][1])
    np.testing.assert_array_equal(keep, case["block_keep_mask"][1])


def test_anchors_are_sorted_distinct_and_never_in_prompt_or_padding():
    from domino_jax.training.anchors import choose_anchors

    loss_mask = np.zeros(40, np.float32)
    loss_mask[10:20] = loss_mask[23:30] = 1
    allowed = {*range(10, 19), *range(23, 29)}
    choose = jax.jit(choose_anchors, static_argnums=2)
    for seed in range(20):
        anchors, keep = choose(jax.random.key(seed), jnp.asarray(loss_mask), 8)
        assert keep.all()
        assert set(anchors.tolist()) <= allowed
        assert (np.diff(anchors) > 0).all()


def test_anchors_are_drawn_uniformly():
    from domino_jax.training.anchors import choose_anchors

    loss_mask = jnp.zeros(16).at[4:13].set(1.0)
    keys = jax.random.split(jax.random.key(3), 4000)
    anchors, _ = jax.vmap(choose_anchors, (0, None, None))(keys, loss_mask, 3)
    counts = np.bincount(np.asarray(anchors).ravel(), minlength=16)
    assert counts[4:12].sum() == 3 * 4000
    expected = 3 * 4000 / 8
    assert np.sum((counts[4:12] - expected) ** 2 / expected) < 25  # 7 degrees of freedom, p about 0.001


@pytest.mark.parametrize("num_anchors", [1, 5, 64])
def test_too_few_candidates_drop_blocks(num_anchors):
    from domino_jax.training.anchors import choose_anchors

    loss_mask = jnp.zeros(20).at[7:10].set(1.0)
    anchors, keep = choose_anchors(jax.random.key(1), loss_mask, num_anchors)
    assert anchors.shape == keep.shape == (num_anchors,)
    assert int(keep.sum()) == min(num_anchors, 2)
    assert not np.asarray(anchors)[~np.asarray(keep)].any()
    nothing, none_kept = choose_anchors(jax.random.key(1), jnp.zeros(20), num_anchors)
    assert not nothing.any()
    assert not none_kept.any()


def test_labels_past_the_length_weigh_nothing(golden_dir):
    from domino_jax.training.anchors import build_blocks

    config, case, _ = load_case(golden_dir, "C")
    ids = jnp.asarray(case["input_ids"], jnp.int32)
    blocks = build_blocks(
        config, ids, jnp.ones(ids.shape), jnp.array([20, 48]), jnp.full((2, 1), 17), jnp.ones((2, 1), bool), 0.0
    )
    np.testing.assert_array_equal(blocks.weights[:, 0], [[1, 1, 0, 0], [1, 1, 1, 1]])
