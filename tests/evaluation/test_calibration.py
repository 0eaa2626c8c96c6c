"""Held-out decodes make a calibration of every block size, with the rates that decoding has."""

import numpy as np
import pytest

from domino_jax.decoding.survival import CalibrationError
from domino_jax.evaluation.calibration import calibrate_survival
from tests.decoding.tiny_pair import make_decoder, make_prompts


def test_rates_are_those_of_decoding():
    decoder, prompts = make_decoder(), make_prompts((3, 5, 9, 2, 8, 7, 4, 6))
    calibration = calibrate_survival(decoder, prompts, 40, (2, 5))
    assert {size: len(slots.rate) for size, slots in calibration.sizes.items()} == {2: 2, 5: 5}
    decoded = decoder.generate(prompts, 40, block_size=5)
    num_kept = np.concatenate([np.array(g.stats.acceptance_lengths[:-1]) - 1 for g in decoded])
    first, rounds = (num_kept > 0).sum(), len(num_kept)
    assert np.isclose(calibration.sizes[5].rate[0], (first + 1) / (rounds + 2))


def test_texts_without_a_whole_round_are_refused():
    with pytest.raises(CalibrationError, match=r"no round of block 5 is left .* budget of 1 tokens"):
        calibrate_survival(make_decoder(), make_prompts((3, 5)), 1, (5,))
