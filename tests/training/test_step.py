import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

VOCAB, LENGTH = 48, 32


class Pair(NamedTuple):
    target: object
    draft: object
    by_layer: dict
    params: dict

    def __hash__(self):
        return hash((self.target, self.draft))


@pytest.fixture(scope="module")
def pair():
    """A tiny random target with its sizes, and the sizes of a drafter for it."""
    from domino_jax.config import DraftConfig, TargetConfig
    from domino_jax.models.qwen3 import init_target_params
    from domino_jax.models.stacked_target import stack_params

    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
    target = TargetConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, **sizes)
    draft = DraftConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=1,
        num_target_layers=2,
        target_layer_ids=(0, 1),
        block_size=4,
        mask_token_id=VOCAB - 1,
        shift_label=True,
        pure_draft_prefix_len=1,
        gru_hidden_dim=24,
        emb_dim=16,
        **sizes,
    )
    fresh = jax.jit(init_target_params, static_argnums=0)(target, jax.random.key(5))
    params = jax.tree.map(lambda p: 8 * p if p.ndim > 1 else p, fresh)
    return Pair(target, draft, params, stack_params(params))


def make_batch(seed, sequences=4):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(LENGTH // 2, LENGTH + 1, sequences).astype(np.int32)
    positions = np.arange(LENGTH)
    is_token = positions < lengths[:, None]
    ids = np.where(is_token, generator.integers(0, VOCAB - 1, (sequences, LENGTH)), 0).astype(np.int32)
    return ids, (is_token & (positions >= 6)).astype(np.float32), lengths


def split_batch(batch, micro_steps):
    from domino_jax.training.step import StepInputs

    return StepInputs(*(x.reshape(micro_steps, -1, *x.shape[1:]) for x in batch))


@functools.cache
def default_step(pair):
    return make_step(pair)


def make_step(pair, num_steps=20, dtype="float32", **objective):
    from domino_jax.run_config import ObjectiveConfig, OptimizerConfig
    from domino_jax.training.step import create_train_state, make_train_step

    target, draft = pair.target, pair.draft
    settings = ObjectiveConfig(**({"num_anchors": 6, "head_chunk": 5, "loss_decay_gamma": 4.0} | objective))
    # A large epsilon-free Adam step turns rounding of tiny gradients into visible updates; a moderate rate does not.
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_ratio=0.0, weight_decay=0.01)
    step = make_train_step(target, draft, settings, optimizer, num_steps, compute_dtype=dtype, target_dtype=dtype)
    state = create_train_state(draft, optimizer, jax.random.key(0))
    return step, lambda: jax.tree.map(jnp.copy, state)


