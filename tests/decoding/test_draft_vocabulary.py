"""Drafting from part of the vocabulary: what may be drafted, and the same text whatever that is."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from domino_jax.decoding import speculative
from domino_jax.decoding.draft_vocabulary import (
    DraftVocabularyError,
    choose_token_ids,
    load_draft_vocabulary,
    save_draft_vocabulary,
)
from domino_jax.decoding.generate import Decoder, DecodingError, init_state
from domino_jax.decoding.state import SOURCE_DRAFTED, SOURCE_NAMES
from tests.decoding.test_candidates import BUDGET, PROMPTS, SAMPLINGS, acceptance
from tests.decoding.tiny_pair import VOCAB, assert_same_text, make_configs, make_decoder

EVERY_OTHER = np.arange(0, VOCAB, 2)


def limit(token_ids, num_candidates=None, **changes):
    usual = make_decoder(**changes)
    models = usual.settings.target, usual.params.target, usual.settings.draft, usual.params.draft
    return Decoder(*models, num_candidates=num_candidates, draft_vocabulary=token_ids)


def generate(decoder, sampling, rule="seed-exact", **settings):
    return decoder.generate(PROMPTS, BUDGET, SAMPLINGS[sampling], rule=rule, **settings)


@pytest.mark.parametrize("changes", [{}, {"gru_hidden_dim": 0, "emb_dim": 0}], ids=["head", "no head"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_text_is_the_targets_and_drafts_are_of_the_vocabulary(sampling, changes):
    plain = generate(make_decoder(), sampling, block_size=1)
    for num_candidates in (0, 3):
        got = generate(limit(EVERY_OTHER, num_candidates, **changes), sampling)
        assert_same_text(got, plain)
        drafted = [
            token
            for row in got
            for token, source in zip(row.output_ids, row.token_sources, strict=True)
            if source == SOURCE_NAMES[SOURCE_DRAFTED]
        ]
        assert drafted and not set(drafted) - set(EVERY_OTHER.tolist())


@pytest.mark.parametrize("rule", ["seed-exact", "rejection"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_all_tokens_are_drafted_as_without(sampling, rule):
    usual, whole = make_decoder(), limit(np.arange(VOCAB))
    wanted, got = generate(usual, sampling, rule), generate(whole, sampling, rule)
    assert [g.output_ids for g in got] == [w.output_ids for w in wanted]
    assert acceptance(got) == acceptance(wanted)


def test_a_draft_is_the_likeliest_that_may_be_drafted():
    """Without a head a greedy draft is the argmax of the base logits of the tokens that are left."""
    usual, limited = make_decoder(), limit(EVERY_OTHER)
    settings = replace(usual.settings, block_size=usual.settings.draft.block_size, use_head=False)
    state = init_state(settings, [[1], [2]], [4, 4], [SamplingConfig()] * 2, [()] * 2)
    _, logits, _ = speculative.backbone_block(settings, usual.params, state)
    settings = replace(settings, draft_vocab_size=len(EVERY_OTHER))
    drafts = speculative.propose_block(settings, limited.params, state).tokens
    np.testing.assert_array_equal(drafts, EVERY_OTHER[jnp.argmax(logits[..., EVERY_OTHER], axis=-1)])


def test_most_frequent_tokens_are_chosen():
    counts = np.array([3, 9, 0, 9, 1, 0])
    assert choose_token_ids(counts, 2).tolist() == [1, 3]
    assert choose_token_ids(counts, 3, always=(5,)).tolist() == [1, 3, 5]
    assert choose_token_ids(counts, 5).tolist() == [0, 1, 2, 3, 4]  # of those never seen the lowest
    for size, always in ((7, ()), (0, ()), (1, (1, 2))):
        with pytest.raises(DraftVocabularyError, match=rf"of {size} tokens was asked for; {max(len(always), 1)} .. 6"):
            choose_token_ids(counts, size, always)


def test_file_comes_back_and_wrong_ones_are_refused(tmp_path):
    path = tmp_path / "draft_vocabulary.json"
    save_draft_vocabulary(path, VOCAB, EVERY_OTHER)
    np.testing.assert_array_equal(load_draft_vocabulary(path, VOCAB), EVERY_OTHER)
    with pytest.raises(DraftVocabularyError, match="made for a vocabulary of 48 tokens, the target has 50"):
        load_draft_vocabulary(path, 50)
    with pytest.raises(DraftVocabularyError, match=r"no draft vocabulary at .*choose_draft_vocabulary.py"):
        load_draft_vocabulary(tmp_path / "absent.json", VOCAB)
    for content in ("{}", "[1]", '{"vocab_size": 48, "token_ids": []}', '{"vocab_size": 48, "token_ids": [2, 1]}',
                    '{"vocab_size": 48, "token_ids": [-1, 3]}', '{"vocab_size": 48, "token_ids": [1, "a"]}',
                    '{"vocab_size": 48, "token_ids": [1.5]}', '{"vocab_size": 48, "token_ids": [1, 48]}',
                    '{"vocab_size": 48, "token_ids": [1, 1]}', "no json"):  # fmt: skip
        path.write_text(content)
        with pytest.raises(DraftVocabularyError, match="is not a draft vocabulary"):
            load_draft_vocabulary(path, VOCAB)


@pytest.mark.parametrize("token_ids", [[], [1, 1], [2, 1], [-1, 3], [1, VOCAB]], ids=str)
def test_tokens_that_are_none_are_refused_by_the_decoder_too(token_ids):
    with pytest.raises(DraftVocabularyError, match=r"different ids of 0 \.\. 47, ascending, one at least"):
        limit(np.array(token_ids, np.int64))


def test_weights_that_nothing_reads_are_not_held():
    assert limit(EVERY_OTHER, gru_hidden_dim=0, emb_dim=0).params.vocabulary.embed_tokens is None
    assert limit(EVERY_OTHER).params.vocabulary.embed_tokens.shape == (24, 32)


def test_a_draft_vocabulary_needs_a_drafter():
    target, _ = make_configs()
    with pytest.raises(DecodingError, match="a draft vocabulary is given but no drafter"):
        Decoder(target, make_decoder().params.target, draft_vocabulary=EVERY_OTHER)
