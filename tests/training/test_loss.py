import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.golden_draft import METRIC_NAMES, SUM_NAMES
from tests.golden_files import GRADIENT_TOLERANCE, LOSS_TOLERANCE

DRAFTS = ["E"]  # tests/test_golden.py compares losses, logits and gradients of all


@functools.cache
def load_case(golden_dir, name):
    from domino_jax.checkpoints.huggingface import load_draft, load_target
    from domino_jax.models.qwen3 import head_weight

    draft = load_draft(str(golden_dir / "draft" / name), "float32")
    _, target = load_target(str(golden_dir / ("target_tied" if name == "C" else "target")), "float32")
    case = load_file(golden_dir / "train" / f"{name}.safetensors")
    about = json.loads((golden_dir / "train" / f"{name}.json").read_text())
    return draft, target["embed_tokens"], head_weight(target), case, about


@functools.cache
def compile_losses(golden_dir, name, gamma, head_chunk=5, attention_chunk=16, with_gradients=True):
    """Compile `(params, base_weight, anchors, keep) -> (sums, metrics), gradients of the mean`, once for all tests."""
    from domino_jax.run_config import ObjectiveConfig
    from domino_jax.training.loss import block_losses, compute_metrics

    objective = ObjectiveConfig(loss_decay_gamma=gamma, head_chunk=head_chunk, attention_chunk=attention_chunk)
    draft, embedding, head, case, _ = load_case(golden_dir, name)

    def mean(params, base_weight, anchors, keep):
        sums = block_losses(
            draft.config,
            objective,
            params,
            embedding,
            head,
            jnp.asarray(case["hidden_states"]),
            jnp.asarray(case["input_ids"], jnp.int32),
            jnp.asarray(case["loss_mask"]),
            None,
            anchors,
            keep,
        )
        metrics = compute_metrics(objective, sums, base_weight)
        return metrics["loss"], (sums, metrics)

    if with_gradients:
        return jax.jit(lambda *arguments: jax.grad(mean, has_aux=True)(*arguments)[::-1])
    return jax.jit(lambda *arguments: (mean(*arguments)[1], None))


def run_case(golden_dir, name, gamma, base_weight, keep=None, **settings):
    draft, _, _, case, _ = load_case(golden_dir, name)
    losses = compile_losses(golden_dir, name, gamma, **settings)
    anchors = jnp.asarray(case["anchor_positions"], jnp.int32)
    keep = jnp.asarray(case["block_keep_mask"] if keep is None else keep)
    return losses(draft.params, jnp.float32(base_weight), anchors, keep)


@pytest.mark.parametrize("name", DRAFTS)
def test_losses_and_metrics_equal_golden(golden_dir, name):
    _, _, _, _, about = load_case(golden_dir, name)
    for label, run in about["runs"].items():
        has_decay = label.startswith("gamma_7")
        (sums, metrics), _ = run_case(
            golden_dir,
            name,
            7.0 if has_decay else 0.0,
            run.get("lambda_base", 0.5),
            with_gradients=has_decay,
        )
        for golden_name, ours in METRIC_NAMES.items():
            if golden_name in run:
                np.testing.assert_allclose(
                    metrics[ours], run[golden_name], rtol=LOSS_TOLERANCE, atol=LOSS_TOLERANCE, err_msg=golden_name
                )
        for golden_name, ours in SUM_NAMES.items():
            if golden_name in run["terms"]:
                np.testing.assert_allclose(
                    getattr(sums, ours), run["terms"][golden_name], rtol=LOSS_TOLERANCE, err_msg=golden_name
                )
        assert float(sums.accept_by_slot.sum() + sums.accept_den) == pytest.approx(float(sums.accept_num))


@pytest.mark.parametrize("name", DRAFTS)
def test_gradients_equal_golden(golden_dir, name):
    from domino_jax.checkpoints.huggingface import draft_table

    draft, _, _, case, _ = load_case(golden_dir, name)
    _, grads = run_case(golden_dir, name, 7.0, 0.5, with_gradients=True)
    reference = {k.removeprefix("grad."): v for k, v in case.items() if k.startswith("grad.")}
    rows = draft_table(draft.config)
    assert {row.public for row in rows} == set(reference)
    for row in rows:
        ours = grads
        for part in row.path:
            ours = ours[part]
        expected = reference[row.public].T if row.is_turned else reference[row.public]
        worst = np.abs(np.asarray(ours) - expected).max()
        assert worst <= GRADIENT_TOLERANCE * np.abs(expected).max(), row.public


