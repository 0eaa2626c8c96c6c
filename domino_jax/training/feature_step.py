"""The jitted forward of the frozen target that fills a feature cache; the numbers are those of the training step.

Knows nothing about files. Like `training/step.py` it computes float32 products in float32 on every device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from domino_jax.config import TargetConfig
from domino_jax.models.qwen3 import Qwen3
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

    Attention is causal: what pads a row on the right does not reach its tokens. `last_hidden` is None unless asked for.
    """
    target = Qwen3(target_config, capture_layers, jnp.dtype(target_dtype))

    @in_full_precision
    def feature_step(
        target_params: Params, input_ids: Int[Array, "B S"]
    ) -> tuple[Float[Array, "B S CD"], Float[Array, "B S D"] | None]:
        output = target.apply({"params": target_params}, input_ids)
        last_hidden = output.hidden.astype(feature_dtype) if with_hidden else None
        return output.features.astype(feature_dtype), last_hidden

    return jax.jit(feature_step)
