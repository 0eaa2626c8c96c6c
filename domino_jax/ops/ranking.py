"""The largest entries of a long axis, without sorting it.

An entry among the M largest lies in one of the M groups with the largest maxima: one pass over the values finds the
groups, and only what is in them is ranked. Exact, whatever the values are. On CPU this is many times faster than
`jnp.argmax` and `jax.lax.top_k` over a vocabulary; on GPU it is up to eight times faster than the latter for several
rows and about as fast as the former (`docs/performance.md`).
"""

import jax
import jax.numpy as jnp

from domino_jax.shapes import Array, Float, Int

_GROUP_SIZE = 64


def first_argmax(values: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """Return the index of the largest value, the first of equals; which one is open where there is a NaN."""
    if values.shape[-1] <= _GROUP_SIZE:
        return jnp.argmax(values, axis=-1).astype(jnp.int32)
    groups = _split_into_groups(values)
    best_group = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
    members = jnp.take_along_axis(groups, best_group[..., None, None], axis=-2)[..., 0, :]
    return (best_group * _GROUP_SIZE + jnp.argmax(members, axis=-1)).astype(jnp.int32)


def top_indices(values: Float[Array, "*batch V"], num: int) -> Int[Array, "*batch M"]:
    """Return the indices of the `num` largest values, the largest first; `num` is at most V."""
    if num * _GROUP_SIZE >= values.shape[-1]:
        return jax.lax.top_k(values, num)[1]
    groups = _split_into_groups(values)
    best_groups = jax.lax.top_k(jnp.max(groups, axis=-1), num)[1]
    members = jnp.take_along_axis(groups, best_groups[..., None], axis=-2)
    places = jax.lax.top_k(members.reshape(*values.shape[:-1], num * _GROUP_SIZE), num)[1]
    group = jnp.take_along_axis(best_groups, places // _GROUP_SIZE, axis=-1)
    return group * _GROUP_SIZE + places % _GROUP_SIZE


def _split_into_groups(values: Float[Array, "*batch V"]) -> Float[Array, "*batch groups members"]:
    num_groups = -(-values.shape[-1] // _GROUP_SIZE)
    missing = num_groups * _GROUP_SIZE - values.shape[-1]
    padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    return padded.reshape(*values.shape[:-1], num_groups, _GROUP_SIZE)
