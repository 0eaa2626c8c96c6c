"""Learning rate and curriculum weight as optax schedules, counted in optimizer steps, never in micro-steps.

Source: Domino, arXiv 2605.29707 (base-anchored curriculum); SGDR, arXiv 1608.03983 (cosine decay).
"""

import jax.numpy as jnp
import optax

from domino_jax.run_config import ObjectiveConfig, OptimizerConfig
from domino_jax.shapes import Array, Float, Int


def base_weight_schedule(config: ObjectiveConfig, num_steps: int) -> optax.Schedule:
    """Return lambda(t), the weight of the base loss.

    With x = t / max(1, floor(rho * T)): `linear` is clip(lambda_0 * (1 - x), 0, 1), `cosine` is
    lambda_0 * (1 + cos(pi * min(x, 1))) / 2, `constant` is lambda_0.

    Source: Domino, arXiv 2605.29707; `lambda_base` of sgl-project/SpecForge.
    """
    if config.base_weight_shape == "constant":
        return lambda step: jnp.full((), config.base_weight_start, jnp.float32)
    decay_steps = max(1, int(config.base_weight_decay_ratio * num_steps))

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        # One subtraction of whole numbers and one division: exact to the last bit but one in float32.
        left = jnp.asarray(decay_steps - step, jnp.float32) / decay_steps
        if config.base_weight_shape == "cosine":
            left = (1 - jnp.cos(jnp.pi * jnp.clip(left, 0.0, 1.0))) / 2
        return jnp.clip(config.base_weight_start * left, 0.0, 1.0)

    return schedule


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Return the learning rate: a linear rise from 0, then a cosine to `end_ratio` of the highest rate."""
    warmup_steps = min(int(config.warmup_ratio * num_steps), max(num_steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, 1),
        end_value=config.end_ratio * config.learning_rate,
    )
