"""Sampled text follows the target's exact law through the real loop, and the same test refuses broken rules.

The joint law of four tokens over a vocabulary of 8 is enumerated with the target. Broken rules share one compiled
loop: row i of a batch runs variant i modulo their number, variant 0 being the rule as it is.
"""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from domino_jax.config import SamplingConfig
from domino_jax.decoding import initial_state, rollout, speculative
from domino_jax.decoding.draft_vocabulary import limit_vocabulary
from domino_jax.models.qwen3 import Qwen3
from tests.decoding.tiny_pair import make_decoder

VOCAB, NUM_NEW = 8, 4
PROMPT = [3, 1, 4]
SAMPLING = SamplingConfig(temperature=0.8, top_k=7, top_p=0.97)
DRAFT_VOCABULARY = (0, 2, 3, 4, 6)
ROWS, BATCHES = 1024, 3
PLAUSIBLE, REFUSED = 1e-3, 1e-7


@pytest.fixture(scope="module")
def decoder():
    return make_decoder(vocab=VOCAB, block=2, mask_id=7)


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """Thousands of rows need few positions."""
    monkeypatch.setattr(initial_state, "_CACHE_STEP", 8)


@pytest.fixture(scope="module")
def exact_law(decoder):
    """Probability of every sequence of four tokens, one axis a token."""
    grids = np.indices((VOCAB,) * (NUM_NEW - 1)).reshape(NUM_NEW - 1, -1).T
    ids = jnp.asarray(np.concatenate([np.tile(PROMPT, (len(grids), 1)), grids], axis=1), jnp.int32)
    target = Qwen3(decoder.settings.target)

    @jax.jit
    def run(token_ids):
        hidden = target.apply({"params": decoder.params.target}, token_ids).hidden[:, len(PROMPT) - 1 :]
        return target.apply({"params": decoder.params.target}, hidden, method=Qwen3.logits)

    laws = filter_law(np.asarray(run(ids), np.float64)).reshape(*(VOCAB,) * (NUM_NEW - 1), NUM_NEW, VOCAB)
    joint = laws[0, 0, 0, 0]
    for k, given in enumerate((laws[:, 0, 0, 1], laws[:, :, 0, 2], laws[:, :, :, 3])):
        assert given.ndim == k + 2
        joint = joint[..., None] * given
    np.testing.assert_allclose(joint.sum(), 1.0)
    return joint


def filter_law(logits):
    """Temperature, top-k and top-p in the plainest way, one law at a time."""
    laws = np.zeros_like(logits).reshape(-1, VOCAB)
    for law, row in zip(laws, logits.reshape(-1, VOCAB) / SAMPLING.temperature, strict=True):
        order = np.argsort(-row)[: SAMPLING.top_k]
        weights = np.exp(row[order] - row[order[0]])
        weights /= weights.sum()
        kept = order[: np.searchsorted(np.cumsum(weights), SAMPLING.top_p) + 1]
        law[kept] = np.exp(row[kept] - row[order[0]])
        law /= law.sum()
    return laws.reshape(logits.shape)


def limit(decoder, token_ids):
    """Return a decoder that drafts from part of the vocabulary."""
    limited = copy.copy(decoder)
    limited.settings = replace(decoder.settings, draft_vocab_size=len(token_ids))
    limited.params = limit_vocabulary(decoder.params, np.array(token_ids))
    return limited


def draw(decoder, rule, num_rows, first_seed, propose=speculative.propose_block):
    sampling = [replace(SAMPLING, seed=first_seed + i) for i in range(num_rows)]
    got = decoder.generate([PROMPT] * num_rows, NUM_NEW, sampling, rule=rule, propose=propose)
    return np.array([g.output_ids for g in got]), [g.stats.acceptance_lengths for g in got]


def p_value(tokens, joint, axes):
    """Chi-square of the tokens at `axes` against their joint law; rare cells are pooled."""
    others = tuple(i for i in range(NUM_NEW) if i not in axes)
    law = joint.sum(axis=others).ravel()
    cells = np.ravel_multi_index(tokens[:, list(axes)].T, (VOCAB,) * len(axes))
    counts = np.bincount(cells, minlength=law.size)
    if np.any(counts[law == 0]):
        return 0.0
    expected = law * len(tokens)
    is_common = expected >= 5
    observed = np.append(counts[is_common], counts[~is_common].sum())
    wanted = np.append(expected[is_common], expected[~is_common].sum())
    keep = wanted > 0
    statistic = ((observed[keep] - wanted[keep]) ** 2 / wanted[keep]).sum()
    return stats.chi2.sf(statistic, keep.sum() - 1)


