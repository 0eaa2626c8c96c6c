"""The jitted forward of the frozen target that fills a feature cache; the numbers are those of the training step.

Knows nothing about files. Like `training/step.py` it computes float32 products in float32 on every device.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from domino_jax.config import TargetConfig
from domino_jax.models.stacked_target import run_stacked
from domino_jax.ops.precision import in_full_precision
from domino_jax.shapes import Array, Float, Int, Params


def make_feature_step(
    target_config: TargetConfig,
    capture_layers: tuple[int, ...],
    with_hidden: bool,
    target_dtype: str = "float32",
    feature_dtype: str = "float32",
) -> Callable[..., tuple[Array, Array | None]]:
    """Return the jitted `feature_step(target_params, input_ids) -> (features, last_hidden)` in `feature_dtype`.

    `target_params` have their layers stacked (`models.stacked_target.stack_params`). Attention is causal: what pads a
    row on the right does not reach its tokens. `last_hidden` is None unless asked for.
    """
    run_target = partial(run_stacked, target_config, capture_layers, with_hidden, jnp.dtype(target_dtype))

    @in_full_precision
    def feature_step(
        target_params: Params, input_ids: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S CD"], Float[Array, "B S D"] | None]:
        features, last_hidden = run_target(target_params, input_ids)
        return features.astype(feature_dtype), None if last_hidden is None else last_hidden.astype(feature_dtype)

    return jax.jit(feature_step)