@pytest.mark.parametrize("name", DRAFTS)
def test_logits_equal_golden(golden_dir, name):
    from domino_jax.training.loss import draft_logits

    draft, embedding, head, case, _ = load_case(golden_dir, name)
    kept = case["block_keep_mask"]
    corrected, base = draft_logits(
        draft.config,
        draft.params,
        embedding,
        head,
        jnp.asarray(case["draft_hidden"][kept]),
        jnp.asarray(case["head_token_ids"][kept], jnp.int32),
    )
    first = 0 if draft.config.shift_label else 1
    np.testing.assert_allclose(base, case["base_logits"][kept][:, first:], rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(corrected, case["final_logits"][kept][:, first:], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("head_chunk", [1, 64])
def test_chunks_do_not_change_losses_or_gradients(golden_dir, head_chunk):
    expected_result = run_case(golden_dir, "E", 7.0, 0.5, with_gradients=True)
    result = run_case(golden_dir, "E", 7.0, 0.5, with_gradients=True, head_chunk=head_chunk)
    for got, expected in zip(jax.tree.leaves(result), jax.tree.leaves(expected_result), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("attention_chunk", [1, 3])
def test_chunks_of_attention_do_not_change_losses_or_gradients(golden_dir, attention_chunk):
    expected_result = run_case(golden_dir, "E", 7.0, 0.5, with_gradients=True)
    result = run_case(golden_dir, "E", 7.0, 0.5, with_gradients=True, attention_chunk=attention_chunk)
    for got, expected in zip(jax.tree.leaves(result), jax.tree.leaves(expected_result), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()))


def test_dropped_blocks_add_nothing(golden_dir):
    _, _, _, case, _ = load_case(golden_dir, "E")
    everything = run_case(golden_dir, "E", 7.0, 0.5, keep=np.zeros_like(case["block_keep_mask"]), with_gradients=True)
    assert not any(np.any(x) for x in jax.tree.leaves(everything))


def test_blocks_do_not_see_each_other(golden_dir):
    _, _, _, case, _ = load_case(golden_dir, "E")
    (together, _), _ = run_case(golden_dir, "E", 7.0, 0.5, with_gradients=True)
    one_by_one = []
    for a in range(case["anchor_positions"].shape[1]):
        keep = case["block_keep_mask"] & (np.arange(case["anchor_positions"].shape[1]) == a)
        one_by_one.append(run_case(golden_dir, "E", 7.0, 0.5, keep=keep, with_gradients=True)[0][0])
    summed = jax.tree.map(lambda *xs: sum(xs), *one_by_one)
    for got, expected in zip(jax.tree.leaves(summed), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_memory_stays_below_the_dense_logits():
    from domino_jax.config import DraftConfig
    from domino_jax.models.domino_head import init_draft_params
    from domino_jax.run_config import ObjectiveConfig
    from domino_jax.training.loss import block_losses, compute_metrics

    vocab, anchors, length, block = 4096, 128, 128, 8
    config = DraftConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_target_layers=4,
        target_layer_ids=(2,),
        block_size=block,
        mask_token_id=1,
        shift_label=True,
        gru_hidden_dim=16,
        emb_dim=8,
    )

    def temporary_bytes(head_chunk):
        def mean(params, embedding, features, ids, loss_mask, anchor_pos):
            keep = jnp.ones(anchor_pos.shape, bool)
            objective = ObjectiveConfig(head_chunk=head_chunk)
            sums = block_losses(
                config, objective, params, embedding, embedding, features, ids, loss_mask, None, anchor_pos, keep
            )
            return compute_metrics(objective, sums, 0.5)["loss"]

        shapes = (
            jax.eval_shape(lambda: init_draft_params(config, jax.random.key(0))),
            jax.ShapeDtypeStruct((vocab, 16), jnp.float32),
            jax.ShapeDtypeStruct((1, length, 16), jnp.float32),
            jax.ShapeDtypeStruct((1, length), jnp.int32),
            jax.ShapeDtypeStruct((1, length), jnp.float32),
            jax.ShapeDtypeStruct((1, anchors), jnp.int32),
        )
        compiled = jax.jit(jax.grad(mean)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    dense = 4 * anchors * block * vocab
    assert temporary_bytes(anchors) > dense
    assert temporary_bytes(4) < dense / 2
