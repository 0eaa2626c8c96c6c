import pytest

from domino_jax.config import SamplingConfig
from domino_jax.serving.round_costs import CALL_S, count_call_rounds, find_manner


@pytest.mark.parametrize(("share", "rounds"), [(0.1, 4), (0.3, 3), (0.6, 1), (2.0, 1)])
def test_a_call_has_as_many_rounds_as_fit_its_time_and_at_least_one(share, rounds):
    assert count_call_rounds(share * CALL_S, max_rounds=4) == rounds


def test_the_dearest_row_decides_the_manner_of_a_batch():
    greedy, sampled = SamplingConfig(), SamplingConfig(temperature=1.0)
    assert find_manner([greedy, greedy]) == "greedy"
    assert find_manner([greedy, sampled]) == "sampled"
    for fields in ({"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert find_manner([sampled, greedy, SamplingConfig(temperature=1.0, **fields)]) == "filtered"
        assert find_manner([greedy, SamplingConfig(**fields)]) == "greedy"
