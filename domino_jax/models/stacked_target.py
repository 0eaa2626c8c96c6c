"""The forward of a frozen target whose layers are stacked: one array a kind of tensor, one compiled layer.

A loop runs over the layers, so a program's size and the time to compile it do not depend on their number. Decoding
has its layers one by one instead (`Qwen3.forward_cached`): a loop would copy the caches that it carries.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.config import TargetConfig
from domino_jax.models.layers import DecoderLayer, make_layer, rms_norm
from domino_jax.models.qwen3 import embed_tokens
from domino_jax.shapes import Array, Float, Int, Params
from domino_jax.sharding import constrain

STACKED = "layers"
"""Key of the stacked layers, which stands for `layers_0`, `layers_1` and so on."""


def stack_params(params: Params) -> Params:
    """Return target parameters with their layers stacked: what `layers_{i}/x` are is `layers/x`, first axis i."""
    outer, layers = split_layers(params)
    return outer | {STACKED: stack_layers(layers, jnp.stack)}


def split_layers(params: Params) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return copies of the mappings: what is outside the layers, and the layers from the first to the last.

    Leaves may be arrays or shapes.
    """
    names = sorted((name for name in params if name.startswith("layers_")), key=lambda name: int(name[7:]))
    return {name: leaf for name, leaf in params.items() if name not in names}, [dict(params[name]) for name in names]


def stack_layers(layers: list[dict[str, Array]], join: Callable[[list[Array]], Array]) -> dict[str, Array]:
    """Return one array a kind of tensor; the mappings are emptied on the way, so that what was joined can go."""
    return {name: join([layer.pop(name) for layer in layers]) for name in list(layers[0])}


def unstack_layers(stacked: dict[str, Array], part: Callable[[Array], Sequence[Array]]) -> dict[str, dict[str, Array]]:
    """Return the layers by name, the inverse of `stack_layers`; `stacked` is emptied on the way."""
    layers: dict[str, dict[str, Array]] = {}
    for name in list(stacked):
        for i, leaf in enumerate(part(stacked.pop(name))):
            layers.setdefault(f"layers_{i}", {})[name] = leaf
    return layers


def run_stacked(
    config: TargetConfig,
    capture_layers: tuple[int, ...],
    with_hidden: bool,
    dtype: jnp.dtype,
    params: Params,
    token_ids: Int[Array, "B T"],
) -> tuple[Float[Array, "B T CD"], Float[Array, "B T D"] | None]:
    """Return features and final-normed states (None unless `with_hidden`) of whole sequences, as `Qwen3` does.

    `params` are those of `stack_params`. Layers that nothing is asked of are not run.
    """
    layer = make_layer(config, dtype)
    x = embed_tokens(params["embed_tokens"], token_ids, dtype)
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1]), token_ids.shape)
    num_run = config.num_hidden_layers if with_hidden else max(capture_layers, default=-1) + 1
    captured = sorted(set(capture_layers))
    # A stream that nobody asked for goes to one place more, which is not read.
    places = jnp.array([captured.index(i) if i in captured else len(captured) for i in range(num_run)], jnp.int32)
    streams = constrain(jnp.zeros((len(captured) + 1, *x.shape), x.dtype), "streams")

    def run_layer(carry: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        x, streams = carry
        number, place = at
        weights = {
            name: jax.lax.dynamic_index_in_dim(w, number, keepdims=False, allow_negative_indices=False)
            for name, w in params[STACKED].items()
        }
        x = layer.apply({"params": weights}, x, positions, method=DecoderLayer.run_causal)
        streams = jax.lax.dynamic_update_index_in_dim(streams, x, place, axis=0)
        return (x, constrain(streams, "streams")), None

    (x, streams), _ = jax.lax.scan(run_layer, (x, streams), (jnp.arange(num_run), places))
    asked = [streams[captured.index(i)] for i in capture_layers]
    features = jnp.concatenate(asked, axis=-1) if asked else jnp.zeros((*x.shape[:-1], 0), x.dtype)
    last_hidden = rms_norm(x, params["norm"], config.rms_norm_eps) if with_hidden else None
    return constrain(features, "states"), last_hidden
