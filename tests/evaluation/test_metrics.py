import subprocess
import sys

import pytest

from domino_jax.evaluation import metrics


def test_both_means_of_tau_by_hand():
    lengths = [[1, 3], [8], []]
    assert metrics.tau_over_prompts(lengths) == pytest.approx((2 + 8) / 2)
    assert metrics.tau_over_rounds(lengths) == pytest.approx(12 / 3)
    assert metrics.tau_over_prompts([[]]) is None
    assert metrics.tau_over_rounds([]) is None


def test_acceptance_by_slot_without_a_budget():
    slots = metrics.acceptance_by_slot([[1, 4, 2]], num_draft_tokens=3, budgets=[None], num_decoded=[7])
    assert [(s.slot, s.num_observed, s.num_accepted) for s in slots] == [(1, 3, 2), (2, 3, 1), (3, 3, 1)]
    assert slots[0].share == pytest.approx(2 / 3)


def test_slots_beyond_the_budget_count_neither_way():
    # Budget 7: the prefill wrote 1; round one (3 tokens) has room for 6, round two for 3, so for 2 drafted ones.
    slots = metrics.acceptance_by_slot([[3, 3]], num_draft_tokens=4, budgets=[7], num_decoded=[6])
    assert [(s.num_observed, s.num_accepted) for s in slots] == [(2, 2), (2, 2), (1, 0), (1, 0)]


def test_the_room_decides_what_is_observed_not_the_outcome():
    # Room for 2 tokens, so for one drafted one; it was rejected. Slot 2 was never in play.
    slots = metrics.acceptance_by_slot([[1, 1]], num_draft_tokens=2, budgets=[3], num_decoded=[2])
    assert [(s.num_observed, s.num_accepted) for s in slots] == [(1, 0), (0, 0)]
    assert slots[1].share is None


def test_what_lies_past_a_stop_token_counts_neither_way():
    # Round two accepted 3 drafts, the second of which was the stop token: slots 1 and 2 say something, slot 3 does not.
    slots = metrics.acceptance_by_slot([[1, 4]], num_draft_tokens=3, budgets=[None], num_decoded=[3])
    assert [(s.num_observed, s.num_accepted) for s in slots] == [(2, 1), (2, 1), (1, 0)]
    # The stop token was the target's own: the draft before it is accepted, the one in its place rejected.
    slots = metrics.acceptance_by_slot([[2]], num_draft_tokens=3, budgets=[None], num_decoded=[2])
    assert [(s.num_observed, s.num_accepted) for s in slots] == [(1, 1), (1, 0), (1, 0)]


def test_committed_lengths_end_with_the_text():
    assert metrics.committed_lengths([1, 4], 3) == [1, 2]
    assert metrics.committed_lengths([1, 4], 5) == [1, 4]
    assert metrics.committed_lengths([], 0) == []


def test_tau_of_a_summary_counts_committed_tokens():
    table = metrics.summarise([make_row(acceptance_lengths=[3, 4], finish_reason="stop", max_new_tokens=9)])
    assert table["tau_prompts"] == table["tau_rounds"] == pytest.approx(4 / 2)


def test_repeated_ngrams_by_hand():
    assert metrics.repeated_ngram_share([1, 2, 1, 2, 1], n=2) == pytest.approx(1 - 2 / 4)
    assert metrics.repeated_ngram_share([1, 2, 3, 4], n=4) == 0
    assert metrics.repeated_ngram_share([1], n=4) == 0


def test_speed_up_is_a_ratio_of_pooled_seconds_a_token():
    result = metrics.speed_up([4.0, 2.0], [10, 10], [1.0, 1.0], [10, 10])
    assert result.ratio == pytest.approx(3.0)
    assert 2.0 <= result.low <= 3.0 <= result.high <= 4.0


def test_speed_up_of_equal_entries_has_a_point_interval():
    result = metrics.speed_up([2.0] * 5, [10] * 5, [1.0] * 5, [10] * 5)
    assert (result.ratio, result.low, result.high) == pytest.approx((2.0, 2.0, 2.0))


def test_speed_up_without_enough_measurements():
    assert metrics.speed_up([], [], [], []) is None
    assert metrics.speed_up([1.0], [0], [1.0], [0]) is None
    assert metrics.speed_up([1.0], [5], [1.0], [5]) == metrics.SpeedUp(1.0, None, None)
    with pytest.raises(ValueError, match="pair them"):
        metrics.speed_up([1.0], [5], [], [])


def make_row(**changes):
    row = {
        "output_ids": [5, 6, 7, 8, 9],
        "acceptance_lengths": [1, 3],
        "num_draft_tokens": 3,
        "max_new_tokens": 5,
        "finish_reason": "length",
        "decode_s": 1.0,
        "plain_decode_s": 2.0,
        "plain_output_ids": [5, 6, 7, 8, 9],
        "identical": True,
    }
    return row | changes


def test_summary_by_hand():
    table = metrics.summarise([make_row(), make_row(identical=False, decode_s=3.0, acceptance_lengths=[4])])
    assert table["num_rows"] == 2
    assert table["num_new_tokens"] == 10
    assert table["tau_prompts"] == pytest.approx(3.0)
    assert table["tau_rounds"] == pytest.approx(8 / 3)
    assert table["tokens_per_s"] == pytest.approx(8 / 4)
    assert table["plain_tokens_per_s"] == pytest.approx(8 / 4)
    assert table["speed_up"].ratio == pytest.approx(1.0)
    assert (table["num_identical"], table["num_compared"]) == (1, 2)
    assert table["finish_reasons"] == {"length": 2}
    # Room of the rounds: 4 and 3 tokens in the first row, 4 in the second.
    assert [(s.num_observed, s.num_accepted) for s in table["acceptance_by_slot"]] == [(3, 2), (3, 2), (2, 1)]


def test_rows_of_one_batch_are_one_measurement():
    rows = [make_row(batch_id=0), make_row(batch_id=0)]
    assert metrics.summarise(rows)["speed_up"].low is None


def test_summary_of_plain_rows_says_nothing_about_tau():
    table = metrics.summarise([make_row(acceptance_lengths=None, identical=None, decode_s=None)])
    assert "tau_prompts" not in table
    assert table["plain_tokens_per_s"] == pytest.approx(2.0)


def test_identical_none_is_not_compared():
    table = metrics.summarise([make_row(identical=None)])
    assert (table["num_identical"], table["num_compared"]) == (0, 0)


def test_metrics_import_numpy_only():
    code = "import sys, domino_jax.evaluation.metrics; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
