"""Matrix products as accelerators want them.

Source: `jax.lax.dot_general`; mixed-precision training as in arXiv 1710.03740 (16-bit factors, float32 sums).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from domino_jax.ops import cpu_kernels
from domino_jax.shapes import Array, Float, Int

_PADDED_ROWS = 16
"""Rows of the smallest tile of a matrix unit."""

_NUM_PARTS = 4
"""Parts that a CPU cuts the product of a single row into."""

_KERNEL_ROWS = range(1, 129)
"""Rows that a CPU gives to a kernel of our own, where there is one; with bfloat16 weights any number."""

_FEW_ROWS = range(3, 33)
"""Rows that are kept from YNNPACK on a CPU, where there is none."""


def cast_weight(weight: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Return a weight as products of activations in `dtype` take it: in `dtype`, or as it is where that is as good.

    Kernels of a CPU widen the numbers of a bfloat16 weight as they read them: half the bytes, the same products.
    """
    return weight if weight.dtype == jnp.bfloat16 and takes_bfloat16(dtype) else weight.astype(dtype)


def take_rows(table: Float[Array, "V D"], ids: Int[Array, "*at"], dtype: jnp.dtype) -> Float[Array, "*at D"]:
    """Return rows, in `dtype`, of a table as `cast_weight` returns it.

    XLA's CPU backend would widen a whole bfloat16 table to take some rows of it.
    """
    return table[ids] if table.dtype == dtype else cpu_kernels.take_rows(table, ids)


def take_columns(table: Float[Array, "E V"], ids: Int[Array, "*at"], dtype: jnp.dtype) -> Float[Array, "*at E"]:
    """Return columns, in `dtype`, of a table in any type."""
    table = cast_weight(table, dtype)
    return table.T[ids] if table.dtype == dtype else cpu_kernels.take_columns(table, ids)


def takes_bfloat16(dtype: str | jnp.dtype) -> bool:
    """Return whether products of activations in `dtype` take bfloat16 weights as they are, on one device of this kind.

    True where a CPU has kernels for `dtype`: it is float32 then, and activations keep that type.
    """
    return cpu_kernels.has_kernels_for(dtype)


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


@jax.custom_vjp
def multiply_turned(x: Float[Array, "*batch I"], weight: Float[Array, "O I"]) -> Float[Array, "*batch O"]:
    """Return `x @ weight.T` with float32 sums and a float32 result; gradients as in `einsum_in_float32`.

    On CPUs up to 128 rows go to a kernel of our own. Where there is none the weight is the product's left factor: XLA
    would otherwise turn and pack all of it for a few rows, which takes longer than the product.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return jnp.einsum(_TURNED, x, weight, preferred_element_type=jnp.float32)
    return _multiply_turned_rows(x, weight)


_TURNED = "...i,oi->...o"


@jax.jit
def _multiply_turned_rows(x: Array, weight: Array) -> Array:
    default = partial(jnp.einsum, _TURNED, preferred_element_type=jnp.float32)
    if _is_for_kernels(x, weight) and _has_kernels_for(x, weight):
        on_cpu = _by_kernel(cpu_kernels.multiply_turned_rows)
    else:
        on_cpu = _multiply_from_left if x.size > x.shape[-1] else default
    return jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=default)


def _is_for_kernels(x: Array, weight: Array) -> bool:
    """Return whether kernels, where there are some, are quicker; XLA would have to widen a whole bfloat16 weight."""
    return x.size // x.shape[-1] in _KERNEL_ROWS or weight.dtype != x.dtype


def _has_kernels_for(x: Array, weight: Array) -> bool:
    return weight.dtype in (x.dtype, jnp.bfloat16) and cpu_kernels.has_kernels_for(x.dtype)


def _by_kernel(kernel: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda x, weight: kernel(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)


def _multiply_from_left(x: Array, weight: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    num_rows = rows.shape[0]
    if num_rows <= 16:  # kernels of 4, 8 and 16 columns: one of them without a rest is quicker than two
        rows = jnp.pad(rows, ((0, -num_rows % (4 if num_rows <= 8 else 8)), (0, 0)))
    # Without barriers XLA sees that the turned product of turned factors is the product it started from.
    columns = jnp.matmul(
        weight.astype(x.dtype), jax.lax.optimization_barrier(rows.T), preferred_element_type=jnp.float32
    )
    return jax.lax.optimization_barrier(columns)[:, :num_rows].T.reshape(*x.shape[:-1], -1)


def _turned_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return multiply_turned(x, weight), (x, weight)


multiply_turned.defvjp(_turned_forward, partial(_einsum_backward, _TURNED))


def multiply(x: Float[Array, "*batch I"], weight: Float[Array, "I O"]) -> Float[Array, "*batch O"]:
    """Return `x @ weight` in the type of `x`.

    On NVIDIA GPUs a single row is padded to a tile of the matrix unit: XLA would make a reduction over columns of the
    product, which reads the weight at little more than half of the memory's rate (measured on an H100). On CPUs up to
    128 rows go to a kernel of our own. Where there is none, a row is multiplied part by part: XLA's threads would
    otherwise share the weight by columns, and each reads short pieces; and a few rows are kept from YNNPACK, which
    packs the whole weight for them: products with a turned left factor are made by Eigen, which does not.
    """
    return _multiply_few_rows(x, weight) if _is_for_kernels(x, weight) else _multiply_by_default(x, weight)


@jax.jit
def _multiply_few_rows(x: Array, weight: Array) -> Array:
    is_row = x.size == x.shape[-1]
    by_platform = {"cuda": _multiply_padded} if is_row else {}
    if jax.sharding.get_abstract_mesh().empty:  # of a weight that devices share each has a part
        by_platform |= {"cpu": _choose_on_cpu(x, weight)}
    return jax.lax.platform_dependent(x, weight, default=_multiply_by_default, **by_platform)


def _multiply_by_default(x: Array, weight: Array) -> Array:
    return x @ weight.astype(x.dtype)


def _choose_on_cpu(x: Array, weight: Array) -> Callable[[Array, Array], Array]:
    if _has_kernels_for(x, weight):
        return _by_kernel(cpu_kernels.multiply_rows)
    if x.size == x.shape[-1]:
        return _multiply_in_parts if weight.shape[0] % _NUM_PARTS == 0 else jnp.matmul
    is_few = x.dtype == jnp.float32 and x.size // x.shape[-1] in _FEW_ROWS
    return _multiply_turned_factor if is_few else jnp.matmul


def _multiply_turned_factor(x: Array, weight: Array) -> Array:
    columns = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)  # else XLA turns it back
    return jnp.einsum("ir,io->ro", columns, weight).reshape(*x.shape[:-1], -1)


def _multiply_padded(x: Array, weight: Array) -> Array:
    rows = jnp.pad(x.reshape(1, -1), ((0, _PADDED_ROWS - 1), (0, 0)))
    return (rows @ weight)[:1].reshape(*x.shape[:-1], -1)


def _multiply_in_parts(x: Array, weight: Array) -> Array:
    parts = weight.reshape(_NUM_PARTS, -1, weight.shape[-1])
    products = jnp.einsum("pi,pio->po", x.reshape(_NUM_PARTS, -1), parts, preferred_element_type=jnp.float32)
    return jnp.sum(products, axis=0).astype(x.dtype).reshape(*x.shape[:-1], -1)
