import pytest

from domino_jax.serving.width_policy import WidthPolicy

NUM_DRAFTS = {12: 12, 6: 6, 1: 0}
ONE_ROUND = {12: 1, 6: 1, 1: 1}


def make_policy(tokens_a_round):
    policy = WidthPolicy(NUM_DRAFTS)
    for _ in range(600):
        policy.observe(12, [tokens_a_round - 1] * 4)
    return policy


def test_expected_tokens_follow_the_drafts_that_survive():
    policy = make_policy(5)
    assert policy.expected_tokens(12) == pytest.approx(5, abs=0.01)
    assert policy.expected_tokens(6) == pytest.approx(5, abs=0.01)
    assert policy.expected_tokens(1) == 1
    assert make_policy(10).expected_tokens(6) == pytest.approx(7, abs=0.01)


@pytest.mark.parametrize(
    ("costs", "tokens", "best"),
    [
        ({12: 2.0, 6: 1.5, 1: 1.0}, 12, 12),
        ({12: 2.0, 6: 1.5, 1: 1.0}, 5, 6),
        ({12: 9.0, 6: 5.5, 1: 1.0}, 5, 1),
    ],
)
def test_the_width_with_most_tokens_a_second_is_chosen(costs, tokens, best):
    assert make_policy(tokens).choose(costs, ONE_ROUND, 4, 0) == best


def test_rows_that_are_not_drafted_for_count_one_token():
    costs = {12: 2.0, 6: 1.5, 1: 1.0}
    policy = make_policy(5)
    assert policy.choose(costs, ONE_ROUND, 4, 0) == 6
    assert policy.choose(costs, ONE_ROUND, 1, 20) == 1
    assert policy.choose(costs, ONE_ROUND, 0, 4) == 1


def test_drafting_has_to_promise_more_to_begin_than_to_go_on():
    policy = make_policy(5)
    assert policy.choose({12: 9.0, 6: 4.97, 1: 1.0}, ONE_ROUND, 1, 0) == 6
    assert policy.choose({12: 9.0, 6: 5.1, 1: 1.0}, ONE_ROUND, 1, 0) == 1
    assert policy.choose({12: 9.0, 6: 4.97, 1: 1.0}, ONE_ROUND, 1, 0) == 1
    assert policy.choose({12: 9.0, 6: 4.85, 1: 1.0}, ONE_ROUND, 1, 0) == 6


def test_a_drafter_that_failed_is_tried_again_after_many_plain_rounds():
    policy = make_policy(1)
    costs = {12: 2.0, 6: 1.5, 1: 1.0}
    assert policy.choose(costs, ONE_ROUND, 1, 0) == 1
    for _ in range(3000):
        policy.observe(1, [])
    assert policy.choose(costs, ONE_ROUND, 1, 0) != 1


def test_narrow_rounds_teach_nothing_about_later_slots():
    policy = make_policy(13)
    before = policy.survival[6:]
    policy.observe(6, [0, 0])
    assert policy.survival[6:] == before
    assert policy.survival[0] < 1


def test_short_sequences_make_rounds_dearer():
    costs = {12: 4.4, 6: 4.0, 1: 1.0}
    policy = make_policy(5)
    assert policy.choose(costs, ONE_ROUND, 4, 0) != 1
    for _ in range(200):
        policy.observe_end(12)
    assert policy.mean_len == pytest.approx(12, abs=0.1)
    # 12 tokens: 2.4 rounds of 4.0 and one more, against 12 of 1.0 and one more.
    assert policy.choose(costs, ONE_ROUND, 4, 0) == 1
    for _ in range(200):
        policy.observe_end(1000)
    assert policy.choose(costs, ONE_ROUND, 4, 0) != 1


def test_a_slot_stands_still_to_the_end_of_a_call():
    costs = {12: 9.0, 6: 4.0, 1: 1.0}
    policy = make_policy(5)
    policy.observe_end(20)
    # 20 tokens: 4 rounds of 4.0 and one more against 20 of 1.0 and one more; with half of a longer call they lose.
    assert policy.choose(costs, ONE_ROUND, 4, 0) == 6
    assert policy.choose(costs, {12: 5, 6: 5, 1: 1}, 4, 0) == 1


def test_time_between_calls_is_not_shortened_by_drafting():
    poor, good = {12: 9.0, 6: 6.0, 1: 1.0}, {12: 9.0, 6: 4.0, 1: 1.0}
    policy = make_policy(5)
    for _ in range(200):
        policy.observe_end(1000)
        policy.observe_between(0.5, 0)
        policy.observe_between(1.5, 2)
    assert policy.between_s == pytest.approx(1.0, abs=0.01)
    assert policy.choose(poor, ONE_ROUND, 1, 0) == 1
    assert policy.choose(good, ONE_ROUND, 1, 0) == 6
    for _ in range(200):
        policy.observe_between(20_000.0, 1)
    assert policy.choose(poor, ONE_ROUND, 1, 0) == 1
    assert policy.choose(good, ONE_ROUND, 1, 0) == 1


def test_nothing_is_forgotten_while_nobody_wants_drafts():
    policy = make_policy(5)
    before = policy.survival
    assert policy.choose({12: 2.0, 6: 1.5, 1: 1.0}, ONE_ROUND, 0, 4) == 1
    for _ in range(3000):
        policy.observe(1, [])
    assert policy.survival == before
