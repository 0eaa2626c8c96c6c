import pytest

from domino_jax.serving.width_policy import ServedCall, WidthPolicy

NUM_DRAFTS = {12: 12, 6: 6, 1: 0}
ONE_ROUND = {12: 1, 6: 1, 1: 1}


def make_policy(tokens_a_round):
    policy = WidthPolicy(NUM_DRAFTS)
    for _ in range(600):
        policy.observe(12, [tokens_a_round - 1] * 4)
    return policy


def choose(policy, costs, call_rounds, num_drafted, num_plain, has_free=True):
    return policy.choose("a shape", costs, call_rounds, num_drafted, num_plain, has_free)


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
    assert choose(make_policy(tokens), costs, ONE_ROUND, 4, 0) == best


def test_rows_that_are_not_drafted_for_count_one_token():
    costs = {12: 2.0, 6: 1.5, 1: 1.0}
    policy = make_policy(5)
    assert choose(policy, costs, ONE_ROUND, 4, 0) == 6
    assert choose(policy, costs, ONE_ROUND, 1, 20) == 1
    assert choose(policy, costs, ONE_ROUND, 0, 4) == 1


def test_drafting_has_to_promise_more_to_begin_than_to_go_on():
    policy = make_policy(5)
    assert choose(policy, {12: 9.0, 6: 4.97, 1: 1.0}, ONE_ROUND, 1, 0) == 6
    assert choose(policy, {12: 9.0, 6: 5.1, 1: 1.0}, ONE_ROUND, 1, 0) == 1
    assert choose(policy, {12: 9.0, 6: 4.97, 1: 1.0}, ONE_ROUND, 1, 0) == 1
    assert choose(policy, {12: 9.0, 6: 4.85, 1: 1.0}, ONE_ROUND, 1, 0) == 6


def test_a_drafter_that_failed_is_tried_again_after_many_plain_rounds():
    policy = make_policy(1)
    costs = {12: 2.0, 6: 1.5, 1: 1.0}
    assert choose(policy, costs, ONE_ROUND, 1, 0) == 1
    for _ in range(12_000):
        policy.observe(1, [])
    assert choose(policy, costs, ONE_ROUND, 1, 0) != 1


def test_narrow_rounds_teach_nothing_about_later_slots():
    policy = make_policy(13)
    before = policy.survival[6:]
    policy.observe(6, [0, 0])
    assert policy.survival[6:] == before
    assert policy.survival[0] < 1


def test_short_sequences_make_rounds_dearer():
    costs = {12: 4.4, 6: 4.0, 1: 1.0}
    policy = make_policy(5)
    assert choose(policy, costs, ONE_ROUND, 4, 0) != 1
    for _ in range(200):
        policy.observe_end(12)
    assert policy.mean_len == pytest.approx(12, abs=0.1)
    # 12 tokens: 2.4 rounds of 4.0 and one more, against 12 of 1.0 and one more.
    assert choose(policy, costs, ONE_ROUND, 4, 0) == 1
    for _ in range(200):
        policy.observe_end(1000)
    assert choose(policy, costs, ONE_ROUND, 4, 0) != 1


def test_a_slot_stands_still_to_the_end_of_a_call():
    costs = {12: 9.0, 6: 4.0, 1: 1.0}
    policy = make_policy(5)
    policy.observe_end(20)
    # 20 tokens: 4 rounds of 4.0 and one more against 20 of 1.0 and one more; with longer calls to wait for they lose.
    assert choose(policy, costs, ONE_ROUND, 4, 0) == 6
    assert choose(policy, costs, {12: 5, 6: 5, 1: 1}, 4, 0) == 1
    # Where all slots are taken, others wait for them and none stands still.
    assert choose(policy, costs, {12: 5, 6: 5, 1: 1}, 4, 0, has_free=False) == 6


def test_time_between_calls_is_not_shortened_by_drafting():
    poor, good = {12: 9.0, 6: 6.0, 1: 1.0}, {12: 9.0, 6: 4.0, 1: 1.0}
    policy = make_policy(5)
    for _ in range(200):
        policy.observe_end(1000)
        policy.observe_between(0.5, 0)
        policy.observe_between(1.5, 2)
    assert policy.between_s == pytest.approx(1.0, abs=0.01)
    assert choose(policy, poor, ONE_ROUND, 1, 0) == 1
    assert choose(policy, good, ONE_ROUND, 1, 0) == 6
    for _ in range(200):
        policy.observe_between(20_000.0, 1)
    assert choose(policy, poor, ONE_ROUND, 1, 0) == 1
    assert choose(policy, good, ONE_ROUND, 1, 0) == 1


def test_nothing_is_forgotten_while_nobody_wants_drafts():
    policy = make_policy(5)
    before = policy.survival
    assert choose(policy, {12: 2.0, 6: 1.5, 1: 1.0}, ONE_ROUND, 0, 4) == 1
    for _ in range(3000):
        policy.observe(1, [])
    assert policy.survival == before


def observe_calls(policy, size, excess_s, num_rounds=4, shape="a shape", repeats=300):
    for _ in range(repeats):
        policy.observe_call(shape, size, ServedCall(num_rounds, num_rounds * 1.0 + excess_s, num_rounds * 1.0))


def test_what_calls_take_beyond_their_rounds_weighs_by_the_rounds_of_a_call():
    costs, call_rounds = {12: 9.0, 6: 5.5, 1: 1.0}, {12: 1, 6: 1, 1: 1}
    policy = make_policy(5)
    assert choose(policy, costs, call_rounds, 4, 0) == 1
    # A second more for every call: 6.5 for 5 tokens against 2.0 for one.
    observe_calls(policy, 1, 1.0, num_rounds=1)
    assert choose(policy, costs, call_rounds, 4, 0) == 6
    assert policy.choose("another shape", costs, call_rounds, 4, 0, True) == 1


def test_a_block_size_whose_calls_were_slow_is_tried_again_after_many_calls_of_another():
    costs = {12: 9.0, 6: 4.0, 1: 1.0}
    policy = make_policy(5)
    observe_calls(policy, 6, 8.0, num_rounds=1)
    observe_calls(policy, 1, 0.0, repeats=1)
    assert choose(policy, costs, ONE_ROUND, 4, 0) == 1
    observe_calls(policy, 1, 0.0, repeats=3000)
    assert choose(policy, costs, ONE_ROUND, 4, 0) == 6
