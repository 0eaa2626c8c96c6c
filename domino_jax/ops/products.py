"""Matrix products as accelerators want them.

Source: `jax.lax.dot_general`; mixed-precision training as in arXiv 1710.03740 (16-bit factors, float32 sums).
"""

from functools import partial

import jax
import jax.numpy as jnp

from domino_jax.shapes import Array, Float

_PADDED_ROWS = 16
"""Rows of the smallest tile of a matrix unit."""

_NUM_PARTS = 4
"""Parts that a CPU cuts the product of a single row into."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_in_float32(subscripts: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `jnp.einsum(subscripts, x, y)` with float32 sums and a float32 result.

    Gradients are products in the type of the factors: the float32 gradient of a 16-bit product would otherwise turn the
    other factor into float32 too, and such products are many times slower on accelerators.
    """
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _einsum_forward(subscripts: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum_in_float32(subscripts, x, y), (x, y)


def _einsum_backward(subscripts: str, factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, pull_back = jax.vjp(partial(jnp.einsum, subscripts), *factors)
    return pull_back(gradient.astype(jnp.result_type(*factors)))


einsum_in_float32.defvjp(_einsum_forward, _einsum_backward)


def multiply(x: Float[Array, "*batch I"], weight: Float[Array, "I O"]) -> Float[Array, "*batch O"]:
    """Return `x @ weight`.

    On NVIDIA GPUs a single row is padded to a tile of the matrix unit: XLA would make a reduction over columns of the
    product, which reads the weight at little more than half of the memory's rate (measured on an H100). On CPUs it is
    multiplied part by part: XLA's threads would otherwise share the weight by columns, and each reads short pieces.
    """
    return x @ weight if x.size > x.shape[-1] else _multiply_row(x, weight)


@jax.jit
def _multiply_row(x: Array, weight: Array) -> Array:
    # Of a weight that devices share the parts may lie on several of them.
    is_whole = jax.sharding.get_abstract_mesh().empty and weight.shape[0] % _NUM_PARTS == 0
    by_parts = {"cpu": _multiply_in_parts} if is_whole else {}
    return jax.lax.platform_dependent(x, weight, cuda=_multiply_padded, default=jnp.matmul, **by_parts)


def _multiply_padded(x: Array, weight: Array) -> Array:
    rows = jnp.pad(x.reshape(1, -1), ((0, _PADDED_ROWS - 1), (0, 0)))
    return (rows @ weight)[:1].reshape(*x.shape[:-1], -1)


def _multiply_in_parts(x: Array, weight: Array) -> Array:
    parts = weight.reshape(_NUM_PARTS, -1, weight.shape[-1])
    products = jnp.einsum("pi,pio->po", x.reshape(_NUM_PARTS, -1), parts, preferred_element_type=jnp.float32)
    return jnp.sum(products, axis=0).astype(x.dtype).reshape(*x.shape[:-1], -1)
