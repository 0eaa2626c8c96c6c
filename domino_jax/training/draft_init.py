"""Initial weights of a drafter taken from its target, instead of fresh ones.

In: freshly drawn drafter parameters and the target's. Out: the same tree, where draft layer j is a copy of the target
layer `target_layer_ids[0] + 1 + j`, `fc` passes the first captured stream through (the others start silent) and the
norms are the target's. The first draft layer then sees exactly the keys and values that the target's own layer sees,
so that what this layer has learned to look up works in the drafter from the first step; the head starts fresh.
Knows nothing about data or optimizers.

Source: drafters made of their target's own layers: Draft & Verify, arXiv 2309.08168; Kangaroo, arXiv 2404.18911.
"""

import jax.numpy as jnp

from domino_jax.config import ConfigError, DraftConfig, TargetConfig
from domino_jax.shapes import Params

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
)


def check_start(draft: DraftConfig, target: TargetConfig) -> None:
    """Check that draft layers can be copies of the target layers after the first captured one.

    Raises:
        ConfigError: a size differs, or the target has too few layers there; every problem is named.
    """
    problems = [
        f"{name} is {getattr(draft, name)}, the target's is {getattr(target, name)}"
        for name in _SIZES
        if getattr(draft, name) != getattr(target, name)
    ]
    last = draft.target_layer_ids[0] + draft.num_hidden_layers
    if last >= target.num_hidden_layers:
        problems.append(
            f"{draft.num_hidden_layers} draft layers after target layer {draft.target_layer_ids[0]} need a target "
            f"layer {last}, the target has 0 .. {target.num_hidden_layers - 1}"
        )
    if problems:
        raise ConfigError(
            "draft.initial_weights 'target' needs draft layers of the target's make; use 'fresh' or change:\n  "
            + "\n  ".join(problems)
        )


def start_from_target(params: Params, draft: DraftConfig, target: TargetConfig, target_params: Params) -> Params:
    """Return `params` with the backbone's weights taken from the target.

    Raises:
        ConfigError: see `check_start`.
    """
    check_start(draft, target)
    width, first = draft.hidden_size, draft.target_layer_ids[0] + 1
    backbone = dict(params["backbone"])
    for j in range(draft.num_hidden_layers):
        backbone[f"layers_{j}"] = dict(target_params[f"layers_{first + j}"])
    backbone["fc"] = jnp.zeros_like(backbone["fc"]).at[:width].set(jnp.eye(width))
    backbone["hidden_norm"] = target_params[f"layers_{first}"]["input_layernorm"]
    backbone["norm"] = target_params["norm"]
    return dict(params) | {"backbone": backbone}
