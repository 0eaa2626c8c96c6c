"""Domino speculative decoding in JAX/Flax: train, decode with and measure block-parallel drafters.

Source: Domino, arXiv 2605.29707.
"""

__version__ = "0.1.0"
