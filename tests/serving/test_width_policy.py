import pytest

from domino_jax.serving.width_policy import WidthPolicy

NUM_DRAFTS = {12: 12, 6: 6, 1: 0}
ONE_ROUND = {12: 1, 6: 1, 1: 1}


def make_policy(tokens_a_round):
    policy = WidthPolicy(NUM_DRAFTS)
    for _ in range(600):
        policy.observe(12, [tokens_a_round - 1] * 4)
    return policy


def choose(policy, costs, max_rounds, num_drafted, num_plain, has_free=True):
    """Return the block size chosen in the end, where nothing changes any more."""
    for _ in range(200):
        size, num_rounds = policy.choose("a shape", costs, max_rounds, num_drafted, num_plain, has_free)
        assert 1 <= num_rounds <= max_rounds[size]
    return size


def observe_calls(policy, costs, size, excess_s, repeats=300, num_rounds=1):
    for _ in range(repeats):
        policy.observe_call("a shape", size, num_rounds, costs[size], num_rounds * costs[size] + excess_s)


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


def test_drafting_begins_when_it_has_promised_more_for_a_while():
    policy = make_policy(5)
    good, poor = {6: 4.0, 1: 1.0}, {6: 6.0, 1: 1.0}
    assert choose(policy, poor, ONE_ROUND, 4, 0) == 1
    for needed in (80, 160, 320):
        sizes = [policy.choose("a shape", good, ONE_ROUND, 4, 0, True)[0] for _ in range(needed - 1)]
        assert set(sizes) == {1}
        policy.choose("a shape", poor, ONE_ROUND, 4, 0, True)
        sizes = [policy.choose("a shape", good, ONE_ROUND, 4, 0, True)[0] for _ in range(needed + 1)]
        assert sizes == [1] * (needed - 1) + [6] * 2
        # Given up again: next time twice as much is needed.
        assert policy.choose("a shape", poor, ONE_ROUND, 4, 0, True)[0] == 1
    for _ in range(640 + 600):
        policy.choose("a shape", good, ONE_ROUND, 4, 0, True)
    assert policy.choose("a shape", poor, ONE_ROUND, 4, 0, True)[0] == 1
    sizes = [policy.choose("a shape", good, ONE_ROUND, 4, 0, True)[0] for _ in range(81)]
    assert sizes == [1] * 79 + [6] * 2


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


def test_a_slot_stands_still_to_the_end_of_the_next_call():
    policy = make_policy(5)
    policy.observe_end(20)
    # 20 tokens: 4 rounds of 4.0 and one more against 20 of 1.0 and one more.
    assert choose(policy, {12: 9.0, 6: 4.0, 1: 1.0}, ONE_ROUND, 4, 0) == 6
    assert choose(policy, {12: 9.0, 6: 4.5, 1: 1.0}, ONE_ROUND, 4, 0) == 1
    # Where all slots are taken, others wait for them and none stands still.
    assert choose(policy, {12: 9.0, 6: 4.5, 1: 1.0}, ONE_ROUND, 4, 0, has_free=False) == 6


def test_calls_are_as_long_as_pays():
    costs, at_most = {6: 4.0, 1: 1.0}, {6: 4, 1: 4}
    policy = make_policy(5)
    assert policy.choose("a shape", costs, at_most, 4, 0, True) == (6, 4)  # no sequence has ended yet
    policy.observe_end(20)
    # Nothing is lost between calls: the shortest let the least slots stand still.
    assert policy.choose("a shape", costs, at_most, 4, 0, True) == (6, 1)
    assert policy.choose("a shape", costs, at_most, 4, 0, False) == (6, 4)
    # 4 s more for every call: for 20 tokens 4 + 1 rounds of 4 + 4, or 4 + 2.5 of 4 + 2, or 4 + 4 of 4 + 1.33.
    observe_calls(policy, costs, 6, 4.0)
    assert policy.choose("a shape", costs, at_most, 4, 0, True) == (6, 2)
    for _ in range(300):
        policy.observe_end(2000)
    assert policy.choose("a shape", costs, at_most, 4, 0, True) == (6, 4)


def test_plain_requests_get_plain_rounds_of_a_length_that_pays():
    policy = make_policy(5)
    policy.observe_end(20)
    assert policy.choose("a shape", {6: 4.0, 1: 1.0}, {6: 4, 1: 4}, 0, 4, True) == (1, 1)
    assert policy.choose("a shape", {6: 4.0}, {6: 4}, 4, 0, True) == (6, 1)  # a single block size, whatever it costs


def test_time_between_calls_is_not_shortened_by_drafting():
    poor, good = {12: 9.0, 6: 6.0, 1: 1.0}, {12: 9.0, 6: 4.0, 1: 1.0}
    policy = make_policy(5)
    for _ in range(200):
        policy.observe_end(1000)
        policy.observe_between("a shape", 6, 0.5, 0, True)
        policy.observe_between("a shape", 6, 1.5, 2, True)
    assert policy.prompt_s == {("a shape", True): pytest.approx(1.0, abs=0.01)}
    assert choose(policy, poor, ONE_ROUND, 1, 0) == 1
    assert choose(policy, good, ONE_ROUND, 1, 0) == 6
    for _ in range(200):
        policy.observe_between("a shape", 6, 20_000.0, 1, True)
    assert choose(policy, poor, ONE_ROUND, 1, 0) == 1
    assert choose(policy, good, ONE_ROUND, 1, 0) == 1