def p_values(tokens, joint):
    """First three tokens, and the three after the prefill's: two drafted slots, bonus and a second round."""
    return p_value(tokens, joint, (0, 1, 2)), p_value(tokens, joint, (1, 2, 3))


@pytest.mark.parametrize(
    ("rule", "num_candidates", "draft_vocabulary"),
    [
        ("rejection", 0, None),
        ("rejection", 0, DRAFT_VOCABULARY),
        ("seed-exact", 0, None),
        ("seed-exact", 4, None),
        ("seed-exact", 0, DRAFT_VOCABULARY),
    ],
)
def test_joint_law(decoder, exact_law, rule, num_candidates, draft_vocabulary):
    decoder = limit(decoder, draft_vocabulary) if draft_vocabulary else copy.copy(decoder)
    decoder.settings = replace(decoder.settings, num_candidates=num_candidates)
    draws = [draw(decoder, rule, ROWS, 10_000 * i) for i in range(8)]
    tokens = np.concatenate([d[0] for d in draws])
    first_rounds = np.array([lengths[0] for d in draws for lengths in d[1]])
    shares = np.bincount(first_rounds, minlength=4)[1:] / len(first_rounds)
    assert shares.min() > 0.02, "refusals, partial and full acceptance must all occur"
    assert min(p_values(tokens, exact_law)) > PLAUSIBLE


def select_row(*variants):
    """Row i takes `variants[i % len(variants)]`."""
    row = jnp.arange(variants[0].shape[0]) % len(variants)
    return jnp.stack(variants)[row, jnp.arange(row.shape[0])]


REJECTION_VARIANTS = (
    "as it is",
    "residual without q",
    "accept without q",
    "drafted at another temperature than q",
    "one noise for draft and accept",
    "always accept",
    "bonus repeats the last draft",
    "q of another slot",
)


def break_rejection(monkeypatch):
    accept, uniform = speculative.accept_by_ratio, speculative.uniform_noise
    weigh = rollout._weigh_drafts
    num = len(REJECTION_VARIANTS)

    def only(at, changed, usual):
        return select_row(*[changed if i == at else usual for i in range(num)])

    def broken_accept(drafts, draft_probs, target_probs, noise):
        usual, law = accept(drafts, draft_probs, target_probs, noise)
        blind, _ = accept(drafts, jnp.ones_like(draft_probs), target_probs, noise)
        all_kept = jnp.full_like(usual, drafts.shape[1])
        rolled, rolled_law = accept(drafts, jnp.roll(draft_probs, 1, axis=1), target_probs, noise)
        at_end = jax.nn.one_hot(drafts[:, -1], VOCAB)
        plain = jnp.take_along_axis(target_probs, usual[:, None, None], axis=1)[:, 0]
        end_law = jnp.where((usual == drafts.shape[1])[:, None], at_end, law)
        counts = select_row(usual, usual, blind, usual, usual, all_kept, usual, rolled)
        laws = select_row(law, plain, law, law, law, target_probs[:, -1], end_law, rolled_law)
        return counts, laws

    def broken_uniform(seed, positions, purpose):
        return only(4, uniform(seed, positions, "draft"), uniform(seed, positions, purpose))

    def broken_weigh(settings, sampling, logits, noise):
        log_weights, usual = weigh(settings, sampling, logits, noise)
        _, hotter = weigh(settings, sampling.replace(temperature=2.5 * sampling.temperature), logits, noise)
        return log_weights, only(3, hotter, usual)

    monkeypatch.setattr(speculative, "accept_by_ratio", broken_accept)
    monkeypatch.setattr(speculative, "uniform_noise", broken_uniform)
    monkeypatch.setattr(rollout, "_weigh_drafts", broken_weigh)


