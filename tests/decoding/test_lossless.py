"""The text is the target's own whatever drafts: a random, a perfect, an always-wrong drafter; alone, in a batch."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from domino_jax.decoding import generate
from domino_jax.decoding.speculative import propose_block
from tests.decoding.tiny_pair import (
    BLOCK,
    MASK_ID,
    SHARP,
    assert_same_text,
    full_sequences,
    make_decoder,
    make_prompts,
    propose_known,
    with_known,
)

slow = pytest.mark.slow
LENGTHS = (1, 9, 15, 16, 17, 30, 5, 64)
BUDGETS = [24, 13, 1, 40, 2, 33, 17, 24]
PROMPTS = make_prompts(LENGTHS)
PROMPTS[4][3:6] = [MASK_ID] * 3
RULES = {
    "greedy": [SamplingConfig()] * 8,
    "sampled": [
        replace(SHARP, seed=3),
        SamplingConfig(temperature=1.0, seed=4),
        replace(SHARP, seed=5),
        SamplingConfig(temperature=0.6, top_k=5, seed=6),
        SamplingConfig(temperature=1.3, top_p=0.7, seed=2**32 - 1),
        SamplingConfig(),
        SamplingConfig(temperature=0.8, min_p=0.2, seed=8),
        SamplingConfig(temperature=1.0, seed=4),
    ],
}
SETTINGS = [
    ("greedy", BLOCK),
    ("sampled", BLOCK),
    pytest.param("greedy", 2, marks=slow),
    pytest.param("sampled", 2, marks=slow),
    pytest.param("greedy", 4, marks=slow),
    pytest.param("sampled", 4, marks=slow),
]


@pytest.fixture(scope="module")
def plain():
    """Plain generations by rule: to the end of the budget, and with one stop id a row that its text holds."""
    results = {}
    for rule, sampling in RULES.items():
        free = make_decoder().generate(PROMPTS, BUDGETS, sampling, block_size=1)
        stops = [g.output_ids[2 * len(g.output_ids) // 3 :][:1] for g in free[:6]] + [[], []]
        stopped = make_decoder().generate(PROMPTS, BUDGETS, sampling, stops, block_size=1)
        assert {"stop", "length"} <= {g.finish_reason for g in stopped}
        results[rule] = (sampling, free, stops, stopped)
    return results


@pytest.mark.parametrize(("rule", "width"), SETTINGS)
def test_text_is_plain_decodings(plain, rule, width):
    """Perfect drafts commit K + 1 tokens a round, wrong ones 1, random ones something between."""
    sampling, free, stops, stopped = plain[rule]
    known = full_sequences(free)
    for decoder, length in (
        (with_known(make_decoder(), known), width + 1),
        (with_known(make_decoder(), known, shift=1), 1),
        (with_known(make_decoder(), None), None),
    ):
        got = decoder.generate(PROMPTS, BUDGETS, sampling, block_size=width, propose=propose_known)
        assert_same_text(got, free)
        for g in got:
            lengths = g.stats.acceptance_lengths
            assert sum(lengths) == len(g.output_ids) - 1
            assert length is None or lengths[:-1] == [length] * len(lengths[:-1])
            assert length is None or set(g.token_sources[1:]) <= ({"drafted", "bonus"} if length > 1 else {"corrected"})
        if length is None:
            assert len({r for g in got for r in g.stats.acceptance_lengths}) > 1, "a drafter never right tests little"
        got = decoder.generate(PROMPTS, BUDGETS, sampling, stops, block_size=width, propose=propose_known)
        assert_same_text(got, stopped)


@pytest.mark.parametrize("rule", ["sampled", pytest.param("greedy", marks=slow)])
def test_alone_equals_batch(plain, rule):
    """Neither text nor acceptance lengths of a prompt depend on its neighbours; plain decoding alone is the same."""
    sampling, free, stops, stopped = plain[rule]
    together = with_known(make_decoder(), None).generate(PROMPTS, BUDGETS, sampling, stops, propose=propose_known)
    for row in (0, 3, 6):
        one = ([PROMPTS[row]], BUDGETS[row], replace(sampling[row]), stops[row])
        alone = with_known(make_decoder(), None, num_rows=1).generate(*one, propose=propose_known)
        assert alone == together[row : row + 1]
        assert_same_text(make_decoder().generate(*one, block_size=1), stopped[row : row + 1])
    for shift in (0, 1):
        decoder = with_known(make_decoder(), full_sequences(free)[3:4], shift, num_rows=1)
        alone = decoder.generate([PROMPTS[3]], BUDGETS[3], sampling[3], propose=propose_known)
        assert_same_text(alone, free[3:4])


@slow
@pytest.mark.parametrize(
    "changes",
    [
        {"shift_label": False, "pure_draft_prefix_len": 0},
        {"gru_hidden_dim": 0, "emb_dim": 0, "pure_draft_prefix_len": 0},
        {"pure_draft_prefix_len": 9},
    ],
    ids=["no_shift", "no_head", "long_prefix"],
)
def test_every_layout_is_lossless(plain, changes):
    sampling, _, stops, stopped = plain["sampled"]
    got = make_decoder(**changes).generate(PROMPTS, BUDGETS, sampling, stops)
    assert_same_text(got, stopped)
    assert got[0].stats.num_draft_tokens == (BLOCK if changes.get("shift_label", True) else BLOCK - 1)


@slow
def test_head_off_is_lossless_and_drafts_otherwise(plain):
    sampling, _, stops, stopped = plain["sampled"]
    decoder = make_decoder()
    assert_same_text(decoder.generate(PROMPTS, BUDGETS, sampling, stops, use_head=False), stopped)
    drafts = []
    for use_head in (True, False):
        loop = replace(decoder.settings, block_size=BLOCK, rule="seed-exact", has_filters=True, use_head=use_head)
        state = generate.init_state(loop, PROMPTS, BUDGETS, sampling, stops)
        propose = jax.jit(lambda s, loop=loop: propose_block(loop, decoder.params, s).tokens)
        drafts.append(np.asarray(propose(state)))
    np.testing.assert_array_equal(drafts[0][:, 0], drafts[1][:, 0])
    assert (drafts[0][:, 1:] != drafts[1][:, 1:]).mean() > 0.2, "slots past the pure prefix are corrected"


@slow
def test_rejection_in_a_mixed_batch(plain):
    """Rows of temperature 0 keep their argmax; text is a function of the seed, not of the place in the batch."""
    _, free, _, _ = plain["greedy"]
    sampling = [replace(SHARP, seed=7)] * 4 + [SamplingConfig()] * 4
    got = make_decoder().generate(PROMPTS, BUDGETS, sampling, rule="rejection")
    assert_same_text(got[4:], free[4:])
    again = make_decoder().generate(PROMPTS[::-1], BUDGETS[::-1], sampling[::-1], rule="rejection")
    assert got == again[::-1]
