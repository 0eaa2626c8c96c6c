"""Chunked prefill equals one dense forward, at every chunk boundary and beside prompts of any other length."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from domino_jax.decoding import generate
from domino_jax.decoding.prefill import CHUNK_LENGTHS, prefill_chunk, split_into_chunks
from domino_jax.models.draft_backbone import DraftBackbone, init_draft_cache
from domino_jax.models.qwen3 import Qwen3
from tests.decoding.tiny_pair import MASK_ID, make_decoder, make_prompts

TOLERANCE = 1e-5
GROUPS = {
    16: (1, 2, 15, 16),
    64: (17, 63, 64, 16),
    256: (65, 255, 256, 1),
    272: (257, 3, 256, 272),
    320: (300, 17, 255, 320),
}


@pytest.mark.parametrize("prompt_len", [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 320, 512, 513, 1000])
def test_chunks_cover_the_prompt_and_no_more_than_needed(prompt_len):
    chunks = split_into_chunks(prompt_len)
    assert set(chunks) <= set(CHUNK_LENGTHS)
    assert sum(chunks) >= prompt_len > sum(chunks[:-1])
    if len(chunks) > 1 or chunks[0] > CHUNK_LENGTHS[0]:
        shorter = [c for c in CHUNK_LENGTHS if c < chunks[-1]]
        assert not shorter or sum(chunks[:-1]) + shorter[-1] < prompt_len


@pytest.fixture(scope="module")
def dense():
    """A long-context pair, and the dense forward that its prefill must equal."""
    decoder = make_decoder(context=512)
    target, draft = decoder.settings.target, decoder.settings.draft
    model, backbone = Qwen3(target, draft.target_layer_ids), DraftBackbone(draft)

    @jax.jit
    def run(token_ids):
        output = model.apply({"params": decoder.params.target}, token_ids)
        variables = {"params": decoder.params.draft["backbone"]}
        context = backbone.apply(variables, output.features, method=DraftBackbone.project_context)
        cache = init_draft_cache(draft, *token_ids.shape, jnp.dtype("float32"))
        start = jnp.zeros(token_ids.shape[0], jnp.int32)
        return output.hidden, backbone.apply(variables, context, start, cache, method=DraftBackbone.write_context)

    return decoder, run


@pytest.mark.parametrize("longest", [16, 64, 272, pytest.param(256, marks=pytest.mark.slow), 320])
def test_prefill_equals_a_dense_forward(dense, longest):
    decoder, run = dense
    prompts = make_prompts(GROUPS[longest], seed=longest)
    prompts[0][len(prompts[0]) // 2 :] = [MASK_ID] * (len(prompts[0]) - len(prompts[0]) // 2)
    settings = replace(decoder.settings, block_size=1)
    budgets = [500 - len(p) for p in prompts]  # one cache size for every group
    state = generate.init_state(settings, prompts, budgets, [SamplingConfig()] * 4, [()] * 4)
    last_hidden, start = jnp.zeros((4, settings.target.hidden_size)), 0
    chunks = split_into_chunks(max(len(p) for p in prompts))
    assert sum(chunks) == longest
    for chunk_len in chunks:
        state, last_hidden = prefill_chunk(settings, decoder.params, state, chunk_len, jnp.int32(start), last_hidden)
        start += chunk_len
    padded = np.zeros((4, 320), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    hidden, draft_cache = run(padded)
    for row, prompt in enumerate(prompts):
        end = len(prompt)
        np.testing.assert_allclose(last_hidden[row], hidden[row, end - 1], atol=TOLERANCE, rtol=TOLERANCE)
        for layer in range(settings.draft.num_hidden_layers):
            np.testing.assert_allclose(
                state.draft_cache.keys[layer][row, ..., :end],
                draft_cache.keys[layer][row, ..., :end],
                atol=TOLERANCE,
                rtol=TOLERANCE,
            )
            np.testing.assert_allclose(
                state.draft_cache.values[layer][row, :, :end],
                draft_cache.values[layer][row, :, :end],
                atol=TOLERANCE,
                rtol=TOLERANCE,
            )
