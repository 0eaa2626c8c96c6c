"""What the door of decoding refuses, how it forms batches, and that it compiles a shape once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import ConfigError, SamplingConfig
from domino_jax.decoding.generate import Decoder, DecodingError, init_state
from domino_jax.decoding.plain import decode_plain
from domino_jax.decoding.prefill import choose_first, prefill_chunk
from domino_jax.decoding.speculative import decode_speculative
from domino_jax.models.qwen3 import Qwen3
from tests.decoding.tiny_pair import (
    BLOCK,
    CONTEXT,
    SHARP,
    VOCAB,
    assert_same_text,
    make_configs,
    make_decoder,
    make_prompts,
    propose_known,
    with_known,
)

PROMPTS = make_prompts([5, 9, 3], seed=4)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty; give at least one token id"),
        ([[1, VOCAB]], {}, f"prompt 0 holds token id {VOCAB}; the vocabulary has ids 0 .. {VOCAB - 1}"),
        ([[-1]], {}, "prompt 0 holds token id -1"),
        ([[1] * CONTEXT], {}, f"prompt 0 has {CONTEXT} tokens; the model's context holds {CONTEXT}"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens of prompt 0 is 0; it must be 1 or more"),
        ([[1], [2]], {"max_new_tokens": [4, -3]}, "max_new_tokens of prompt 1 is -3"),
        ([[1], [2]], {"max_new_tokens": [4]}, "max_new_tokens has 1 entries for 2 prompts"),
        ([[1], [2]], {"sampling": [SHARP] * 3}, "sampling has 3 entries for 2 prompts"),
        ([[1]], {"stop_ids": [[1], [2]]}, "stop_ids has 2 entries for 1 prompts"),
        ([[1]], {"rule": "typical"}, "rule is 'typical'; allowed: 'seed-exact', 'rejection'"),
    ],
)
def test_bad_requests_are_named(prompts, settings, message):
    arguments = {"max_new_tokens": 4} | settings
    with pytest.raises(DecodingError) as caught:
        # The shape hook of the tests refuses an unknown rule too; here the function's own check is meant.
        getattr(Decoder.generate, "__wrapped__", Decoder.generate)(make_decoder(), prompts, **arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("width", [0, BLOCK + 1])
def test_width_beyond_the_trained_one(width):
    with pytest.raises(ConfigError, match=f"block size {width} is outside 1 .. {BLOCK}"):
        make_decoder().generate(PROMPTS, 4, block_size=width)


def test_width_without_a_drafter():
    settings, params = make_decoder().settings, make_decoder().params
    decoder = Decoder(settings.target, params.target)
    with pytest.raises(DecodingError, match="block_size is 4 but there is no drafter; load one or use 1"):
        decoder.generate(PROMPTS, 4, block_size=4)
    assert decoder.generate([], 4) == []


def test_batches_are_padded_and_kept_in_order():
    """Three prompts in one batch of 8 or in steps: the same records."""
    decoder = with_known(make_decoder(), None)
    sampling = [SHARP, SamplingConfig(), SamplingConfig(temperature=1.0, seed=3)]
    prompts = PROMPTS * 3
    eight = decoder.generate(prompts, 12, sampling * 3, [[7]] * 9, batch_size=8, propose=propose_known)
    assert [g.prompt_ids for g in eight] == prompts
    assert eight[:3] == eight[3:6] == eight[6:]
    assert decoder.last_timings.decode_s > 0
    three = decoder.generate(prompts[:3], 12, sampling, (7,), batch_size=8, propose=propose_known)
    assert three == eight[:3]
    plain = make_decoder().generate(prompts[:3], 12, sampling, [7], block_size=1, batch_size=8)
    assert_same_text(three, plain)
    assert all(g.stats.acceptance_lengths == [1] * (len(g.output_ids) - 1) for g in plain)


def test_same_shapes_compile_once():
    decoder = with_known(make_decoder(), None)
    programs = (prefill_chunk, choose_first, decode_plain, decode_speculative)

    def run(seed):
        prompts = make_prompts(np.random.default_rng(seed).integers(1, 17, 8), seed=seed)
        budgets = [10 + seed + i for i in range(8)]
        sampling = [SamplingConfig(temperature=0.5 + i / 4, top_k=seed + 1, seed=seed) for i in range(8)]
        for settings in ({"propose": propose_known}, {"block_size": 1}):
            decoder.generate(prompts, budgets, sampling, [[seed + i] for i in range(8)], **settings)
        return [p._cache_size() for p in programs]

    first = run(0)
    assert [run(seed) for seed in (1, 2, 3)] == [first] * 3


def test_a_budget_beyond_the_context_costs_nothing():
    """The budget is a wish: buffers are sized by the context."""
    decoder = with_known(make_decoder(), None)
    prompts = make_prompts([CONTEXT - 3] * 8, seed=6)
    got = decoder.generate(prompts, 10**12, SHARP, [[VOCAB - 1]] * 8, propose=propose_known)
    assert all(len(g.output_ids) <= 3 for g in got)
    assert {g.finish_reason for g in got} <= {"context", "stop"}


def test_a_drafter_of_another_target_is_refused_by_name():
    decoder = make_decoder()
    _, draft = make_configs(vocab=VOCAB + 1)
    with pytest.raises(DecodingError, match=f"vocab_size is {VOCAB + 1}, the target's vocab_size is {VOCAB}"):
        Decoder(decoder.settings.target, decoder.params.target, draft, decoder.params.draft)


@pytest.fixture
def prefilled():
    """Return settings, parameters and a state that a loop may consume."""
    decoder = make_decoder()
    loop = replace(decoder.settings, block_size=BLOCK)
    sampling = [SamplingConfig()] * len(PROMPTS)
    state = init_state(loop, PROMPTS, [6] * len(PROMPTS), sampling, [()] * len(PROMPTS))
    hidden = jnp.zeros((len(PROMPTS), loop.target.hidden_size), loop.dtype)
    before = state
    state, hidden = prefill_chunk(loop, decoder.params, state, 16, jnp.int32(0), hidden)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.target_cache, before.draft_cache)))
    chosen = choose_first(loop, decoder.params, state, hidden)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.target_cache, state.draft_cache)))
    return loop, decoder.params, chosen


@pytest.mark.parametrize("decode", [decode_plain, decode_speculative])
def test_a_loop_reuses_the_memory_of_the_state_it_is_given(prefilled, decode):
    loop, params, state = prefilled
    decode(loop, params, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.tokens, state.target_cache, state.draft_cache)))


@pytest.mark.parametrize("decode", [decode_plain, decode_speculative])
def test_float32_products_are_never_shortened(prefilled, decode):
    loop, *rest = prefilled
    text = str(jax.make_jaxpr(lambda *arrays: decode(loop, *arrays))(*rest))
    assert text.count("dot_general[") > 10
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


def test_bfloat16_differs_from_plain_decoding_by_near_ties_only():
    full = make_decoder()
    settings, params = full.settings, full.params
    decoder = Decoder(settings.target, params.target, settings.draft, params.draft, dtype="bfloat16")
    prompts = make_prompts([5, 9, 3, 7] * 2, seed=11)
    drafted, plain = decoder.generate(prompts, 24), decoder.generate(prompts, 24, block_size=1)
    target = Qwen3(settings.target, dtype=jnp.dtype("bfloat16"))
    num_same = 0
    for got, wanted in zip(drafted, plain, strict=True):
        pairs = enumerate(zip(got.output_ids, wanted.output_ids, strict=True))
        place = next((i for i, (a, b) in pairs if a != b), None)
        if place is None:
            num_same += 1
            continue
        ids = jnp.asarray([wanted.prompt_ids + wanted.output_ids[:place]])
        hidden = target.apply({"params": params.target}, ids).hidden[0, -1]
        logits = target.apply({"params": params.target}, hidden, method=Qwen3.logits)
        gap = float(abs(logits[got.output_ids[place]] - logits[wanted.output_ids[place]]))
        assert gap < 0.05 * float(jnp.max(logits) - jnp.min(logits)), (place, gap)
    assert num_same >= len(prompts) // 2
    assert all(g.stats.num_draft_tokens == BLOCK for g in drafted)