def test_what_every_call_takes_is_not_the_prompts():
    costs, at_most = {6: 4.0, 1: 1.0}, {6: 4, 1: 4}
    policy = make_policy(5)
    policy.observe_end(20)
    for _ in range(300):
        policy.observe_between("a shape", 6, 4.0, 0, False)
        policy.observe_between("a shape", 6, 7.0, 1, True)
    assert policy.prompt_s == {("a shape", True): pytest.approx(3.0, abs=0.01)}
    # Between calls as beyond their rounds: shared by the rounds of a call.
    assert policy.choose("a shape", costs, at_most, 4, 0, True) == (6, 2)


def test_the_time_of_prompts_is_learned_of_drafting_and_of_plain_rounds():
    costs = {12: 9.0, 6: 4.5, 1: 1.0}
    policy = make_policy(5)
    policy.observe_end(1000)
    policy.observe_between("a shape", 6, 100.0, 1, True)
    assert choose(policy, costs, ONE_ROUND, 1, 0) == 6
    for _ in range(200):
        policy.observe_between("a shape", 6, 300.0, 1, True)
        policy.observe_between("a shape", 1, 100.0, 1, True)
    # 900 of rounds and 300 of the rest against 1000 and 100.
    assert choose(policy, costs, ONE_ROUND, 1, 0) == 1
    for _ in range(3000):
        policy.observe_between("a shape", 1, 100.0, 1, True)
    assert choose(policy, costs, ONE_ROUND, 1, 0) == 6


def test_nothing_is_forgotten_while_nobody_wants_drafts():
    policy = make_policy(5)
    before = policy.survival
    assert choose(policy, {12: 2.0, 6: 1.5, 1: 1.0}, ONE_ROUND, 0, 4) == 1
    for _ in range(3000):
        policy.observe(1, [])
    assert policy.survival == before


def test_what_calls_take_beyond_their_rounds_weighs_by_the_rounds_of_a_call():
    costs = {12: 9.0, 6: 5.5, 1: 1.0}
    policy = make_policy(5)
    assert choose(policy, costs, ONE_ROUND, 4, 0) == 1
    # A second more for every call: 6.5 for 5 tokens against 2.0 for one.
    observe_calls(policy, costs, 1, 1.0)
    assert choose(policy, costs, ONE_ROUND, 4, 0) == 6
    assert policy.choose("another shape", costs, ONE_ROUND, 4, 0, True) == (1, 1)


def test_a_block_size_whose_calls_were_slow_is_tried_again_after_many_calls_of_another():
    costs = {12: 9.0, 6: 4.0, 1: 1.0}
    policy = make_policy(5)
    observe_calls(policy, costs, 6, 8.0)
    observe_calls(policy, costs, 1, 0.0, repeats=20)
    assert choose(policy, costs, ONE_ROUND, 4, 0) == 1
    observe_calls(policy, costs, 1, 0.0, repeats=5000)
    assert choose(policy, costs, ONE_ROUND, 4, 0) == 6


def test_calls_of_other_lengths_are_tried_now_and_then_and_taken_where_they_are_faster():
    costs, at_most = {6: 4.0}, {6: 4}
    policy = make_policy(5)
    policy.observe_end(20)
    chosen = []
    for _ in range(1200):
        _, num_rounds = policy.choose("a shape", costs, at_most, 4, 0, True)
        chosen.append(num_rounds)
        # A round takes 2.5 and not the 4 of warm-up, a call 3: 5.5 for one round, 8 for two, 10.5 for three.
        policy.observe_call("a shape", 6, num_rounds, 4.0, 3.0 + 2.5 * num_rounds)
    assert set(chosen[:8]) == {1}
    assert sum(n == 2 for n in chosen[-320:]) >= 290
    assert {1, 2, 3} == set(chosen[-320:])


def test_a_slow_moment_of_the_machine_does_not_speak_against_what_was_used_in_it():
    costs = {6: 5.2, 1: 1.0}
    policy = make_policy(5)
    policy.observe_end(20)
    observe_calls(policy, costs, 6, 0.5)
    observe_calls(policy, costs, 1, 0.5)
    for _ in range(100):
        policy.observe_between("a shape", 6, 2.0, 1, True)
        policy.observe_between("a shape", 1, 2.0, 1, True)
    for slowness in [1.0] * 50 + [1.4] * 150 + [1.0] * 100:
        # 4 + 1 rounds of 5.7 against 20 + 1 of 1.5.
        assert choose(policy, costs, ONE_ROUND, 4, 0) == 6
        policy.observe_call("a shape", 6, 1, 5.2, 5.7 * slowness)
        policy.observe_between("a shape", 6, 2.0 * slowness, 1, True)
    assert policy.slowness == pytest.approx(1.0, abs=0.03)
    policy.observe_end(20_000)  # sequences without end: rounds alone count, 5.7 for 5 tokens against 1.5 for each
    for _ in range(400):
        policy.observe_end(20_000)
    dear = {6: 6.4, 1: 1.0}
    assert choose(policy, dear, ONE_ROUND, 4, 0) == 6