def assert_trees_equal(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_micro_steps_do_not_change_the_result(pair):
    step, create = default_step(pair)
    results = {}
    for micro_steps in (1, 4):
        state = create()
        for seed in range(3):
            state, metrics = step(state, pair.params, split_batch(make_batch(seed), micro_steps))
        results[micro_steps] = state, metrics
    for a, b in zip(jax.tree.leaves(results[1][0].params), jax.tree.leaves(results[4][0].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for name, value in results[1][1].items():
        np.testing.assert_allclose(value, results[4][1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_micro_steps_do_not_change_parts_with_their_own_denominators(pair):
    step, create = make_step(pair, base_support="accepted", match="lk-hybrid", base_weight_start=0.5)
    results = [step(create(), pair.params, split_batch(make_batch(0), m))[1] for m in (1, 4)]
    for name, value in results[0].items():
        np.testing.assert_allclose(value, results[1][name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert float(results[0]["match_loss"]) > 0


@pytest.mark.parametrize("match", ["none", "kl"])
def test_features_computed_before_give_the_same_step(pair, match):
    from domino_jax.models.qwen3 import Qwen3

    step, create = default_step(pair) if match == "none" else make_step(pair, match=match)
    inputs = split_batch(make_batch(0), 4)
    output = Qwen3(pair.target, pair.draft.target_layer_ids).apply(
        {"params": pair.by_layer}, jnp.asarray(inputs.input_ids.reshape(-1, LENGTH))
    )
    shape = (*inputs.input_ids.shape, -1)
    cached = inputs.replace(features=output.features.reshape(shape), last_hidden=output.hidden.reshape(shape))
    frozen = {name: pair.params[name] for name in ("embed_tokens", "lm_head") if name in pair.params}
    online, offline = step(create(), pair.params, inputs), step(create(), frozen, cached)
    for name in ("loss", "corrected_loss", "base_loss", "grad_norm"):
        np.testing.assert_allclose(offline[1][name], online[1][name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_skipped_and_counted(pair, bad):
    step, create = default_step(pair)
    inputs = split_batch(make_batch(0), 4)
    norms = pair.params["layers"]["input_layernorm"]
    broken = pair.params | {"layers": pair.params["layers"] | {"input_layernorm": norms.at[1].multiply(bad)}}
    state, _ = step(create(), pair.params, inputs)
    before = jax.tree.map(lambda x: np.array(x, copy=True), (state.params, state.opt_state))
    in_row = []
    for params in (broken, broken, pair.params, broken):
        state, metrics = step(state, params, inputs)
        in_row.append(int(metrics["skipped_in_row"]))
        if len(in_row) == 2:
            assert_trees_equal((state.params, state.opt_state), before)
    assert in_row == [1, 2, 0, 1]
    assert int(state.num_skipped) == int(metrics["num_skipped"]) == 3
    assert int(state.step) == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw(pair):
    from domino_jax.run_config import OptimizerConfig
    from domino_jax.training.step import build_optimizer, create_train_state

    config = OptimizerConfig(kind="muon", clip_norm=0.0, weight_decay=0.1)
    params = create_train_state(pair.draft, config, jax.random.key(0)).params
    generator = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.float32(generator.normal(size=p.shape)), params)
    transform = build_optimizer(config)
    updates, _ = transform.update(grads, transform.init(params), params)
    matrix = updates["backbone"]["fc"] - 0.1 * params["backbone"]["fc"]
    spread = np.linalg.svd(matrix / (0.2 * np.sqrt(max(matrix.shape))), compute_uv=False)
    assert spread.min() > 0.6  # five Newton-Schulz steps bring singular values near 1
    assert spread.max() < 1.4
    # The first step of AdamW with Nesterov momentum is the sign of the gradient times this, without decay.
    first = 0.9 * 0.1 / (1 - 0.9**2) + 1
    for part, name in (("head", "up"), ("backbone", "norm")):
        np.testing.assert_allclose(updates[part][name], first * np.sign(grads[part][name]), atol=1e-4)


def test_same_state_and_batch_give_identical_bits(pair):
    step, create = default_step(pair)
    runs = []
    for _ in range(2):
        state = create()
        for seed in range(2):
            state, metrics = step(state, pair.params, split_batch(make_batch(seed), 4))
        runs.append((state, metrics))
    assert_trees_equal(*runs)
    assert int(runs[0][0].step) == 2


def test_a_copied_state_goes_on_as_the_first_would(pair):
    step, create = default_step(pair)
    batches = [split_batch(make_batch(seed), 4) for seed in range(4)]
    state, saved = create(), None
    for number, batch in enumerate(batches):
        if number == 2:
            saved = jax.tree.map(np.asarray, jax.device_get(state))
            saved = jax.tree.map(np.copy, saved)
        state, _ = step(state, pair.params, batch)
    resumed = jax.tree.map(jnp.asarray, saved)
    for batch in batches[2:]:
        resumed, _ = step(resumed, pair.params, batch)
    assert_trees_equal(state, resumed)


def test_a_batch_without_anchors_updates_nothing(pair):
    step, create = default_step(pair)
    state, _ = step(create(), pair.params, split_batch(make_batch(0), 4))
    before = jax.tree.map(lambda x: np.array(x, copy=True), (state.params, state.opt_state))
    inputs = split_batch(make_batch(1), 4)
    state, metrics = step(state, pair.params, inputs.replace(loss_mask=np.zeros_like(inputs.loss_mask)))
    assert_trees_equal((state.params, state.opt_state), before)
    assert int(state.step) == 2
    assert float(metrics["loss_weight"]) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


def test_what_lies_in_padding_changes_nothing(pair):
    step, create = default_step(pair)
    ids, loss_mask, lengths = make_batch(0)
    lengths[3] = 0
    is_padding = np.arange(LENGTH) >= lengths[:, None]
    results = []
    for filler, filler_mask in ((0, 0.0), (7, 1.0)):
        batch = np.where(is_padding, filler, ids), np.where(is_padding, filler_mask, loss_mask), lengths
        batch = batch[0].astype(np.int32), batch[1].astype(np.float32), lengths
        results.append(step(create(), pair.params, split_batch(batch, 4)))
    assert_trees_equal(*results)
    assert np.isfinite(results[0][1]["loss"])


def test_the_width_rows_are_padded_to_changes_nothing(pair):
    """The same anchors are drawn and the same losses and gradients come out, whatever bucket the rows are in."""
    step, create = default_step(pair)
    ids, loss_mask, lengths = make_batch(0)
    wider = ((0, 0), (0, 21))
    narrow = step(create(), pair.params, split_batch((ids, loss_mask, lengths), 4))[1]
    wide = step(create(), pair.params, split_batch((np.pad(ids, wider), np.pad(loss_mask, wider), lengths), 4))[1]
    for name, value in narrow.items():
        np.testing.assert_allclose(value, wide[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert float(narrow["num_blocks"]) > 0


def test_schedules_count_optimizer_steps(pair):
    step, create = default_step(pair)
    state, base_weights = create(), []
    for seed in range(4):
        state, metrics = step(state, pair.params, split_batch(make_batch(seed), 4))
        base_weights.append(float(metrics["base_weight"]))
    np.testing.assert_allclose(base_weights, [1, 19 / 20, 18 / 20, 17 / 20], atol=1e-7)


def test_bfloat16_keeps_float32_master_weights(pair):
    step, create = make_step(pair, dtype="bfloat16")
    state, metrics = step(create(), pair.params, split_batch(make_batch(0), 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    assert np.isfinite(metrics["loss"])
