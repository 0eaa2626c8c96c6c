import json

import jax
import numpy as np
import pytest


def test_base_weight_equals_golden(golden_dir):
    from domino_jax.run_config import ObjectiveConfig
    from domino_jax.training.schedule import base_weight_schedule

    cases = json.loads((golden_dir / "train" / "lambda_base.json").read_text())["cases"]
    assert cases
    for case in cases:
        config = ObjectiveConfig(
            base_weight_start=case["lambda_base_start"], base_weight_decay_ratio=case["lambda_base_decay_ratio"]
        )
        schedule = jax.jit(jax.vmap(base_weight_schedule(config, case["total_steps"])))
        values = schedule(np.arange(len(case["values"])))
        np.testing.assert_allclose(values, case["values"], rtol=0, atol=1e-7)


def test_learning_rate_rises_and_falls():
    from domino_jax.run_config import OptimizerConfig
    from domino_jax.training.schedule import learning_rate_schedule

    config = OptimizerConfig(learning_rate=6e-4, warmup_ratio=0.04, end_ratio=0.1)
    rates = np.array([learning_rate_schedule(config, 1000)(t) for t in (0, 20, 40, 520, 1000)])
    np.testing.assert_allclose(rates, [0, 3e-4, 6e-4, 3.3e-4, 6e-5], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.5, 1.0])
def test_short_runs_have_finite_positive_rates(num_steps, warmup_ratio):
    from domino_jax.run_config import OptimizerConfig
    from domino_jax.training.schedule import learning_rate_schedule

    schedule = learning_rate_schedule(OptimizerConfig(warmup_ratio=warmup_ratio), num_steps)
    rates = np.array([schedule(t) for t in range(num_steps)])
    assert np.isfinite(rates).all()
    assert rates.max() == pytest.approx(6e-4)
