"""Rounds of chosen width: the text is the target's, a cut block is a shorter block, a choice knows no later token."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domino_jax.config import SamplingConfig
from domino_jax.decoding import adaptive_width, speculative, width_choice
from domino_jax.decoding.adaptive_width import FREE
from domino_jax.decoding.generate import Decoder, DecodingError
from domino_jax.decoding.survival import CalibrationError, SlotSurvival, SurvivalCalibration
from domino_jax.decoding.width_choice import DRAFTED, PLAIN_STRETCH, PLAIN_TO_THE_END
from tests.decoding.test_chi_square import (
    NUM_NEW,
    PLAUSIBLE,
    PROMPT,
    REFUSED,
    ROWS,
    SAMPLING,
    VOCAB,
    exact_law,  # noqa: F401
    p_value,
    p_values,
    small_caches,  # noqa: F401
)
from tests.decoding.tiny_pair import SHARP, assert_same_text, make_decoder, make_prompts, propose_known, with_known

WIDTHS = (2, 3, 5)
LIMIT = np.int32(10_000)


def make_calibration(widths=WIDTHS, rate=0.7, slope=1.0, intercept=0.0):
    slots = {w: SlotSurvival((slope,) * w, (intercept,) * w, (rate,) * w) for w in widths}
    return SurvivalCalibration(slots)


def with_calibration(decoder, calibration):
    params = decoder.params
    return Decoder(
        decoder.settings.target, params.target, decoder.settings.draft, params.draft, calibration=calibration
    )


def fake_costs(monkeypatch, plain_s, round_s):
    """Let the loop believe these seconds instead of measured ones."""

    def measure(settings, params, state, calibration, propose):
        return width_choice.make_table(settings, calibration, plain_s, round_s)

    monkeypatch.setattr("domino_jax.decoding.generate.measure_costs", measure)


def linear_costs(draft_s, verify_s, widths=WIDTHS):
    seconds = np.array([[d * draft_s + w * verify_s + 1.0 for w in widths] for d in widths])
    return np.where(np.tril(np.ones_like(seconds)) > 0, seconds, np.inf)


@pytest.mark.parametrize("rule", ["greedy", "seed-exact"])
def test_text_is_the_targets_whatever_is_chosen(monkeypatch, rule):
    fake_costs(monkeypatch, 9.0, linear_costs(-0.1, 0.3))  # the largest block is always drafted, not always verified
    decoder = with_calibration(make_decoder(), make_calibration(slope=4.0, intercept=6.0))
    prompts = make_prompts((3, 12, 16, 1, 7, 9, 14, 10))
    sampling = [SamplingConfig() if rule == "greedy" else replace(SHARP, seed=i) for i in range(8)]
    plain = decoder.generate(prompts, 40, sampling, [5], block_size=1)
    adaptive = decoder.generate(prompts, 40, sampling, [5], verify_widths=WIDTHS)
    assert_same_text(adaptive, plain)
    widths = {w for (_, w), count in decoder.last_choices.items() if count and w > 1}
    assert len(widths) > 1, f"one width alone would prove nothing: {decoder.last_choices}"


@pytest.fixture(scope="module")
def loop_input():
    """Settings and a function that makes a fresh state after prefill."""
    known = make_decoder().generate(make_prompts((6,) * 8, seed=2), 60, block_size=1)
    spoiled = [g.prompt_ids + [(t + (i % 4 == 2)) % 48 for i, t in enumerate(g.output_ids)] for g in known]
    decoder = with_known(make_decoder(), spoiled)
    settings = replace(decoder.settings, block_size=5, verify_widths=WIDTHS)
    rows = (make_prompts((6,) * 8, seed=2), [50, 20, 33, 50, 41, 9, 50, 27], [SamplingConfig()] * 8, [()] * 8)
    return decoder, settings, lambda: decoder.start_batch(settings, *rows, 8)[1]


def propose(settings, params, state):
    usual = speculative.propose_block(settings, params, state)
    return usual.replace(tokens=propose_known(settings, params, state).tokens)


def decode(loop_input, order, calibration=None, plain_s=1.0, round_s=None):
    decoder, settings, start = loop_input
    round_s = linear_costs(0.1, 0.1) if round_s is None else round_s
    table = width_choice.make_table(settings, calibration or make_calibration(), plain_s, round_s)
    return adaptive_width.decode_adaptive(
        settings, decoder.params, start(), table, np.asarray(order, np.int32), LIMIT, propose
    )


def assert_same_rows(one, other, names=("sources", "acceptance_lengths", "num_rounds")):
    np.testing.assert_array_equal(one.committed_len, other.committed_len)
    for name in ("tokens", *names):
        for a, b, n in zip(getattr(one, name), getattr(other, name), one.committed_len, strict=True):
            np.testing.assert_array_equal(np.ravel(a)[:n], np.ravel(b)[:n])


def test_cut_block_is_a_block_that_ends_there(loop_input):
    """Drafting 5 and verifying 3 commits, counts and names sources as blocks do that hold 3 drafts."""
    decoder, settings, start = loop_input
    cut, progress = decode(loop_input, (DRAFTED, 2, 1))
    short = replace(settings, block_size=3, verify_widths=())
    fixed = speculative.decode_speculative(short, decoder.params, start(), propose)
    assert int(progress.choices[2, 1]) == int(progress.num_rounds) == int(jnp.max(fixed.num_rounds))
    assert_same_rows(cut, fixed)
    assert np.asarray(fixed.acceptance_lengths).max() == 4
    for a, b in zip(jax.tree.leaves(cut.draft_cache), jax.tree.leaves(fixed.draft_cache), strict=True):
        assert a.shape == b.shape
    before = int(fixed.committed_len.min()) - 1
    np.testing.assert_allclose(
        cut.draft_cache.values[0][:, :, :before], fixed.draft_cache.values[0][:, :, :before], atol=1e-5
    )


@pytest.mark.parametrize("kind", [PLAIN_TO_THE_END, PLAIN_STRETCH])
def test_plain_rounds(loop_input, kind):
    state, progress = decode(loop_input, (kind, 0, 0))
    drafted, _ = decode(loop_input, (DRAFTED, 2, 2))
    assert_same_rows(state, drafted, names=())
    num_new = state.committed_len - 7  # the prompt and the prefill's token
    np.testing.assert_array_equal(state.num_rounds, num_new)
    np.testing.assert_array_equal(state.acceptance_lengths.sum(axis=1), num_new)
    assert np.asarray(state.acceptance_lengths).max() == 1
    assert int(progress.num_plain) == int(num_new.max())


def test_stretch_catches_the_drafts_context_up(monkeypatch, loop_input):
    """After plain rounds a draft sees what it would have seen without them."""
    monkeypatch.setattr(adaptive_width, "_STRETCH_LEN", 8)
    decoder, settings, start = loop_input
    table = width_choice.make_table(settings, make_calibration(), 1.0, linear_costs(0.1, 0.1))
    results = []
    for order in ((PLAIN_STRETCH, 0, 0), (DRAFTED, 0, 0)):
        state, _ = jax.jit(
            lambda state, order: adaptive_width.run_adaptive(
                settings, decoder.params, state, table, order, jnp.int32(8), propose
            )
        )(start(), jnp.asarray(order, jnp.int32))
        results.append(state)
    plain, drafted = results
    n = int(jnp.minimum(plain.committed_len, drafted.committed_len).min()) - 1
    assert n >= 13
    for layer_plain, layer_drafted in zip(plain.draft_cache.keys, drafted.draft_cache.keys, strict=True):
        np.testing.assert_allclose(layer_plain[..., :n], layer_drafted[..., :n], atol=1e-5)


@pytest.mark.parametrize("rule", ["greedy", "seed-exact"])
def test_text_is_the_targets_where_plain_stretches_come_and_go(monkeypatch, rule):
    """With stop tokens and budgets that end within a stretch, and drafting after it."""
    monkeypatch.setattr(adaptive_width, "_STRETCH_LEN", 4)
    fake_costs(monkeypatch, 1.0, linear_costs(0.2, 0.2))
    decoder = with_calibration(make_decoder(), make_calibration(rate=0.75))
    prompts = make_prompts((3, 12, 16, 1, 7, 9, 14))  # rows of no other test: a program would keep its stretches
    sampling = [SamplingConfig() if rule == "greedy" else replace(SHARP, seed=i) for i in range(7)]
    budgets = [40, 11, 40, 6, 40, 23, 40]
    plain = decoder.generate(prompts, budgets, sampling, [5], block_size=1)
    adaptive = decoder.generate(prompts, budgets, sampling, [5], verify_widths=WIDTHS)
    assert_same_text(adaptive, plain)
    choices = decoder.last_choices
    assert choices.pop((1, 1)) > 0 and sum(choices.values()) > 1, choices


def test_drafter_that_does_badly_is_left(loop_input):
    """Rates of this text overrule those of held-out ones, and dear rounds are never begun."""
    promising = make_calibration(rate=0.8)
    _, begun = decode(loop_input, FREE, promising, plain_s=1.0, round_s=linear_costs(0.25, 0.25))
    assert int(begun.choices.sum()) > 0 and int(begun.num_plain) > 0
    _, never = decode(loop_input, FREE, promising, plain_s=1.0, round_s=linear_costs(2.0, 2.0))
    assert int(never.choices.sum()) == 0
    _, always = decode(loop_input, FREE, promising, plain_s=1.0, round_s=linear_costs(0.01, 0.01))
    assert int(always.num_plain) == 0


def test_width_follows_confidence():
    settings = replace(make_decoder().settings, block_size=5, verify_widths=WIDTHS, rule="greedy")
    table = width_choice.make_table(settings, make_calibration(), 1.0, linear_costs(0.0, 0.4))

    def choose(*rows):
        width = width_choice.choose_width(
            settings, table, jnp.int32(2), jnp.array(rows), jnp.array([True, True]), jnp.array(1.0)
        )
        return WIDTHS[int(width)]

    sure, unsure, half = [0.99] * 5, [0.05] * 5, [0.9, 0.9, 0.9, 0.05, 0.05]
    assert [choose(sure, sure), choose(unsure, unsure), choose(half, half)] == [5, 2, 3]
    worth = width_choice.choose_width(
        settings, table, jnp.int32(2), jnp.array([unsure, sure]), jnp.array([False, True]), jnp.array(1.0)
    )
    assert WIDTHS[int(worth)] == 5, "a row that is done has no say"


def test_costs_are_measured_of_every_width_that_can_be():
    decoder = with_calibration(make_decoder(), make_calibration())
    decoder.generate(make_prompts((3, 5)), 30, verify_widths=WIDTHS)
    (table,) = decoder._width_tables.values()
    is_possible = np.tril(np.ones((3, 3), bool))
    assert np.isfinite(np.asarray(table.round_s)[is_possible]).all() and (np.asarray(table.round_s) > 0).all()
    assert np.isinf(np.asarray(table.round_s)[~is_possible]).all() and float(table.plain_s) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verify_widths": (1, 3)}, "from 2 on"),
        ({"verify_widths": (3, 3)}, "different block sizes"),
        ({"verify_widths": (2, 3), "block_size": 5}, "largest of verify_widths is 3"),
        ({"verify_widths": (2, 3), "rule": "rejection", "sampling": SHARP}, "batches of one row, these have 2"),
        ({"verify_widths": (2, 4)}, "has block sizes 2, 3, 5, not 4"),
    ],
)
def test_refusals(arguments, message):
    decoder = with_calibration(make_decoder(), make_calibration())
    with pytest.raises((DecodingError, CalibrationError), match=message):
        decoder.generate(make_prompts((3, 4)), 5, **arguments)
    with pytest.raises(DecodingError, match="need a survival calibration"):
        make_decoder().generate(make_prompts((3,)), 5, verify_widths=(2, 3))


@pytest.fixture(scope="module")
def decoder():
    return make_decoder(vocab=VOCAB, block=3, mask_id=7, shift_label=False)


def draw_alone(decoder, first_seeds, cheat):
    """Draw sequences whose width is decided for each by itself: batches of batches of one row."""
    settings = replace(
        decoder.settings, block_size=3, rule="rejection", has_filters=True, verify_widths=(2, 3), num_candidates=0
    )
    # Steep: a slot is taken to be kept or refused, by whether its confidence is above a third or so.
    slots = {w: SlotSurvival((6.0,) * (w - 1), (4.0,) * (w - 1), (0.6,) * (w - 1)) for w in (2, 3)}
    calibration = SurvivalCalibration(slots)
    table = width_choice.make_table(settings, calibration, 9.0, np.array([[1.1, np.inf], [1.0, 1.2]]))

    def propose(settings, params, state):
        usual = speculative.propose_block(settings, params, state)
        if not cheat:
            return usual
        known = jnp.where(usual.tokens == 0, 0.95, 0.05)  # a token that drafter and target both like
        return usual.replace(confidence=usual.confidence.at[:, 1:].set(known[:, 1:]))

    @jax.jit
    def run_all(params, states):
        def run(state):
            order, max_rounds = jnp.asarray(FREE), jnp.int32(99)
            return adaptive_width.run_adaptive(settings, params, state, table, order, max_rounds, propose)

        return jax.vmap(run)(states)

    start = len(PROMPT)
    for first_seed in first_seeds:
        sampling = [replace(SAMPLING, seed=first_seed + i) for i in range(ROWS)]
        params, state = decoder.start_batch(settings, [PROMPT] * ROWS, [NUM_NEW] * ROWS, sampling, [()] * ROWS, ROWS)
        state, progress = run_all(params, jax.tree.map(lambda x: x[:, None], state))
        yield np.asarray(state.tokens[:, 0, start : start + NUM_NEW]), np.asarray(progress.choices).sum(axis=0)


@pytest.mark.parametrize("cheat", [False, True])
def test_law_where_width_is_chosen(decoder, exact_law, cheat):  # noqa: F811
    """A width chosen by the laws before a token keeps its law; chosen by the token itself it does not."""
    draws = list(draw_alone(decoder, [10_000 * (i + 1) for i in range(8)], cheat))
    counts = sum(d[1] for d in draws)[1]
    assert counts.min() > 0.05 * counts.sum(), f"both widths must occur: {counts}"
    tokens = np.concatenate([d[0] for d in draws])
    # By itself too: the third token is the one that is verified or not, and few cells show a bias best.
    p = min(*p_values(tokens, exact_law), p_value(tokens, exact_law, (2,)))
    assert p < REFUSED if cheat else p > PLAUSIBLE, p


ROUNDS = [(size, width) for size in range(4) for width in range(size + 1)]


def draw_costs(verify_s):
    return np.array([2.0, *(4.0 + 0.5 * size + verify_s[width] for size, width in ROUNDS)]) * 1e-3


def test_costs_come_through_a_drifting_machine():
    """Speed doubles along the repeats, single counts are disturbed: costs are found to a few percent."""
    generator, true_s = np.random.default_rng(0), draw_costs([0.0, 1.5, 3.0, 4.5])
    seconds = true_s[:, None] * np.linspace(1, 2, 5) * generator.lognormal(0, 0.05, (11, 5))
    seconds[generator.integers(0, 11, 5), np.arange(5)] *= 3
    plain_s, round_s = width_choice.fit_costs(seconds, ROUNDS)
    fitted_s = np.array([round_s[size, width] for size, width in ROUNDS])
    np.testing.assert_allclose(fitted_s / plain_s, true_s[1:] / true_s[0], rtol=0.08)
    assert np.isinf(round_s[0, 1:]).all()


def test_costs_need_not_rise_with_the_width():
    """A wider verify pass that is cheaper, as YNNPACK and Eigen have them, stays cheaper."""
    true_s = draw_costs([2.0, 1.0, 3.0, 2.5])
    plain_s, round_s = width_choice.fit_costs(np.repeat(true_s[:, None], 5, axis=1), ROUNDS)
    np.testing.assert_allclose([plain_s, *(round_s[at] for at in ROUNDS)], true_s, rtol=1e-6)


def test_costs_of_a_single_size():
    plain_s, round_s = width_choice.fit_costs(np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]), [(0, 0)])
    np.testing.assert_allclose([plain_s, round_s[0, 0]], [1.0, 3.0])
