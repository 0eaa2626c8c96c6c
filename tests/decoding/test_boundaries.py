"""Stop ids, token budget and context limit are exact at every offset inside an accepted block."""

import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from tests.decoding.tiny_pair import (
    BLOCK,
    CONTEXT,
    MASK_ID,
    SHARP,
    VOCAB,
    assert_same_text,
    full_sequences,
    make_decoder,
    make_prompts,
    propose_known,
    with_known,
)

OFFSETS = range(2 * (BLOCK + 1) + 2)
SAMPLING = [SHARP] + [SamplingConfig()] * 7
VARIED = SamplingConfig(temperature=2.0, top_k=47, seed=1)


def run_plain(prompts, *settings):
    return make_decoder().generate(prompts, *settings, block_size=1, batch_size=8)


def run_perfect(references, prompts, *settings):
    results = []
    for i in range(0, len(prompts), 8):
        rows = slice(i, i + 8)
        decoder = with_known(make_decoder(), full_sequences(references[rows]))
        results += decoder.generate(prompts[rows], *[s[rows] for s in settings], batch_size=8, propose=propose_known)
    return results


@pytest.fixture(scope="module")
def reference():
    """One long sampled text, so that few of its tokens repeat."""
    (prompt,) = make_prompts([6], seed=5)
    (text,) = run_plain([prompt], 40, VARIED)
    return prompt, text


def test_budget_at_every_offset(reference):
    prompt, text = reference
    count = len(OFFSETS)
    budgets = [i + 1 for i in OFFSETS]
    sampling = [VARIED] * count
    got = run_perfect([text] * count, [prompt] * count, budgets, sampling)
    for budget, g in zip(budgets, got, strict=True):
        assert g.output_ids == text.output_ids[:budget]
        assert g.finish_reason == "length"
        full, rest = divmod(budget - 1, BLOCK + 1)
        assert g.stats.acceptance_lengths == [BLOCK + 1] * full + [rest] * (rest > 0)
        whole = ["target"] + (["drafted"] * BLOCK + ["bonus"]) * (full + 1)
        assert g.token_sources == whole[:budget]


def test_stop_at_every_offset(reference):
    """The stop token is the last one returned, whether drafted, bonus or the very first token."""
    prompt, text = reference
    count = len(OFFSETS)
    stops = [[text.output_ids[i]] for i in OFFSETS]
    sampling = [VARIED] * count
    got = run_perfect([text] * count, [prompt] * count, [40] * count, sampling, stops)
    ends = {text.output_ids.index(text.output_ids[i]) for i in OFFSETS}
    assert len(ends) > BLOCK + 3
    for i, g in zip(OFFSETS, got, strict=True):
        first = text.output_ids.index(text.output_ids[i])
        assert g.output_ids == text.output_ids[: first + 1]
        assert g.finish_reason == "stop"
        num_rounds = -(-first // (BLOCK + 1))
        assert g.stats.acceptance_lengths == [BLOCK + 1] * num_rounds, "counted to the end of the block, as published"


def test_stop_beyond_the_budget_does_not_count(reference):
    prompt, text = reference
    stop = text.output_ids.index(text.output_ids[9])
    got = run_perfect(
        [text] * 3,
        [prompt] * 3,
        [stop, stop + 1, stop + 2],
        [VARIED] * 3,
        [[text.output_ids[9]]] * 3,
    )
    assert [g.finish_reason for g in got] == ["length", "stop", "stop"]
    assert [len(g.output_ids) for g in got] == [stop, stop + 1, stop + 1]


def test_context_limit_at_every_offset():
    """Prompts that leave 1 .. 2K + 4 free positions fill the context exactly."""
    free = [i + 1 for i in OFFSETS]
    prompts = make_prompts([CONTEXT - n for n in free], seed=2)
    budgets = [n if n % 5 == 0 else 50 for n in free]
    sampling = [SAMPLING[i % 8] for i in OFFSETS]
    plain = run_plain(prompts, budgets, sampling)
    got = run_perfect(plain, prompts, budgets, sampling)
    assert_same_text(got, plain)
    for g, n, budget in zip(got, free, budgets, strict=True):
        assert len(g.output_ids) == n
        assert g.finish_reason == ("length" if budget == n else "context")
        assert sum(g.stats.acceptance_lengths) == n - 1
    assert plain[0].stats.acceptance_lengths == [] == got[0].stats.acceptance_lengths


def test_smallest_cases(reference):
    """A budget of 1, a prompt of one token, a prompt of mask tokens only, and the mask token as a stop id."""
    prompt, text = reference
    prompts = [prompt, [0], [MASK_ID], [MASK_ID] * 20, [VOCAB - 1, MASK_ID], [1], [2], [3]]
    budgets = [1, 1, 9, 9, 9, 30, 30, 30]
    stops = [[text.output_ids[0]], [], [], [], [], [MASK_ID], [MASK_ID], [MASK_ID]]
    sampling = [VARIED] * 8
    plain = run_plain(prompts, budgets, sampling, stops)
    got = with_known(make_decoder(), None).generate(prompts, budgets, sampling, stops, propose=propose_known)
    assert_same_text(got, plain)
    assert (got[0].output_ids, got[0].finish_reason) == (text.output_ids[:1], "stop")
    assert got[0].stats.acceptance_lengths == [] and got[0].token_sources == ["target"]
    assert (len(got[1].output_ids), got[1].finish_reason) == (1, "length")


def test_sources_follow_the_rounds():
    """Every round is its accepted drafts and one token of the target's own."""
    prompts = make_prompts([4, 9, 2, 7, 7, 5, 8, 3], seed=3)
    sampling = [SamplingConfig(temperature=0.7, top_k=4, seed=i) for i in range(8)]
    got = with_known(make_decoder(), None).generate(prompts, 30, sampling, propose=propose_known)
    for g in got:
        expected = ["target"]
        for length in g.stats.acceptance_lengths:
            expected += ["drafted"] * (length - 1) + ["bonus" if length == BLOCK + 1 else "corrected"]
        cut = len(g.output_ids)
        assert g.token_sources[: cut - 1] == expected[: cut - 1]
        assert len(expected) == cut
    assert np.mean([n for g in got for n in g.stats.acceptance_lengths]) > 1
