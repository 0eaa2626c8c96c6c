"""The largest entries of a long axis, without sorting it.

An entry among the M largest lies in one of the M groups with the largest maxima: one pass over the values finds the
groups, and only what is in them is ranked. Exact, whatever the values are. On CPU this is many times faster than
`jnp.argmax` and `jax.lax.top_k` over a vocabulary; on GPU it is up to eight times faster than the latter for several
rows and about as fast as the former (`docs/performance.md`). On TPU, where groups of less than a register's lanes are a
copy of all values in another layout, it takes such groups for the largest few, and `jnp.argmax` for the largest.
"""

from functools import partial

import jax
import jax.numpy as jnp

from domino_jax.shapes import Array, Float, Int

_GROUP_SIZE = 64
_LANES = 128
"""Entries of a TPU's vector register along the last axis."""


def first_argmax(values: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """Return the index of the largest value, the first of equals; which one is open where there is a NaN."""
    return _plain_argmax(values) if values.shape[-1] <= _GROUP_SIZE else _argmax_of_many(values)


def _plain_argmax(values: Array) -> Array:
    return jnp.argmax(values, axis=-1).astype(jnp.int32)


@jax.jit
def _argmax_of_many(values: Array) -> Array:
    return jax.lax.platform_dependent(values, tpu=_plain_argmax, default=_argmax_by_groups)


def _argmax_by_groups(values: Array) -> Array:
    groups = _split_into_groups(values, _GROUP_SIZE)
    best_group = jnp.argmax(jnp.max(groups, axis=-1), axis=-1)
    members = jnp.take_along_axis(groups, best_group[..., None, None], axis=-2)[..., 0, :]
    return (best_group * _GROUP_SIZE + jnp.argmax(members, axis=-1)).astype(jnp.int32)


@partial(jax.jit, static_argnums=1)
def top_indices(values: Float[Array, "*batch V"], num: int) -> Int[Array, "*batch M"]:
    """Return the indices of the `num` largest values, the largest first, of equals any; `num` is at most V."""
    on_tpu, default = (partial(_top_by_groups, num=num, size=size) for size in (_LANES, _GROUP_SIZE))
    return jax.lax.platform_dependent(values, tpu=on_tpu, default=default)


def _top_by_groups(values: Array, num: int, size: int) -> Array:
    if num * size >= values.shape[-1]:
        return jax.lax.top_k(values, num)[1]
    groups = _split_into_groups(values, size)
    best_groups = jax.lax.top_k(jnp.max(groups, axis=-1), num)[1]
    members = jnp.take_along_axis(groups, best_groups[..., None], axis=-2)
    places = jax.lax.top_k(members.reshape(*values.shape[:-1], num * size), num)[1]
    group = jnp.take_along_axis(best_groups, places // size, axis=-1)
    return group * size + places % size


def _split_into_groups(values: Array, size: int) -> Array:
    num_groups = -(-values.shape[-1] // size)
    missing = num_groups * size - values.shape[-1]
    padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    return padded.reshape(*values.shape[:-1], num_groups, size)
