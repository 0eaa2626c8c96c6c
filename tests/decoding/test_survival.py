"""The calibration: it finds a known map, stays finite where a slot never fails, and refuses files that are none."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit

from domino_jax.decoding.survival import (
    CalibrationError,
    SurvivalCalibration,
    check_calibration,
    load_calibration,
    save_calibration,
)
from domino_jax.evaluation.calibration import fit_slots
from tests.decoding.tiny_pair import make_configs


def draw_rounds(slope, intercept, num_rounds=20_000, num_slots=2):
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.05, 0.95, (num_rounds, num_slots))
    is_kept = generator.uniform(size=confidence.shape) < expit(slope * logit(confidence) + intercept)
    return confidence, np.cumprod(is_kept, axis=1).sum(axis=1)


def test_finds_the_map_of_every_slot():
    confidence, num_kept = draw_rounds(0.6, 0.8)
    slots = fit_slots(confidence, num_kept)
    np.testing.assert_allclose(slots.slope, 0.6, atol=0.06)
    np.testing.assert_allclose(slots.intercept, 0.8, atol=0.06)
    assert slots.rate[1] == pytest.approx((num_kept > 1).sum() / (num_kept > 0).sum(), abs=1e-3)


def test_slots_without_refusals_or_rounds_are_finite():
    slots = fit_slots(np.full((50, 3), 0.9), np.where(np.arange(50) < 1, 1, 1))
    assert np.isfinite([slots.slope, slots.intercept]).all()
    assert slots.intercept[0] > 0 > slots.intercept[1]
    assert (slots.slope[2], slots.intercept[2], slots.rate[2]) == (1, 0, 0.5)


def test_confidence_that_misleads_never_lowers_a_chance():
    confidence, num_kept = draw_rounds(-1.0, 0.0)
    assert min(fit_slots(confidence, num_kept).slope) == 0


def test_round_trip_and_refusals(tmp_path):
    path = tmp_path / "survival.json"
    with pytest.raises(CalibrationError, match=r"no survival calibration at .*calibrate_survival"):
        load_calibration(path)
    calibration = SurvivalCalibration({5: fit_slots(*draw_rounds(1.0, 0.0, 200, 5))})
    save_calibration(path, calibration)
    assert load_calibration(path) == calibration
    _, draft = make_configs()
    check_calibration(calibration, draft, (5,))
    with pytest.raises(CalibrationError, match="has block sizes 5, not 3"):
        check_calibration(calibration, draft, (3, 5))
    _, other = make_configs(shift_label=False)
    with pytest.raises(CalibrationError, match="5 slots for blocks of 5, the drafter drafts 4"):
        check_calibration(calibration, other, (5,))
    for content in (
        "[]",
        "no JSON",
        json.dumps({"block_sizes": {"5": {"slope": [-1.0], "intercept": [0.0], "rate": [0.5]}}}),
        json.dumps({"block_sizes": {"5": {"slope": [1.0], "intercept": [0.0, 1.0], "rate": [0.5]}}}),
        json.dumps({"block_sizes": {"5": {"slope": [1.0], "intercept": [0.0], "rate": [1.5]}}}),
    ):
        path.write_text(content)
        with pytest.raises(CalibrationError, match="is not a survival calibration"):
            load_calibration(path)
