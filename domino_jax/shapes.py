"""Axis letters and array aliases used by every signature of the package.

The letters below mean the same thing in jaxtyping signatures, in einsum
strings and as suffixes of local names:

    B  sequences of a batch            T  query positions of one forward
    S  context or cache positions      A  anchors of a training sequence
    P  slots of a draft block          D  width of the residual stream
    N  query heads                     K  key/value heads
    G  query heads per key/value head  H  head width
    F  MLP width                       V  vocabulary
    L  layers                          C  captured target layers
    R  GRU width                       E  rank of the head's correction
    W  positions of one verify pass (drafted tokens + 1)

Tests check the shapes of every call. Pytrees that are compiled ahead of time opt out of a check of their fields
(`no_type_check`): jax fills copies of them with shapes, flags and other placeholders.

Nothing here knows about models, files or devices.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from jaxtyping import Array, BFloat16, Bool, Float, Int, Shaped, UInt32

Params: TypeAlias = Mapping[str, Any]
"""A pytree of parameter arrays as Flax returns it (nested string-keyed mappings)."""

__all__ = ["Array", "BFloat16", "Bool", "Float", "Int", "Params", "Shaped", "UInt32"]
