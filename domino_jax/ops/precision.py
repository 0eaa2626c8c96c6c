"""Products of float32 arrays done in float32 on every device.

By default accelerators shorten the factors of a float32 product (TF32 on GPUs, bfloat16 passes on TPUs). A verify pass
and a plain step then differ by more than rounding, and so may their texts. 16-bit arrays are not affected.

Source: `jax_default_matmul_precision` of the JAX configuration.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_T = TypeVar("_T")


def in_full_precision(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return `function` traced with full-precision products; belongs directly below `jax.jit`."""

    @wraps(function)
    def traced(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced
