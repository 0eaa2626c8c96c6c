"""The head limited to candidates: the same drafts where they suffice, the same text whatever they are."""

import copy
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from domino_jax.decoding.generate import Decoder, DecodingError, init_state
from domino_jax.decoding.rollout import choose_block
from domino_jax.decoding.state import default_num_candidates
from tests.decoding.tiny_pair import VOCAB, assert_same_text, make_configs, make_decoder, make_prompts

PROMPTS = make_prompts((1, 9, 15, 16, 17, 30, 5, 3))
BUDGET = 24
SAMPLINGS = {
    "greedy": [SamplingConfig()] * 8,
    "mixed": [
        SamplingConfig(temperature=1.0, seed=1),
        SamplingConfig(temperature=0.7, top_k=3, seed=2),
        SamplingConfig(),
        SamplingConfig(temperature=1.2, top_p=0.8, seed=4),
        SamplingConfig(temperature=0.8, min_p=0.1, seed=5),
        SamplingConfig(temperature=2.0, seed=6),
        SamplingConfig(temperature=0.5, seed=7),
        SamplingConfig(temperature=1.0, seed=8),
    ],
}


def generate(num_candidates, sampling, rule="seed-exact", **settings):
    decoder = copy.copy(make_decoder())
    decoder.settings = replace(decoder.settings, num_candidates=num_candidates)
    return decoder.generate(PROMPTS, BUDGET, SAMPLINGS[sampling], rule=rule, **settings)


def acceptance(generations):
    return [g.stats.acceptance_lengths for g in generations]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_text_is_the_targets_with_any_number(sampling):
    plain = generate(0, sampling, block_size=1)
    for num_candidates in (1, 3):
        assert_same_text(generate(num_candidates, sampling), plain)


def choose(settings, params, hidden, logits, anchors):
    state = init_state(settings, [[1], [2]], [4, 4], [SamplingConfig()] * 2, [()] * 2)
    return choose_block(settings, params, state, hidden, logits, anchors).tokens


def draw_inputs(draft):
    keys = jax.random.split(jax.random.key(0))
    hidden = jax.random.normal(keys[0], (2, draft.block_size, draft.hidden_size))
    return hidden, jax.random.normal(keys[1], (2, draft.block_size, draft.vocab_size)), jnp.array([3, 4], jnp.int32)


def test_drafts_of_few_and_of_many_candidates():
    """One candidate is the base logits' own choice; all tokens but one draft as the whole vocabulary does."""
    decoder = make_decoder()
    draft, inputs = decoder.settings.draft, draw_inputs(decoder.settings.draft)
    drafts = {
        num: choose(replace(decoder.settings, block_size=draft.block_size, num_candidates=num), decoder.params, *inputs)
        for num in (0, 1, VOCAB - 1)
    }
    np.testing.assert_array_equal(drafts[1], jnp.argmax(inputs[1], axis=-1))
    np.testing.assert_array_equal(drafts[VOCAB - 1], drafts[0])
    assert (drafts[0] != drafts[1]).any()


def test_rejection_rule_corrects_the_whole_vocabulary():
    few, all_tokens = generate(2, "mixed", rule="rejection"), generate(0, "mixed", rule="rejection")
    assert [g.output_ids for g in few] == [g.output_ids for g in all_tokens]
    assert acceptance(few) == acceptance(all_tokens)


def test_default_depends_on_the_vocabulary():
    assert default_num_candidates(4096) == 0 and default_num_candidates(151936) == 64
    target, draft = make_configs()
    params = make_decoder().params
    assert Decoder(target, params.target, draft, params.draft).settings.num_candidates == 0
    assert Decoder(target, params.target, draft, params.draft, num_candidates=7).settings.num_candidates == 7
    with pytest.raises(DecodingError, match="num_candidates is -1; give 0 for the whole vocabulary"):
        Decoder(target, params.target, draft, params.draft, num_candidates=-1)


def test_roll_out_reads_no_matrix_of_the_vocabulary():
    """Inside the loop over slots nothing has the vocabulary's size but the embedding a token is looked up in."""
    decoder = make_decoder(vocab=4096)
    settings = replace(decoder.settings, block_size=decoder.settings.draft.block_size, num_candidates=8)
    traced = jax.make_jaxpr(partial(choose, settings))(decoder.params, *draw_inputs(settings.draft))
    branches = [branch for e in traced.eqns for branch in e.params.get("branches", ())]  # of TPUs, and of others
    scans = [e for branch in branches for e in branch.eqns if e.primitive.name == "scan"]
    assert len(scans) == 2
    operands = [
        variable.aval.shape
        for scan in scans
        for equation in scan.params["jaxpr"].eqns
        if equation.primitive.name in ("dot_general", "add", "argmax")
        for variable in equation.invars
    ]
    assert operands and all(4096 not in shape for shape in operands)