EXACT_VARIANTS = (
    "as it is",
    "always accept",
    "one noise for every position",
    "choice redrawn after a refusal",
    "draft kept when the target likes it",
)


def break_seed_exact(monkeypatch):
    choose, accept = speculative.choose_next, speculative.accept_equal
    seen = {}

    def broken_choose(logits, positions, state, settings, noise):
        usual = choose(logits, positions, state, settings, noise)
        same_noise = choose(logits, jnp.zeros_like(positions), state, settings)
        seen["fresh"] = choose(logits, positions + 1000, state, settings)
        seen["logits"] = logits
        return select_row(usual, usual, same_noise, usual, usual)

    def broken_accept(drafts, choices):
        num, token = accept(drafts, choices)
        all_kept = jnp.full_like(num, drafts.shape[1])
        fresh = jnp.take_along_axis(seen["fresh"], num[:, None], axis=1)[:, 0]
        best = jnp.argmax(seen["logits"], axis=-1)
        liked, liked_token = accept(drafts, jnp.where(drafts_equal(drafts, best), best, choices))
        counts = select_row(num, all_kept, num, num, liked)
        tokens = select_row(token, choices[:, -1], token, jnp.where(num < drafts.shape[1], fresh, token), liked_token)
        return counts, tokens

    def drafts_equal(drafts, best):
        return jnp.pad(drafts == best[:, :-1], ((0, 0), (0, 1)))

    monkeypatch.setattr(speculative, "choose_next", broken_choose)
    monkeypatch.setattr(speculative, "accept_equal", broken_accept)


@pytest.mark.parametrize(
    ("rule", "names", "break_rule"),
    [
        ("rejection", REJECTION_VARIANTS, break_rejection),
        pytest.param("seed-exact", EXACT_VARIANTS, break_seed_exact, marks=pytest.mark.slow),
    ],
)
def test_broken_rules_are_refused(monkeypatch, decoder, exact_law, rule, names, break_rule):
    break_rule(monkeypatch)
    num_rows = len(names) * ROWS

    def propose(settings, params, state):  # a function of its own, so that nothing reuses the broken program
        return speculative.propose_block(settings, params, state)

    tokens = np.stack([draw(decoder, rule, num_rows, 100_000 * (i + 1), propose)[0] for i in range(BATCHES)])
    found = {}
    for i, name in enumerate(names):
        found[name] = min(p_values(tokens[:, i :: len(names)].reshape(-1, NUM_NEW), exact_law))
    assert found.pop("as it is") > PLAUSIBLE
    assert {name: p for name, p in found.items() if p > REFUSED} == {}


@pytest.mark.slow
def test_q_must_be_the_corrected_law(decoder, exact_law):
    """Base probabilities reported for corrected drafts are refused as well."""

    def propose(settings, params, state):
        usual = speculative.propose_block(settings, params, state)
        _, base_logits, _ = speculative.backbone_block(settings, params, state)
        base = rollout._choose_drafts(settings, state.sampling, base_logits, jnp.zeros_like(base_logits))
        return usual.replace(probs=base.probs)

    tokens = np.concatenate([draw(decoder, "rejection", ROWS, 7_000 * (i + 1), propose)[0] for i in range(BATCHES)])
    assert min(p_values(tokens, exact_law)) < REFUSED


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["laws are of places", "tokens are places"])
def test_a_draft_vocabulary_must_name_what_it_drafts(decoder, exact_law, mistake):
    """A token's place in the draft vocabulary is not its id: a proposal that mixes them up is refused."""

    def propose(settings, params, state):
        usual, token_ids = speculative.propose_block(settings, params, state), params.vocabulary.token_ids
        if mistake == "tokens are places":
            return usual.replace(tokens=jnp.searchsorted(token_ids, usual.tokens))
        of_places = usual.probs[..., token_ids]
        return usual.replace(probs=jnp.pad(of_places, ((0, 0), (0, 0), (0, VOCAB - len(DRAFT_VOCABULARY)))))

    limited = limit(decoder, DRAFT_VOCABULARY)
    draws = [draw(limited, "rejection", ROWS, 9_000 * (i + 1), propose)[0] for i in range(BATCHES)]
    assert min(p_values(np.concatenate(draws), exact_law)) < REFUSED
