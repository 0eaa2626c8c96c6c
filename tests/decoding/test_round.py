"""Invariants of a round: roll-back equals a fresh prefill, a block sees nothing at or after its anchor."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import DraftConfig, SamplingConfig, TargetConfig
from domino_jax.decoding import generate
from domino_jax.decoding.plain import decode_plain
from domino_jax.decoding.prefill import choose_first, prefill_chunk, split_into_chunks
from domino_jax.decoding.speculative import backbone_block, decode_speculative, propose_block, run_round, verify_block
from domino_jax.decoding.state import DecodeSettings, ModelParams
from domino_jax.models.domino_head import init_draft_params
from domino_jax.models.qwen3 import init_target_params
from tests.decoding.tiny_pair import BLOCK, make_decoder, make_prompts, propose_known, with_known

TOLERANCE = 1e-5
LENGTHS = (3, 12, 16, 1, 7, 9, 14, 10)


def prefill(decoder, prompts, budgets):
    chunks = replace(decoder.settings, block_size=1, rule="greedy", use_head=True)
    state = generate.init_state(chunks, prompts, budgets, [SamplingConfig()] * len(prompts), [()] * len(prompts))
    last_hidden, start = jnp.zeros((len(prompts), chunks.target.hidden_size)), 0
    for chunk_len in split_into_chunks(max(len(p) for p in prompts)):
        state, last_hidden = prefill_chunk(chunks, decoder.params, state, chunk_len, jnp.int32(start), last_hidden)
        start += chunk_len
    return choose_first(chunks, decoder.params, state, last_hidden)


def assert_caches_agree(one, other, row, num_positions):
    for name in ("target_cache", "draft_cache"):
        first, second = getattr(one, name), getattr(other, name)
        for a, b in zip(first.keys, second.keys, strict=True):
            np.testing.assert_allclose(
                a[row, ..., :num_positions], b[row, ..., :num_positions], atol=TOLERANCE, rtol=TOLERANCE
            )
        for a, b in zip(first.values, second.values, strict=True):
            np.testing.assert_allclose(
                a[row, :, :num_positions], b[row, :, :num_positions], atol=TOLERANCE, rtol=TOLERANCE
            )


@pytest.fixture(scope="module")
def after_rounds():
    """A batch after several rounds with accepted and refused drafts."""
    prompts = make_prompts(LENGTHS, seed=9)
    budgets = [20, 7, 12, 25, 9, 13, 30, 18]
    plain = make_decoder().generate(prompts, budgets, block_size=1)
    # Every third draft token is wrong: rounds accept some and refuse some.
    known = [g.prompt_ids + [(t + (i % 3 == 0)) % 48 for i, t in enumerate(g.output_ids)] for g in plain]
    decoder = with_known(make_decoder(), known)
    settings = replace(decoder.settings, block_size=BLOCK)
    state = decode_speculative(settings, decoder.params, prefill(decoder, prompts, budgets), propose_known)
    return decoder, settings, state


def test_roll_back_equals_fresh_prefill(after_rounds):
    decoder, _, state = after_rounds
    lengths = np.asarray(state.committed_len)
    assert 1 < np.asarray(state.acceptance_lengths).max() < BLOCK + 1
    committed = [np.asarray(state.tokens)[row, : n - 1].tolist() for row, n in enumerate(lengths)]
    fresh = prefill(decoder, committed, [60] * len(committed))
    for row, ids in enumerate(committed):
        assert_caches_agree(state, fresh, row, len(ids))


def test_block_sees_nothing_from_its_anchor_on(after_rounds):
    """Garbage at and after the anchor changes neither draft nor verdict; garbage before it does."""
    decoder, settings, state = after_rounds
    positions = jnp.arange(state.target_cache.num_positions)

    def spoil(state, is_spoiled):
        at_keys, at_values = is_spoiled[:, None, None, :], is_spoiled[:, None, :, None]

        def spoiled(cache):
            return cache.replace(
                keys=tuple(jnp.where(at_keys, 7.0, k) for k in cache.keys),
                values=tuple(jnp.where(at_values, -5.0, v) for v in cache.values),
            )

        return state.replace(draft_cache=spoiled(state.draft_cache), target_cache=spoiled(state.target_cache))

    @jax.jit
    def draft(state):
        proposal = propose_block(settings, decoder.params, state)
        logits, _, _ = verify_block(settings, decoder.params, state, proposal.tokens)
        return backbone_block(settings, decoder.params, state)[1], proposal.tokens, logits

    anchor = state.anchor_pos[:, None]
    usual = draft(state)
    later = draft(spoil(state, positions >= anchor))
    for a, b in zip(usual, later, strict=True):
        np.testing.assert_array_equal(a, b)
    just_before = draft(spoil(state, positions == anchor - 1))
    assert np.abs(np.asarray(usual[0] - just_before[0])).max(axis=(1, 2)).min() > 1e-3
    assert np.abs(np.asarray(usual[2] - just_before[2])).max(axis=(1, 2)).min() > 1e-3


@pytest.mark.slow
def test_finished_rows_are_left_alone(after_rounds):
    decoder, settings, state = after_rounds
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.committed_len)
    assert np.asarray(state.is_done).all()
    again = jax.jit(lambda s: run_round(settings, decoder.params, s))(state)
    np.testing.assert_array_equal(again.committed_len, lengths)
    np.testing.assert_array_equal(again.num_rounds, state.num_rounds)
    np.testing.assert_array_equal(again.acceptance_lengths, state.acceptance_lengths)
    for row, n in enumerate(lengths):
        np.testing.assert_array_equal(again.tokens[row, :n], tokens[row, :n])


PUBLISHED = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("size", [pytest.param("4b", marks=pytest.mark.slow), "8b"])
def test_published_shapes(size):
    """One prefill chunk and one round of Qwen3-4B and 8B with their drafters, without allocating anything."""
    heads = {"vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    target = TargetConfig(num_hidden_layers=36, **heads, **PUBLISHED[size])
    widths = {k: v for k, v in PUBLISHED[size].items() if k != "tie_word_embeddings"}
    draft = DraftConfig(
        num_hidden_layers=5,
        num_target_layers=36,
        target_layer_ids=(1, 9, 17, 25, 33),
        block_size=16,
        mask_token_id=151669,
        shift_label=True,
        pure_draft_prefix_len=1,
        gru_hidden_dim=1024,
        emb_dim=256,
        **heads,
        **widths,
    )
    settings = DecodeSettings(target, draft, block_size=16, rule="rejection", has_filters=True, dtype="bfloat16")
    key = jax.random.key(0)

    def trace():
        params = ModelParams(init_target_params(target, key), init_draft_params(draft, key))
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        before = generate.init_state(settings, [[1, 2, 3], [4]], [100, 7], [SamplingConfig()] * 2, [(5,), ()])
        hidden = jnp.zeros((2, target.hidden_size), jnp.bfloat16)
        filled, hidden = prefill_chunk(settings, params, before, 64, jnp.int32(0), hidden)
        after = run_round(settings, params, filled)
        return [jax.tree.leaves(tree) for tree in (params.target, before, filled, after)]

    target_leaves, before, filled, after = jax.eval_shape(trace)
    num_params = sum(math.prod(leaf.shape) for leaf in target_leaves)
    assert round(num_params / 1e8) == {"4b": 40, "8b": 82}[size]
    for tree in (filled, after):
        assert [(x.shape, x.dtype) for x in tree] == [(x.shape, x.dtype) for x in before]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a CPU's program")
def test_plain_decoding_of_one_row_copies_no_cache():
    decoder = make_decoder()
    settings = replace(decoder.settings, draft=None, block_size=1)
    state = generate.init_state(settings, [[1, 2, 3]], [8], [SamplingConfig()], [()])
    program = decode_plain.lower(settings, ModelParams(decoder.params.target), state).compile().as_text()
    shapes = {str(list(x.shape)).replace(" ", "") for x in jax.tree.leaves(state.target_cache)}
    # Once a call, where the loop begins, is not once a token.
    body = program[: program.index("\nENTRY ")]
    copied = re.findall(r"= f32(\[[\d,]+\])\S* copy\(", body)
    assert not shapes & set(copied)


def test_noise_of_another_width_is_refused():
    decoder = make_decoder()
    settings = replace(decoder.settings, block_size=3, rule="seed-exact")
    state = generate.init_state(settings, [[1, 2, 3]], [8], [SamplingConfig(temperature=1.0)], [()])
    wrong = replace(settings, block_size=2)

    def propose(settings, params, state):
        drafts = propose_block(wrong, params, state)
        return drafts.replace(tokens=jnp.pad(drafts.tokens, ((0, 0), (0, 1))))

    with pytest.raises(ValueError, match=r"the noise of a proposal has shape \(1, 3, 48\), the logits \(1, 4, 48\)"):
        jax.eval_shape(lambda: run_round(settings, decoder.params, state, propose))
