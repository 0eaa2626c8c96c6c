"""One forward in many forms: cached, dense and training passes of target, backbone and head agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.models.domino_head import DominoHead
from domino_jax.models.draft_backbone import DraftBackbone, init_draft_cache
from domino_jax.models.qwen3 import Qwen3, head_weight, init_target_cache, project_to_vocabulary
from tests.decoding.tiny_pair import VOCAB, make_decoder, make_prompts

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
LENGTH = 12
FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def pair():
    decoder = make_decoder()
    ids = jnp.asarray(make_prompts([LENGTH] * 2, seed=1), jnp.int32)
    target = Qwen3(decoder.settings.target, decoder.settings.draft.target_layer_ids)
    dense = jax.jit(lambda p, x: target.apply({"params": p}, x))(decoder.params.target, ids)
    return decoder, target, ids, dense


@pytest.mark.parametrize("chunks", [(LENGTH,), (5, 1, 6)])
def test_cached_forward_equals_dense(pair, chunks):
    """However the sequence is cut, and whatever garbage lies at later positions, with rows at offsets of their own."""
    decoder, target, ids, dense = pair
    cache = init_target_cache(target.config, 2, LENGTH + 3, FLOAT32)
    cache = jax.tree.map(lambda x: x + 9.0, cache)
    run = jax.jit(
        lambda p, x, at, c: target.apply({"params": p}, x, at, c, method=Qwen3.forward_cached),
    )
    start, hidden, features = 0, [], []
    for length in chunks:
        at = jnp.full(2, start, jnp.int32)
        output = run(decoder.params.target, ids[:, start : start + length], at, cache)
        cache, start = output.cache, start + length
        hidden.append(output.hidden)
        features.append(output.features)
    np.testing.assert_allclose(np.concatenate(hidden, axis=1), dense.hidden, **TOLERANCE)
    np.testing.assert_allclose(np.concatenate(features, axis=1), dense.features, **TOLERANCE)


def test_rows_start_where_they_are(pair):
    decoder, target, ids, dense = pair
    variables = {"params": decoder.params.target}
    run = jax.jit(lambda x, at, c: target.apply(variables, x, at, c, method=Qwen3.forward_cached))
    cache = init_target_cache(target.config, 2, LENGTH, FLOAT32)
    for at in (0, 4):
        cache = run(ids[:, at : at + 4], jnp.full(2, at, jnp.int32), cache).cache
    start = jnp.asarray([3, 7], jnp.int32)
    tail = jnp.stack([ids[0, 3:7], ids[1, 7:11]])
    output = run(tail, start, cache)
    np.testing.assert_allclose(output.hidden[0], dense.hidden[0, 3:7], **TOLERANCE)
    np.testing.assert_allclose(output.hidden[1], dense.hidden[1, 7:11], **TOLERANCE)


def test_features_are_the_residual_streams_asked_for(pair):
    decoder, target, ids, dense = pair
    width = target.config.hidden_size
    assert dense.features.shape == (2, LENGTH, 2 * width)

    @jax.jit
    def run(token_ids):
        variables = {"params": decoder.params.target}
        return [Qwen3(target.config, layers).apply(variables, token_ids).features for layers in ((1, 0), ())]

    swapped, none = run(ids)
    np.testing.assert_allclose(swapped[..., :width], dense.features[..., width:], **TOLERANCE)
    norm = decoder.params.target["norm"]
    last = np.asarray(dense.features[..., width:], np.float64)
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + target.config.rms_norm_eps) * np.asarray(norm)
    np.testing.assert_allclose(dense.hidden, normed, **TOLERANCE)
    assert none.shape == (2, LENGTH, 0)


def test_tied_head(pair):
    decoder, target, _, dense = pair
    params = decoder.params.target
    assert head_weight(params) is params["lm_head"]
    tied = {k: v for k, v in params.items() if k != "lm_head"}
    assert head_weight(tied) is params["embed_tokens"]
    logits = target.apply({"params": params}, dense.hidden, method=Qwen3.logits)
    np.testing.assert_allclose(logits, np.asarray(dense.hidden) @ np.asarray(params["lm_head"]).T, **TOLERANCE)
    assert project_to_vocabulary(dense.hidden.astype(jnp.bfloat16), params["lm_head"]).dtype == FLOAT32


def test_training_blocks_equal_decoding_blocks(pair):
    """All blocks of a sequence in one pass give what the draft pass gives for one block on its cached context."""
    decoder, _, _, dense = pair
    draft = decoder.settings.draft
    backbone, variables = DraftBackbone(draft), {"params": decoder.params.draft["backbone"]}
    call = functools.partial(backbone.apply, variables)
    anchors = jnp.asarray([[1, 5, 11], [0, 7, 3]], jnp.int32)
    blocks = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, draft.hidden_size)), jnp.float32)

    @jax.jit
    def prepare(features):
        context = call(features, method=DraftBackbone.project_context)
        cache = init_draft_cache(draft, 2, LENGTH + 4, FLOAT32)
        cache = call(context, jnp.zeros(2, jnp.int32), cache, method=DraftBackbone.write_context)
        return call(context, blocks, anchors, method=DraftBackbone.train), cache

    trained, cache = prepare(dense.features)
    run = jax.jit(lambda b, a, c: call(b, a, c, method=DraftBackbone.draft))
    for i in range(3):
        np.testing.assert_allclose(run(blocks[:, i], anchors[:, i], cache), trained[:, i], **TOLERANCE)


def test_blocks_are_isolated_and_context_ends_before_the_anchor(pair):
    decoder, _, _, dense = pair
    draft = decoder.settings.draft
    backbone, variables = DraftBackbone(draft), {"params": decoder.params.draft["backbone"]}
    project = jax.jit(lambda f: backbone.apply(variables, f, method=DraftBackbone.project_context))
    context = project(dense.features)
    anchors = jnp.asarray([[4, 8], [4, 8]], jnp.int32)
    blocks = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, draft.hidden_size)), jnp.float32)
    run = jax.jit(lambda c, b: backbone.apply(variables, c, b, anchors, method=DraftBackbone.train))
    usual = np.asarray(run(context, blocks))
    other_block = np.asarray(run(context, blocks.at[:, 1].add(1.0)))
    np.testing.assert_array_equal(other_block[:, 0], usual[:, 0])
    assert np.abs(other_block[:, 1] - usual[:, 1]).min(axis=(1, 2)).max() > 0
    at_anchor = np.asarray(run(context.at[:, 4].add(1.0), blocks))
    np.testing.assert_array_equal(at_anchor[:, 0], usual[:, 0])
    assert np.abs(at_anchor[:, 1] - usual[:, 1]).max() > 1e-4
    before = np.asarray(run(context.at[:, 3].add(1.0), blocks))
    assert np.abs(before[:, 0] - usual[:, 0]).max() > 1e-4
    late_slot = np.asarray(run(context, blocks.at[:, 0, 2].add(1.0)))
    assert np.abs(late_slot[:, 0, 0] - usual[:, 0, 0]).max() > 1e-4, "inside a block attention is bidirectional"


def test_head_against_a_naive_gru(pair):
    decoder, _, _, _ = pair
    config, params = decoder.settings.draft, decoder.params.draft["head"]
    weights = {name: np.asarray(w, np.float64) for name, w in params.items()}
    embeddings = np.random.default_rng(0).normal(size=(2, 4, config.hidden_size)).astype(np.float32)
    hidden = np.random.default_rng(1).normal(size=(2, 4, config.hidden_size)).astype(np.float32)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    state, states = np.zeros((2, config.gru_hidden_dim)), []
    for t in range(4):
        r_in, z_in, n_in = np.split(embeddings[:, t] @ weights["gru_input"], 3, axis=-1)
        r_state, z_state, n_state = np.split(state @ weights["gru_hidden"], 3, axis=-1)
        reset, update = sigmoid(r_in + r_state), sigmoid(z_in + z_state)
        state = (1 - update) * np.tanh(n_in + reset * n_state) + update * state
        states.append(state)
    states = np.stack(states, axis=1)
    inner = np.concatenate([hidden, states], axis=-1) @ weights["down"]
    correction = inner * sigmoid(inner) @ weights["up"]

    head, variables = DominoHead(config), {"params": params}

    @jax.jit
    def run(embeddings, hidden):
        taught = head.apply(variables, embeddings, method=DominoHead.teacher_states)
        return taught, head.apply(variables, hidden, taught, method=DominoHead.correct)

    taught, got = run(embeddings, hidden)
    np.testing.assert_allclose(taught, states, **TOLERANCE)
    step = jax.jit(lambda state, x: head.apply(variables, state, x, method=DominoHead.step))
    stepped = head.apply(variables, (2,), method=DominoHead.init_state)
    for t in range(4):
        stepped = step(stepped, embeddings[:, t])
        np.testing.assert_allclose(stepped, states[:, t], **TOLERANCE)
    np.testing.assert_allclose(got, correction, atol=1e-4, rtol=1e-4)
    assert got.shape == (2, 4, VOCAB)


def test_bfloat16_runs_in_bfloat16_with_float32_logits(pair):
    decoder, target, ids, dense = pair
    model = Qwen3(target.config, target.capture_layers, jnp.dtype("bfloat16"))
    variables = {"params": decoder.params.target}

    @jax.jit
    def run(token_ids):
        output = model.apply(variables, token_ids)
        return output, model.apply(variables, output.hidden, method=Qwen3.logits)

    output, logits = run(ids)
    assert output.hidden.dtype == output.features.dtype == jnp.dtype("bfloat16")
    assert logits.dtype == FLOAT32
    error = np.abs(np.asarray(output.hidden, np.float32) - np.asarray(dense.hidden))
    assert np.median(error) < 0.05
